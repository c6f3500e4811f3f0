"""AutoAttack on an encoder and a linear head, as the Adversarial Robustness Toolbox implements its attacks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from evalsuite.attacks.adversarial import Pgd, embedding_of

if TYPE_CHECKING:
    from featcache import Corpus, Encoder
else:  # `import featcache.encoder` brings torch: too slow for an annotation
    Corpus = Encoder = Any

STEPS, QUERIES = 100, 5000
"""Of each gradient attack; of the one that only sees logits, for each image. The paper's."""


class AutoAttack(Pgd):
    """Parameter-free L∞ attacks one after another, each on the images that are still classified rightly.

    APGD on cross-entropy, APGD on the difference of logits ratio (where there are three classes or more), both with
    100 steps from one random start, and Square Attack with 5,000 queries an image: the paper's ensemble without FAB, and
    with APGD untargeted. Much slower than PGD: on a CPU, seconds for each image of 32 px and a small student. What is drawn
    follows from the batch's ids and the seed. `pip install 'featcache[adversarial]'`.

    Raises as `Pgd`, and `ValueError` when the package is missing.

    Croce & Hein 2020, arXiv 2003.01690; Andriushchenko et al. 2020, arXiv 1912.00049.
    """

    name = "autoattack"

    def __init__(self, epsilons: Sequence[float | int], head: str | os.PathLike[str] | None, corpus: Corpus) -> None:
        super().__init__(epsilons, STEPS, head, corpus)
        try:
            import art.attacks.evasion  # noqa: F401
        except ImportError:
            raise ValueError("AutoAttack needs `pip install 'featcache[adversarial]'`") from None

    def attacked(
        self,
        encoder: Encoder,
        pixels: UInt8[np.ndarray, "batch size size 3"],
        target: Int[np.ndarray, " batch"],
        epsilon: float,
        ids: Sequence[str],
        seed: int,
    ) -> Float[np.ndarray, "batch size size 3"]:
        """Attacked pixels, float32 in 0…255, none further than `epsilon` from `pixels`."""
        import torch
        from art.attacks.evasion import AutoAttack as Ensemble
        from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
        from art.estimators.classification import PyTorchClassifier

        classes, size = len(self.head.labels), pixels.shape[1]
        weight, bias = (
            torch.from_numpy(part).to(encoder.device).float() for part in (self.head.weight, self.head.bias)
        )

        class Whole(torch.nn.Module):
            def forward(self, images: Any) -> Any:
                return torch.nn.functional.linear(embedding_of(encoder, images.permute(0, 2, 3, 1)), weight, bias)

        classifier = PyTorchClassifier(
            Whole(),
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=(3, size, size),
            nb_classes=classes,
            clip_values=(0.0, 255.0),
            device_type="gpu" if encoder.device.type == "cuda" else "cpu",
        )
        shared: dict[str, Any] = {"norm": np.inf, "eps": epsilon, "batch_size": len(pixels), "verbose": False}
        losses = ["cross_entropy", "difference_logits_ratio"] if classes > 2 else ["cross_entropy"]
        attacks: list[Any] = [
            AutoProjectedGradientDescent(
                classifier, eps_step=epsilon / 4, max_iter=self.steps, nb_random_init=1, loss_type=loss, **shared
            )
            for loss in losses
        ]
        attacks.append(SquareAttack(classifier, max_iter=QUERIES, nb_restarts=1, **shared))
        ensemble = Ensemble(classifier, norm=np.inf, eps=epsilon, attacks=attacks, batch_size=len(pixels))
        images = pixels.transpose(0, 3, 1, 2).astype(np.float32)
        before = np.random.get_state()
        np.random.seed([seed, *np.frombuffer("\0".join(ids).encode(), np.uint8)])
        try:
            found = ensemble.generate(images, y=np.eye(classes, dtype=np.float32)[target])
        finally:
            np.random.set_state(before)
        within = np.clip(found, images - epsilon, images + epsilon).clip(0, 255)
        return np.ascontiguousarray(within.transpose(0, 2, 3, 1), np.float32)

    def record(self) -> dict[str, Any]:
        """What a result file says about the attack."""
        return {"norm": "linf", "epsilons": self.epsilons, "steps": self.steps, "queries": QUERIES}
