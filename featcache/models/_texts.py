"""What models of texts share: options of their specs, the tokeniser that a library has, tokens pooled in one way, students."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from featcache import hub
from featcache.inputs.texts import Texts, text_input, with_tokenizer
from featcache.models import Model, first_line
from featcache.specs import options_in

POOLS = ("mean", "cls", "max", "last")
MAX_LENGTH = 512
"""Tokens of a text, where neither the tokeniser nor the model's configuration says how many."""
WIDEST, MOST_TOKENS = 4096, 10**8
NO_LIMIT = 10**6
"""Tokenisers without a limit say that it is more than this."""
UNTOLD = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"}
"""Of a configuration, what changes nothing that is computed in fp32."""


@contextlib.contextmanager
def loading(spec: str, name: str) -> Iterator[None]:
    """Around what transformers loads of a folder, or of that name from the hub. Its own bars, of weights read in milliseconds,
    are not shown.

    Raises:
        ValueError: it raised something, in one line.
    """
    from transformers.utils import logging

    remedy = "give a folder, or make one with `save_pretrained`"
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if not os.path.exists(name):
            with hub.fetching(spec, "it could not be loaded", remedy):
                yield
            return
        yield
    except ValueError as error:
        raise error if str(error).startswith(spec) else _not_loaded(spec, error, remedy) from None
    except Exception as error:  # file errors and those of configurations share no base class
        raise _not_loaded(spec, error, remedy) from None
    finally:
        if shown:
            logging.enable_progress_bar()


def _not_loaded(spec: str, error: Exception, remedy: str) -> ValueError:
    return ValueError(f"{spec}: could not be loaded ({type(error).__name__}: {first_line(error)}); {remedy}")


class TextStudent(Model):
    """A network to be trained: token ids (B, L), −1 behind the end of each text → (B, D).

    Args:
        architecture: its spec.
        texts: what it takes.
        made: what else `rebuild_model` needs.
    """

    kind = "text"
    input: Texts

    def __init__(self, architecture: str, network: nn.Module, texts: Texts, made: Mapping[str, Any]):
        super().__init__()
        self.spec, self.network, self.input = architecture, network, texts
        self.record = {"architecture": architecture, **made}


def width_of(library: str, rest: str) -> int:
    """DIM of `LIBRARY/DIM`."""
    if not (rest.isdecimal() and 0 < int(rest) <= WIDEST):
        raise ValueError(f"{library}/{rest}: give its width, a whole number up to {WIDEST}; known: {library}/128")
    return int(rest)


def recorded_texts(record: Mapping[str, Any]) -> tuple[Texts, int]:
    """What a student of texts takes, and its vocabulary, as its `student.json` says.

    Raises:
        ValueError: it says none.
    """
    vocabulary = record.get("vocabulary")
    if type(vocabulary) is not int or not 0 < vocabulary <= MOST_TOKENS:
        raise ValueError("is damaged (vocabulary must be a number of tokens); train again with another --out")
    return text_input(record["preprocess"]), vocabulary


def trained_here(spec: str) -> ValueError:
    return ValueError(
        f"{spec}: is trained here, and has no weights of its own; give run:FOLDER of its run, or make one with `distill fit`"
    )


def missing_package(spec: str, extra: str = "text") -> ValueError:
    return ValueError(f'{spec}: needs pip install "featcache[{extra}]"')


def text_options(source: str, rest: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """`rest` of a spec without its options, and those options.

    Raises:
        ValueError: an option that is not `known`, is given twice, or has no such value.
    """
    match = re.fullmatch(r"(.*?)((?:@\w+=[^@]*)*)", rest, re.DOTALL)
    assert match
    options = options_in(match[2], f"{source}/{rest}", known)
    if options.get("pool", POOLS[0]) not in POOLS:
        raise ValueError(f"{source}/{rest}: @pool={options['pool']}: no such pooling; known: {', '.join(POOLS)}")
    if not re.fullmatch(r"[1-9]\d*", options.get("max_length", "1")):
        raise ValueError(f"{source}/{rest}: give tokens of a text (@max_length=128)")
    return match[1], options


def pooled(
    tokens: Float[Tensor, "batch length d"], known: Bool[Tensor, "batch length"], pool: str
) -> Float[Tensor, "batch d"]:
    """One vector a text: the mean of its tokens, its first, the largest of each column, or its last."""
    if pool == "cls":
        return tokens[:, 0]
    if pool == "last":
        return tokens[torch.arange(len(tokens), device=tokens.device), known.sum(1) - 1]
    if pool == "max":
        return tokens.masked_fill(~known[..., None], -torch.inf).amax(1)
    weight = known[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1)


def as_given(ids: Int64[Tensor, "batch length"], padding: int) -> dict[str, Tensor]:
    """Token ids, −1 behind the end, as libraries take them."""
    known = ids >= 0
    return {"input_ids": ids.where(known, padding), "attention_mask": known.long()}


def longest_of(tokenizer: Any, config: Any) -> int:
    """Tokens of a text, as tokeniser and configuration record them, or 512."""
    said = [getattr(tokenizer, "model_max_length", 0), getattr(config, "max_position_embeddings", 0)]
    return min((each for each in said if each and 0 < each < NO_LIMIT), default=MAX_LENGTH)


def input_of_tokenizer(spec: str, tokenizer: Any, longest: int, **given: Any) -> Texts:
    """The input of a tokeniser of `transformers`.

    Args:
        longest: tokens of a text.
        given: further attributes of `Texts`.

    Raises:
        ValueError: it is none of the package tokenizers, or `longest` is too short for it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{spec}: its tokeniser is written in Python alone; give a model that has a tokenizer.json")
    try:
        return with_tokenizer(backend.to_str(), longest, **given)
    except ValueError as error:
        raise ValueError(f"{spec}: {error}") from None


def digest_of_config(config: Mapping[str, Any]) -> str:
    """Eight digits that tell one architecture from another: heads, say, which no weight shows."""
    told = {name: value for name, value in config.items() if name not in UNTOLD}
    return hashlib.blake2b(json.dumps(told, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()


@torch.inference_mode()
def text_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shape of one text's features, seen on a text of token 0."""
    blank = next(rows for _, rows in model.input.by_width(model.input.blank(1)))
    return {name: tuple(value.shape[1:]) for name, value in model.eval()(model.input.to_model(blank)).items()}
