"""Tokens, layers and pooling of encoders, against the models' own functions and against hooks on their blocks."""

import json
import sys

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from timm.models import register_model
from timm.models.vision_transformer import checkpoint_filter_fn
from tiny import tiny_encoder

from featcache.encoder import Encoder, load_encoder
from featcache.precision import CANDIDATES

SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 3}
FAMILIES = {
    "tinytest_dinov2": ("vit_small_patch14_reg4_dinov2", SMALL),
    "tinytest_dinov3": ("vit_small_patch16_dinov3", SMALL),
    "tinytest_siglip": ("vit_base_patch16_siglip_224", SMALL),
    "tinytest_mean": ("vit_medium_patch16_reg4_gap_256", SMALL),  # registers, no class token, no norm on tokens
    "tinytest_swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
    ),
    "test_resnet": ("test_resnet", {}),
    "test_efficientnet": ("test_efficientnet", {}),
}
SIZES = {"tinytest_dinov2": 70, "tinytest_dinov3": 64}  # asked for with @size, to be quick


@pytest.fixture(scope="module", autouse=True)
def registered():
    """timm knows the small variants while these tests run; `__all__` of this module is timm's doing."""
    for name, (architecture, arguments) in FAMILIES.items():
        if name.startswith("tinytest"):

            def make(architecture=architecture, arguments=arguments, **_):
                return timm.create_model(architecture, **arguments)

            make.__name__ = name
            register_model(make)
    yield
    del sys.modules[__name__].__all__


@pytest.fixture(scope="module")
def family(registered, tmp_path_factory):
    """`family(name)`: a model with random weights everywhere, norms and class tokens too, and its weights file."""
    folder, made = tmp_path_factory.mktemp("families"), {}

    def get(name):
        if name not in made:
            with torch.random.fork_rng():
                torch.manual_seed(11)
                model = timm.create_model(name).eval().requires_grad_(False)
                for weight in model.parameters():
                    weight += 0.1 * torch.randn_like(weight)
            safetensors.torch.save_file(model.state_dict(), folder / f"{name}.safetensors")
            made[name] = model, folder / f"{name}.safetensors"
        return made[name]

    return get


@pytest.fixture
def load(family, rng):
    """`load(name, options)`: the encoder, the model itself at the same size, some pixels, and the images they become."""

    def get(name, options=""):
        model, weights = family(name)
        size = SIZES.get(name)
        encoder = load_encoder(f"timm/{name}:{weights}{options}" + (f"@size={size}" if size else ""))
        if size:
            architecture, arguments = FAMILIES[name]
            resized = timm.create_model(architecture, img_size=size, **arguments).eval().requires_grad_(False)
            state = {key: value.clone() for key, value in model.state_dict().items()}
            resized.load_state_dict(checkpoint_filter_fn(state, resized) if "pos_embed" in state else state)
            model = resized
        side = encoder.preprocess.size
        assert size in (None, side)
        pixels = torch.from_numpy(rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8))
        return encoder, model, pixels, encoder.preprocess.to_model(pixels)

    return get


def seen_at(module, run):
    """Output of `module` while `run()` runs."""
    seen = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.inference_mode():
        run()
    handle.remove()
    return seen[0]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "prefix", "grid"),
    [("tinytest_dinov2", 5, 5), ("tinytest_dinov3", 5, 4), ("tinytest_siglip", 0, 14), ("tinytest_mean", 4, 16)],
)
def test_transformers_give_their_last_tokens_and_their_own_head(load, name, prefix, grid):
    encoder, model, pixels, images = load(name)
    found = encoder.encode(pixels)
    with torch.inference_mode():
        features = model.forward_features(images)
        close(found["embedding"], model.forward_head(features, pre_logits=True))
        (feature_map,) = model.forward_intermediates(images, 1, norm=True, intermediates_only=True)
    close(found["tokens"], features[:, prefix:])
    assert found["tokens"].shape == (2, grid * grid, 32)
    for row, column in ((0, 0), (0, 1), (1, 0), (grid - 1, 2)):
        close(found["tokens"][:, row * grid + column], feature_map[:, :, row, column])
    if prefix:
        close(found["prefix_tokens"], features[:, :prefix])
    assert {"embedding", "tokens"} | ({"prefix_tokens"} if prefix else set()) == set(found) - {"logits"}
    assert encoder.fields == {key: tuple(value.shape[1:]) for key, value in found.items()}


