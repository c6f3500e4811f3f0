"""`transformers/PATH_OR_REPO`: a text model of Hugging Face's transformers, from a folder or the hub, as a teacher; to be
trained, with new weights as `transformers/CONFIG.json` or the `config.json` of such a folder says, or with `pretrained` its own.

Options follow: `@pool=mean|cls|max|last`, how its last hidden states become the embedding (the mean over tokens where it is
not said), and of a teacher `@max_length=N`, tokens of a text (what its tokeniser records). Of encoder-decoders it is the
encoder.
"""

import os
from collections.abc import Mapping
from glob import glob
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from featcache.inputs.texts import Texts, text_input
from featcache.models import Features, Model, Variant, first_line
from featcache.models._texts import (
    POOLS,
    UNTOLD,
    TextStudent,
    as_given,
    digest_of_config,
    input_of_tokenizer,
    loading,
    longest_of,
    missing_package,
    pooled,
    text_options,
    text_shapes,
)

OPTIONS = ("pool", "max_length")


class TransformerModel(Model):
    """Token ids (B, L), −1 behind the end of each text → the pooled last hidden states."""

    def __init__(self, spec: str, network: nn.Module, config: Any, pool: str):
        super().__init__()
        self.spec, self.network = spec, PooledTransformer(network, config, pool)
        shape = digest_of_config(config.to_diff_dict())
        self.output = f"transformers: {type(network).__name__} ({shape}), last hidden states; {pool} over tokens"

    def forward(self, images: Int64[Tensor, "batch length"]) -> Features:
        return {"embedding": self.network(images)}


def open_model(rest: str) -> TransformerModel:
    spec = f"transformers/{rest}"
    name, options = text_options("transformers", rest, OPTIONS)
    try:
        import transformers
    except ImportError:
        raise missing_package(spec) from None
    with loading(spec, name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        network = transformers.AutoModel.from_pretrained(name, dtype="float32")
    config = network.config
    model = TransformerModel(spec, _encoder_of(network, config), config, options.get("pool", "mean"))
    longest = int(options.get("max_length", 0)) or longest_of(tokenizer, config)
    model.input, model.files = input_of_tokenizer(spec, tokenizer, longest), tuple(named_files(rest) or ())
    model.fields = text_shapes(model)
    return model


class TransformerStudent(TextStudent):
    """A transformer to be trained."""

    def __init__(self, network: nn.Module, config: Any, pool: str, texts: Texts):
        made = {name: value for name, value in config.to_dict().items() if name not in UNTOLD}
        super().__init__(
            "transformers", PooledTransformer(network, config, pool), texts, {"config": made, "pool": pool}
        )


class PooledTransformer(nn.Module):
    """Token ids → the pooled last hidden states."""

    def __init__(self, network: nn.Module, config: Any, pool: str):
        super().__init__()
        self.network, self.pool, self.padding = network, pool, getattr(config, "pad_token_id", None) or 0

    def forward(self, ids: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch d"]:
        found = self.network(**as_given(ids, self.padding))
        return pooled(found.last_hidden_state, ids >= 0, self.pool)


def make_model(rest: str, variant: Variant) -> TransformerStudent:
    spec = f"transformers/{rest}"
    name, options = text_options("transformers", rest, ("pool",))
    texts, pool = variant.of_texts(spec), options.get("pool", "mean")
    try:
        import transformers
    except ImportError:
        raise missing_package(spec) from None
    with loading(spec, name):
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name) if variant.pretrained else None
        network = transformers.AutoModel.from_pretrained(name, dtype="float32") if variant.pretrained else None
    if network is None:
        config.vocab_size = texts.vocabulary
        network = transformers.AutoModel.from_config(config)
    else:
        texts = input_of_tokenizer(spec, tokenizer, min(texts.max_length, longest_of(tokenizer, config)))
    positions = getattr(config, "max_position_embeddings", None) or texts.max_length
    if texts.max_length > positions:
        raise ValueError(
            f"{spec}: takes {positions} tokens, and texts have up to {texts.max_length}; set max_length={positions}"
        )
    return TransformerStudent(_encoder_of(network, config), config, pool, texts)


def rebuild_model(rest: str, record: Mapping[str, Any]) -> TransformerStudent:
    try:
        import transformers
    except ImportError:
        raise missing_package("transformers") from None
    made, pool = dict(record["config"]), record["pool"]
    if pool not in POOLS or rest:
        raise ValueError("is damaged (its pooling is unknown); train again with another --out")
    try:
        config = transformers.AutoConfig.for_model(made.pop("model_type"), **made)
        network = transformers.AutoModel.from_config(config)
    except Exception as error:  # of whatever a configuration can be wrong in
        raise ValueError(f"is damaged ({first_line(error)}); train again with another --out") from None
    return TransformerStudent(_encoder_of(network, config), config, pool, text_input(record["preprocess"]))


def _encoder_of(network: nn.Module, config: Any) -> nn.Module:
    encoder: nn.Module = network.get_encoder() if config.is_encoder_decoder else network  # type: ignore[operator]
    return encoder


def named_files(rest: str) -> list[str] | None:
    name = text_options("transformers", rest, OPTIONS)[0]
    return folder_files(name) if os.path.isdir(name) else None


def folder_files(folder: str) -> list[str]:
    """All that a model's folder holds."""
    return sorted(path for path in glob(os.path.join(folder, "**"), recursive=True) if os.path.isfile(path))


def hub_repository(rest: str) -> str:
    return text_options("transformers", rest, OPTIONS)[0]
