"""Students of texts: trained, resumed, used as encoders again, and what does not fit is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from stopped import Stop, files, stop_after
from tokenizers import Tokenizer, models, pre_tokenizers

from distill.exporting.export import export
from distill.training.fit import fit
from featcache import extract, load_encoder, open_store
from featcache.encoder import Encoder
from featcache.inputs.texts import with_tokenizer
from featcache.student import load_student
from featcache.testing.models import SmallTextModule, small_teacher

TEACHER = "featcache.testing.models:small_text_teacher"
WORDS = ["[UNK]", *(f"word{i}" for i in range(30))]
EXACT = {"device": "cpu", "precision": "fp32", "batch_size": 8}
FEW = {"method": "cosine", "epochs": 2, "batch_size": 16, "lr": 0.01, "device": "cpu"}


def word_teacher():
    """As small_text_teacher, of words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = SmallTextModule()
    like = with_tokenizer(tokenizer.to_str(), 6)
    return Encoder(
        name="test_text_students:word_teacher",
        module=module,
        preprocess=like,
        fields={"embedding": (6,)},
        output="mean",
    )


class OwnStudent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.vectors = torch.nn.EmbeddingBag(257, 5, padding_idx=256)

    def forward(self, ids):
        return self.vectors(ids.where(ids >= 0, 256))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """64 texts of 1 to 12 words."""
    drawn, file = np.random.default_rng(0), tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = [" ".join(drawn.choice(WORDS[1:], drawn.integers(1, 13))) for _ in range(64)]
    file.write_text("\n".join(lines))
    return f"lines:{file}"


@pytest.fixture(scope="module")
def store(corpus, tmp_path_factory):
    return extract(corpus, load_encoder(TEACHER), tmp_path_factory.mktemp("store") / "t.zarr", **EXACT)


@pytest.fixture(scope="module")
def word_store(corpus, tmp_path_factory):
    return extract(corpus, word_teacher(), tmp_path_factory.mktemp("store") / "w.zarr", **EXACT)


@pytest.mark.parametrize("student", ["bag/8", "gru/8", "test_text_students:OwnStudent"])
def test_a_student_learns_and_is_an_encoder_again(store, corpus, tmp_path, student):
    run = fit(store, corpus, out=tmp_path / "run", student=student, holdout=0.25, **FEW | {"epochs": 12})
    cosines = [record["loss/cosine"] for record in run.metrics]
    assert cosines[-1] < 0.5 * cosines[0]
    assert -1 <= run.metrics[-1]["holdout/gram_pearson"] <= 1
    trained, record = load_student(run.path, trust_code=True)
    assert record["preprocess"] == {"input": "texts", "tokenizer": "bytes", "max_length": 24}
    made = extract(corpus, load_encoder(f"run:{run.path}", trust_code=True), tmp_path / "s.zarr", **EXACT)
    texts = [line.encode() for line in Path(corpus.partition(":")[2]).read_text().splitlines()]
    alone = [trained(torch.tensor([list(text[:24])]))[0].detach().numpy() for text in texts]
    np.testing.assert_allclose(made.read("embedding", 0, 64)[:, 0], np.stack(alone), atol=2e-3)  # float16
    assert made.manifest.encoder.fingerprint != store.fingerprint


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("centred", {"mapping_steps": 3}), ("tintem", {"mapping_steps": 3}), ("landmarks", {"mapping_steps": 3}),
        ("proteus", {}), ("rkd", {}), ("mse", {}),
    ],
)  # fmt: skip
def test_methods_of_embeddings_train_on_texts(store, corpus, tmp_path, method, options):
    given = {**FEW, "method": method, "method_options": options, "epochs": 1}
    assert fit(store, corpus, out=tmp_path / "run", student="bag/4", **given).finished


def test_a_run_that_was_stopped_ends_byte_identical(store, corpus, tmp_path):
    given = {"student": "gru/4", **FEW, "holdout": 0.1, "keep_checkpoints": 1.0}
    fit(store, corpus, out=tmp_path / "whole", **given)
    with pytest.raises(Stop):
        fit(store, corpus, out=tmp_path / "run", checkpoint_minutes=0.0, progress=stop_after(5), **given)
    fit(store, corpus, out=tmp_path / "run", resume=True, **given)
    for name in ("student.safetensors", "student.json", "snapshots/step-00000003.safetensors"):
        assert files(tmp_path / "run")[name] == files(tmp_path / "whole")[name], name