@pytest.mark.parametrize("name", ["tinytest_dinov2", "tinytest_dinov3"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layer", [-2, 0, 2])
def test_another_block_is_what_a_hook_sees_there(load, name, layer, norm):
    encoder, model, pixels, images = load(name, f"@layer={layer}@pool=token+avg@norm={str(norm).lower()}")
    block = seen_at(model.blocks[layer], lambda: model(images))
    block = model.norm(block) if norm else block
    found = encoder.encode(pixels)
    close(found["tokens"], block[:, 5:])
    close(found["prefix_tokens"], block[:, :5])
    close(found["embedding"], torch.cat([block[:, 0], block[:, 5:].mean(1)], 1))
    assert encoder.fields == {"embedding": (64,), "tokens": tuple(block[0, 5:].shape), "prefix_tokens": (5, 32)}


@pytest.mark.parametrize("name", ["tinytest_dinov2", "tinytest_dinov3"])
@pytest.mark.parametrize("pool", ["token", "avg", "token+avg"])
def test_pooling_of_the_last_layer(load, name, pool):
    encoder, model, pixels, images = load(name, f"@pool={pool}")
    if name == "tinytest_dinov2":
        ((patches, prefix),) = model.get_intermediate_layers(images, n=1, norm=True, return_prefix_tokens=True)
    else:
        prefix, patches = model.forward_features(images).split([5, 16], dim=1)
    parts = {"token": prefix[:, 0], "avg": patches.mean(1)}
    close(encoder.encode(pixels)["embedding"], torch.cat([parts[part] for part in pool.split("+")], 1))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "tinytest_swin"])
def test_a_final_feature_map_is_given_as_tokens(load, name):
    encoder, model, pixels, images = load(name)
    found = encoder.encode(pixels)
    with torch.inference_mode():
        feature_map = model.forward_features(images)
        close(found["logits"], model(images))
        close(found["embedding"], model.forward_head(feature_map, pre_logits=True))
    if name != "tinytest_swin":  # whose maps have the channels last
        feature_map = feature_map.permute(0, 2, 3, 1)
    _, height, width, _ = feature_map.shape
    for row in range(height):
        for column in range(width):
            close(found["tokens"][:, row * width + column], feature_map[:, row, column])
    assert found["tokens"].shape[1] == height * width
    assert "prefix_tokens" not in found


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("test_resnet", 2, lambda model: model.layer2),
        ("test_resnet", -2, lambda model: model.layer3),
        ("test_efficientnet", 1, lambda model: model.blocks[1]),
        ("tinytest_swin", 1, lambda model: model.layers[1]),
    ],
)
def test_another_stage_is_what_a_hook_sees_there(load, name, layer, part):
    encoder, model, pixels, images = load(name, f"@layer={layer}@pool=avg")
    feature_map = seen_at(part(model), lambda: model(images))
    feature_map = feature_map if name == "tinytest_swin" else feature_map.permute(0, 2, 3, 1)
    found = encoder.encode(pixels)
    close(found["tokens"], feature_map.flatten(1, 2))
    close(found["embedding"], feature_map.mean((1, 2)))
    assert set(found) == {"embedding", "tokens"}


def test_the_last_layer_by_its_number_is_the_default(load):
    plain = load("tinytest_dinov2")[0].fingerprint
    for options in ("@layer=-1", "@layer=2", "@norm=true", "@pool=default"):
        assert load("tinytest_dinov2", options)[0].fingerprint == plain


def test_every_choice_has_its_own_words_and_fingerprint(load):
    choices = ["", "@pool=token", "@pool=avg", "@pool=token+avg", "@layer=1@pool=avg", "@norm=false@pool=avg"]
    encoders = [load("tinytest_dinov3", choice)[0] for choice in choices]
    assert len({encoder.fingerprint for encoder in encoders}) == len({encoder.output for encoder in encoders}) == 6
    assert encoders[4].output == "timm: block 1 of 0–2, after the final norm; mean of the patch tokens"
    assert encoders[5].output == "timm: last block, without the final norm; mean of the patch tokens"
    assert encoders[4].name.endswith("@layer=1@pool=avg@size=64")


