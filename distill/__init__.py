"""distill, stage two: small students that keep the teacher's angles."""

from distill.fit import FitConfig, fit, load_method
from distill.run import Run

__all__ = ["FitConfig", "Run", "fit", "load_method"]
