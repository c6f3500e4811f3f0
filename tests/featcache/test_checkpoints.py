"""Weights from local files, in the layouts that trainers leave, and the input that their tag records."""

import argparse
import logging
import time

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import nn

from featcache import hub
from featcache.checkpoint import fill, open_checkpoint, read_weights
from featcache.encoder import load_encoder
from featcache.models import _open_clip_weights as clip_weights
from featcache.models import _timm_weights as timm_weights
from featcache.models import open_clip as clip_source
from featcache.models import timm as timm_source
from featcache.models._options import PLAIN

SMALL, VIT = "test_efficientnet", "test_vit"


def made(name=SMALL, **given):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return timm.create_model(name, **given).eval()


def weights_of(encoder):
    return {key.removeprefix("model."): value for key, value in encoder.module.state_dict().items()}


# -- the input ----------------------------------------------------------------------------------------------


def steps(transform):
    """Size, crop, interpolation, mean and std of a torchvision transform."""
    known = {type(step).__name__: step for step in transform.transforms}
    resize, crop, normalise = known["Resize"], known.get("CenterCrop"), known["Normalize"]
    size = resize.size
    mode = "squash" if isinstance(size, list | tuple) and len(size) == 2 else "shortest"
    side = size if isinstance(size, int) else size[0]
    cropped = side if crop is None else crop.size if isinstance(crop.size, int) else crop.size[0]
    return (
        side,
        cropped,
        resize.interpolation.value,
        mode,
        *(tuple(round(float(v), 4) for v in values) for values in (normalise.mean, normalise.std)),
    )


def ours(preprocess):
    return (
        preprocess.resize,
        preprocess.crop,
        preprocess.interpolation,
        preprocess.mode,
        *(tuple(round(v, 4) for v in values) for values in (preprocess.mean, preprocess.std)),
    )


class Nothing(nn.Module):
    """As much of a timm model as `as_teacher` asks for."""

    num_classes = 0

    def __init__(self, config):
        super().__init__()
        self.pretrained_cfg = config

    def forward_features(self, images):
        return images.new_zeros(len(images), 2)

    def forward_head(self, features, pre_logits=False):
        return features


def test_the_input_of_every_timm_tag_is_that_of_timms_own_transform():
    tags = [tag for name in timm.list_models() for tag in timm.models.get_arch_pretrained_cfgs(name)]
    assert len(tags) > 1500
    for tag in tags[::7]:
        config = timm.get_pretrained_cfg(tag).to_dict()
        data = resolve_data_config(pretrained_cfg=config)
        if data["crop_mode"] == "border" or data["crop_pct"] > 1 or data["input_size"][1] != data["input_size"][2]:
            with pytest.raises(ValueError, match=r"not supported|only squares"):
                timm_source.as_teacher(tag, Nothing(config), PLAIN)
            continue
        config["input_size"] = data["input_size"]
        wanted = steps(create_transform(**data, is_training=False))
        assert ours(timm_source.as_teacher(tag, Nothing(config), PLAIN).input) == wanted, tag


@pytest.mark.parametrize(("name", "tag"), open_clip.list_pretrained())
def test_the_input_of_a_local_file_is_that_of_its_open_clip_tag(name, tag, tmp_path, monkeypatch):
    (tmp_path / "w.pt").write_bytes(b"")
    given = {}

    def create(name, pretrained=None, force_preprocess_cfg=None, **more):
        given.update(more, preprocess=force_preprocess_cfg)
        raise RuntimeError("far enough")

    monkeypatch.setattr(open_clip, "create_model", create)
    with pytest.raises(ValueError, match="far enough"):
        clip_weights.open_pretrained(f"{name}:{tag}:{tmp_path / 'w.pt'}")
    config = open_clip.get_pretrained_cfg(name, tag)
    theirs = PreprocessCfg(**open_clip.transform.merge_preprocess_dict(PreprocessCfg(size=224), config))
    merged = open_clip.transform.merge_preprocess_dict(PreprocessCfg(size=224), given["preprocess"])
    if config.get("size") is None:
        assert ours(clip_source._preprocess("x", merged)) == steps(image_transform_v2(theirs, is_train=False))
    asked = given.get("quick_gelu", bool(open_clip.get_model_config(name).get("quick_gelu")))
    assert asked == bool(config.get("quick_gelu"))


def test_mobile_clip_without_a_tag_has_its_own_input(tmp_path):
    assert clip_weights.common_input("MobileCLIP-S1", "w.pt")["mean"] == (0.0, 0.0, 0.0)
    assert clip_weights.common_input("MobileCLIP-S1", "w.pt")["interpolation"] == "bilinear"
    assert clip_weights.common_input("ViT-B-16-SigLIP", "w.pt")["mean"] == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"give open_clip/ViT-L-14:TAG:w\.pt, TAG one of .*openai"):
        clip_weights.common_input("ViT-L-14", "w.pt")


