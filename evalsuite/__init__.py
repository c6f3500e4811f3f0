"""Evaluators that read feature stores and never know who made them.

The names below are imported when they are first used, so that the command's help costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from evalsuite.report import report

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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, f'evaluators.{name}')}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
