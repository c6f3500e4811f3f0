"""How far a student's OOD scores follow its teacher's, against slow formulas, SciPy and scikit-learn."""

import json
import re
import shlex
import sys

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

import featcache_cli.screen
from evalsuite import Result, fidelity
from evalsuite.intervals import LEAST_FOR_THRESHOLD, decisions, spearman
from evalsuite.metrics import ood_metrics
from featcache_cli import programs

NAMES = ("id", "near", "far")
ROWS = {"bank": 90, "id": 120, "near": 80, "far": 60}


@pytest.fixture
def spaces(rng):
    """Of the bank, of ID rows and of two OOD sets: labels, and both spaces' embeddings and logits in float16."""
    centres, mixed = 2 * rng.normal(size=(3, 6)), rng.normal(size=(6, 5))
    found = {}
    for name, rows in ROWS.items():
        labels = np.arange(rows) % 3
        moved = {"near": 0.7, "far": 2.0}.get(name, 0.0) * rng.normal(size=6)
        x = centres[labels] + rng.normal(size=(rows, 6)) + moved
        y = x @ mixed + 0.8 * rng.normal(size=(rows, 5))
        logits = [a[:, :3] + rng.normal(size=(rows, 3)) for a in (x, y)]
        found[name] = labels, *(a.astype(np.float16) for a in (x, y, *logits))
    return found


@pytest.fixture
def stores(spaces, make_store):
    """What `fidelity` is given, every student's store in another order; of its bank no labels."""
    given = {"teacher_ood": {}, "student_ood": {}}
    for name, (labels, x, y, x_logits, y_logits) in spaces.items():
        ids = [f"{name}-{i}" for i in range(len(x))]
        order = np.random.default_rng(1).permutation(len(x))
        of_bank = {"labels": labels, "class_names": ["ant", "bee", "cat"]} if name == "bank" else {}
        t = make_store(f"t-{name}", x, logits=x_logits, sample_ids=ids, fingerprint="t", **of_bank)
        s = make_store(
            f"s-{name}", y[order], logits=y_logits[order], sample_ids=[ids[i] for i in order], fingerprint="s"
        )
        if name in ("near", "far"):
            given["teacher_ood"][name], given["student_ood"][name] = t, s
        else:
            of = "_bank" if name == "bank" else ""
            given["teacher" + of], given["student" + of] = t, s
    return given


def knn_scores(bank, rows, k):
    """1 − the cosine to the k-th nearest row of the bank, a row at a time."""
    bank, rows = bank.astype(np.float64), rows.astype(np.float64)
    found = []
    for row in rows:
        cosine = bank @ row / np.linalg.norm(bank, axis=1) / np.linalg.norm(row)
        found.append(1 - np.sort(cosine)[-k])
    return np.array(found)


def msp_scores(logits):
    e = np.exp(logits.astype(np.float64))
    return 1 - e.max(axis=1) / e.sum(axis=1)


def threshold(scores):
    """The strictest that accepts at least 95 % of the scores, tried one by one."""
    for candidate in sorted(scores):
        if 20 * sum(score <= candidate for score in scores) >= 19 * len(scores):
            return candidate
    raise AssertionError


def test_scores_are_compared_row_by_row(spaces, stores):
    result = fidelity(**stores, detectors=["knn:k=3", "msp"], k=5)
    values = {name: metric.value for name, metric in result.metrics.items() if name.startswith("scores/")}
    sides = {
        "knn:k=3": {n: [knn_scores(spaces["bank"][at], spaces[n][at], 3) for at in (1, 2)] for n in NAMES},
        "msp": {n: [msp_scores(spaces[n][at]) for at in (3, 4)] for n in NAMES},
    }
    expected, chance = {}, {}
    for detector, of in sides.items():
        at = [threshold(scores) for scores in of["id"]]
        of["all"] = [np.concatenate([of[name][side] for name in NAMES]) for side in (0, 1)]
        for name, (a, b) in of.items():
            where = f"scores/{detector}/{name}"
            p, q = a > at[0], b > at[1]
            expected[f"{where}/spearman"] = spearmanr(a, b).statistic
            expected[f"{where}/agreement"] = np.mean([one == other for one, other in zip(p, q, strict=True)])
            chance[f"{where}/agreement"] = p.mean() * q.mean() + (1 - p.mean()) * (1 - q.mean())
            if 0 < p.mean() + q.mean() < 2:
                expected[f"{where}/kappa"] = cohen_kappa_score(p, q)
    assert len(expected) >= 23
    assert values == pytest.approx(expected, abs=1e-6)
    assert 0.3 < values["scores/knn:k=3/all/spearman"] < 0.99
    for name in values:
        assert result.parameters["chance"][name] == pytest.approx(chance.get(name, 0), abs=1e-9)
        low, high = result.metrics[name].ci95
        assert low <= values[name] <= high
        assert low < high
    assert result.parameters["detectors"] == {"knn:k=3": {"k": 3, "mean": False}, "msp": {"temperature": 1.0}}
    assert result.parameters["failed_detectors"] == {}
    assert {name: of["rows"] for name, of in result.inputs["student_ood"].items()} == {"near": 80, "far": 60}


