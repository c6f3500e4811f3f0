"""Two processes with half a batch each, averaged as DistributedDataParallel does, are one process with the whole batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from method_cases import CASES, label
from torch import Tensor, distributed, multiprocessing, nn

from distill.methods import Batch
from distill.objectives import gathered
from distill.testing.methods import (
    CLASSES,
    ROWS,
    STUDENT,
    batch_of,
    build,
    classified,
    read_token_rows,
    shown_texts,
    teacher_batch,
    together,
    total,
    write_token_rows,
)
from featcache.rows import Rows

PROCESSES, STEPS, PIXELS = 2, 2, 5


class Training(nn.Module):
    """A linear student and a method, so that DDP sees the weights of both."""

    def __init__(self, method: nn.Module):
        super().__init__()
        torch.manual_seed(4)
        self.student, self.method = nn.Linear(PIXELS, STUDENT), method

    def forward(self, images: dict[str, Tensor], teacher: Batch) -> Tensor:
        given = {name: self.student(value) for name, value in images.items()}
        given = classified(given, self.method.student_fields)
        return total(self.method.loss(given, teacher))


def gradients(case, source: Rows, rank: int = 0, processes: int = 1) -> list[dict[str, Tensor]]:
    """Of each of a few steps, without moving; a queue goes on."""
    method, _ = build(*case, source)
    training = model = Training(method)
    if processes > 1:
        model = nn.parallel.DistributedDataParallel(training)
    samples = ROWS * together(method)
    mine = slice(rank * samples // processes, (rank + 1) * samples // processes)
    found = []
    for step in range(STEPS):
        drawn = torch.Generator().manual_seed(step)
        shapes = {
            "embedding": (samples, PIXELS),
            "tokens": (samples, 9, PIXELS),
            "dense": (samples, CLASSES, 3, PIXELS),
        }
        fields = [name for name in method.student_fields if name in shapes]
        images = {name: torch.randn(shapes[name], generator=drawn)[mine] for name in fields}
        whole = teacher_batch(source, method.fields, step * together(method), together(method))
        whole = shown_texts(method, whole)
        label = torch.cat([torch.full((5,), -1), whole.label[5:]])  # the first process has half as many labels
        row = torch.arange(ROWS).repeat_interleave(together(method))
        teacher = batch_of({name: value[mine] for name, value in whole.features.items()}, row[mine], label[mine])
        teacher = replace(
            teacher, weight=torch.linspace(0.5, 2, samples)[mine], inputs=whole.inputs[mine], mask=whole.mask[mine]
        )
        model.zero_grad()
        model(images, teacher).backward()
        found.append({name: weight.grad.clone() for name, weight in training.named_parameters()})
    return found


def gathered_gradient(rank: int) -> tuple[Tensor, Tensor]:
    """Rows 2r and 2r + 1, and what the loss Σ (r + 1) · rows² of every process r makes of them."""
    rows = torch.arange(6.0).reshape(2, 3).add(6 * rank).requires_grad_()
    everyone = gathered(rows)
    ((rank + 1) * everyone**2).sum().backward()
    return everyone.detach(), rows.grad


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    source = read_token_rows(Path(folder))
    found = {label(case): gradients(case, source, rank, PROCESSES) for case in CASES}
    torch.save({"methods": found, "gathered": gathered_gradient(rank)}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    write_token_rows(folder, views=8)
    multiprocessing.spawn(process, (str(folder),), PROCESSES)
    return folder


@pytest.mark.parametrize("case", CASES, ids=label)
def test_the_averaged_gradient_is_that_of_the_whole_batch(folder, case):
    alone = gradients(case, read_token_rows(folder))
    for rank in range(PROCESSES):
        together = torch.load(folder / f"{rank}.pt")["methods"][label(case)]
        for step in range(STEPS):
            assert together[step].keys() == alone[step].keys()
            for name, gradient in alone[step].items():
                assert gradient.abs().max() > 1e-6, name
                torch.testing.assert_close(together[step][name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_gathered_rows_are_in_the_order_of_ranks_and_their_gradients_are_sums(folder):
    for rank in range(PROCESSES):
        everyone, gradient = torch.load(folder / f"{rank}.pt")["gathered"]
        assert torch.equal(everyone, torch.arange(12.0).reshape(4, 3))
        assert torch.equal(gradient, (1 + 2) * 2 * everyone[2 * rank : 2 * rank + 2])
