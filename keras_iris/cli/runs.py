"""Commands on the folder of a run: `report`, `samples`, `export`."""

from pathlib import Path
from typing import Annotated

import typer

from keras_iris.cli.output import Result, shown

RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run's folder, done or not.")
]


@shown
def report(run: RunFolder) -> Result:
    """Write report.html and plots/*.png into a run's folder."""
    from keras_iris.evaluation import report

    path = str(report(run))
    return Result({"report": path}, path)


@shown
def samples(run: RunFolder) -> Result:
    """Print what the model answered to held-out prompts."""
    from keras_iris.evaluation import samples
    from keras_iris.evaluation.run_record import read_run
    from keras_iris.evaluation.tables import make_answers

    text = samples(run)
    answers = make_answers(read_run(run))
    return Result([dict(lines) for lines in answers], text)


@shown
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    best: Annotated[
        bool, typer.Option("--best", help="Of `keep_best`, not the latest.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32, ...")] = "bfloat16",
    config: Annotated[
        Path | None,
        typer.Option(help="By default the one that `run` left in RUN."),
    ] = None,
) -> Result:
    """Write a run's model as a folder for transformers, vLLM and this package.

    A run's folder has what was trained, and config.yaml says from which model.
    """
    import keras_iris
    from keras_iris.cli.config import read_config
    from keras_iris.cli.training import CONFIG_FILE, load_trained

    file = config or run / CONFIG_FILE
    if not file.exists():
        raise ValueError(
            f"{file} isn't there, which says what model was trained: `run` "
            "writes it, programs don't. Pass --config FILE.yaml with the "
            "`load` and `compile` that the run had."
        )
    causal_lm = load_trained(run, read_config(file), best=best)
    path = str(keras_iris.export(causal_lm, out, dtype=dtype))
    return Result({"model": path}, path)
