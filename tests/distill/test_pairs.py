import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import distill.rendered
from distill.pairs import Pairs
from featcache.corpora import open_corpus
from featcache.extraction.extract import extract
from featcache.inputs.images import Preprocess
from featcache.store.from_arrays import write_store

VIEWS = 3


class Other:
    """A corpus seen in another order, or with some samples only; counts what is read."""

    def __init__(self, corpus, order):
        self._corpus, self._order = corpus, list(order)
        self.spec, self.class_names = corpus.spec, corpus.class_names
        self.ids = [corpus.ids[i] for i in self._order]
        self.reads = []

    def __len__(self):
        return len(self.ids)

    def read(self, i):
        self.reads.append(self.ids[i])
        return self._corpus.read(self._order[i])

    def label(self, i):
        return self._corpus.label(self._order[i])


@pytest.fixture
def folder(tmp_path, make_images):
    return make_images(tmp_path / "images", 11)


RECIPES = [{"augment": "rrc", "crop_area": 0.8}, {"augment": "rotate4_crop"}]


@pytest.fixture(params=RECIPES, ids=["crops", "turned crops"])
def seen(request, folder, tmp_path, make_teacher):
    """Corpus, store, and what the teacher was given: pixels' bytes → (row, view). File 004 is broken."""
    (folder / "004.png").write_bytes(b"no image")
    corpus, teacher = open_corpus(str(folder)), make_teacher()
    recipe = {"views": VIEWS, "seed": 5, **request.param}
    batch = 5 * VIEWS
    store = extract(corpus, teacher, tmp_path / "s.zarr", **recipe, precision="fp32", workers=2, batch_size=batch)
    rows = [row for row in range(11) if row != 4]
    given = teacher.seen[-3 * batch :]  # before them come the probe's; each sample has its place in a whole batch
    where = [(row, view) for row in rows for view in range(VIEWS)]
    pixels = {given[row * VIEWS + view].tobytes(): (row, view) for row, view in where}
    assert len(pixels) == len(where), "the images must be told apart by their pixels"
    return SimpleNamespace(corpus=corpus, store=store, pixels=pixels, preprocess=teacher.preprocess, rows=rows)


def epoch(pairs, number=0, *, batch_size=5, seed=0):
    drawn = list(pairs.epoch(number, batch_size=batch_size, seed=seed))
    return np.concatenate([each.pixels for each in drawn]), np.concatenate(
        [each.features["embedding"] for each in drawn]
    )


@pytest.fixture(params=[0.25, 0.0], ids=["held", "not held"])
def memory(request, monkeypatch):
    monkeypatch.setattr(distill.rendered, "MEMORY_SHARE", request.param)
    return request.param > 0


@pytest.mark.parametrize("workers", [1, 4])
def test_the_student_is_given_what_the_teacher_was_given(seen, memory, workers):
    """At the teacher's size, to the byte; and with the features of that very sample and view."""
    pairs = Pairs(seen.store, seen.corpus, seen.preprocess, workers)
    found = set()
    for number in range(8):
        for pixels, embedding in zip(*epoch(pairs, number), strict=True):
            row, view = seen.pixels[pixels.tobytes()]
            np.testing.assert_array_equal(embedding, seen.store.gather_portable([row], view=view)[0])
            found.add((row, view))
    assert len(found) > 0.8 * len(seen.rows) * VIEWS
    assert {view for _, view in found} == set(range(VIEWS))


def test_render_is_of_the_asked_sample_and_view(seen):
    pairs = Pairs(seen.store, seen.corpus, seen.preprocess, 1)
    got = {pairs.render(index, view).tobytes(): (index, view) for index in range(10) for view in range(VIEWS)}
    assert got == {pixels: (seen.rows.index(row), view) for pixels, (row, view) in seen.pixels.items()}


def test_the_join_is_by_id_not_by_position(seen):
    """A corpus in reverse, with samples that the store does not know."""
    reverse = Other(seen.corpus, reversed(range(11)))
    reverse.ids[:0], reverse._order[:0] = ["new.png"], [3]
    for pixels, embedding in zip(*epoch(Pairs(seen.store, reverse, seen.preprocess, 2)), strict=True):
        row, view = seen.pixels[pixels.tobytes()]
        np.testing.assert_array_equal(embedding, seen.store.gather_portable([row], view=view)[0])
    assert "new.png" not in reverse.reads


