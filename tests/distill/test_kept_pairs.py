"""Stage two from the images that a store keeps: the same pixels, boxes and runs as from the originals."""

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import featcache.store.layout
import featcache_cli.screen
from distill.pairs import Pairs
from distill.training.fit import fit
from distill.training.run import Run
from featcache.corpora import open_corpus
from featcache.corpora.store import KeptImages
from featcache.extraction.extract import extract
from featcache.inputs.images import KeptPixels
from featcache.store import open_store
from featcache_cli import programs

VIEWS, SAMPLES = 3, 11
LARGER_THAN_ALL = KeptPixels(size=64, format="raw")
AT_THE_TEACHERS_SIZE = KeptPixels(size=18, format="raw")
SMALL_JPEG = KeptPixels(size=18)


@pytest.fixture
def folder(tmp_path, make_images):
    folder = make_images(tmp_path / "images", SAMPLES)
    (folder / "004.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def keep(folder, tmp_path, make_teacher, monkeypatch):
    """`keep(pixels, ...)`: a store of the folder, several chunks of images, and what the teacher was given."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 4 * 20_000)

    def keep(pixels, name="s.zarr", corpus=None, dim=12, views=VIEWS):
        teacher = make_teacher(dim)
        recipe = {"views": views, "augment": "rrc", "seed": 5} if views > 1 else {}
        batch = 5 * views
        source = corpus or str(folder)
        store = extract(
            source, teacher, tmp_path / name, pixels=pixels, device="cpu", precision="fp32", workers=2, batch_size=batch,
            **recipe,
        )  # fmt: skip
        passes = -(-len(store) // 5)
        given = np.stack(teacher.seen[-passes * batch :])  # before them come the probe's
        # Each sample has its place in whole batches. Of known rows the teacher sees nothing.
        seen = given.reshape(-1, views, 16, 16, 3)[store.ok] if len(given) == passes * batch else None
        return SimpleNamespace(store=store, seen=seen, preprocess=teacher.preprocess)

    return keep


def every_view(store, corpus, preprocess):
    pairs = Pairs(store, corpus, preprocess, 1)
    return np.stack([[pairs.render(i, view) for view in range(store.views)] for i in range(len(pairs))])


def at_size(preprocess, size):
    return type(preprocess).from_dict({**preprocess.to_dict(), "size": size})


# -- pixels ---------------------------------------------------------------------------------------------


def test_at_the_size_that_the_teacher_resizes_to_the_plain_view_is_what_the_teacher_saw(keep, folder):
    made = keep(AT_THE_TEACHERS_SIZE, views=1)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(every_view(made.store, KeptImages(made.store), made.preprocess), made.seen)


@pytest.mark.parametrize("size", [16, 7, 40])
def test_images_that_were_not_resized_give_every_view_to_the_byte(keep, folder, size):
    made = keep(LARGER_THAN_ALL)
    student = at_size(made.preprocess, size)
    kept = every_view(made.store, KeptImages(made.store), student)
    np.testing.assert_array_equal(kept, every_view(made.store, open_corpus(str(folder)), student))
    if size == 16:
        np.testing.assert_array_equal(kept, made.seen)


@pytest.mark.parametrize("pixels", [AT_THE_TEACHERS_SIZE, SMALL_JPEG], ids=["raw", "jpeg"])
@pytest.mark.parametrize("size", [16, 12])
def test_images_that_were_resized_show_the_same_box(keep, folder, pixels, size):
    """Close to the original's rendering, and closer to it than to any other view of any image."""
    made = keep(pixels)
    student = at_size(made.preprocess, size)
    kept = every_view(made.store, KeptImages(made.store), student).reshape(-1, size * size * 3).astype(float)
    from_originals = every_view(made.store, open_corpus(str(folder)), student).reshape(kept.shape)
    distance = np.abs(kept[:, None] - from_originals[None]).mean(2)
    assert (distance.argmin(1) == np.arange(len(kept))).all()
    assert np.diag(distance).max() < 4
    assert np.median(distance) > 20


def test_batches_are_joined_with_the_features_of_their_row_and_view(keep):
    made = keep(LARGER_THAN_ALL)
    rows = made.store.ok.tolist()
    where = {made.seen[i, v].tobytes(): (rows[i], v) for i in range(SAMPLES - 1) for v in range(VIEWS)}
    pairs = Pairs(made.store, KeptImages(made.store), made.preprocess, 2)
    for drawn in pairs.epoch(0, batch_size=5, seed=0):
        for image, embedding in zip(drawn.pixels, drawn.features["embedding"], strict=True):
            row, view = where[image.tobytes()]
            np.testing.assert_array_equal(embedding, made.store.gather_portable([row], view=view)[0])


def test_a_student_larger_than_images_that_were_made_smaller_is_refused(keep, folder, tmp_path):
    """Where nothing was made smaller, the corpus itself could give no more."""
    small = {"student": "tiny", "method": "proteus", "epochs": 1, "batch_size": 5, "device": "cpu", "image_size": 20}
    with pytest.raises(
        ValueError, match=r"keeps its images at \d+ px, less than the student's 20; give .* --pixels 20"
    ):
        fit(keep(SMALL_JPEG).store, out=tmp_path / "run", **small)
    assert not (tmp_path / "run").exists()
    assert fit(keep(SMALL_JPEG, "again.zarr").store, str(folder), out=tmp_path / "run", **small).finished
    assert fit(keep(LARGER_THAN_ALL, "whole.zarr").store, out=tmp_path / "whole", **small | {"image_size": 80}).finished


# -- which store's images -------------------------------------------------------------------------------


def test_one_store_keeps_the_images_for_every_teachers(keep, folder):
    """A store without images is replayed from another teacher's that has them."""
    kept, other = keep(LARGER_THAN_ALL, "kept.zarr"), keep(None, "other.zarr", dim=5)
    shutil.rmtree(folder)
    found = every_view(other.store, open_corpus(f"store:{kept.store.path}"), other.preprocess)
    np.testing.assert_array_equal(found, other.seen)


def test_images_kept_of_other_originals_are_refused(keep, folder):
    store = keep(None).store
    shutil.copy(folder / "001.png", folder / "007.png")
    other = keep(LARGER_THAN_ALL, "other.zarr")
    pairs = Pairs(store, KeptImages(other.store), other.preprocess, 2)
    with pytest.raises(
        ValueError, match=r"^007\.png: has changed since .*s\.zarr was extracted; put the image back, or extract"
    ):
        list(pairs.epoch(0, batch_size=5, seed=0))


def test_an_image_that_the_other_store_could_not_keep_is_named(keep, folder):
    store = keep(None).store
    (folder / "007.png").write_bytes(b"no image either")
    other = keep(LARGER_THAN_ALL, "other.zarr")
    with pytest.raises(ValueError, match=r"^007\.png: its image is not kept \(UnidentifiedImageError: .*\)$"):
        every_view(store, KeptImages(other.store), other.preprocess)


@pytest.mark.parametrize("pixels", [None, SMALL_JPEG], ids=["only features", "images kept again"])
def test_a_store_made_from_kept_images_is_replayed_from_them(keep, folder, pixels):
    """There the teacher saw the kept image itself: boxes are in its px, not in the original's."""
    first = keep(KeptPixels(size=19), "first.zarr", views=1)
    shutil.rmtree(folder)
    spec = f"store:{first.store.path}"
    second = keep(pixels, "second.zarr", corpus=spec)
    np.testing.assert_array_equal(every_view(second.store, open_corpus(spec), second.preprocess), second.seen)


# -- training -------------------------------------------------------------------------------------------


def train(store, out, corpus=None, **given):
    few = {"mapping_steps": 2, "mapping_batch_size": 8}
    settings = {"epochs": 2, "batch_size": 5, "embedding_dim": 4, "image_size": 16, "method_options": few, **given}
    return fit(store, corpus, out=out, student="tiny", device="cpu", **settings)


def weights(run):
    return (run.path / "student.safetensors").read_bytes()


def test_a_student_trained_without_the_corpus_is_the_one_trained_with_it(keep, folder, tmp_path):
    store = keep(LARGER_THAN_ALL).store
    with_originals = train(store, tmp_path / "with", str(folder))
    shutil.rmtree(folder)
    without = train(str(store.path), tmp_path / "without")
    assert weights(without) == weights(with_originals)
    assert without.config["corpus"] == f"store:{store.path}"
    assert f'corpus = "store:{store.path}"' in (without.path / "config.toml").read_text()
    assert train(store, tmp_path / "named", f"store:{store.path}").config == without.config


def test_an_interrupted_run_without_the_corpus_is_resumed(keep, folder, tmp_path):
    store = keep(SMALL_JPEG).store
    shutil.rmtree(folder)
    whole = train(store, tmp_path / "whole")

    def stop(at):
        if (at.stage, at.done) == ("training", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(store, tmp_path / "run", progress=stop)
    assert not Run(tmp_path / "run").finished
    resumed = train(open_store(store.path), tmp_path / "run", resume=True)
    assert weights(resumed) == weights(whole)
    assert [record["loss"] for record in resumed.metrics] == [record["loss"] for record in whole.metrics]


def test_without_corpus_and_without_images_one_clear_line_says_what_to_do(keep, tmp_path, monkeypatch, capsys):
    store = keep(None).store
    with pytest.raises(ValueError, match="keeps no images") as refused:
        train(store, tmp_path / "run")
    assert str(refused.value) == f"{store.path}: keeps no images; extract with --pixels SIZE, or give --corpus"
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(featcache_cli.screen.screen, "width", 400)
    command = f"distill fit --store {store.path} --student tiny --out {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stopped:
        programs.run_distill()
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert str(refused.value) in err
    assert "Traceback" not in out + err


def test_the_command_line_trains_without_the_corpus(keep, folder, tmp_path, monkeypatch, capsys):
    store = keep(SMALL_JPEG).store
    shutil.rmtree(folder)
    settings = "--epochs 1 --batch-size 5 --set embedding_dim=4 --set image_size=18"
    command = f"distill fit --store {store.path} --student tiny --out {tmp_path / 'run'} {settings}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stopped:
        programs.run_distill()
    assert not stopped.value.code, capsys.readouterr().err
    assert Run(tmp_path / "run").config["corpus"] == f"store:{store.path}"
