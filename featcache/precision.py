"""How an encoder computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """How an encoder computes: the weights' dtype, bf16 autocast or not, and the images' memory layout."""

    weights: torch.dtype
    autocast: bool = False
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def name(self) -> str:
        """For example "fp32", "bf16-autocast+channels_last": what `--precision` takes and the manifest stores."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.weights]
        return ("bf16-autocast" if self.autocast else dtype) + ("+channels_last" if self.channels_last else "")


FP32 = Precision(torch.float32)
CANDIDATES = {
    p.name: p
    for p in (
        FP32,
        Precision(torch.float32, channels_last=True),
        Precision(torch.bfloat16, channels_last=True),
        Precision(torch.float32, autocast=True, channels_last=True),
        Precision(torch.float16, channels_last=True),
    )
}


@contextmanager
def full_fp32(device: torch.device) -> Iterator[None]:
    """On a GPU, fp32 is fp32 and kernels are deterministic: convolutions would round to TF32, matrix products too where
    the program has asked PyTorch for that."""
    if device.type != "cuda":
        yield
        return
    asked = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(asked)
