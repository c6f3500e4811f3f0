"""What every registered library of models must do."""

import importlib
import inspect
import json
from importlib.metadata import EntryPoint

import pytest
import torch
from safetensors.torch import save_file

from featcache.encoder import Encoder, load_encoder
from featcache.inputs.images import Preprocess
from featcache.models import Model
from featcache.plugins import load_plugin, plugin_names
from featcache.specs import names_code
from featcache.student import load_student, make_student


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


def test_it_opens_one_teacher_from_the_rest_of_a_spec(source):
    signature = inspect.signature(load_plugin("featcache.models", source).open_model)
    required = [name for name, each in signature.parameters.items() if each.kind is not each.KEYWORD_ONLY]
    assert required == ["rest"]
    assert not {*signature.parameters} - {"rest", "trust_code"}
    given = getattr(signature.return_annotation, "__args__", (signature.return_annotation,))
    assert all(issubclass(each, Model | Encoder) for each in given)


def test_what_it_makes_can_be_rebuilt(source):
    library = load_plugin("featcache.models", source)
    assert hasattr(library, "make_model") == hasattr(library, "rebuild_model")
    if hasattr(library, "make_model"):
        assert [*inspect.signature(library.make_model).parameters] == ["rest", "variant"]
        assert [*inspect.signature(library.rebuild_model).parameters] == ["rest", "record"]


@pytest.mark.parametrize("rest", ["nosuchmodel_9000", "nosuchmodel_9000:nosuchtag"])
def test_an_unknown_name_is_refused_with_a_way_on(source, rest):
    with pytest.raises(
        ValueError, match=r"nosuchmodel_9000.*(did you mean|known: |make one with|give MODULE:CALLABLE|give run:FOLDER)"
    ):
        load_encoder(f"{source}:{rest}" if source == "run" else f"{source}/{rest}")


def test_an_unknown_source_is_refused_with_a_suggestion(source):
    with pytest.raises(ValueError, match=f"unknown encoder '{source}x'; did you mean .*{source}"):
        load_encoder(f"{source}x/name")


LIBRARY = """'acme: one linear layer of any width.'
from torch import nn
from featcache.inputs.images import Preprocess
from featcache.models import Model

class Acme(Model):
    output = "the only layer"

    def __init__(self, width):
        super().__init__()
        self.spec = f"acme/{width}"
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, int(width)))
        self.input, self.fields = Preprocess(resize=8, crop=8, size=8), {"embedding": (int(width),)}
        self.image_size, self.record = 8, {"architecture": self.spec}

    def making(self, record):
        width = record["architecture"][5:]
        return f"\\nbody = nn.Sequential(nn.Flatten(), nn.Linear(192, {width}))"

def open_model(rest: str) -> Acme:
    return Acme(rest)

def make_model(rest, variant):
    variant.refuse_all_but_size(f"acme/{rest}")
    return Acme(rest)

def rebuild_model(rest, record):
    return Acme(rest)
"""


@pytest.mark.parametrize("classes", [None, ["cat", "dog"]])
def test_one_new_file_gives_teacher_student_and_export(classes, tmp_path, monkeypatch):
    (tmp_path / "acme_models.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    entry = EntryPoint("acme", "acme_models", "featcache.models")
    monkeypatch.setattr("featcache.plugins.entry_points", lambda group: [entry] if group == entry.group else [])
    teacher = load_encoder("acme/5")
    assert (teacher.name, teacher.fields, teacher.preprocess.size) == ("acme/5", {"embedding": (5,)}, 8)
    assert not names_code("acme:5")

    like = Preprocess(resize=10, crop=9, size=9)
    student, preprocess, record = make_student("acme/5", like, embedding_dim=3, classes=classes)
    assert (preprocess.crop, preprocess.size, record["architecture"]) == (9, 8, "acme/5")
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    (tmp_path / "student.json").write_text(json.dumps(record))
    images = torch.rand(4, 3, 8, 8)
    again = load_student(tmp_path)[0]
    torch.testing.assert_close(again(images), student.eval()(images))
    assert (again.classes, "classes" in record) == (classes, classes is not None)

    (tmp_path / "out").mkdir()
    alone = student.model.standalone(student.behind, record, images)
    save_file(alone.network.state_dict(), tmp_path / "out" / "model.safetensors")
    found = {"folder": str(tmp_path / "out")}
    exec(alone.code, found)
    expected = student.features(images, ["logits"])["logits"] if classes else student(images)
    torch.testing.assert_close(found["model"](images), expected)
    assert expected.shape == (4, 2 if classes else 3)
