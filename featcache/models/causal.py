"""`causal/PATH_OR_REPO`: a causal language model of Hugging Face's transformers, from a folder or the hub, as a teacher; and as a student,
`causal/CONFIG.json` with new weights, or with `pretrained` a model with its weights and tokeniser.

Beside the embedding it gives `hidden`, `length`, `token_logits`, `nll`, `predicted` and `token_nll`
(`featcache.models._language`). Options follow, as those of `transformers/`: `@pool=mean|cls|max|last` and `@max_length=N`.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from featcache.inputs.texts import Texts, text_input
from featcache.models import Features, Model, Variant, first_line
from featcache.models._language import (
    GIVES,
    LanguageStudent,
    Speaker,
    language_features,
    language_fields,
    refuse_other_head,
)
from featcache.models._texts import (
    UNTOLD,
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
    transformers = _library(spec)
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


class Causal(Speaker):
    """The network under a language model's student."""

    def __init__(self, network: nn.Module, config: Any):
        super().__init__()
        self.network, self.padding = network, getattr(config, "pad_token_id", None) or 0

    @property
    def token_head(self) -> nn.Linear:
        found = self.network.get_output_embeddings()  # type: ignore[operator]
        assert isinstance(found, nn.Linear)
        return found

    def states(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length d"]:
        backbone = self.network.base_model
        assert isinstance(backbone, nn.Module)
        found: Tensor = backbone(**as_given(ids, self.padding), use_cache=False).last_hidden_state
        return found


def make_model(rest: str, variant: Variant) -> LanguageStudent:
    """
    Raises:
        ValueError: it cannot be made, is too short for the texts, or is no language model, as `open_model` says.
    """
    spec = f"causal/{rest}"
    texts, transformers = variant.of_texts(spec), _library(spec)
    with loading(spec, rest):
        if variant.pretrained:
            tokenizer = transformers.AutoTokenizer.from_pretrained(rest)
            network = transformers.AutoModelForCausalLM.from_pretrained(rest, dtype="float32")
        else:
            config = transformers.AutoConfig.from_pretrained(rest)
            config.vocab_size = texts.vocabulary
            network = transformers.AutoModelForCausalLM.from_config(config)
    if variant.pretrained:
        texts = input_of_tokenizer(spec, tokenizer, min(texts.max_length, longest_of(tokenizer, network.config)))
    positions = getattr(network.config, "max_position_embeddings", None) or texts.max_length
    if texts.max_length > positions:
        raise ValueError(
            f"{spec}: takes {positions} tokens, and texts have up to {texts.max_length}; set max_length={positions}"
        )
    tried = CausalModel(spec, network.eval(), network.config, "mean")
    _try(tried, texts)
    network.train()
    return _student(network, texts)


def rebuild_model(rest: str, record: Mapping[str, Any]) -> LanguageStudent:
    transformers = _library("causal")
    if rest:
        raise ValueError("is damaged (it names more than its library); train again with another --out")
    made = dict(record["config"])
    try:
        config = transformers.AutoConfig.for_model(made.pop("model_type"), **made)
        network = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of whatever a configuration can be wrong in
        raise ValueError(f"is damaged ({first_line(error)}); train again with another --out") from None
    return _student(network, text_input(record["preprocess"]))


def _student(network: Any, texts: Texts) -> LanguageStudent:
    made = {name: value for name, value in network.config.to_dict().items() if name not in UNTOLD}
    return LanguageStudent("causal", Causal(network, network.config), texts, {"config": made})


def _library(spec: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise missing_package(spec) from None
    return transformers


def named_files(rest: str) -> list[str] | None:
    name = text_options("causal", rest, OPTIONS)[0]
    return folder_files(name) if os.path.isdir(name) else None


def hub_repository(rest: str) -> str:
    return text_options("causal", rest, OPTIONS)[0]
