"""Pixels are rendered once, wherever they are kept, and a student sees and learns the same."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import distill.rendered
from distill import fit
from distill.rendered import Rendered, Renderings
from featcache.corpora import open_corpus

SIZE = 4
BYTES = SIZE * SIZE * 3


def image(row, view):
    return np.full((SIZE, SIZE, 3), 10 * row + view, np.uint8)


class Asked:
    """Asks for pixels as `Pairs` does, and counts what is rendered for it."""

    def __init__(self, rendered):
        self.rendered, self.times = rendered, np.zeros((6, 2), int)

    def __call__(self, rows, views):
        rows, views = np.array(rows), np.array(views)

        def render(fresh):
            np.add.at(self.times, (rows[fresh], views[fresh]), 1)
            return (image(rows[at], views[at]) for at in fresh)

        pixels = self.rendered.take(rows, views, render)
        np.testing.assert_array_equal(pixels, [image(row, view) for row, view in zip(rows, views, strict=True)])
        pixels[:] = 0  # the caller's to change


def everything(asked, epochs=3):
    for _ in range(epochs):
        for view in (0, 1):
            asked([5, 1, 2], [view, 1 - view, view])
            asked([0, 3, 4], [1 - view, view, view])
    return asked.times


@pytest.mark.parametrize(
    ("room", "in_file", "kept", "said"),
    [
        (12 * BYTES, False, 12, "rendered once, kept in memory (0.0 MB)"),
        (5 * BYTES, False, 5, "rendered every epoch, but for 5 of 12 kept in memory (0.0 MB)"),
        (0, False, 0, "rendered every epoch, but for 0 of 12 kept in memory (0.0 MB)"),
        (5 * BYTES, True, 12, "rendered once, kept in a file in {folder} (0.0 MB)"),
        (12 * BYTES, True, 12, "rendered once, kept in memory (0.0 MB)"),
    ],
)
def test_as_many_as_fit_are_rendered_once(tmp_path, room, in_file, kept, said):
    rendered = Rendered((6, 2), 12, SIZE, room, tmp_path if in_file else None)
    times = everything(Asked(rendered))
    assert (times == 1).sum() == kept
    assert (times == 3).sum() == 12 - kept
    assert rendered.description == said.format(folder=tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name, so that nothing is left of it"


def test_what_is_asked_for_twice_at_once_takes_one_place():
    asked = Asked(Rendered((6, 2), 3, SIZE, 3 * BYTES))
    asked([1, 1, 2, 1, 4], [0, 0, 1, 0, 0])
    before = asked.times.copy()
    asked([1, 2, 4], [0, 1, 0])
    np.testing.assert_array_equal(asked.times, before)


@pytest.mark.parametrize("room", [5 * BYTES, 0])
def test_a_disk_that_refuses_the_file_leaves_what_fits_into_memory(tmp_path, monkeypatch, caplog, room):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level(logging.WARNING, "distill"):
        times = everything(Asked(Rendered((6, 2), 12, SIZE, room, tmp_path)))
    assert (times == 1).sum() == room // BYTES
    assert "no file for pixels (No space left on device)" in caplog.text


def test_a_disk_without_room_is_not_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(distill.rendered, "DISK_SHARE", 0.0)
    assert "in memory" in Rendered((6, 2), 12, SIZE, 5 * BYTES, tmp_path).description


def test_threads_get_their_own_pixels():
    asked, rng = Asked(Rendered((6, 2), 12, SIZE, 7 * BYTES)), np.random.default_rng(0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(asked, rng.integers(6, size=(200, 5)), rng.integers(2, size=(200, 5))))


class Counted:
    """A corpus that counts what is read."""

    def __init__(self, corpus):
        self._corpus, self.reads = corpus, 0
        self.spec, self.ids, self.class_names = corpus.spec, corpus.ids, corpus.class_names

    def __len__(self):
        return len(self.ids)

    def read(self, i):
        self.reads += 1
        return self._corpus.read(i)

    def label(self, i):
        return self._corpus.label(i)


def weights(run):
    return (run.path / "student.safetensors").read_bytes()


@pytest.mark.parametrize("where", ["memory", "file", "nowhere"])
def test_fits_of_one_process_share_their_pixels_and_learn_the_same(store, images, tmp_path, monkeypatch, where):
    """Of other seeds, methods and held-out samples; another input size has pixels of its own."""
    given = {"student": "tiny", "embedding_dim": 6, "image_size": 16, "epochs": 3, "batch_size": 16, "device": "cpu"}
    members = [{"method": "proteus"}, {"method": "mse", "seed": 1, "holdout": 0.25}]
    alone = [fit(store, str(images), out=tmp_path / f"alone{i}", **given, **of) for i, of in enumerate(members)]
    if where != "memory":
        monkeypatch.setattr(distill.rendered, "MEMORY_SHARE", 0.0)
    shared, plans, reads = Renderings(tmp_path if where == "file" else None), [], []
    corpus = Counted(open_corpus(str(images)))
    for i, of in enumerate([*members, {"method": "mse", "image_size": 12}]):
        start = corpus.reads
        run = fit(
            store, corpus, out=tmp_path / f"shared{i}", renderings=shared, announce=plans.append, **{**given, **of}
        )
        reads.append(corpus.reads - start)
        if i < len(members):
            assert weights(run) == weights(alone[i])
            assert [line["loss"] for line in run.metrics] == [line["loss"] for line in alone[i].metrics]
    checked = 16  # images of each fit, before it starts
    if where == "nowhere":
        assert min(reads) > 3 * 40
        assert "rendered every epoch" in plans[0].pixels
    else:
        assert reads[0] + reads[1] <= len(store.ok) * store.views + 2 * checked
        assert reads[2] > checked + len(corpus) // 2
        assert plans[0].pixels.startswith(f"rendered once, kept in {'a file in' if where == 'file' else 'memory'}")
