import importlib
import itertools

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, balanced_accuracy_score

import featcache.rows
from evalsuite import knn, probe

NUMBERS = np.array([0, 1, 2, 4, 5, 7, 8, 10])


def slow_ranking(bank, labels, query, k, temperature, own=None):
    """Classes that got a vote, best first, for each query: DINOv2's rule row by row in float64."""
    bank, query = (x.astype(np.float16).astype(np.float64) for x in (bank, query))
    ranking = []
    for i, q in enumerate(query):
        cosine = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
        if own is not None:
            cosine[own[i]] = -np.inf
        nearest = np.argsort(-cosine)[:k]
        weights = np.exp(cosine[nearest] / temperature)
        weights /= weights.sum()
        votes = {c: weights[labels[nearest] == c].sum() for c in sorted(set(labels[nearest]))}
        ranking.append(sorted(votes, key=lambda c: -votes[c]))
    return ranking


def shares(ranking, truth):
    top1 = np.array([classes[0] == t for classes, t in zip(ranking, truth, strict=True)])
    top5 = np.mean([t in classes[:5] for classes, t in zip(ranking, truth, strict=True)])
    return top1.mean(), top5, np.mean([top1[truth == c].mean() for c in np.unique(truth)])


@pytest.fixture
def task(rng, clusters):
    """Eight overlapping classes, numbered with gaps and of unequal size: all metrics differ."""
    centres = rng.normal(size=(8, 6))
    bank, query = clusters(centres, 15, spread=1.0), clusters(centres, 6, spread=1.0)[:-3]
    return bank, np.repeat(NUMBERS, 15), query, np.repeat(NUMBERS, 6)[:-3]


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_slow_vote(task, make_store, monkeypatch, temperature):
    bank, bank_labels, query, truth = task
    monkeypatch.setattr(featcache.rows, "_BLOCK_FLOATS", 6 * 50)  # several blocks of bank rows
    result = knn(
        make_store("bank", bank, labels=bank_labels),
        make_store("query", query, labels=truth),
        k=(1, 10, 40),
        temperature=temperature,
    )
    for k in (1, 10, 40):
        expected = shares(slow_ranking(bank, bank_labels, query, k, temperature), truth)
        names = (f"top1@{k}", f"top5@{k}", f"macro_top1@{k}")
        assert [result.metrics[name].value for name in names] == pytest.approx(expected, abs=1e-12)
        for name in names:
            low, high = result.metrics[name].ci95
            assert low <= result.metrics[name].value <= high
    assert result.metrics["top1@10"].value < result.metrics["top5@10"].value
    assert result.command == "knn"
    assert result.parameters["k"] == [1, 10, 40]


def test_query_and_votes_in_blocks_change_nothing(task, make_store, monkeypatch):
    bank, query = make_store("bank", task[0], labels=task[1]), make_store("query", task[2], labels=task[3])
    whole = knn(bank, query, k=(5, 20))
    module = importlib.import_module("evalsuite.votes")
    monkeypatch.setattr(module, "_QUERY_FLOATS", 6 * 7)
    monkeypatch.setattr("featcache.geometry._VOTE_FLOATS", 8 * 3)
    assert knn(bank.path, query.path, k=(5, 20)) == whole


def test_the_same_store_leaves_each_row_out(task, make_store):
    bank, labels = task[:2]
    store = make_store("bank", bank, labels=labels)
    result = knn(store, store.path, k=[5])
    expected = shares(slow_ranking(bank, labels, bank, 5, 0.07, own=np.arange(len(bank))), labels)
    assert result.metrics["top1@5"].value == pytest.approx(expected[0], abs=1e-12)
    assert result.metrics["top1@5"].value < 1
    assert result.parameters["exclude_self"] is True


def dummy_accuracies(truth, classes, names):
    """The best of all answers that are the same for every row, tried one after another."""
    answers = list(itertools.combinations(classes, min(names, len(classes))))
    per_class = [[np.isin(truth[truth == c], answer).mean() for c in np.unique(truth)] for answer in answers]
    return max(np.isin(truth, answer).mean() for answer in answers), max(map(np.mean, per_class))


