"""What an evaluator hands back, and the JSON file it is kept in."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One number and, where one is defined, its 95 % interval.

    Both are finite: a measurement that is not a number has no place in a result file (`ValueError`).
    """

    value: float
    ci95: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(x) for x in (self.value, *(self.ci95 or ()))):
            raise ValueError(f"a metric must be finite, got value={self.value}, ci95={self.ci95}")


@dataclass
class Result:
    """The outcome of one evaluator: what went in, how it was measured, what came out.

    `inputs` names every store by path and encoder fingerprint, with its row counts; `parameters` holds
    whatever changes the numbers (k, temperature, seed, …); `metrics` maps a metric's name to its `Metric`.
    """

    command: str
    inputs: dict[str, Any]
    parameters: dict[str, Any]
    metrics: dict[str, Metric]
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Strict JSON (no NaN or Infinity); floats survive the round trip bit for bit.

        Raises `ValueError` when a parameter is not finite.
        """
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON to `path` at once: readers see the old file or the new one, never half of one."""
        target = Path(path)
        text = self.to_json()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Result:
        """Read a file written by `write`.

        Raises `ValueError` when the file is not a result.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            metrics = {
                name: Metric(float(entry["value"]), None if entry["ci95"] is None else tuple(entry["ci95"]))
                for name, entry in record["metrics"].items()
            }
            return cls(record["command"], record["inputs"], record["parameters"], metrics, record["versions"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a result file ({error}); write one with `evalsuite COMMAND … --json {path}`"
            ) from error


def versions(*distributions: str) -> dict[str, str]:
    """Versions of Python, of this project and of the named distributions that are installed."""
    found = {"python": platform.python_version()}
    for name in ("featcache", "numpy", *distributions):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
