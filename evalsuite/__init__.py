"""Evaluators that read feature stores and never know who made them."""

from evalsuite.compare import compare
from evalsuite.evaluators.fidelity import fidelity
from evalsuite.evaluators.knn import knn
from evalsuite.evaluators.ood import ood
from evalsuite.evaluators.probe import probe
from evalsuite.evaluators.robustness import robustness
from evalsuite.report import report
from evalsuite.result import Metric, Result

__all__ = ["Metric", "Result", "compare", "fidelity", "knn", "ood", "probe", "report", "robustness"]
