"""Extraction: against a plain loop, with bad images, interrupted, resumed, reused and refused."""

import hashlib
import io
import shutil
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from stopped import Stop, files, stop_after
from tiny import hash_of, tiny_encoder
from torchvision import transforms

import featcache.store.layout
from featcache import extract, open_corpus, open_store
from featcache.extraction.rehearsal import PROBE_IMAGES
from featcache.inputs.images import PARAMETERS, View, decode
from featcache.machine import resolve_device
from featcache.store import FeatureStore

EXACT = {"device": "cpu", "precision": "fp32+channels_last", "workers": 2, "batch_size": 4}
"""A precision that is not chosen by the clock, so that two runs are comparable byte for byte."""


@pytest.fixture
def small_chunks(monkeypatch):
    """8 rows a chunk for one view of the tiny encoder's embedding."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 8 * 6 * 2)


def by_hand(encoder, encoded):
    """One image through torchvision's transforms and the module alone."""
    p = encoder.preprocess
    transform = transforms.Compose(
        [
            transforms.Resize(p.resize, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(p.crop),
            transforms.ToTensor(),
            transforms.Normalize(p.mean, p.std),
        ]
    )
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    with torch.inference_mode():
        return {name: value[0].numpy() for name, value in encoder.module(transform(image)[None]).items()}


# -- what a store holds ---------------------------------------------------------------------------------


def test_features_equal_a_plain_loop(make_images, tmp_path, small_chunks):
    folder = make_images(13)
    store = extract(folder, tiny_encoder(), tmp_path / "s.zarr", fields=["embedding", "logits"], **EXACT)
    assert store.chunks == 2
    corpus = open_corpus(folder)
    for name, width in (("embedding", 6), ("logits", 3)):
        expected = np.stack([by_hand(tiny_encoder(), corpus.read(i))[name] for i in range(13)])
        assert store.gather(range(13), field=name).shape == (13, width)
        np.testing.assert_allclose(store.gather(range(13), field=name), expected, rtol=2**-10, atol=1e-4)


def test_rows_carry_label_id_content_and_manifest(make_images, tmp_path):
    folder = make_images(7)
    store = extract(folder, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    paths = sorted(Path(folder).rglob("*.png"), key=lambda p: p.relative_to(folder).as_posix())
    assert store.sample_ids.tolist() == [p.relative_to(folder).as_posix() for p in paths]
    assert [store.class_names[label] for label in store.labels] == [p.parent.name for p in paths]
    assert store.class_names == ["ant", "bee", "cat"]
    for row, path in enumerate(paths):
        assert store.content[row].tobytes() == hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    assert store.ok.tolist() == list(range(7))
    assert store.fingerprint == tiny_encoder().fingerprint
    assert store.manifest.encoder.preprocess == tiny_encoder().preprocess.to_dict()
    assert store.manifest.fields == {"embedding": [6]}
    assert store.manifest.extraction.precision == "fp32+channels_last"
    assert store.verify() == []


def test_stored_view_parameters_replay_the_pixels_that_were_encoded(make_images, tmp_path):
    folder, encoder = make_images(5), tiny_encoder()
    store = extract(folder, encoder, tmp_path / "s.zarr", views=3, augment="rrc", seed=4, **EXACT)
    corpus, oracle = open_corpus(folder), tiny_encoder()
    parameters = zarr.open_group(store.path, mode="r")["view"][:]
    assert parameters.shape == (5, 3, len(PARAMETERS))
    for row in range(5):
        for number in range(3):
            *box, flip, turns = parameters[row, number].tolist()
            view = View(tuple(box), bool(flip), int(turns), plain=number == 0)
            pixels = torch.from_numpy(oracle.preprocess.render(decode(corpus.read(row)), view).copy())
            expected = oracle.module(oracle.preprocess.to_model(pixels[None]))["embedding"][0].detach().numpy()
            np.testing.assert_allclose(store.gather([row], view=number)[0], expected, rtol=2**-10, atol=1e-4)
    assert (store.gather(range(5), view=1) != store.gather(range(5), view=2)).any()


@pytest.mark.parametrize("workers", [1, 5])
def test_worker_count_changes_no_byte(make_images, tmp_path, small_chunks, workers):
    folder = make_images(19)
    extract(folder, tiny_encoder(), tmp_path / "a.zarr", **EXACT)
    extract(folder, tiny_encoder(), tmp_path / "b.zarr", **{**EXACT, "workers": workers})
    assert files(tmp_path / "a.zarr") == files(tmp_path / "b.zarr")


def test_progress_counts_up_to_every_row(make_images, tmp_path):
    seen = []
    extract(make_images(10), tiny_encoder(), tmp_path / "s.zarr", progress=lambda at: seen.append(at.done), **EXACT)
    assert seen == [4, 8, 10, 10]


# -- bad images -----------------------------------------------------------------------------------------


def test_an_unreadable_image_is_a_failed_row_and_harms_no_other(make_images, tmp_path, small_chunks):
    folder = make_images(18)
    whole = extract(folder, tiny_encoder(), tmp_path / "whole.zarr", **EXACT)
    bad = [str(whole.sample_ids[i]) for i in (0, 7, 12)]
    contents = (b"no image", b"", (Path(folder) / bad[2]).read_bytes()[:-400])
    for sample_id, content in zip(bad, contents, strict=True):
        (Path(folder) / sample_id).write_bytes(content)
    store = extract(folder, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    assert store.failed.tolist() == [0, 7, 12]
    assert list(store.reasons) == bad
    assert store.reasons[bad[0]] == "UnidentifiedImageError: not an image that Pillow knows (8 bytes)"
    assert all(reason and " at 0x" not in reason for reason in store.reasons.values())
    assert store.manifest.sealed.failed == 3
    np.testing.assert_allclose(store.gather(store.ok), whole.gather(store.ok), rtol=2**-10, atol=1e-6)
    assert not store.gather(store.failed).any()
    assert store.labels.tolist() == whole.labels.tolist()
    assert store.verify() == []


def test_a_bad_beginning_does_not_stop_the_run(make_images, tmp_path):
    folder = Path(make_images(5))
    for i in range(130):
        (folder / f"0-{i:03}.png").write_bytes(b"no image")
    store = extract(str(folder), tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    assert (len(store.ok), len(store.failed)) == (5, 130)


def test_nothing_readable_at_all_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"images/{i}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"not one of 3 images could be read \(the first: \S+: UnidentifiedImageError"):
        extract(str(tmp_path / "images"), tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    assert not (tmp_path / "s.zarr").exists()


# -- interrupted and resumed ----------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [0, 1, 2, 3, 5])
def test_resuming_gives_the_very_same_bytes(make_images, tmp_path, small_chunks, batches):
    folder = make_images(22)
    (Path(folder) / "bee/004.png").write_bytes(b"no image")
    extract(folder, tiny_encoder(), tmp_path / "whole.zarr", **EXACT)
    with pytest.raises(Stop):
        extract(folder, tiny_encoder(), tmp_path / "s.zarr", progress=stop_after(batches), **EXACT)
    assert len(FeatureStore(tmp_path / "s.zarr").pending_chunks()) == 3 - (batches + 1) // 2
    with pytest.raises(ValueError, match="run the same `featcache extract` command again to resume"):
        open_store(tmp_path / "s.zarr")
    # Another batch size and precision are asked for; those that the finished chunks were made with are kept.
    again = {**EXACT, "batch_size": 3, "precision": "fp32"}
    assert extract(folder, tiny_encoder(), tmp_path / "s.zarr", **again).sealed
    assert files(tmp_path / "s.zarr") == files(tmp_path / "whole.zarr")


def test_finished_chunks_are_not_encoded_again(make_images, tmp_path, small_chunks):
    folder = make_images(22)
    with pytest.raises(Stop):
        extract(folder, tiny_encoder(), tmp_path / "s.zarr", progress=stop_after(4), **EXACT)
    encoder, corpus, at = tiny_encoder(), open_corpus(folder), []
    extract(corpus, encoder, tmp_path / "s.zarr", progress=lambda p: at.append((p.resumed, p.done)), **EXACT)
    assert at == [(20, 22), (20, 22)]  # also what was done of the next unit when it was stopped
    seen = set(encoder.module.seen)
    hashes = [
        hash_of(encoder.preprocess.to_model(torch.from_numpy(plain_pixels(corpus, i, encoder))[None])[0])
        for i in range(22)
    ]
    assert not seen & set(hashes[PROBE_IMAGES:20])
    assert seen == set(hashes[:PROBE_IMAGES] + hashes[20:])


def plain_pixels(corpus, row, encoder):
    p = encoder.preprocess
    transform = transforms.Compose(
        [transforms.Resize(p.resize, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(p.crop)]
    )
    return np.array(transform(Image.open(io.BytesIO(corpus.read(row))).convert("RGB")))


@pytest.mark.parametrize("size", [0, 3, 60])
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_chunk_torn_by_a_power_cut_is_made_again(make_images, tmp_path, small_chunks, chunk, size):
    """Its arrays may hold anything as long as its state, which is written last, is not there."""
    folder = make_images(22)
    extract(folder, tiny_encoder(), tmp_path / "whole.zarr", **EXACT)
    with pytest.raises(Stop):
        extract(folder, tiny_encoder(), tmp_path / "s.zarr", progress=stop_after(2 * chunk), **EXACT)
    for torn in (f"embedding/c/{chunk}/0/0", f"label/c/{chunk}", f"sample_id/c/{chunk}"):
        path = tmp_path / "s.zarr" / torn
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * size)
        path.with_name(path.name + ".9a.partial").write_bytes(b"half")
    extract(folder, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    assert files(tmp_path / "s.zarr") == files(tmp_path / "whole.zarr")


# -- reused ---------------------------------------------------------------------------------------------


def test_a_finished_store_is_returned_without_the_encoder(make_images, tmp_path):
    folder = make_images(6)
    made = extract(folder, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    before, encoder = files(made.path), tiny_encoder()
    again = extract(folder, encoder, tmp_path / "s.zarr", **EXACT)
    assert encoder.module.calls == 0
    assert again.sealed
    assert files(made.path) == before


def test_without_out_the_store_is_found_again_under_featcache_home(make_images, tmp_path, monkeypatch):
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    folder, encoder = make_images(6), tiny_encoder()
    made = extract(folder, tiny_encoder(), **EXACT)
    assert made.path.parent == tmp_path / "home" / "stores"
    assert extract(folder, encoder, **EXACT).path == made.path
    assert encoder.module.calls == 0
    others = [
        extract(folder, tiny_encoder(1), **EXACT),
        extract(folder, tiny_encoder(), fields=["embedding", "logits"], **EXACT),
        extract(folder, tiny_encoder(), views=2, augment="flip", **EXACT),
    ]
    assert len({made.path, *(other.path for other in others)}) == 4


def test_one_encoder_serves_several_corpora(make_images, tmp_path):
    folder, encoder = make_images(6), tiny_encoder()
    shutil.copytree(folder, tmp_path / "copy")
    first = extract(folder, encoder, tmp_path / "a.zarr", **EXACT)
    second = extract(str(tmp_path / "copy"), encoder, tmp_path / "b.zarr", **EXACT)
    np.testing.assert_array_equal(first.gather(range(6)), second.gather(range(6)))
    assert first.fingerprint == second.fingerprint


def test_one_encoder_serves_several_corpora_in_half_precision(make_images, tmp_path):
    folder, encoder = make_images(6), tiny_encoder()
    given = {**EXACT, "precision": "bf16+channels_last"}
    first = extract(folder, encoder, tmp_path / "a.zarr", **given)
    second = extract(folder, encoder, tmp_path / "b.zarr", **given)
    np.testing.assert_array_equal(first.gather(range(6)), second.gather(range(6)))


# -- refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {"teacher": tiny_encoder(1)}, "was made by another encoder"),
        (lambda f: {"teacher": tiny_encoder(resize=20)}, "was made by another encoder"),
        (lambda f: {"views": 2, "augment": "rrc"}, "was made with other views"),
        (lambda f: {"views": 2, "augment": "rrc", "crop_area": 0.5}, "was made with other views"),
        (lambda f: {"fields": ["embedding", "logits"]}, "was made with other fields"),
        (lambda f: (Path(f) / "ant/000.png").unlink(), "was made from other samples or labels"),
        (lambda f: shutil.move(Path(f) / "ant", Path(f) / "owl") and None, "was made from other samples or labels"),
    ],
    ids=["weights", "preprocessing", "views", "crop area", "fields", "removed", "renamed"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_something_else_is_refused_and_left_alone(make_images, tmp_path, change, message, finished):
    folder, out = make_images(6), tmp_path / "s.zarr"
    if finished:
        extract(folder, tiny_encoder(), out, **EXACT)
    else:
        with pytest.raises(Stop):
            extract(folder, tiny_encoder(), out, progress=stop_after(1), **EXACT)
    before = files(out)
    given = {"teacher": tiny_encoder(), **EXACT, **(change(folder) or {})}
    with pytest.raises(ValueError, match=f"{message}.*choose another --out, or replace it with --overwrite"):
        extract(folder, out=out, **given)
    assert files(out) == before
    assert extract(folder, out=out, overwrite=True, **given).sealed
    assert files(out) != before


@pytest.mark.parametrize("damage", ["other bytes", "gone"])
def test_changed_image_bytes_are_refused_by_name(make_images, tmp_path, damage):
    folder = make_images(6)
    corpus = open_corpus(folder)
    extract(corpus, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    image = Path(folder) / "bee/004.png"
    if damage == "gone":
        image.unlink()
    else:
        Image.new("RGB", (20, 20)).save(image)
    with pytest.raises(ValueError, match=r"1 images have changed since \(first: bee/004\.png\).*--overwrite"):
        extract(corpus, tiny_encoder(), tmp_path / "s.zarr", **EXACT)


def test_overwrite_never_replaces_what_is_not_a_store(make_images, tmp_path):
    folder = make_images(3)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"not a (feature )?store"):
            extract(folder, tiny_encoder(), tmp_path / "letters", overwrite=overwrite, **EXACT)
    assert files(tmp_path / "letters") == {"a.txt": b"dear"}


def test_a_second_writer_is_refused(make_images, tmp_path):
    folder = make_images(3)
    with (
        filelock.FileLock(f"{tmp_path / 's.zarr'}.lock"),
        pytest.raises(ValueError, match="another process is writing this store; wait for it"),
    ):
        extract(folder, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    assert not (tmp_path / "s.zarr").exists()
    assert extract(folder, tiny_encoder(), tmp_path / "s.zarr", **EXACT).sealed


def test_fields_that_cannot_be_kept_are_refused(make_images, tmp_path):
    with pytest.raises(ValueError, match="--fields maps: tiny gives embedding, "):
        extract(make_images(3), tiny_encoder(), tmp_path / "s.zarr", fields=["maps", "embedding"], **EXACT)


def test_devices():
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="unknown device 'gpu'; known: auto, cpu, cuda"):
        resolve_device("gpu")


def test_what_is_wrong_with_the_machine_stops_the_run_and_fails_no_row(make_images, tmp_path):
    corpus = open_corpus(make_images(6))
    read, gone = corpus.read, [True]

    def unreliable(i):
        if i == 4 and gone:
            raise ConnectionResetError("the file server is away")
        return read(i)

    corpus.read = unreliable
    with pytest.raises(ConnectionResetError):
        extract(corpus, tiny_encoder(), tmp_path / "s.zarr", **EXACT)
    gone.clear()
    assert len(extract(corpus, tiny_encoder(), tmp_path / "s.zarr", **EXACT).failed) == 0


def test_features_beyond_float16_are_failed_rows(make_images, tmp_path):
    encoder = tiny_encoder()
    inner = encoder.module.conv

    class Overflowing(torch.nn.Module):
        def forward(self, images):
            return inner(images) * torch.tensor([1.0, 1e6, 1.0]).repeat(len(images))[: len(images), None, None, None]

    encoder.module.conv = Overflowing()
    store = extract(make_images(3), encoder, tmp_path / "s.zarr", **EXACT)
    assert store.failed.tolist() == [1]
    assert "float16" in next(iter(store.reasons.values()))
    assert np.isfinite(store.gather([0, 1, 2])).all()
