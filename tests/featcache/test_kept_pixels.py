"""Images kept in a store: against Pillow by hand, read by zarr, damaged and repaired, and as a corpus of their own."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import hash_of, tiny_encoder
from torchvision.transforms import InterpolationMode, Resize

import featcache.extraction.job
import featcache.store.layout
import featcache_cli.screen
from featcache import KeptPixels, extract, open_corpus, open_store
from featcache.corpora.store import KeptImages
from featcache.extraction.rehearsal import PROBE_IMAGES
from featcache.extraction.samples import content_hash
from featcache.inputs.images import View, decode
from featcache_cli import programs

EXACT = {"device": "cpu", "precision": "fp32+channels_last", "workers": 2, "batch_size": 4}
SIZE = 20
FORMATS = [KeptPixels(size=SIZE), KeptPixels(size=SIZE, format="raw")]


@pytest.fixture(params=FORMATS, ids=["jpeg", "raw"])
def pixels(request):
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """16 rows a unit for 8 views of the tiny encoder's embedding, 4 (raw: 1) in a chunk of kept images."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 16 * 8 * 6 * 2 + 700)
    return {"views": 8, "augment": "flip"}


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def saved(image, kind, **given):
    file = io.BytesIO()
    image.save(file, kind, **given)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    return exif


def originals():
    """Name → (encoded file, the upright RGB array that it shows, found without featcache)."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))

    def noise(width, height):
        return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))

    ink = np.dstack([noise(50, 30), noise(50, 30)[..., :1] // 2])
    cmyk = saved(Image.frombytes("CMYK", (50, 30), ink.tobytes()), "JPEG")
    deep = rng.integers(0, 2**16, (31, 45), np.uint16)
    alpha = np.dstack([noise(41, 33), noise(41, 33)[..., 0]])
    found = {
        f"{w}x{h}.png": (saved(Image.fromarray(noise(w, h)), "PNG"), noise(w, h))
        for w, h in [(64, 48), (33, 47), (40, 40), (101, 21), (21, 101), (20, 20), (20, 90), (7, 5), (1, 1), (19, 300)]
    }
    return found | {
        "turned.png": (saved(Image.fromarray(noise(50, 30)), "PNG", exif=rotated()), np.rot90(noise(50, 30), -1)),
        "cmyk.jpg": (cmyk, np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB"))),
        "16-bit.png": (saved(Image.fromarray(deep), "PNG"), np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, 2)),
        "grey.png": (
            saved(Image.fromarray(noise(60, 44)[..., 0]), "PNG"),
            np.repeat(noise(60, 44)[..., :1], 3, 2),
        ),
        "alpha.png": (saved(Image.fromarray(alpha), "PNG"), noise(41, 33)),
    }


def by_hand(upright, pixels):
    """The kept image's pixels and, of a JPEG, its very bytes."""
    image = Image.fromarray(np.ascontiguousarray(upright))
    if min(image.size) > pixels.size:
        image = Resize(pixels.size, InterpolationMode.BICUBIC)(image)
    if pixels.format == "raw":
        return np.asarray(image), None
    encoded = saved(image, "JPEG", quality=95, subsampling=0)
    return np.asarray(Image.open(io.BytesIO(encoded))), encoded


def folder_of(path, images):
    path.mkdir()
    for name, encoded in images.items():
        (path / name).write_bytes(encoded)
    return str(path)


# -- what is kept ---------------------------------------------------------------------------------------


def test_what_is_kept_is_what_pillow_makes_of_the_original(tmp_path, pixels):
    images = originals()
    folder = folder_of(tmp_path / "in", {name: encoded for name, (encoded, _) in images.items()})
    store = extract(folder, tiny_encoder(), tmp_path / "s.zarr", pixels=pixels, **EXACT)
    assert sorted(store.sample_ids) == sorted(images)
    for row, name in enumerate(store.sample_ids):
        upright = images[name][1]
        expected, encoded = by_hand(upright, pixels)
        kept = store.pixels(row)
        image = Image.open(io.BytesIO(kept))
        assert image.format == {"jpeg": "JPEG", "raw": "BMP"}[pixels.format]
        np.testing.assert_array_equal(np.asarray(image), expected, err_msg=name)
        np.testing.assert_array_equal(np.asarray(decode(kept)), expected, err_msg=name)
        assert encoded in (None, kept), name
        assert store.row("image_size", row).tolist() == [upright.shape[1], upright.shape[0]], name


