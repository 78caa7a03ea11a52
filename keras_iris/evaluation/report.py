"""The report of a run, from the files in its folder."""

import shlex
from pathlib import Path

from keras_iris.evaluation.plots import draw, draw_svg, make_plots
from keras_iris.evaluation.run_record import read_run
from keras_iris.evaluation.tables import (
    make_answers,
    make_tables,
    what_came_out,
)
from keras_iris.files import replaced
from keras_iris.self_play.alarms import alarm_texts


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
    from jinja2 import Environment, PackageLoader

    run = read_run(run_dir)
    plots = make_plots(run)
    pages = PackageLoader("keras_iris.evaluation", "")
    environment = Environment(loader=pages, autoescape=True, trim_blocks=True)
    environment.filters["quote"] = lambda path: shlex.quote(str(path))
    html = environment.get_template("page.html.jinja").render(
        run=run,
        sentences=what_came_out(run),
        alarms=alarm_texts(run.of_kind("alarm")),
        tables=make_tables(run),
        answers=make_answers(run),
        plots={n: list(map(draw_svg, panels)) for n, panels in plots.items()},
    )
    path = run.folder / "report.html"
    try:
        for name, panels in plots.items():
            with replaced(run.folder / "plots" / f"{name}.png") as new:
                draw(panels).savefig(new, format="png")
        with replaced(path) as new:
            new.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"Expected to write the report into {run.folder}. Received: "
            f"{error}. Copy the folder to where you can write, and pass that."
        ) from error
    return path


def scores_table(run_dir: str | Path) -> str:
    """What came out of a run, for a terminal.

    Args:
        run_dir: Folder of a run, finished or not.

    Returns:
        The tables of scores, training and timing, then the outcome in words,
        and the alarms.

    Raises:
        ValueError: The folder isn't a run's, or a file can't be read.
    """
    run = read_run(run_dir)
    texts = [table.text() for table in make_tables(run)]
    words = [*what_came_out(run), *alarm_texts(run.of_kind("alarm"))]
    return "\n\n".join([*texts, "\n".join(words)])


def samples(run_dir: str | Path) -> str:
    """What the model answered to a few held-out prompts, for a terminal.

    Args:
        run_dir: Folder of a run that was evaluated by
            `keras_iris.evaluation.HeldOut`.

    Returns:
        For each prompt the annotated response and the model's answers, before
        self-play and after each iteration, and of a control at its end.

    Raises:
        ValueError: The folder isn't a run's, or has no answers.
    """
    shown = make_answers(read_run(run_dir))
    if not shown:
        raise ValueError(
            f"{run_dir} has no answers to held-out prompts. Run with "
            "`SelfPlay(evaluate=keras_iris.evaluation.HeldOut(examples))`."
        )
    blocks = [[f"{name:>12}  {text!r}" for name, text in s] for s in shown]
    return "\n\n".join(map("\n".join, blocks))
