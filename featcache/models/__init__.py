"""Model libraries, one file each: what gives teachers, students, and the code that loads them without us.

A plugin has

- `open_model(rest_of_spec) -> Model`: a teacher, with its weights; with a keyword `trust_code` where a spec may name a
  file that names code. Where the user's own code makes an Encoder, that;

and, where its networks can be trained,

- `make_model(rest_of_spec, variant) -> Model`: to be trained, with new weights or those that the spec names;
- `rebuild_model(rest_of_spec, record) -> Model`: as a student's record says, with new weights. Reads no file, fetches nothing.

It may have, for receipts and model cards,

- `named_files(rest_of_spec) -> list[str] | None`: the local files that the spec names; None where a hub holds them;
- `hub_repository(rest_of_spec) -> str`: on the Hugging Face hub; "" where it is not there;
- `licence(rest_of_spec) -> str | None`: that the library records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from featcache.inputs import Input
from featcache.inputs.texts import Texts
from featcache.plugins import load_plugin, plugin_names

Features = dict[str, Tensor]
"""By field, "embedding" (B, D) among them, and where a model gives them "logits" (B, C), "tokens" (B, T, D), the patch
tokens in row-major order of the patch grid, and "prefix_tokens" (B, P, D), the class token and the registers."""


class Field(NamedTuple):
    """One of a model's features: the shape of one sample's, and what a store keeps it in.

    Attributes:
        shape: () of a single number.
        dtype: of `featcache.store.layout`: "float16" or "float32"; of whole numbers, which come as such and are kept as they are,
            "uint8", "int16", "int32" or "int64". None: float16, or what `--dtype` says.
    """

    shape: tuple[int, ...]
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a network to be trained is asked to be, besides its name.

    Attributes:
        image_size: px of its images; its own when None.
        patch_size: px of a transformer's patches; its own when None.
        drop_path: rate of stochastic depth while training.
        pretrained: with the library's own weights of that name.
        texts: of a student of texts, what it takes, unless its weights come with a tokeniser; None of one of images.
    """

    image_size: int | None = None
    patch_size: int | None = None
    drop_path: float = 0.0
    pretrained: bool = False
    texts: Texts | None = None

    def of_texts(self, spec: str) -> Texts:
        """For libraries of texts: what the student takes.

        Raises:
            ValueError: it is asked to be one of images, or something that only those are.
        """
        for setting in ("image_size", "patch_size", "drop_path"):
            if getattr(self, setting):
                raise ValueError(f"{spec} takes texts, and no {setting}; leave it out")
        if self.texts is None:
            raise ValueError(
                f"{spec} takes texts, and its teacher was shown images; give a student of images, such as tiny"
            )
        return self.texts

    def refuse_all_but_size(self, spec: str) -> None:
        """For libraries that take nothing else; raises ValueError where something else is asked for."""
        for setting, given in (("patch_size", self.patch_size), ("drop_path", self.drop_path)):
            if given:
                raise ValueError(f"{spec} takes no {setting}, only timm students do; leave it out")
        if self.pretrained and ":" not in spec:
            raise ValueError(
                f"{spec}: pretrained is for timm students; leave it out (open_clip: give open_clip/NAME:TAG)"
            )


@dataclass(frozen=True, kw_only=True)
class Standalone:
    """A student for code that knows its library and not us.

    Attributes:
        network: `model.safetensors` holds its state dict.
        config: `config.json`.
        code: Python that makes `model`, in eval mode, of the files in `folder`.
        metadata: of `model.safetensors`.
        maps: Python that makes `backbone` of those files, which gives the feature maps of images, finest first; "" where
            the library has no such thing.
        last_map: what the student itself has as the last one of the images that it was tried on.
        of_hub: Python that makes `model` of a repository "{name}" on the Hugging Face hub that has these files; "" where
            the library does not fetch them itself.
    """

    network: nn.Module
    config: Mapping[str, Any]
    code: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    maps: str = ""
    last_map: Tensor | None = None
    of_hub: str = ""


