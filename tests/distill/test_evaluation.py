"""What is measured during a run, against evalsuite's own measures of the same stores."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import evalsuite
from distill.training.config import FitConfig
from distill.training.fit import fit
from distill.training.held_out import MOST_HELD_OUT, gram_pearson, knn_top1, same_images, split
from featcache.corpora import open_corpus
from featcache.encoder import load_encoder
from featcache.extraction.extract import extract
from featcache.rows import Rows
from featcache.store.from_arrays import write_store


@pytest.fixture
def labelled(tmp_path, make_images):
    """Three classes of images that differ in colour, 60 in all."""
    for number in range(3):
        make_images(tmp_path / "photos" / f"class{number}", 20, seed=number)
    return tmp_path / "photos"


def test_knn_votes_as_evalsuite_does(make_store, rng):
    centres = rng.normal(size=(4, 6))
    labels = {name: rng.integers(0, 4, count) for name, count in (("bank", 90), ("query", 50))}
    rows = {name: (centres[y] + 1.2 * rng.normal(size=(len(y), 6))).astype(np.float16) for name, y in labels.items()}
    stores = {name: make_store(name, rows[name], labels=labels[name], class_names=list("abcd")) for name in rows}
    expected = evalsuite.knn(stores["bank"], stores["query"], k=[20]).metrics["top1@20"].value
    tensors = {name: torch.from_numpy(value).float() for name, value in rows.items()}
    truth = {name: torch.from_numpy(value) for name, value in labels.items()}
    assert knn_top1(tensors["bank"], truth["bank"], tensors["query"], truth["query"]) == pytest.approx(expected)
    assert 0.4 < expected < 1


def test_gram_correlation_is_evalsuites(make_store, rng):
    left = rng.normal(size=(40, 5)).astype(np.float16)
    right = np.concatenate([left[:, :3], rng.normal(size=(40, 2))], axis=1).astype(np.float16)
    expected = evalsuite.fidelity(make_store("a", left), make_store("b", right)).metrics["gram_pearson"].value
    found = gram_pearson(torch.from_numpy(left).float(), torch.from_numpy(right).float())
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0.2 < expected < 0.95


def test_the_split_is_fixed_disjoint_and_bounded():
    trained, held = split(np.arange(1000), 0.05, 3)
    assert len(held) == 50
    assert sorted([*trained, *held]) == list(range(1000))
    assert (split(np.arange(1000), 0.05, 3)[1] == held).all()
    assert (split(np.arange(1000), 0.05, 4)[1] != held).any()
    assert len(split(np.arange(100_000), 0.5, 0)[1]) == MOST_HELD_OUT
    trained, held = split(np.arange(10), 0.0, 0)
    assert trained.tolist() == list(range(10))
    assert len(held) == 0


@pytest.mark.parametrize("seed", range(20))
def test_no_image_is_on_both_sides_and_none_is_held_out_twice(seed):
    rng = np.random.default_rng(seed)
    images = rng.permutation(np.concatenate([np.arange(60), rng.integers(60, size=40)]))
    trained, held = split(images, 0.2, seed)
    assert len(set(images[held].tolist())) == len(held) <= 20
    assert not set(images[held].tolist()) & set(images[trained].tolist())
    neither = set(range(100)) - set(trained.tolist()) - set(held.tolist())
    assert neither
    assert set(images[list(neither)].tolist()) <= set(images[held].tolist())
    with pytest.raises(ValueError, match="holds out 1;"):
        split(np.zeros(100, np.int64), 0.2, seed)


def test_copies_of_held_out_images_do_not_train_whatever_their_names_and_stores(make_teacher, make_images, tmp_path):
    """The second corpus holds 16 of the first one's 40 images under other names, one of them twice."""
    first, second = make_images(tmp_path / "first", 40), make_images(tmp_path / "second", 5, seed=1)
    for i, path in enumerate(sorted(first.glob("*.png"))[:16]):
        shutil.copy(path, second / f"other-{i}.png")
    shutil.copy(second / "other-3.png", second / "third.png")
    corpora = [open_corpus(str(first)), open_corpus(str(second))]
    stores = [
        extract(corpus, make_teacher(), tmp_path / f"{i}.zarr", device="cpu", precision="fp32")
        for i, corpus in enumerate(corpora)
    ]
    plans = []
    run = fit(
        stores, corpora, out=tmp_path / "run", device="cpu", student="tiny", embedding_dim=8, image_size=16, epochs=1,
        batch_size=8, eval_every=1, holdout=0.5, method_options={"mapping_steps": 2, "mapping_batch_size": 8}, announce=plans.append,
    )  # fmt: skip
    files = [path.read_bytes() for folder in (first, second) for path in sorted(folder.glob("*.png"))]
    drawn = np.sort(np.random.default_rng([0, 62]).permutation(62)[:31])
    held = {files[i] for i in drawn}
    assert (plans[0].held_out, plans[0].samples) == (len(held), sum(file not in held for file in files))
    assert plans[0].copies == 62 - plans[0].samples - len(held) > 5
    record = json.loads((run.path / "student.json").read_text())
    assert record["trained_on"]["copies"] == plans[0].copies


