"""What kind of machine computes: features of half precision have the same bits on one kind only."""

import platform

import torch


def machine_kind(device: str) -> str:
    """The GPU's name; of a CPU, its architecture and the vector instructions that PyTorch uses there."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    parts = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    for name in ("avx512_bf16", "amx_tile", "amx_fp16"):
        supported = getattr(torch.cpu, f"_is_{name}_supported", None)  # private: a release may drop one
        parts += [name] if supported and supported() else []
    return f"cpu {' '.join(parts)}"
