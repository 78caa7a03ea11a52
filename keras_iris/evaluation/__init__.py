"""What came out of a run: tables, plots, answers and a report."""

from keras_iris.evaluation.report import report, samples, scores_table
from keras_iris.self_play.held_out import HeldOut
from keras_iris.self_play.run_log import read_metrics

__all__ = ["HeldOut", "read_metrics", "report", "samples", "scores_table"]