class Model(nn.Module):
    """A network of a library, with its weights: a teacher's, or a student's to be trained.

    Attributes:
        spec: that it was opened by.
        network: images, or token ids → embedding (B, D). A student's files hold its weights by the network's own names.

        kind: of what it takes: "image" or "text".
        input: of a teacher, and of a student of texts, how an image or a text becomes what it takes.
        fields: of a teacher, shape of one sample's features by name, or `Field`.
        output: of a teacher, which layer and pooling each field is, in words; part of the fingerprint.
        files: of a teacher, local files that the weights were loaded from, where known.
        classes: of a teacher, names of the columns of its "logits", where known.
        own_precision: of a teacher, that it computes in one way alone, whatever it is asked for.

        image_size: of a student of images, their px.
        record: of a student, "architecture" and what else `rebuild_model` needs.
        normalisation: of a student, mean and std that its weights were trained with or its library records; else None,
            and it takes its teacher's.
        projection: of a student, what its weights bring behind the network, where they do.
        remark: of a student, a line to tell before it is trained, "" for none.
        map_width: of a student, channels of the map "dense" (B, K, h, w) that it gives, pixels of which are classified; 0 where it
            gives none.
    """

    spec: str = ""
    kind: str = "image"
    input: Input[Any, Any]
    fields: Mapping[str, tuple[int, ...] | Field]
    output: str
    files: tuple[str, ...] = ()
    classes: Sequence[str] | None = None
    own_precision: bool = False

    image_size: int
    record: Mapping[str, Any]
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None
    projection: nn.Linear | None
    remark: str = ""
    map_width: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.projection = None  # of the instance: a class's would hide a layer that is registered

    @property
    def own_fields(self) -> Mapping[str, Field]:
        """Of a student, what it gives behind no projection: a language model's hidden states, the logits of the next token, …"""
        return {}

    @property
    def token_head(self) -> nn.Linear | None:
        """Of a language model, the layer that makes the logits of the next token of its field "hidden"."""
        return None

    @property
    def body(self) -> nn.Module:
        """The network under the name that a student's files know it by."""
        body = self.network
        assert isinstance(body, nn.Module)
        return body

    def forward(self, images: Shaped[Tensor, "batch ..."]) -> Features:
        """All that it gives of normalised images (B, 3, S, S), or of token ids (B, L), −1 behind the end of each text."""
        return {"embedding": self.body(images)}

    @property
    def takes(self) -> str:
        """What a student takes, in words."""
        return (
            f"images of {self.image_size} px"
            if self.kind == "image"
            else "token ids (B, L), −1 behind the end of each text"
        )

    def example(self, count: int) -> Tensor:
        """What a student takes, of so many black images or short texts of token 0."""
        if self.kind == "image":
            return torch.zeros(count, 3, self.image_size, self.image_size)
        return self.input.to_model(next(part for _, part in self.input.by_width(self.input.blank(count))))

    def noise(self, count: int, drawn: torch.Generator) -> Tensor:
        """The same of noise, drawn from `drawn`."""
        if self.kind == "text":
            assert isinstance(self.input, Texts)
            return torch.randint(0, max(1, self.input.vocabulary), (count, 8), generator=drawn)
        return torch.randn(self.example(count).shape, generator=drawn)

    def refuse_untrainable(self, width: int) -> None:
        """Once it has seen a black image, of which it gave `width` numbers: raises ValueError where it cannot be trained."""

    def making(self, record: Mapping[str, Any]) -> str:
        """Python that makes `body` as the library has it, without weights: imports, an empty line, the call."""
        raise ValueError(f"{record['architecture']}: its library does not say how to load it without featcache")

    def standalone(self, behind: Sequence[nn.Linear], record: Mapping[str, Any], images: Tensor) -> Standalone:
        """Of a student: what an export writes.

        Args:
            behind: what follows the network: projection, classifier.
            record: its `student.json`.
            images: normalised, to try it on.
        """
        layers = "".join(f", nn.Linear({layer.in_features}, {layer.out_features})" for layer in behind)
        return Standalone(
            network=nn.Sequential(self.plain, *behind) if behind else self.plain,
            config=record,
            code=f"{LOADER}{self.making(record)}\nmodel = "
            + (f"nn.Sequential(body{layers})" if behind else "body")
            + LOADING,
        )

    @property
    def plain(self) -> nn.Module:
        """The network as its library has it."""
        return self.body


LOADER = "from safetensors.torch import load_file\nfrom torch import nn\n"
LOADING = '\nmodel.load_state_dict(load_file(f"{folder}/model.safetensors"))\nmodel.eval()'


def recorded_licence(library: str, rest: str) -> str | None:
    """Of a model's weights, where there is such a library and it knows."""
    if library not in plugin_names("featcache.models"):
        return None
    plugin = load_plugin("featcache.models", library)
    return plugin.licence(rest) if hasattr(plugin, "licence") else None


def first_line(error: Exception) -> str:
    """Of its message, for ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
