"""`timm/NAME[.TAG]` with weights from the Hugging Face hub, or `timm/NAME:WEIGHTS` from a local file."""

from typing import Any

import timm
import timm.data
from torch import Tensor, nn

from featcache.encoder import Encoder, read_weights
from featcache.plugins import suggest
from featcache.preprocess import Preprocess


class TimmModule(nn.Module):
    """A timm classifier that returns its pooled features ("embedding") and, where it has a head, its "logits"."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        embedding = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        if not self.model.num_classes:
            return {"embedding": embedding}
        return {"embedding": embedding, "logits": self.model.get_classifier()(embedding)}


def load_encoder(rest: str) -> Encoder:
    name, _, weights = rest.partition(":")
    model = create_model(name, weights)
    return wrap(f"timm/{rest}", model)


def create_model(name: str, weights: str = "", **arguments: Any) -> Any:
    """A timm model with pretrained weights: timm's own, or those of the file `weights`.

    Raises:
        ValueError: unknown name or tag, weights that cannot be fetched, or a file that does not fit.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"timm/{name}: no such model; {suggest(architecture, timm.list_models())}")
    if weights:
        model = timm.create_model(architecture, **arguments)
        try:
            model.load_state_dict(read_weights(weights))
        except RuntimeError as error:
            raise ValueError(
                f"{weights}: does not fit timm/{name} ({str(error).splitlines()[1].strip()[:120]})"
            ) from None
        return model
    tagged = timm.list_pretrained(f"{architecture}*")
    if (name not in tagged and name != architecture) or not any(t.split(".")[0] == architecture for t in tagged):
        raise ValueError(
            f"timm/{name}: no such pretrained weights; {suggest(name, tagged)} Or give a file: timm/{architecture}:WEIGHTS"
        )
    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # hub, network and cache errors share no base class
        raise ValueError(
            f"timm/{name}: its weights could not be fetched ({type(error).__name__}); "
            f"with them on disk give timm/{architecture}:WEIGHTS.safetensors"
        ) from None


def wrap(name: str, model: Any) -> Encoder:
    """The Encoder around a timm model, with timm's own evaluation preprocessing."""
    config = timm.data.resolve_model_data_config(model)
    size, crop_mode = config["input_size"][-1], config["crop_mode"]
    if crop_mode not in ("center", "squash"):
        raise ValueError(f"{name}: timm crop mode {crop_mode!r} is not supported, only center and squash")
    preprocess = Preprocess(
        resize=int(size / config["crop_pct"]),
        crop=size,
        size=size,
        interpolation=config["interpolation"],
        mode="squash" if crop_mode == "squash" else "shortest",
        mean=config["mean"],
        std=config["std"],
    )
    fields = {"embedding": model.head_hidden_size if hasattr(model, "head_hidden_size") else model.num_features}
    if model.num_classes:
        fields["logits"] = model.num_classes
    return Encoder(
        name=name,
        module=TimmModule(model),
        preprocess=preprocess,
        fields=fields,
        output="timm forward_head(pre_logits=True)",
    )