def test_a_students_tokeniser_stays_with_it(word_store, corpus, tmp_path, monkeypatch):
    run = fit(word_store, corpus, out=tmp_path / "run", student="bag/4", trust_code=True, keep_checkpoints=1.0, **FEW)
    tokenizer = run.path / "tokenizer.json"
    for spec in (f"run:{run.path}", f"run:{run.path}@epoch=1"):
        encoder = load_encoder(spec)
        assert encoder.preprocess == word_teacher().preprocess
        assert encoder.preprocess.vocabulary == len(WORDS)
        assert str(tokenizer) in encoder.files or str(tokenizer) in map(str, encoder.files)
    again = fit(word_store, corpus, out=tmp_path / "b", student=f"run:{run.path}", trust_code=True, **FEW)
    assert (again.path / "tokenizer.json").read_text() == tokenizer.read_text()
    tokenizer.write_text(tokenizer.read_text().replace("word7", "other"))
    with pytest.raises(ValueError, match=r"tokenizer.json: the tokeniser is another one"):
        load_encoder(f"run:{run.path}")
    tokenizer.unlink()
    with pytest.raises(ValueError, match=r"its tokenizer.json is gone, and it takes no texts without; put it back"):
        load_encoder(f"run:{run.path}")


def test_a_store_whose_encoder_is_gone_asks_for_a_tokeniser(word_store, corpus, tmp_path):
    with pytest.raises(ValueError, match=r"w.zarr: its encoder is not here .*give the tokeniser .* tokenizer=FILE"):
        fit(word_store, corpus, out=tmp_path / "run", student="bag/4", **FEW)
    (tmp_path / "t.json").write_text(word_teacher().preprocess.content)
    given = {"student": "bag/4", "tokenizer": str(tmp_path / "t.json"), "max_length": 4, **FEW}
    run = fit(word_store, corpus, out=tmp_path / "run", **given)
    assert load_student(run.path)[0].model.input.max_length == 4
    run = fit(word_store, corpus, out=tmp_path / "bytes", **given | {"tokenizer": "bytes", "max_length": 40})
    assert load_student(run.path)[1]["preprocess"] == {"input": "texts", "tokenizer": "bytes", "max_length": 40}
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"t.json: is no tokenizer.json"):
        fit(word_store, corpus, out=tmp_path / "no", **given)


def test_a_transformer_trains_from_its_configuration_and_from_its_weights(store, word_store, corpus, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs featcache[text]")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=7, max_position_embeddings=24, **sizes)
    (tmp_path / "config.json").write_text(config.to_json_string())
    spec = f"transformers/{tmp_path / 'config.json'}"
    run = fit(store, corpus, out=tmp_path / "run", student=f"{spec}@pool=cls", **FEW)
    record = json.loads((run.path / "student.json").read_text())
    assert (record["architecture"], record["pool"], record["config"]["vocab_size"]) == ("transformers", "cls", 256)
    encoder = load_encoder(f"run:{run.path}")
    assert encoder.fields["embedding"] == (8,)
    with pytest.raises(ValueError, match=r"takes 24 tokens, and texts have up to 30; set max_length=24"):
        fit(store, corpus, out=tmp_path / "no", student=spec, max_length=30, **FEW)

    folder, like = tmp_path / "bert", word_teacher().preprocess
    network = transformers.BertModel(
        transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **sizes)
    )
    network.save_pretrained(folder)
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(like.content), unk_token="[UNK]")
    own.save_pretrained(folder)
    given = {"student": f"transformers/{folder}", "pretrained": True, **FEW}
    run = fit(store, corpus, out=tmp_path / "own", **given | {"epochs": 1, "lr": 1e-9})
    trained = load_student(run.path)[0]
    assert trained.model.input.vocabulary == len(WORDS)
    name = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(trained.body.network.state_dict()[name], network.state_dict()[name], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"comes with a tokeniser of its own; leave tokenizer out"):
        fit(store, corpus, out=tmp_path / "no", tokenizer="bytes", **given)


