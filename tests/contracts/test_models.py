"""Every registered library of models is one, and ours refuse with a way on."""

import pytest

from featcache.encoder import load_encoder
from featcache.inputs.texts import Texts
from featcache.plugins import plugin_names
from featcache.testing import ModelContract

NAMES = plugin_names("featcache.models")


class TestLibraries(ModelContract):
    @pytest.fixture(params=[name for name in NAMES if name not in ("python", "tiny", "conv_autoencoder")])
    def registered(self, request):
        return request.param


class TestTiny(ModelContract):
    name = student = "tiny"


class TestConvAutoencoder(ModelContract):
    name = student = "conv_autoencoder"


class OfTexts(ModelContract):
    like = Texts(tokenizer="bytes", max_length=20)
    alone = False


class TestBag(OfTexts):
    name, student = "bag", "bag/6"


class TestGru(OfTexts):
    name, student = "gru", "gru/6"


class TestTransformers(OfTexts):
    name = "transformers"

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path):
        transformers = pytest.importorskip("transformers", reason="needs featcache[text]")
        config = transformers.DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, max_position_embeddings=20)
        (tmp_path / "config.json").write_text(config.to_json_string())
        self.student = f"transformers/{tmp_path / 'config.json'}@pool=max"


class TestPythonTexts(ModelContract):
    name, teacher = "python", "featcache.testing.models:small_text_teacher"


class TestPython(ModelContract):
    name, teacher = "python", "featcache.testing.models:small_teacher"


@pytest.mark.parametrize("library", ["builtin", "open_clip", "timm"])
def test_an_unknown_option_is_refused_with_the_known_ones(library):
    with pytest.raises(ValueError, match=rf"{library}/some@colour=red: .*no such option; known: layer, norm, pool"):
        load_encoder(f"{library}/some@colour=red")


@pytest.mark.parametrize("library", NAMES)
@pytest.mark.parametrize("rest", ["nosuchmodel_9000", "nosuchmodel_9000:nosuchtag"])
def test_an_unknown_name_is_refused_with_a_way_on(library, rest):
    with pytest.raises(
        ValueError, match=r"nosuchmodel_9000.*(did you mean|known: |make one with|give MODULE:CALLABLE|give run:FOLDER)"
    ):
        load_encoder(f"{library}:{rest}" if library == "run" else f"{library}/{rest}")