@pytest.mark.parametrize("seed", range(3))
def test_what_was_made_of_a_held_out_image_does_not_train(make_teacher, make_images, tmp_path, seed):
    """Two corruptions of 12 images, one of them under another path, beside them and beside others with the same ids."""
    made = {name: make_images(tmp_path / name, 12, seed=n) for n, name in enumerate(("own", "fog", "snow", "other"))}
    specs = {"own": str(made["own"]), "fog": f"corrupted:fog:3@size=64:{made['own']}/", "other": str(made["other"])}
    specs["snow"] = f"corrupted:snow:1:corrupted:fog:1:{tmp_path / 'moved'}"
    stores = []
    for name, folder in made.items():
        corpus = open_corpus(str(folder))
        corpus.spec = specs[name]
        stores.append(extract(corpus, make_teacher(), tmp_path / f"{name}.zarr", device="cpu", precision="fp32"))
    labelled_otherwise = stores[3].manifest.corpus.changed(digest="another")
    stores[3].manifest = stores[3].manifest.changed(corpus=labelled_otherwise)
    rows = Rows.of(stores)
    images = same_images(rows)
    for row in range(48):  # a slow oracle: the same sample in three guises, the other folder's its own
        own = rows.sample_ids == rows.sample_ids[row]
        alike = np.flatnonzero(own & ((np.arange(48) < 36) == (row < 36)))
        assert np.flatnonzero(images == images[row]).tolist() == alike.tolist()
    trained, held = split(images, 0.3, seed)
    seen = {(row < 36, rows.sample_ids[row]) for row in trained}
    assert not seen & {(row < 36, rows.sample_ids[row]) for row in held}
    clean = Rows.of(stores[:1])
    np.testing.assert_array_equal(same_images(clean), clean.images())


def test_without_hashes_the_same_embedding_is_the_same_image(make_store):
    rows = np.random.default_rng(0).normal(size=(12, 4))[[0, 1, 2, 0, 3, 1]]
    source = Rows.of([make_store("a", rows[:4]), make_store("b", rows[4:])])
    assert [source.images().tolist().index(n) for n in source.images().tolist()] == [0, 1, 2, 0, 4, 1]


@pytest.mark.parametrize("share", [0.01, 0.999])
def test_a_split_that_leaves_too_few_is_refused(share):
    with pytest.raises(ValueError, match=rf"holdout {share} of 60 samples holds out (1|60); at least 4 are needed"):
        split(np.arange(60), share, 0)


def test_evaluations_hold_out_a_twentieth_unless_told():
    assert FitConfig(student="tiny", eval_every=2).holdout == 0.05
    assert FitConfig(student="tiny", eval_every=2, holdout=0.2).holdout == 0.2
    assert FitConfig(student="tiny").holdout == 0