def test_a_tag_that_is_none_and_a_name_whose_tags_differ_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    file = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match=r"timm/resnet50\.nonsense: no such tag; .*resnet50\."):
        load_encoder(f"timm/resnet50.nonsense:{file}")
    with pytest.raises(ValueError, match=r"give timm/resnet50\.TAG:.*TAG one of .*tv_in1k"):
        load_encoder(f"timm/resnet50:{file}")
    with pytest.raises(ValueError, match=r"does not fit timm/resnet50\.tv_in1k"):
        load_encoder(f"timm/resnet50.tv_in1k:{file}")


def test_resnet50_of_torchvision_sees_what_torchvision_showed_it(tmp_path):
    save_file(dict(made("resnet50").state_dict()), tmp_path / "w.safetensors")
    found = load_encoder(f"timm/resnet50.tv_in1k:{tmp_path}/w.safetensors").preprocess
    assert (found.resize, found.crop, found.interpolation, found.mean[0]) == (256, 224, "bilinear", 0.485)
    assert "to 256 px (bilinear), centre 224 px, mean 0.485 0.456 0.406" in str(found)


# -- layouts ------------------------------------------------------------------------------------------------


WRAPPED = {
    "plain": lambda s: s,
    "state_dict and numbers": lambda s: {
        "state_dict": s,
        "epoch": 3,
        "best": np.float64(0.5),
        "args": argparse.Namespace(lr=1),
    },
    "DDP": lambda s: {f"module.{k}": v for k, v in s.items()},
    "torch.compile in DDP": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "Lightning": lambda s: {
        "state_dict": {f"model.{k}": v for k, v in s.items()} | {"criterion.center": torch.zeros(2)}
    },
    "student and teacher": lambda s: {
        "student": {f"module.backbone.{k}": torch.zeros_like(v) for k, v in s.items()},
        "teacher": {f"backbone.{k}": v for k, v in s.items()},
    },
    "EMA": lambda s: {"state_dict": {k: torch.zeros_like(v) for k, v in s.items()}, "state_dict_ema": s},
    "averaged": lambda s: {"n_averaged": torch.tensor(3)} | {f"module.{k}": v for k, v in s.items()},
    "flat pair": lambda s: (
        {f"student.{k}": torch.zeros_like(v) for k, v in s.items()} | {f"teacher.{k}": v for k, v in s.items()}
    ),
    "half precision": lambda s: {k: v.half().float() if v.is_floating_point() else v for k, v in s.items()},
}


@pytest.mark.parametrize("layout", WRAPPED)
def test_what_trainers_leave_is_loaded(layout, tmp_path):
    state = made().state_dict()
    if layout == "half precision":
        state = WRAPPED[layout](state)
    torch.save(state if layout == "half precision" else WRAPPED[layout](state), tmp_path / "w.pt")
    found = weights_of(load_encoder(f"timm/{SMALL}:{tmp_path}/w.pt"))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_two_networks_of_which_none_is_known_are_refused(tmp_path):
    state = made().state_dict()
    save_file(
        {f"{name}.{key}": value.clone() for name in ("left", "right") for key, value in state.items()},
        tmp_path / "w.safetensors",
    )
    with pytest.raises(ValueError, match=r"several such networks, left\. and right\."):
        load_encoder(f"timm/{SMALL}:{tmp_path}/w.safetensors")


def test_a_head_of_other_classes_is_kept_and_none_or_a_foreign_one_left_out(tmp_path, caplog):
    save_file(dict(made(num_classes=7).state_dict()), tmp_path / "seven.safetensors")
    assert load_encoder(f"timm/{SMALL}:{tmp_path}/seven.safetensors").fields["logits"] == (7,)
    save_file(dict(made(num_classes=0).state_dict()), tmp_path / "none.safetensors")
    assert "logits" not in load_encoder(f"timm/{SMALL}:{tmp_path}/none.safetensors").fields
    assert not caplog.records
    foreign = dict(made(num_classes=0).state_dict()) | {"classifier.0.weight": torch.zeros(3, 256)}
    save_file(foreign, tmp_path / "foreign.safetensors")
    assert "logits" not in load_encoder(f"timm/{SMALL}:{tmp_path}/foreign.safetensors").fields
    assert "left out: classifier.0.weight" in caplog.text


