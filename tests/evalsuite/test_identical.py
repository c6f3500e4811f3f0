"""The same images on both sides of an evaluation, under other names."""

import json
import sys

import numpy as np
import pytest

from evalsuite import Result, fidelity, knn, ood, probe
from featcache_cli import programs


@pytest.fixture
def task(rng):
    """Four classes that overlap, bank and query: nearest neighbours are right in about six of ten."""
    centres = 0.9 * rng.normal(size=(4, 5))
    labels = {"bank": np.repeat(np.arange(4), 30), "query": np.repeat(np.arange(4), 25)}
    return {name: (centres[of] + rng.normal(size=(len(of), 5)), of) for name, of in labels.items()}


@pytest.fixture
def leaked(task, make_store, rng):
    """Bank and query, 60 of whose 100 rows are images of the bank under other names; which these are; and the query's
    other rows alone."""
    (bank, bank_labels), (query, query_labels) = task["bank"], task["query"]
    query, query_labels = query.copy(), query_labels.copy()
    at, of = rng.permutation(100)[:60], rng.permutation(120)[:60]
    images = np.array([f"query/{i}" for i in range(100)], object)
    query[at], query_labels[at], images[at] = bank[of], bank_labels[of], [f"bank/{i}" for i in of]
    alone = np.setdiff1d(np.arange(100), at)
    ids = np.array([f"q{i}" for i in range(100)])
    return {
        "bank": make_store("bank", bank, [f"bank/{i}" for i in range(120)], labels=bank_labels),
        "query": make_store("query", query, images, labels=query_labels, sample_ids=ids.tolist()),
        "alone": make_store(
            "alone", query[alone], images[alone], labels=query_labels[alone], sample_ids=ids[alone].tolist()
        ),
        "unhashed": make_store("unhashed", query, labels=query_labels, sample_ids=ids.tolist()),
        "at": at,
    }


def values(result):
    return {name: metric.value for name, metric in result.metrics.items()}


def test_knn_counts_says_and_drops_what_the_bank_has(leaked, tmp_path):
    true = knn(leaked["bank"], leaked["alone"], k=[1, 10])
    found = knn(leaked["bank"], leaked["query"], k=[1, 10])
    assert (true.remarks, true.inputs["query"]["identical"]) == ([], 0)
    assert found.metrics["top1@1"].value > true.metrics["top1@1"].value + 0.2
    assert found.inputs["query"]["identical"] == 60
    assert found.remarks == [
        "60 of 100 query rows are images of the bank too: they are among their own neighbours; --drop-identical leaves them out"
    ]
    assert found.parameters["drop_identical"] is False
    dropped = knn(leaked["bank"], leaked["query"], k=[1, 10], drop_identical=True)
    assert dropped.metrics == true.metrics
    assert dropped.remarks == ["60 of 100 query rows are images of the bank too: left out"]
    assert (dropped.inputs["query"]["identical"], dropped.inputs["query"]["rows"]) == (60, 40)
    assert dropped.samples["sample_id"].tolist() == true.samples["sample_id"].tolist()
    assert (dropped.parameters["drop_identical"], dropped.parameters["identical_by"]) == (True, "image")
    path = dropped.write(tmp_path / "r.json")
    assert json.loads(path.read_text())["remarks"] == dropped.remarks
    assert Result.read(path) == dropped


def test_without_hashes_rows_of_the_very_same_embedding_are_known(leaked):
    found = knn(leaked["bank"], leaked["unhashed"], k=[1])
    assert (found.inputs["query"]["identical"], found.parameters["identical_by"]) == (60, "embedding")
    assert "60 of 100 query rows have all of their embedding in common with a row of the bank" in found.remarks[0]
    dropped = knn(leaked["bank"], leaked["unhashed"], k=[1], drop_identical=True)
    assert dropped.metrics == knn(leaked["bank"], leaked["alone"], k=[1]).metrics


