"""Every registered kind of input is one."""

import pytest

from featcache.inputs.images import Preprocess
from featcache.inputs.texts import Texts
from featcache.plugins import plugin_names
from featcache.testing import InputContract


class TestImages(InputContract):
    name = "images"
    example = Preprocess(resize=10, crop=8, size=6, mode="squash")


class TestTexts(InputContract):
    name = "texts"
    example = Texts(tokenizer="bytes", max_length=20, prefix="q: ", lower=True)

    @pytest.fixture
    def encoded(self):
        return "Élan, and more than twenty bytes".encode()


def test_every_registered_input_is_under_its_contract():
    assert {*plugin_names("featcache.inputs")} <= {each.name for each in InputContract.__subclasses__()}