def test_size_keeps_the_share_that_is_cropped(load):
    whole, resized = load("test_resnet")[0].preprocess, load("test_resnet", "@size=96")[0].preprocess
    assert (whole.resize, whole.size, whole.crop) == (int(160 / 0.95), 160, 160)
    assert (resized.resize, resized.size, resized.crop) == (int(96 / 0.95), 96, 96)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("test_vit@layer=6@pool=avg", r"no such layer; its blocks are 0 to 5, or -6 to -1 from the end"),
        ("test_vit@layer=-7@pool=avg", r"no such layer; its blocks are 0 to 5"),
        ("test_resnet@layer=5@pool=avg", r"no such layer; its stages are 0 to 4"),
        ("test_vit@layer=2", r"own head belongs to its last layer .* add @pool=avg"),
        ("test_vit@norm=false", r"own head belongs to its last layer .* add @pool=avg"),
        ("test_vit@layer=two", r"@layer=two: give the index of a block"),
        ("test_vit@pool=max", r"no such pooling; known: default, token, avg, token\+avg"),
        ("test_vit@norm=yes", r"@norm=yes: known: true, false"),
        ("test_vit@size=0", r"@size=0: give a side in px"),
        ("test_vit@size=150", r"150 px is not a multiple of its patches of 16 px"),
        ("test_vit@pol=avg", r"@pol=avg: no such option; did you mean pool"),
        ("test_vit@pool=avg@pool=avg", r"@pool is given twice"),
        ("test_resnet@pool=token", r"no class token; known: @pool=default, @pool=avg"),
        ("tinytest_siglip@pool=token+avg", r"no class token"),
        ("tinytest_mean@norm=true", r"no final norm goes over its tokens; leave @norm out"),
        ("pit_ti_224@pool=avg", r"this model gives no tokens; known: @pool=default"),
        ("pit_ti_224@size=256", r"does not take images of 256 px"),
    ],
)
def test_what_a_model_cannot_do_is_refused_in_one_line(family, spec, message):
    name, at, options = spec.partition("@")
    with pytest.raises(ValueError, match=message) as error:
        load_encoder(f"timm/{name}:{family(name)[1]}{at}{options}")
    assert "\n" not in str(error.value)


def test_a_path_may_hold_an_at_sign(family, tmp_path):
    path = tmp_path / "me@home" / "weights@2"
    path.parent.mkdir()
    path.with_name("weights@2.safetensors").write_bytes(family("test_resnet")[1].read_bytes())
    encoder = load_encoder(f"timm/test_resnet:{path}.safetensors@pool=avg")
    assert encoder.files == (f"{path}.safetensors",)
    assert "mean of the feature map" in encoder.output


# -- open_clip ------------------------------------------------------------------------------------------

