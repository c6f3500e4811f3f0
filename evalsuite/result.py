"""What an evaluator hands back, and the JSON file it is kept in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt64

from featcache.disk import durable
from featcache.disk.refusals import require_writable


@dataclass(frozen=True)
class Metric:
    """One number and its 95 % interval, or in `no_ci95` why it has none.

    Both are finite: a measurement that is not a number has no place in a result file (`ValueError`).
    """

    value: float
    ci95: tuple[float, float] | None = None
    no_ci95: str | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.value, *(self.ci95 or ()))):
            raise ValueError(f"a metric must be finite, got value={self.value}, ci95={self.ci95}")


@dataclass
class Result:
    """The outcome of one evaluator: what went in, how it was measured, what came out.

    `inputs` names every store by path and encoder fingerprint, with its row counts; `parameters` holds
    whatever changes the numbers (k, temperature, seed, …); `metrics` maps a metric's name to its `Metric`.
    `samples` holds what was measured of each sample, which a report draws and a comparison pairs by `sample_id`:

    - knn and probe: `sample_id` (n,) and, for each accuracy, whether the sample was right, under the metric's name.
    - classify: the same; under `classify/nll` that of each sample, under `classify/ece` the probability of the predicted class,
      under `classify/selective_top1@C` whether it is among the surest; the first two also under `classify/calibrated/…`.
    - robustness: the same under `clean/top1@K`, `CORRUPTION/SEVERITY/top1@K` and `pgd/EPS/top1` or
      `autoattack/EPS/top1`.
    - ood, SET being `id_test`, `near/NAME`, `far/NAME` or `csid/NAME`: `sample_id/SET` (n,), `score/DETECTOR/SET` (n,), and
      `map/SET` (n, 2): unit embeddings on the two principal directions of `id_train`.
    - all of them: `content` (n,), of ood `content/SET`: the first 8 bytes of the encoded image's hash as a whole number,
      0 where there is no image, by which a comparison knows that both saw the same image.

    `remarks` holds what to know before believing a number (the same image on both sides, rows left out, …), a line each,
    in words that stand alone; none where there is nothing to say. Commands print them and reports show them.
    """

    command: str
    inputs: dict[str, Any]
    parameters: dict[str, Any]
    metrics: dict[str, Metric]
    versions: dict[str, str] = field(default_factory=dict)
    samples: dict[str, np.ndarray] = field(default_factory=dict, compare=False)
    remarks: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Strict JSON (no NaN or Infinity); floats survive the round trip bit for bit.

        Raises `ValueError` when a parameter is not finite.
        """
        record = asdict(replace(self, samples={}))
        del record["samples"]
        for metric in record["metrics"].values():
            if metric["no_ci95"] is None:
                del metric["no_ci95"]
        if self.samples:
            record["samples"] = _digest(self.samples)
        return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON to `path`, and `samples` beside it (`r.json`: `r.samples.npz`).

        Readers see an old file or a new one, never half of one. Raises `ValueError` where no file can be made at `path`.
        """
        target = Path(path)
        text = self.to_json().encode()
        require_writable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.samples:
            with whole_file(samples_file(target)) as file:
                np.savez_compressed(file, **self.samples)  # type: ignore[arg-type]
        else:
            samples_file(target).unlink(missing_ok=True)
        with whole_file(target) as file:
            file.write(text)
        return target

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Result:
        """Read a file written by `write`; without samples where their file is not beside it.

        Raises `ValueError` when there is no file, or one that is not what `write` writes, or the samples are another
        result's.
        """
        if Path(path).is_dir():
            raise ValueError(f"{path} is a folder; give result files (.json)")
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
            metrics = {
                name: Metric(
                    float(entry["value"]),
                    None if entry["ci95"] is None else _ends(entry["ci95"]),
                    entry.get("no_ci95"),  # files of earlier versions do not say why
                )
                for name, entry in record["metrics"].items()
            }
            record.setdefault("remarks", [])  # results of before there were any
            result = cls(
                record["command"], record["inputs"], record["parameters"], metrics, record["versions"],
                remarks=record["remarks"],
            )  # fmt: skip
            kinds = {"command": str, "inputs": dict, "parameters": dict, "versions": dict, "remarks": list}
            for name, kind in kinds.items():
                if not isinstance(record[name], kind):
                    raise TypeError(f"{name} is no {kind.__name__}")
            if not all(isinstance(remark, str) for remark in record["remarks"]):
                raise TypeError("a remark is no str")
            for name in ("detectors", "failed_detectors", "chance"):
                if not isinstance(record["parameters"].get(name, {}), dict):
                    raise TypeError(f"parameters: {name} is no dict")
            if not all(isinstance(given, dict) for given in record["parameters"].get("detectors", {}).values()):
                raise TypeError("parameters: a detector's arguments are no dict")
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist; write it with `evalsuite COMMAND … --json {path}`") from None
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a result file ({error}); write one with `evalsuite COMMAND … --json {path}`"
            ) from error
        result.samples, digest = _read_samples(samples_file(Path(path))), record.get("samples")
        if not _fitting(result) or (result.samples and digest not in (None, _digest(result.samples))):
            raise ValueError(
                f"{samples_file(Path(path))} does not fit {path}: it is of another result; "
                f"run the same `evalsuite {result.command}` command again with --json {path}"
            )
        return result


def _ends(ci95: Sequence[float]) -> tuple[float, float]:
    low, high = map(float, ci95)
    if low > high:
        raise ValueError(f"an interval from {low} to {high}")
    return low, high


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def refuse_inputs(path: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]]) -> None:
    """Raise `ValueError` where writing a result or a page to `path` would replace one of the files `inputs`, or the
    samples beside one."""
    read = {os.path.realpath(file) for each in inputs for file in (each, samples_file(Path(each)))}
    if read & {os.path.realpath(path), os.path.realpath(samples_file(Path(path)))}:
        raise ValueError(f"cannot write {path} (it is one of this command's other files); give another path")


def samples_file(path: Path) -> Path:
    """Of `r.json` r.samples.npz; of any other name, all of it stays, so that no two results share their samples."""
    return path.parent / f"{path.name.removesuffix('.json')}.samples.npz"


def _digest(samples: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, of in sorted(samples.items()):
        digest.update(f"{name} {of.dtype.str} {of.shape}".encode())
        digest.update(np.ascontiguousarray(of).tobytes())
    return digest.hexdigest()


def content_of(rows: Any) -> UInt64[np.ndarray, " n"]:
    """What `samples` holds under `content`, of `featcache.rows.Rows`."""
    return np.ascontiguousarray(rows.content[:, :8]).view(np.uint64)[:, 0]


def _fitting(result: Result) -> bool:
    """Whether the samples are of metrics that the result has, and every array has a row for each sample of its set."""
    ids = {name: of.size for name, of in result.samples.items() if name.partition("/")[0] == "sample_id"}
    rows = {name.removeprefix("sample_id"): size for name, size in ids.items()}
    for name, of in result.samples.items():
        if not any(name.endswith(key) and of.shape[:1] == (n,) for key, n in rows.items()):
            return False
    if "sample_id" in ids:
        return result.samples.keys() - {"sample_id", "content"} <= result.metrics.keys()
    scores = {name for name in result.samples if name.startswith("score/")}
    detectors = {name.split("/")[1] for name in scores}
    measured = {name.partition("/")[0] for name in result.metrics}
    return detectors <= measured and scores == {f"score/{spec}{key}" for spec in detectors for key in rows}


def _read_samples(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is damaged; write it again with the command that made {path.stem.removesuffix('.samples')}.json"
        ) from error


@contextmanager
def whole_file(target: Path) -> Iterator[IO[bytes]]:
    """A file that is at `target` once it is written and on the disk."""
    try:
        with durable.whole_file(target) as file:
            yield file
    except OSError as error:
        raise OSError(f"cannot write {target} ({error.strerror or error}); give another path") from error


def versions(*distributions: str) -> dict[str, str]:
    """Versions of Python, of this project and of the named distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in ("featcache", "numpy", *distributions):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
