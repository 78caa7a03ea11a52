"""`KerasLM` beside the LM Evaluation Harness' own `hf` model, on SmolLM2-135M.

    python benchmarks/evaluation_harness.py

Both read the same folder (`python tests/make_smollm2.py` makes it) in float32
and run the same tasks on the CPU, one of each kind, made of what people wrote
each other (the package `chitchat-dataset`):

- letters: which of four answers follows, five solved examples in front; the
  continuations are single tokens;
- answers: the same, where the continuations are the answers themselves;
- texts: the log-prob of whole messages;
- generate: an answer of up to 32 tokens.

Contestants take turns, each in a process of its own. A task is run twice in a
process, which compiles in the first run; both times are told. Then all
log-probs and answers are compared, request by request, with those of `hf` in
float64: in float32 `hf` itself is further from them than a bar of 1e-3 nats
allows, over hundreds of tokens.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import harness
import records

ROOT = Path(__file__).parents[1]
BATCH_SIZE = 8
MAX_LENGTH = 1024
NUM_SHOTS = 5
LOG_PROB_LIMIT = 1e-3  # nats
TIME_LIMIT = 1.3
HF, EXACT = "hf", "hf, float64"
CONTESTANTS = {"KerasLM, jax": "jax", "KerasLM, torch": "torch", HF: "torch"}


def make_tasks(folder, num_rows):
    """Configurations of the tasks by name; their rows go into `folder`."""
    from smollm2_scores import load_rows

    chats = load_rows()
    rows = []
    for i in range(num_rows + NUM_SHOTS):
        replies = [chats[4 * i + j]["response"] for j in range(4)]
        right = i % 4
        replies[0], replies[right] = replies[right], replies[0]
        listed = [f"{x}. {r}" for x, r in zip("ABCD", replies, strict=True)]
        rows.append(
            {
                "message": chats[4 * i]["prompt"],
                "replies": replies,
                "listed": "\n".join(listed),
                "right": right,
                "text": f"{chats[4 * i]['prompt']}\n{replies[right]}",
            }
        )
    files = {"test": rows[NUM_SHOTS:], "validation": rows[:NUM_SHOTS]}
    for split, part in files.items():
        (folder / f"{split}.json").write_text(json.dumps(part))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {s: str(folder / f"{s}.json") for s in files},
            "cache_dir": str(folder),
        },
        "test_split": "test",
        "fewshot_split": "validation",
        "fewshot_config": {"sampler": "first_n"},
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_target": "right",
        "num_fewshot": NUM_SHOTS,
    }
    asked = "Message: {{message}}\n{{listed}}\nAnswer:"
    return {
        "letters": {
            **choice,
            "doc_to_text": asked,
            "doc_to_choice": ["A", "B", "C", "D"],
        },
        "answers": {
            **choice,
            "doc_to_text": "Message: {{message}}\nAnswer:",
            "doc_to_choice": "replies",
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "generate": {
            "output_type": "generate_until",
            "doc_to_text": "Message: {{message}}\nAnswer:",
            "doc_to_target": "text",
            "num_fewshot": 0,
            "generation_kwargs": {
                "until": ["\n"],
                "do_sample": False,
                "max_gen_toks": 32,
            },
            "metric_list": [{"metric": "exact_match"}],
        },
    }, common


class Harness:
    """A model and the tasks.

    Args:
        preset: The folder of the checkpoint.
        name: One of `CONTESTANTS`, or `EXACT`.
        num_rows: Rows of a task.
    """

    def __init__(self, preset, name, num_rows):
        from lm_eval.tasks import TaskManager

        self._folder = tempfile.TemporaryDirectory()
        self._tasks, self._common = make_tasks(
            Path(self._folder.name), num_rows
        )
        self._manager = TaskManager(include_defaults=False)
        sizes = {"batch_size": BATCH_SIZE, "max_length": MAX_LENGTH}
        if name in (HF, EXACT):
            from lm_eval.models.huggingface import HFLM

            dtype = "float64" if name == EXACT else "float32"
            self._model = HFLM(preset, device="cpu", dtype=dtype, **sizes)
        else:
            import keras_iris
            from keras_iris.lm_eval import KerasLM

            causal_lm = keras_iris.load(preset, dtype="float32")
            self._model = KerasLM(causal_lm, **sizes)

    def run(self, name):
        """Seconds of a task, and what the model gave for each request."""
        import lm_eval

        task = {"task": name, **self._common, **self._tasks[name]}
        start = time.perf_counter()
        results = lm_eval.simple_evaluate(
            model=self._model,
            tasks=[task],
            task_manager=self._manager,
            bootstrap_iters=0,
        )
        seconds = time.perf_counter() - start
        samples = sorted(
            results["samples"][name], key=lambda sample: sample["doc_id"]
        )
        return seconds, [sample["resps"] for sample in samples]


def compare(found, expected):
    """The largest difference of log-probs, and how many others differ."""
    largest, number = 0.0, 0
    for one, other in zip(_leaves(found), _leaves(expected), strict=True):
        if isinstance(other, float):
            largest = max(largest, abs(one - other))
        else:  # whether a continuation is greedy, or an answer
            number += one != other
    return largest, number


def _leaves(values):
    if not isinstance(values, list | tuple):
        return [values]
    return [leaf for value in values for leaf in _leaves(value)]


def main():
    """Measures and compares."""
    arguments = records.parse_arguments(
        __doc__,
        preset={
            "default": str(ROOT / ".smollm2" / "SmolLM2-135M-Instruct"),
            "help": "folder of the checkpoint",
        },
    )
    if not Path(arguments.preset).is_dir():
        sys.exit(
            f"There is no checkpoint in {arguments.preset}. Make it by "
            "`python tests/make_smollm2.py`, or pass `--preset`."
        )
    num_rows = 2 if arguments.quick else 8
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(
                harness.Worker(
                    __file__,
                    "Harness",
                    backend=backend,
                    environment={"OMP_NUM_THREADS": str(os.cpu_count())},
                    preset=arguments.preset,
                    name=name,
                    num_rows=num_rows,
                )
            )
            for name, backend in {**CONTESTANTS, EXACT: "torch"}.items()
        }
        for worker in workers.values():
            worker.wait()
        rows, bars = _race(workers)
    records.finish(
        __file__,
        arguments,
        settings={
            "batch_size": BATCH_SIZE,
            "max_length": MAX_LENGTH,
            "shots": NUM_SHOTS,
            "rows": num_rows,
        },
        rows=rows,
        bars=bars,
    )


def _race(workers):
    """The table's rows and the bars of all tasks."""
    rows, bars = [], []
    for task in ("letters", "answers", "texts", "generate"):
        _, expected = workers[EXACT].call("run", name=task)
        runs = {name: [] for name in CONTESTANTS}
        for _ in range(2):
            for name, of_name in runs.items():
                of_name.append(workers[name].call("run", name=task))
        hf_seconds = runs[HF][1][0]
        for name, ((first, found), (second, _)) in runs.items():
            difference, number = compare(found, expected)
            rows.append(
                {
                    "task": task,
                    "contestant": name,
                    "first run, s": first,
                    "s": second,
                    "x hf": second / hf_seconds,
                    "largest difference, nats": difference,
                    "answers that differ": number,
                }
            )
            if name != HF:
                label = f"{task}, {name}"
                bars += [
                    records.bar(
                        f"time of hf, {label}",
                        second / hf_seconds,
                        at_most=TIME_LIMIT,
                    ),
                    records.bar(
                        f"nats apart, {label}",
                        difference,
                        at_most=LOG_PROB_LIMIT,
                    ),
                    records.bar(f"answers apart, {label}", number, at_most=0),
                ]
    return rows, bars


if __name__ == "__main__":
    main()