CLIPS = {
    "tokenstest-vit": {"image_size": 48, "layers": 3, "width": 64, "patch_size": 16},
    "tokenstest-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "tokenstest-timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
    "tokenstest-coca": {
        "image_size": 48, "layers": 2, "width": 64, "patch_size": 16,
        "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """`clip(name)`: a small open_clip model and its checkpoint."""
    folder, made = tmp_path_factory.mktemp("clips"), {}
    text = {"context_length": 16, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    for name, vision in CLIPS.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)

    def get(name):
        if name not in made:
            with torch.random.fork_rng():
                torch.manual_seed(5)
                model = open_clip.create_model(name).eval().requires_grad_(False)
            torch.save(model.state_dict(), folder / f"{name}.pt")
            made[name] = model, folder / f"{name}.pt"
        return made[name]

    return get


@pytest.fixture
def load_clip(clip, rng):
    def get(name, options=""):
        model, checkpoint = clip(name)
        encoder = load_encoder(f"open_clip/{name}:{checkpoint}{options}")
        size = encoder.preprocess.size
        pixels = torch.from_numpy(rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8))
        return encoder, model, pixels, encoder.preprocess.to_model(pixels)

    return get


@pytest.mark.parametrize("name", CLIPS)
def test_clips_give_encode_image_and_tokens_in_one_pass(load_clip, name):
    encoder, model, pixels, images = load_clip(name)
    found = encoder.encode(pixels)
    own = model.encode_image(images)
    close(found["embedding"], own[0] if isinstance(own, tuple) else own)
    visual = model.visual
    if name == "tokenstest-timm":
        expected = visual.trunk.forward_features(images)
    elif name == "tokenstest-resnet":
        expected = seen_at(visual.layer4, lambda: visual(images)).flatten(2).transpose(1, 2)
    else:
        expected = seen_at(visual.transformer, lambda: visual(images))
        expected = expected if visual.attn_pool is not None else visual.ln_post(expected)
    if name != "tokenstest-resnet":
        close(found["prefix_tokens"], expected[:, :1])
        expected = expected[:, 1:]
    close(found["tokens"], expected)
    assert encoder.fields["embedding"] == (24,)
    assert "encode_image" in encoder.output


@pytest.mark.parametrize("norm", ["true", "false"])
def test_another_block_of_a_clip(load_clip, norm):
    encoder, model, pixels, images = load_clip("tokenstest-vit", f"@layer=-2@pool=token+avg@norm={norm}")
    block = seen_at(model.visual.transformer.resblocks[1], lambda: model.visual(images))
    block = model.visual.ln_post(block) if norm == "true" else block
    found = encoder.encode(pixels)
    close(found["tokens"], block[:, 1:])
    close(found["embedding"], torch.cat([block[:, 0], block[:, 1:].mean(1)], 1))


@pytest.mark.parametrize(("name", "layer"), [("tokenstest-resnet", 2), ("tokenstest-timm", 3)])
def test_another_layer_of_other_clips(load_clip, name, layer):
    encoder, model, pixels, images = load_clip(name, f"@layer={layer}@pool=avg")
    if name == "tokenstest-resnet":
        expected = seen_at(model.visual.layer2, lambda: model.visual(images)).mean((2, 3))
    else:
        trunk = model.visual.trunk
        expected = trunk.norm(seen_at(trunk.blocks[layer], lambda: trunk(images)))[:, 1:].mean(1)
    close(encoder.encode(pixels)["embedding"], expected)


def test_a_clip_refuses_what_it_cannot_do(clip):
    for options, message in (
        ("tokenstest-vit@size=32", "no such option; known: layer, norm, pool"),
        ("tokenstest-vit@layer=3@pool=avg", "its blocks are 0 to 2"),
        ("tokenstest-coca@norm=true", "no final norm goes over its tokens"),
        ("tokenstest-resnet@pool=token", "no class token"),
    ):
        name, at, rest = options.partition("@")
        with pytest.raises(ValueError, match=message):
            load_encoder(f"open_clip/{name}:{clip(name)[1]}{at}{rest}")


# -- every encoder --------------------------------------------------------------------------------------


def test_only_the_fields_asked_for_are_returned(rng):
    encoder = tiny_encoder()
    pixels = torch.from_numpy(rng.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    everything = encoder.encode(pixels)
    assert list(everything) == ["embedding", "logits", "tokens"]
    for fields in (["embedding"], ("tokens", "embedding"), []):
        found = encoder.encode(pixels, fields)
        assert list(found) == list(fields)
        assert all(torch.equal(found[name], everything[name]) for name in fields)
    half = tiny_encoder().to("cpu", next(p for p in CANDIDATES.values() if p.weights == torch.bfloat16))
    assert {value.dtype for value in half.encode(pixels).values()} == {torch.float32}


def test_a_module_that_returns_other_shapes_than_it_says_is_refused(rng):
    encoder = tiny_encoder()
    pixels = torch.zeros((1, 16, 16, 3), dtype=torch.uint8)
    encoder.fields["tokens"], encoder.fields["attention"] = (16, 7), (2, 2, 2)
    with pytest.raises(ValueError, match=r"tiny: its module gives \(16, 6\) as 'tokens', not \(16, 7\)"):
        encoder.encode(pixels)
    with pytest.raises(ValueError, match=r"tiny: its module gives nothing as 'attention', not \(2, 2, 2\)"):
        encoder.encode(pixels, ["attention"])
    assert list(encoder.encode(pixels, ["embedding"])) == ["embedding"]


@pytest.mark.parametrize("fields", [{}, {"tokens": (3, 4)}, {"embedding": (3, 4)}])
def test_an_encoder_needs_an_embedding_that_is_a_vector(fields):
    with pytest.raises(ValueError, match='need an "embedding" that is a vector'):
        Encoder(
            name="x", module=torch.nn.Identity(), preprocess=tiny_encoder().preprocess, fields=fields, output="nothing"
        )