@pytest.mark.parametrize("change", ["missing", "misshapen", "deeper"])
def test_a_weight_that_is_no_heads_must_fit(change, tmp_path):
    state = dict(made(VIT).state_dict())
    key = next(key for key in state if key.startswith("blocks.0.") and key.endswith("qkv.weight"))
    if change == "missing":
        del state[key]
    elif change == "misshapen":
        state[key] = torch.zeros(3, 3)
    else:
        state |= {
            name.replace("blocks.0.", "blocks.99."): value.clone()
            for name, value in state.items()
            if "blocks.0." in name
        }
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: does not fit timm/test_vit \(.*blocks\."):
        load_encoder(f"timm/{VIT}:{tmp_path}/w.safetensors")


def test_position_embeddings_of_either_size_load_at_the_size_asked_for(tmp_path):
    for saved in (96, 160):
        model = made(VIT, img_size=saved)
        save_file(dict(model.state_dict()), tmp_path / f"{saved}.safetensors")
        encoder = load_encoder(f"timm/{VIT}:{tmp_path}/{saved}.safetensors@size=96")
        model.set_input_size(img_size=(96, 96))
        assert torch.equal(weights_of(encoder)["pos_embed"], model.pos_embed)
        assert encoder.preprocess.size == 96


def test_old_files_without_counts_of_batches_load(tmp_path):
    state = made().state_dict()
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, tmp_path / "w.safetensors")
    found = weights_of(load_encoder(f"timm/{SMALL}:{tmp_path}/w.safetensors"))
    assert all(torch.equal(found[key], state[key]) for key in state if "num_batches" not in key)


def test_dinov2s_official_layout(tmp_path):
    model = made("vit_small_patch14_dinov2", img_size=28, depth=1)
    state = dict(model.state_dict())
    official = {key.replace(".gamma", ".gamma"): value for key, value in state.items()} | {
        "mask_token": torch.zeros(1, 384)
    }
    save_file(official, tmp_path / "w.safetensors")
    other, convert = timm_weights._untrained("vit_small_patch14_dinov2", img_size=28, depth=1)
    assert fill(other, open_checkpoint(str(tmp_path / "w.safetensors"), "x", other, convert), "x") == []
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("kind", ["whole", "tower", "Lightning"])
def test_an_open_clip_tower_loads_alone_or_in_the_whole_model(kind, tmp_path):
    name = "ViT-S-32-alt"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = open_clip.create_model(name)
    state = {"whole": model, "tower": model.visual, "Lightning": model}[kind].state_dict()
    state = {f"model.{key}": value for key, value in state.items()} if kind == "Lightning" else state
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    encoder = load_encoder(f"open_clip/{name}:{tmp_path}/w.pt")
    found = {key.removeprefix("visual."): value for key, value in encoder.module.state_dict().items()}
    assert all(torch.equal(value, found[key]) for key, value in model.visual.state_dict().items())
    del state[next(key for key in state if key.endswith("ln_post.weight"))]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"does not fit open_clip/ViT-S-32-alt.*ln_post"):
        load_encoder(f"open_clip/{name}:{tmp_path}/w.pt")


def test_wrappers_without_tensors_are_refused(tmp_path):
    torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read_weights(str(tmp_path / "w.pt"))


# -- without a network --------------------------------------------------------------------------------------


def no_route(url, timeout):
    raise ConnectionError("no route to host")


def never(url, timeout):
    time.sleep(60)


class Session:
    def __init__(self, head):
        self.head = head


@pytest.mark.parametrize(("head", "said"), [(no_route, "no route to host"), (never, "no answer in 0.5 s")])
@pytest.mark.parametrize(
    ("spec", "remedy"),
    [
        ("timm/test_vit.r160_in1k", "timm/test_vit.r160_in1k:WEIGHTS.safetensors"),
        ("timm/hf-hub:timm/test_vit.r160_in1k", "timm/local-dir:FOLDER"),
        ("open_clip/ViT-B-32:laion2b_s34b_b79k", "open_clip/ViT-B-32:laion2b_s34b_b79k:CHECKPOINT"),
    ],
)
def test_without_a_network_one_line_comes_at_once(head, said, spec, remedy, monkeypatch, tmp_path, caplog):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "SECONDS", 0.5)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: Session(head))
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"could not be fetched .*no connection to .*{said}.*{remedy}") as refused:
        load_encoder(spec)
    assert time.monotonic() - began < 30
    assert "\n" not in str(refused.value)
    assert not caplog.records
    assert not constants.HF_HUB_OFFLINE


def test_a_slow_answer_is_no_missing_network(monkeypatch):
    class ReadTimeout(Exception):
        pass

    def slow(url, timeout):
        raise ReadTimeout("read timed out")

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: Session(slow))
    assert hub.unreachable("https://huggingface.co") == ""


def test_what_the_cache_holds_is_had_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: Session(no_route))
    with hub.fetching("x", "its weights could not be fetched", "give a file"):
        from huggingface_hub import constants

        assert constants.HF_HUB_OFFLINE
    assert logging.root.manager.disable == 0
