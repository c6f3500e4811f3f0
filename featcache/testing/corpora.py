"""What every corpus must be."""

import pytest

from featcache.corpora import Corpus, kind_of, open_corpus
from featcache.inputs.images import decode
from featcache.inputs.texts import Texts


class CorpusContract:
    """Of the corpus that `spec` opens: a small one, whose samples are all whole, and with every class it names."""

    spec: str

    @pytest.fixture
    def corpus(self) -> Corpus:
        return open_corpus(self.spec)

    def test_it_is_a_corpus(self, corpus: Corpus) -> None:
        assert isinstance(corpus, Corpus)
        assert len(corpus) == len(corpus.ids) > 0

    def test_its_spec_opens_the_same_corpus(self, corpus: Corpus) -> None:
        again = open_corpus(corpus.spec)
        assert list(again.ids) == list(corpus.ids)
        assert again.class_names == corpus.class_names
        assert [again.label(i) for i in range(len(again))] == [corpus.label(i) for i in range(len(corpus))]
        assert again.read(0) == corpus.read(0)

    def test_ids_are_unique_strings(self, corpus: Corpus) -> None:
        assert all(isinstance(sample_id, str) and sample_id for sample_id in corpus.ids)
        assert len(set(corpus.ids)) == len(corpus)

    def test_reading_is_deterministic_and_gives_encoded_samples(self, corpus: Corpus) -> None:
        rows = sorted({0, len(corpus) // 2, len(corpus) - 1})
        first = {i: corpus.read(i) for i in rows}
        assert {i: corpus.read(i) for i in reversed(rows)} == first
        assert all(isinstance(data, bytes) for data in first.values())
        if kind_of(corpus) == "image":
            assert all(decode(data).mode == "RGB" for data in first.values())
        else:
            assert all(Texts.decode(data) for data in first.values())

    def test_labels_index_class_names(self, corpus: Corpus) -> None:
        labels = [corpus.label(i) for i in range(len(corpus))]
        classes = len(corpus.class_names or [])
        assert all(type(label) is int and -1 <= label < classes for label in labels)
        assert set(labels) - {-1} == set(range(classes))
