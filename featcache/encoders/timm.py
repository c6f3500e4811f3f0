"""`timm/NAME[.TAG]` with weights from the Hugging Face hub, or `timm/NAME:WEIGHTS` from a local file.

Options follow: `timm/vit_small_patch14_dinov2.lvd142m@size=224@layer=-2@pool=token+avg`; see `_options.py`.
"""

import inspect
import os
from typing import Any

import timm
import timm.data
from torch import Tensor, nn

from featcache.encoder import Encoder, read_weights
from featcache.encoders._options import PLAIN, Options, split_options
from featcache.encoders._tower import Tokens, Tower, flat
from featcache.plugins import suggest
from featcache.preprocess import Preprocess


class TimmModule(Tower):
    """A timm model: its pooled features before the classifier, its logits where it has one, and its tokens."""

    own = "pooled by the model's own head (timm forward_head before the classifier)"

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self._describe()

    @property
    def trunk(self) -> Any:
        return self.model

    def _describe(self) -> None:
        """What timm says of its model. Only a plain transformer has one norm for the tokens of all its blocks."""
        trunk = self.trunk
        self.layers = len(trunk.feature_info) if hasattr(trunk, "forward_intermediates") else 0
        if hasattr(trunk, "num_prefix_tokens") and self.layers and len(getattr(trunk, "blocks", ())) == self.layers:
            self.kind = "block"
            self.has_norm = not isinstance(getattr(trunk, "norm", nn.Identity()), nn.Identity)
        self.has_class_token = getattr(trunk, "cls_token", None) is not None

    def last(self, images: Tensor) -> tuple[Tensor, Tokens]:
        features = self.trunk.forward_features(images)
        return features, split_tokens(self.trunk, features)

    def head(self, features: Tensor) -> dict[str, Tensor]:
        embedding = self.trunk.forward_head(features, pre_logits=True)
        if not self.trunk.num_classes:
            return {"embedding": embedding}
        return {"embedding": embedding, "logits": self.trunk.forward_head(features)}

    def tap(self, images: Tensor, layer: int, norm: bool) -> Tokens:
        run = self.trunk.forward_intermediates
        asked: dict[str, Any] = {"norm": norm} if self.has_norm else {}
        if self.has_class_token and "return_prefix_tokens" in inspect.signature(run).parameters:
            asked["return_prefix_tokens"] = True
        (found,) = run(images, indices=[layer], stop_early=True, intermediates_only=True, output_fmt="NCHW", **asked)
        feature_map, prefix = found if isinstance(found, tuple) else (found, None)
        return flat(feature_map), prefix


def split_tokens(trunk: Any, features: Any) -> Tokens:
    """Patch and prefix tokens in what a timm model's `forward_features` gives; None for what it does not tell."""
    if not isinstance(features, Tensor):  # several resolutions side by side (CoaT, CrossViT)
        return None, None
    if features.ndim == 4:
        channels_last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if channels_last else flat(features), None
    prefix = getattr(trunk, "num_prefix_tokens", None)
    if features.ndim != 3 or prefix is None:  # tokens in an order that timm does not tell
        return None, None
    return features[:, prefix:], features[:, :prefix]


def load_encoder(rest: str) -> Encoder:
    model_name, options = split_options("timm", rest, known=("layer", "pool", "norm", "size"))
    name, _, weights = model_name.partition(":")
    files = (os.path.abspath(weights),) if weights else ()
    return wrap(f"timm/{rest}", create_model(name, weights), options, files)


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


def wrap(name: str, model: Any, options: Options = PLAIN, files: tuple[str, ...] = ()) -> Encoder:
    """The Encoder around a timm model, with timm's own evaluation preprocessing.

    Raises:
        ValueError: the model cannot do what `options` ask for.
    """
    config = timm.data.resolve_model_data_config(model)
    crop_mode = config["crop_mode"]
    if crop_mode not in ("center", "squash"):
        raise ValueError(f"{name}: timm crop mode {crop_mode!r} is not supported, only center and squash")
    size = options.size or config["input_size"][-1]
    if options.size:
        _resize(name, model, size)
    preprocess = Preprocess(
        resize=int(size / config["crop_pct"]),
        crop=size,
        size=size,
        interpolation=config["interpolation"],
        mode="squash" if crop_mode == "squash" else "shortest",
        mean=config["mean"],
        std=config["std"],
    )
    module = TimmModule(model)
    module.choose(name, options)
    try:
        fields = module.shapes(size)
    except (AssertionError, RuntimeError) as error:
        if not options.size:
            raise
        raise ValueError(f"{name}: the model does not take images of {size} px ({_first_line(error)})") from None
    return Encoder(
        name=name, module=module, preprocess=preprocess, fields=fields, output=f"timm: {module.output}", files=files
    )


def patch_side(model: Any) -> int:
    """Of a transformer's patches, in px; 1 where a model has none."""
    side = getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1
    return side if isinstance(side, int) else side[0]


def _resize(name: str, model: Any, size: int) -> None:
    """Let `model` take images of `size` px: position embeddings are resampled; a convnet needs nothing."""
    if size % (patch := patch_side(model)):
        raise ValueError(f"{name}: {size} px is not a multiple of its patches of {patch} px")
    if not hasattr(model, "set_input_size"):
        return
    try:
        model.set_input_size(img_size=(size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: the model does not take images of {size} px ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