def test_another_size_shows_the_same_square(seen):
    """Shrunk back, pixels at twice the size are close to what the teacher saw; those of other views are not."""
    larger = replace(seen.preprocess, size=32)
    pairs = Pairs(seen.store, seen.corpus, larger, 1)
    for pixels, (row, view) in seen.pixels.items():
        image = pairs.render(seen.rows.index(row), view)
        assert image.shape == (32, 32, 3)
        small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BOX)).astype(float)
        distance = {
            at: np.abs(small - np.frombuffer(other, np.uint8).reshape(16, 16, 3)).mean()
            for other, at in seen.pixels.items()
        }
        assert min(distance, key=distance.__getitem__) == (row, view)
        assert distance[seen.pixels[pixels]] < 5


def test_each_sample_with_features_is_seen_once_an_epoch(seen, memory):
    pairs = Pairs(seen.store, seen.corpus, seen.preprocess, 2)
    assert len(pairs) == 10
    for number in range(3):
        rows = [seen.pixels[pixels.tobytes()][0] for pixels in epoch(pairs, number)[0]]
        assert sorted(rows) == seen.rows  # 4, the broken one, is not among them


@pytest.mark.parametrize(("batch_size", "sizes"), [(5, [5, 5]), (4, [4, 4]), (10, [10]), (64, [10])])
def test_a_short_last_batch_is_left_out_unless_it_is_the_only_one(seen, batch_size, sizes):
    pairs = Pairs(seen.store, seen.corpus, seen.preprocess, 2)
    assert [len(each.pixels) for each in pairs.epoch(0, batch_size=batch_size, seed=0)] == sizes


def test_an_epoch_is_a_function_of_seed_and_number(seen, memory):
    def batches(pairs, number, seed=0):
        return [
            (each.pixels.tobytes(), each.features["embedding"].tobytes())
            for each in pairs.epoch(number, batch_size=5, seed=seed)
        ]

    warm = Pairs(seen.store, seen.corpus, seen.preprocess, 3)
    batches(warm, 0), batches(warm, 1)
    assert batches(warm, 2) == batches(Pairs(seen.store, seen.corpus, seen.preprocess, 1), 2)
    assert len({str(batches(warm, number, seed)) for number in (0, 1) for seed in (0, 1)}) == 4


def test_holding_pixels_in_memory_changes_only_what_is_read(seen, monkeypatch):
    epochs, reads = {}, {}
    for share in (0.25, 0.0):
        monkeypatch.setattr(distill.rendered, "MEMORY_SHARE", share)
        corpus = Other(seen.corpus, range(11))
        pairs = Pairs(seen.store, corpus, seen.preprocess, 2)
        epochs[share] = [epoch(pairs, number) for number in range(6)]
        reads[share] = len(corpus.reads)
    for (held, held_targets), (read, read_targets) in zip(epochs[0.25], epochs[0.0], strict=True):
        np.testing.assert_array_equal(held, read)
        np.testing.assert_array_equal(held_targets, read_targets)
    assert reads[0.0] == 6 * 10
    assert reads[0.25] <= 10 * VIEWS


def test_batches_in_hand_do_not_change_later(seen, memory):
    pairs = Pairs(seen.store, seen.corpus, seen.preprocess, 2)
    batches = list(pairs.epoch(0, batch_size=5, seed=0))
    before = [each.pixels.copy() for each in batches]
    batches[0].pixels[:] = 0
    for each, expected in zip(list(pairs.epoch(0, batch_size=5, seed=0)), before, strict=True):
        np.testing.assert_array_equal(each.pixels, expected)


def of_store(seen, drawn):
    """(row, view) that the student is shown, and (row, view) that the teacher's features are of; of every sample."""
    embeddings = {seen.store.gather_portable([r], view=v)[0].tobytes(): (r, v) for r in seen.rows for v in range(VIEWS)}
    shown = [seen.pixels[pixels.tobytes()] for pixels in drawn.pixels]
    return shown, [embeddings[embedding.tobytes()] for embedding in drawn.features["embedding"]]


@pytest.mark.parametrize("pairing", ["one", "independent"])
def test_views_are_paired_as_asked(seen, memory, pairing):
    pairs, differ, found = Pairs(seen.store, seen.corpus, seen.preprocess, 2), [], set()
    for number in range(12):
        for drawn in pairs.epoch(number, batch_size=5, seed=0, pairing=pairing):
            shown, taught = of_store(seen, drawn)
            assert [row for row, _ in shown] == [row for row, _ in taught]
            assert taught == [(seen.rows[at], view) for at, view in zip(drawn.row, drawn.view, strict=True)]
            differ += [here != there for (_, here), (_, there) in zip(shown, taught, strict=True)]
            found |= set(zip(shown, taught, strict=True))
    if pairing == "one":
        assert not any(differ)
    else:
        assert np.mean(differ) == pytest.approx(1 - 1 / VIEWS, abs=0.2)
        assert len(found) > 0.5 * len(seen.rows) * VIEWS**2