def test_chance_is_the_best_answer_that_is_the_same_for_every_row(task, make_store):
    bank, labels, query, truth = task
    stores = make_store("bank", bank, labels=labels), make_store("query", query, labels=truth)
    chance = knn(*stores, k=[2, 5]).parameters["chance"]
    top1, macro = dummy_accuracies(truth, np.unique(labels), 1)
    for k in (2, 5):
        assert chance[f"top1@{k}"] == pytest.approx(top1)
        assert chance[f"macro_top1@{k}"] == pytest.approx(macro) == 1 / 8
        # two neighbours vote for two classes at most
        assert chance[f"top5@{k}"] == pytest.approx(dummy_accuracies(truth, np.unique(labels), k)[0])
    fewer = make_store("fewer", bank[labels < 8], labels=labels[labels < 8])
    chance = knn(fewer, stores[1], k=[5]).parameters["chance"]
    assert chance["top1@5"] == pytest.approx(dummy_accuracies(truth, NUMBERS[:6], 1)[0])
    assert chance["top5@5"] == pytest.approx(dummy_accuracies(truth, NUMBERS[:6], 5)[0])
    assert chance["macro_top1@5"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("evaluator", [knn, probe])
def test_chance_counts_imbalance(make_store, rng, evaluator):
    """The majority alone: scikit-learn's dummy."""
    labels = np.array([3] * 95 + [0, 1, 2, 4, 5])
    truth = np.array([3] * 190 + [0, 1, 2, 4, 5, 6, 7, 0, 1, 2])
    stores = (
        make_store("bank", rng.normal(size=(100, 4)), labels=labels),
        make_store("query", rng.normal(size=(200, 4)), labels=truth),
    )
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((100, 1)), labels).predict(np.zeros((200, 1)))
    given = {"k": [20]} if evaluator is knn else {"c": 1.0}
    chance = {
        name.partition("@")[0].removeprefix("probe/"): v
        for name, v in evaluator(*stores, **given).parameters["chance"].items()
    }
    assert chance["top1"] == accuracy_score(truth, dummy) == 0.95
    assert chance["macro_top1"] == pytest.approx(balanced_accuracy_score(truth, dummy)) == 1 / 8
    assert chance["top5"] == pytest.approx(0.95 + 7 / 200)


def test_few_shots(task, make_store):
    bank, labels, query, truth = task
    stores = make_store("bank", bank, labels=labels), make_store("query", query, labels=truth)
    assert knn(*stores, k=[5], shots=15).metrics == knn(*stores, k=[5]).metrics
    module = importlib.import_module("evalsuite.votes")
    rows = featcache.rows.Rows.of(stores[0]).labelled()
    two, four = (module.few_shots(rows, shots, seed=1).index for shots in (2, 4))
    assert np.bincount(labels[four]).tolist() == [4, 4, 4, 0, 4, 4, 0, 4, 4, 0, 4]
    assert set(two) < set(four)
    result = knn(*stores, k=[3], shots=4, seed=1)
    expected = shares(slow_ranking(bank[four], labels[four], query, 3, 0.07), truth)
    assert [m.value for m in result.metrics.values()] == pytest.approx(expected, abs=1e-12)
    assert (result.inputs["bank"]["rows"], result.parameters["shots"]) == (32, 4)
    assert result.inputs["bank"]["unlabelled"] == 0
    assert len({knn(*stores, k=[3], shots=2, seed=seed).metrics["top1@3"].value for seed in range(5)}) > 1

    own = np.full(len(bank), -1)
    own[four] = np.arange(32)
    expected = np.mean(
        [
            slow_ranking(bank[four], labels[four], bank[[i]], 3, 0.07, own=None if own[i] < 0 else own[[i]])[0][0]
            == labels[i]
            for i in range(len(bank))
        ]
    )
    assert knn(stores[0], stores[0], k=[3], shots=4, seed=1).metrics["top1@3"].value == pytest.approx(expected)

    rare = make_store("rare", bank, labels=[10] + [0] * 119, class_names=[f"c{i}" for i in range(11)])
    with pytest.raises(
        ValueError, match=r"class c10 of .*rare\.zarr has 1 labelled rows, fewer than 2 shots; use at most 1"
    ):
        knn(rare, rare, k=[1], shots=2)
    with pytest.raises(ValueError, match="shots must be at least 1"):
        knn(*stores, k=[1], shots=0)
    with pytest.raises(ValueError, match="k=40 exceeds the bank"):
        knn(*stores, k=[40], shots=4)


