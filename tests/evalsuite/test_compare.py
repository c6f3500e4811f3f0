import sys

import numpy as np
import pytest

import evalsuite
import featcache_cli.screen
from evalsuite import Metric, Result, compare, knn, ood, probe, report
from evalsuite.intervals import difference, mean_of, ranking, share
from evalsuite.metrics import ood_metrics
from featcache_cli import programs


def accuracies(ids, command="knn", parameters=None, **correct):
    metrics = {name: Metric(float(np.mean(right))) for name, right in correct.items()}
    return Result(command, {}, parameters or {}, metrics, {}, {"sample_id": np.array(ids), **correct})


def corrupted(ids, right, severities=(1, 5)):
    """A result of `robustness` from what was right under each corruption and severity, (2, severities, n)."""
    single = {
        f"{name}/{level}/top1@20": right[i, j]
        for i, name in enumerate(("fog", "snow"))
        for j, level in enumerate(severities)
    }
    result = accuracies(ids, "robustness", {"severities": list(severities)}, **{"clean/top1@20": right[0, 0]}, **single)
    for i, name in enumerate(("fog", "snow")):
        result.metrics[f"{name}/mean/top1@20"] = Metric(float(right[i].mean()))
    result.metrics |= {"mean/top1@20": Metric(float(right.mean())), "mean/knn/near/tin/auroc": Metric(0.5)}
    return result


def scored(sets, spec="knn"):
    """A result of `ood` from SET → (ids, scores)."""
    samples = {f"sample_id/{key}": np.array(ids) for key, (ids, _) in sets.items()}
    samples |= {f"score/{spec}/{key}": np.asarray(scores, float) for key, (_, scores) in sets.items()}
    return Result("ood", {}, {}, {}, {}, samples)


@pytest.fixture
def ids():
    return [f"img/{i}" for i in range(40)]


def test_accuracies_are_of_the_paired_samples(ids, rng):
    ours, theirs = ({name: rng.random(40) < p for name in ("top1@1", "top5@1")} for p in (0.5, 0.8))
    result = compare(accuracies(ids, **ours), accuracies(ids, **theirs))
    for name in ours:
        assert result.metrics[name].value == pytest.approx(theirs[name].mean() - ours[name].mean(), abs=1e-12)
        assert result.metrics[name].ci95 == difference(share(ours[name]), share(theirs[name])).ci95
        assert (result.parameters["a"][name], result.parameters["b"][name]) == (ours[name].mean(), theirs[name].mean())
    assert result.command == "compare"
    assert result.parameters["samples"] == {"all": {"paired": 40, "only_a": 0, "only_b": 0}}


def test_the_interval_agrees_with_the_variance_of_a_paired_difference(rng):
    """McNemar: only samples that one of the two gets right count."""
    ours, theirs = rng.random(3000) < 0.7, rng.random(3000) < 0.75
    ours[:2000] = theirs[:2000]
    ids = np.arange(3000).astype(str)
    result = compare(accuracies(ids, top1=ours), accuracies(ids, top1=theirs))
    b, c = (theirs & ~ours).sum(), (ours & ~theirs).sum()
    spread = np.sqrt((b + c) - (b - c) ** 2 / 3000) / 3000
    low, high = result.metrics["top1"].ci95
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert high - low < 0.7 * 2 * 1.96 * np.sqrt((ours.var() + theirs.var()) / 3000)  # what pairing gains


def test_identical_predictions_differ_by_nothing_but_might_on_other_samples(ids, rng):
    right, score = rng.random(40) < 0.7, rng.normal(size=40)
    ood_result = scored({"id_test": (ids, score), "near/n": (ids, score + 0.3)})
    for result in (compare(*[accuracies(ids, top1=right)] * 2), compare(ood_result, ood_result)):
        assert {metric.value for metric in result.metrics.values()} == {0.0}
        for name, metric in result.metrics.items():
            if metric.ci95 is None:
                assert name.endswith(("fpr95_id", "fpr95_ood"))
                assert result.parameters["verdicts"][name] == f"no verdict: {metric.no_ci95}"
            else:
                assert (
                    metric.ci95[0] < -0.05 < 0.05 < metric.ci95[1]
                )  # no differing sample among 40: up to 9 % may differ
                assert result.parameters["verdicts"][name] == "no difference shown"


