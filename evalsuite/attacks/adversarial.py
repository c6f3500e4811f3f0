"""Accuracy of an encoder and a linear head under attack: projected gradient descent on the pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from evalsuite.accuracy import guessing
from evalsuite.judged import near_chance
from featcache.classes import Classes, columns_of
from featcache.head import Head
from featcache.pgd import STRIDE, Box, ascend, log_odds, refuse_epsilon

if TYPE_CHECKING:
    from featcache import Corpus, Encoder
else:  # `import featcache.encoder` brings torch: too slow for an annotation
    Corpus = Encoder = Any

_BATCH = {"cpu": 16, "cuda": 64}  # activations are kept for the gradient: fewer images than extraction takes


class Pgd:
    """L∞ attacks on the classifier `head`(encoder(image)), for the images and labels of one corpus.

    White-box projected gradient ascent on the cross-entropy with respect to the pixels at the encoder's input size,
    from a uniformly random start in the ε-ball: `steps` steps of 2.5 ε / `steps` along the gradient's sign, each put
    back into the ball and into the pixel range. It is an attack, no proof: a stronger one may find less accuracy
    (`evalsuite/attacks/autoattack.py`).

    `epsilons` are in 1/255 of the pixel range, at least 0.5; 0, the clean accuracy, is always measured too. `head` is a
    file of `evalsuite.probe`; labels are matched to its classes by name where it has names, else by number.

    Raises `ValueError` when there is no head, it has one class or does not know a class of the corpus, an ε is out of
    range, or `steps` is not positive.

    Madry et al. 2018, arXiv 1706.06083.
    """

    name = "pgd"

    def __init__(
        self, epsilons: Sequence[float | int], steps: int, head: str | os.PathLike[str] | None, corpus: Corpus
    ) -> None:
        for epsilon in epsilons:
            refuse_epsilon(epsilon)
        if steps < 1:
            raise ValueError(f"{steps} steps of the attack: give at least 1")
        if head is None:
            raise ValueError(
                "the attack needs a classifier: fit one with `evalsuite probe … --save FILE` and give it as --head FILE"
            )
        self.epsilons = sorted({0.0, *map(float, epsilons)})
        self.steps = steps
        self.head = Head.read(head)
        if len(self.head.labels) < 2:
            raise ValueError(f"{head} has one class; an attack needs another one: fit a head to two or more")
        self._corpus = corpus
        self._target = _target(self.head, corpus)

    def chance(self, rows: Int[np.ndarray, " n"]) -> float:
        """What the best answer that is the same for all of these rows would reach, were they not attacked."""
        return guessing(self._target[rows], np.arange(len(self.head.labels)))

    def remarks(self, measured: Mapping[str, Bool[np.ndarray, " n"]], rows: Int[np.ndarray, " n"]) -> list[str]:
        """One line where the clean accuracy of what was `measured` on these rows is next to chance."""
        accuracy, chance = float(measured[f"{self.name}/0/top1"].mean()), self.chance(rows)
        if not near_chance(accuracy, chance, len(rows)):
            return []
        return [
            f"head {self.head.name}: right on {accuracy:.4f} of the clean images, next to chance ({chance:.4f}): its "
            "classes, their order or its encoder seem to be others, and the attack says nothing"
        ]

    def measure(
        self,
        encoder: Encoder,
        rows: Int[np.ndarray, " n"],
        *,
        seed: int = 0,
        batch_size: int | None = None,
        workers: int | None = None,
        device: str = "auto",
        progress: Callable[[int], None] | None = None,
    ) -> dict[str, Bool[np.ndarray, " n"]]:
        """Whether the head is right about these labelled rows of the corpus, under `NAME/EPS/top1` for each ε.

        The encoder works in fp32; it is handed back on the device and in the precision it came in. An image's start is
        drawn from (its id, `seed`), whatever the batch. `progress` is called with the attacks done: images × ε.

        Raises `ValueError` when an image cannot be read, the encoder lets no gradient through to the pixels, or gives
        what is not finite.
        """
        from featcache.extraction.samples import prefetch
        from featcache.machine import cores, resolve_device
        from featcache.precision import full_fp32

        device = resolve_device(device)
        size = batch_size or _BATCH[device]
        correct = {f"{self.name}/{epsilon:g}/top1": np.zeros(len(rows), bool) for epsilon in self.epsilons}
        before = encoder.device, encoder.precision
        encoder.to(device)
        try:
            with ThreadPoolExecutor(workers or cores()) as pool, full_fp32(encoder.device):
                images = prefetch(lambda row: self._read(int(row), encoder), rows, pool, 2 * size)
                for begin in range(0, len(rows), size):
                    batch = rows[begin : begin + size]
                    pixels = np.stack([next(images) for _ in batch])
                    target = self._target[batch]
                    ids = [self._corpus.ids[int(row)] for row in batch]
                    for done, (epsilon, right) in enumerate(zip(self.epsilons, correct.values(), strict=True), 1):
                        attacked = pixels.astype(np.float32)
                        if epsilon > 0:
                            attacked = self.attacked(encoder, pixels, target, epsilon, ids, seed)
                        logits = logits_of(encoder, self.head, attacked)
                        right[begin : begin + size] = logits.argmax(axis=1) == target
                        if progress:
                            progress(begin * len(self.epsilons) + done * len(batch))
        finally:
            encoder.to(*before)
        return correct

    def attacked(
        self,
        encoder: Encoder,
        pixels: UInt8[np.ndarray, "batch size size 3"],
        target: Int[np.ndarray, " batch"],
        epsilon: float,
        ids: Sequence[str],
        seed: int,
    ) -> Float[np.ndarray, "batch size size 3"]:
        """As `attack`, from starts that are drawn from the samples' ids and `seed`."""
        start = np.stack([unit_start(name, seed, pixels.shape[1:]) for name in ids])
        return attack(encoder, self.head, pixels, target, start, epsilon, self.steps)

    def record(self) -> dict[str, Any]:
        """What a result file says about the attack."""
        return {"norm": "linf", "epsilons": self.epsilons, "steps": self.steps, "stride": STRIDE}

    def _read(self, row: int, encoder: Encoder) -> UInt8[np.ndarray, "size size 3"]:
        from featcache.extraction.samples import Wanted, read_sample
        from featcache.inputs import Views

        sample = read_sample(self._corpus, row, Views(), [Wanted(encoder.image_input)])
        if sample.seen[0] is None or sample.seen[0].pixels is None:
            raise ValueError(
                f"{self._corpus.ids[row]} can no longer be read ({sample.reason}); bring {self._corpus.spec} back"
            )
        return sample.seen[0].pixels[0]


