"""What every library of models must be, and a small teacher to try other things with."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from featcache.encoder import Encoder, load_encoder
from featcache.inputs import Input
from featcache.inputs.images import Preprocess
from featcache.inputs.texts import Texts
from featcache.models import Features, Model
from featcache.plugins import load_plugin
from featcache.student import load_student, make_student


class SmallModule(nn.Module):
    """One convolution, and the mean of what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 6, 4, 4)

    def forward(self, images: Tensor) -> Features:
        found = self.convolution(images).relu()
        return {"embedding": found.mean((2, 3)) + 0.1, "tokens": found.flatten(2).transpose(1, 2)}


class SmallTextModule(nn.Module):
    """A vector a byte, and what lies before it; their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.before = nn.Embedding(256, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Features:
        known = (ids >= 0)[..., None]
        found = self.bytes(ids.clamp(min=0)) * known
        sums = self.before(found.cumsum(1)).tanh() * known
        return {"embedding": sums.sum(1) / known.sum(1)}


def small_text_teacher() -> Encoder:
    """`featcache.testing.models:small_text_teacher`: texts of up to 24 bytes, embedding (6,)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = SmallTextModule()
    like = Texts(tokenizer="bytes", max_length=24)
    return Encoder(name="small texts", module=module, preprocess=like, fields={"embedding": (6,)}, output="mean")


def small_teacher() -> Encoder:
    """`featcache.testing.models:small_teacher`: images of 16 px, embedding (6,), tokens (16, 6)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = SmallModule()
    return Encoder(
        name="small",
        module=module,
        preprocess=Preprocess(resize=18, crop=16, size=16),
        fields={"embedding": (6,), "tokens": (16, 6)},
        output="mean pool",
    )


def some_samples(like: Input[Any, Any], count: int) -> Tensor:
    """What `render` gives of noise: images, or texts of different lengths."""
    seen = like.blank(count)
    if isinstance(like, Texts):
        for row, tokens in zip(seen, torch.linspace(1, like.max_length, count).long().tolist(), strict=True):
            row[:] = -1
            row[:tokens] = torch.randint(0, like.vocabulary or 1, (tokens,))
        return seen
    return torch.randint_like(seen, 256)


class ModelContract:
    """Of the library `name`.

    Attributes:
        teacher: spec of a small teacher of it, with weights that are at hand; "" where there is none.
        student: spec of a small student to be trained; "" where it makes none.
        like: what a teacher was shown of which that student learns.
        alone: whether the student loads without us.
    """

    like: Input[Any, Any] = Preprocess(resize=10, crop=9, size=9)
    alone: bool = True
    name: str
    teacher: str = ""
    student: str = ""

    @pytest.fixture
    def registered(self) -> str:
        return self.name

    def test_its_name_is_no_private_one(self, registered: str) -> None:
        assert not registered.startswith("_")

    def test_its_file_says_what_its_specs_are(self, registered: str) -> None:
        assert registered in (load_plugin("featcache.models", registered).__doc__ or "")

    def test_it_opens_one_teacher_from_the_rest_of_a_spec(self, registered: str) -> None:
        signature = inspect.signature(load_plugin("featcache.models", registered).open_model)
        required = [name for name, each in signature.parameters.items() if each.kind is not each.KEYWORD_ONLY]
        assert required == ["rest"]
        assert not {*signature.parameters} - {"rest", "trust_code"}
        given = getattr(signature.return_annotation, "__args__", (signature.return_annotation,))
        assert all(each is Any or issubclass(each, Model | Encoder) for each in given)

    def test_what_it_makes_can_be_rebuilt(self, registered: str) -> None:
        library = load_plugin("featcache.models", registered)
        assert hasattr(library, "make_model") == hasattr(library, "rebuild_model")
        if hasattr(library, "make_model"):
            assert [*inspect.signature(library.make_model).parameters] == ["rest", "variant"]
            assert [*inspect.signature(library.rebuild_model).parameters] == ["rest", "record"]

    def test_an_unknown_library_is_refused_with_a_suggestion(self, registered: str) -> None:
        with pytest.raises(ValueError, match=f"unknown encoder '{registered}x'; did you mean .*{registered}"):
            load_encoder(f"{registered}x/name")

    def test_a_teacher_gives_the_fields_that_it_names(self) -> None:
        if not self.teacher:
            pytest.skip("names no teacher")
        encoder, again = load_encoder(self.teacher), load_encoder(self.teacher)
        assert encoder.fingerprint == again.fingerprint
        seen = some_samples(encoder.preprocess, 3)
        found = encoder.encode_padded(seen, 3, tuple(encoder.fields))
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            name: (3, *shape) for name, shape in encoder.fields.items()
        }
        assert all(value.isfinite().all() for value in found.values())
        for name, value in again.encode_padded(seen, 3, tuple(encoder.fields)).items():
            assert torch.equal(value, found[name]), name

    @pytest.mark.parametrize("classes", [None, ["cat", "dog"]])
    def test_a_student_comes_back_from_its_files_and_loads_without_us(
        self, classes: list[str] | None, tmp_path: Path
    ) -> None:
        if not self.student:
            pytest.skip("names no student")
        student, preprocess, record = make_student(self.student, self.like, embedding_dim=3, classes=classes)
        if isinstance(preprocess, Preprocess):
            assert (preprocess.crop, preprocess.size) == (9, student.image_size)
            images = torch.rand(4, 3, preprocess.size, preprocess.size)
        else:
            images = preprocess.to_model(some_samples(preprocess, 4))
        save_file(student.state_dict(), tmp_path / "student.safetensors")
        (tmp_path / "student.json").write_text(json.dumps(record))
        again = load_student(tmp_path)[0]
        torch.testing.assert_close(again(images), student.eval()(images))
        assert again.classes == classes
        expected = student.features(images, ["logits"])["logits"] if classes else student(images)
        assert expected.shape == (4, 2 if classes else 3)
        if not self.alone:
            return

        (tmp_path / "out").mkdir()
        alone = student.model.standalone(student.behind, record, images)
        save_file(alone.network.state_dict(), tmp_path / "out" / "model.safetensors")
        found: dict[str, object] = {"folder": str(tmp_path / "out")}
        exec(alone.code, found)
        model = found["model"]
        assert isinstance(model, nn.Module)
        torch.testing.assert_close(model(images), expected)

    def test_padding_never_changes_what_a_student_gives(self) -> None:
        if not self.student or self.like.kind != "text":
            pytest.skip("names no student of texts")
        student, texts, _ = make_student(self.student, self.like)
        ids = texts.to_model(some_samples(texts, 4))
        for given, row in zip(ids, student.double().eval()(ids), strict=True):
            torch.testing.assert_close(student(given[given >= 0][None])[0], row, atol=1e-9, rtol=1e-7)
