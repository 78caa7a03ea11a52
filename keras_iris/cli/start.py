"""Commands that begin: `quickstart`, `run`, `estimate`."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from keras_iris.cli.output import Result, shown

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="See docs/cli.md.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.NAME=VALUE",
        help="Goes before the file, such as self_play.iterations=1.",
    ),
]
_SMALL = {
    "POOL_SIZE": 1_000,
    "NUM_HELD_OUT": 20,
    "SFT_EPOCHS": 1,
    "ITERATIONS": 1,
    "EPOCHS": 1,
}


def _find_recipe() -> Path:
    """`recipes/quickstart.py`, which a wheel has inside of the package."""
    package = Path(__file__).parents[1]
    places = [f / "recipes/quickstart.py" for f in (package, package.parent)]
    return next(filter(Path.exists, places))


@shown
def quickstart(
    small: Annotated[
        bool, typer.Option("--small", help="A look at whether all works.")
    ] = False,
) -> Result:
    """Learn how English words are pronounced: SFT, IRIS, a report."""
    spec = importlib.util.spec_from_file_location("quickstart", _find_recipe())
    assert spec and spec.loader  # it is a Python file
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    if small:
        folder = recipe.RUN_DIR.with_name(recipe.RUN_DIR.name + "_small")
        vars(recipe).update(_SMALL, RUN_DIR=folder)
    recipe.main()
    return _result(recipe.RUN_DIR)._replace(text="")  # it has told


@shown
def run(config: ConfigFile, settings: Settings = None) -> Result:
    """Train a model as a YAML file says, or go on with it."""
    from keras_iris.cli.config import read_config
    from keras_iris.cli.training import train
    from keras_iris.distribution import process_index
    from keras_iris.evaluation import report

    run_dir = train(read_config(config, settings or ()))
    if process_index() > 0:
        return Result({"run_dir": str(run_dir)}, "")
    report(run_dir)
    data, text, _ = _result(run_dir)
    return Result(
        data, f"{text}\nIts model: keras-iris export {run_dir} --out FOLDER"
    )


def _result(run_dir: Path) -> Result:
    from keras_iris.evaluation import scores_table
    from keras_iris.evaluation.run_record import read_run

    run = read_run(run_dir)
    scores = {
        record.name: {
            name: record.scores(name) for name in record.score_names()
        }
        for record in (run, *run.others)
    }
    report = run_dir / "report.html"
    return Result(
        {"run_dir": str(run_dir), "report": str(report), "scores": scores},
        f"{scores_table(run_dir)}\n\nReport: {report}",
    )


@shown
def estimate(
    config: ConfigFile,
    settings: Settings = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="The device is a CPU, not a GPU.")
    ] = False,
) -> Result:
    """Tell what a run takes in memory, disk and time, without its weights."""
    from keras_iris.cli.config import read_config
    from keras_iris.cli.training import estimate_run

    found = estimate_run(read_config(config, settings or ()), is_gpu=not cpu)
    parts = {
        "memory_bytes": found.memory(),
        "disk_bytes": found.disk(),
        "seconds": found.seconds(),
    }
    return Result(parts, str(found))
