"""distill, stage two: small students that keep the teacher's angles.

The names below are imported when they are first used, so that looking at runs needs no torch.
"""

from typing import TYPE_CHECKING

from featcache.lazy import lazy_names

if TYPE_CHECKING:
    from distill.exporting.export import Exported, export
    from distill.exporting.int8 import Calibration
    from distill.exporting.push import PushedStudent, push
    from distill.methods import load_method
    from distill.training.config import FitConfig
    from distill.training.fit import fit, preview
    from distill.training.run import Run
    from distill.training.runs import RunState, runs, watch

__all__ = [
    "Calibration",
    "Exported",
    "FitConfig",
    "PushedStudent",
    "Run",
    "RunState",
    "export",
    "fit",
    "load_method",
    "preview",
    "push",
    "runs",
    "watch",
]

_MODULE_OF = {
    "Calibration": "exporting.int8",
    "Exported": "exporting.export",
    "FitConfig": "training.config",
    "PushedStudent": "exporting.push",
    "Run": "training.run",
    "RunState": "training.runs",
    "export": "exporting.export",
    "fit": "training.fit",
    "load_method": "methods",
    "preview": "training.fit",
    "push": "exporting.push",
    "runs": "training.runs",
    "watch": "training.runs",
}

__getattr__, __dir__ = lazy_names(globals(), _MODULE_OF)