@pytest.mark.parametrize("size", [(20, 20), (19, 300), (300, 20), (7, 5), (1, 1), (3, 4000)])
def test_what_is_small_already_is_kept_as_it_is(size, rng):
    width, height = size
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    np.testing.assert_array_equal(np.asarray(decode(FORMATS[1].encode(image))), np.asarray(image))
    assert decode(FORMATS[0].encode(image)).size == size


def test_a_side_longer_than_a_jpeg_may_have_is_kept_raw():
    image = Image.fromarray(np.arange(65_501 * 2 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 65_501, 3))
    np.testing.assert_array_equal(np.asarray(decode(FORMATS[0].encode(image))), np.asarray(image))
    assert Image.open(io.BytesIO(FORMATS[0].encode(image.crop((0, 0, 65_500, 2))))).format == "JPEG"


def test_comments_and_colour_profiles_of_the_original_stay_behind(tmp_path):
    """A comment of more than 65,533 bytes, which a PNG or GIF may have, does not fit in a JPEG."""
    image, long = Image.new("RGB", (30, 25), (9, 80, 200)), PngInfo()
    long.add_text("comment", "y" * 70_000)
    bare = FORMATS[0].encode(image)
    for encoded in (
        saved(image, "JPEG", quality=100, comment=b"x" * 1000, icc_profile=b"z" * 100, dpi=(10, 10)),
        saved(image, "PNG", pnginfo=long),
        saved(image, "PNG", icc_profile=b"z" * 100),
    ):
        assert len(FORMATS[0].encode(decode(encoded))) == pytest.approx(len(bare), abs=30)
    gif = decode(saved(image.convert("P"), "GIF", comment=b"x" * 70_000))
    assert b"xxx" not in FORMATS[0].encode(gif)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"size": 0}, "--pixels 0: give the shorter side in px"), ({"size": 9, "format": "png"}, "known: jpeg, raw")],
)
def test_wrong_settings_are_refused(given, message, unchecked):
    with pytest.raises(ValueError, match=message):
        KeptPixels(**given)


