"""Robustness: what extracting and evaluating each corruption by hand gives, and nothing computed twice."""

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_encoder
from typer.testing import CliRunner

import featcache_cli.screen
from evalsuite import Metric, knn, ood, robustness
from evalsuite import detectors as registry
from evalsuite.detectors import load
from evalsuite.intervals import share
from featcache import extract
from featcache_cli import programs

pytest.importorskip("imagecorruptions", reason="needs featcache[robustness]")

NAMES, LEVELS, K = ("contrast", "gaussian_noise"), (1, 5), 3
EXACT = {"device": "cpu", "precision": "fp32"}


def pictures(root: Path, seed: int, count: int) -> str:
    """Pictures of three colours, 40 × 34 px, in classes ant, bee and cat."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        path = root / ("ant", "bee", "cat")[i % 3] / f"{seed}-{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 160, (3, 3, 3))
        small[..., i % 3] += 30
        Image.fromarray(small.astype(np.uint8)).resize((40, 34), Image.Resampling.BICUBIC).save(path)
    return str(root)


@pytest.fixture
def encoder():
    return tiny_encoder(weights=2)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Of the same encoder: a bank of 30 images, a near set of 10 and a far set of 9."""
    root = tmp_path_factory.mktemp("stores")
    return {
        name: extract(pictures(root / name, seed, count), tiny_encoder(weights=2), root / f"{name}.zarr", **EXACT)
        for seed, (name, count) in enumerate({"bank": 30, "near": 10, "far": 9}.items())
    }


@pytest.fixture
def given(tmp_path, encoder, stores):
    """What `robustness` needs, with a test corpus of 12 images."""
    return {
        "encoder": encoder,
        "corpus": pictures(tmp_path / "test", 9, 12),
        "bank": stores["bank"],
        "out": tmp_path / "out",
        "corruptions": NAMES,
        "severities": LEVELS,
        "k": K,
        "resamples": 50,
        **EXACT,
    }


@pytest.fixture
def with_ood(given, stores):
    """The same, with a near and a far set."""
    sets = {"near": {"n": stores["near"]}, "far": {"f": stores["far"]}}
    return given | sets | {"detectors": ["knn:k=2", "mahalanobis++"]}


def test_it_equals_extracting_and_evaluating_by_hand(with_ood, tmp_path, monkeypatch):
    result = robustness(**with_ood)
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "another-home"))
    ood_names = [f"{spec}/{where}/auroc" for spec in with_ood["detectors"] for where in ("near/n", "far/f")]
    expected, right = {}, {}
    combinations = [f"{name}/{level}" for name in NAMES for level in LEVELS]
    for where in ("clean", *combinations):
        spec = with_ood["corpus"] if where == "clean" else f"corrupted:{where.replace('/', ':')}:{with_ood['corpus']}"
        store = extract(spec, tiny_encoder(weights=2), tmp_path / f"by-hand-{where.replace('/', '-')}.zarr", **EXACT)
        votes = knn(with_ood["bank"], store, [K], resamples=50)
        right[where] = votes.samples[f"top1@{K}"]
        expected[f"{where}/top1@{K}"] = votes.metrics[f"top1@{K}"]
        sets = {group: with_ood[group] for group in ("near", "far")}
        scored = ood(id_train=with_ood["bank"], id_test=store, detectors=with_ood["detectors"], resamples=50, **sets)
        expected |= {f"{where}/{name}": scored.metrics[name] for name in ood_names}
    for name, metric in expected.items():
        assert result.metrics[name] == metric, name
    means = {f"{name}/mean": [f"{name}/{level}" for level in LEVELS] for name in NAMES} | {"mean": combinations}
    for where, parts in means.items():
        for what in (f"top1@{K}", *ood_names):
            metric = result.metrics[f"{where}/{what}"]
            assert metric.value == pytest.approx(np.mean([expected[f"{part}/{what}"].value for part in parts]))
            assert metric.ci95[0] <= metric.ci95[1]
    assert set(result.metrics) == set(expected) | {f"{w}/{what}" for w in means for what in (f"top1@{K}", *ood_names)}
    assert result.metrics[f"clean/top1@{K}"].value > 0.34
    assert result.metrics[f"clean/top1@{K}"].value != result.metrics[f"mean/top1@{K}"].value

    of_images = share(np.mean([right[where] for where in combinations], axis=0))
    assert result.metrics[f"mean/top1@{K}"].ci95 == pytest.approx(of_images.ci95)
    for where in right:
        np.testing.assert_array_equal(result.samples[f"{where}/top1@{K}"], right[where])
    assert result.inputs["contrast/5"]["rows"] == 12
    assert json.loads(result.to_json())["parameters"]["corruptions"] == list(NAMES)


