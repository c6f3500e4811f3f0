"""What every method and mapping must be, as tests to inherit. Needs pytest.

from distill.testing import MethodContract

class TestMine(MethodContract):
    name = "mine"
    options = {"temperature": 0.1}
"""

import pytest

pytest.register_assert_rewrite(f"{__name__}.mappings", f"{__name__}.methods")

from distill.testing.mappings import MappingContract  # noqa: E402
from distill.testing.methods import MethodContract  # noqa: E402

__all__ = ["MappingContract", "MethodContract"]