# -- where it is kept -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_plain_zarr_reads_the_very_same_bytes(make_images, tmp_path, pixels, small_chunks):
    store = extract(make_images(37), tiny_encoder(), tmp_path / "s.zarr", pixels=pixels, **small_chunks, **EXACT)
    per_chunk = store.layout["pixels"].chunk_rows
    assert (store.chunks, per_chunk) == (3, {"jpeg": 4, "raw": 1}[pixels.format])
    assert len(list((store.path / "pixels" / "c").iterdir())) == -(-37 // per_chunk)
    array = zarr.open_group(store.path, mode="r", use_consolidated=False)["pixels"]
    assert array.shape == (37,)
    assert [store.pixels(row) for row in range(37)] == list(array[:])
    assert len(set(array[:])) == 37


def test_images_are_read_in_any_order(make_images, tmp_path, small_chunks):
    store = extract(make_images(37), tiny_encoder(), tmp_path / "s.zarr", pixels=FORMATS[1], **small_chunks, **EXACT)
    expected = [store.pixels(row) for row in range(37)]
    again, order = open_store(store.path), np.random.default_rng(0).permutation(np.repeat(np.arange(37), 3))
    assert [again.pixels(int(row)) for row in order] == [expected[row] for row in order]


def test_an_unreadable_image_keeps_nothing_and_harms_no_other(make_images, tmp_path, pixels):
    folder = Path(make_images(6))
    broken = sorted(folder.rglob("*.png"))[2]
    whole = broken.read_bytes()
    store = extract(str(folder), tiny_encoder(), tmp_path / "whole.zarr", pixels=pixels, **EXACT)
    broken.write_bytes(whole[: len(whole) // 2])
    damaged = extract(str(folder), tiny_encoder(), tmp_path / "s.zarr", pixels=pixels, **EXACT)
    assert damaged.failed.tolist() == [2]
    assert damaged.pixels(2) == b""
    assert [damaged.pixels(row) for row in (0, 1, 3, 4, 5)] == [store.pixels(row) for row in (0, 1, 3, 4, 5)]
    assert damaged.row("image_size", 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"bee/001\.png: its image is not kept \(OSError: .*truncated"):
        KeptImages(damaged).read(2)


def test_a_flipped_byte_is_found_and_repaired(make_images, tmp_path, monkeypatch, pixels, small_chunks):
    folder = make_images(37)
    store = extract(folder, tiny_encoder(), tmp_path / "s.zarr", pixels=pixels, **small_chunks, **EXACT)
    whole, path, per_chunk = files(store.path), store.path / "pixels/c/5", store.layout["pixels"].chunk_rows
    for at in (0, 4, 5, 200, -6, -1):
        chunk = bytearray(whole["pixels/c/5"])
        chunk[at] ^= 4
        path.write_bytes(chunk)
        assert open_store(store.path).verify() == [
            f"pixels chunk 5 (rows {5 * per_chunk}–{6 * per_chunk - 1}): checksum does not match its bytes"
        ]
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))  # nothing to copy from
    told = []
    mended = extract(folder, tiny_encoder(), store.path, pixels=pixels, progress=told.append, **small_chunks, **EXACT)
    assert files(mended.path) == whole
    assert told[-1].resumed == 37 - 16


class Stop(Exception):
    pass


@pytest.mark.parametrize("samples", [3, 15, 30])
def test_a_killed_run_ends_as_if_it_had_never_been(make_images, tmp_path, monkeypatch, pixels, small_chunks, samples):
    """With every batch saved, as after a minute of work: what was kept of a unit in progress is not decoded again."""
    folder = make_images(37)
    whole = extract(folder, tiny_encoder(), tmp_path / "whole.zarr", pixels=pixels, **small_chunks, **EXACT)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(featcache.extraction.job, "SAVE_SECONDS", -1.0)

    def kill(at):
        if at.done >= samples:
            raise Stop

    with pytest.raises(Stop):
        extract(folder, tiny_encoder(), tmp_path / "s.zarr", pixels=pixels, progress=kill, **small_chunks, **EXACT)
    told = []
    store = extract(
        folder, tiny_encoder(), tmp_path / "s.zarr", pixels=pixels, progress=told.append, **small_chunks, **EXACT
    )
    assert told[-1].resumed == samples
    assert files(store.path) == files(whole.path)


# -- what stays the same --------------------------------------------------------------------------------


def test_features_are_those_of_a_store_without_pixels_and_are_found_by_content(make_images, tmp_path, monkeypatch):
    folder, views = make_images(13), {"views": 3, "augment": "rrc"}
    bare = extract(folder, tiny_encoder(), tmp_path / "bare.zarr", **views, **EXACT)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))
    kept = extract(folder, tiny_encoder(), tmp_path / "kept.zarr", pixels=FORMATS[0], **views, **EXACT)
    monkeypatch.undo()
    encoder, told = tiny_encoder(), []
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    open_again = extract(folder, tiny_encoder(), bare.path, **views, **EXACT)  # registers it in this home
    found = extract(folder, encoder, tmp_path / "found.zarr", pixels=FORMATS[0], progress=told.append, **views, **EXACT)
    assert open_again.path == bare.path
    assert told[-1].reused == 13
    assert len(set(encoder.module.seen)) <= PROBE_IMAGES
    ours, theirs = files(kept.path), files(bare.path)
    for name, chunk in theirs.items():
        assert name == "zarr.json" or ours[name] == chunk, name
    assert {name.split("/")[0] for name in set(ours) - set(theirs)} == {"pixels", "image_size"}
    there = files(found.path)
    assert {name: there[name] for name in ours if name != "zarr.json"} == {
        name: chunk for name, chunk in ours.items() if name != "zarr.json"
    }


