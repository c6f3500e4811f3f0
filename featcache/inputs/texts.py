"""Texts: what a tokeniser makes of them, up to a length.

A model takes one tensor of token ids, (batch, length), −1 behind the end of each text: a token is where `ids >= 0`. The
manifest of a store keeps the tokeniser's digest, not the tokeniser: what is opened of it can draw, and not render.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from featcache.inputs import Input, Views

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

BYTES = "bytes"
"""The built-in tokeniser: a text's UTF-8 bytes, ids 0…255."""
FILE = "tokenizer.json"
"""A tokeniser of the package `tokenizers`, and the name of its file in a run folder."""
TOKENS = "tokens"
"""The column of a store's `view` array: how many tokens the whole text has."""
SHORTEST = 8
"""Tokens of the narrowest forward pass."""
TOKENISED = 256
"""Texts whose ids are remembered: those that threads have in hand."""


@dataclass(frozen=True)
class WholeText:
    """The one view of a text.

    Attributes:
        tokens: of the whole text, also where it is longer than what is rendered.
    """

    tokens: int

    @property
    def parameters(self) -> tuple[float, ...]:
        return (float(self.tokens),)


@dataclass(frozen=True, kw_only=True)
class Texts(Input[str, WholeText]):
    """Tokeniser and length of one encoder; stored in the manifest and part of its fingerprint.

    Attributes:
        tokenizer: "tokenizer.json" or "bytes".
        digest: 128-bit BLAKE2b, in hex, of the tokeniser; "" of "bytes".
        max_length: tokens that a text is cut to, those included that the tokeniser puts around it.
        prefix: written before every text, as a prompt of sentence-transformers is.
        lower, strip: texts are put into lower case, and their ends freed of white space, before they are tokenised.
        content: the tokeniser as JSON; None where it is not at hand. Not part of the record.
    """

    kind = "text"
    alike = False
    parameters = (TOKENS,)

    tokenizer: str
    digest: str = ""
    max_length: int
    prefix: str = ""
    lower: bool = False
    strip: bool = False
    content: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.tokenizer not in (FILE, BYTES):
            raise ValueError(f"tokeniser {self.tokenizer!r} is not {FILE} or {BYTES}")
        if type(self.max_length) is not int or self.max_length < 1:
            raise ValueError(f"max_length {self.max_length!r}: give the tokens of a text, 1 or more")
        if self.content is not None and self.special >= self.max_length:
            raise ValueError(
                f"max_length {self.max_length}: the tokeniser puts {self.special} tokens around every text; give more"
            )

    def __str__(self) -> str:
        """In words, on one line."""
        how = [f"up to {self.max_length} tokens"]
        how += [f"after {self.prefix!r}"] if self.prefix else []
        how += ["in lower case"] if self.lower else []
        named = "bytes" if self.tokenizer == BYTES else f"tokeniser {self.digest[:8]} of {self.vocabulary:,} tokens"
        return ", ".join([named, *how])

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {"input": "texts"}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "content" and (value or each.name == "tokenizer"):
                record[each.name] = value
        return record

    @property
    def vocabulary(self) -> int:
        """Token ids that there may be: 0 to one less; 0 where the tokeniser is not at hand."""
        if self.tokenizer == BYTES:
            return 256
        return int(_opened(self.content, 0).get_vocab_size()) if self.content is not None else 0

    @property
    def special(self) -> int:
        """Tokens that the tokeniser puts around every text."""
        if self.tokenizer == BYTES or self.content is None:
            return 0
        return int(_opened(self.content, 0).num_special_tokens_to_add(False))

    def around(self) -> tuple[list[int], list[int]]:
        """Ids of the tokens that the tokeniser puts before and behind a text.

        Raises:
            ValueError: it finds no token in the letter a, to put them around.
        """
        if not self.special:
            return [], []
        found = _opened(self.content, 0).encode("a")
        own = [i for i, special in enumerate(found.special_tokens_mask) if not special]
        if not own:
            raise ValueError("the tokeniser finds no token in the letter a")
        return found.ids[: own[0]], found.ids[own[-1] + 1 :]

    @staticmethod
    def decode(encoded: bytes, *, seen: bool = False) -> str:
        """Raises ValueError where it is no UTF-8, holds NUL characters as binary files do, or is blank."""
        try:
            text = encoded.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 (byte {error.start + 1})") from None
        if "\0" in text:
            raise ValueError("holds NUL characters, as binary files do")
        if not text.strip():
            raise ValueError("is blank" if text else "is empty")
        return text

    def size_of(self, item: str) -> tuple[int, int]:
        """(tokens of the whole text, 1)."""
        return self._tokenised(item)[1], 1

    def draw(self, size: tuple[int, int], views: Views, sample_id: str, view: int) -> WholeText:
        return WholeText(size[0])

    def render(self, item: str, view: WholeText, size: tuple[int, int] | None = None) -> Int32[np.ndarray, " length"]:
        """Token ids, −1 behind the end: `max_length` of them.

        Raises:
            ValueError: the tokeniser is not at hand, or finds no token in it.
        """
        found = self._tokenised(item)[0]
        ids = np.full(self.max_length, -1, np.int32)
        ids[: len(found)] = found
        return ids

    def ids(self, texts: Sequence[str]) -> Int32[Tensor, "count length"]:
        """What `render` gives of these, for `Encoder.encode_padded`."""
        import torch

        return torch.from_numpy(np.stack([self.render(text, WholeText(0)) for text in texts]))

    def to_model(self, rendered: Int32[Tensor, "batch length"]) -> Int64[Tensor, "batch length"]:
        return rendered.long()

    def blank(self, count: int) -> Int32[Tensor, "count length"]:
        """Texts of token 0 alone, of eight tokens at most."""
        import torch

        ids = torch.full((count, self.max_length), -1, dtype=torch.int32)
        ids[:, :SHORTEST] = 0
        return ids

    def trimmed(self, rendered: Int32[np.ndarray, "n length"]) -> Int32[np.ndarray, "n shorter"]:
        return rendered[:, : _wide_enough(int((rendered >= 0).sum(1).max(initial=1)), self.max_length)]

    def width(self, parameters: Sequence[float]) -> int:
        """The next of 8, 16, 24, 32, 48, 64, 96, 128 … tokens, `max_length` at most: of longer texts, padding is less than a third."""
        return _wide_enough(int(parameters[0]), self.max_length)

    def by_width(
        self, rendered: Shaped[Tensor, "n length"]
    ) -> Iterator[tuple[Int64[Tensor, " m"], Shaped[Tensor, "m shorter"]]]:
        import torch

        tokens = (rendered >= 0).sum(1)
        widths = torch.tensor([_wide_enough(each, self.max_length) for each in tokens.tolist()])
        for width in sorted({*widths.tolist()}):
            at = (widths == width).nonzero()[:, 0]
            yield at, rendered[at.to(rendered.device), :width]

    def _tokenised(self, text: str) -> tuple[tuple[int, ...], int]:
        """The ids that a model takes of it, and how many tokens it has in all."""
        if self.tokenizer == FILE and self.content is None:
            raise ValueError(
                f"the tokeniser {self.digest[:8]} is not here, a store keeps its digest alone; load the encoder that made the store"
            )
        return _tokenised(self, text)


