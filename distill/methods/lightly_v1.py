"""The first distillation of lightly-train: what the teacher finds similar among the samples of recent batches."""

from typing import Unpack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.methods import Batch, Features, Method, Preparing
from distill.objectives import cosines, gathered, kl
from featcache.rows import Rows

SAMPLES = (50, 100, 250, 500, 1000, 2000, 4000, 10_000, 20_000)
QUEUES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""lightly-train's queue for fewer samples than 50, than 100, …, and for 20 000 or more."""


class LightlyV1(Method):
    """KL between similarities to a queue of teacher embeddings (lightly-train's v1; after SEED, arXiv 2101.04731).

    KL(softmax(cos(teacher, queue) / τ) ‖ softmax(cos(head(student), queue) / τ)), mean over samples. The queue takes
    the batch in before the loss is taken, and is all zeros at first. Processes share one queue of the whole batch.

    Head: Linear on the student's side, fed by kl, trained with the student and left behind after training.

    Options:
        queue: embeddings kept, the newest; 0 chooses by the number of samples, from 16 to 8192.
        temperature: τ.
    """

    def __init__(self, teacher_dim: int, student_dim: int, *, queue: int = 0, temperature: float = 0.07):
        super().__init__()
        if queue < 0:
            raise ValueError(f"queue must not be negative, got {queue}")
        if not temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {temperature}")
        self._temperature = temperature
        self.head = nn.Linear(student_dim, teacher_dim)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        self.queue: Tensor
        self.register_buffer("queue", torch.zeros(queue, teacher_dim))

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        size = len(self.queue) or QUEUES[np.searchsorted(SAMPLES, len(rows), side="right")]
        self.queue = self.queue.new_zeros(size, self.queue.shape[1])
        return {"queue": float(size)}

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        """In training mode the batch enters the queue."""
        if self.training:
            self._enqueue(F.normalize(gathered(batch["embedding"].detach()), dim=-1))
        to_queue = [cosines(rows, self.queue) for rows in (batch["embedding"], self.head(student["embedding"]))]
        return {"kl": kl(*to_queue, temperature=self._temperature)}

    def _enqueue(self, unit: Tensor) -> None:
        size = len(self.queue)
        self.queue = torch.cat([unit[:size], self.queue[: max(0, size - len(unit))]])
