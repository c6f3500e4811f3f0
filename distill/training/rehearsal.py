"""How long training may take: what a few images say of it, before the first step."""

import copy
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from distill.training.config import FitConfig
from distill.training.held_out import MOST_HELD_OUT
from distill.training.schedule import train_mode
from distill.training.setup import Inputs
from distill.training.step import make_accelerator
from featcache.inputs.images import Preprocess
from featcache.machine import resolve_device
from featcache.student import Student, make_student

TRIED = 8
"""Images, at most."""


def rehearse(inputs: Inputs, accelerator: Accelerator, steps: int) -> float:
    """Seconds that so many steps may take, about: images read and rendered, the student's passes over them. Not counted
    are a mapping's fit, the method's own terms and evaluations. NaN where the student cannot be tried.

    A copy of the student is tried; the run's weights and random numbers stay as they are.
    """
    settings, pairs, method = inputs.settings, inputs.pairs, inputs.method
    size, processes = min(settings.batch_size, len(pairs)), accelerator.num_processes
    few = min(TRIED, max(1, size // (processes * settings.accumulate)), len(pairs))
    began = time.perf_counter()
    (drawn,) = pairs.plain(range(few), batch_size=few)
    reading = (time.perf_counter() - began) / few
    views = (method.group or int(pairs.view_counts[0])) if method.pairing == "group" else 1
    try:
        images = inputs.preprocess.to_model(torch.from_numpy(drawn.pixels).to(accelerator.device))
        a_pass = _seconds_of_pass(inputs.student, images, method.student_fields, accelerator)
    except Exception:  # somebody's own student, or a full GPU: the run itself may do, or will say why not
        return math.nan
    passing = views * method.passes * a_pass / processes
    whole, read = steps * size * passing, reading * pairs.renderings_in(settings.epochs)
    return whole + read if accelerator.device.type == "cpu" else max(whole, read)


def seconds_of_training(
    settings: Mapping[str, Any], like: Preprocess, images: int, device: str, trust_code: bool = False
) -> float:
    """The same before there is a store, of the student's passes alone, over noise.

    Args:
        settings: of `FitConfig`.
        like: the teacher's preprocessing.
        images: of the corpus.
        device: "auto", "cpu" or "cuda".
    """
    config = FitConfig(**settings)
    device = resolve_device(device)
    bf16 = config.precision == "bf16" or (config.precision == "auto" and device == "cuda")
    accelerator = make_accelerator(device, "bf16" if bf16 else "fp32", [], "")
    student, preprocess, _ = make_student(
        config.student, like, image_size=config.image_size or None, trust_code=trust_code
    )
    training = images - min(MOST_HELD_OUT, round(config.holdout * images))
    size = min(config.batch_size, training)
    noise = torch.randint(0, 256, (min(TRIED, size), preprocess.size, preprocess.size, 3), dtype=torch.uint8)
    a_pass = _seconds_of_pass(student, preprocess.to_model(noise.to(device)), ("embedding",), accelerator)
    return config.epochs * max(1, training // config.batch_size) * size * a_pass


def _seconds_of_pass(
    student: Student, images: torch.Tensor, fields: tuple[str, ...], accelerator: Accelerator
) -> float:
    """Forward and backward of an image, the better of two after one that does not count."""
    device, best = accelerator.device, math.inf
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        tried = copy.deepcopy(student).to(device).to(memory_format=torch.channels_last)
        train_mode(tried)
        for number in range(3):
            began = time.perf_counter()
            with accelerator.autocast():
                found = tried(images, fields)
            torch.stack([each.float().mean() for each in found.values()]).sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if number:
                best = min(best, time.perf_counter() - began)
    return best / len(images)