def test_rows_that_one_side_lacks_are_left_out(spaces, stores, make_store):
    x = spaces["near"][1]
    ids = [f"near-{i}" for i in range(80)]
    more = make_store(
        "more", np.concatenate([x, x[:5]]), sample_ids=[*ids, *"abcde"], failed={1: "torn"}, fingerprint="t"
    )
    given = stores | {"teacher_ood": {"near": more}, "student_ood": {"near": stores["student_ood"]["near"]}}
    result = fidelity(**given, detectors="knn:k=3", k=5)
    assert result.inputs["teacher_ood"]["near"]["rows"] == result.inputs["student_ood"]["near"]["rows"] == 79
    assert f"teacher OOD near {more.path}: left out of 85 rows: 1 failed" in result.remarks
    assert any(remark.startswith(f"teacher OOD near {more.path}: 5 of 84 rows are not in") for remark in result.remarks)
    a, b = (knn_scores(spaces["bank"][at], np.delete(spaces["near"][at], 1, axis=0), 3) for at in (1, 2))
    assert result.metrics["scores/knn:k=3/near/spearman"].value == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)


def test_labels_are_the_teachers_and_id_rows_suffice(stores):
    """The student's bank has none, and rmd needs them."""
    del stores["teacher_ood"], stores["student_ood"]
    result = fidelity(**stores, detectors="rmd", k=5)
    assert [name for name in result.metrics if name.startswith("scores/")] == [
        f"scores/rmd/id/{what}" for what in ("spearman", "agreement", "kappa")
    ]
    assert "teacher_ood" not in result.inputs


def test_nothing_changes_without_detectors(stores):
    del stores["teacher_ood"], stores["student_ood"]
    plain, scored = fidelity(**stores, k=5), fidelity(**stores, k=5, detectors="knn:k=3")
    for part in ("inputs", "parameters", "metrics"):
        before, after = getattr(plain, part), getattr(scored, part)
        assert {name: after[name] for name in before if name != "chance"} == {
            name: of for name, of in before.items() if name != "chance"
        }
    assert plain.parameters["chance"].items() <= scored.parameters["chance"].items()
    assert not {"detectors", "failed_detectors"} & plain.parameters.keys()


def test_a_failed_detector_leaves_the_others(stores, make_store, spaces):
    with pytest.warns(RuntimeWarning, match=r"detector knn:k=91 failed .* 90 rows"):
        result = fidelity(**stores, detectors=["knn:k=91", "knn:k=2"], k=5)
    assert result.parameters["failed_detectors"].keys() == {"knn:k=91"}
    assert {name.split("/")[1] for name in result.metrics if name.startswith("scores/")} == {"knn:k=2"}
    with pytest.raises(ValueError, match=r"every detector failed .vim: a head is needed to score against"):
        fidelity(**stores, detectors="vim", k=5)
    bare = make_store("bare", spaces["near"][2], sample_ids=[f"near-{i}" for i in range(80)], fingerprint="s")
    with pytest.raises(ValueError, match=r"every detector failed .msp: .*bare\.zarr has no logits"):
        fidelity(**(stores | {"student_ood": stores["student_ood"] | {"near": bare}}), detectors="msp", k=5)


def test_scores_without_order_are_left_out_with_a_remark(stores, make_store, spaces):
    same = np.repeat(spaces["near"][2][:1], 80, axis=0)
    flat = make_store("flat", same, sample_ids=[f"near-{i}" for i in range(80)], fingerprint="s")
    result = fidelity(**(stores | {"student_ood": stores["student_ood"] | {"near": flat}}), detectors="knn:k=3", k=5)
    assert "scores/knn:k=3/near/spearman" not in result.metrics
    assert "scores/knn:k=3/near/agreement" in result.metrics
    assert (
        "scores/knn:k=3/near/spearman is left out: one side gives all of the 80 rows the same score" in result.remarks
    )


