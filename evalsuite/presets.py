"""The benchmarks of OpenOOD v1.5 by name: which stores are which sets.

Zhang et al. 2023, "OpenOOD v1.5", arXiv 2306.09301.
"""

from __future__ import annotations

import os

_LARGE = {
    "near": {"ssb_hard": "test_ssb_hard", "ninco": "test_ninco"},
    "far": {"inaturalist": "test_inaturalist", "textures": "test_textures", "openimage_o": "test_openimage_o"},
}
_SMALL = {
    "far": {"mnist": "test_mnist", "svhn": "test_svhn", "texture": "test_texture", "places365": "test_places365"},
}

PRESETS: dict[str, dict[str, dict[str, str]]] = {
    "openood-cifar10": {
        "id_train": {"cifar10_train": "train_cifar10"},
        "id_test": {"cifar10_test": "test_cifar10"},
        "near": {"cifar100": "test_cifar100", "tin": "test_tin"},
        **_SMALL,
        "csid": {"cifar10c": "test_cifar10c"},
    },
    "openood-cifar100": {
        "id_train": {"cifar100_train": "train_cifar100"},
        "id_test": {"cifar100_test": "test_cifar100"},
        "near": {"cifar10": "test_cifar10", "tin": "test_tin"},
        **_SMALL,
        "csid": {},
    },
    "openood-imagenet200": {
        "id_train": {"imagenet200_train": "train_imagenet200"},
        "id_test": {"imagenet200_test": "test_imagenet200"},
        **_LARGE,
        "csid": {
            "imagenet_v2": "test_imagenet200_v2",
            "imagenet_c": "test_imagenet200_c",
            "imagenet_r": "test_imagenet200_r",
        },
    },
    "openood-imagenet": {
        "id_train": {"imagenet_train": "train_imagenet"},
        "id_test": {"imagenet_test": "test_imagenet"},
        **_LARGE,
        "csid": {"imagenet_v2": "test_imagenet_v2", "imagenet_c": "test_imagenet_c", "imagenet_r": "test_imagenet_r"},
    },
}
"""By benchmark and part, the store of each set and the list of its images, OpenOOD's `benchmark_imglist/ID/LIST.txt`.

ID rows are its splits (`train`, `test`); its validation rows and sets are not used, as nothing is tuned. ImageNet-ES,
which its code has as one more covariate-shifted ImageNet, is not in its published tables and not here.
"""


def stores_of(preset: str, folder: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """The paths of the benchmark's stores, `FOLDER/NAME.zarr`, by part (`id_train`, `id_test`, `near`, `far`, `csid`)
    and name. `csid` is empty where the folder has none of these stores.

    Raises `ValueError` for an unknown preset or missing stores; the message has the commands that make them.
    """
    from featcache.plugins import suggest
    from featcache.store.files import files_at

    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; {suggest(preset, PRESETS)}")
    folder = os.fspath(folder).rstrip("/") or "/"
    there: dict[str, dict[str, str]] = {}
    missing: dict[str, dict[str, str]] = {}
    for part, sets in PRESETS[preset].items():
        paths = {name: f"{folder}/{name}.zarr" for name in sets}
        there[part] = {name: path for name, path in paths.items() if files_at(path).taken()}
        missing[part] = {sets[name]: path for name, path in paths.items() if name not in there[part]}
    if not there["csid"]:
        missing["csid"] = {}
    lacking = [each for part in missing.values() for each in part.items()]
    if lacking:
        commands = "; ".join(
            f"`featcache extract {images}.csv --teacher SPEC --out {path}`" for images, path in lacking
        )
        lists = f"benchmark_imglist/{preset.removeprefix('openood-')}"
        raise ValueError(
            f"{folder} lacks {len(lacking)} of the stores of {preset}; make them with {commands} "
            f"(each .csv: OpenOOD's {lists}/….txt as path,label)"
        )
    return there
