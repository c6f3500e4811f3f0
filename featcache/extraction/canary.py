"""The canary: whether another process computes the same bits, before it writes any."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Shaped

from featcache.encoder import Encoder


def canary_of(encoder: Encoder, pixels: Shaped[torch.Tensor, "n ..."], batch: int) -> dict[str, str]:
    """What this process makes of the first samples of a corpus, `bits`, and what they may depend on.

    The samples pass the encoder filled up to a whole `batch`, as all do, and once as the few that they are: kernels for a short
    batch tell one number of threads from another where those for a whole one do not.
    """
    digest = hashlib.blake2b(digest_size=16)
    for found in (encoder.encode_padded(pixels, batch, tuple(encoder.fields)), encoder.encode(pixels)):
        for name in sorted(found):
            digest.update(found[name].cpu().numpy().tobytes())
    on_gpu = encoder.device.type == "cuda"
    return {
        "bits": digest.hexdigest(),
        "threads": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(encoder.device) if on_gpu else "none",
        "torch": torch.__version__,
    }


def refuse_other_bits(path: str | Path, begun: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ValueError where the bits `here` are not those that the store at `path` was begun with; it names what else differs."""
    if begun["bits"] == here["bits"]:
        return
    others = [f"{name} {was}, here {here[name]}" for name, was in begun.items() if name != "bits" and here[name] != was]
    why = (
        "; ".join(others)
        or "threads, instructions and torch are the same, so the first images or a library may have changed"
    )
    raise ValueError(
        f"{path}: features computed here have other bits than those that it was begun with ({why}); "
        "take machines of one kind, or begin again with --overwrite"
    )
