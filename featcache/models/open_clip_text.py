"""`open_clip_text/NAME:TAG`: the text tower of an open_clip model, whose embeddings are in the space of `open_clip/NAME:TAG`'s,
with the weights of a tag or, as `NAME:CHECKPOINT` or `NAME:TAG:CHECKPOINT`, of a local file of the whole model; also
`open_clip_text/hf-hub:…` and `open_clip_text/local-dir:FOLDER`. A teacher, of models with CLIP's own tokeniser.

That is built as a `tokenizer.json` of the words and merges that come with open_clip. Curly quotes become straight ones, as with
open_clip; other repairs of its package ftfy (wrongly decoded text, ligatures, wide letters) and HTML entities are left to who
writes the texts.
"""

from dataclasses import replace
from typing import Any

import open_clip
from jaxtyping import Int64
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, SimpleTokenizer
from torch import Tensor, nn

from featcache.inputs.texts import Texts, WholeText, with_tokenizer
from featcache.models import Features, Model
from featcache.models._open_clip_weights import open_pretrained
from featcache.models._texts import text_shapes
from featcache.models.open_clip import hub_repository as hub_repository
from featcache.models.open_clip import named_files as named_files
from featcache.specs import naming

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""How CLIP cuts a text before it looks for merges."""
TRIED = ("A photo of a Cat, isn't it?", "two  spaces,\n3.5 Äpfel + 語 & “quotes”")


class TextTower(Model):
    """Token ids (B, L), −1 behind the end → `encode_text`, not normalised: (B, D)."""

    def __init__(self, spec: str, clip: Any):
        super().__init__()
        clip.visual = nn.Identity()  # no part of the fingerprint
        self.spec, self.network, self.length = spec, clip, clip.context_length
        self.output = f"open_clip: text tower, encode_text, not normalised{clip.activation}"

    def forward(self, images: Int64[Tensor, "batch length"]) -> Features:
        ids = images.new_zeros(len(images), self.length)  # zeros behind the end, as open_clip has it
        ids[:, : images.shape[1]] = images.clamp(min=0)
        return {"embedding": self.network.encode_text(ids)}


def open_model(rest: str) -> TextTower:
    spec = f"open_clip_text/{rest}"
    with naming(spec):
        like = _input(rest)  # before gigabytes are fetched
        clip, files = open_pretrained(rest, whole=True)
    tower = TextTower(spec, clip)
    tower.input, tower.files = replace(like, max_length=tower.length), files
    tower.fields = text_shapes(tower)
    return tower


def _input(name: str) -> Texts:
    """Of CLIP's tokeniser. Raises `ValueError` where the model has another one, or uses it in another way."""
    model = name if name.startswith(("hf-hub:", "local-dir:")) else name.partition(":")[0]
    text = (open_clip.get_model_config(model) or {}).get("text_cfg", {}) if model == name.partition(":")[0] else {}
    theirs = None if text.get("hf_tokenizer_name") else open_clip.get_tokenizer(model)
    if not isinstance(theirs, SimpleTokenizer):
        raise ValueError(
            "has another tokeniser than CLIP's own, which alone can be kept here; embed its texts with open_clip, and make a store "
            "of the arrays (featcache import)"
        )
    ours = with_tokenizer(_tokenizer(theirs), theirs.context_length or DEFAULT_CONTEXT_LENGTH, strip=True)
    for each in TRIED:
        found = ours.render(each, WholeText(1))
        if found.clip(min=0).tolist() != theirs(each, ours.max_length)[0].tolist():
            raise ValueError(
                "tokenises texts in a way of its own; embed them with open_clip, and make a store of the arrays"
            )
    return ours


def _tokenizer(theirs: SimpleTokenizer) -> str:
    """The same tokeniser as JSON of the package tokenizers: as transformers converts CLIP's."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    begin, end = ("<start_of_text>", theirs.sot_token_id), ("<end_of_text>", theirs.eot_token_id)
    merges = [(one, other) for one, other in theirs.bpe_ranks]
    tokenizer = Tokenizer(models.BPE(vocab=theirs.encoder, merges=merges, end_of_word_suffix="</w>", unk_token=end[0]))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex("[\u2018-\u201b]"), "'"),
            normalizers.Replace(Regex("[\u201c-\u201f]"), '"'),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A {end[0]}", special_tokens=[begin, end]
    )
    return tokenizer.to_str()
