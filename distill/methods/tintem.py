"""TinTeM (arXiv 2411.15239; later CosPress): the teacher is brought into the student's space, not the other way round."""

import inspect
from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor

from distill.mappings import FeatureMapping, load_mapping, orthogonality, restored
from distill.methods import Batch, Features, Method, Preparing
from distill.methods._heads import make_head
from distill.methods._tokens import check_tokens, class_and_patches, resize_tokens
from distill.objectives import TEMPERATURES, cosines, gathered, match, relation_kl
from featcache.rows import Rows
from featcache.store.layout import EMBEDDING


class TinTeM(Method):
    """Cosine to the teacher, mapped into the student's space by vMF-SNE (TinTeM / CosPress, arXiv 2411.15239).

    Head: the mapping, teacher side, fed by relation_kl alone. The student has no head; it is used as it is trained, and
    fed by match(cosine) alone. So the mapping may as well be fitted from the store before training, and frozen.

    Terms: "cosine", 1 − cos(student, mapped teacher), of the class token. "tokens", the same of class token and patch
    tokens as one vector an image. "sne", relation_kl between the teacher's cosines within the batch and the mapped
    ones; "sne_tokens", within each image's tokens, mean over images. "relation", see below. The paper's full loss is
    the first four, that is `joint` and `tokens`; of the student's tokens, the class token is its embedding.

    Options:
        mapping: a name from `distill/mappings/`, fitted to the pooled embeddings and used for tokens too.
        mapping_start, mapping_layer_norm, mapping_steps, mapping_batch_size, mapping_lr: of a mapping that has them; its
            own where left out.
        temperatures: of the neighbour distributions of "sne" and "sne_tokens", and of such a mapping.
        joint: as in the paper, LayerNorm + Linear trains beside the student instead of the mapping.
        tokens: with patch tokens. The teacher's class token is its first prefix token, where the store has some, else
            its embedding. The grid of mapped tokens is resampled to the student's.
        relation: weight of relation_kl between the cosines of the teacher itself within the batch and the student's,
            so that the student also hears of what the mapping lost; 0.3 is a good start. Not in the paper.
        relation_temperatures: of that term.
    """

    points = True

    def __init__(
        self,
        teacher_dim: int,
        student_dim: int,
        *,
        mapping: str = "sne",
        mapping_start: str | None = None,
        mapping_layer_norm: bool | None = None,
        mapping_steps: int | None = None,
        mapping_batch_size: int | None = None,
        mapping_lr: float | None = None,
        temperatures: Sequence[float] = TEMPERATURES,
        joint: bool = False,
        tokens: bool = False,
        relation: float = 0.0,
        relation_temperatures: Sequence[float] = (0.05, 0.1),
    ):
        super().__init__()
        given = {
            "start": mapping_start,
            "layer_norm": mapping_layer_norm,
            "steps": mapping_steps,
            "batch_size": mapping_batch_size,
            "lr": mapping_lr,
        }
        self._options = {name: value for name, value in given.items() if value is not None}
        for name, value in {"relation": relation, "mapping_steps": mapping_steps}.items():
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        for name, value in {"mapping_batch_size": mapping_batch_size, "mapping_lr": mapping_lr}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        for name, values in (("temperatures", temperatures), ("relation_temperatures", relation_temperatures)):
            if not values or not all(value > 0 for value in values):
                raise ValueError(f"{name} must be one or more numbers greater than 0, got {list(values)}")
        found = load_mapping(mapping)
        self._mapping_class: Callable[..., FeatureMapping] = found
        self._student_dim, self.turns = student_dim, joint or found.turns
        unknown = [f"mapping_{name}" for name in self._options if name not in self._known]
        if unknown:
            raise ValueError(f"mapping {mapping} has no {', '.join(unknown)}; leave it out")
        if joint and (mapping != "sne" or self._options):
            raise ValueError("with joint the head trains beside the student; leave out mapping and its options")
        self._temperatures, self._joint, self._tokens = tuple(temperatures), joint, tokens
        self._relation, self._relation_temperatures = relation, tuple(relation_temperatures)
        self.fields = self.student_fields = (EMBEDDING, "tokens") if tokens else (EMBEDDING,)
        self.mapping = make_head("layernorm_linear", teacher_dim, student_dim) if joint else None

    @property
    def _known(self) -> set[str]:
        return set(inspect.signature(self._mapping_class).parameters)

    def prepare(self, rows: Rows, **given: Unpack[Preparing]) -> dict[str, float]:
        """Fit the mapping, or take the one that is fitted already; with `joint` there is nothing to fit.

        Raises:
            ValueError: the store lacks tokens of the embedding's width, or does not suit the mapping.
        """
        if self._tokens:
            check_tokens(rows)
            prefix = all("prefix_tokens" in store.manifest.fields for store in rows.stores)
            self.fields = (EMBEDDING, "tokens", "prefix_tokens") if prefix else (EMBEDDING, "tokens")
        if self._joint:
            return {}
        options = {"temperatures": self._temperatures, "seed": given["seed"]}
        options = {name: value for name, value in options.items() if name in self._known}
        mapping = self._mapping_class(self._student_dim, **options, **self._options)
        if fitted := given.get("fitted"):
            tensors = {name.removeprefix("mapping."): tensor for name, tensor in fitted[0].items()}
            self.mapping = restored(mapping, tensors, rows.embedding_dim)
            if self.mapping:
                return fitted[1]
        self.mapping = mapping.fit(rows, given.get("progress")).module()
        return {**orthogonality(mapping.weight_), **getattr(mapping, "report_", {})}

    def target(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._map(self._class_token(batch))

    def loss(self, student: Features, batch: Batch) -> dict[str, Tensor]:
        class_token = self._class_token(batch)
        mapped = self._map(class_token)
        terms = {"cosine": match(student[EMBEDDING], mapped.detach(), "cosine")}
        if self._joint:
            terms["sne"] = self._sne(gathered(class_token), gathered(mapped))
        if self._tokens:
            patches = self._map(batch["tokens"])
            goal = class_and_patches(mapped, resize_tokens(patches, student["tokens"].shape[1])).detach()
            output = class_and_patches(student[EMBEDDING], student["tokens"])
            terms["tokens"] = match(output.flatten(1), goal.flatten(1), "cosine")
            if self._joint:
                seen = class_and_patches(class_token, batch["tokens"])
                terms["sne_tokens"] = self._sne(seen, class_and_patches(mapped, patches))
        if self._relation:
            target, output = gathered(batch[EMBEDDING]), gathered(student[EMBEDDING])
            terms["relation"] = self._relation * relation_kl(
                cosines(target, target), cosines(output, output), temperatures=self._relation_temperatures
            )
        return terms

    def _class_token(self, batch: Batch) -> Tensor:
        return batch["prefix_tokens"][:, 0] if "prefix_tokens" in self.fields else batch[EMBEDDING]

    def _map(self, features: Tensor) -> Tensor:
        assert self.mapping is not None, "prepare comes before loss and target"
        return self.mapping(features)

    def _sne(self, seen: Tensor, mapped: Tensor) -> Tensor:
        return relation_kl(cosines(seen, seen), cosines(mapped, mapped), temperatures=self._temperatures)