def test_presets(task, make_store):
    bank, query = make_store("bank", task[0], labels=task[1]), make_store("query", task[2], labels=task[3])
    cospress = knn(bank, query, preset="cospress")
    assert cospress.metrics == knn(bank, query, k=[10], temperature=0.07).metrics
    assert cospress.parameters["preset"] == "cospress"
    assert knn(bank, query, preset="cospress", k=[3], temperature=1.0).parameters["k"] == [3]
    with pytest.raises(ValueError, match="k=200 exceeds"):
        knn(bank, query)
    with pytest.raises(ValueError, match="unknown preset 'lightly'; use dinov2 or cospress"):
        knn(bank, query, preset="lightly")


def test_failed_and_unlabelled_rows_are_left_out_and_counted(make_store):
    """Rows 0 and 1 of the bank would win with the wrong label if they were used."""
    near = np.array([1.0, 0.0])
    bank = make_store("bank", np.array([near, near, near, [0, 1]]), labels=[1, -1, 0, 1], failed={0: "truncated"})
    query = make_store("query", np.array([[2.0, 0.0], near, [3.0, 0.0]]), labels=[0, -1, 5], failed={})
    result = knn(bank, query, k=[1])
    assert result.metrics["top1@1"].value == 0.5  # row 0 right; row 2 has a class without bank rows
    assert result.metrics["top5@1"].value == 0.5
    assert (result.inputs["bank"]["rows"], result.inputs["bank"]["failed"]) == (2, 1)
    assert (result.inputs["bank"]["unlabelled"], result.inputs["query"]["unlabelled"]) == (1, 1)
    assert result.inputs["query"]["unreachable"] == 1
    assert result.inputs["bank"]["path"] == str(bank.path)
    assert result.remarks == [
        f"bank {bank.path}: left out of 4 rows: 1 failed, 1 without a label",
        f"query {query.path}: left out of 3 rows: 1 without a label",
        f"query {query.path}: 1 of 2 rows are of classes without a row in {bank.path} (5): they can never be right, and "
        "count as wrong",
    ]
    assert knn(bank, bank, k=[1]).remarks == [result.remarks[0], result.remarks[0].replace("bank", "query", 1)]


@pytest.mark.parametrize("index", ["exact", "HNSW8"])
def test_a_row_that_is_not_finite_is_named_by_its_store(task, make_store, monkeypatch, index):
    monkeypatch.setattr(featcache.rows, "_BLOCK_FLOATS", 6 * 10)
    bank, labels, query, truth = (each.copy() for each in task)
    whole = make_store("bank", bank, labels=labels), make_store("query", query, labels=truth)
    bank[77, 2], query[33, 1] = np.nan, np.inf
    labels[5] = truth[5] = -1
    bad = [
        make_store(name, x, labels=of, failed={3: "truncated"})
        for name, x, of in (("bad-bank", bank, labels), ("bad-query", query, truth))
    ]
    for given, said in (((bad[0], whole[1]), "bad-bank.zarr row 77"), ((whole[0], bad[1]), "bad-query.zarr row 33")):
        with pytest.raises(ValueError, match=f"{said}: embedding is not finite; extract it again"):
            knn(*given, k=[3], index=index)


def test_wrong_input_names_the_store_and_the_remedy(make_store):
    bank = make_store("bank", np.eye(4), labels=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"k=5 exceeds the bank .*bank\.zarr, which has 4 .* use k of at most 4"):
        knn(bank, make_store("query", np.eye(4), labels=[0, 1, 2, 3]), k=(1, 5))
    with pytest.raises(ValueError, match="itself left out; use k of at most 3"):
        knn(bank, bank, k=[4])
    with pytest.raises(ValueError, match="at least 1"):
        knn(bank, bank, k=[0])
    with pytest.raises(ValueError, match="temperature must be a positive, finite number"):
        knn(bank, bank, k=[1], temperature=0.0)
    with pytest.raises(ValueError, match=r"bare\.zarr has no labels; extract"):
        knn(bank, make_store("bare", np.eye(4)), k=[1])
    with pytest.raises(ValueError, match=r"other\.zarr was made by encoder .*extract both with the same encoder"):
        knn(bank, make_store("other", np.eye(4), labels=[0, 1, 2, 3], fingerprint="x"), k=[1])
    with pytest.raises(ValueError, match="5 dimensions"):
        knn(bank, make_store("wide", np.eye(5), labels=range(5)), k=[1])
    with pytest.raises(ValueError, match=r"lost\.zarr has no usable row \(2 of 2 failed\)"):
        knn(bank, make_store("lost", np.eye(4)[:2], labels=[0, 1], failed={0: "no", 1: "no"}), k=[1])