def test_a_second_run_computes_nothing_and_a_stopped_one_goes_on(with_ood, encoder):
    seen: list[tuple[int, int, str]] = []

    def stop(done, total, what):
        seen.append((done, total, what))
        if what == "gaussian_noise/1":
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        robustness(**with_ood, progress=stop)
    assert seen[0][1:] == (12 * 5, "clean")
    assert not (with_ood["out"] / "gaussian_noise-5@256.zarr").exists()
    finished = with_ood["out"] / "contrast-5@256.zarr"
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()}
    result = robustness(**with_ood)
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*") if file.is_file()} == before

    calls = encoder.module.calls
    again = robustness(**with_ood, progress=lambda *at: pytest.fail("nothing is left to do"))
    assert encoder.module.calls == calls
    assert again == result


def test_changed_images_are_noticed(given):
    robustness(**given)
    changed = next(Path(given["corpus"]).rglob("*.png"))
    Image.new("RGB", (40, 34)).save(changed)
    with pytest.raises(ValueError, match=r"clean\.zarr: 1 images have changed since"):
        robustness(**given)
    shutil.rmtree(given["out"] / "clean.zarr")
    with pytest.raises(ValueError, match=r"contrast-1@256\.zarr: 1 images have changed since"):
        robustness(**given)
    found = robustness(**given, overwrite=True)
    assert found.metrics == robustness(**given | {"out": f"{given['out']}-2"}).metrics


def test_images_that_are_too_small_are_left_out_and_counted(given):
    Image.new("RGB", (31, 40)).save(Path(given["corpus"]) / "ant/small.png")
    result = robustness(**given)
    assert (result.inputs["clean"]["rows"], result.inputs["contrast/1"]["failed"]) == (13, 1)
    assert result.metrics[f"mean/top1@{K}"].ci95 is not None
    assert result.samples == {}
    assert result.remarks == ["corrupted: 4 rows failed in 4 of 4 stores, 1 in contrast/1: left out"]
    (Path(given["corpus"]) / "bee/damaged.png").write_bytes(b"no image")
    given["out"] = given["out"].with_name("other")
    result = robustness(**given)
    assert result.remarks[0] == f"clean {given['out']}/clean.zarr: left out of 14 rows: 1 failed"
    assert result.remarks[1:] == ["corrupted: 8 rows failed in 4 of 4 stores, 2 in contrast/1: left out"]
    assert result.parameters["chance"]["contrast/1/top1@3"] == result.parameters["chance"]["mean/top1@3"] == 4 / 12
    assert result.parameters["chance"]["clean/top1@3"] == 5 / 13


def test_mean_corruption_error_is_the_papers_formula(given):
    reference = robustness(**given)
    assert robustness(**given, reference=reference).metrics["mce"].value == 1
    values = {"clean": 0.6, "contrast/1": 0.5, "contrast/5": 0.2, "gaussian_noise/1": 0.4, "gaussian_noise/5": 0.1}
    other = copy.deepcopy(reference)
    other.metrics |= {f"{where}/top1@{K}": Metric(value) for where, value in values.items()}
    path = other.write(given["out"] / "reference.json")
    result = robustness(**given, reference=path)

    def error(where):
        return 1 - result.metrics[f"{where}/top1@{K}"].value

    ratios, relative = [], []
    for name in NAMES:
        ours, theirs = [error(f"{name}/{s}") for s in LEVELS], [1 - values[f"{name}/{s}"] for s in LEVELS]
        ratios.append(sum(ours) / sum(theirs))
        relative.append(sum(e - error("clean") for e in ours) / sum(e - (1 - 0.6) for e in theirs))
        assert result.metrics[f"{name}/ce"].value == pytest.approx(ratios[-1])
        assert result.metrics[f"{name}/relative_ce"].value == pytest.approx(relative[-1])
    assert result.metrics["mce"].value == pytest.approx(np.mean(ratios))
    assert result.metrics["relative_mce"].value == pytest.approx(np.mean(relative))
    assert len(set(ratios)) == 2

    other.metrics[f"clean/top1@{K}"] = Metric(0.3)
    with pytest.warns(RuntimeWarning, match="relative_mce is left out: under contrast the reference adds no error"):
        left = robustness(**given, reference=other).metrics
    assert "relative_mce" not in left
    assert left["mce"].value == pytest.approx(np.mean(ratios))


