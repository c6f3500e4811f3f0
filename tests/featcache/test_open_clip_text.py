"""open_clip's text tower as a teacher, beside open_clip itself; weights are random."""

import csv

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from evalsuite import zeroshot
from featcache import extract
from featcache.encoder import load_encoder
from featcache.inputs.texts import WholeText
from featcache.store import open_store

NAME = "ViT-B-32"
SMALL = {
    "vision_cfg": {"layers": 1, "width": 64, "image_size": 32, "patch_size": 16, "head_width": 32},
    "text_cfg": {"layers": 2, "width": 64, "heads": 2},
    "embed_dim": 16,
}
CLASSES, TEMPLATES = ["cat", "sea lion", "Café"], ["a photo of a {}.", "itap of my {}", "the “{}”"]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Of a small CLIP, made under a name that open_clip knows; its file, and the model."""
    made = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda name, **given: made(name, **{**given, **SMALL}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.create_model(NAME).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    return tmp_path / "clip.pt", clip


def test_token_ids_and_embeddings_are_open_clips(checkpoint):
    file, clip = checkpoint
    encoder = load_encoder(f"open_clip_text/{NAME}:{file}")
    texts = ["A photo of a cat.", "it's ‘fancy’ — naïve café 1234 🙂", "long " * 100, "HELLO   world\n\ttabs", "語"]
    like, theirs = encoder.preprocess, open_clip.get_tokenizer(NAME)(texts)
    ids = torch.stack([torch.from_numpy(like.render(each, WholeText(1))) for each in texts])
    assert torch.equal(ids.clamp(min=0).long(), theirs)
    with torch.inference_mode():
        torch.testing.assert_close(encoder.encode_padded(ids, 8, ("embedding",))["embedding"], clip.encode_text(theirs))
    assert encoder.fields == {"embedding": (16,)}
    assert load_encoder(f"open_clip-text/{NAME}:openai:{file}").preprocess == like


def test_zero_shot_classification_is_open_clips(checkpoint, tmp_path, rng):
    file, clip = checkpoint
    for label, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8) // (label + 1)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    with open(tmp_path / "prompts.csv", "w", newline="", encoding="utf-8") as out:
        rows = [(template.format(name), name) for name in CLASSES for template in TEMPLATES]
        csv.writer(out).writerows([("text", "label"), *rows])
    given = {"device": "cpu", "precision": "fp32", "dtype": "float32"}
    test, prompts = tmp_path / "test.zarr", tmp_path / "prompts.zarr"
    extract(str(tmp_path / "photos"), f"open_clip/{NAME}:openai:{file}", test, **given)
    extract(f"texts:{tmp_path / 'prompts.csv'}", f"open_clip_text/{NAME}:{file}", prompts, **given)
    found = zeroshot(test, prompts)

    tokenizer, order = open_clip.get_tokenizer(NAME), sorted(CLASSES)
    weight = open_clip.build_zero_shot_classifier(clip, tokenizer, order, [each.format for each in TEMPLATES]).T.numpy()
    store = open_store(test)
    images = store.gather(np.arange(12), "embedding", np.zeros(12, int))
    predicted = (images / np.linalg.norm(images, axis=1, keepdims=True) @ weight.T).argmax(1)
    assert found.samples["zeroshot/top1"].tolist() == (predicted == np.asarray(store.labels)).tolist()
    assert found.inputs["prompts"]["encoder"] != found.inputs["test"]["encoder"]


def test_what_is_no_whole_model_with_clips_tokeniser_is_refused(checkpoint, tmp_path):
    file, clip = checkpoint
    torch.save(clip.visual.state_dict(), tmp_path / "visual.pt")
    with pytest.raises(ValueError, match=r"visual\.pt: does not fit .*give a checkpoint of the whole model"):
        load_encoder(f"open_clip_text/{NAME}:{tmp_path / 'visual.pt'}")
    with pytest.raises(ValueError, match="no such pretrained tag or file"):
        load_encoder(f"open_clip_text/{NAME}:nowhere.pt")
    with pytest.raises(ValueError, match="has another tokeniser than CLIP's own"):
        load_encoder(f"open_clip_text/ViT-B-16-SigLIP:{file}")
