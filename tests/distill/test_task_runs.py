"""Every method that learns a task, as a run: in bfloat16, stopped in the middle of an epoch and resumed, it ends in the same bits."""

from types import SimpleNamespace

import numpy as np
import pytest
from fit_cases import Interrupted, interrupt_at
from PIL import Image
from small_world import make_teacher

import distill
import featcache
from featcache.head import Head

COLOURS = {"blue": (20, 30, 220), "green": (20, 200, 40), "red": (230, 30, 20)}
METHODS = {
    "ce": ({"cutmix": 1.0}, ("turned",)),
    "kd": ({}, ("turned",)),
    "ega": ({}, ("turned",)),
    "sskd": ({"head_epochs": 2}, ("turned",)),
    "reffakd": ({"table_temperature": 0.03}, ("turned",)),
    "akd": ({"steps": 2}, ("turned",)),
    "dad": ({}, ("turned", "hard")),
    "autoencoder": ({}, ("turned",)),
}


class Hard:
    """A corpus, as if it had been made of another one: what `dad` goes by is the spec."""

    def __init__(self, corpus):
        self._corpus, self.spec = corpus, f"adversarial:{corpus.spec}"
        self.ids, self.class_names = corpus.ids, corpus.class_names

    def __len__(self):
        return len(self._corpus)

    def label(self, i):
        return self._corpus.label(i)

    def read(self, i):
        return self._corpus.read(i)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / "images" / name).mkdir(parents=True)
        for i in range(10):
            noisy = rng.normal(colour, 60, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / "images" / name / f"{i}.png")
    clean = featcache.open_corpus(str(folder / "images"))
    corpora = {"turned": clean, "hard": Hard(clean)}
    given = {"device": "cpu", "precision": "fp32", "views": 4, "augment": "rotate4_crop"}
    stores = {
        name: featcache.extract(corpus, make_teacher(), folder / f"{name}.zarr", **given)
        for name, corpus in corpora.items()
    }
    head = Head(rng.normal(size=(3, 12)), np.zeros(3), np.arange(3), class_names=[*COLOURS])
    (folder / "head.safetensors").write_bytes(head.to_bytes())
    return SimpleNamespace(stores=stores, corpora=corpora, head=str(folder / "head.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_resumed_to_the_bit_in_bf16(world, tmp_path, method):
    options, names = METHODS[method]
    given = {
        "student": "conv_autoencoder" if method == "autoencoder" else "tiny", "image_size": 16, "method": method,
        "method_options": options, "head": world.head, "epochs": 2, "batch_size": 2, "precision": "bf16", "device": "cpu",
    }  # fmt: skip

    def fit(out, **more):
        stores, corpora = [world.stores[name] for name in names], [world.corpora[name] for name in names]
        return distill.fit(stores, corpora, out=out, **given, **more)

    whole = fit(tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", progress=interrupt_at("training", 12), checkpoint_minutes=0.0)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000010.pt"]
    run = fit(tmp_path / "run", resume=True)
    assert (run.path / "student.safetensors").read_bytes() == (whole.path / "student.safetensors").read_bytes()
    assert (whole.path / "head.safetensors").exists() == (method != "autoencoder")
