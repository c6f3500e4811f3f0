"""What may follow a model's name in its spec: `@layer=-2@pool=token+avg@norm=false@size=224`, in any order."""

import re
from dataclasses import dataclass
from typing import Any

from featcache.specs import options_in

POOLS = ("default", "token", "avg", "token+avg")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Which layer, pooling and image size a spec asks for.

    Attributes:
        layer: `@layer=`, index of a block or stage, negative from the end; None is the last.
        pool: `@pool=`, how its tokens become the embedding: "default" the model's own head, "token" the class token,
            "avg" the mean of the patch tokens, "token+avg" both concatenated (as DINOv2's linear probe has it).
        norm: `@norm=`, whether the model's final norm is applied to the tokens of that layer, as in DINOv2's
            `get_intermediate_layers(norm=True)`; None is "where there is one".
        size: `@size=`, side in px of the images; None is the model's own.
    """

    layer: int | None = None
    pool: str = "default"
    norm: bool | None = None
    size: int | None = None


PLAIN = Options()


def split_options(source: str, rest: str, known: tuple[str, ...] = ("layer", "pool", "norm")) -> tuple[str, Options]:
    """`rest` of a spec without its options, and those options.

    Raises:
        ValueError: an option that is not `known`, is given twice, or has no such value.
    """
    match = re.fullmatch(r"(.*?)((?:@\w+=[^@]*)*)", rest, re.DOTALL)
    assert match
    found: dict[str, Any] = {}
    for name, value in options_in(match[2], f"{source}/{rest}", known).items():
        where = f"{source}/{rest}: @{name}={value}"
        if name == "pool" and value not in POOLS:
            raise ValueError(f"{where}: no such pooling; known: {', '.join(POOLS)}")
        if name == "norm" and value not in ("true", "false"):
            raise ValueError(f"{where}: known: true, false")
        if name == "layer" and not re.fullmatch(r"-?\d+", value):
            raise ValueError(f"{where}: give the index of a block or stage, negative from the end (@layer=-2)")
        if name == "size" and not re.fullmatch(r"[1-9]\d*", value):
            raise ValueError(f"{where}: give a side in px (@size=224)")
        found[name] = int(value) if name in ("layer", "size") else value == "true" if name == "norm" else value
    return match[1], Options(**found)