def test_only_rows_that_vote_leak_but_what_is_dropped_does_not_hang_on_the_draw(leaked, task, make_store):
    bank, labels = task["bank"]
    images = [f"bank/{i}" for i in range(120)]
    some = make_store("some", bank, images, labels=np.where(np.arange(120) < 110, labels, -1))
    copied = {str(image) for image in leaked["query"].content[leaked["at"]].tolist()}
    voting = {str(image) for image in some.content[:110].tolist()}
    assert knn(some, leaked["query"], k=[1]).inputs["query"]["identical"] == len(copied & voting) < 60
    few = knn(leaked["bank"], leaked["query"], k=[1], shots=3)
    assert 0 < few.inputs["query"]["identical"] < 20
    assert knn(leaked["bank"], leaked["query"], k=[1], shots=3, drop_identical=True).inputs["query"]["rows"] == 40


def test_within_one_store_copies_under_other_ids_leak(task, make_store):
    x, labels = task["bank"]
    ids = np.array([f"r{i}" for i in range(160)])
    twice = np.concatenate([np.arange(120), np.arange(40)])
    store = make_store("twice", x[twice], [f"i{i}" for i in twice], labels=labels[twice], sample_ids=ids.tolist())
    once = make_store("once", x, [f"i{i}" for i in range(120)], labels=labels, sample_ids=ids[:120].tolist())
    true = knn(once, once, k=[1])
    assert (true.remarks, true.inputs["query"]["identical"]) == ([], 0)
    found = knn(store, store, k=[1])
    assert found.inputs["query"]["identical"] == 80
    assert found.remarks[0].startswith("80 of 160 query rows are images of the same store, under another id too: ")
    assert knn(store, store, k=[1], drop_identical=True).metrics == true.metrics
    # few shots: a row that is drawn is not its own neighbour, but its copy's
    drawn = knn(store, store, k=[1], shots=20)
    own = {(i, j) for i in range(160) for j in range(160) if i != j and twice[i] == twice[j]}
    voters = {i for label in range(4) for i in _drawn(labels[twice], label, 20)}
    assert drawn.inputs["query"]["identical"] == len({i for i, j in own if j in voters})


def _drawn(labels, label, shots):
    return np.random.default_rng([0, label]).permutation(np.flatnonzero(labels == label))[:shots]


def test_a_query_that_the_bank_has_as_a_whole_leaves_nothing(leaked, task, make_store):
    bank, labels = task["bank"]
    copy = make_store("copy", bank[:50], [f"bank/{i}" for i in range(50)], labels=labels[:50])
    assert knn(leaked["bank"], copy, k=[1]).metrics["top1@1"].value == 1.0
    for evaluate in (lambda: knn(leaked["bank"], copy, k=[1], drop_identical=True),
                     lambda: probe(leaked["bank"], copy, drop_identical=True)):  # fmt: skip
        with pytest.raises(ValueError, match=r"every row of .*copy\.zarr is in .*bank\.zarr too; give other images"):
            evaluate()


def test_probe_counts_says_and_drops_what_it_was_fitted_to(leaked):
    true = probe(leaked["bank"], leaked["alone"], c=[1e3])
    found = probe(leaked["bank"], leaked["query"], c=[1e3])
    assert (true.remarks, found.inputs["test"]["identical"]) == ([], 60)
    assert found.remarks[0].startswith("60 of 100 test rows are images of train too: the classifier was fitted to them")
    dropped = probe(leaked["bank"], leaked["query"], c=[1e3], drop_identical=True)
    assert dropped.metrics == true.metrics
    assert dropped.samples["content"].tolist() == true.samples["content"].tolist()
    assert dropped.remarks == ["60 of 100 test rows are images of train too: left out"]


