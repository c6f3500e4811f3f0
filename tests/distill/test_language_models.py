"""Language models end to end: trained alone, their states and head kept, another trained from these, judged in nats a byte."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import evalsuite
from distill import fit
from distill.training.run import Run
from featcache import Encoder, extract
from featcache.extraction.heads import head_beside
from featcache.head import Head
from featcache.inputs.texts import Texts
from featcache.models._language import language_features
from featcache.student import load_student

LENGTH = 16
EXACT = {"device": "cpu", "precision": "fp32", "workers": 1, "batch_size": 16}
SHORT = {
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.02,
    "precision": "fp32",
    "workers": 1,
    "warmup_epochs": 0.0,
    "holdout": 0.1,
    "eval_every": 1,
}
FIELDS = ("hidden", "length", "nll", "predicted", "token_logits")


class Counts(nn.Module):
    """How often each byte is there, logarithmically: a teacher that knows nothing, for texts to be in a store."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, ids):
        counts = torch.zeros(len(ids), 257).scatter_add(
            1, ids.clamp(min=-1) + 1, torch.ones_like(ids, dtype=torch.float32)
        )
        return {"embedding": self.scale * counts[:, 1:].log1p()}


def counting(length=LENGTH):
    like = Texts(tokenizer="bytes", max_length=length)
    return Encoder(name="counts", module=Counts(), preprocess=like, fields={"embedding": 256}, output="counts")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A long text in windows, its store, and a teacher trained on it with its store and head."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    words = ["so", "it", "goes", "and", "then", "nothing", "more"]
    (folder / "text.txt").write_text(" ".join(rng.choice(words, 260)))
    corpus = f"windows:{folder / 'text.txt'}@length={LENGTH}"
    plain = extract(corpus, counting(), folder / "plain.zarr", **EXACT)
    fit(plain.path, corpus, out=folder / "teacher", student="gru_lm/24", method="next_token", **SHORT)
    store = extract(corpus, f"run:{folder / 'teacher'}", folder / "teacher.zarr", fields=FIELDS, **EXACT)
    return folder, corpus, plain, store


def test_a_language_model_is_trained_and_is_a_teacher_with_a_head(world):
    folder, _, _, store = world
    metrics = Run(folder / "teacher").metrics
    first, last = (each["holdout/token_nll"] for each in (metrics[0], metrics[-1]))
    assert last < first < np.log(256)
    assert json.loads((folder / "teacher" / "student.json").read_text())["architecture"] == "gru_lm/24"
    head, of_run = Head.read(head_beside(store)), Head.read(folder / "teacher" / "head.safetensors")
    assert head.fingerprint == of_run.fingerprint == store.fingerprint
    np.testing.assert_array_equal(head.weight, of_run.weight)
    hidden, length = store.gather(store.ok, "hidden"), store.gather(store.ok, "length")
    filled = np.arange(LENGTH) < length[:, None]
    logits = store.gather(store.ok, "token_logits")
    np.testing.assert_allclose(head.logits(hidden[filled].astype(np.float32)), logits[filled], atol=0.05)
    assert not hidden[~filled].any()
    student, _ = load_student(folder / "teacher")
    assert sum(weight.numel() for weight in student.parameters()) == 256 * 6 + 3 * 24 * (6 + 24 + 2) + 24 * 256 + 256


