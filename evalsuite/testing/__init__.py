"""What every detector must be, as tests to inherit. Needs pytest.

from evalsuite.testing import DetectorContract

class TestMine(DetectorContract):
    name = "mine"
"""

import pytest

pytest.register_assert_rewrite(f"{__name__}.detectors")

from evalsuite.testing.detectors import DetectorContract  # noqa: E402

__all__ = ["DetectorContract"]
