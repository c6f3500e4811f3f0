"""A student as safetensors with the Python that loads it: by itself, through `torch.hub`, as a backbone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.exporting.card import Written, preprocessing_code
from featcache.inputs.images import Preprocess
from featcache.models import Standalone, first_line
from featcache.public import public
from featcache.specs import code_in, names_code
from featcache.student import Student

HUBCONF = '''"""For torch.hub: `model = torch.hub.load(FOLDER, "student", source="local")`."""

import os

{preprocessing}

dependencies = {dependencies}


def student():
    """In eval mode. `model.preprocess` makes of a PIL image the batch of one that it takes."""
    folder = os.path.dirname(os.path.abspath(__file__))
{loading}
    model.preprocess = pixels
    return model
'''
CLOSE = 1e-4
"""Between the last map of the backbone and the student's, as a share of the largest value of the latter; of files in
float16 a hundred times that."""


def write_safetensors(
    folder: Path,
    student: Student,
    record: dict[str, Any],
    precision: str,
    images: Float[Tensor, "batch 3 size size"],
) -> Written:
    """Write `model.safetensors`, `config.json` and `hubconf.py`.

    Args:
        images: normalised, to try it on.
    """
    alone = student.model.standalone(student.behind, record, images)
    save_file(_tensors(alone.network, precision), folder / "model.safetensors", {"format": "pt", **alone.metadata})
    (folder / "config.json").write_text(json.dumps(public(alone.config), indent=2) + "\n")
    like = preprocessing_code(Preprocess.from_dict(record["preprocess"]))
    hubconf = HUBCONF.format(
        preprocessing=like,
        dependencies=sorted(set(re.findall(r"^(?:from|import) (\w+)", f"{like}\n{alone.code}", re.MULTILINE))),
        loading=indent(alone.code, "    "),
    )
    (folder / "hubconf.py").write_text(hubconf)

    def load() -> Callable[[Tensor], Tensor]:
        model: Callable[[Tensor], Tensor] = _made(alone.code, folder)["model"]
        return model

    return Written(
        loading=alone.code,
        load=load,
        sections=[_torch_hub(record), _of_maps(folder, alone, record, images, precision)],
        of_hub=alone.of_hub,
    )


def _made(code: str, folder: Path) -> dict[str, Any]:
    """What is defined once the card's code has run on these files."""
    names: dict[str, Any] = {"folder": str(folder)}
    exec(code, names)
    return names


def _tensors(module: nn.Module, precision: str) -> dict[str, Tensor]:
    """Copies that share no memory, floating-point ones in the precision."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    return {
        key: value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
        for key, value in module.state_dict().items()
    }


def _torch_hub(record: dict[str, Any]) -> str:
    """The card's section on `torch.hub`."""
    text = (
        "## torch.hub\n\n```python\nimport torch\nfrom PIL import Image\n\n"
        'model = torch.hub.load(folder, "student", source="local")\n```\n\n'
        "`hubconf.py` lies beside this file; `model.preprocess(Image.open(path))` is what it takes."
    )
    if names_code(record["architecture"]):
        module = code_in(record["architecture"]).partition(":")[0]
        text += f" The module `{module}` is your own code: bring it along, into this folder say."
    return text


def _of_maps(
    folder: Path, alone: Standalone, record: dict[str, Any], images: Float[Tensor, "batch 3 size size"], precision: str
) -> str:
    """The card's section on feature maps, once the backbone has given the student's own last map; or why there are none."""
    name = record["architecture"]
    none = "## Feature maps\n\nNone by timm's `features_only`: {}. `torchvision.models.feature_extraction` takes those of any layer."
    if not alone.maps:
        return none.format(f"{name} is no model that timm loads by itself")
    try:
        backbone = _made(alone.maps, folder)["backbone"]
        with torch.no_grad():
            maps = backbone(images)
    except Exception as error:  # each model's own code
        return none.format(f"timm has no such thing for {name} ({type(error).__name__}: {first_line(error)})")
    own, last = alone.last_map, maps[-1]
    if channels_last := own is not None and own.shape != last.shape and last.ndim == 4:
        last = last.permute(0, 3, 1, 2)
    limit = CLOSE * (100 if precision == "fp16" else 1)
    if own is None or own.shape != last.shape or not (own - last).abs().max() <= limit * own.abs().max():
        return none.format("the last one is not what timm's `forward_intermediates` gives of the student")
    channels, strides = backbone.feature_info.channels(), backbone.feature_info.reduction()
    given = "".join(f", {key}={value!r}" for key, value in alone.config["model_args"].items())
    shape = "(B, H, W, C)" if channels_last else "(B, C, H, W)"
    return f"""## Feature maps

For detection and segmentation, from the same file; what makes the embedding of the last map is left out:

```python
{alone.maps}
```

`backbone(images)` gives {len(maps)} maps {shape} of {channels} channels, at 1/{strides} of the image's sides. Checked when it was written:
the last one is the student's own. To programs that call `timm.create_model` themselves, `local-dir:FOLDER` is the name; for those
that take a `checkpoint_path`, write one:

```python
from safetensors.torch import save_file

save_file(backbone.state_dict(), "backbone.safetensors")
again = timm.create_model("{alone.config["architecture"]}", features_only=True, checkpoint_path="backbone.safetensors"{given})
```"""
