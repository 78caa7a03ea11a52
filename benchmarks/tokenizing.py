"""How fast conversations become token ids, and what memory that takes.

    python tests/make_smollm2.py
    python benchmarks/tokenizing.py

A file of conversations of two questions and answers, some 700 tokens each,
with SmolLM2's tokenizer and chat template; rendering included, without a
cache. Memory is the peak of a process of its own, the examples included, which
are 0.57 GB of 200,000 rows.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import records

ROOT = Path(__file__).parents[1]
# Words of a question and of an answer: together some 700 tokens.
WORDS = (68, 135)


def write_rows(file, number):
    """Writes conversations of the words of this repository's own texts."""
    draw = random.Random(0)
    words = (ROOT / "docs" / "design.md").read_text().split()
    with file.open("w") as lines:
        for _ in range(number):
            contents = [" ".join(draw.choices(words, k=n)) for n in 2 * WORDS]
            roles = 2 * ("user", "assistant")
            messages = [
                {"role": role, "content": content}
                for role, content in zip(roles, contents, strict=True)
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")


def tokenize(preset, file):
    """Figures of one file, in a process that does nothing else."""
    from keras_iris.data import tokenize
    from keras_iris.hub import inspect

    _, tokenizer, template = inspect(preset)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    examples = tokenize(
        file,
        tokenizer,
        template=template,
        max_prompt_length=2048,
        max_response_length=2048,
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = sum(len(e.prompt_ids) + len(e.response_ids) for e in examples)
    return {
        "rows": len(examples),
        "tokens a row": tokens / len(examples),
        "seconds": seconds,
        "peak GB": peak * 1024 / 1e9,
        "GB of imports": before * 1024 / 1e9,
    }


def measure(preset, number):
    """Figures of so many rows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, number)
        answer = subprocess.run(
            [sys.executable, __file__, "--preset", preset, "--file", file],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(answer.stdout.splitlines()[-1])


def main():
    """Measures 50,000 rows for the time, and 200,000 for the memory."""
    preset = {"default": str(ROOT / ".smollm2" / "SmolLM2-135M-Instruct")}
    hidden = {"help": argparse.SUPPRESS}
    arguments = records.parse_arguments(__doc__, preset=preset, file=hidden)
    if arguments.file:
        print(json.dumps(tokenize(arguments.preset, arguments.file)))
        return
    numbers = (200, 400) if arguments.quick else (50_000, 200_000)
    rows = [measure(arguments.preset, number) for number in numbers]
    records.finish(
        __file__,
        arguments,
        settings={"tokenizer": Path(arguments.preset).name},
        rows=rows,
        bars=[
            records.bar(
                "seconds for 50,000 rows", rows[0]["seconds"], at_most=60
            ),
            records.bar(
                "GB for 200,000 rows",
                rows[1]["peak GB"] - rows[1]["GB of imports"],
                at_most=1.5,
            ),
        ],
    )


if __name__ == "__main__":
    main()
