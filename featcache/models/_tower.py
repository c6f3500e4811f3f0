"""An image tower as a teacher: tokens of one layer, pooled in one way."""

import torch
from torch import Tensor

from featcache.models import Features, Model
from featcache.models._options import Options

Tokens = tuple[Tensor | None, Tensor | None]
"""Patch tokens (B, T, D), row-major over the patch grid, and prefix tokens (B, P, D): class token, then registers."""


class Tower(Model):
    """Gives "embedding" and, where the model has them, "tokens", "prefix_tokens" and "logits".

    A kind of model sub-classes it and says how such a model is run. The final spatial feature map of a convnet
    counts as tokens, one a position.

    Attributes:
        layers: how many blocks or stages can be asked for; 0 when only the last.
        kind: what `layers` counts: "block" or "stage".
        has_norm: there is a final norm that goes over the tokens of any layer.
        has_class_token: the first prefix token is the class token.
        own: in words, how the model itself makes its embedding.
        library: its name, for `output`.
        activation: what its weights change in the architecture, for `output`.
    """

    layers = 0
    kind = "stage"
    has_norm = False
    has_class_token = False
    own = "the model's own head"
    library = ""
    activation = ""

    def last(self, images: Tensor) -> tuple[Tensor, Tokens]:
        """What `head` takes, and the tokens of the last layer, after the final norm where there is one."""
        raise NotImplementedError

    def head(self, features: Tensor) -> Features:
        """The model's own "embedding" and, where it has a classifier, "logits"."""
        raise NotImplementedError

    def tap(self, images: Tensor, layer: int, norm: bool) -> Tokens:
        """The tokens of any layer, counted from 0."""
        raise NotImplementedError

    def choose(self, spec: str, options: Options) -> None:
        """Settle on layer, norm and pooling.

        Raises:
            ValueError: the model has no such layer, or not the tokens or the norm that it takes; the message says which.
        """
        self.spec, self.pool, self.norm = spec, options.pool, self.has_norm if options.norm is None else options.norm
        last = self.layers - 1
        self.layer = last
        if options.norm is not None and not self.has_norm:
            raise ValueError(f"{spec}: no final norm goes over its tokens; leave @norm out")
        if options.layer is not None:
            if not self.layers:
                raise ValueError(f"{spec}: this model gives its last layer only; leave @layer out")
            if not -self.layers <= options.layer <= last:
                raise ValueError(
                    f"{spec}: no such layer; its {self.kind}s are 0 to {last}, or -{self.layers} to -1 from the end"
                )
            self.layer = options.layer % self.layers
        self.whole = self.layer == last and self.norm == self.has_norm
        if self.pool == "default" and not self.whole:
            raise ValueError(
                f"{spec}: the model's own head belongs to its last layer after the final norm; "
                "add @pool=avg, @pool=token or @pool=token+avg"
            )
        if "token" in self.pool and not self.has_class_token:
            raise ValueError(f"{spec}: it has no class token; known: @pool=default, @pool=avg")

    def forward(self, images: Tensor) -> Features:
        if self.whole:
            features, (tokens, prefix) = self.last(images)
        else:
            tokens, prefix = self.tap(images, self.layer, self.norm)
        given = self.head(features) if self.pool == "default" else {"embedding": self._pooled(tokens, prefix)}
        if tokens is not None:
            given["tokens"] = tokens
        if prefix is not None and prefix.shape[1]:
            given["prefix_tokens"] = prefix
        return given

    def _pooled(self, tokens: Tensor | None, prefix: Tensor | None) -> Tensor:
        if tokens is None:
            raise ValueError(f"{self.spec}: this model gives no tokens; known: @pool=default")
        if self.pool == "avg":
            return tokens.mean(1)
        if prefix is None:
            raise ValueError(f"{self.spec}: no class token in that layer; known: @pool=avg")
        return prefix[:, 0] if self.pool == "token" else torch.cat([prefix[:, 0], tokens.mean(1)], 1)

    @property
    def output(self) -> str:  # type: ignore[override]
        """Layer, norm and pooling, in words."""
        layer = (
            f"last {self.kind}" if self.layer == self.layers - 1 else f"{self.kind} {self.layer} of 0–{self.layers - 1}"
        )
        if self.has_norm:
            layer += ", after the final norm" if self.norm else ", without the final norm"
        where = "patch tokens" if self.kind == "block" else "feature map"
        pooled = {
            "default": self.own,
            "token": "class token",
            "avg": f"mean of the {where}",
            "token+avg": f"class token and mean of the {where}, concatenated",
        }
        return f"{self.library}: {layer}; {pooled[self.pool]}{self.activation}"

    @torch.inference_mode()
    def shapes(self, size: int) -> dict[str, tuple[int, ...]]:
        """Shape of one image's features, seen on a black image of `size` px."""
        return {name: tuple(value.shape[1:]) for name, value in self.eval()(torch.zeros(1, 3, size, size)).items()}


def flat(feature_map: Tensor) -> Tensor:
    """(B, D, H, W) → (B, H·W, D), row-major, without copying."""
    return feature_map.flatten(2).transpose(1, 2)
