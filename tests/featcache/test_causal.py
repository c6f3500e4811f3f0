"""Causal language models: every field against a plain forward of each text alone in float64, and the head beside the store."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from typer.testing import CliRunner

import featcache
from featcache import extract, load_encoder
from featcache.corpora import open_corpus
from featcache.extraction.heads import head_beside
from featcache.head import Head
from featcache_cli import programs

transformers = pytest.importorskip("transformers", reason="needs featcache[text]")

WORDS = ["[UNK]", *"abcdefghijk"]
TEXTS = ["a b c", "d", "k j i h g f e d c b a", "a a a a a", "nothing", "b " * 20]
EXACT = {"device": "cpu", "precision": "fp32", "workers": 1, "batch_size": 4, "dtype": "float32"}
FIELDS = ("hidden", "length", "token_logits", "nll", "predicted", "token_nll")
SMALL = {"vocab_size": len(WORDS), "max_position_embeddings": 12}
CONFIGS = {
    "gpt2": ("GPT2Config", {"vocab_size": len(WORDS), "n_positions": 12, "n_embd": 8, "n_layer": 2, "n_head": 2}),
    "llama": (
        "LlamaConfig",
        {**SMALL, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16},
    ),
}


def saved(folder, name, given):
    """A random model of this configuration, with a tokeniser of single letters."""
    torch.manual_seed(0)
    config = getattr(transformers, name)(**given)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    return saved(tmp_path_factory.mktemp(request.param), *CONFIGS[request.param])


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(TEXTS))
    return f"lines:{path}"


@torch.no_grad()
def alone(folder, words):
    """Hidden states and logits of one text, as the library has them, in float64."""
    network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float64").eval()
    ids = torch.tensor([[WORDS.index(word) if word in WORDS else 0 for word in words]])
    found = network(ids, output_hidden_states=True)
    return ids[0], found.hidden_states[-1][0], found.logits[0]


def test_every_field_is_that_of_the_text_alone(folder, lines, tmp_path):
    store = extract(lines, f"causal/{folder}", tmp_path / "s.zarr", fields=FIELDS, **EXACT)
    assert store.manifest.format == 5
    found = {name: store.gather(store.ok, name) for name in ("embedding", *FIELDS)}
    head = Head.read(head_beside(store))
    assert head.fingerprint == store.fingerprint
    for row, text in enumerate(TEXTS):
        ids, hidden, logits = alone(folder, text.split()[:12])
        n = len(ids)
        assert found["length"][row] == n
        assert found["predicted"][row] == n - 1
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(found["hidden"][row, :n], hidden, **close)
        np.testing.assert_allclose(found["token_logits"][row, :n], logits, **close)
        np.testing.assert_allclose(head.logits(found["hidden"][row, :n]), logits, **close)
        np.testing.assert_allclose(found["embedding"][row], hidden.mean(0), **close)
        told = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        np.testing.assert_allclose(found["token_nll"][row, 1:n], told, **close)
        assert found["nll"][row] == pytest.approx(float(told.mean()) if n > 1 else 0.0, rel=1e-5)
        for name in ("hidden", "token_logits", "token_nll"):
            assert not found[name][row, n:].any()
        assert found["token_nll"][row, 0] == 0


def test_the_store_and_its_head_say_the_same_bytes_again(folder, lines, tmp_path, caplog):
    one, two = (
        extract(lines, f"causal/{folder}", tmp_path / f"{name}.zarr", fields=["hidden", "length"], **EXACT)
        for name in "ab"
    )
    assert one.digest == two.digest
    head = Path(head_beside(one))
    assert head.read_bytes() == Path(head_beside(two)).read_bytes()
    head.write_bytes(b"another")
    given = {"fields": ["hidden", "length"], **EXACT}
    with caplog.at_level(logging.WARNING):
        extract(lines, f"causal/{folder}", one.path, **given)
    assert "is not the head of causal/" in caplog.text
    assert head.read_bytes() == b"another"
    head.unlink()
    extract(lines, f"causal/{folder}", one.path, **given)
    assert head.read_bytes() == Path(head_beside(two)).read_bytes()
    plain = extract(lines, f"causal/{folder}", tmp_path / "plain.zarr", fields=["length"], **EXACT)
    assert not Path(head_beside(plain)).exists()


def test_options_and_a_length(folder):
    last = load_encoder(f"causal/{folder}@pool=last@max_length=5")
    assert last.preprocess.max_length == 5
    assert last.fields["hidden"] == (5, 8)
    ids = torch.full((1, 5), -1, dtype=torch.int32)
    ids[0, :3] = torch.tensor([1, 2, 3])
    found = last.encode(ids)
    torch.testing.assert_close(found["embedding"], found["hidden"][:, 2])
    assert last.fingerprint != load_encoder(f"causal/{folder}@max_length=5").fingerprint


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        (
            "BertConfig",
            {**SMALL, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8},
            "follow from later tokens too, so it is no causal language model",
        ),
        (
            "CohereConfig",
            {
                **SMALL,
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 8,
                "logit_scale": 0.01,
            },
            "its logits are not what its last layer makes of its last hidden states",
        ),
    ],
)
def test_a_model_whose_states_and_head_do_not_do_is_refused(tmp_path, name, given, match):
    with pytest.raises(ValueError, match=match):
        load_encoder(f"causal/{saved(tmp_path / 'm', name, given)}")


def test_what_is_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"causal/.*could not be loaded .*save_pretrained"):
        load_encoder(f"causal/{tmp_path}/none")


def test_the_plan_says_how_large_it_is_and_offers_less(tmp_path, folder, monkeypatch):
    """Of 1 MB of text at 192 dimensions, a byte a token, 384 MB of hidden states."""
    encoder = load_encoder(f"causal/{folder}@max_length=8")
    encoder.fields |= {"hidden": (64, 192), "token_logits": (64, 256)}
    from featcache.extraction.plan import manifest_of, smaller_fields
    from featcache.extraction.settings import ExtractSettings
    from featcache.inputs import Views

    text = tmp_path / "text.txt"
    text.write_text("a b " * 250_000)
    corpus = open_corpus(f"windows:{text}@length=64")
    settings = ExtractSettings(recipe=Views(), fields=("hidden", "length"), device="cpu")
    (line,) = smaller_fields(manifest_of(corpus, encoder, settings), encoder)
    assert line == "hidden 384.0 MB of it; with --fields token_logits --top-k 64 in the place, 258.0 MB"
    few = ExtractSettings(recipe=Views(), fields=("token_logits",), top_k=64, device="cpu")
    assert smaller_fields(manifest_of(corpus, encoder, few), encoder) == []


def test_on_the_command_line(folder, lines, tmp_path, monkeypatch):
    monkeypatch.setattr("featcache.extraction.plan.LARGE", 10)
    monkeypatch.setattr("featcache.extraction.plan.OFFERED", 2)
    out, said = tmp_path / "s.zarr", tmp_path / "said.json"
    command = ["extract", lines, "--teacher", f"causal/{folder}", "--fields", "hidden,length,nll,predicted"]
    command += ["--out", str(out), "--device", "cpu", "--precision", "fp32", "--json", str(said)]
    run = CliRunner().invoke(programs.app("featcache"), [*command, "--dry-run"])
    assert run.exit_code == 0
    assert "with --fields token_logits --top-k 2 in the place" in " ".join(run.output.split())
    assert not out.exists()
    assert not Path(f"{out}.head.safetensors").exists()
    run = CliRunner().invoke(programs.app("featcache"), command)
    assert run.exit_code == 0, run.output
    assert json.loads(said.read_text())["head"] == f"{out}.head.safetensors"
    Path(f"{out}.head.safetensors").unlink()
    assert CliRunner().invoke(programs.app("featcache"), command).exit_code == 0
    assert Path(f"{out}.head.safetensors").exists()
    import evalsuite

    result = evalsuite.mean(featcache.open_store(out))
    per_token = [
        F.cross_entropy(o[:-1], i[1:], reduction="sum") for i, _, o in (alone(folder, t.split()[:12]) for t in TEXTS)
    ]
    total = sum(len(text.split()[:12]) - 1 for text in TEXTS)
    assert result.metrics["mean/nll"].value == pytest.approx(float(sum(per_token)) / total, rel=1e-5)
