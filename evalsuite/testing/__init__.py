"""What every detector and evaluator must be, as tests to inherit. Needs pytest.

from evalsuite.testing import DetectorContract

class TestMine(DetectorContract):
    name = "mine"
"""

import pytest

pytest.register_assert_rewrite(f"{__name__}.detectors", f"{__name__}.evaluators")

from evalsuite.testing.detectors import DetectorContract  # noqa: E402
from evalsuite.testing.evaluators import EvaluatorContract  # noqa: E402

__all__ = ["DetectorContract", "EvaluatorContract"]
