"""Every registered mapping is one, with its default options and with those that change what it learns."""

import pytest

from distill.testing import MappingContract
from featcache.plugins import plugin_names


class TestIdentity(MappingContract):
    name, narrowing, learns, lengths_count = "identity", False, False, True


class TestPhiS(MappingContract):
    name, lengths_count, about_the_mean = "phi_s", True, True


class TestRandomOrthonormal(MappingContract):
    name, learns = "random_orthonormal", False


OPTIONS = {"sne": [{"layer_norm": True}, {"start": "random"}, {"layer_norm": True, "start": "random"}]}
OTHERS = sorted({*plugin_names("distill.mappings")} - {TestIdentity.name, TestPhiS.name, TestRandomOrthonormal.name})


class TestOthers(MappingContract):
    @pytest.fixture(
        params=[(name, options) for name in OTHERS for options in ({}, *OPTIONS.get(name, []))],
        ids=lambda case: "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())]),
    )
    def case(self, request):
        return request.param