def test_a_reference_of_something_else_is_refused(given, tmp_path):
    reference = robustness(**given)
    for changed, message in (
        ({"k": 2}, r"the reference has no top1@2 for clean, contrast/1, contrast/5, …"),
        ({"severities": (1, 2)}, r"no top1@3 for contrast/2, gaussian_noise/2; measure it with the same"),
        ({"size": 32}, "the reference has size 256, not 32"),
        (
            {"corpus": pictures(tmp_path / "else", 8, 3), "out": tmp_path / "elsewhere"},
            "other images or labels than .*else",
        ),
        ({"reference": knn(given["bank"], given["bank"], [1])}, "a result of knn; give one of `evalsuite robustness`"),
    ):
        with pytest.raises(ValueError, match=message):
            robustness(**given | {"reference": reference} | changed)


def test_wrong_input_is_refused_before_anything_is_extracted(with_ood, tmp_path):
    foreign = extract(pictures(tmp_path / "bank", 0, 3), tiny_encoder(weights=1), tmp_path / "foreign.zarr", **EXACT)
    Image.new("RGB", (40, 40)).save(tmp_path / "loose.png")
    (tmp_path / "flat").mkdir()
    (tmp_path / "loose.png").rename(tmp_path / "flat/loose.png")
    (tmp_path / "elks/elk").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "elks/elk/1.png")
    for changed, message in (
        ({"corruptions": ["contrst"]}, "unknown corruption 'contrst'; did you mean contrast"),
        ({"severities": (1, 6)}, "severity 6 of contrast: give 1"),
        ({"severities": ()}, "at least one corruption and one severity"),
        (
            {"bank": foreign, "near": None, "far": None, "detectors": ["knn"]},
            r"foreign\.zarr was made by encoder tiny .*extract the bank with",
        ),
        ({"near": {"n": foreign}}, r"foreign\.zarr was made by encoder"),
        ({"near": {"a/b": with_ood["bank"]}}, "'a/b' cannot name a near set"),
        ({"near": {"n": with_ood["bank"]}}, r"bank\.zarr is both bank and near/n"),
        ({"detectors": ["knn", " knn"]}, "detector 'knn' is given twice"),
        ({"detectors": ["knn:mean=maybe"]}, "mean must be true or false"),
        ({"k": 31}, "k=31: give 1 to 30"),
        ({"corpus": str(tmp_path / "flat")}, "has no labels"),
        ({"temperature": 0.0}, "temperature must be a positive"),
        ({"detectors": ["react:percentile=0.9"]}, "give 90"),
        (
            {"corpus": str(tmp_path / "elks")},
            r"elks and .*bank\.zarr have no class in common \(elk against ant, bee, cat\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            robustness(**with_ood | changed)
    assert not with_ood["out"].exists()


def test_a_failing_detector_loses_neither_accuracies_nor_the_others(with_ood, tmp_path):
    expected = robustness(**with_ood)
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(3, with_ood["bank"].embedding_dim)))
    text, broken = f"mcm:text={tmp_path}/text.npy", ["vim", "knn:k=20000", "energy"]
    with pytest.warns(RuntimeWarning) as warned:
        result = robustness(**with_ood | {"detectors": [*broken, text, *with_ood["detectors"]]})
    reasons = result.parameters["failed_detectors"]
    assert list(reasons) == broken
    assert [str(each.message) for each in warned] == [
        f"detector {spec} failed and is left out: {reason}" for spec, reason in reasons.items()
    ]
    assert "a head is needed" in reasons["vim"]
    assert "k=20000 does not suit the bank" in reasons["knn:k=20000"]
    assert "bank.zarr has no logits" in reasons["energy"]
    assert expected.metrics.items() <= result.metrics.items()
    others = {name for name in result.metrics if name not in expected.metrics}
    assert {name.partition("/mcm:text=text.npy/")[2] for name in others} == {"near/n/auroc", "far/f/auroc"}
    assert list(result.parameters["detectors"]) == [*broken, "mcm:text=text.npy", *with_ood["detectors"]]

    with pytest.warns(RuntimeWarning, match="detector vim failed"):
        alone = robustness(**with_ood | {"detectors": ["vim"]})
    assert alone.metrics == robustness(**with_ood | {"near": None, "far": None, "detectors": ["knn"]}).metrics


