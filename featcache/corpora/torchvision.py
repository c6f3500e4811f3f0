"""torchvision's data sets, as they lie on disk; nothing is downloaded."""

import inspect
import io
import os
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featcache.corpora import Listed
from featcache.corpora._labels import from_numbers
from featcache.disk.plain import read_plain, require_listable
from featcache.plugins import suggest

PATHS = ("samples", "imgs", "_samples", "_image_files", "_images")
"""Where torchvision's file-based data sets keep their paths, some as (path, label) pairs."""
CIFAR_KEYS = frozenset({"batch_label", "labels", "fine_labels", "coarse_labels", "data", "filenames"}) | frozenset(
    {"num_cases_per_batch", "num_vis", "label_names", "fine_label_names", "coarse_label_names"}
)


class TorchVision(Listed):
    """`torchvision:NAME[:SPLIT[:ROOT]]`, for example `torchvision:CIFAR10:test` or `torchvision:Food101:train:/data`.

    ROOT is what torchvision calls root; by default $TORCHVISION_ROOT, else `data` in the working directory,
    where torchvision's own examples put it. A data set that is made of image files gives those files; one that
    is made of arrays gives lossless PNG files. The sample id is SPLIT/ROW, or the path below ROOT.
    """

    def __init__(self, rest: str):
        name, _, more = rest.partition(":")
        split, _, root = more.partition(":")
        self.spec = f"torchvision:{rest}"
        self.class_names: list[str] | None
        self._root = root or os.environ.get("TORCHVISION_ROOT") or "data"
        if name in ("CIFAR10", "CIFAR100"):
            self._source, self.labels, self.class_names = _cifar(self.spec, name, split, self._root)
            self._paths = None
        else:
            self._source = _open(self.spec, name, split, self._root)
            self._paths = _paths(self._source)
            self.labels, self.class_names = _labels(self.spec, self._source)
        if self._paths:
            require_listable(os.path.commonpath([os.path.dirname(path) for path in self._paths]))
            top = Path(self._root)
            places = (path.relative_to(top) if path.is_relative_to(top) else path for path in map(Path, self._paths))
            self.ids = [place.as_posix() for place in places]
        else:
            self.ids = [f"{split or 'all'}/{row:08d}" for row in range(len(self.labels))]

    def read(self, i: int) -> bytes:
        if self._paths:
            return read_plain(self._paths[i])
        image = self._source[i] if isinstance(self._source, np.ndarray) else self._source[i][0]
        buffer = io.BytesIO()
        # Not compressed, so that another release of zlib gives the same bytes, and so the same content hash.
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, "png", compress_level=0)
        return buffer.getvalue()


def _open(spec: str, name: str, split: str, root: str) -> Any:
    from torchvision import datasets

    if name not in datasets.__all__:
        raise ValueError(f"{spec}: torchvision has no data set {name!r}; {suggest(name, datasets.__all__)}")
    kind = getattr(datasets, name)
    known = inspect.signature(kind).parameters
    if name == "LSUN" or "root" not in known:
        raise ValueError(f"{spec}: {name} is not read here; write its images to a folder and open that")
    given: dict[str, Any] = {"root": root}
    if "download" in known:
        given["download"] = False
    if split and "split" in known:
        given["split"] = split
    elif "train" in known:
        if split not in ("train", "test"):
            raise ValueError(f"{spec}: no such split; give torchvision:{name}:train or torchvision:{name}:test")
        given["train"] = split == "train"
    elif split:
        raise ValueError(f"{spec}: {name} has no splits; give torchvision:{name}, or torchvision:{name}::ROOT")
    try:
        return kind(**given)
    except (RuntimeError, OSError) as error:
        raise _not_on_disk(spec, name, root, error) from None
    except (ValueError, TypeError) as error:  # a split it does not know, or an argument it cannot do without
        raise ValueError(f"{spec}: {' '.join(str(error).split())}; choose a split that {name} has") from None
    except ImportError as error:
        raise ValueError(f"{spec}: {error}; install what {name} needs") from None


