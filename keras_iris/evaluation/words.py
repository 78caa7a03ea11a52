"""What came out of a run, in plain words, from the numbers alone."""

import math
from collections.abc import Sequence

from keras_iris.evaluation.outcome import (
    LEVEL,
    Outcome,
    compare,
    compare_with_start,
    direction,
)
from keras_iris.evaluation.run_record import RunRecord
from keras_iris.evaluation.tables import format_difference, format_number

_CAUTION = (
    f'"Level" is a difference within {LEVEL:.0%}. Each run is a single one: '
    "a difference can be chance, and only repeats with other seeds can say "
    "whether it is significant."
)


def what_came_out(run: RunRecord, others: Sequence[RunRecord]) -> list[str]:
    """Says for each score whether the run ended better, worse or level.

    Args:
        run: The run.
        others: The runs to compare it with; without one, the run is
            compared with its own start.

    Returns:
        Paragraphs; those that begin with `"- "` are points of a list.
    """
    if not run.of_kind("evaluation"):
        return ["No held-out scores were recorded: quality can't be judged."]
    text = _unfinished(run)
    starts = {o.score: o for o in compare_with_start(run)}
    for other in others:
        outcomes = compare(run, other)
        text += _against(other.name, outcomes)
        text += _steps(run, other, outcomes)
        text += [_point(o, starts.get(o.score)) for o in outcomes]
    if not others:
        text += _against("its own start", list(starts.values()))
        text += [_point(outcome, None) for outcome in starts.values()]
        text.append(
            "There is no run to compare with: what plain fine-tuning would "
            "have done in the same steps isn't known."
        )
    return [*text, _CAUTION]


def _unfinished(run: RunRecord) -> list[str]:
    last = max(run.evaluation_steps())
    planned = run.manifest.get("settings", {}).get("iterations", last)
    if not isinstance(planned, int) or last >= planned:
        return []
    return [f"The run isn't finished: {last} of {planned} iterations."]


def _against(name: str, outcomes: list[Outcome]) -> list[str]:
    if not outcomes:
        return [f"Nothing to compare with {name} after self-play so far."]
    groups: dict[str, list[str]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.verdict, []).append(outcome.score)
    parts = [f"{verdict} on {_join(s)}" for verdict, s in groups.items()]
    iterations = sorted({outcome.iteration for outcome in outcomes})
    when = _join([str(iteration) for iteration in iterations])
    return [
        f"Against {name}, after iteration {when}, this run ended "
        f"{'; '.join(parts)}."
    ]


def _steps(
    run: RunRecord, other: RunRecord, outcomes: list[Outcome]
) -> list[str]:
    if not outcomes:
        return []
    last = max(outcome.iteration for outcome in outcomes)
    ours, theirs = (r.evaluation_steps()[last] for r in (run, other))
    if ours == theirs:
        return []
    return [
        f"They had not trained equally long: {run.name} {ours} steps, "
        f"{other.name} {theirs}."
    ]


def _point(outcome: Outcome, start: Outcome | None) -> str:
    way = direction(outcome.score)
    text = (
        f"- {outcome.score}{f' ({way} is better)' if way else ''}: "
        f"{outcome.verdict}, {format_number(outcome.value)} against "
        f"{format_number(outcome.reference)}"
    )
    if math.isfinite(outcome.difference):
        text += f", difference {format_difference(outcome.difference)}"
        if outcome.reference:
            share = outcome.difference / abs(outcome.reference)
            text += f" ({share:+.1%})"
    if start is not None:
        text += (
            f". Before self-play {format_number(start.reference)}: "
            f"{start.verdict} now"
        )
    return text + "."


def _join(words: list[str]) -> str:
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"
