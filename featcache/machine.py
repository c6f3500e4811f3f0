"""The machine at hand: what computes, its cores, its memory."""

import contextlib
import ctypes
import os
import platform
import sys
from pathlib import Path

import torch

PROC = Path("/proc")
CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where Linux tells a container, by versions 2 and 1 of control groups, what memory it may have, has, and could give up."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def resolve_device(device: str) -> str:
    """ "cpu" or "cuda" for "auto", which takes a GPU when there is one.

    Raises:
        ValueError: no such device, or none here.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {device!r}; known: auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def machine_kind(device: str) -> str:
    """The GPU's name; of a CPU, its architecture and the vector instructions that PyTorch uses there.

    Features of half precision have the same bits on one kind only.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    parts = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    for name in ("avx512_bf16", "amx_tile", "amx_fp16"):
        supported = getattr(torch.cpu, f"_is_{name}_supported", None)  # private: a release may drop one
        parts += [name] if supported and supported() else []
    return f"cpu {' '.join(parts)}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> int:
    """Memory that can be had: free, or held by a page cache that the kernel gives up; of a container, within its limit.
    4 GiB where the system does not say (macOS, Windows)."""
    try:
        told = dict(line.split(":", 1) for line in (PROC / "meminfo").read_text().splitlines())
        free = 1024 * int(told["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 4 * 2**30
    for folder, limit, used, given_up in CONTAINERS:
        with contextlib.suppress(OSError, KeyError, ValueError):  # not of this kind, or "max"
            cache = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())[given_up]
            free = min(free, int(Path(folder, limit).read_text()) - int(Path(folder, used).read_text()) + int(cache))
    return max(free, 0)


def keep_freed_memory() -> None:
    """Tell glibc to serve large blocks from its heap and never trim it, not to hand them back to the kernel after every
    layer. Elsewhere: nothing.

    A forward pass on a CPU allocates and frees every activation. By default glibc maps large blocks anew
    each time, and the kernel zeroes every page of them. Holds for the whole process, whose memory then stays at
    its peak, measured a fifth higher than before. `benchmarks/allocator.py` measures what it brings.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
