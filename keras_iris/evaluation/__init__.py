"""What came out of a run: tables, plots and a report."""

from keras_iris.evaluation.metrics_file import read_metrics
from keras_iris.evaluation.outcome import score_mode
from keras_iris.evaluation.report import report, scores_table

__all__ = [
    "read_metrics",
    "report",
    "score_mode",
    "scores_table",
]