def test_what_does_not_suit_is_refused(stores, make_store, spaces):
    def refused(message, **changed):
        with pytest.raises(ValueError, match=message):
            fidelity(**({**stores, "detectors": "knn:k=3", "k": 5} | changed))

    t, s = stores["teacher_ood"], stores["student_ood"]
    refused("--detector is fitted to banks; give both --teacher-bank STORE", teacher_bank=None, student_bank=None)
    refused("OOD set far, near: give it as --teacher-ood NAME=STORE and as --student-ood", student_ood=None)
    refused("OOD sets are scored by detectors; give --detector NAME", detectors=())
    refused("unknown detector 'knm'", detectors="knm")
    for name in ("all", "id", "a/b", ""):
        refused("cannot name", teacher_ood={name: t["near"]}, student_ood={name: s["near"]})
    refused(r"s-near\.zarr was made by encoder .* \(s, 5 dimensions\)", teacher_ood=s, student_ood=s)
    refused("is both teacher and teacher_ood/near", teacher_ood=t | {"near": stores["teacher"]})
    refused("is both student_bank and student_ood/far", student_ood=s | {"far": stores["student_bank"]})
    others = make_store("others", spaces["near"][2], fingerprint="s")
    refused("share 0 sample ids", student_ood=s | {"near": others})
    nan = spaces["near"][2].copy()
    nan[3] = np.nan
    broken = make_store("broken", nan, sample_ids=[f"near-{i}" for i in range(80)], fingerprint="s")
    refused(r"broken\.zarr row 3: embedding is not finite", student_ood=s | {"near": broken})


def test_id_images_among_ood_rows_are_counted_dropped_or_refused(spaces, make_store):
    def given(copies):
        found = {"teacher_ood": {}, "student_ood": {}}
        for name in ("bank", "id", "near"):
            labels, *both = spaces[name][:3]
            images = [f"{name}-{i}" for i in range(len(labels))]
            if name == "near":
                images[:copies] = [f"bank-{i}" for i in range(copies)]
            for side, x in zip("ts", both, strict=True):
                store = make_store(
                    f"{side}-{name}-{copies}", x, images, labels=labels, fingerprint=side,
                    sample_ids=[f"{name}-{i}" for i in range(len(labels))],
                )  # fmt: skip
                role = {"t": "teacher", "s": "student"}[side]
                if name == "near":
                    found[f"{role}_ood"] = {"near": store}
                else:
                    found[role + ("_bank" if name == "bank" else "")] = store
        return found | {"detectors": "knn:k=3", "k": 5}

    few = given(8)
    whole, dropped = (fidelity(**few, drop_identical=drop) for drop in (False, True))
    assert whole.inputs["teacher_ood"]["near"]["identical"] == 8
    assert [result.inputs["teacher_ood"]["near"]["rows"] for result in (whole, dropped)] == [80, 72]
    assert (
        "8 of 80 near rows are images of an ID set too: they are ID; --drop-identical leaves them out" in whole.remarks
    )
    a, b = (knn_scores(spaces["bank"][at], spaces["near"][at][8:], 3) for at in (1, 2))
    assert dropped.metrics["scores/knn:k=3/near/spearman"].value == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)
    with pytest.raises(
        ValueError, match=r"75 of 80 images of .* are in ID sets too; give other images as teacher_ood/near"
    ):
        fidelity(**given(75))


