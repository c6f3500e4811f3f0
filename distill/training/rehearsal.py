"""How long training may take: what a few images say of it, before the first step."""

import copy
import math
import time

import torch
from accelerate import Accelerator

from distill.training.schedule import train_mode
from distill.training.setup import Inputs

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
        passing = (
            views * method.passes * _seconds_of_pass(inputs, accelerator, torch.from_numpy(drawn.pixels)) / processes
        )
    except Exception:  # somebody's own student, or a full GPU: the run itself may do, or will say why not
        return math.nan
    whole, read = steps * size * passing, reading * pairs.renderings_in(settings.epochs)
    return whole + read if accelerator.device.type == "cpu" else max(whole, read)


def _seconds_of_pass(inputs: Inputs, accelerator: Accelerator, pixels: torch.Tensor) -> float:
    """Forward and backward of an image, the best of two after one that does not count."""
    device, best = accelerator.device, math.inf
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        student = copy.deepcopy(inputs.student).to(device).to(memory_format=torch.channels_last)
        train_mode(student)
        images = inputs.preprocess.to_model(pixels.to(device))
        for tried in range(3):
            began = time.perf_counter()
            with accelerator.autocast():
                found = student(images, inputs.method.student_fields)
            sum(each.float().mean() for each in found.values()).backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if tried:
                best = min(best, time.perf_counter() - began)
    return best / len(pixels)