@pytest.mark.parametrize("n", [2, 5, 9, 10])
def test_two_samples_have_no_verdict(ids, n):
    wrong, right = np.zeros(n, bool), np.ones(n, bool)
    result = compare(accuracies(ids[:n], top1=wrong), accuracies(ids[:n], top1=right))
    assert result.metrics["top1"].value == 1
    said = f"no verdict: too few samples ({n})" if n < 10 else "B better"
    assert result.parameters["verdicts"] == {"top1": said}
    a, b = (scored({"id_test": (ids, np.zeros(40) + i), "near/n": (ids[:n], [1 - i] * n)}) for i in (1, 0))
    verdicts = compare(a, b).parameters["verdicts"]
    assert all(verdict.startswith("no verdict") for verdict in verdicts.values()) == (n < 10)


def test_samples_are_paired_by_id(ids, rng):
    right, other = rng.random(40) < 0.5, rng.random(40) < 0.5
    shuffled = rng.permutation(40)
    expected = compare(accuracies(ids[:30], top1=right[:30]), accuracies(ids[:30], top1=other[:30]))
    order = [i for i in shuffled if i >= 2]  # B lacks two of the 30, has ten of its own
    result = compare(accuracies(ids[:30], top1=right[:30]), accuracies([ids[i] for i in order], top1=other[order]))
    assert result.parameters["samples"]["all"] == {"paired": 28, "only_a": 2, "only_b": 10}
    assert result.metrics["top1"].value == pytest.approx(other[2:30].mean() - right[2:30].mean(), abs=1e-12)
    same = compare(
        accuracies(ids[:30], top1=right[:30]),
        accuracies([ids[i] for i in shuffled if i < 30], top1=other[[i for i in shuffled if i < 30]]),
    )
    assert same.metrics == expected.metrics


@pytest.fixture
def two(ids, rng):
    """Scores of the same samples under two encoders: B tells them apart better."""
    sets = {"id_test": 30, "near/n": 20, "far/x": 25, "far/y": 15, "csid/c": 10}
    at = {"id_test": 0, "near/n": 1, "far/x": 2, "far/y": 3, "csid/c": 0.5}
    base = {key: rng.normal(size=n) for key, n in sets.items()}
    return tuple(
        {key: (ids[: sets[key]], x + gain * at[key] + 0.3 * rng.normal(size=len(x))) for key, x in base.items()}
        for gain in (0.2, 1.0)
    )


def test_ood_metrics_are_of_the_paired_rows(two):
    a, b = two
    result = compare(scored(a), scored(b))
    found = {}
    for suffix in ("", "_fs"):
        for side in two:
            known = np.concatenate([side["id_test"][1], side["csid/c"][1]]) if suffix else side["id_test"][1]
            of = {key: ranking(known, side[key][1], ood_source=key) for key in ("near/n", "far/x", "far/y")}
            of["far/mean"] = {m: mean_of([of["far/x"][m], of["far/y"][m]]) for m in of["far/x"]}
            of["near/mean"] = of["near/n"]
            for key, metrics in of.items():
                group, name = key.split("/")
                for metric, estimate in metrics.items():
                    found.setdefault(f"knn/{group}{suffix}/{name}/{metric}", []).append(estimate)
    assert result.metrics.keys() == found.keys()
    for name, (ours, theirs) in found.items():
        assert result.metrics[name] == difference(ours, theirs).metric()
    value = (
        ood_metrics(b["id_test"][1], b["near/n"][1])["auroc"] - ood_metrics(a["id_test"][1], a["near/n"][1])["auroc"]
    )
    assert result.metrics["knn/near/n/auroc"].value == pytest.approx(value, abs=1e-12)


def test_verdicts_know_that_a_low_fpr_is_better(rng):
    ids = [f"img/{i}" for i in range(200)]
    a, b = (
        scored({"id_test": (ids, rng.normal(size=200)), "far/x": (ids, rng.normal(gain, size=200))}) for gain in (0, 3)
    )
    forth, back = compare(a, b).parameters["verdicts"], compare(b, a).parameters["verdicts"]
    for metric in ("auroc", "ap_out", "fpr95_id"):
        assert forth[f"knn/far/mean/{metric}"] == "B better"
        assert back[f"knn/far/mean/{metric}"] == "A better"
    assert compare(a, b).metrics["knn/far/mean/fpr95_id"].value < 0


