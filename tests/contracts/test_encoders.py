"""What every registered source of encoders must do."""

import inspect

import pytest

from featcache.encoder import Encoder, load_encoder
from featcache.plugins import load_plugin, plugin_names


@pytest.fixture(params=plugin_names("featcache.models"))
def source(request):
    return request.param


def test_private_files_are_not_sources(source):
    assert not source.startswith("_")


@pytest.mark.parametrize("source", ["builtin", "open_clip", "timm"])
def test_an_unknown_option_is_refused_with_the_known_ones(source):
    with pytest.raises(ValueError, match=rf"{source}/some@colour=red: .*no such option; known: layer, norm, pool"):
        load_encoder(f"{source}/some@colour=red")


def test_its_file_says_what_its_specs_are(source):
    assert source in (load_plugin("featcache.models", source).__doc__ or "")


def test_it_loads_one_encoder_from_the_rest_of_a_spec(source):
    signature = inspect.signature(load_plugin("featcache.models", source).load_encoder)
    required = [name for name, each in signature.parameters.items() if each.kind is not each.KEYWORD_ONLY]
    assert required == ["rest"]
    assert not {*signature.parameters} - {"rest", "trust_code"}
    assert signature.return_annotation is Encoder


@pytest.mark.parametrize("rest", ["nosuchmodel_9000", "nosuchmodel_9000:nosuchtag"])
def test_an_unknown_name_is_refused_with_a_way_on(source, rest):
    with pytest.raises(
        ValueError, match=r"nosuchmodel_9000.*(did you mean|known: |make one with|give MODULE:CALLABLE)"
    ):
        load_encoder(f"{source}:{rest}" if source == "run" else f"{source}/{rest}")


def test_an_unknown_source_is_refused_with_a_suggestion(source):
    with pytest.raises(ValueError, match=f"unknown encoder '{source}x'; did you mean .*{source}"):
        load_encoder(f"{source}x/name")
