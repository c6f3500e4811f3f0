"""What a student of texts takes: its teacher's tokeniser, or another one, and up to how many tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.training.config import FitConfig
from featcache.encoder import load_encoder
from featcache.inputs import Input
from featcache.inputs.texts import BYTES, FILE, Texts, with_tokenizer
from featcache.specs import naming, refuse_code
from featcache.store import FeatureStore


def texts_of(settings: FitConfig, store: FeatureStore, teacher: Texts, trust_code: bool) -> Texts:
    """The input that a student gets, unless it comes with a tokeniser: the teacher's, with that tokeniser at hand, but for
    what the settings say.

    Raises:
        ValueError: the tokeniser cannot be had.
    """
    like = replace(teacher, max_length=settings.max_length or teacher.max_length)
    if settings.tokenizer == BYTES or (not settings.tokenizer and teacher.tokenizer == BYTES):
        return replace(like, tokenizer=BYTES, digest="")
    content = _read(settings.tokenizer) if settings.tokenizer else _of_encoder(store, teacher, trust_code)
    with naming(settings.tokenizer or store.encoder_name):
        given = with_tokenizer(content, like.max_length)
    return replace(like, tokenizer=FILE, digest=given.digest, content=given.content)


def refuse_other_tokenizer(settings: FitConfig, asked: Texts, taken: Texts) -> None:
    """Raises ValueError where a tokeniser is asked for, and the student comes with another one."""
    if settings.tokenizer and asked.digest != taken.digest:
        raise ValueError(f"{settings.student}: comes with a tokeniser of its own; leave tokenizer out")


def refuse_other_tokens(settings: FitConfig, teacher: Input[Any, Any], taken: Texts) -> None:
    """Raises ValueError where the student sees a text as other tokens than its teacher did; its length apart."""
    assert isinstance(teacher, Texts)
    if replace(teacher, max_length=taken.max_length).to_dict() != taken.to_dict():
        raise ValueError(
            f"method {settings.method} compares teacher and student token by token, and {settings.student} takes {taken}, its teacher took "
            f"{teacher}; give both one tokeniser"
        )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}); give a {FILE}, or tokenizer=bytes"
        ) from None


def _of_encoder(store: FeatureStore, teacher: Texts, trust_code: bool) -> str:
    """The tokeniser of the store's encoder, which is opened for it: a store keeps its digest alone."""
    remedy = f"give the tokeniser that its student takes with --set tokenizer=FILE (a {FILE}) or tokenizer=bytes"
    try:
        refuse_code(store.path, store.encoder_name, trust_code)
        found = load_encoder(store.encoder_name, trust_code=trust_code).preprocess
    except ValueError as error:
        raise ValueError(f"{store.path}: its encoder is not here ({error}); {remedy}") from None
    if not isinstance(found, Texts) or found.content is None or found.digest != teacher.digest:
        raise ValueError(f"{store.path}: {store.encoder_name} has another tokeniser now; {remedy}")
    return found.content
