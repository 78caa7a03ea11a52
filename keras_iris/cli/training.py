"""What `run`, `estimate` and `export` make of a configuration."""

import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_iris
from keras_iris.cli.config import Config, Section, Spec, arguments_of, build
from keras_iris.data import Conversation, Example, load_dataset, tokenize
from keras_iris.models.checks import check_compile
from keras_iris.run_estimate import RunEstimate
from keras_iris.self_play.best import Best
from keras_iris.self_play.checkpoints import Checkpoints, state_of
from keras_iris.self_play.options import Options
from keras_iris.self_play.run_dir import read_manifest
from keras_iris.self_play.settings import WeightsHash

CONFIG_FILE = "config.yaml"  # of a run's folder
_SAMPLE = 64  # rows that an estimate reads of a data set on the hub
_LIMITS = (
    "max_prompt_length",
    "max_response_length",
    "on_overflow",
    "on_bad_row",
)


def train(config: Config) -> Path:
    """Runs a configuration, or goes on with it.

    Args:
        config: Checked by `read_config`.

    Returns:
        The run's folder.

    Raises:
        ValueError: An argument is out of its range, or as in `SelfPlay`.
    """
    play = _with_defaults(config)
    _check_ranges(config, play)
    keras_iris.distribution.initialize()  # of several processes, if any
    keras.utils.set_random_seed(play["seed"])
    if mesh := config.sections.get("distribution"):
        keras.distribution.set_distribution(
            keras_iris.distribution.make_distribution(**mesh)
        )
    train_rows, held_out_rows = _read_rows(play)
    causal_lm = keras_iris.load(**config.sections["load"])
    examples = _tokenize(train_rows, causal_lm, play)
    num_pairs = len(examples) * play["num_samples"]
    num_batches = -(-num_pairs // play["batch_size"])
    known = {
        "causal_lm": causal_lm,
        "end_token_ids": causal_lm.tokenizer.end_token_ids,
        "max_new_tokens": play["max_response_length"],
        "batch_size": play["batch_size"],
        "num_steps": num_batches * play["epochs"] * play["iterations"],
    }
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(**build(config.sections["compile"], known))
    if held_out_rows:
        held_out = _tokenize(held_out_rows, causal_lm, play)
        play["evaluate"].arguments["examples"] = held_out
    arguments = build({**play, "data": examples}, known)
    self_play = keras_iris.SelfPlay(model, **arguments)
    self_play.folder.texts[CONFIG_FILE] = config.text
    return self_play.run()


def estimate_run(config: Config, *, is_gpu: bool) -> RunEstimate:
    """Estimates what a configuration takes.

    Args:
        config: Checked by `read_config`.
        is_gpu: Or a CPU.
    """
    play = _with_defaults(config)
    compiled = _check_ranges(config, play)
    data = play["data"]
    data = data if isinstance(data, dict) else {"name": data}
    sizes: Section = {}
    if Path(data["name"]).expanduser().exists():
        conversations = _load(data, play)
        sizes["num_prompts"] = len(conversations)
    else:
        if "num_prompts" in data:
            sizes["num_prompts"] = data["num_prompts"]
        part = {**data, "num_prompts": _SAMPLE, "streaming": True}
        conversations = _load(part, play)
    # Everything that both have by the same name.
    names = {field.name for field in dataclasses.fields(RunEstimate)}
    names |= arguments_of(keras_iris.estimate).keys() - {"conversations"}
    for section in (play, compiled, config.sections["load"]):
        sizes |= {n: v for n, v in section.items() if n in names}
    if sizes.get("micro_batch_size") is None:
        sizes["micro_batch_size"] = play["batch_size"]
    engine, devices = play["engine"], config.sections.get("distribution")
    return keras_iris.estimate(
        conversations=conversations[:_SAMPLE],
        new_tokens=play["max_response_length"],
        **({"mesh": "auto", **devices} if devices else {}),
        optimizer_slots=_count_slots(compiled.get("optimizer", "rmsprop")),
        needs_folder=isinstance(engine, Spec)
        and engine.type is keras_iris.generation.ServerEngine,
        is_gpu=is_gpu,
        **sizes,
    )


def load_trained(run_dir: Path, config: Config, *, best: bool) -> keras.Model:
    """The causal LM of a run, as it is in the run's folder.

    Args:
        run_dir: The run's folder.
        config: Whose `load` and `compile` are those of the run.
        best: Whether those that `keep_best` has kept, instead of the latest.

    Raises:
        ValueError: The folder has no such weights, or they are of another
            model than `config` loads.
    """
    manifest = read_manifest(run_dir / "manifest.json")
    causal_lm = keras_iris.load(**config.sections["load"])
    if manifest["settings"].get("weights") != WeightsHash(causal_lm)():
        raise ValueError(
            f"{run_dir} was trained from other weights than those of "
            f"{config.sections['load']['preset']}. Put those back, or pass "
            "the run's own configuration as --config."
        )
    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(**build(config.sections["compile"], {"num_steps": 1}))
    if best:
        Best(run_dir, None, None).read(model.trainable_variables)
    else:
        with model.device_scope():
            model.optimizer.build(model.trainable_variables)
        if Checkpoints(run_dir).load(state_of(model)) is None:
            raise ValueError(f"{run_dir} has no checkpoint yet.")
    if template := config.sections["self_play"].get("template"):
        causal_lm.chat_template = template.bind(causal_lm.tokenizer)
    return causal_lm


def _with_defaults(config: Config) -> Section:
    """The arguments of `SelfPlay`."""
    defaults = {
        name: parameter.default
        for name, parameter in arguments_of(keras_iris.SelfPlay).items()
        if parameter.default is not parameter.empty
    }
    return defaults | config.sections["self_play"]


def _check_ranges(config: Config, play: Section) -> Section:
    """Refuses what needs no model to be refused; gives what is compiled."""
    compiled: Section = build(config.sections["compile"], {"num_steps": 100})
    check_compile(**compiled)
    needing_a_model = ("engine", "evaluate")
    Options(
        model=None,  # type: ignore[arg-type]
        **{name: play[name] for name in needing_a_model},
        **build(
            {n: v for n, v in play.items() if n not in needing_a_model},
            {"num_steps": 100},
        ),
    ).check()
    return compiled


def _read_rows(play: Section) -> tuple[Any, Any]:
    """Rows to train on, and those that are held out."""
    rows = _load(play["data"], play)
    evaluate = play["evaluate"]
    held_out = evaluate.arguments["examples"] if evaluate else None
    if not isinstance(held_out, int):
        return rows, held_out and _load(held_out, play)
    if not 0 < held_out < len(rows):
        raise ValueError(
            f"{held_out} examples can't be held out of {len(rows)} rows. "
            "Expected at least 1, and fewer than the rows."
        )
    return rows[held_out:], rows[:held_out]


def _load(data: Any, play: Section) -> list[Conversation]:
    arguments = data if isinstance(data, dict) else {"name": data}
    return load_dataset(**{"on_bad_row": play["on_bad_row"]} | arguments)


def _tokenize(
    rows: list[Conversation], causal_lm: Any, play: Section
) -> list[Example]:
    return tokenize(
        rows,
        causal_lm.tokenizer,
        template=play["template"] or causal_lm.chat_template,
        **{name: play[name] for name in _LIMITS},
    )


def _count_slots(optimizer: Any) -> int:
    """Numbers that an optimizer keeps for each that is trained."""
    optimizer = keras.optimizers.get(optimizer)
    variable = keras.Variable(np.zeros((2, 3, 5)))
    optimizer.build([variable])
    shapes = [tuple(v.shape) for v in optimizer.variables]
    return shapes.count(tuple(variable.shape))
