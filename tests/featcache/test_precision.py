"""Precision: one for each encoder and kind of machine, constant batches, checked against fp32, recorded."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_encoder
from torch import nn

import featcache.extraction.fastest
import featcache.extraction.job
import featcache.extraction.rehearsal
import featcache.extraction.work
import featcache.store.layout
from featcache import extract, open_corpus, open_store
from featcache.disk.home import cache_home
from featcache.extraction.fastest import fastest_faithful
from featcache.extraction.pins import settle
from featcache.extraction.samples import Wanted, read_sample
from featcache.extraction.spot_check import BATCH
from featcache.inputs import Views
from featcache.precision import CANDIDATES, full_fp32
from featcache.store.comparable import FAITHFUL, NAMES, difference, exact_name, unfaithful
from featcache.store.manifest import ExtractionRecord

GIVEN = {"device": "cpu", "workers": 2, "batch_size": 4}


class Cancelling(nn.Module):
    """Exact in fp32; in bf16 the digits of the embeddings of bright images cancel away."""

    def __init__(self, module, above=-9.0, offset=4096):
        super().__init__()
        self.module, self.above, self.offset = module, above, offset

    def forward(self, images):
        offset = self.offset * (images.mean((1, 2, 3)) > self.above)[:, None]
        return {"embedding": (self.module(images)["embedding"] + offset) - offset}


class CountsItsBatch(nn.Module):
    """Gives other bits for another number of images, as real models do: and says which numbers there were."""

    def __init__(self, module):
        super().__init__()
        self.module, self.sizes = module, set()

    def forward(self, images):
        self.sizes.add(len(images))
        return {name: value + len(images) / 16 for name, value in self.module(images).items()}


def wrapped(wrapper, *args):
    encoder = tiny_encoder()
    encoder.module, encoder.fields = wrapper(encoder.module, *args), {"embedding": (6,)}
    return encoder


@pytest.fixture
def pixels(rng):
    return torch.from_numpy(rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))


@pytest.fixture
def fastest(monkeypatch):
    """`fastest(name)`: what the clock says from now on."""

    def set_to(name):
        seconds = lambda encoder, pixels, batch: 1.0 if encoder.precision.name == name else 2.0  # noqa: E731
        for module in (featcache.extraction.fastest, featcache.extraction.rehearsal):
            monkeypatch.setattr(module, "pass_seconds", seconds)

    return set_to


@pytest.fixture
def small_units(monkeypatch):
    """8 rows a unit, saved after each pass."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 8 * 6 * 2)
    monkeypatch.setattr(featcache.extraction.job, "SAVE_SECONDS", 0.0)


def files(store):
    return {str(p.relative_to(store.path)): p.read_bytes() for p in Path(store.path).rglob("*") if p.is_file()}


class Stop(Exception):
    pass


def stopped_after(passes, *args, **given):
    left = [passes]

    def stop(at):
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    with pytest.raises(Stop):
        extract(*args, progress=stop, **given)


# -- names and records ------------------------------------------------------------------------------------


def test_names_are_those_of_the_candidates_and_short_ones_mean_one_of_them():
    assert set(NAMES) == set(CANDIDATES)
    assert all(precision.name == name for name, precision in CANDIDATES.items())
    assert [exact_name(name) for name in ("fp32", "bf16", "fp16")] == [
        "fp32",
        "bf16+channels_last",
        "fp16+channels_last",
    ]
    with pytest.raises(ValueError, match=r"unknown precision 'int8'; known: auto, fp32, .*, bf16, fp16"):
        exact_name("int8")


def test_what_is_not_comparable():
    def record(precision, machine="cpu a", batch=16):
        return ExtractionRecord(precision=precision, machine=machine, batch_size=batch)

    half = record("bf16+channels_last")
    assert difference(record("fp32"), record("fp32", "cpu b", 32)) is None
    assert difference(half, half) is None
    assert difference(half, ExtractionRecord(imported="x.npy")) is None
    before_it_was_recorded = ExtractionRecord(precision="bf16+channels_last", device="cpu")
    assert difference(half, before_it_was_recorded) is None
    assert difference(half, record("fp32")) == ("bf16+channels_last", "fp32")
    assert difference(record("fp32"), record("fp32+channels_last")) == ("fp32", "fp32+channels_last")
    assert difference(half, record("bf16+channels_last", "cpu b")) is not None
    assert difference(half, record("bf16+channels_last", batch=32)) is not None
    assert unfaithful(ExtractionRecord(precision="bf16", cosine=0.9989))
    assert not any(unfaithful(ExtractionRecord(**of)) for of in ({}, {"cosine": None}, {"cosine": 0.9991}))


