"""How close `extract` comes to the bare encoder on texts, and to `SentenceTransformer.encode`.

In one run, in turn, on the same texts, in fp32 and batches of one size: (A) `featcache.extract`, from a file of lines to a
sealed store; (B) forward passes over token ids already in memory, full batches of one width each, as many as A makes; (C)
`SentenceTransformer.encode`, which sorts all texts by length first. Prints A/B and A/C, round by round, of titles and of
abstracts of NFCorpus.

    python benchmarks/texts_throughput.py --rounds 3
"""

import json
import os
import shutil
import statistics
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from _targets import judge
from photographs import arguments

import featcache
from featcache.inputs import Views
from featcache.inputs.texts import Texts

TEACHER, BATCH = "builtin/minilm_l6", 16
SHARE = 0.8  # of the bare forward, at least


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=512)
    options = parser.parse_args()
    os.environ["FEATCACHE_HOME"] = str(options.work / "throughput-home")  # forgotten between rounds: nothing is reused
    encoder = featcache.load_encoder(TEACHER)
    targets = []
    for name, texts in read(options.data / "nfcorpus-titles.zip", options.texts).items():
        file = options.work / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(texts))
        passes = in_memory(encoder, texts)
        filled = len(texts) / (BATCH * len(passes))
        shares, own = [], []
        for _ in range(options.rounds):
            bare = len(texts) / forwards(encoder, passes)
            extracted = len(texts) / extract_seconds(encoder, file, options.work / "t.zarr")
            sentences = len(texts) / encode_seconds(encoder, texts)
            shares.append(extracted / bare)
            own.append(extracted / sentences)
            print(
                f"{name}: extract {extracted:.1f} texts/s, bare forward {bare:.1f}, SentenceTransformer.encode {sentences:.1f}; "
                f"ratios {shares[-1]:.3f}, {own[-1]:.3f}",
                flush=True,
            )
        share = statistics.median(shares)
        print(
            f"{name}: {len(texts)} texts, places of passes that are filled {filled:.2f}; medians: of the bare forward {share:.3f}, of "
            f"SentenceTransformer.encode {statistics.median(own):.3f}"
        )
        targets.append((f"{name}, of the bare forward", share, SHARE, "at least"))
    judge(targets)


def read(archive: Path, count: int) -> dict[str, list[str]]:
    """So many queries, and so many documents (a quarter as many), each on one line."""
    with zipfile.ZipFile(archive) as files:
        found = {}
        for name, file, most in (("titles", "queries-train.jsonl", count), ("abstracts", "corpus.jsonl", count // 4)):
            lines = files.read(file).decode().splitlines()[:most]
            found[name] = [" ".join(json.loads(line)["text"].split()) for line in lines]
        return found


def in_memory(encoder: featcache.Encoder, texts: list[str]) -> list[torch.Tensor]:
    """Token ids, a full batch of one width each."""
    like = encoder.preprocess
    assert isinstance(like, Texts)
    rows = torch.from_numpy(
        np.stack([like.render(text, like.draw(like.size_of(text), Views(), text, 0)) for text in texts])
    )
    passes = []
    for _, of_width in like.by_width(rows):
        for part in torch.split(of_width, BATCH):
            passes.append(torch.cat([part, part[:1].expand(BATCH - len(part), -1)]))
    return passes


def forwards(encoder: featcache.Encoder, passes: list[torch.Tensor]) -> float:
    """Seconds of them all, the encoder alone."""
    encoder.to("cpu")
    with torch.inference_mode():
        ids = [encoder.preprocess.to_model(each) for each in passes]
        encoder.module(ids[0])
        began = time.perf_counter()
        for each in ids:
            encoder.module(each)
    return time.perf_counter() - began


def extract_seconds(encoder: featcache.Encoder, file: Path, out: Path) -> float:
    """From its first batch to its last, without what is measured or claimed before."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(os.environ["FEATCACHE_HOME"], ignore_errors=True)
    at = []
    featcache.extract(
        f"lines:{file}", encoder, out, precision="fp32", batch_size=BATCH, device="cpu", progress=at.append
    )
    return float(at[-1].seconds)


def encode_seconds(encoder: featcache.Encoder, texts: list[str]) -> float:
    from sentence_transformers import SentenceTransformer

    folder = next(Path(file).parent for file in encoder.files if file.endswith("modules.json"))
    sentences = SentenceTransformer(str(folder), device="cpu")
    sentences.encode(texts[:BATCH])
    began = time.perf_counter()
    sentences.encode(texts, batch_size=BATCH)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