def _not_on_disk(spec: str, name: str, root: str, error: object) -> ValueError:
    return ValueError(
        f"{spec}: not under {root} ({' '.join(str(error).split())}); set TORCHVISION_ROOT to where it is, or fetch it: "
        f"python -c \"from torchvision.datasets import {name}; {name}('{root}', download=True)\""
    )


def _paths(source: Any) -> list[str] | None:
    for attribute in PATHS:
        found = getattr(source, attribute, None)
        if isinstance(found, list) and len(found) == len(source):
            paths = [entry[0] if isinstance(entry, tuple) else entry for entry in found]
            if all(isinstance(path, str | os.PathLike) for path in paths):
                return [str(path) for path in paths]
    return None


def _labels(spec: str, source: Any) -> tuple[list[int], list[str] | None]:
    pairs: Any = next((getattr(source, a) for a in PATHS if hasattr(source, a)), [])
    found = [pair[1] for pair in pairs if isinstance(pair, tuple)]
    for attribute in ("targets", "labels", "_labels", "y"):
        if len(found) != len(source):
            found = getattr(source, attribute, [])
    if len(found) != len(source) or np.ndim(found) != 1 or not np.issubdtype(np.asarray(found).dtype, np.integer):
        return [-1] * len(source), None
    labels, numbers = from_numbers(np.asarray(found).tolist(), spec)
    names = getattr(source, "classes", None) or getattr(source, "categories", None) or []
    if len(names) < len(numbers or []):
        return labels, numbers
    return labels, [name if isinstance(name, str) else ", ".join(name) for name in names]


def _cifar(spec: str, name: str, split: str, root: str) -> tuple[np.ndarray, list[int], list[str]]:
    """Pixels (N, 32, 32, 3) uint8, labels and class names.

    CIFAR comes as pickles, which torchvision unpickles. Here the same files, once their checksums hold, are
    only scanned for the one long string and the one list of numbers that they are made of.
    """
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind = getattr(datasets, name)
    if split not in ("train", "test"):
        raise ValueError(f"{spec}: no such split; give torchvision:{name}:train or torchvision:{name}:test")
    folder = Path(root) / kind.base_folder

    def contents(file: str, md5: str) -> dict[str, list[Any]]:
        if not check_integrity(str(folder / file), md5):
            raise _not_on_disk(spec, name, root, f"{folder / file} is missing or damaged")
        return _scan((folder / file).read_bytes())

    label_key = "labels" if name == "CIFAR10" else "fine_labels"
    batches = [contents(file, md5) for file, md5 in (kind.train_list if split == "train" else kind.test_list)]
    labels = [label for batch in batches for label in batch[label_key]]
    raw = b"".join(max(_strings(batch["data"]), key=len).encode("latin1") for batch in batches)
    pixels = np.frombuffer(raw, np.uint8).reshape(len(labels), 3, 32, 32).transpose(0, 2, 3, 1)
    names = contents(kind.meta["filename"], kind.meta["md5"])[kind.meta["key"]]
    return np.ascontiguousarray(pixels), labels, _strings(names)


def _scan(pickled: bytes) -> dict[str, list[Any]]:
    """The strings and the integers that stand after each of CIFAR's keys in a pickled dictionary."""
    found: dict[str, list[Any]] = {}
    here: list[Any] = []
    for code, argument, _ in pickletools.genops(pickled):
        if code.name not in ("SHORT_BINSTRING", "BINSTRING", "BININT", "BININT1", "BININT2"):
            continue
        if argument in CIFAR_KEYS:
            here = found.setdefault(argument, [])
        else:
            here.append(argument)
    return found


def _strings(values: list[Any]) -> list[str]:
    return [value for value in values if isinstance(value, str)]


open_corpus = TorchVision