# -- the encoder --------------------------------------------------------------------------------------------


class Pointwise(nn.Module):
    """Kernels of one pixel, whose strides say nothing of their layout, and a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1))
        self.register_buffer("scale", torch.rand(6), persistent=False)

    def forward(self, images):
        return {"embedding": self.convs(images).mean((2, 3)) * self.scale}


@pytest.mark.parametrize("last", ["fp32", "fp32+channels_last"])
def test_going_back_from_any_precision_is_exact_in_bits_and_layout(pixels, last):
    def make():
        torch.manual_seed(0)
        encoder = tiny_encoder()
        encoder.module, encoder.fields = Pointwise().eval().requires_grad_(False), {"embedding": (6,)}
        return encoder

    fresh, encoder = make().to("cpu", CANDIDATES[last]), make()
    for name in (*CANDIDATES, *reversed(CANDIDATES)):
        encoder.to("cpu", CANDIDATES[name])
        if CANDIDATES[name].weights != torch.float32:
            assert all(tensor.dtype == CANDIDATES[name].weights for tensor in encoder.module.state_dict().values())
    encoder.to("cpu", CANDIDATES[last])
    named = lambda module: dict([*module.named_parameters(), *module.named_buffers()])  # noqa: E731
    for name, tensor in named(fresh.module).items():
        assert torch.equal(named(encoder.module)[name], tensor), name
        assert named(encoder.module)[name].stride() == tensor.stride(), name
    assert torch.equal(encoder.encode(pixels)["embedding"], fresh.encode(pixels)["embedding"])
    assert encoder.fingerprint == make().fingerprint


@pytest.mark.parametrize("name", ["bf16+channels_last", "fp16+channels_last"])
def test_lower_precision_weights_are_rounded_from_fp32_once(pixels, name):
    encoder, original = tiny_encoder(), tiny_encoder().module.state_dict()
    for each in ("bf16+channels_last", "fp16+channels_last", name):
        encoder.to("cpu", CANDIDATES[each])
    for key, value in encoder.module.state_dict().items():
        assert torch.equal(value, original[key].to(encoder.precision.weights))


@pytest.mark.parametrize("count", [1, 4, 5])
def test_every_pass_is_of_the_same_size(pixels, count):
    encoder = wrapped(CountsItsBatch)
    found = encoder.encode_padded(pixels[:count], 4)["embedding"]
    assert encoder.module.sizes == {4}
    torch.testing.assert_close(found, tiny_encoder().encode(pixels[:count], ["embedding"])["embedding"] + 4 / 16)


# -- which precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANDIDATES)
def test_the_fastest_is_taken_if_it_is_faithful(pixels, fastest, name, caplog):
    fastest(name)
    expected = "fp32" if name.startswith("fp16") else name  # a CPU is not asked to try it
    assert fastest_faithful(tiny_encoder(), pixels, 4, "cpu") == expected
    with caplog.at_level(logging.WARNING, "featcache"):
        chosen = fastest_faithful(wrapped(Cancelling), pixels, 4, "cpu")
    assert chosen == ("fp32+channels_last" if name == "fp32+channels_last" else "fp32")
    assert not caplog.messages


def test_an_encoder_gets_one_precision_whatever_the_clock_says_later(make_images, tmp_path, fastest):
    folder = make_images(6)
    for out, clock in (("a", "bf16+channels_last"), ("b", "fp32"), ("c", "fp32+channels_last")):
        fastest(clock)
        made = extract(folder, tiny_encoder(), tmp_path / f"{out}.zarr", **GIVEN)
        assert made.manifest.extraction.precision == "bf16+channels_last"
    other = extract(folder, tiny_encoder(1), tmp_path / "other.zarr", **GIVEN)
    assert other.manifest.extraction.precision == "fp32+channels_last"


def test_a_precision_that_is_asked_for_holds_for_its_store_and_for_all_if_it_is_the_first():
    def measured():
        raise AssertionError("measured again")

    assert settle("one", "cpu x", "bf16", measured) == ("bf16+channels_last", "as asked for")
    assert settle("one", "cpu x", "auto", measured)[0] == "bf16+channels_last"
    assert settle("one", "cpu x", "fp32", measured)[0] == "fp32"
    assert settle("one", "cpu x", "auto", measured)[0] == "bf16+channels_last"
    assert settle("one", "cpu y", "auto", lambda: "fp32")[0] == "fp32"
    assert settle("one", "cpu y", "auto", measured)[0] == "fp32"
    assert settle("one", "cpu x", "auto", measured)[0] == "bf16+channels_last"
    with pytest.raises(ValueError, match="unknown precision 'fast'"):
        settle("one", "cpu x", "fast", measured)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"precision": "int3"}', '{"precision": ["fp32"]}'])
def test_a_damaged_choice_is_named_and_made_again(text, caplog):
    settle("one", "cpu x", "bf16", lambda: "fp32")
    (place,) = (cache_home() / "precision").glob("*.json")
    place.write_text(text)
    assert settle("one", "cpu x", "auto", lambda: "fp32")[0] == "fp32"
    assert str(place) in caplog.text
    assert json.loads(place.read_text())["precision"] == "fp32"


def test_known_stores_are_followed_where_no_choice_is_kept(make_images, tmp_path, fastest):
    folder = make_images(6)
    extract(folder, tiny_encoder(), tmp_path / "a.zarr", precision="bf16-autocast+channels_last", **GIVEN)
    for place in (cache_home() / "precision").glob("*.json"):
        place.unlink()
    fastest("fp32")
    made = extract(folder, tiny_encoder(), tmp_path / "b.zarr", **GIVEN)
    assert made.manifest.extraction.precision == "bf16-autocast+channels_last"


def test_a_home_that_cannot_be_written_stops_nothing(make_images, tmp_path, fastest, caplog):
    (cache_home()).mkdir(parents=True, exist_ok=True)
    (cache_home() / "precision").write_text("in the way")
    fastest("bf16+channels_last")
    made = extract(make_images(6), tiny_encoder(), tmp_path / "a.zarr", **GIVEN)
    assert made.manifest.extraction.precision == "fp32"
    assert "precision cannot be written" in caplog.text
    assert "set FEATCACHE_HOME, or give --precision" in caplog.text
    asked = extract(str(tmp_path / "images"), tiny_encoder(), tmp_path / "b.zarr", precision="bf16", **GIVEN)
    assert asked.manifest.extraction.precision == "bf16+channels_last"


def test_a_store_that_is_replaced_keeps_its_precision(make_images, tmp_path, fastest):
    folder = make_images(6)
    fastest("fp32")
    extract(folder, tiny_encoder(), tmp_path / "a.zarr", **GIVEN)
    for precision in ("bf16", "auto"):
        made = extract(folder, tiny_encoder(), tmp_path / "a.zarr", precision=precision, overwrite=True, **GIVEN)
        assert made.manifest.extraction.precision == "bf16+channels_last"


def test_half_precision_is_not_gone_on_with_elsewhere(make_images, tmp_path, monkeypatch, small_units):
    folder = make_images(20)
    for name, refused in (("bf16", True), ("fp32", False)):
        out = tmp_path / f"{name}.zarr"
        stopped_after(1, folder, tiny_encoder(), out, precision=name, **GIVEN)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(featcache.extraction.rehearsal, "machine_kind", lambda device: "cpu z80")
            if refused:
                with pytest.raises(ValueError, match=r"was begun in bf16\+channels_last on cpu .*this is cpu z80"):
                    extract(folder, tiny_encoder(), out, **GIVEN)
            else:
                assert extract(folder, tiny_encoder(), out, **GIVEN).sealed


# -- the same bits ------------------------------------------------------------------------------------------


def corpus_of(make_images, count=21, broken=(2, 9, 20)):
    folder = Path(make_images(count))
    paths = sorted(folder.rglob("*.png"))
    for row in broken:
        paths[row].write_bytes(b"no image")
    return folder, paths


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast+channels_last"])
@pytest.mark.parametrize("views", [1, 3, 6])
def test_every_pass_of_an_extraction_is_of_the_same_size(make_images, tmp_path, small_units, precision, views):
    """Failed rows, units that end early, known rows, several views, and more views than a pass has images."""
    folder, paths = corpus_of(make_images)
    given = {**GIVEN, "precision": precision, "views": views, "augment": "none" if views == 1 else "rrc"}
    encoder = wrapped(CountsItsBatch)
    encoder.to("cpu", CANDIDATES[precision])
    if views == 1:  # two thirds are known
        (tmp_path / "known/x").mkdir(parents=True)
        for path in paths[::3] + paths[1::3]:
            (tmp_path / "known/x" / path.name).write_bytes(path.read_bytes())
        extract(str(tmp_path / "known"), encoder, tmp_path / "known.zarr", **given)
    told = []
    extract(str(folder), encoder, tmp_path / "s.zarr", progress=told.append, **given)
    assert encoder.module.sizes <= {4, BATCH}
    assert told[-1].reused == (13 if views == 1 else 0)


@pytest.mark.parametrize(
    ("batch", "views", "samples"), [(32, 1, 128), (32, 4, 32), (256, 1, 1024), (None, 1, 64), (4, 4, 4)]
)
def test_images_of_four_passes_are_read_ahead(make_images, tmp_path, monkeypatch, batch, views, samples):
    told = []

    def bursts(function, items, pool, ahead):
        told.append(ahead)
        return map(function, items)

    monkeypatch.setattr(featcache.extraction.work, "bursts", bursts)
    given = {**GIVEN, "batch_size": batch, "views": views, "augment": "rrc" if views > 1 else "none"}
    extract(make_images(3), tiny_encoder(), tmp_path / "s.zarr", precision="fp32", **given)
    assert told == [samples]


@pytest.mark.parametrize("precision", NAMES)
def test_killed_resumed_or_partly_known_the_bytes_are_the_same(
    make_images, tmp_path, monkeypatch, small_units, precision
):
    folder, paths = corpus_of(make_images)
    given = {**GIVEN, "precision": precision, "fields": ["embedding", "logits"]}

    def home(name):
        monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / name))

    def encoder():
        made = tiny_encoder()
        made.module = CountsItsBatch(made.module)
        return made

    home("whole")
    whole = extract(str(folder), encoder(), tmp_path / "whole.zarr", **given)
    assert whole.failed.tolist() == [2, 9, 20]
    for passes in (0, 1, 2, 3, 4):
        home(f"killed{passes}")
        out = tmp_path / f"killed{passes}.zarr"
        stopped_after(passes, str(folder), encoder(), out, **given)
        assert files(extract(str(folder), encoder(), out, **given)) == files(whole), passes
    home("partly")
    (tmp_path / "known/x").mkdir(parents=True)
    for path in paths[1::2]:
        (tmp_path / "known/x" / path.name).write_bytes(path.read_bytes())
    extract(str(tmp_path / "known"), encoder(), tmp_path / "known.zarr", **given)
    told = []
    made = extract(str(folder), encoder(), tmp_path / "partly.zarr", progress=told.append, **given)
    assert told[-1].reused == 9
    assert files(made) == files(whole)


def test_what_was_tried_leaves_no_trace(make_images, tmp_path, fastest, monkeypatch, small_units):
    """fp32 is chosen after all others were tried; resumed, the encoder has seen fp32 alone."""
    folder, _ = corpus_of(make_images)
    fastest("fp32")

    def make():
        encoder = tiny_encoder()
        torch.manual_seed(0)
        encoder.module, encoder.fields = Pointwise().eval().requires_grad_(False), {"embedding": (6,)}
        return encoder

    whole = extract(str(folder), make(), tmp_path / "whole.zarr", **GIVEN)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))
    stopped_after(2, str(folder), make(), tmp_path / "s.zarr", **GIVEN)
    assert files(extract(str(folder), make(), tmp_path / "s.zarr", **GIVEN)) == files(whole)


@pytest.mark.parametrize(
    ("change", "reused"), [({}, 6), ({"precision": "fp32"}, 0), ({"batch_size": 5}, 0), ({"machine": "cpu z80"}, 0)]
)
def test_rows_with_other_bits_are_not_reused(make_images, tmp_path, monkeypatch, change, reused):
    folder, told = make_images(6), []
    extract(folder, tiny_encoder(), tmp_path / "a.zarr", precision="bf16", **GIVEN)
    if machine := change.pop("machine", None):
        monkeypatch.setattr(featcache.extraction.rehearsal, "machine_kind", lambda device: machine)
    given = {**GIVEN, "precision": "bf16", **change}
    extract(folder, tiny_encoder(), tmp_path / "b.zarr", progress=told.append, **given)
    assert told[-1].reused == reused


# -- checked against fp32 -----------------------------------------------------------------------------------


def cosines(folder, encoder, store):
    """Of every row of a store to the plain model in fp32."""
    corpus, found = open_corpus(str(folder)), []
    for row in range(len(store)):
        seen = read_sample(corpus, row, Views(), [Wanted(encoder.preprocess)]).seen[0]
        exact = encoder.encode(torch.from_numpy(seen.pixels), ["embedding"])["embedding"][0].numpy().astype(np.float64)
        mine = store.gather([row])[0].astype(np.float64)
        found.append(mine @ exact / np.linalg.norm(mine) / np.linalg.norm(exact))
    return np.array(found)


def test_the_worst_of_rows_all_over_the_store_is_recorded_and_said(make_images, tmp_path, small_units, caplog):
    """The first unit's images are dark, and faithful; a bright one comes later."""
    folder = make_images(21)
    for i, path in enumerate(sorted(Path(folder).rglob("*.png"))):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 60 if i < 12 else 250, (20, 20, 3), np.uint8)).save(path)
    given = {**GIVEN, "precision": "bf16"}
    store = extract(folder, wrapped(Cancelling, -0.8, 64), tmp_path / "s.zarr", **given)
    exact = cosines(folder, wrapped(Cancelling, -0.8, 64), store)
    made = store.manifest.extraction
    assert exact[:12].min() > FAITHFUL > exact.min()
    assert made.cosine == pytest.approx(exact.min(), abs=1e-3)
    assert made.checked == 21
    said = [message for message in caplog.messages if "cosine to fp32" in message]
    assert len(said) == 1
    assert "the run goes on" in said[0]
    assert "--precision fp32 --overwrite" in said[0]
    assert f"cosine to fp32 of {made.cosine:.5f}" in unfaithful(made)
    stopped_after(2, folder, wrapped(Cancelling, -0.8, 64), tmp_path / "t.zarr", **given)
    assert extract(folder, wrapped(Cancelling, -0.8, 64), tmp_path / "t.zarr", **given).manifest.extraction == made