def test_results_of_the_evaluators_compare(make_store, clusters, rng, tmp_path):
    centres = rng.normal(size=(3, 8))
    labels = {"train": np.repeat(range(3), 20), "test": np.repeat(range(3), 10)}
    arrays = {"train": clusters(centres, 20), "test": clusters(centres, 10), "far": rng.normal(size=(20, 8))}
    paths = {"knn": [], "probe": [], "ood": []}
    for encoder, noise in (("good", 0.0), ("poor", 3.0)):
        at = {
            name: make_store(
                f"{name}-{encoder}", x + noise * rng.normal(size=x.shape), labels=labels.get(name), fingerprint=encoder
            )
            for name, x in arrays.items()
        }
        found = {
            "knn": knn(at["train"], at["test"], [1, 5], resamples=10),
            "probe": probe(at["train"], at["test"], c=1.0, resamples=10),
            "ood": ood(id_train=at["train"], id_test=at["test"], far={"far": at["far"]}, k=3, resamples=10),
        }
        for command, result in found.items():
            paths[command].append(result.write(tmp_path / f"{command}-{encoder}.json"))
    for command, names in (
        ("knn", {"top1@1", "top5@1", "top1@5", "top5@5"}),
        ("probe", {"probe/top1", "probe/top5"}),
    ):
        result = compare(*paths[command])
        assert result.metrics.keys() == names
        assert all("macro_top1" in name for name in result.parameters["not_compared"])
        for name in names:
            good, poor = (Result.read(path).metrics[name].value for path in paths[command])
            assert result.metrics[name].value == pytest.approx(poor - good, abs=1e-12)
        assert Result.read(result.write(tmp_path / "c.json")) == result
    result = compare(*paths["ood"])
    read = [Result.read(path) for path in paths["ood"]]
    assert result.metrics.keys() == read[0].metrics.keys()
    assert result.parameters["not_compared"] == []
    for name, metric in result.metrics.items():
        assert metric.value == pytest.approx(read[1].metrics[name].value - read[0].metrics[name].value, abs=1e-12)
    assert result.parameters["verdicts"]["knn/far/far/auroc"] == "A better"


def test_means_over_corruptions_are_of_the_same_samples(ids, rng):
    ours, theirs = rng.random((2, 2, 40)) < 0.4, rng.random((2, 2, 40)) < 0.7
    a, b = corrupted(ids, ours), corrupted(ids, theirs)
    result = compare(a, b)
    for name, x, y in (
        ("mean", ours, theirs),
        ("fog/mean", ours[0], theirs[0]),
        ("snow/mean", ours[1], theirs[1]),
        ("snow/5", ours[1, 1], theirs[1, 1]),
    ):
        of = [share(each.reshape(-1, 40).mean(axis=0)) for each in (x, y)]
        assert result.metrics[f"{name}/top1@20"].ci95 == pytest.approx(difference(*of).ci95)
        assert result.parameters["a"][f"{name}/top1@20"] == pytest.approx(a.metrics[f"{name}/top1@20"].value, abs=1e-12)
        assert result.parameters["b"][f"{name}/top1@20"] == pytest.approx(b.metrics[f"{name}/top1@20"].value, abs=1e-12)
    assert result.parameters["verdicts"]["mean/top1@20"] == "B better"
    assert result.parameters["not_compared"] == ["mean/knn/near/tin/auroc"]
    assert all(low < 0 < high for low, high in (metric.ci95 for metric in compare(a, a).metrics.values()))


def test_means_over_other_severities_are_not_compared(ids, rng):
    a = corrupted(ids, rng.random((2, 2, 40)) < 0.5)
    b = corrupted(ids, rng.random((2, 3, 40)) < 0.5, severities=(1, 3, 5))
    with pytest.warns(RuntimeWarning, match="A and B differ in: severities 1, 5 against 1, 3, 5"):
        result = compare(a, b)
    assert result.metrics.keys() == {f"{name}/top1@20" for name in ("clean", "fog/1", "fog/5", "snow/1", "snow/5")}
    assert {"fog/mean/top1@20", "mean/top1@20"} <= set(result.parameters["not_compared"])


