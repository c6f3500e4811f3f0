"""A detector in one folder: its threshold, its scores beside `evalsuite ood`'s, and the lines that load it without us."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from deployed_world import COLOURS, World, write_pictures, write_student
from PIL import Image

import evalsuite
import featcache
from distill.exporting.onnx import write_onnx
from evalsuite.deployed.card import IMAGES, NEIGHBOURS
from evalsuite.deployed.detector import DeployedDetector
from evalsuite.deployed.drift import drift
from evalsuite.deployed.encoder import open_graph
from evalsuite.deployed.fit import deployable, split
from evalsuite.deployed.scored import Scored
from featcache.head import Head
from featcache.rows import Rows
from featcache.store.from_arrays import write_store
from featcache.student import load_student
from featcache_cli import programs

BLOCKED = "import sys\nfor name in ('featcache', 'distill', 'evalsuite', 'torch', 'zarr'): sys.modules[name] = None\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def detector(world):
    return evalsuite.fit_detector(
        world.train,
        world.root / "a detector",
        detector="mahalanobis++",
        keep=0.9,
        id=world.test,
        ood={"grey": world.far},
    )


@pytest.fixture(scope="module")
def by_split(world):
    return evalsuite.fit_detector(
        world.train, world.root / "split", detector="knn:k=1", keep=0.9, hold_out=0.5, encoder="none"
    )


@pytest.fixture
def copy(detector, tmp_path):
    return shutil.copytree(detector.path, tmp_path / "copy")


def test_the_folder_holds_plain_files_and_says_what_they_are(detector):
    names = {file.name for file in detector.path.iterdir()}
    assert names == {"README.md", "detector.json", "encoder.onnx", "detector.onnx", "bank.npy", "bank.json"}
    assert detector.record["detector"] == "mahalanobis++"
    assert detector.record["encoder"]["checked"]["same_decision"] == 16
    assert detector.record["remarks"] == []
    assert np.load(detector.path / "bank.npy", allow_pickle=False).shape == (120, 10)


def test_scores_are_those_of_evalsuite_ood_and_the_threshold_their_quantile(world, detector):
    """The threshold by a slow loop; the share of OOD found by counting."""
    result = evalsuite.ood(id_train=world.train, id_test=world.test, far={"grey": world.far}, detectors="mahalanobis++")
    of_id, of_far = (result.samples[f"score/mahalanobis++/{key}"] for key in ("id_test", "far/grey"))
    np.testing.assert_allclose(detector.score(store=world.test).score, of_id, rtol=1e-9)
    np.testing.assert_allclose(detector.score(store=world.far).score, of_far, rtol=1e-9)
    slow = next(value for value in sorted(of_id) if sum(other <= value for other in of_id) >= 0.9 * (len(of_id) + 1))
    assert detector.threshold == pytest.approx(slow, rel=1e-12)
    assert (~detector.score(store=world.test).is_ood).sum() == detector.record["threshold"][
        "rank"
    ]  # the row there is kept
    assert detector.record["ood"]["grey"]["found"] == np.mean(of_far > slow)
    low, high = detector.record["ood"]["grey"]["ci95"]
    assert low <= np.mean(of_far > slow) <= high


def test_images_score_as_their_rows_do(world, detector):
    of_images, of_rows = detector.score(str(world.more)), detector.score(store=world.test)
    assert of_images.ids == of_rows.ids
    assert np.abs(of_images.score - of_rows.score).max() < 0.05 * of_rows.score.std()
    assert (of_images.is_ood == of_rows.is_ood).mean() > 0.98
    assert not of_images.failed.any()


def test_nearest_bank_images_are_the_most_similar_ones(world, detector):
    found = detector.score(store=world.test)
    bank, query = (Rows.of(each).take(np.arange(len(each))).astype(np.float64) for each in (world.train, world.test))
    cosine = (query / np.linalg.norm(query, axis=1)[:, None]) @ (bank / np.linalg.norm(bank, axis=1)[:, None]).T
    np.testing.assert_allclose(found.similarity, -np.sort(-cosine, axis=1)[:, :3], atol=1e-6)
    assert found.bank_ids == list(world.train.sample_ids)
    np.testing.assert_allclose(np.take_along_axis(cosine, found.nearest, 1), found.similarity, atol=1e-6)


def test_thirty_lines_load_it_where_featcache_cannot_be_imported(world, detector):
    """The README's very code, on the very files; its values are `detector score`'s."""
    code = re.search(r"```python\n(.*?)```", (detector.path / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.strip().splitlines()) <= 30
    assert code in (detector.path / "README.md").read_text()
    scored = detector.score(str(world.more))
    paths = [str(world.more / name) for name in scored.ids[::9]]
    Image.new("I;16", (20, 20), 40_000).save(detector.path.parent / "deep.png")  # Pillow would clip it, without a word
    deep = "\ntry:\n    score('../deep.png')\nexcept ValueError as error:\n    assert str(error) == '../deep.png: convert it to 8 bits first'\nelse:\n    raise SystemExit('clipped')"
    ask = f"{deep}\nfor path in {paths!r}:\n    found, ood, row = score(path)\n    print(json.dumps([float(found), bool(ood), [[i, float(c)] for i, c in nearest(row)]]))"
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED + code + ask], cwd=detector.path, capture_output=True, text=True, check=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    said = [json.loads(line) for line in ran.stdout.splitlines()]
    np.testing.assert_allclose([each[0] for each in said], scored.score[::9], rtol=1e-9)
    assert [each[1] for each in said] == scored.is_ood[::9].tolist()
    cosines = [[cosine for _, cosine in each[2]] for each in said]
    np.testing.assert_allclose(cosines, scored.similarity[::9], atol=1e-6)  # of rows so alike, float32 orders some anew
    assert {name for each in said for name, _ in each[2]} <= set(scored.bank_ids)


def test_without_an_encoder_the_lines_take_features(world, by_split):
    code = re.search(r"```python\n(.*?)```", (by_split.path / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(code.replace('FOLDER = "."', f"FOLDER = {str(by_split.path)!r}"), names)
    rows = Rows.of(world.far).take(np.arange(20))
    found, ood = names["score"](embedding=rows)
    np.testing.assert_array_equal(found, by_split.score(store=world.far).score)
    assert ood.all()
    with pytest.raises(ValueError, match=r"holds no encoder.*--encoder SPEC"):
        by_split.score(str(world.grey))


def test_the_split_is_seeded_and_keeps_rows_of_one_image_together(world):
    double = Rows.of([world.train, world.train])
    for seed in (0, 1):
        bank, held = split(double, 0.25, seed)
        assert len(bank) == 180
        assert len(held) == 60
        assert not {*bank.sample_ids} & {*held.sample_ids}
        assert split(double, 0.25, seed)[1].place.tolist() == held.place.tolist()
    assert split(double, 0.25, 0)[1].place.tolist() != split(double, 0.25, 1)[1].place.tolist()


def test_the_detector_is_not_fitted_to_what_it_holds_out(world, by_split):
    """With k = 1 a row in the bank would be its own neighbour, and score 0."""
    bank, held = split(Rows.of(world.train), 0.5, 0)
    unit = [
        each / np.linalg.norm(each, axis=1)[:, None]
        for each in (rows.take(np.arange(60)).astype(float) for rows in (bank, held))
    ]
    scores = np.sort(1 - (unit[1] @ unit[0].T).max(axis=1))
    assert by_split.threshold == pytest.approx(scores[by_split.record["threshold"]["rank"] - 1], abs=2e-7)
    assert by_split.record["held_out"]["by"] == "split"


def test_images_that_cannot_be_read_are_rows_with_their_reason(world, detector, tmp_path):
    new = tmp_path / 'new, "odd"'
    write_pictures(new, 2, {"red": (200, 60, 60)})
    (new / "broken.png").write_bytes((new / "red" / "000.png").read_bytes()[:60])
    Image.new("L", (50, 40), 90).save(new / "grey ü.png")
    Image.new("RGBA", (50, 40), (200, 60, 60, 9)).save(new / "a,b.png")
    Image.new("CMYK", (50, 40)).save(new / "cmyk.jpg")
    Image.new("RGB", (1, 1)).save(new / "one.png")
    Image.fromarray(np.full((40, 50), 300, np.uint16)).save(new / "deep.png")
    found = detector.score(str(new))
    assert [bool(reason) for reason in found.reason] == [name == "broken.png" for name in found.ids]
    for suffix in (".csv", ".json", ".parquet"):
        path = found.write(tmp_path / f"scores{suffix}")
        if suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            ids, scores = [row["id"] for row in rows], [float(row["score"] or "nan") for row in rows]
            assert [row["nearest_1"] for row in rows] != [""] * len(rows)
        else:
            rows = json.loads(path.read_text()) if suffix == ".json" else pq.read_table(path).to_pylist()
            ids, scores = (
                [row["id"] for row in rows],
                [np.nan if row["score"] is None else row["score"] for row in rows],
            )
        assert ids == found.ids
        np.testing.assert_array_equal(scores, found.score)
        assert [row["is_ood"] in (None, "") for row in rows] == found.failed.tolist()
        with pytest.raises(ValueError, match="already exists"):
            found.write(path)
    with pytest.raises(ValueError, match=r"give one of \.csv, \.json, \.parquet"):
        found.write(tmp_path / "scores.txt")


def test_failed_and_broken_rows_of_a_store_stay_where_they_are(world, detector, tmp_path):
    new = write_pictures(tmp_path / "new", 2, {"red": (200, 60, 60)})
    (new / "a.png").write_bytes(b"no image")
    store = featcache.extract(
        str(new), world.run, tmp_path / "new.zarr", precision="fp32", device="cpu", dtype="float32"
    )
    found = detector.score(store=store)
    assert found.ids == ["a.png", "red/000.png", "red/001.png"]
    assert found.failed.tolist() == [True, False, False]
    assert "cannot" in found.reason[0] or "not an image" in found.reason[0]


@pytest.mark.parametrize("file", ["detector.onnx", "bank.npy", "encoder.onnx", "bank.json"])
def test_a_damaged_folder_is_refused(copy, file):
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"{file}: is damaged"):
        evalsuite.load_detector(copy)
    (copy / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: is gone"):
        evalsuite.load_detector(copy)


def test_a_changed_record_is_refused(copy, tmp_path):
    record = json.loads((copy / "detector.json").read_text())
    record["threshold"]["value"] += 1
    (copy / "detector.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="is not as it was written"):
        evalsuite.load_detector(copy)
    (copy / "detector.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        evalsuite.load_detector(copy)
    with pytest.raises(ValueError, match=r"holds no detector.*detector fit"):
        evalsuite.load_detector(tmp_path / "nothing")


def test_stores_of_another_encoder_or_kept_otherwise_are_refused(world, detector, tmp_path):
    other = featcache.extract(
        str(world.grey), f"run:{write_student(tmp_path / 'other', weights=1)}", tmp_path / "o.zarr", precision="fp32",
        dtype="float32",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"was made by encoder run:.*/other .*; extract the store with that encoder"):
        detector.score(store=other)
    with pytest.raises(ValueError, match="was made by encoder"):
        evalsuite.fit_detector(world.train, tmp_path / "no", ood={"o": other}, k=1)
    with pytest.raises(ValueError, match=r"is encoder .*, .*id\.zarr was made by"):
        evalsuite.fit_detector(world.train, tmp_path / "no", k=1, encoder=f"run:{tmp_path / 'other'}")
    narrow = featcache.extract(str(world.grey), world.run, tmp_path / "n.zarr", precision="fp32", dtype="float16")
    with pytest.raises(ValueError, match="keeps embedding in float16"):
        detector.score(store=narrow)
    assert len(detector.score(store=narrow, any_precision=True)) == 20
    assert not (tmp_path / "no").exists()


def test_what_does_not_suit_is_refused_before_anything_is_written(world, tmp_path):
    out, small = tmp_path / "no", write_store(tmp_path / "small.zarr", np.random.default_rng(0).normal(size=(30, 4)))
    for given, said in (
        ({"store": small}, r"6 held-out ID rows are too few.*19 or more"),
        ({"keep": 95.0}, r"for 95 % give 0\.95"),
        ({"hold_out": 1.0}, "hold_out"),
        ({"detector": "ash"}, "needed|cannot be a graph"),
        ({"detector": "lof"}, r"cannot be a graph .*those that can: cosine_mean, .*mahalanobis_pp"),
        ({"detector": "lol"}, "lof"),
        ({"id": world.train}, r"is both the store and id|in .* too"),
        ({"ood": {"a/b": world.far}}, "cannot name an OOD set"),
        ({"ood": {"x": world.train}}, "is both"),
    ):
        with pytest.raises(ValueError, match=said):
            evalsuite.fit_detector(
                **{"store": world.train, "out": out, "encoder": "none", "k": 1 if "detector" not in given else None}
                | given
            )
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="already exists"):
        evalsuite.fit_detector(world.train, out, k=1)
    with pytest.raises(ValueError, match="is no detector's folder"):
        evalsuite.fit_detector(world.train, out, k=1, overwrite=True)
    assert (out / "thesis.txt").read_text() == "precious"


def test_a_detector_is_replaced_when_asked_for(world, copy, tmp_path):
    given = {"detector": "knn:k=1", "encoder": "none", "nearest": 0, "overwrite": True}
    assert (evalsuite.fit_detector(world.train, tmp_path / "none yet", **given).path / "detector.json").exists()
    made = evalsuite.fit_detector(world.train, copy, **given)
    assert {file.name for file in copy.iterdir()} == {"README.md", "detector.json", "detector.onnx"}
    assert made.score(store=world.far).nearest.shape == (20, 0)


def test_a_day_of_other_images_is_told_from_chance(world, detector):
    """Days of ID images are not beyond, a day of grey ones is; by counting."""
    of_id, of_far = detector.score(store=world.test), detector.score(store=world.far)
    both = detector.score(store=Rows.of([world.test, world.far]))
    days = ["2026-05-01"] * 45 + ["2026-05-02"] * 45 + ["2026-05-03"] * 20
    found = drift(detector, both, days, "by hand")
    assert [each.ood for each in found.days] == [of_id.is_ood[:45].sum(), of_id.is_ood[45:].sum(), of_far.is_ood.sum()]
    assert [each.day for each in found.beyond] == ["2026-05-03"]
    assert "2026-05-03 (20 of 20) is beyond what keep 0.9 gives" in found.statement()
    assert found.expected == pytest.approx(1 - 82 / 91)


@pytest.mark.parametrize("colour", COLOURS)
def test_each_class_is_mostly_kept(world, detector, colour):
    found = detector.score(store=world.test)
    here = np.array([name.startswith(colour) for name in found.ids])
    assert found.is_ood[here].mean() < 0.3


def test_logits_of_the_encoder_or_of_a_head_are_made_inside(world, tmp_path):
    """A student with a classifier gives two features; a head is part of the score."""
    run = f"run:{write_student(tmp_path / 'classifier', classes=['red', 'green', 'blue'])}"
    made = {"precision": "fp32", "device": "cpu", "dtype": "float32", "fields": ("embedding", "logits")}
    train, test = (
        featcache.extract(str(images), run, tmp_path / f"{images.name}.zarr", **made)
        for images in (world.id, world.more)
    )
    rows = Rows.of(train)
    head = Head(np.random.default_rng(0).normal(size=(3, 10)), np.zeros(3), np.arange(3), fingerprint=train.fingerprint)
    (tmp_path / "head.safetensors").write_bytes(head.to_bytes())
    for name, given in (("energy", {}), ("msp", {"head": tmp_path / "head.safetensors", "format": "safetensors"})):
        found = evalsuite.fit_detector(
            train, tmp_path / name, detector=name, keep=0.9, id=test, any_precision=False, nearest=1, **given
        )
        logits = head.logits(rows.take(np.arange(120))) if given else rows.take(np.arange(120), "logits").astype(float)
        by_hand = -np.log(np.exp(logits).sum(1)) if not given else 1 - (np.exp(logits).T / np.exp(logits).sum(1)).max(0)
        np.testing.assert_allclose(found.score(store=train).score, by_hand, rtol=1e-6)
        np.testing.assert_allclose(found.score(str(world.id)).score, by_hand, rtol=1e-3)
        assert found.record["encoder"]["checked"]["same_decision"] == 16


def test_an_encoder_of_weights_alone_scores_as_its_rows(world, detector, tmp_path):
    made = evalsuite.fit_detector(
        world.train, tmp_path / "weights", detector="mahalanobis++", keep=0.9, id=world.test, format="safetensors"
    )
    assert (made.path / "encoder.safetensors").exists()
    assert "evalsuite.load_detector" in (made.path / "README.md").read_text()
    assert made.threshold == detector.threshold
    rows = made.score(store=world.far).score
    np.testing.assert_allclose(made.score(str(world.grey)).score, rows, rtol=2e-3)
    with pytest.raises(ValueError, match="unknown format 'pickle'"):
        evalsuite.fit_detector(world.train, tmp_path / "no", k=1, format="pickle")


def test_an_encoder_that_is_an_onnx_file_goes_in_behind_its_preprocessing(world, tmp_path):
    student, record = load_student(world.root / "run")
    (tmp_path / "small").mkdir()
    write_onnx(tmp_path / "small", student, record, "fp32")
    store = featcache.extract(
        str(world.grey), f"onnx/{tmp_path / 'small'}", tmp_path / "s.zarr", device="cpu", dtype="float16"
    )
    given = {"detector": "knn:k=1", "keep": 0.5, "hold_out": 0.5}
    found = evalsuite.fit_detector(store, tmp_path / "detector", **given)
    assert found.record["encoder"]["checked"]["same_decision"] == 10
    of_images, of_rows = found.score(str(world.grey)), found.score(store=store)
    assert np.abs(of_images.score - of_rows.score).max() < 1e-5
    graph = open_graph(found.path / "encoder.onnx")(np.asarray(Image.open(world.grey / "grey" / "000.png")))
    np.testing.assert_array_equal(graph["embedding"], graph["embedding"].astype(np.float16))  # as the store keeps it
    with pytest.raises(ValueError, match="is a graph already"):
        evalsuite.fit_detector(store, tmp_path / "no", format="safetensors", **given)


def test_features_of_half_precision_need_images_to_be_believed(world, tmp_path):
    """Threshold and rows are of bf16, the folder's encoder is fp32: what that changes is seen, or has to be allowed."""
    images, given = (
        shutil.copytree(world.id, tmp_path / "images"),
        {"detector": "knn:k=1", "keep": 0.9, "format": "safetensors"},
    )
    store = featcache.extract(
        str(images), world.run, tmp_path / "half.zarr", precision="bf16", device="cpu", dtype="float32"
    )
    found = evalsuite.fit_detector(store, tmp_path / "seen", **given)
    assert found.record["encoder"]["checked"]["images"] == 16
    with pytest.raises(ValueError, match=r"is in .*fp32.*--any-precision"):
        found.score(store=world.far)
    images.rename(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"half\.zarr is in bf16.*no held-out image is there.*--any-precision"):
        evalsuite.fit_detector(store, tmp_path / "no", **given)
    found = evalsuite.fit_detector(store, tmp_path / "allowed", any_precision=True, **given)
    assert any("no held-out image" in line for line in found.record["remarks"])


