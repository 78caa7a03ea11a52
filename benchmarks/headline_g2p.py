"""The paper's headline in miniature: does self-play pay, with equal steps?

    python benchmarks/headline_g2p.py [--figures docs] [--runs runs/headline]

The IRIS paper starts from a model fine-tuned on 13% of the annotations and ends
above one that saw all. Here a decoder of 0.1M parameters learns how words are
pronounced from 13% of a pool of 4,000; from there SFT goes on, and so do SPIN,
SPACE, SPIF, T-SPIN and IRIS, all for the same number of steps. Losses, gap and
guard are the package's own.

How it was to be done and judged, written before it ran (the grid is `GRID` in
headline_plan.py):

- Five seeds, which share no word of pool, validation or test; a method's run
  and the control's of a seed share words, first policy and order of words.
- Each method has four learning rates, tried on validation words of two seeds.
  The rate for NLL and sampled answers is that with the lowest NLL, the rate for
  greedy answers that with the fewest greedy phoneme errors. Then all five
  seeds, scored on test words.
- A method is better or worse than the control where the 95% interval of the
  paired difference (Student's t, five seeds) excludes zero. Comparisons are
  counted: one in twenty is expected to exclude zero by chance.
- Main scores are NLL and greedy phoneme error rate, better where lower.
- Where could self-play pay? The grid: many epochs of few words, a start that
  was cut short, a start from noisy annotations (self-play has clean ones), an
  SFT anchor, and one iteration with three answers a prompt, as many as three
  iterations of one draw.

What was changed: before any method but the control had run, all sizes were
halved for time, and the rates moved up, as the control's best was the highest.
After the runs, many epochs, early start and noisy start got a fifth, higher
rate, for all their methods: the highest of four had been the best of most. "One
iteration", which the plan had and the first runs left out, and T-SPIN in the
grid came last, with the rates of the others.

Runs are kept in a file, so what was cut off goes on. With `--only NAMES`
settings may run side by side before.
"""

import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import headline_plots
import headline_runs
import headline_statistics
import records
from headline_plan import CONTROL, GRID, MAIN, SETTINGS

QUICK = {
    "model": {"layers": 1, "width": 8, "inner_width": 8},
    "words": {"pool": 64, "validation": 16, "test": 16},
    "seeds": 2,
    "rates": [1e-3],
    "all_epochs": 1,
    "annotated": 16,
    "sft_epochs": 1,
    "batch_size": 8,
}
# To see that it runs: the control, a fixed and the adaptive order.
QUICK_METHODS = (CONTROL, "IRIS 1", "IRIS adaptive, 4 answers")


def methods_of(setting, is_quick):
    """Names of the methods of a setting, references first."""
    names = list(GRID[setting][1])
    if is_quick:
        names = [name for name in names if name in QUICK_METHODS]
    is_main = setting == MAIN
    return [headline_runs.START, *[headline_runs.ALL] * is_main, *names]


def main():
    """Runs what isn't there yet, then compares."""
    arguments = records.parse_arguments(
        __doc__,
        figures={"type": Path, "help": "folder of the picture"},
        runs={"type": Path, "default": Path("runs/headline_g2p.jsonl")},
        only={
            "choices": list(GRID),
            "nargs": "+",
            "default": [],
            "help": "make the runs of these settings, write no record",
        },
    )
    settings = SETTINGS | (QUICK if arguments.quick else {})
    runs = headline_runs.Runs(arguments.runs, settings)
    compared = []
    for setting in arguments.only or GRID:
        compared += headline_statistics.compare(
            runs, setting, methods_of(setting, arguments.quick)
        )
    if arguments.only:
        return
    if arguments.figures:
        headline_plots.draw(
            arguments.figures / "headline_g2p.png", compared, settings["seeds"]
        )
    records.finish(
        __file__,
        arguments,
        settings=settings | {"grid": {n: GRID[n][0] for n in GRID}},
        rows=[headline_statistics.make_row(each) for each in compared],
        bars=[],
        counts=headline_statistics.count(compared),
        compared=headline_statistics.to_lists(compared),
    )
    print(records.format_table(headline_statistics.count(compared)))


if __name__ == "__main__":
    main()