@pytest.mark.parametrize("raises", [True, False])
def test_a_detector_that_fails_on_corrupted_images_is_left_out_everywhere(with_ood, monkeypatch, raises):
    class Late(registry.Detector):
        scored = 0

        def fit(self, bank):
            return self

        def score(self, features):
            Late.scored += 1
            if raises and Late.scored == 5:
                raise RuntimeError("out of luck")
            return np.full(len(features), np.nan if Late.scored == 5 else 0.0)

    expected = robustness(**with_ood | {"detectors": ["knn:k=2"]})
    monkeypatch.setattr(registry, "load", lambda name: Late if name == "late" else load(name))
    with pytest.warns(RuntimeWarning, match="detector late failed and is left out: .*(out of luck|NaN)"):
        result = robustness(**with_ood | {"detectors": ["late", "knn:k=2"]})
    assert result.metrics == expected.metrics
    assert list(result.parameters["failed_detectors"]) == ["late"]


def test_without_the_package_the_extra_is_named(given, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ValueError, match=r"pip install 'featcache\[robustness\]'"):
        robustness(**given)


def test_the_command_prints_a_row_for_each_corruption(given, stores, tmp_path, monkeypatch):
    monkeypatch.setattr(featcache_cli.screen.results, "width", 200)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["tiny"], "student", lambda: tiny_encoder(weights=2), raising=False)
    line = (
        "robustness --encoder python:tiny:student --corpus test --bank {bank.path} --corruptions contrast,fog --severity 1-2 "
        "--k 3 --near n={near.path} --detector knn:k=2 --out kept --device cpu --json r.json"
    ).format(**stores)
    ran = CliRunner().invoke(programs.app("evalsuite"), line.split(), catch_exceptions=False)
    assert ran.exit_code == 0
    metrics = json.loads(Path("r.json").read_text())["metrics"]
    assert {f"{w}/top1@3" for w in ("clean", "contrast/1", "contrast/2", "contrast/mean", "fog/2", "mean")} <= set(
        metrics
    )
    row = next(line for line in ran.output.splitlines() if "fog/top1@3" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")][1:] == [
        f"{metrics[f'fog/{level}/top1@3']['value']:.4f}" for level in (1, 2, "mean")
    ]
    refused = CliRunner().invoke(programs.app("evalsuite"), [*line.split(), "--severity", "1-9"])
    assert isinstance(refused.exception, ValueError)
    refused = CliRunner().invoke(
        programs.app("evalsuite"), line.replace(f"--near n={stores['near'].path} ", "").split()
    )
    assert "--detector knn:k=2: there is no OOD set to tell apart; give --near or --far" in str(refused.exception)


def test_a_corpus_of_fog_is_named_in_letters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["featcache", "extract", "corrupted:fog:3", "--teacher", "python:tiny:tiny_encoder"]
    )
    with pytest.raises(SystemExit) as stopped:
        programs.run_featcache()
    assert stopped.value.code == 2
    assert "corrupted:fog:3 is not corrupted:NAME:SEVERITY" in capsys.readouterr().err


def test_images_that_the_bank_has_leave_with_all_their_corruptions(with_ood, tmp_path, stores):
    """Nine of the twelve stay; of the near set, 4 of 14 are images of the bank or the corpus."""
    bank_images, test = sorted(Path(stores["bank"].manifest.corpus.spec).rglob("*.png")), Path(with_ood["corpus"])
    only, mixed = tmp_path / "only", tmp_path / "mixed"
    shutil.copytree(test, only)
    shutil.copytree(stores["near"].manifest.corpus.spec, mixed)
    for i, path in enumerate(sorted(test.rglob("*.png"))[:3]):
        (only / path.relative_to(test)).unlink()
        shutil.copy(bank_images[i], path)
        shutil.copy(bank_images[-1 - i], mixed / "ant" / f"other-{i}.png")
    shutil.copy(sorted(test.rglob("*.png"))[-1], mixed / "bee" / "of-the-corpus.png")
    given = with_ood | {"near": {"n": extract(str(mixed), with_ood["encoder"], tmp_path / "mixed.zarr", **EXACT)}}
    found = robustness(**given)
    assert found.inputs["clean"]["identical"] == 3
    assert found.inputs["near"]["n"]["identical"] == 4
    assert [remark[:20] for remark in found.remarks] == ["3 of 12 images are i", "4 of 14 near/n rows "]
    dropped = robustness(**given, drop_identical=True)
    assert dropped.parameters["drop_identical"]
    assert all("left out" in remark for remark in dropped.remarks)
    alone = robustness(**with_ood | {"corpus": str(only), "out": tmp_path / "only-out"})
    assert alone.remarks == []
    assert {name: metric.value for name, metric in dropped.metrics.items()} == pytest.approx(
        {name: metric.value for name, metric in alone.metrics.items()}
    )
    assert dropped.samples["sample_id"].tolist() == alone.samples["sample_id"].tolist()
    with pytest.raises(ValueError, match="the reference has drop_identical False, not True"):
        robustness(**given, drop_identical=True, reference=found)
