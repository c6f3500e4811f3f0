"""distill, stage two: small students that keep the teacher's angles."""

from distill.exporting.export import Exported, export
from distill.methods import load_method
from distill.training.config import FitConfig
from distill.training.fit import fit
from distill.training.run import Run

__all__ = ["Exported", "FitConfig", "Run", "export", "fit", "load_method"]