def test_what_does_not_fit_is_refused(store, corpus, tmp_path, images):
    pictures = extract(str(images), small_teacher(), tmp_path / "i.zarr", **EXACT)
    bag, out = {"student": "bag/4", **FEW}, {"out": tmp_path / "run"}
    for given, said in {
        (
            store,
            corpus,
            "tiny",
        ): "tiny: the student takes images, and its teacher was shown texts; give a student of texts",
        (
            pictures,
            str(images),
            "bag/4",
        ): "bag/4 takes texts, and its teacher was shown images; give a student of images",
        (store, str(images), "bag/4"): "is of images, and small texts takes texts",
        (pictures, corpus, "tiny"): "is of texts, and small takes images",
        (store, None, "bag/4"): "t.zarr: is of texts, and keeps none; give them with --corpus",
        (store, corpus, "bag/0"): "bag/0: give its width",
    }.items():
        with pytest.raises(ValueError, match=said):
            fit(given[0], given[1], **out, **bag | {"student": given[2]})
    for settings, said in (
        ({"views": "student"}, "views=student changes images, and texts stay as they are"),
        ({"image_size": 32}, "bag/4 takes texts, and no image_size; leave it out"),
        ({"pretrained": True}, "bag/4: pretrained is for"),
        ({"max_length": -1}, "max_length must not be negative"),
    ):
        with pytest.raises(ValueError, match=said):
            fit(store, corpus, **out, **bag | settings)
    with pytest.raises(ValueError, match=r"tokenizer is of students of texts, and .*i.zarr is of images; leave it out"):
        fit(pictures, str(images), **out, **FEW | {"student": "tiny", "tokenizer": "bytes"})
    assert not (tmp_path / "run").exists()


def test_an_export_gives_the_same_without_us(word_store, corpus, tmp_path):
    pytest.importorskip("onnxscript", reason="onnx is an extra")
    (tmp_path / "t.json").write_text(word_teacher().preprocess.content)
    given = FEW | {"epochs": 1, "tokenizer": str(tmp_path / "t.json")}
    run = fit(word_store, corpus, out=tmp_path / "run", student="gru/4", **given)
    with pytest.raises(ValueError, match="a student of texts is exported with format onnx in fp32"):
        export(run, tmp_path / "no")
    made = export(run, tmp_path / "out", format="onnx")
    assert made.files == ("README.md", "model.onnx", "tokenizer.json")
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    found = {}
    exec("\n".join(code[:2]).replace('folder = "."', f"folder = {str(made.path)!r}"), found)
    texts = ["word1 word2", "word3", "word4 " * 12]
    encoder = load_encoder(f"run:{run.path}")
    expected = encoder.encode_padded(encoder.preprocess.ids(texts), 2)["embedding"].numpy()
    np.testing.assert_allclose(found["model"](found["ids"](texts)), expected, atol=1e-5)


def test_methods_that_change_pixels_are_refused(corpus, tmp_path, monkeypatch):
    texts = open_labelled(corpus)
    store = extract(texts, load_encoder(TEACHER), tmp_path / "s.zarr", **EXACT)
    for method, options in (("akd", {"lam": 0.0}), ("ce", {"mixup": 0.2})):
        with pytest.raises(ValueError, match=rf"method {method} as it is set here is for images"):
            fit(
                store,
                texts,
                out=tmp_path / "no",
                **FEW | {"student": "bag/4", "method": method, "method_options": options},
            )
    run = fit(store, texts, out=tmp_path / "run", **FEW | {"student": "bag/4", "method": "ce", "epochs": 40})
    assert run.metrics[-1]["loss/ce"] < 0.9 * run.metrics[0]["loss/ce"]
    encoder = load_encoder(f"run:{run.path}")
    assert encoder.classes == ["short", "long"]
    assert encoder.fields["logits"] == (2,)
    assert open_store(store.path).class_names == ["short", "long"]


def open_labelled(spec):
    from featcache.corpora.lines import Lines

    corpus = Lines(spec.partition(":")[2])
    corpus.class_names = ["short", "long"]
    corpus.labels = [int(len(corpus.read(i)) > 40) for i in range(len(corpus))]
    return corpus
