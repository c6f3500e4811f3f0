"""Evaluators that read feature stores and never know who made them.

The names below are imported when they are first used, so that the command's help costs nothing.
"""

from typing import TYPE_CHECKING

from evalsuite.report import report
from featcache.lazy import lazy_names

if TYPE_CHECKING:
    from evalsuite.comparison import compare
    from evalsuite.deployed.detector import load_detector
    from evalsuite.deployed.fit import fit_detector
    from evalsuite.evaluators.classify import classify
    from evalsuite.evaluators.dense_probe import dense_probe
    from evalsuite.evaluators.fidelity import fidelity
    from evalsuite.evaluators.knn import knn
    from evalsuite.evaluators.mean import mean
    from evalsuite.evaluators.ood import ood
    from evalsuite.evaluators.probe import probe
    from evalsuite.evaluators.retrieval import retrieval
    from evalsuite.evaluators.robustness import robustness
    from evalsuite.evaluators.segmentation import segmentation
    from evalsuite.evaluators.select import select
    from evalsuite.evaluators.zeroshot import zeroshot
    from evalsuite.result import Metric, Result

__all__ = [
    "Metric",
    "Result",
    "classify",
    "compare",
    "dense_probe",
    "fidelity",
    "fit_detector",
    "knn",
    "load_detector",
    "mean",
    "ood",
    "probe",
    "report",
    "retrieval",
    "robustness",
    "segmentation",
    "select",
    "zeroshot",
]

_MODULE_OF = {
    "Metric": "result",
    "Result": "result",
    "compare": "comparison",
    "fit_detector": "deployed.fit",
    "load_detector": "deployed.detector",
}

__getattr__, __dir__ = lazy_names(globals(), {name: _MODULE_OF.get(name, f"evaluators.{name}") for name in __all__})