def test_fp32_needs_no_check(make_images, tmp_path):
    for name in ("fp32", "fp32+channels_last"):
        store = extract(make_images(3), tiny_encoder(), tmp_path / f"{name}.zarr", precision=name, **GIVEN)
        assert store.manifest.extraction.cosine == 1.0
        assert "cosine" not in store.layout


class Overflowing(nn.Module):
    """Bright images are beyond fp16 on the way, and within it in the end."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, images):
        bright = (images.mean((1, 2, 3)) > 0)[:, None]
        found = self.module(images)["embedding"]
        return {
            "embedding": found * torch.where(bright, 5e4, 1.0).to(found.dtype) * 50 / 50 / torch.where(bright, 5e4, 1.0)
        }


def test_rows_that_only_half_precision_loses_fail_with_a_word(make_images, tmp_path, caplog):
    folder = make_images(6)
    for i, path in enumerate(sorted(Path(folder).rglob("*.png"))):
        Image.new("RGB", (20, 20), (250, 250, 250) if i == 4 else (5, 5 + i, 5)).save(path)
    store = extract(folder, wrapped(Overflowing), tmp_path / "s.zarr", precision="fp16", **GIVEN)
    assert store.failed.tolist() == [4]
    assert "not finite in fp16+channels_last; extract again with --precision fp32" in next(iter(store.reasons.values()))
    assert store.manifest.extraction.cosine == 0.0
    assert any("in fp32 they are" in message for message in caplog.messages)
    exact = extract(folder, wrapped(Overflowing), tmp_path / "e.zarr", precision="fp32", **GIVEN)
    assert len(exact.failed) == 0


def test_the_cosines_go_with_the_rows_that_are_reused(make_images, tmp_path):
    folder = make_images(6)
    first = extract(folder, tiny_encoder(), tmp_path / "a.zarr", precision="bf16", **GIVEN)
    told = []
    second = extract(folder, tiny_encoder(), tmp_path / "b.zarr", precision="bf16", progress=told.append, **GIVEN)
    assert told[-1].reused == 6
    assert second.manifest.extraction == first.manifest.extraction
    assert first.manifest.extraction.checked == 6
    assert open_store(second.path).verify() == []


def test_on_a_gpu_fp32_is_not_rounded_and_what_was_asked_for_comes_back():
    def now():
        return (
            torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic,
        )  # fmt: skip

    torch.set_float32_matmul_precision("high")
    try:
        before = now()
        with full_fp32(torch.device("cuda")):
            assert now() == ("highest", False, True)
        assert now() == before
    finally:
        torch.set_float32_matmul_precision("highest")
