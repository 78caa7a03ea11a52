"""What came out of a run: tables, plots, answers and a report."""

from keras_iris.evaluation.held_out import HeldOut
from keras_iris.evaluation.report import report, samples, scores_table
from keras_iris.evaluation.run_record import read_metrics
from keras_iris.evaluation.score_mode import score_mode

__all__ = [
    "HeldOut",
    "read_metrics",
    "report",
    "samples",
    "score_mode",
    "scores_table",
]
