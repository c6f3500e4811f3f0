""" "Did it work?", answered during the run on samples that are held out of training.

evalsuite measures with more care and with intervals, on stores of the finished student; here, small sets in memory.
"""

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn import functional as F

from distill.methods import Batch, Features, Method
from distill.methods._next_token import asked
from distill.objectives import resized
from distill.pairs import Drawn, Pairs
from featcache.corpora import original
from featcache.rows import Rows
from featcache.store import FeatureStore

MOST_HELD_OUT = 1_000
BANK_ROWS = 20_000
"""Training samples among which neighbours are looked for, at most: drawn once, the same for every evaluation."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
EVALUATION_BATCH = 256


def same_images(rows: Rows) -> Int64[np.ndarray, " n"]:
    """The same number for rows of the same image; a corrupted or adversarial one is the same as that which it was made of."""
    images, (corpus, in_guise) = rows.images(), _guises(rows.stores)
    if not in_guise.any():
        return images
    store = np.empty(len(rows), np.int64)
    for number in range(len(rows.stores)):
        store[rows.of_store(number)] = number
    root = list(range(int(images.max()) + 1))

    def root_of(number: int) -> int:
        while root[number] != number:
            number = root[number]
        return number

    samples = list(zip(corpus[store].tolist(), rows.sample_ids.tolist(), strict=True))
    shared = {samples[row] for row in np.flatnonzero(in_guise[store])}
    first: dict[tuple[int, str], int] = {}
    for sample, image in zip(samples, images.tolist(), strict=True):
        if sample in shared:
            root[root_of(image)] = root_of(first.setdefault(sample, image))
    return np.array([root_of(image) for image in images.tolist()], np.int64)


def _guises(stores: Sequence[FeatureStore]) -> tuple[Int64[np.ndarray, " s"], Bool[np.ndarray, " s"]]:
    """The same number for stores whose rows of one id are of one sample, in whatever guise; and which ones are of images that
    were made of others. Samples are the same where all ids and labels of the corpora are, or where they, or what they were made
    of, lie in one place."""
    specs = [store.manifest.corpus.spec for store in stores]
    made_of = [original(spec) if spec else None for spec in specs]
    known: list[set[str]] = []
    for store, spec, of in zip(stores, specs, made_of, strict=True):
        place, digest = of or spec, store.manifest.corpus.digest
        known.append({*([os.path.realpath(place)] if place else []), *([digest] if digest else [])})
    corpus = np.arange(len(stores))
    for number, names in enumerate(known):
        for earlier in range(number):
            if names & known[earlier]:
                corpus[corpus == corpus[number]] = corpus[earlier]
    return corpus, np.array([of is not None for of in made_of])


def split(
    images: Int64[np.ndarray, " samples"], share: float, seed: int, never: Bool[np.ndarray, " samples"] | None = None
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " m"]]:
    """Which samples train and which are held out, both in order: a fixed random `share`, at most 1,000.

    Args:
        images: the same number for samples of the same image. Of each image that is held out one sample is; the others
            are in neither part, since a student that trains on one has seen them all.
        never: samples that are not held out, and of which there is no share.

    Raises:
        ValueError: one of the two would be too few.
    """
    samples = len(images)
    order = np.random.default_rng([seed, samples]).permutation(samples)
    if never is not None:
        order = order[~never[order]]
    drawn = np.sort(order[: min(MOST_HELD_OUT, round(share * len(order)))])
    held = drawn[np.sort(np.unique(images[drawn], return_index=True)[1])]
    trained = np.flatnonzero(~np.isin(images, images[held]))
    if share and not (len(held) >= 4 and len(trained)):
        raise ValueError(
            f"holdout {share} of {samples} samples holds out {len(held)}; at least 4 are needed for an evaluation, "
            "and some to train on"
        )
    return trained, held


class HeldOut:
    """Measures a student on held-out samples, in the teacher's plain view.

    Args:
        held: the samples held out.
        trained: those trained on; neighbours are looked for among them.
        method: says what the student's target is.
        seed: of the neighbours' draw.
    """

    def __init__(self, held: Pairs, trained: Pairs, method: Method, seed: int):
        self._held, self._trained, self._method = held, trained, method
        bank = np.random.default_rng(seed).permutation(len(trained))[:BANK_ROWS]
        self._bank = np.sort(bank[trained.rows.labels[bank] >= 0])
        self._labels = torch.from_numpy(held.rows.labels)
        self._teacher_top1: float | None = None

    @torch.no_grad()
    def measure(self, embed: Callable[[Drawn], tuple[Features, Batch]]) -> dict[str, float]:
        """`embed` gives the student's embeddings and, of its classifier, logits, float32, and the batch, on the method's device.

        Returns:
            "holdout/gram_pearson": correlation of the cosines between samples, student's and teacher's. Where the
            method has a target, "holdout/cosine": mean cosine to it. Where there are labels, "holdout/top1@20": kNN
            accuracy, and "holdout/teacher_top1@20" of the teacher's own embeddings; where there is a classifier too,
            "holdout/top1", its accuracy, and "holdout/nll", its mean cross-entropy, in nats. Of masks "holdout/iou", the mean
            over the classes that there are of intersection over union of all pixels, at the student's own size. Of a language model
            "holdout/token_nll", nats a token of all that follow another.
        """
        fields = tuple(dict.fromkeys(("embedding", *self._method.fields)))
        students, teachers, cosines, logits = [], [], [], []
        pixels: list[Tensor] = []
        tokens: list[Tensor] = []
        for batch in self._held.plain(range(len(self._held)), batch_size=EVALUATION_BATCH, fields=fields):
            given, seen = embed(batch)
            student = given["embedding"]
            logits += [given["logits"].cpu()] if "logits" in given else []
            pixels += [confusion(given["dense"], seen.mask).cpu()] if seen.mask is not None else []
            tokens += [token_nll(given["token_logits"], seen).cpu()] if "token_logits" in given else []
            target = self._method.target(seen)
            if target is not None:
                cosines.append(F.cosine_similarity(student, target, dim=-1).cpu())
            students.append(student.cpu())
            teachers.append(seen["embedding"].cpu())
        student, teacher_rows = torch.cat(students), torch.cat(teachers)
        found = {"holdout/gram_pearson": gram_pearson(student, teacher_rows)}
        if cosines:
            found["holdout/cosine"] = float(torch.cat(cosines).mean())
        if tokens:
            nats, count = torch.stack(tokens).sum(0).tolist()
            found["holdout/token_nll"] = nats / count if count else math.nan
        if pixels:
            found["holdout/iou"] = mean_iou(torch.stack(pixels).sum(0))
        known = self._labels >= 0
        if logits and known.any():
            of_known, truth = torch.cat(logits)[known], self._labels[known]
            found["holdout/top1"] = float((of_known.argmax(dim=1) == truth).double().mean())
            found["holdout/nll"] = float(F.cross_entropy(of_known.double(), truth))
        if known.any() and len(self._bank) >= NEIGHBOURS:
            labels = torch.from_numpy(self._trained.rows.labels[self._bank])
            bank = [embed(batch) for batch in self._trained.plain(self._bank, batch_size=EVALUATION_BATCH)]
            rows = torch.cat([output["embedding"].cpu() for output, _ in bank])
            found["holdout/top1@20"] = knn_top1(rows, labels, student[known], self._labels[known])
            if self._teacher_top1 is None:
                of_teacher = torch.cat([seen["embedding"].cpu() for _, seen in bank])
                self._teacher_top1 = knn_top1(of_teacher, labels, teacher_rows[known], self._labels[known])
            found["holdout/teacher_top1@20"] = self._teacher_top1
        return {name: value for name, value in found.items() if math.isfinite(value)}


def token_nll(logits: Float[Tensor, "b t c"], seen: Batch) -> Float64[Tensor, " 2"]:
    """(sum of −ln of the probabilities of the tokens that follow another, how many these are)."""
    next_token = asked(seen)
    nats = F.cross_entropy(next_token.answers(logits), next_token.token, ignore_index=-1, reduction="sum")
    return torch.stack([nats.double(), next_token.known.sum().double()])


def confusion(logits: Float[Tensor, "b c h w"], mask: Int64[Tensor, "b s s"]) -> Int64[Tensor, "c c"]:
    """By true class, by predicted class, how many pixels."""
    known, classes = mask >= 0, logits.shape[1]
    predicted = resized(logits, mask.shape[1:]).argmax(1)
    return torch.bincount(mask[known] * classes + predicted[known], minlength=classes**2).view(classes, classes)


def mean_iou(counts: Int64[Tensor, "c c"]) -> float:
    """Over the classes that some pixel is of, or is taken for; NaN for no pixels."""
    right = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - right
    return float((right / union)[union > 0].mean())


def knn_top1(
    bank: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    query: Float[Tensor, "m d"],
    truth: Int64[Tensor, " m"],
) -> float:
    """Share of `query` rows whose 20 nearest rows by cosine vote for the right class, each with weight exp(cosine / 0.07)."""
    similarity, nearest = (F.normalize(query) @ F.normalize(bank).T).topk(NEIGHBOURS)
    votes = torch.zeros(len(query), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], ((similarity - 1) / TEMPERATURE).exp())
    return float((votes.argmax(1) == truth).float().mean())


def gram_pearson(left: Float[Tensor, "n d"], right: Float[Tensor, "n e"]) -> float:
    """Pearson correlation of the off-diagonal entries of the two matrices of cosines, -1…1; NaN where one is constant."""
    one, other = (
        (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
        for unit in (F.normalize(rows.double()) for rows in (left, right))
    )
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])
