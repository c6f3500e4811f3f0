"""`bag/DIM`, a student of texts to be trained: the mean of its tokens' vectors of DIM numbers, and two layers behind it.

`bag/DIM@of=TEACHER`: the vectors begin as what that encoder of the same tokeniser makes of each token alone, as in Model2Vec
(Tulkens and van Dongen 2024).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from featcache.inputs.texts import Texts
from featcache.models import Model, Variant
from featcache.models._texts import TextStudent, pooled, recorded_texts, text_options, trained_here, width_of
from featcache.plugins import load_plugin, plugin_names

AT_ONCE = 256
"""Tokens of a teacher's forward pass."""


class Bag(nn.Module):
    """Token ids (B, L), −1 behind the end of each text → (B, width)."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.vectors = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch width"]:
        found: Tensor = self.layers(pooled(self.vectors(ids.clamp(min=0)), ids >= 0, "mean"))
        return found


def open_model(rest: str) -> Model:
    raise trained_here(f"bag/{rest}")


def make_model(rest: str, variant: Variant) -> TextStudent:
    variant.refuse_all_but_size(f"bag/{rest}")
    texts, (name, options) = variant.of_texts(f"bag/{rest}"), text_options("bag", rest, ("of",))
    width = width_of("bag", name)
    network = Bag(texts.vocabulary, width)
    student = TextStudent(f"bag/{width}", network, texts, {"vocabulary": texts.vocabulary})
    if teacher := options.get("of"):
        network.vectors.weight.data = token_vectors(f"bag/{rest}", teacher, texts, width)
        student.remark = f"bag/{width}: its token vectors begin as what {teacher} makes of each token alone"
    return student


def rebuild_model(rest: str, record: Mapping[str, Any]) -> TextStudent:
    width, (texts, vocabulary) = width_of("bag", rest), recorded_texts(record)
    return TextStudent(f"bag/{width}", Bag(vocabulary, width), texts, {"vocabulary": vocabulary})


@torch.no_grad()
def token_vectors(spec: str, teacher: str, texts: Texts, width: int) -> Float[Tensor, "vocabulary width"]:
    """The first `width` principal components of a teacher's embeddings of every token alone, of mean square 1.

    Raises:
        ValueError: no such teacher, it has another tokeniser, or fewer dimensions.
    """
    library, _, rest = teacher.partition("/")
    library = library.replace("-", "_")
    if library not in plugin_names("featcache.models") or not rest:
        raise ValueError(f"{spec}: {teacher!r} is no encoder; give one as --teacher takes it, LIBRARY/NAME")
    model = load_plugin("featcache.models", library).open_model(rest)
    theirs = model.input if isinstance(model, Model) else None
    if not isinstance(theirs, Texts) or (theirs.tokenizer, theirs.digest) != (texts.tokenizer, texts.digest):
        raise ValueError(f"{spec}: {teacher} has not the tokeniser of the student; give the teacher of the store")
    before, after = theirs.around()
    rows = [[*before, token, *after] for token in range(texts.vocabulary)]
    parts = [model.eval()(torch.tensor(rows[i : i + AT_ONCE]))["embedding"] for i in range(0, len(rows), AT_ONCE)]
    found = torch.cat(parts).double()
    if found.shape[1] < width:
        raise ValueError(f"{spec}: {teacher} has {found.shape[1]} dimensions, fewer than {width}; give fewer")
    found -= found.mean(0)
    components = torch.linalg.eigh(found.T @ found)[1].flip(1)[:, :width]
    # The sign of a component is arbitrary: its largest coordinate is positive.
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    vectors = found @ (components * largest.sign())
    return (vectors / vectors.square().mean().sqrt()).float()
