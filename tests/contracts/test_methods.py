"""Every registered distillation method is one, in every way of using it."""

import pytest
from method_cases import CASES, label

from distill.testing import MethodContract


class TestMethods(MethodContract):
    @pytest.fixture(params=CASES, ids=label)
    def case(self, request):
        return request.param