@pytest.fixture
def ood_stores(rng, make_store):
    """A hundred ID training rows; of id_test 10 of 40 are among them; of the near set 5 of 30 are of id_test and 4 of
    id_train, of the far set none; and the same without them."""
    x = {"train": rng.normal(size=(100, 6)), "test": rng.normal(size=(40, 6)), "near": rng.normal(size=(30, 6)) + 1,
         "far": rng.normal(size=(20, 6)) + 3, "csid": rng.normal(size=(12, 6)) * 1.2}  # fmt: skip
    images = {name: [f"{name}/{i}" for i in range(len(of))] for name, of in x.items()}
    copied = [("test", range(10), "train"), ("near", range(5), "test"), ("near", range(5, 9), "train"),
              ("csid", range(2), "test"), ("near", range(9, 12), "csid")]  # fmt: skip
    clean = {name: np.ones(len(of), bool) for name, of in x.items()}
    for name, rows, source in copied:
        for row in rows:
            x[name][row], images[name][row] = x[source][row], images[source][row]
            clean[name][row] = False
    stores = {name: make_store(name, of, images[name], sample_ids=images[name]) for name, of in x.items()}
    without = {
        name: make_store(f"{name}-clean", of[clean[name]], np.array(images[name], object)[clean[name]])
        for name, of in x.items()
    }
    return stores, without


def run(stores, **given):
    return ood(id_train=stores["train"], id_test=stores["test"], near={"n": stores["near"]}, far={"f": stores["far"]},
               resamples=20, detectors=["knn:k=3", "residual:components=3"], **given)  # fmt: skip


@pytest.mark.parametrize("shifted", [False, True])
def test_ood_counts_says_and_drops_id_images(ood_stores, shifted):
    stores, without = ood_stores
    csid = {"csid": {"c": stores["csid"]}} if shifted else {}
    found, dropped = run(stores, **csid), run(stores, drop_identical=True, **csid)
    in_near = 12 if shifted else 9
    assert [found.inputs["id_test"]["identical"], found.inputs["near"]["n"]["identical"]] == [10, in_near]
    assert found.inputs["far"]["f"]["identical"] == 0
    assert found.remarks[:2] == [
        "10 of 40 id_test rows are images of id_train too: detectors were fitted to them; --drop-identical leaves them out",
        f"{in_near} of 30 near/n rows are images of an ID set too: they are ID; --drop-identical leaves them out",
    ]
    assert len(found.remarks) == 2 + shifted
    true = run(without, **({"csid": {"c": without["csid"]}} if shifted else {}))
    if not shifted:  # the far-removed copies of csid rows are only ID where there is a csid set
        assert true.remarks == []
        assert dropped.inputs["near"]["n"]["rows"] == 21
    else:
        assert values(dropped) == values(true)
        assert dropped.inputs["csid"]["c"]["rows"] == 10
    assert dropped.samples["sample_id/id_test"].tolist() == [f"test/{i}" for i in range(10, 40)]
    assert len(dropped.samples["score/knn:k=3/near/n"]) == 30 - in_near


def test_an_ood_set_of_id_images_is_refused(ood_stores, rng, make_store):
    stores, _ = ood_stores
    x, images = rng.normal(size=(20, 6)), [*(f"test/{i}" for i in range(20, 38)), "new/0", "new/1"]
    bad = make_store("bad", x, images)
    with pytest.raises(
        ValueError, match=r"^18 of 20 images of .*bad\.zarr are in ID sets too; give other images as near/n"
    ):
        run(stores | {"near": bad})
    assert run(stores | {"near": bad}, drop_identical=True).inputs["near"]["n"]["rows"] == 2
    all_of_it = make_store("all", x[:18], images[:18])
    for drop in (False, True):
        with pytest.raises(ValueError, match=r"all\.zarr.*ID sets too; give other images as near/n"):
            run(stores | {"near": all_of_it}, drop_identical=drop)
    # a few less, and it is measured, with a remark
    assert (
        run(stores | {"near": make_store("less", x, [*images[:17], *"abc"])}).remarks[-1].startswith("17 of 20 near/n")
    )


