"""`causal/PATH_OR_REPO`: a causal language model of Hugging Face's transformers, from a folder or the hub, as a teacher.

Beside the embedding it gives `hidden`, `length`, `token_logits`, `nll`, `predicted` and `token_nll`
(`featcache.models._language`). Options follow, as those of `transformers/`: `@pool=mean|cls|max|last` and `@max_length=N`.
"""

import os
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from featcache.inputs.texts import Texts
from featcache.models import Features, Model
from featcache.models._language import GIVES, language_features, language_fields, refuse_other_head
from featcache.models._texts import (
    as_given,
    digest_of_config,
    input_of_tokenizer,
    loading,
    longest_of,
    missing_package,
    text_options,
)
from featcache.models.transformers import OPTIONS, folder_files
from featcache.store.layout import HIDDEN

TRIED = 8
"""Tokens of the text that it is tried on."""


class CausalModel(Model):
    """Token ids (B, L), −1 behind the end of each text → hidden states, and what is said of the next token at each."""

    def __init__(self, spec: str, network: nn.Module, config: Any, pool: str):
        super().__init__()
        self.spec, self.network, self.pool = spec, network, pool
        self.padding = getattr(config, "pad_token_id", None) or 0
        shape = digest_of_config(config.to_diff_dict())
        self.output = f"causal: {type(network).__name__} ({shape}); {GIVES}; {pool} over tokens"

    @property
    def token_head(self) -> nn.Linear | None:
        found = self.body.get_output_embeddings()  # type: ignore[operator]
        return found if isinstance(found, nn.Linear) else None

    def forward(self, images: Int64[Tensor, "batch length"]) -> Features:
        found = self.body(**as_given(images, self.padding), output_hidden_states=True, use_cache=False)
        return language_features(found.hidden_states[-1], found.logits, images, self.pool)


def open_model(rest: str) -> CausalModel:
    """
    Raises:
        ValueError: it cannot be loaded, sees later tokens, or its logits do not follow from its hidden states.
    """
    spec = f"causal/{rest}"
    name, options = text_options("causal", rest, OPTIONS)
    try:
        import transformers
    except ImportError:
        raise missing_package(spec) from None
    with loading(spec, name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        network = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    model = CausalModel(spec, network.eval(), network.config, options.get("pool", "mean"))
    longest = int(options.get("max_length", 0)) or longest_of(tokenizer, network.config)
    texts = input_of_tokenizer(spec, tokenizer, longest)
    model.input, model.files = texts, tuple(named_files(rest) or ())
    _try(model, texts)
    return model


@torch.inference_mode()
def _try(model: CausalModel, texts: Texts) -> None:
    """On two texts that differ in their last token: it gives its fields as it should."""
    ids = torch.arange(TRIED)[None].repeat(2, 1) % texts.vocabulary
    ids[1, -1] = (ids[1, -1] + 1) % texts.vocabulary
    found = model(ids)
    one, other = found[HIDDEN][:, :-1]
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{model.spec}: its hidden states follow from later tokens too, so it is no causal language model; give one, or "
            "`transformers/` for its embeddings"
        )
    refuse_other_head(model.spec, found, model.token_head)
    width, vocabulary = (found[name].shape[-1] for name in (HIDDEN, "token_logits"))
    model.fields = language_fields(texts.max_length, width, vocabulary)


def named_files(rest: str) -> list[str] | None:
    name = text_options("causal", rest, OPTIONS)[0]
    return folder_files(name) if os.path.isdir(name) else None


def hub_repository(rest: str) -> str:
    return text_options("causal", rest, OPTIONS)[0]
