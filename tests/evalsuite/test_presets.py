import json
import sys

import numpy as np
import pytest

from evalsuite import ood
from evalsuite.presets import PRESETS, stores_of
from featcache_cli import programs


@pytest.fixture
def folder(tmp_path, make_store, rng):
    """All stores of openood-cifar100, and none but `cifar10c` of what else openood-cifar10 asks for."""
    for i, name in enumerate(
        ("cifar100_train", "cifar100_test", "cifar10", "tin", "mnist", "svhn", "texture", "places365")
    ):
        make_store(name, rng.normal(size=(12, 5)) + (i > 1) * i * np.eye(5)[i % 5])
    return tmp_path


def test_the_sets_are_openoods():
    """DATA_INFO of OpenOOD v1.5, `id` with its splits, as a list of sets for each benchmark."""
    small_far = ["mnist", "svhn", "texture", "places365"]
    large = {"near": ["ssb_hard", "ninco"], "far": ["inaturalist", "textures", "openimage_o"]}
    shifted = ["imagenet_v2", "imagenet_c", "imagenet_r"]
    expected = {
        "cifar10": {"near": ["cifar100", "tin"], "far": small_far, "csid": ["cifar10c"]},
        "cifar100": {"near": ["cifar10", "tin"], "far": small_far, "csid": []},
        "imagenet200": large | {"csid": shifted},
        "imagenet": large | {"csid": shifted},
    }
    for name, sets in expected.items():
        found = {part: list(names) for part, names in PRESETS[f"openood-{name}"].items()}
        assert found == {"id_train": [f"{name}_train"], "id_test": [f"{name}_test"]} | sets
    assert len(PRESETS) == len(expected)


def test_a_preset_is_its_stores(folder):
    given = {"detectors": ["knn"], "k": 3, "resamples": 5}
    by_preset = ood(preset="openood-cifar100", stores=folder, **given)
    by_hand = ood(
        id_train=folder / "cifar100_train.zarr",
        id_test=folder / "cifar100_test.zarr",
        near={name: folder / f"{name}.zarr" for name in ("cifar10", "tin")},
        far={name: folder / f"{name}.zarr" for name in ("mnist", "svhn", "texture", "places365")},
        **given,
    )
    assert by_preset.metrics == by_hand.metrics
    assert by_preset.inputs == by_hand.inputs
    assert (by_preset.parameters["preset"], by_hand.parameters["preset"]) == ("openood-cifar100", None)
    values = [by_preset.metrics[f"knn/far/{name}/auroc"].value for name in ("mnist", "svhn", "texture", "places365")]
    assert by_preset.metrics["knn/far/mean/auroc"].value == pytest.approx(np.mean(values), abs=1e-12)


def test_missing_stores_are_listed_with_their_commands(folder):
    with pytest.raises(ValueError, match="lacks 3 of the stores of openood-cifar10") as refused:
        stores_of("openood-cifar10", f"{folder}/")
    said = str(refused.value)
    assert "\n" not in said
    for images, name in (
        ("train_cifar10", "cifar10_train"),
        ("test_cifar10", "cifar10_test"),
        ("test_cifar100", "cifar100"),
    ):
        assert f"`featcache extract {images}.csv --teacher SPEC --out {folder}/{name}.zarr`" in said
    assert "benchmark_imglist/cifar10/" in said
    assert "tin" not in said.replace(str(folder), "")
    assert "cifar10c" not in said


def test_shifted_sets_are_taken_when_all_are_there(folder, make_store, rng):
    for name in (
        "imagenet200_train",
        "imagenet200_test",
        "ssb_hard",
        "ninco",
        "inaturalist",
        "textures",
        "openimage_o",
    ):
        make_store(name, rng.normal(size=(12, 5)))
    given = {"preset": "openood-imagenet200", "stores": folder, "k": 3, "resamples": 5}
    plain = ood(**given)
    assert not any("_fs/" in name for name in plain.metrics)
    make_store("imagenet_v2", rng.normal(size=(12, 5)))
    with pytest.raises(ValueError, match=r"lacks 2 of .*test_imagenet200_c\.csv .*imagenet_r\.zarr"):
        ood(**given)
    for name in ("imagenet_c", "imagenet_r"):
        make_store(name, rng.normal(size=(12, 5)))
    result = ood(**given)
    assert {name.split("/")[1] for name in result.metrics} == {"near", "far", "near_fs", "far_fs"}
    assert list(result.inputs["csid"]) == ["imagenet_v2", "imagenet_c", "imagenet_r"]
    own = ood(**given, csid={"mine": folder / "imagenet_c.zarr"})
    assert list(own.inputs["csid"]) == ["mine"]


def test_the_command_takes_a_preset(folder, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        ["evalsuite", "ood", "--preset", "openood-cifar100", "--stores", str(folder), "--k", "3", "--json", "-"],
    )
    with pytest.raises(SystemExit) as stopped:
        programs.run_evalsuite()
    out, _ = capsys.readouterr()
    assert not stopped.value.code
    assert "knn/near/tin/ap_out" in json.loads(out)["metrics"]
