"""The report of a run, from the files in its folder."""

from pathlib import Path

from keras_iris.evaluation.figures import DARK, LIGHT, draw_png
from keras_iris.evaluation.page import (
    figure_section,
    page,
    prose,
    settings_section,
    table_section,
)
from keras_iris.evaluation.panels import make_plots
from keras_iris.evaluation.run_record import (
    RunRecord,
    read_comparisons,
    read_run,
)
from keras_iris.evaluation.tables import (
    manifest_table,
    score_table,
    timing_table,
    training_table,
)
from keras_iris.evaluation.words import what_came_out

_RUN_NAME = "this run"


def report(run_dir: str | Path) -> Path:
    """Writes `report.html` and `plots/*.png` into a run's folder.

    The page holds all its plots and needs no network. Sub-folders that are
    runs themselves, such as `control`, are compared with the run.

    Args:
        run_dir: Folder of a run, finished or not.

    Returns:
        Path of `report.html`.

    Raises:
        ValueError: The folder isn't a run's, a file in it can't be read, or
            it can't be written to.
    """
    run_dir = Path(run_dir)
    run, others = read_run(run_dir, _RUN_NAME), read_comparisons(run_dir)
    figures = {}
    images = {}
    for plot in make_plots(run, others):
        light = draw_png(plot, LIGHT)
        images[plot.name] = light
        figures[plot.name] = figure_section(plot, light, draw_png(plot, DARK))
    scores = figures.pop("scores", "")
    html = page(
        str(run.manifest.get("title", run_dir.resolve().name)),
        _subtitle(run, run_dir),
        [
            prose("What came out", what_came_out(run, others)),
            table_section(score_table(run, others)),
            scores,
            *figures.values(),
            table_section(training_table(run)),
            table_section(timing_table(run)),
            settings_section(
                "Settings and versions",
                [
                    manifest_table(run, "settings", "Settings"),
                    manifest_table(run, "versions", "Versions"),
                ],
            ),
        ],
    )
    return _write(run_dir, html, images)


def scores_table(run_dir: str | Path) -> str:
    """What came out of a run, for a terminal.

    Args:
        run_dir: Folder of a run, finished or not.

    Returns:
        The tables of scores, training and timing, then the outcome in words.

    Raises:
        ValueError: The folder isn't a run's, or a file can't be read.
    """
    run_dir = Path(run_dir)
    run, others = read_run(run_dir, _RUN_NAME), read_comparisons(run_dir)
    tables = [score_table(run, others), training_table(run), timing_table(run)]
    texts = [table.text() for table in tables if table.rows]
    return "\n\n".join([*texts, "\n".join(what_came_out(run, others))])


def _subtitle(run: RunRecord, run_dir: Path) -> str:
    created = str(run.manifest.get("created", ""))
    return f"{run_dir} · {created}" if created else str(run_dir)


def _write(run_dir: Path, html: str, images: dict[str, bytes]) -> Path:
    path = run_dir / "report.html"
    try:
        (run_dir / "plots").mkdir(exist_ok=True)
        for name, image in images.items():
            (run_dir / "plots" / f"{name}.png").write_bytes(image)
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"Expected to write the report into {run_dir}. Received: {error}. "
            "Copy the folder to where you can write, and pass that."
        ) from error
    return path