def test_a_group_is_all_views_of_a_sample(seen, memory):
    pairs, everyone = Pairs(seen.store, seen.corpus, seen.preprocess, 2), []
    for drawn in pairs.epoch(0, batch_size=5, seed=0, pairing="group"):
        shown, taught = of_store(seen, drawn)
        assert shown == taught
        rows = [row for row, _ in shown[::VIEWS]]
        assert shown == [(row, view) for row in rows for view in range(VIEWS)]
        everyone += rows
    assert sorted(everyone) == seen.rows


def test_of_several_groups_one_is_drawn_anew_every_epoch(seen, memory):
    """Of three views, groups of one and of three: any of the first, all of the second."""
    pairs, found = Pairs(seen.store, seen.corpus, seen.preprocess, 2), set()
    for number in range(8):
        for drawn in pairs.epoch(number, batch_size=5, seed=0, pairing="group", group=1):
            shown, taught = of_store(seen, drawn)
            assert shown == taught
            assert len(shown) == 5
            found |= set(shown)
    assert len(found) > 0.8 * len(seen.rows) * VIEWS
    whole, all_views = (next(pairs.epoch(0, batch_size=5, seed=0, pairing="group", group=group)) for group in (3, 0))
    np.testing.assert_array_equal(whole.pixels, all_views.pixels)


def test_views_that_are_not_there_are_not_paired(seen):
    pairs = Pairs(seen.store, seen.corpus, seen.preprocess, 2, views="plain")
    with pytest.raises(ValueError, match=r"pairs views \(independent\), and views=plain has one; leave views out"):
        next(pairs.epoch(0, batch_size=5, seed=0, pairing="independent"))
    pairs = Pairs(seen.store, seen.corpus, seen.preprocess, 2)
    with pytest.raises(ValueError, match=r"takes 2 views of a sample together, .* 3; extract .* --views 2, 4 or"):
        next(pairs.epoch(0, batch_size=5, seed=0, pairing="group", group=2))


def test_samples_are_drawn_in_proportion_to_their_weights(seen):
    """Never where it is 0; the same for a resumed epoch."""
    pairs, weights = Pairs(seen.store, seen.corpus, seen.preprocess, 2), np.array([0, 1, 2, 3, 4, 0, 0, 0, 0, 10.0])
    drawn = [each.row for n in range(100) for each in pairs.epoch(n, batch_size=5, seed=0, weights=weights)]
    share = np.bincount(np.concatenate(drawn), minlength=10) / 1000
    np.testing.assert_allclose(share, weights / 20, atol=5 * 0.5 / 1000**0.5)
    assert (share[weights == 0] == 0).all()
    again = next(pairs.epoch(3, batch_size=5, seed=0, weights=3 * weights, start=1))
    assert again.row.tolist() == drawn[7].tolist()


@pytest.mark.parametrize("weights", [np.ones(9), np.zeros(10), np.full(10, np.nan), np.arange(10) - 1.0])
def test_weights_that_are_none_are_refused(seen, weights):
    pairs = Pairs(seen.store, seen.corpus, seen.preprocess, 2)
    with pytest.raises(ValueError, match="weights must be 10 finite numbers, none negative and not all 0"):
        next(pairs.epoch(0, batch_size=5, seed=0, weights=weights))


def test_missing_samples_are_refused(seen):
    with pytest.raises(ValueError, match=r"lacks 2 of the store's 10 samples \(first: 002\.png\)"):
        Pairs(seen.store, Other(seen.corpus, [0, 1, 3, 4, 5, 6, 8, 9, 10]), seen.preprocess)


def test_a_failed_sample_may_be_missing(seen, folder):
    (folder / "004.png").unlink()
    assert len(Pairs(seen.store, open_corpus(str(folder)), seen.preprocess)) == 10


def test_changed_bytes_are_refused(seen, folder, memory):
    shutil.copy(folder / "001.png", folder / "007.png")
    pairs = Pairs(seen.store, seen.corpus, seen.preprocess, 2)
    with pytest.raises(ValueError, match=r"007\.png: has changed since .*; put the image back, or extract again"):
        epoch(pairs)


@pytest.mark.parametrize("preprocess", [None, Preprocess(resize=18, crop=16, size=16).to_dict()])
def test_a_store_without_preprocessing_or_view_recipe_is_refused(seen, tmp_path, preprocess):
    store = write_store(tmp_path / "w.zarr", np.eye(11, 4), sample_ids=seen.corpus.ids, preprocess=preprocess)
    with pytest.raises(ValueError, match="cannot be replayed; extract it with featcache"):
        Pairs(store, seen.corpus, seen.preprocess)
