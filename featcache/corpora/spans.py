"""`spans:COUNT::CORPUS`: pieces of the texts of another corpus, as queries that nobody had to write."""

import random
import re

from featcache.corpora import Corpus, kind_of, passed_over, source_of
from featcache.corpora import open_corpus as open_any_corpus
from featcache.plugins import load_plugin
from featcache.specs import options_in

OPTIONS = ("seed", "least", "most")
LEAST, MOST = 2, 8


class Spans:
    """`count` spans of words of each text of `corpus`: of `least` to `most` words, as many as the text has at most; how many,
    and where, is drawn evenly from the seed, the document's id and the span's number, and nothing else.

    Spec: `spans:3@seed=1@least=2@most=8::beir:nfcorpus.zip:corpus`; by default seed 0 and 2 to 8 words, as queries have. Span k of
    document ID has the id `ID#k`, from 0, by which `distill fit --method embed_distill` knows its document, and that one's label.
    A text without words has spans without any, which fail when they are extracted.

    Lengths and their distribution are our choice; generated queries as such are EmbedDistill's (arXiv 2301.12005), by a model.

    Raises:
        ValueError: no count or options of that kind, or the corpus is none of texts.
    """

    kind = "text"

    def __init__(self, corpus: Corpus, count: int, seed: int = 0, least: int = LEAST, most: int = MOST):
        given = "".join(
            f"@{name}={value}"
            for name, value, usual in (("seed", seed, 0), ("least", least, LEAST), ("most", most, MOST))
            if value != usual
        )
        self.spec = f"spans:{count}{given}::{corpus.spec}"
        if count < 1 or not 1 <= least <= most:
            raise ValueError(f"{self.spec}: give a count of 1 or more, and 1 ≤ least ≤ most words")
        if kind_of(corpus) != "text":
            raise ValueError(f"{self.spec}: {corpus.spec} is no corpus of texts; give one, as beir:PATH:corpus")
        self.ids = [f"{name}#{k}" for name in corpus.ids for k in range(count)]
        self.class_names, self.passed_over = corpus.class_names, passed_over(corpus)
        self._corpus, self._count, self._seed, self._words = corpus, count, seed, (least, most)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> bytes:
        words = self._corpus.read(i // self._count).decode("utf-8", "surrogatepass").split()
        rng = random.Random(f"span\0{self._seed}\0{self.ids[i]}")
        length = min(rng.randint(*self._words), len(words))
        start = rng.randint(0, len(words) - length)
        return " ".join(words[start : start + length]).encode("utf-8", "surrogatepass")

    def label(self, i: int) -> int:
        return self._corpus.label(i // self._count)


def open_corpus(rest: str) -> Spans:
    """Open `COUNT[@seed=…][@least=…][@most=…]::CORPUS`."""
    count, options, corpus = _parsed(rest)
    return Spans(open_any_corpus(corpus), count, **options)


def _parsed(rest: str) -> tuple[int, dict[str, int], str]:
    match = re.fullmatch(r"(\d+)((?:@\w+=[^@:]*)*)::(.+)", rest)
    options = options_in(match[2], f"spans:{rest}", OPTIONS) if match else {}
    if not match or not all(value.isdecimal() for value in options.values()):
        raise ValueError(
            f"spans:{rest} is not spans:COUNT[@seed=NUMBER]::CORPUS (for example spans:3::beir:set.zip:corpus)"
        )
    return int(match[1]), {name: int(value) for name, value in options.items()}, match[3]


def named_files(rest: str) -> list[str] | None:
    source, of = source_of(_parsed(rest)[2])
    found = getattr(load_plugin("featcache.corpora", source), "named_files", None)
    return found(of) if found else None
