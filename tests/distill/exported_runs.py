"""Finished runs whose students know nothing, to be exported."""

import numpy as np
import torch

from distill.training.run import Run
from featcache.inputs.images import Preprocess
from featcache.store.from_arrays import write_store
from featcache.student import make_student

TEACHER = Preprocess(resize=40, crop=36, size=36, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def make_run_in(folder, spec="tiny", embedding_dim=10, image_size=None, patch_size=None, name="run", classes=None):
    """A finished run whose student's weights are random, norms' statistics too."""
    torch.manual_seed(0)
    student, _, record = make_student(
        spec,
        TEACHER,
        embedding_dim=embedding_dim,
        image_size=image_size,
        patch_size=patch_size,
        pretrained=False,
        classes=classes,
    )
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    if not (folder / "teacher.zarr").exists():
        write_store(folder / "teacher.zarr", np.ones((5, 4)))
    run = Run(folder / name)
    config = {"student": spec, "method": "tintem", "epochs": 2, "method_options": {"mapping_steps": 7}}
    stores = {"store": str(folder / "teacher.zarr"), "corpus": "digits:train", "teacher": "abc123"}
    run.open(config | stores, resume=False)
    run.log([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25, "holdout/gram_pearson": 0.75}])
    trained_on = {"samples": 4, "failed": 0, "held_out": 1, "views": "the plain view only"}
    made = {"method": "tintem", "teacher": "timm/resnet18.a1_in1k", "trained_on": trained_on}
    run.finish(student.state_dict(), record | made)
    return run
