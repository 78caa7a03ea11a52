"""Commands on a model: `generate`, `evaluate`."""

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from keras_iris.cli.output import Result, shown

Preset = Annotated[
    str, typer.Option(help="A folder, hf://org/name, or a KerasHub preset.")
]
DType = Annotated[str | None, typer.Option(help="Such as bfloat16.")]


@shown
def generate(  # noqa: PLR0913 (the options of a command)
    preset: Preset,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...")
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            help="A prompt a line, - for stdin; or rows, .jsonl or .parquet."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 for the likeliest token each time.")
    ] = 1.0,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Prompts together; by default as memory allows."),
    ] = None,
    seed: int = 0,
    dtype: DType = None,
) -> Result:
    """Answer prompts: a JSON object a line, {"prompt", "response", ...}."""
    conversations = [*(prompts or ()), *(_read_prompts(file) if file else ())]
    if not conversations:
        raise ValueError("No prompts came. Pass some, or --file FILE.")
    import keras_iris
    from keras_iris.data import encode_prompt

    causal_lm = keras_iris.load(preset, dtype=dtype)
    tokenizer = causal_lm.tokenizer
    engine = keras_iris.generation.KerasEngine(
        causal_lm,
        end_token_ids=tokenizer.end_token_ids,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
    )
    completions = engine.generate(
        [
            encode_prompt(prompt, tokenizer, causal_lm.chat_template)
            for prompt in conversations
        ],
        seed=seed,
    )
    rows = [
        {
            "prompt": prompt,
            "response": tokenizer.decode(answer.token_ids, skip_special=True),
            "finish_reason": answer.finish_reason,
        }
        for prompt, answer in zip(conversations, completions, strict=True)
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return Result(rows, "\n".join(lines))


def _read_prompts(file: str) -> list[Any]:
    if Path(file).suffix.lower() not in (".jsonl", ".parquet"):
        text = (
            sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
        )
        return [line for line in text.splitlines() if line.strip()]
    from keras_iris.data.conversations import read_conversation
    from keras_iris.data.rows import BadRows, read_rows

    def read_prompt(row: Any, where: str) -> Any:
        if isinstance(row, Mapping) and row.get("prompt"):
            row = {"response": "-", **row}  # which isn't needed here
        return read_conversation(row, where).prompt

    return list(read_rows(file, read_prompt, BadRows()))


@shown
def evaluate(  # noqa: PLR0913 (the options of a command)
    preset: Preset,
    tasks: Annotated[
        str, typer.Option(help="`ten`, or names with commas between.")
    ] = "ten",
    limit: Annotated[
        int | None, typer.Option(help="Examples of each task.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows together.")] = 8,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of context and answer.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask by the chat template.")
    ] = False,
    cache: Annotated[
        str | None, typer.Option(help="Goes on here after a crash.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own.")
    ] = None,
    dtype: DType = None,
) -> Result:
    """Evaluate a model on benchmarks (docs/evaluation.md)."""
    try:
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ValueError(
            "Benchmarks are those of the LM Evaluation Harness: "
            f'pip install "keras_iris[eval]" ({error})'
        ) from error
    import keras_iris
    from keras_iris.lm_eval import evaluate

    keras_iris.distribution.initialize()  # of several processes, if any
    manager = TaskManager(include_path=include and str(include))
    names: str | Sequence[str] = "ten"
    if tasks != "ten":
        names = [name.strip() for name in tasks.split(",")]
        _check_tasks(names, manager.all_tasks)
    found = evaluate(
        keras_iris.load(preset, dtype=dtype),
        names,
        batch_size=batch_size,
        max_length=max_length,
        limit=limit,
        use_cache=cache,
        apply_chat_template=chat,
        task_manager=manager,
    )
    if not found:
        return Result({}, "Process 0 has the results.")
    ten = found.get("ten", {})
    text = "\n".join(f"{name:12} {score:.4f}" for name, score in ten.items())
    data = {"results": found["results"], **({"ten": ten} if ten else {})}
    return Result(data, text or make_table(found))


def _check_tasks(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        is_file = Path(name).suffix in (".yaml", ".yml") and Path(name).exists()
        if name not in known and not is_file:
            near = difflib.get_close_matches(name, known, cutoff=0.5)
            raise ValueError(
                f"There is no task {name!r}. Similar ones: {near}. Expected "
                "`ten`, tasks of the harness (`lm_eval ls tasks`) or of a "
                "folder that --include names, or a task's .yaml file."
            )