def test_fidelity_counts_says_and_drops_copies(rng, make_store):
    n, copies = 60, 20
    x = rng.normal(size=(n, 6))
    y = x[:, :4] + 0.8 * rng.normal(size=(n, 4))
    labels, ids = rng.integers(3, size=n), [f"i{i}" for i in range(n)]
    twice = np.concatenate([np.arange(n), np.arange(copies)])
    both = {}
    for name, of, fingerprint in (("t", x, "teacher"), ("s", y, "student")):
        given = {"fingerprint": fingerprint}
        both[name] = make_store(f"{name}-twice", of[twice], twice, labels=labels[twice], **given)
        both[f"{name}-once"] = make_store(f"{name}-once", of, range(n), labels=labels, **given)
        both[f"{name}-bank"] = make_store(
            f"{name}-bank", of[30:], range(30, n), labels=labels[30:], sample_ids=ids[30:], **given
        )
        both[f"{name}-new"] = make_store(f"{name}-new", of[:30], range(30), labels=labels[:30], **given)
    found, dropped = (fidelity(both["t"], both["s"], k=3, drop_identical=drop) for drop in (False, True))
    true = fidelity(both["t-once"], both["s-once"], k=3)
    assert true.remarks == []
    assert found.metrics["mutual_knn@3"].value > true.metrics["mutual_knn@3"].value
    assert (found.inputs["identical"], dropped.inputs["identical"]) == (2 * copies, copies)
    assert found.remarks[0].startswith(
        "40 of 80 joined rows are images of another row too: each is the nearest of the other"
    )
    assert dropped.metrics == true.metrics
    banks = {"teacher_bank": both["t-bank"], "student_bank": both["s-bank"]}
    found = fidelity(both["t-once"], both["s-once"], k=3, **banks)
    assert found.inputs["identical_in_bank"] == 30
    assert found.remarks[-1].startswith("30 of 60 joined rows are images of the banks too: they vote for themselves")
    dropped = fidelity(both["t-once"], both["s-once"], k=3, drop_identical=True, **banks)
    assert dropped.metrics == fidelity(both["t-new"], both["s-new"], k=3, **banks).metrics


@pytest.mark.parametrize("json_to", ["-", "file"])
def test_it_is_said_on_the_screen_in_one_line_and_a_flag_drops_them(leaked, tmp_path, monkeypatch, capsys, json_to):
    to = "-" if json_to == "-" else str(tmp_path / "r.json")
    for flags in (["--k", "1"], ["--k", "1", "--drop-identical"]):
        line = ["knn", "--bank", str(leaked["bank"].path), "--query", str(leaked["query"].path), *flags, "--json", to]
        monkeypatch.setattr(sys, "argv", ["evalsuite", *line])
        with pytest.raises(SystemExit) as ended:
            programs.run_evalsuite()
        assert ended.value.code in (0, None)
        out, err = capsys.readouterr()
        notes = [each for each in err.splitlines() if each.startswith("note: ")]
        assert len(notes) == 1
        assert "60 of 100 query rows are images of the bank too" in notes[0]
        record = json.loads(out if to == "-" else (tmp_path / "r.json").read_text())
        assert record["remarks"] == [notes[0].removeprefix("note: ")]
        assert record["parameters"]["drop_identical"] == ("--drop-identical" in flags)


def test_a_collapsed_bank_is_remarked_on_by_every_evaluator(rng, make_store):
    """Directions 2e-4 apart, as a student's whose figures looked like any other's."""
    direction = rng.normal(size=8)
    flat = {name: make_store(f"flat-{name}", direction + 0.02 * rng.normal(size=(90, 8)), [f"{name}{i}" for i in range(90)],
                             labels=np.arange(90) % 2) for name in ("a", "b", "c")}  # fmt: skip
    sound = {name: make_store(f"sound-{name}", direction + rng.normal(size=(90, 8)), [f"{name}{i}" for i in range(90)],
                              labels=np.arange(90) % 2) for name in ("a", "b", "c")}  # fmt: skip
    for stores, count in ((flat, 1), (sound, 0)):
        a, b, c = stores.values()
        results = [
            knn(a, b, k=[3]),
            probe(a, b, c=[1.0]),
            ood(id_train=a, id_test=b, near={"c": c}, resamples=5),
            fidelity(sound["a"], a, k=3),
        ]
        for result in results:
            said = [remark for remark in result.remarks if "has collapsed: the median distance" in remark]
            assert len(said) == count, result.command
