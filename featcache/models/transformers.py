"""`transformers/PATH_OR_REPO`: a text model of Hugging Face's transformers, from a folder or the hub, as a teacher.

Options follow: `@pool=mean|cls|max|last`, how its last hidden states become the embedding (the mean over tokens where it is
not said), and `@max_length=N`, tokens of a text (what its tokeniser records). Of encoder-decoders it is the encoder.
"""

import os
from glob import glob
from typing import Any

from jaxtyping import Int64
from torch import Tensor, nn

from featcache.models import Features, Model
from featcache.models._texts import (
    as_given,
    could_not_load,
    digest_of_config,
    input_of_tokenizer,
    longest_of,
    missing_package,
    pooled,
    text_options,
    text_shapes,
    without_bars,
)

OPTIONS = ("pool", "max_length")


class TransformerModel(Model):
    """Token ids (B, L), −1 behind the end of each text → the pooled last hidden states."""

    def __init__(self, spec: str, network: nn.Module, config: Any, pool: str):
        super().__init__()
        self.spec, self.network, self.pool = spec, network, pool
        self.padding = getattr(config, "pad_token_id", None) or 0
        shape = digest_of_config(config.to_diff_dict())
        self.output = f"transformers: {type(network).__name__} ({shape}), last hidden states; {pool} over tokens"

    def forward(self, images: Int64[Tensor, "batch length"]) -> Features:
        found = self.network(**as_given(images, self.padding))
        return {"embedding": pooled(found.last_hidden_state, images >= 0, self.pool)}


def open_model(rest: str) -> TransformerModel:
    spec = f"transformers/{rest}"
    name, options = text_options("transformers", rest, OPTIONS)
    try:
        import transformers
    except ImportError:
        raise missing_package(spec) from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        with without_bars():
            network = transformers.AutoModel.from_pretrained(name, dtype="float32")
    except Exception as error:  # hub, network and file errors share no base class
        raise could_not_load(spec, error) from None
    config = network.config
    if config.is_encoder_decoder:
        network = network.get_encoder()
    model = TransformerModel(spec, network, config, options.get("pool", "mean"))
    longest = int(options.get("max_length", 0)) or longest_of(tokenizer, config)
    model.input, model.files = input_of_tokenizer(spec, tokenizer, longest), tuple(named_files(rest) or ())
    model.fields = text_shapes(model)
    return model


def named_files(rest: str) -> list[str] | None:
    name = text_options("transformers", rest, OPTIONS)[0]
    return folder_files(name) if os.path.isdir(name) else None


def folder_files(folder: str) -> list[str]:
    """All that a model's folder holds."""
    return sorted(path for path in glob(os.path.join(folder, "**"), recursive=True) if os.path.isfile(path))


def hub_repository(rest: str) -> str:
    return text_options("transformers", rest, OPTIONS)[0]
