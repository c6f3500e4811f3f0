"""A student of texts as an ONNX file, from token ids, with its tokeniser beside it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.exporting.card import Written
from featcache.graph import describe, refuse_missing_onnx
from featcache.inputs.texts import BYTES, Texts, text_input
from featcache.run_folder import TOKENIZER
from featcache.student import Student

SHAPES = ((1, 3), (5, 0), (2, 1))
"""Texts and tokens that a file is checked with; 0 tokens: as many as it takes."""
EXPORTED = (2, 16)


def refuse_other_formats(format: str, precision: str, with_preprocessing: bool) -> None:
    """Raises ValueError for what students of texts are not exported in."""
    if (format, precision, with_preprocessing) != ("onnx", "fp32", False):
        raise ValueError(
            "a student of texts is exported with format onnx in fp32, its tokeniser beside the file; give format onnx, and neither "
            "another precision nor preprocessing"
        )


def write_text_onnx(folder: Path, student: Student, record: dict[str, Any]) -> Written:
    """Write `model.onnx`, from int64 `ids` (batch, length), −1 behind the end of each text, of any batch and length, and
    `tokenizer.json` where it takes one.

    Raises:
        ValueError: the packages of the extra `onnx` are missing, or the student's tokeniser is.
    """
    refuse_missing_onnx()
    like, file, gives = student.model.input, folder / "model.onnx", f"text_{student.gives}"
    assert isinstance(like, Texts)
    if not like.vocabulary:
        raise ValueError(
            f"{TOKENIZER}: is gone from the run's folder, and the student takes no texts without; put it back"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter has some about its own ways with recurrent networks
        program = torch.onnx.export(
            student.deployed.eval(), (examples(like, *EXPORTED),), dynamo=True, input_names=["ids"], output_names=[gives],
            dynamic_shapes=({0: "batch", 1: "length"},), verbose=False,
        )  # fmt: skip
    assert program is not None
    program.save(str(file), external_data=False)
    describe(
        file,
        {
            "input": f"ids: int64 (batch, length), {like}, −1 behind the end of each text",
            "output": f"{gives}: float32 (batch, {', '.join(map(str, student.gives_shape))})",
            "preprocess": json.dumps(record["preprocess"]),
            "teacher": str(record.get("teacher", "")),
            "method": str(record.get("method", "")),
            **({"classes": json.dumps(student.classes)} if student.classes else {}),
        },
    )
    if like.content is not None:
        (folder / TOKENIZER).write_text(like.content, encoding="utf-8")

    def load() -> Callable[[Tensor], Tensor]:
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        return lambda ids: torch.from_numpy(np.asarray(session.run(None, {"ids": ids.numpy()})[0]))

    loading = (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession(f"{folder}/model.onnx")\n'
        'model = lambda ids: session.run(None, {"ids": ids})[0]'
    )
    return Written(loading=loading, load=load)


def examples(like: Texts, count: int, tokens: int) -> Tensor:
    """So many texts of token ids, the first of them a token shorter where it can be."""
    tokens = min(tokens or like.max_length, like.max_length)
    drawn = torch.Generator().manual_seed(count)
    ids = torch.randint(0, like.vocabulary, (count, tokens), generator=drawn)
    ids[0, 1:][-1:] = -1
    return ids


@torch.no_grad()
def largest_text_difference(student: Student, load: Callable[[], Callable[[Tensor], Tensor]]) -> float:
    """Between what the file and the student give of texts of several lengths, as a share of the length of the latter."""
    exported, like, worst = load(), student.model.input, 0.0
    assert isinstance(like, Texts)
    for count, tokens in SHAPES:
        ids = examples(like, count, tokens)
        wanted = student.deployed(ids)
        apart = (exported(ids) - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-12)
        worst = max(worst, float(apart.nan_to_num(torch.inf).max()))
    return worst


def tokenising_code(record: dict[str, Any]) -> str:
    """Python that makes `ids`, from a list of texts to a batch of token ids."""
    like = text_input(record["preprocess"])
    text = "text.strip()" if like.strip else "text"
    text = f"{text}.lower()" if like.lower else text
    text = f"{like.prefix!r} + {text}" if like.prefix else text
    if like.tokenizer == BYTES:
        first, found = "import numpy as np", f"list(({text}).encode())[:{like.max_length}]"
    else:
        first = (
            "import numpy as np\nfrom tokenizers import Tokenizer\n\n"
            f'tokenizer = Tokenizer.from_file(f"{{folder}}/{TOKENIZER}")\ntokenizer.enable_truncation({like.max_length})'
        )
        found = f"tokenizer.encode({text}).ids"
    return f"""{first}

def ids(texts):
    found = [{found} for text in texts]
    longest = max(map(len, found))
    return np.array([each + [-1] * (longest - len(each)) for each in found], np.int64)"""
