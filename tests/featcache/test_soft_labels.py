"""Stores of soft labels: how alike classes are, and what several teachers vote for; against slow loops."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from typer.testing import CliRunner

import featcache
from featcache.head import Head
from featcache.store.from_arrays import write_store
from featcache_cli import programs

NAMES = ["ant", "bee", "cat"]


def run(*line):
    return CliRunner().invoke(programs.app("featcache"), list(map(str, line)))


@pytest.fixture
def made(tmp_path):
    def made(name, embedding, **given):
        given = {"fingerprint": name, "encoder_name": name, "dtype": "float32"} | given
        return write_store(tmp_path / f"{name}.zarr", np.asarray(embedding, np.float32), **given)

    return made


def cosine(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def slow_table(x, labels, boost):
    """Over all pairs of two rows, one loop each."""
    classes = max(labels) + 1
    table = np.zeros((classes, classes))
    for a in range(classes):
        for b in range(classes):
            of = [(i, j) for i in range(len(x)) for j in range(len(x)) if labels[i] == a and labels[j] == b and i != j]
            table[a, b] = sum(cosine(x[i], x[j]) for i, j in of) / len(of)
    return table + boost * np.eye(classes)


@pytest.mark.parametrize(("boost", "temperature"), [(0.0225, 1.0), (0.0, 0.05)])
def test_the_table_is_the_mean_over_pairs(made, rng, boost, temperature):
    labels = np.array([0, 1, 2, 0, 1, 0, 2, 1, 1])
    x = rng.normal(size=(9, 2, 4)).astype(np.float32)  # two views; the table is of the first
    store = made("cae", x, labels=labels, class_names=NAMES)
    derived = featcache.derive("class_similarity", [store], per_class=0, boost=boost, temperature=temperature)
    table = slow_table(x[:, 0].astype(float), labels.tolist(), boost)
    expected = log_softmax(table / temperature, axis=1)
    for view in range(2):
        np.testing.assert_allclose(derived.gather(range(9), "logits", view), expected[labels], rtol=2e-6, atol=2e-6)
        np.testing.assert_array_equal(derived.gather(range(9), view=view), x[:, view])
    q = softmax(table / temperature, axis=1)
    entropy = -(q * np.log(q)).sum(axis=1).mean() / math.log(3)
    assert derived.manifest.derivation.said == [f"entropy of the soft labels {entropy:.4f} ln 3"]
    assert derived.manifest.encoder.classes == NAMES
    assert derived.labels.tolist() == labels.tolist()


def test_a_case_by_hand(made):
    """Class 0: (1, 0) twice; class 1: (0, 1) and (1, 0): cosines 1 within 0, 0 within 1, ½ between."""
    x, labels = [[1, 0], [2, 0], [0, 3], [1, 0]], [0, 0, 1, 1]
    derived = featcache.derive("class_similarity", [made("a", x, labels=labels)], boost=0.25, temperature=0.5)
    logits = derived.gather(range(4), "logits")
    np.testing.assert_allclose(logits[:, 1] - logits[:, 0], [-1.5, -1.5, -0.5, -0.5], atol=1e-6)
    np.testing.assert_allclose(np.exp(logits[0]), [0.8175745, 0.1824255], atol=1e-6)


def test_rows_are_drawn_by_the_seed(made, rng):
    store = made("a", rng.normal(size=(60, 4)), labels=np.arange(60) % 3, class_names=NAMES)

    def table(**options):
        derived = featcache.derive("class_similarity", [store], temperature=0.1, **options)
        return derived.gather(range(3), "logits")

    few = table(per_class=5)
    np.testing.assert_array_equal(few, table(per_class=5, seed=42))
    assert not np.allclose(few, table(per_class=5, seed=1))
    np.testing.assert_array_equal(table(per_class=20), table(per_class=0))


def test_as_published_it_is_label_smoothing_and_the_command_says_so(made, rng, tmp_path):
    x = rng.normal(size=(100, 8)) + 3  # as an autoencoder's: every cosine is high
    store = made("cae", x, labels=np.arange(100) % 10)
    ran = run("derive", "class_similarity", store.path, "--out", tmp_path / "soft.zarr")
    assert ran.exit_code == 0, ran.output
    assert "entropy of the soft labels 0.9999 ln 10" in ran.output or "entropy of the soft labels 1.0000" in ran.output
    assert "entropy of the soft labels" in run("info", tmp_path / "soft.zarr").output
    sharp = featcache.derive("class_similarity", [store], tmp_path / "sharp.zarr", temperature=0.01)
    assert float(sharp.manifest.derivation.said[0].split()[-3]) < 0.95


def test_what_has_no_similarity_is_refused(made, rng, tmp_path):
    x = rng.normal(size=(7, 4))
    for store, said in (
        ([made("a", x, labels=[0, 0, 1, 1, 2, 2, -1])], "1 of 7 rows of .* have no label"),
        ([made("b", x, labels=[0, 0, 1, 1, 2, 2, 2], class_names=[*NAMES, "dog"])], "class dog of .* has 0 rows"),
        ([made("c", x, labels=[0, 0, 1, 1, 1, 2, 2], failed={6: "unreadable"})], "class 2 of .* has 1 rows"),
        ([made("d", x, labels=[0] * 7), made("e", x, labels=[0] * 7)], "2 stores are given"),
    ):
        with pytest.raises(ValueError, match=said):
            featcache.derive("class_similarity", store)
    for options, said in (
        ({"per_class": 1}, "give at least 2"),
        ({"temperature": 0.0}, "give a number above 0"),
        ({"seed": -1}, "from 0"),
        ({"boost": math.nan}, "boost is nan"),
    ):
        with pytest.raises(ValueError, match=said):
            featcache.derive("class_similarity", [tmp_path / "a.zarr"], **options)


VOTES = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 2], [2, 2, 1], [1, 1, 1]])
"""Five samples, and what each of three teachers takes them for."""
LABELS = [-1, -1, -1, 1, -1]


@pytest.fixture
def teachers(made, rng):
    logits = rng.uniform(-1, 0, (3, 5, 3)) + 3 * np.eye(3)[VOTES.T]
    x = rng.normal(size=(3, 5, 4))
    return [made(f"t{i}", x[i], logits=logits[i], labels=LABELS, class_names=NAMES) for i in range(3)], logits


def test_a_majority_labels_what_it_agrees_on(teachers):
    stores, _ = teachers
    derived = featcache.derive("vote", stores, least=0.6)
    assert derived.labels.tolist() == [0, 0, -1, 1, 1]  # the fourth keeps its own
    np.testing.assert_allclose(derived.gather(range(5), "weight")[:, 0], [1, 2 / 3, 1 / 3, 1, 1], rtol=1e-6)
    shares = [[1, 0, 0], [2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3], [0, 1, 0]]
    np.testing.assert_allclose(softmax(derived.gather(range(5), "logits"), axis=1), shares, atol=1e-6)
    np.testing.assert_array_equal(derived.gather(range(5)), stores[0].gather(range(5)))
    assert derived.manifest.derivation.said == ["3 of 4 rows that were voted on have a label by a share of 0.6 or more"]
    assert derived.verify() == []
    again = featcache.derive("vote", stores, least=0.6, relabel=True)
    assert again.labels.tolist() == [0, 0, -1, 2, 1]
    assert again.gather([3], "weight")[0, 0] == pytest.approx(2 / 3)


def test_mean_probabilities_label_what_they_are_sure_of(teachers):
    stores, logits = teachers
    derived = featcache.derive("vote", stores, by="probability", temperature=2.0, least=0.5)
    p = np.mean([softmax(each.astype(np.float32) / 2.0, axis=1) for each in logits], axis=0)
    np.testing.assert_allclose(softmax(derived.gather(range(5), "logits"), axis=1), p, rtol=1e-5)
    for row in (0, 1, 2, 4):
        assert derived.labels[row] == (p[row].argmax() if p[row].max() >= 0.5 else -1)
        assert derived.gather([row], "weight")[0, 0] == pytest.approx(p[row].max(), rel=1e-5)


def test_a_pool_without_classes_is_named_and_its_failed_rows_have_no_vote(made, rng, tmp_path):
    logits = rng.normal(size=(6, 2, 3))  # two views
    pools = [
        made(f"p{i}", rng.normal(size=(6, 2, 4)), logits=logits, failed={2: "unreadable"} if i else None)
        for i in (0, 1)
    ]
    derived = featcache.derive("vote", pools, names=("ant", "bee", "cat"))
    winners = logits.astype(np.float32)[:, 0].argmax(axis=1)
    assert derived.labels.tolist() == [-1 if row == 2 else winners[row] for row in range(6)]
    assert (derived.class_names, derived.manifest.encoder.classes) == (NAMES, NAMES)
    assert derived.reasons == {"2": "unreadable"}
    same = logits[:, 1].argmax(axis=1) == winners
    np.testing.assert_array_equal(derived.gather(derived.ok, "weight", view=1)[:, 0], same[derived.ok])
    ran = run("derive", "vote", *(store.path for store in pools), "--out", tmp_path / "voted.zarr", "--names", "a,b,c")
    assert "5 of 5 rows that were voted on have a label by a share of 0 or more" in ran.output


@pytest.mark.parametrize("by", ["majority", "probability"])
def test_heads_vote_for_stores_without_logits(made, rng, tmp_path, by):
    """Of two widths, their classes in two orders, beside a store with logits of its own; against the formula in float64."""
    x = [rng.normal(size=(6, width)).astype(np.float16) for width in (4, 5, 3)]
    logits = rng.normal(size=(6, 3)).astype(np.float16)
    stores = [made(f"s{i}", each, logits=logits if i == 2 else None) for i, each in enumerate(x)]
    orders = [[0, 1, 2], [2, 0, 1]]
    said = [logits.astype(np.float64)]
    for number, order in enumerate(orders):
        weight, bias = rng.normal(size=(3, x[number].shape[1])), rng.normal(size=3)
        head = Head(weight[order], bias[order], np.arange(3), class_names=[NAMES[i] for i in order])
        (tmp_path / f"h{number}.safetensors").write_bytes(head.to_bytes())
        said.append(x[number].astype(np.float64) @ weight.T + bias)
    heads = (*(str(tmp_path / f"h{i}.safetensors") for i in (0, 1)), "own")
    derived = featcache.derive("vote", stores, by=by, head=heads, dtype="float32")
    p = np.mean([np.eye(3)[z.argmax(axis=1)] if by == "majority" else softmax(z, axis=1) for z in said], axis=0)
    np.testing.assert_allclose(softmax(derived.gather(range(6), "logits"), axis=1), p, atol=1e-6)
    assert derived.labels.tolist() == p.argmax(axis=1).tolist()
    assert derived.class_names == NAMES
    again = featcache.derive("vote", stores, derived.path, by=by, head=heads, dtype="float32")
    assert again.path == derived.path
    moved = tmp_path / "moved.safetensors"
    (tmp_path / "h0.safetensors").rename(moved)
    one = featcache.derive("vote", stores[:1], names=NAMES, head=(str(moved),))
    assert one.manifest.derivation.options["head"] == [Head.read(moved).digest]
    assert "head" not in featcache.derive("vote", stores[2:]).manifest.derivation.options
    ran = run("derive", "vote", stores[0].path, "--head", moved, "--out", tmp_path / "voted.zarr")
    assert "6 of 6 rows" in ran.output
    for wrong, remedy in (
        ((str(moved), str(moved), "own"), "fit a head on this encoder's rows"),
        ((str(moved), "own"), "2 heads for 3 stores; give one a store"),
        (("own", "own", "own"), "has no logits"),
        ((str(tmp_path / "none"),), "no such file"),
    ):
        with pytest.raises(ValueError, match=remedy):
            featcache.derive("vote", stores, tmp_path / "x.zarr", head=wrong)


def test_votes_that_cannot_be_counted_are_refused(made, rng, tmp_path):
    x, logits = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    one, bare = made("one", x, logits=logits, class_names=NAMES), made("bare", x)
    wide = made("wide", x, logits=rng.normal(size=(4, 5)))
    for stores, options, said in (
        ([one, bare], {}, "has no logits"),
        ([one, wide], {}, "logits of other classes"),
        ([wide], {"names": ("a", "b")}, "2 names for the 5 classes"),
        ([one], {"least": 1.5}, "give a share, 0 to 1"),
        ([one], {"by": "mean"}, "give majority or probability"),
        ([one], {"temperature": 2.0}, "says nothing of a majority"),
    ):
        with pytest.raises(ValueError, match=said):
            featcache.derive("vote", stores, tmp_path / "v.zarr", **options)