def test_nats_a_byte_are_torchs_own(world):
    """Of each window alone, unpadded, from the network itself."""
    folder, _, _, store = world
    student, _ = load_student(folder / "teacher")
    text = (folder / "text.txt").read_bytes()
    total = count = 0.0
    for start in range(0, len(text), LENGTH):
        ids = torch.tensor([[*text[start : start + LENGTH]]])
        with torch.no_grad():
            logits = student.body.head(student.body.recurrent(student.body.vectors(ids))[0])[0]
        total += float(nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    result = evalsuite.mean(store)
    assert result.metrics["mean/nll"].value == pytest.approx(total / count, rel=1e-5)


def test_padding_changes_nothing():
    drawn = torch.Generator().manual_seed(0)
    hidden, logits = torch.randn(2, 5, 3, generator=drawn), torch.randn(2, 5, 7, generator=drawn)
    ids = torch.tensor([[1, 2, 3, -1, -1], [4, -1, -1, -1, -1]])
    found = language_features(hidden, logits, ids, "mean")
    alone = language_features(hidden[:1, :3], logits[:1, :3], ids[:1, :3], "mean")
    for name, value in alone.items():
        mine = found[name][:1] if value.ndim < 2 or name == "embedding" else found[name][:1, :3]
        torch.testing.assert_close(mine, value)
    for name in ("hidden", "token_logits", "token_nll"):
        assert not found[name][0, 3:].any()
    assert (found["nll"][1], found["predicted"][1], found["length"][1]) == (0, 0, 1)


def test_a_student_from_the_cache_alone_and_a_run_that_was_stopped(world, tmp_path, monkeypatch):
    _, corpus, _, store = world
    given = {"student": "gru_lm/8", "method": "okd", "head": head_beside(store), **SHORT}
    whole = fit(store.path, corpus, out=tmp_path / "whole", **given)

    def stop(at):
        if (at.stage, at.done) == ("training", 9):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(store.path, corpus, out=tmp_path / "run", progress=stop, **given)
    monkeypatch.setattr(Encoder, "encode", None)  # no teacher is asked
    run = fit(store.path, corpus, out=tmp_path / "run", resume=True, **given)
    for name in ("student.safetensors", "head.safetensors"):
        assert (Path(run.path) / name).read_bytes() == (Path(whole.path) / name).read_bytes(), name
    assert run.metrics[-1]["holdout/token_nll"] < run.metrics[0]["holdout/token_nll"]
    assert {"loss/module_ce", "loss/module_kl"} <= run.metrics[-1].keys()


def test_a_student_from_the_largest_logits_alone(world, tmp_path):
    folder, corpus, _, _ = world
    given = {"fields": ("token_logits", "length"), "top_k": 8, **EXACT}
    top = extract(corpus, f"run:{folder / 'teacher'}", tmp_path / "top.zarr", **given)
    assert top.manifest.top_k == {"token_logits": 8}
    options = {"online": False, "source": "token_logits"}
    run = fit(top.path, corpus, out=tmp_path / "run", student="gru_lm/8", method="okd", method_options=options, **SHORT)
    assert run.metrics[-1]["holdout/token_nll"] < run.metrics[0]["holdout/token_nll"]


def test_what_does_not_fit_is_refused_before_training(world, tmp_path):
    _, corpus, plain, store = world
    given = {"method": "okd", "head": head_beside(store), **SHORT}
    for store_of, settings, match in (
        (store, {"student": "gru_lm/8", "head": ""}, "needs the head that reads its hidden states"),
        (plain, {"student": "gru_lm/8", "head": ""}, "holds no hidden"),
        (store, {"student": "gru/8"}, "gives no token_logits"),
        (plain, {"student": "gru/8", "method": "next_token", "head": ""}, "gives no token_logits"),
    ):
        with pytest.raises(ValueError, match=match):
            fit(store_of.path, corpus, out=tmp_path / "run", **{**given, **settings})
        assert not (tmp_path / "run" / "student.json").exists()


def test_another_tokeniser_is_refused(world, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    _, corpus, _, store = world
    letters = {chr(code): code for code in range(256)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.save(str(tmp_path / "letters.json"))
    given = {"student": "gru_lm/8", "method": "okd", "head": head_beside(store), **SHORT}
    with pytest.raises(ValueError, match=r"token by token, and gru_lm/8 takes tokeniser .*, its teacher took bytes"):
        fit(store.path, corpus, out=tmp_path / "run", tokenizer=str(tmp_path / "letters.json"), **given)


@pytest.mark.parametrize("tied", [True, False])
def test_a_transformer_is_a_student_too(world, tmp_path, tied):
    """From a configuration, its head its vectors or not; resumed, loaded, and what it says is what the library says."""
    transformers = pytest.importorskip("transformers", reason="needs featcache[text]")
    _, corpus, _, store = world
    config = transformers.GPT2Config(
        n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=tied, resid_pdrop=0, embd_pdrop=0
    )
    config.save_pretrained(tmp_path / "small")
    given = {"method": "okd", "head": head_beside(store), **SHORT, "epochs": 1}
    run = fit(store.path, corpus, out=tmp_path / "run", student=f"causal/{tmp_path}/small/config.json", **given)
    student, record = load_student(run.path)
    assert record["architecture"] == "causal"
    network = student.body.network
    assert (network.lm_head.weight is network.transformer.wte.weight) == tied
    made = extract(corpus, f"run:{run.path}", tmp_path / "s.zarr", fields=("nll", "hidden"), dtype="float32", **EXACT)
    text = Path(corpus.removeprefix("windows:").partition("@")[0]).read_bytes()[:LENGTH]
    ids = torch.tensor([[*text]])
    with torch.no_grad():
        said = network.eval()(ids, labels=ids)
    assert made.gather([0], "nll")[0] == pytest.approx(float(said.loss), rel=1e-4)
    head = Head.read(head_beside(made))
    np.testing.assert_allclose(head.logits(made.gather([0], "hidden")[0]), said.logits[0].numpy(), atol=1e-4)
    with pytest.raises(ValueError, match=r"takes 16 tokens, and texts have up to 32; set max_length=16"):
        fit(store.path, corpus, out=tmp_path / "long", student=f"causal/{tmp_path}/small", max_length=32, **given)
