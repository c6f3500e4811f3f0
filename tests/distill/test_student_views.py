"""Which views are trained on: replayed ones, the plain one, or the student's own against the teacher's plain one."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from distill import augment
from distill.augment import photometric
from distill.pairs import Pairs
from distill.training.fit import fit
from featcache.corpora import open_corpus
from featcache.extraction.extract import extract
from featcache.inputs import Views
from featcache.inputs.images import Preprocess, decode
from featcache.rows import Rows

IMAGES, VIEWS = 64, 3


@pytest.fixture
def preprocess(store):
    return Preprocess.from_dict(store.manifest.encoder.preprocess)


@pytest.fixture
def make_pairs(store, images, preprocess):
    def make(**given):
        return Pairs(store, open_corpus(str(images)), preprocess, 2, **given)

    return make


def epoch(pairs, number, seed=0):
    """Pixels and embeddings of one epoch, each image of it."""
    found = list(pairs.epoch(number, batch_size=16, seed=seed))
    return np.concatenate([e.pixels for e in found]), np.concatenate([e.features["embedding"] for e in found])


def rows_of(embedding, store):
    """Row and view of each embedding."""
    known = {store.gather([row], view=view)[0].tobytes(): (row, view) for row in range(IMAGES) for view in range(VIEWS)}
    return [known[features.tobytes()] for features in embedding]


def test_plain_is_view_0_alone(make_pairs, store):
    pairs = make_pairs(views="plain")
    for number in range(2):
        pixels, embedding = epoch(pairs, number)
        where = rows_of(embedding, store)
        assert sorted(where) == [(row, 0) for row in range(IMAGES)]
        for image, (row, _) in zip(pixels, where, strict=True):
            np.testing.assert_array_equal(image, pairs.render(row, 0))
    assert pairs.description == "the plain view only"


def test_all_is_every_stored_view(make_pairs, store):
    pairs = make_pairs()
    seen = {at for number in range(12) for at in rows_of(epoch(pairs, number)[1], store)}
    assert len(seen) > 0.95 * IMAGES * VIEWS
    assert pairs.description == "all 3 stored views, replayed"


@pytest.mark.parametrize("held", [0.25, 0.0], ids=["held", "not held"])
def test_photometric_changes_the_colours_of_the_plain_view(make_pairs, store, monkeypatch, held):
    monkeypatch.setattr("distill.rendered.MEMORY_SHARE", held)
    pairs, plain = make_pairs(views="student"), make_pairs(views="plain")
    seen = []
    for number in (0, 1, 0):
        pixels, embedding = epoch(pairs, number)
        where = rows_of(embedding, store)
        assert {view for _, view in where} == {0}
        for image, (row, _) in zip(pixels, where, strict=True):
            expected = photometric(plain.render(row, 0), 0, number, str(store.sample_ids[row]))
            np.testing.assert_array_equal(image, expected)
        seen.append(pixels.tobytes())
    assert seen[0] == seen[2] != seen[1]
    assert "colours changed, nothing moved" in pairs.description


def test_crops_are_drawn_anew_every_epoch(make_pairs, store, images, preprocess):
    pairs, corpus = make_pairs(views="student", student_augment="crops"), open_corpus(str(images))
    for number in range(2):
        pixels, embedding = epoch(pairs, number, seed=4)
        for image, (row, view) in zip(pixels, rows_of(embedding, store), strict=True):
            assert view == 0
            decoded = decode(corpus.read(row))
            drawn = preprocess.draw(decoded.size, Views(count=9, augment="rrc", seed=4), corpus.ids[row], number + 1)
            np.testing.assert_array_equal(image, preprocess.render(decoded, drawn))
    assert "random crops" in pairs.description


# -- photometric ------------------------------------------------------------------------------------------


@pytest.fixture
def picture(rng):
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC))


def test_photometric_is_a_function_of_seed_epoch_and_sample(picture):
    drawn = {
        (seed, number, name): photometric(picture, seed, number, name).tobytes()
        for seed in (0, 1) for number in (0, 1, 2) for name in ("a", "b", "c")
    }  # fmt: skip
    assert drawn == {at: photometric(picture, *at).tobytes() for at in drawn}
    assert len(set(drawn.values())) > 12


def test_photometric_draws_each_change_as_often_as_it_says(picture, monkeypatch):
    grey = [np.ptp(photometric(picture, 0, 0, str(i)).astype(int), axis=2).max() == 0 for i in range(2000)]
    assert np.mean(grey) == pytest.approx(augment.GREY_SHARE, abs=0.02)
    monkeypatch.setattr(augment, "GREY_SHARE", 0)
    monkeypatch.setattr(augment, "BLUR_SHARE", 0)
    changed = [not np.array_equal(photometric(picture, 0, 0, str(i)), picture) for i in range(2000)]
    assert np.mean(changed) == pytest.approx(augment.JITTER_SHARE, abs=0.03)


def test_photometric_scales_brightness_within_its_bounds(monkeypatch):
    grey = np.full((8, 8, 3), 100, np.uint8)
    means = np.array([photometric(grey, 0, 0, str(i)).mean() for i in range(500)])
    assert means.min() >= 59
    assert means.max() <= 141
    assert means.std() > 15


def test_photometric_moves_nothing(picture):
    """What changes is a smooth map of colours, so the brightest corner stays the brightest."""
    coarse = picture.astype(float).mean(2)
    for i in range(50):
        image = photometric(picture, 0, 0, str(i)).astype(float).mean(2)
        assert np.corrcoef(image.ravel(), coarse.ravel())[0, 1] > 0.6


# -- several stores ---------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, make_images, make_teacher):
    """One folder of 24 images and the same as two folders; their stores. Image 005 is broken."""
    whole = make_images(tmp_path / "whole", 24)
    (whole / "005.png").write_bytes(b"no image")
    folders = {"whole": whole, "first": tmp_path / "first", "second": tmp_path / "second"}
    for name in ("first", "second"):
        folders[name].mkdir()
    for i, path in enumerate(sorted(whole.iterdir())):
        shutil.copy(path, folders["first" if i < 11 else "second"])
    recipe = {"views": 2, "augment": "rrc", "device": "cpu", "precision": "fp32"}
    return {
        name: (extract(str(folder), make_teacher(), tmp_path / f"{name}.zarr", **recipe), str(folder))
        for name, folder in folders.items()
    }


def train(stores, corpora, out, **given):
    settings = {"student": "tiny", "embedding_dim": 8, "image_size": 16, "epochs": 2, "batch_size": 5, "device": "cpu"}
    few = {"mapping_steps": 2, "mapping_batch_size": 8}
    return fit(stores, corpora, out=out, method_options=few, **{**settings, **given})


def test_two_stores_train_as_the_store_of_both(parts, tmp_path):
    plans = []
    one = train(*parts["whole"], tmp_path / "one", announce=plans.append)
    two = train(*zip(parts["first"], parts["second"], strict=True), tmp_path / "two", announce=plans.append)
    for name in ("student.safetensors", "mapping.safetensors"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes(), name
    assert replace(plans[0], seconds=0.0) == replace(plans[1], seconds=0.0)  # as measured, each time anew
    assert (plans[0].samples, plans[0].failed, plans[0].held_out, plans[0].steps) == (23, 1, 0, 8)
    assert two.config["store"] == [str(parts[name][0].path) for name in ("first", "second")]
    assert two.config["corpus"] == [parts[name][1] for name in ("first", "second")]


def test_stores_with_different_numbers_of_views_train_together(parts, make_images, make_teacher, tmp_path):
    folder = make_images(tmp_path / "more", 9, seed=8)
    plain = extract(str(folder), make_teacher(), tmp_path / "more.zarr", device="cpu", precision="fp32")
    stores, corpora = zip(parts["first"], (plain, str(folder)), strict=True)
    source = Rows.of(stores)
    pairs = Pairs(source, [open_corpus(corpus) for corpus in corpora], make_teacher().preprocess, 1)
    seen = {tuple(features) for number in range(10) for features in epoch_of(pairs, number)}
    known = {tuple(f) for store in stores for view in range(store.views) for f in store.gather(store.ok, view=view)}
    assert seen <= known
    assert len(seen) > 0.9 * len(known)


def epoch_of(pairs, number):
    return np.concatenate([each.features["embedding"] for each in pairs.epoch(number, batch_size=4, seed=0)])


def test_stores_of_two_teachers_are_refused(parts, make_images, make_teacher, tmp_path):
    folder = make_images(tmp_path / "more", 9, seed=8)
    other = extract(str(folder), make_teacher(7), tmp_path / "other.zarr", device="cpu", precision="fp32")
    with pytest.raises(ValueError, match=r"other\.zarr was made by encoder .*extract both with the same encoder"):
        train([parts["first"][0], other], [parts["first"][1], str(folder)], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("corpora", ["first", ["first"], ["first", "second", "second"]])
def test_each_store_needs_its_corpus(parts, corpora, tmp_path):
    given = parts[corpora][1] if isinstance(corpora, str) else [parts[name][1] for name in corpora]
    with pytest.raises(ValueError, match=r"2 stores, \d corpora: give each store its corpus, in the same order"):
        train([parts["first"][0], parts["second"][0]], given, tmp_path / "run")


def test_corpora_in_another_order_are_refused(parts, tmp_path):
    stores, corpora = zip(parts["first"], parts["second"], strict=True)
    with pytest.raises(ValueError, match=r"does not match .*first\.zarr: it lacks 10 of the store's 10 samples"):
        train(list(stores), list(reversed(corpora)), tmp_path / "run")
