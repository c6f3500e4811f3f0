"""Evaluators that read feature stores and never know who made them.

The names below are functions; each is defined in the module of the same name and takes its place as an
attribute of the package. Python binds a submodule to its package only when it first loads, which is here, so
the functions stay.
"""

from evalsuite.compare import compare
from evalsuite.fidelity import fidelity
from evalsuite.knn import knn
from evalsuite.ood import ood
from evalsuite.probe import probe
from evalsuite.report import report
from evalsuite.result import Metric, Result
from evalsuite.robustness import robustness

__all__ = ["Metric", "Result", "compare", "fidelity", "knn", "ood", "probe", "report", "robustness"]