def with_tokenizer(content: str, max_length: int, **given: Any) -> Texts:
    """The input of a tokeniser that is given as JSON.

    Args:
        given: further attributes of `Texts`.

    Raises:
        ValueError: it is none, or `max_length` is too short for it.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # its own are of no other class
        raise ValueError(f"is no {FILE} of the package tokenizers ({str(error)[:120]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    content = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return Texts(tokenizer=FILE, digest=digest, max_length=max_length, content=content, **given)


def text_input(record: Mapping[str, Any], content: str | None = None) -> Texts:
    """The input that a manifest or `student.json` records; with the tokeniser, where it is given, that it was recorded with.

    Raises:
        ValueError: no such input, or the tokeniser is another one.
    """
    try:
        found = Texts(**{name: value for name, value in record.items() if name != "input"})
    except TypeError as error:
        raise ValueError(f"no record of texts ({error})") from None
    if content is None or found.tokenizer == BYTES:
        return found
    given = with_tokenizer(content, found.max_length)
    if given.digest != found.digest:
        raise ValueError(f"the tokeniser is another one ({given.digest[:8]}, not {found.digest[:8]}); put it back")
    return replace(found, content=given.content)


open_input = text_input


@cache
def _opened(content: str, max_length: int) -> Any:
    """The tokeniser that cuts at `max_length`; 0: never."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    if max_length:
        tokenizer.enable_truncation(max_length)
    return tokenizer


@lru_cache(maxsize=TOKENISED)
def _tokenised(like: Texts, text: str) -> tuple[tuple[int, ...], int]:
    """As `Texts._tokenised`: a sample is measured, and rendered after that."""
    text = text.strip() if like.strip else text
    text = like.prefix + (text.lower() if like.lower else text)
    if like.tokenizer == BYTES:
        encoded = text.encode()
        return tuple(encoded[: like.max_length]), len(encoded)
    assert like.content is not None
    found = _opened(like.content, like.max_length).encode(text)
    if len(found.ids) <= like.special:
        raise ValueError("has no token that the tokeniser knows")
    return tuple(found.ids), len(found.ids) + sum(len(rest.ids) - like.special for rest in found.overflowing)


def _wide_enough(tokens: int, most: int) -> int:
    width = SHORTEST
    while width < tokens:
        width = width * 2 if width < 16 else width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return min(width, most)