def test_settings_that_differ_are_said(ids, two):
    right = np.ones(40, bool)
    given = {"k": [5, 10], "temperature": 0.07, "shots": None, "seed": 0, "chance": {"top1": 0.1}, "index": "exact"}
    a = accuracies(ids, parameters=given, top1=right)
    b = accuracies(ids, parameters=given | {"temperature": 10.0, "shots": 3, "seed": 1, "chance": {}}, top1=right)
    with pytest.warns(RuntimeWarning, match="A and B differ in: temperature 0.07 against 10; shots none against 3$"):
        assert compare(a, b).parameters["differing"] == ["temperature 0.07 against 10", "shots none against 3"]
    a, b = scored(two[0]), scored(two[0])
    a.parameters |= {"detectors": {"knn": {"k": 50}, "rmd": {}, "mcm": {"text": "a/x.npy"}}, "head": "a", "tied": {}}
    b.parameters |= {
        "detectors": {"knn": {"k": 1}, "msp": {}, "mcm": {"text": "b/x.npy"}},
        "head": "b",
        "tied": {"k": 1},
    }
    with pytest.warns(RuntimeWarning, match="differ in: knn k 50 against 1$"):
        compare(a, b)
    b.parameters |= {"detectors": a.parameters["detectors"], "head": None}
    with pytest.warns(RuntimeWarning, match="differ in: head given against none$"):
        compare(a, b)
    outcomes = {"c": 0.1, "steps": 9, "held_out_top1": [0.5], "head": "a", "candidates": [0.1, 1.0]}
    a = accuracies(ids, "probe", outcomes, top1=right)
    b = accuracies(ids, "probe", outcomes | {"c": 1.0, "steps": 8, "held_out_top1": [0.6], "head": None}, top1=right)
    assert compare(a, b).parameters["differing"] == []


def test_samples_of_another_result_are_named(ids, two, tmp_path):
    right = np.ones(40, bool)
    of_knn, of_ood = accuracies(ids, top1=right), scored(two[0])
    of_ood.metrics["knn/near/n/auroc"] = Metric(0.5)
    lacking, named_otherwise = scored(two[0]), scored(two[0], "rmd")
    del lacking.samples["score/knn/far/x"]
    for good, other in (
        (of_knn, of_ood),
        (of_knn, accuracies(ids, "probe", **{"probe/top1": right})),
        (of_knn, accuracies(ids[:-1], top1=right)),
        (of_ood, of_knn),
        (of_ood, lacking),
        (of_ood, named_otherwise),
    ):
        good.write(tmp_path / "good.json")
        good.write(tmp_path / "bad.json")
        samples = other.samples
        if other.command == good.command == "knn":
            samples = good.samples | {"sample_id": other.samples["sample_id"]}
        np.savez(tmp_path / "bad.samples.npz", **samples)
        message = (
            rf"bad\.samples\.npz does not fit .*bad\.json: .*run the same `evalsuite {good.command}` command again"
        )
        with pytest.raises(ValueError, match=message):
            compare(tmp_path / "good.json", tmp_path / "bad.json")
        with pytest.raises(ValueError, match=message):
            report([tmp_path / "bad.json"], tmp_path / "r.html")
    assert compare(tmp_path / "good.json", tmp_path / "good.json").metrics