@pytest.mark.parametrize("ema", [0.5, 0.0])
def test_a_run_measures_its_student_on_what_it_was_not_trained_on(labelled, make_teacher, tmp_path, ema):
    """The last evaluation is what evalsuite finds with the finished student and the same split."""
    corpus = open_corpus(str(labelled))
    store = extract(corpus, make_teacher(), tmp_path / "t.zarr", device="cpu", precision="fp32")
    run = fit(
        store, corpus, out=tmp_path / "run", device="cpu", student="tiny", embedding_dim=8, image_size=16, epochs=5,
        batch_size=15, eval_every=2, holdout=0.25, ema=ema, seed=1,
        method_options={"mapping_steps": 3, "mapping_batch_size": 16},
    )  # fmt: skip
    names = {"gram_pearson", "cosine", "top1@20", "teacher_top1@20"}
    evaluated = {"holdout/" + name for name in names}
    assert [evaluated & record.keys() for record in run.metrics] == [set(), evaluated, set(), evaluated, evaluated]
    trained, held = split(np.arange(60), 0.25, 1)
    encoder = load_encoder(f"run:{run.path}")
    rows = extract(corpus, encoder, tmp_path / "s.zarr", device="cpu", precision="fp32").gather(range(60))

    def part(name, rows, index):
        ids = [corpus.ids[i] for i in index.tolist()]
        labels = np.array([corpus.label(i) for i in index.tolist()])
        return write_store(
            tmp_path / f"{name}.zarr", rows[index], sample_ids=ids, labels=labels, class_names=corpus.class_names
        )

    student = {name: part(f"s-{name}", rows, index) for name, index in (("trained", trained), ("held", held))}
    seen = store.gather(range(60))
    teacher = {name: part(f"t-{name}", seen, index) for name, index in (("trained", trained), ("held", held))}
    last = {name: run.metrics[-1][f"holdout/{name}"] for name in names}
    knn = [evalsuite.knn(of["trained"], of["held"], k=[20]).metrics["top1@20"].value for of in (student, teacher)]
    assert [last["top1@20"], last["teacher_top1@20"]] == pytest.approx(knn)
    gram = evalsuite.fidelity(teacher["held"], student["held"]).metrics["gram_pearson"].value
    assert last["gram_pearson"] == pytest.approx(gram, abs=2e-3)
    mapping = load_file(run.path / "mapping.safetensors")["mapping.weight"]
    target = torch.from_numpy(seen[held]).float() @ mapping.T
    cosine = F.cosine_similarity(torch.from_numpy(rows[held]).float(), target).mean()
    assert last["cosine"] == pytest.approx(float(cosine), abs=2e-3)


@pytest.mark.parametrize(
    "student", [{"student": "tiny"}, {"student": "timm/vit_tiny_patch16_224", "drop_path": 0.5}], ids=str
)
def test_measuring_changes_nothing(labelled, make_teacher, tmp_path, student):
    """Batch norms do not learn from held-out images, and what is drawn while training stays the same."""
    store = extract(str(labelled), make_teacher(), tmp_path / "t.zarr", device="cpu", precision="fp32")
    runs = [
        fit(
            store, str(labelled), out=tmp_path / f"every{every}", device="cpu", **student, image_size=16, epochs=3,
            batch_size=15, method="proteus", eval_every=every, holdout=0.25,
        )
        for every in (1, 3)
    ]  # fmt: skip
    often, seldom = (load_file(run.path / "student.safetensors") for run in runs)
    for name, weight in often.items():
        assert torch.equal(weight, seldom[name]), name
    assert runs[0].metrics[-1]["holdout/gram_pearson"] == runs[1].metrics[-1]["holdout/gram_pearson"]


def test_held_out_samples_are_read_for_evaluation_only(labelled, make_teacher, tmp_path):
    """Their images gone, training up to the first evaluation is none the wiser."""
    corpus = open_corpus(str(labelled))
    store = extract(corpus, make_teacher(), tmp_path / "t.zarr", device="cpu", precision="fp32")
    held = split(np.arange(60), 0.25, 0)[1]

    class Watched:
        spec, class_names, ids = corpus.spec, corpus.class_names, corpus.ids
        read_at: dict[int, set] = {}  # noqa: RUF012
        epoch = 0

        def __len__(self):
            return 60

        def read(self, i):
            self.read_at.setdefault(self.epoch, set()).add(i)
            return corpus.read(i)

        def label(self, i):
            return corpus.label(i)

    watched = Watched()

    def progress(at):
        watched.epoch = (at.done + 1) // 4 if at.stage == "training" else 0  # three steps an epoch

    fit(
        store, watched, out=tmp_path / "run", device="cpu", student="tiny", image_size=16, epochs=2, batch_size=15,
        method="proteus", holdout=0.25, progress=progress, workers=1,
    )  # fmt: skip
    first = set().union(*(found for epoch, found in watched.read_at.items() if epoch == 0))
    assert not first & set(held.tolist())
    assert set().union(*watched.read_at.values()) == set(range(60))


def test_without_labels_angles_are_measured_all_the_same(store, images, tmp_path):
    run = fit(
        store, str(images), out=tmp_path / "run", device="cpu", student="tiny", image_size=16, epochs=1, batch_size=16,
        method="proteus", holdout=0.25,
    )  # fmt: skip
    assert {name for name in run.metrics[-1] if name.startswith("holdout/")} == {"holdout/gram_pearson"}
