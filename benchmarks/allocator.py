"""Does keeping freed memory pay? A bare forward pass with and without it, in turn, each in a process of its own.

python benchmarks/allocator.py
"""

import subprocess
import sys
import time


def main() -> None:
    for _ in range(3):
        default, kept = (float(subprocess.check_output([sys.executable, __file__, way])) for way in ("default", "kept"))
        print(f"glibc's default {default:.1f} images/s, freed memory kept {kept:.1f}, ratio {kept / default:.2f}")


def images_per_second(way: str) -> float:
    """EfficientNet-Lite0, fp32, channels_last, batch 16, about two seconds."""
    import timm
    import torch

    from featcache.machine import keep_freed_memory

    if way == "kept":
        keep_freed_memory()
    model = timm.create_model("tf_efficientnet_lite0").eval().to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 224, 224).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(images)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < 2:
            model(images)
            count += len(images)
    return count / (time.perf_counter() - began)


if __name__ == "__main__":
    print(images_per_second(sys.argv[1])) if len(sys.argv) > 1 else main()