def test_without_out_a_store_with_pixels_stands_beside_the_one_without(make_images, tmp_path):
    folder = make_images(6)
    bare = extract(folder, tiny_encoder(), **EXACT)
    kept = [extract(folder, tiny_encoder(), pixels=pixels, **EXACT) for pixels in FORMATS]
    assert len({store.path for store in (bare, *kept)}) == 3
    assert extract(folder, tiny_encoder(), **EXACT).path == bare.path


def test_other_pixels_in_the_same_store_are_refused(make_images, tmp_path):
    folder = make_images(6)
    extract(folder, tiny_encoder(), tmp_path / "s.zarr", pixels=FORMATS[0], **EXACT)
    for other in (None, FORMATS[1], KeptPixels(size=SIZE + 1)):
        with pytest.raises(ValueError, match="was made with other pixels"):
            extract(folder, tiny_encoder(), tmp_path / "s.zarr", pixels=other, **EXACT)


# -- as a corpus ----------------------------------------------------------------------------------------


def test_a_store_without_images_is_no_corpus(make_images, tmp_path):
    store = extract(make_images(6), tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    for attempt in (lambda: store.pixels(0), lambda: open_corpus(f"store:{store.path}")):
        with pytest.raises(ValueError, match=r"s\.zarr: keeps no images; extract with --pixels SIZE") as refused:
            attempt()
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="no such store"):
        open_corpus("store:nowhere.zarr")


def test_another_teacher_sees_the_kept_images_when_the_originals_are_gone(make_images, tmp_path, pixels):
    folder = make_images(9)
    first = extract(folder, tiny_encoder(), tmp_path / "s.zarr", pixels=pixels, **EXACT)
    labels, ids = first.labels.tolist(), first.sample_ids.tolist()
    shutil.rmtree(folder)
    encoder = tiny_encoder(1)
    store = extract(f"store:{first.path}", encoder, tmp_path / "t.zarr", **EXACT)
    assert (store.labels.tolist(), store.sample_ids.tolist(), store.class_names) == (labels, ids, ["ant", "bee", "cat"])
    assert store.manifest.corpus.spec == f"store:{first.path}"
    p = encoder.preprocess
    for row in range(9):
        kept = first.pixels(row)
        assert store.content[row].tobytes() == content_hash(kept)
        view = View(tuple(store.row("view", row)[0, :4].tolist()))
        seen = normalise_one(p.render(decode(kept), view), p)
        assert hash_of(seen) in encoder.module.seen


def normalise_one(image, preprocess):
    return preprocess.to_model(torch.from_numpy(image[None].copy()))[0]


def test_the_command_line_keeps_shows_and_reads_them(make_images, tmp_path, monkeypatch, capsys):
    """--pixels, `featcache info`, and `store:PATH` given to `featcache extract`."""
    from safetensors.torch import save_file

    from featcache.inputs.images import Preprocess
    from featcache.student import open_student

    make_images(6)
    monkeypatch.chdir(tmp_path)
    Path("student").mkdir()
    save_file(open_student("tiny").state_dict(), "student/student.safetensors")
    preprocess = Preprocess(resize=18, crop=16, size=16).to_dict()
    record = {"architecture": "tiny", "embedding_dim": 128, "preprocess": preprocess}
    Path("student/student.json").write_text(json.dumps(record))
    for screen in (featcache_cli.screen.screen, featcache_cli.screen.results):
        monkeypatch.setattr(screen, "width", 400)

    def featcache_(line):
        monkeypatch.setattr(sys, "argv", ["featcache", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            programs.run_featcache()
        return int(stopped.value.code or 0), capsys.readouterr().out

    assert featcache_("extract images --teacher run:student --out s.zarr --pixels 20 --pixels-format raw")[0] == 0
    assert KeptImages("s.zarr").read(0)[:2] == b"BM"
    assert "20 px, raw" in featcache_("info s.zarr")[1]
    assert featcache_("extract store:s.zarr --teacher run:student --out t.zarr")[0] == 0
    assert "not kept" in featcache_("info t.zarr")[1]
    assert len(open_store("t.zarr").ok) == 6