def test_what_cannot_be_compared_says_why(ids, two):
    right = np.ones(40, bool)
    good, other = accuracies(ids, **{"top1@1": right}), accuracies(ids, **{"top1@5": right})
    lone = {"id_test": two[0]["id_test"], "near/m": two[0]["near/n"]}
    few = {"id_test": two[0]["id_test"], "near/n": (["a", "b"], [0.0, 1.0])}
    one_set = {key: two[0][key] for key in ("id_test", "near/n")}
    for a, b, message in (
        (good, accuracies(ids, "probe", **{"probe/top1": right}), "A is a result of `knn`, B of `probe`"),
        (
            Result("fidelity", {}, {}, {}),
            good,
            "A is a result of `fidelity`; compare takes those of classify, .*knn, .*ood, .*robustness",
        ),
        (good, other, "no metric in common .*the same settings"),
        (scored(one_set), scored(one_set, "rmd"), "no metric in common .*the same settings, such as k or detectors"),
        (good, accuracies(["x", "y"], **{"top1@1": right[:2]}), "share 0 samples, too few .*same corpus"),
        (good, accuracies(ids[:1], **{"top1@1": right[:1]}), "share 1 samples"),
        (good, accuracies(["x", "x"], **{"top1@1": right[:2]}), "B has two samples with one id"),
        (scored(one_set), scored(lone), r"different sets \(only the first: near/n; only the second: near/m\)"),
        (scored(one_set), scored(few), "share 0 samples of near/n"),
        (good, Result("knn", {}, {}, {}), "B comes without its samples"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(a, b)


def test_other_images_under_the_same_ids_are_not_compared(make_store, rng, monkeypatch):
    """Two stores of other images whose ids are the same; one that keeps no images is nobody's contradiction."""
    labels, rows = np.repeat(range(3), 8), np.eye(8)[np.repeat(range(3), 8)]
    train = make_store("train", rows + 0.1 * rng.normal(size=(24, 8)), labels=labels)
    contents = {"a": rng.integers(1, 255, (24, 16), np.uint8), "none": np.zeros((24, 16), np.uint8)}
    contents["b"] = np.where(np.arange(24)[:, None] < 5, contents["a"] ^ 1, contents["a"])
    found = {}
    for name, content in contents.items():
        query = make_store(name, rows + 0.1 * rng.normal(size=(24, 8)), labels=labels)
        monkeypatch.setattr(query, "content", content, raising=False)
        found[name] = [
            knn(train, query, [3]),
            probe(train, query, c=[1.0]),
            ood(id_train=train, id_test=query, near={"n": make_store(f"{name}-n", rows)}, detectors=["knn:k=3"]),
        ]
    for a, b, none in zip(found["a"], found["b"], found["none"], strict=True):
        with pytest.raises(
            ValueError, match=r"are of different images under 5 of the 24 ids.* evaluate both on the same"
        ):
            compare(a, b)
        assert compare(a, none, resamples=5).metrics
        assert compare(a, a, resamples=5).metrics


def test_a_file_without_samples_beside_it_says_how_to_get_them(ids, tmp_path):
    paths = [accuracies(ids, top1=np.ones(40, bool)).write(tmp_path / f"{name}.json") for name in "ab"]
    (tmp_path / "b.samples.npz").unlink()
    with pytest.raises(
        ValueError,
        match=r"b\.json comes without .*b\.samples\.npz.*run the same `evalsuite knn` command again with --json",
    ):
        compare(*paths)


def test_the_command_prints_a_table_and_writes_json(ids, rng, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(featcache_cli.screen.results, "width", 300)
    right = {"a": rng.random(40) < 0.2, "b": rng.random(40) < 0.9}
    for name, correct in right.items():
        accuracies(ids[: 40 if name == "a" else 38], top1=correct[: 40 if name == "a" else 38]).write(
            tmp_path / f"{name}.json"
        )

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["evalsuite", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            programs.run_evalsuite()
        return stopped.value.code or 0, *capsys.readouterr()

    code, out, _ = command(tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "c.json")
    assert code == 0
    assert "B better" in out
    assert "–: no difference shown" in out
    assert "38 samples, left out 2 only in A and 0 only in B" in out
    assert Result.read(tmp_path / "c.json") == compare(tmp_path / "a.json", tmp_path / "b.json")
    accuracies(ids, parameters={"temperature": 1.0}, top1=right["a"]).write(tmp_path / "d.json")
    accuracies(ids, parameters={"temperature": 2.0}, top1=right["a"]).write(tmp_path / "e.json")
    with pytest.warns(RuntimeWarning, match=r"d\.json and .*e\.json differ in: temperature 1 against 2"):
        _, out, _ = command(tmp_path / "d.json", tmp_path / "e.json", "--resamples", 10)
    assert "A and B differ in: temperature 1 against 2" in out
    fogged = corrupted(ids, rng.random((2, 2, 40)) < 0.5).write(tmp_path / "f.json")
    _, out, _ = command(fogged, fogged)
    assert "not compared: mean/knn/near/tin/auroc" in out
    code, out, err = command(tmp_path / "a.json", tmp_path / "none.json")
    assert code == 2
    assert "none.json" in err
    assert len(err.strip().splitlines()) == 1
    assert evalsuite.compare is compare


def test_remarks_of_both_are_kept(ids):
    one, other = accuracies(ids, **{"top1@1": np.ones(40, bool)}), accuracies(ids, **{"top1@1": np.ones(40, bool)})
    one.remarks, other.remarks = ["3 of 40 query rows are in the bank"], ["half precision"]
    assert compare(one, other).remarks == ["A: 3 of 40 query rows are in the bank", "B: half precision"]
