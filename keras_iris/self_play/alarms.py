"""Signs that training goes wrong, each of which a run tells of once."""

import statistics
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from keras_iris.self_play.run_log import Line

# Steps whose mean, or median, counts; an iteration with fewer has no alarms
# but that of lengths.
WINDOW = 20

_FEW = (
    "Few {} responses carry the gradient: the effective sample size is "
    "{{value:.1%}} of a batch. Set `AlphaScheduler(min_effective_sample_size="
    "...)`, or take larger batches."
)
# What is said of a value: its name in the logs, but for `length_ratio`.
_TEXTS = {
    "real_log_ratio": "Annotated responses became less likely than under the "
    "opponent: their mean log-ratio is {value:.2f} nats. Lower the learning "
    "rate, or set `sft_weight` of the loss.",
    "margin_accuracy": "The margin is saturated: the policy prefers the "
    "annotated response in {value:.1%} of pairs. Take fewer epochs an "
    "iteration, or a lower learning rate.",
    "real_ess": _FEW.format("annotated"),
    "synthetic_ess": _FEW.format("synthetic"),
    "length_ratio": "Synthetic responses have {value:.2f} times the tokens of "
    "annotated ones. Read some, and check end tokens and the template.",
    "gradient_norm": "The norm of the gradient is {value:.3g}, over ten times "
    "its median. Lower the learning rate, or set `global_clipnorm` of the "
    "optimizer.",
}
_IS_ALARM: dict[str, Callable[[float], bool]] = {
    "real_log_ratio": lambda mean: mean < -1.0,
    "margin_accuracy": lambda mean: mean > 0.99,
    "real_ess": lambda mean: mean < 0.05,
    "synthetic_ess": lambda mean: mean < 0.05,
}


class Alarms:
    """Watches the values of a run, and warns of each sign once.

    Args:
        log: Takes the kind of a line and its values.
        earlier: The lines that the run has logged before.
    """

    def __init__(
        self, log: Callable[..., None], earlier: Iterable[Line] = ()
    ) -> None:
        self._log = log
        self._known = {
            name for line in earlier if line["kind"] == "alarm" for name in line
        }
        self._recent: dict[str, deque[float]] = {}

    def begin(
        self, iteration: int, step: int, num_tokens: tuple[int, int]
    ) -> None:
        """An iteration begins, with log-ratios of 0.

        Args:
            iteration: Its number.
            step: Steps before it.
            num_tokens: Of all annotated and all synthetic responses.
        """
        names = (*_IS_ALARM, "gradient_norm")
        self._recent = {name: deque(maxlen=WINDOW) for name in names}
        ratio = num_tokens[1] / num_tokens[0]
        if not 0.5 <= ratio <= 2:
            self._tell(iteration, step, {"length_ratio": ratio})

    def watch(
        self, iteration: int, step: int, values: Mapping[str, float]
    ) -> None:
        """A step has been done.

        Args:
            iteration: The present one.
            step: The step's number.
            values: Its values by name, as they are logged.
        """
        norms, norm = self._recent["gradient_norm"], values["gradient_norm"]
        found = {}
        if len(norms) == WINDOW and norm > 10 * statistics.median(norms):
            found["gradient_norm"] = norm
        for name, recent in self._recent.items():
            recent.append(values[name])
        for name, is_alarm in _IS_ALARM.items():
            mean = statistics.fmean(self._recent[name])
            if len(self._recent[name]) == WINDOW and is_alarm(mean):
                found[name] = mean
        self._tell(iteration, step, found)

    def _tell(self, iteration: int, step: int, found: dict[str, float]) -> None:
        new = {n: v for n, v in found.items() if n not in self._known}
        self._known.update(new)
        for name, value in new.items():
            warnings.warn(_TEXTS[name].format(value=value), stacklevel=3)
        if new:
            self._log("alarm", iteration=iteration, step=step, **new)


def alarm_texts(lines: Iterable[Line]) -> list[str]:
    """What a run has warned of, with the step.

    Args:
        lines: Those of kind `alarm`.
    """
    return [
        f"Step {line['step']}: {_TEXTS[name].format(value=line[name])}"
        for line in lines
        for name in _TEXTS
        if name in line
    ]
