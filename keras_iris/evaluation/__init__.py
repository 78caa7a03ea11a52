"""What came out of a run: tables, plots and a report."""

from keras_iris.evaluation.report import report, scores_table
from keras_iris.evaluation.run_record import read_metrics
from keras_iris.evaluation.score_mode import score_mode

__all__ = ["read_metrics", "report", "score_mode", "scores_table"]
