"""distill, stage two: small students that keep the teacher's angles."""

from distill.config import FitConfig, load_method
from distill.export import Exported, export
from distill.fit import fit
from distill.run import Run

__all__ = ["Exported", "FitConfig", "Run", "export", "fit", "load_method"]
