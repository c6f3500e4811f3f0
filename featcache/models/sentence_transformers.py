"""`sentence-transformers/PATH_OR_REPO` (or `sentence_transformers/…`): a SentenceTransformer, from a folder or the hub, as a
teacher. Its own modules make the embedding: pooling, layers and normalisation are those that it records, and so are the
maximum length and lower case.

Options follow: `@prompt=NAME`, one of the prompts that it records (its default one where it has one and none is named;
`@prompt=` is none), and `@max_length=N`.
"""

import json
import os
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from featcache.inputs.texts import Texts, WholeText
from featcache.models import Features, Model
from featcache.models._texts import (
    as_given,
    digest_of_config,
    input_of_tokenizer,
    loading,
    longest_of,
    missing_package,
    text_options,
    text_shapes,
)
from featcache.models.transformers import folder_files
from featcache.plugins import suggest

OPTIONS = ("prompt", "max_length")
PROBES = ("  A Text, WITH Capitals\n", 'élan 東京 ½ ("quoted")', "one " * 40)
"""Texts on which our token ids must be its own."""


class SentenceModel(Model):
    """Token ids (B, L), −1 behind the end of each text → what the SentenceTransformer's modules make of them."""

    def __init__(self, spec: str, sentences: Any):
        super().__init__()
        self.spec, self.network = spec, nn.Sequential(*sentences)
        config = sentences[0].auto_model.config
        self.padding = sentences.tokenizer.pad_token_id or 0
        said = [f"Transformer ({digest_of_config(config.to_diff_dict())})"]
        said += [f"{type(each).__name__} {_settings(each)}".strip() for each in list(sentences)[1:]]
        self.output = f"sentence-transformers: {', '.join(said)}"

    def forward(self, images: Int64[Tensor, "batch length"]) -> Features:
        found = as_given(images, self.padding)
        for module in self.network:
            found = module(found)
        return {"embedding": found["sentence_embedding"]}


def open_model(rest: str) -> SentenceModel:
    name, options = text_options("sentence-transformers", rest, OPTIONS)
    return open_sentences(f"sentence-transformers/{rest}", name, options)


def open_sentences(spec: str, name: str, options: dict[str, str]) -> SentenceModel:
    """The SentenceTransformer in a folder, or of that name on the hub.

    Raises:
        ValueError: it cannot be loaded, or has modules or a tokenisation that are not reproduced here.
    """
    try:
        import sentence_transformers
    except ImportError:
        raise missing_package(spec) from None
    with loading(spec, name):
        sentences = sentence_transformers.SentenceTransformer(name, device="cpu")
    first: Any = sentences[0]
    if type(first).__name__ != "Transformer" or any(type(each).__name__ in _UNFIT for each in sentences):
        kinds = ", ".join(type(each).__name__ for each in sentences)
        raise ValueError(
            f"{spec}: is made of {kinds}; only those that begin with a Transformer of texts can be run here"
        )
    sentences = sentences.float().eval()
    prompt = _prompt(spec, sentences, options)
    if prompt and any(getattr(each, "include_prompt", True) is False for each in sentences):
        raise ValueError(f"{spec}: pools without its prompt's tokens, which is not done here; give @prompt= for none")
    model = SentenceModel(spec, sentences)
    recorded = sentences.max_seq_length or longest_of(sentences.tokenizer, first.auto_model.config)
    longest = int(options.get("max_length", 0)) or recorded
    model.input = _input(spec, sentences, prompt, longest)
    model.files = tuple(folder_files(name)) if os.path.isdir(name) else ()
    model.fields = text_shapes(model)
    return model


_UNFIT = {"Router", "Asym", "CLIPModel", "StaticEmbedding", "SparseStaticEmbedding"}


def _settings(module: nn.Module) -> str:
    """What a module says of itself, in words, which are the same in all versions of the library where that can be; "" where it
    has nothing to say."""
    name = type(module).__name__
    if name == "Pooling":
        mode = getattr(module, "pooling_mode", None) or module.get_pooling_mode_str()  # type: ignore[operator]
        return mode if isinstance(mode, str) else "+".join(mode)
    if name == "Normalize":
        return ""
    config: dict[str, Any] = getattr(module, "get_config_dict", dict)()
    return json.dumps(config, sort_keys=True, default=str) if config else ""


def _prompt(spec: str, sentences: Any, options: dict[str, str]) -> str:
    """What is written before every text."""
    name = options.get("prompt", sentences.default_prompt_name)
    if not name:
        return ""
    if name not in sentences.prompts:
        raise ValueError(f"{spec}: @prompt={name}: no such prompt; {suggest(name, sorted(sentences.prompts))}")
    return sentences.prompts[name] or ""


def _input(spec: str, sentences: Any, prompt: str, longest: int) -> Texts:
    """The input whose token ids are the SentenceTransformer's own."""
    own = _own_ids(sentences, [prompt + probe for probe in PROBES], longest)
    for strip, lower in product((False, True), repeat=2):
        given = input_of_tokenizer(spec, sentences.tokenizer, longest, prefix=prompt, strip=strip, lower=lower)
        found = [given.render(probe, WholeText(1)) for probe in PROBES]
        if [ids[ids >= 0].tolist() for ids in found] == own:
            return given
    raise ValueError(f"{spec}: its tokens are not those that its tokeniser gives alone, so it cannot be run here")


def _own_ids(sentences: Any, texts: Sequence[str], longest: int) -> list[list[int]]:
    was, sentences.max_seq_length = sentences.max_seq_length, longest
    found = (sentences.preprocess if hasattr(sentences, "preprocess") else sentences.tokenize)(list(texts))
    sentences.max_seq_length = was
    known = found["attention_mask"].bool()
    return [ids[mask].tolist() for ids, mask in zip(torch.as_tensor(found["input_ids"]), known, strict=True)]


def named_files(rest: str) -> list[str] | None:
    name = text_options("sentence-transformers", rest, OPTIONS)[0]
    return folder_files(name) if os.path.isdir(name) else None


def hub_repository(rest: str) -> str:
    name = text_options("sentence-transformers", rest, OPTIONS)[0]
    return name if "/" in name else f"sentence-transformers/{name}"