def test_the_command_gives_the_same_result(stores, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(featcache_cli.screen.results, "width", 100, raising=False)
    line = (
        "evalsuite fidelity --teacher t-id.zarr --student s-id.zarr --teacher-bank t-bank.zarr --student-bank s-bank.zarr "
        "--teacher-ood near=t-near.zarr --student-ood near=s-near.zarr --detector knn:k=3 --detector msp --k 5"
    )
    for more in (" --json r.json", ""):
        monkeypatch.setattr(sys, "argv", shlex.split(line + more))
        with pytest.raises(SystemExit) as ended:
            programs.run_evalsuite()
        assert not ended.value.code
    table = capsys.readouterr().out
    near = {role: {"near": stores[role]["near"]} for role in ("teacher_ood", "student_ood")}
    expected = fidelity(**(stores | near), detectors=["knn:k=3", "msp"], k=5)
    assert Result.read("r.json").metrics == expected.metrics
    metric = expected.metrics["scores/msp/all/kappa"]
    assert re.search(rf"scores/msp/all/kappa .*{metric.value:.4f}.* 0\.0000.*{metric.ci95[0]:.4f}–", table)
    assert "scores/knn:k=3/id/spearman" in table
    assert json.loads((tmp_path / "r.json").read_text())["parameters"]["detectors"]["msp"] == {"temperature": 1.0}


# -- the estimates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [0, 1, 9])
@pytest.mark.parametrize("n", [2, 5, 40])
def test_rank_correlation_with_ties(rng, n, digits):
    a = rng.normal(size=n).round(digits)
    a[0] = 9.0
    b = (a + rng.normal(size=n)).round(digits)
    b[-1] = 9.0
    found = spearman(a, b)
    assert found.value == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    assert (found.ci95 is None) == (n < 5)


def test_the_interval_is_that_of_the_jackknife(rng):
    """Leaving out one row after the other gives the variance that influences give, on Fisher's scale."""
    a = rng.standard_t(3, 300).round(1)
    b = (a + rng.standard_t(3, 300)).round(1)
    left_out = [spearmanr(np.delete(a, i), np.delete(b, i)).statistic for i in range(300)]
    value = spearmanr(a, b).statistic
    z, half = np.arctanh(value), 1.968 * np.std(left_out) * np.sqrt(299) / (1 - value**2)
    assert spearman(a, b).ci95 == pytest.approx((np.tanh(z - half), np.tanh(z + half)), abs=0.004)


@pytest.mark.parametrize("sign", [1, -1])
def test_rows_in_perfect_order_leave_something_open(rng, sign):
    a = rng.normal(size=100)
    low, high = sorted(sign * end for end in spearman(a, sign * np.exp(a)).ci95)
    assert high == 1
    assert low == pytest.approx(1 - 2 * 1.96**2 / (100 + 1.96**2), abs=2e-3)


def test_decisions_are_those_of_the_fpr95(rng):
    known, others = rng.normal(size=(2, 200)).round(1), rng.normal(1, 1, (2, 90)).round(1)
    flagged = [1 - ood_metrics(k, o)["fpr95_id"] for k, o in zip(known, others, strict=True)]
    _, chance = decisions((known[0], known[1]), (others[0], others[1]))
    assert chance == pytest.approx(flagged[0] * flagged[1] + (1 - flagged[0]) * (1 - flagged[1]))
    estimates, _ = decisions((known[0], known[0]), (others[0], np.full(90, 99.0)))
    assert estimates["agreement"].value == pytest.approx(flagged[0])


def test_decisions_of_few_or_equal_rows(rng):
    few = rng.normal(size=LEAST_FOR_THRESHOLD - 1)
    estimates, _ = decisions((few, few))
    assert {each.none for each in estimates.values()} == {"71 ID rows set the thresholds; bounds on them take 72"}
    enough = rng.normal(size=200)
    far = np.full(50, 99.0)
    estimates, chance = decisions((enough, enough), (far, far))
    assert estimates.keys() == {"agreement"}
    assert (estimates["agreement"].value, chance) == (1, 1)
    flat = np.zeros(200)  # nothing is above the threshold
    assert decisions((flat, enough))[0]["kappa"].value == 0
    assert decisions((flat, flat))[0].keys() == {"agreement"}


def test_coverage():
    """A part of `benchmarks/intervals.py`: thresholds set by 100 ID rows, heavy tails, and the student sees less."""
    rng = np.random.default_rng(0)

    def draw(n, *shift):
        a, other = rng.standard_t(4, (2, n))
        return a + shift[0], 0.8 * a + 0.6 * other + shift[1]

    def measured(known, others):
        everything = [np.append(k, o) for k, o in zip(known, others, strict=True)]
        both = {"ood": decisions(known, others)[0], "all": decisions(known, others, together=True)[0]}
        found = {f"{of}/{what}": each for of, named in both.items() for what, each in named.items()}
        return found | {"spearman": spearman(*everything)}

    shift = (2.0, 0.7)
    truth = {name: each.value for name, each in measured(draw(40_000, 0, 0), draw(60_000, *shift)).items()}
    held = dict.fromkeys(truth, 0)
    for _ in range(40):
        for name, each in measured(draw(100, 0, 0), draw(150, *shift)).items():
            held[name] += each.ci95[0] <= truth[name] <= each.ci95[1]
    assert min(held.values()) >= 35, held