def attack(
    encoder: Encoder,
    head: Head,
    pixels: UInt8[np.ndarray, "batch size size 3"],
    target: Int[np.ndarray, " batch"],
    start: Float[np.ndarray, "batch size size 3"],
    epsilon: float,
    steps: int,
) -> Float[np.ndarray, "batch size size 3"]:
    """Attacked pixels, float32 in 0…255, none further than `epsilon` (in the same unit) from `pixels`.

    `target` holds rows of the head's weight; `start` is in [-1, 1], in units of `epsilon`.

    Raises `ValueError` when the encoder lets no gradient through to the pixels.
    """
    import torch

    x = torch.from_numpy(pixels).to(encoder.device).float()
    weight, bias = (torch.from_numpy(part).to(x) for part in (head.weight, head.bias))
    own = torch.from_numpy(target).to(x.device)

    def against(at: Any) -> Any:
        embedding = embedding_of(encoder, at)
        if not embedding.requires_grad:
            raise ValueError(
                f"{encoder.name} lets no gradient through to its pixels; use an encoder without no_grad or detach"
            )
        return log_odds(torch.nn.functional.linear(embedding, weight, bias), own).sum()

    at = x + epsilon * torch.from_numpy(start).to(x)
    at = ascend(against, at, Box.around(x, epsilon, 0, 255), step=STRIDE * epsilon / steps, steps=steps)
    return at.cpu().numpy()


def logits_of(
    encoder: Encoder, head: Head, pixels: Float[np.ndarray, "batch size size 3"]
) -> Float[np.ndarray, "batch classes"]:
    """The head's logits, float64, of pixels in 0…255. Raises `ValueError` where they are not finite."""
    import torch

    with torch.no_grad():
        embedding = embedding_of(encoder, torch.from_numpy(pixels).to(encoder.device)).cpu().numpy()
    logits = head.logits(embedding)
    if not np.isfinite(logits).all():
        raise ValueError(f"{encoder.name} gives what is not finite, or such gradients; it cannot be attacked in fp32")
    return logits


def unit_start(sample_id: str, seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "size size 3"]:
    """Uniform in [-1, 1), float32."""
    digest = hashlib.blake2b(f"{sample_id}\0pgd\0{seed}".encode(), digest_size=16).digest()
    drawn = np.random.default_rng(int.from_bytes(digest, "little")).random(shape, np.float32)
    return 2 * drawn - 1


def embedding_of(encoder: Encoder, pixels: Any) -> Any:
    """As `Encoder.encode` in fp32, of float pixels (B, S, S, 3) in 0…255 and with their gradient."""
    import torch

    moments = encoder.image_input.mean, encoder.image_input.std
    mean, std = (torch.tensor(each, device=pixels.device).mul(255) for each in moments)
    return encoder.module(((pixels - mean) / std).permute(0, 3, 1, 2).contiguous())["embedding"].float()


def _target(head: Head, corpus: Corpus) -> Int[np.ndarray, " n"]:
    """For each sample the row of the head's weight that stands for its class; -1 for samples without a label."""
    labels = np.array([corpus.label(i) for i in range(len(corpus))], np.int64)
    return columns_of(head, labels, Classes(corpus.spec, np.unique(labels[labels >= 0]), corpus.class_names))