def test_rows_that_are_not_finite_have_a_reason(make_store, tmp_path):
    rng = np.random.default_rng(0)
    new = rng.normal(size=(4, 5)).astype(np.float32)
    new[2, 1] = np.nan
    found = evalsuite.fit_detector(
        make_store("bank", rng.normal(size=(60, 5))), tmp_path / "d", detector="residual", keep=0.9, encoder="none"
    )
    scored = found.score(store=make_store("new", new), any_precision=True)
    assert scored.reason == ["", "", "its features are not finite", ""]
    assert np.isnan(scored.score).tolist() == [False, False, True, False]
    assert scored.is_ood.dtype == bool
    assert not scored.is_ood[2]


@pytest.fixture
def command(world, capsys, monkeypatch):
    """Runs one line in the world's folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(world.root)

    def run(line):
        monkeypatch.setattr(sys, "argv", ["evalsuite", "detector", *shlex.split(line)])
        with pytest.raises(SystemExit) as stopped:
            programs.run_evalsuite()
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, " ".join(err.split())

    return run


def test_the_commands_fit_score_and_watch(world, command, tmp_path):
    line = f"fit id.zarr --detector knn --k 2 --keep 0.9 --id more.zarr --ood grey=grey.zarr --encoder none --out '{tmp_path}/a b'"
    code, out, err = command(line)
    assert code == 0, err
    assert "threshold " in out
    assert "keeps 83.2% … 95.3% of ID images (95 %), by 90 held-out rows" in out
    assert "grey" in out
    assert command(line)[0] == 2
    code, out, err = command(f"score '{tmp_path}/a b' --store grey.zarr --out '{tmp_path}/s.csv' --json -")
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["rows"], summary["failed"], summary["ood"]) == (20, 0, 20)
    dates = tmp_path / "dates.csv"
    rows = [f"{name},2026-05-0{1 + (i >= 10)}" for i, name in enumerate(world.far.sample_ids)]
    dates.write_text("\n".join(["name,taken", *rows]))
    of = f"--dates '{dates}' --id-column name --date-column taken"
    code, out, err = command(f"drift '{tmp_path}/a b' --store grey.zarr {of} --json '{tmp_path}/d.json'")
    assert code == 0, err
    assert "2026-05-01 (10 of 10), 2026-05-02 (10 of 10) are beyond what keep 0.9 gives" in " ".join(out.split())
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["beyond"] == ["2026-05-01", "2026-05-02"]
    assert [day["ood"] for day in found["days"]] == [10, 10]
    code, out, err = command(f"drift '{tmp_path}/a b' --store more.zarr")  # by the times of the store's own files
    assert code == 0, err
    assert "in UTC" in out
    assert "no day is beyond what keep 0.9 gives" in " ".join(out.split())


def test_ids_come_back_from_a_table_whatever_is_in_them(tmp_path):
    ids = ["a,b", 'say "x"', "new\nline", "carriage\rreturn", "ü"]
    none = np.zeros((len(ids), 0))
    scored = Scored(ids, np.arange(5.0), np.zeros(5, bool), none.astype(int), none, [""] * 5, [])
    with scored.write(tmp_path / "s.csv").open(encoding="utf-8", newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ids


def test_a_dry_run_writes_nothing_and_scores_nothing(detector, command, tmp_path, monkeypatch):
    monkeypatch.setattr(DeployedDetector, "score", None)
    code, out, err = command(f"score 'a detector' --store grey.zarr --out '{tmp_path}/new/s.csv' --dry-run --json -")
    assert (code, json.loads(out)["rows"], list(tmp_path.iterdir())) == (0, 20, []), err
    code, out, err = command("drift 'a detector' --images grey --dry-run --json -")
    assert (code, json.loads(out)["rows"], len(json.loads(out)["days"])) == (0, 20, 1), err


def test_a_table_without_a_date_is_refused_before_anything_is_scored(detector, command, tmp_path, monkeypatch):
    monkeypatch.setattr(DeployedDetector, "score", None)
    (tmp_path / "dates.csv").write_text("id,date\ngrey/000.png,2026-05-01\n")
    code, _, err = command(f"drift 'a detector' --images grey --dates '{tmp_path}/dates.csv'")
    assert code == 2
    assert "has no date of 19 of 20 images" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("score 'a detector' --out s.csv", "give images (--images FOLDER) or a store (--store STORE), one of the two"),
        ("score 'a detector' --store grey.zarr --out s.txt", "give one of .csv, .json, .parquet"),
        ("score nothing --store grey.zarr --out s.csv", "nothing: holds no detector"),
        ("score 'a detector' --images nowhere/ --out s.csv", "nowhere/: no such folder"),
        ("fit id.zarr --keep 95 --out no", "for 95 % give 0.95"),
        ("fit id.zarr --ood grey --out no", "--ood ['grey']: give NAME=STORE"),
        ("fit nowhere.zarr --out no", "nowhere.zarr: no such store"),
        ("drift 'a detector' --store grey.zarr --dates none.csv", "none.csv: no such file"),
    ],
)
def test_what_commands_refuse_is_one_line(detector, command, line, said):
    code, _, err = command(line)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_the_documentation_shows_the_same_lines():
    text = (Path(__file__).parents[2] / "docs" / "detector.md").read_text(encoding="utf-8")
    assert f"```python\n{IMAGES}{NEIGHBOURS}```" in text
    assert all(f"`{name.replace('_pp', '++')}`" in text for name in deployable())
