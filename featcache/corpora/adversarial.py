"""`adversarial:TEACHER::HEAD@epsilon=2::CORPUS`: another corpus, every image of it made hard for a teacher, once."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from jaxtyping import Float, UInt8
from PIL import Image

from featcache.classes import Classes, columns_of
from featcache.corpora import Corpus, Listed, passed_over
from featcache.corpora import open_corpus as open_any_corpus
from featcache.corpora._codebook import IMAGES, Codebook
from featcache.disk.durable import whole_file
from featcache.disk.home import writable_home
from featcache.head import Head
from featcache.inputs.images import KeptPixels, Preprocess, decode
from featcache.pgd import L2Ball, ascend, log_odds
from featcache.specs import options_in

if TYPE_CHECKING:
    from torch import Tensor

    from featcache.encoder import Encoder
else:  # a name is looked up without torch
    Encoder = Tensor = Any

VERSION = 1
"""Of how images are made: another one makes them anew."""
_BATCH, _WINDOW = 16, 512
_SAMPLED = 256
_TOLD_EVERY = 30.0
_REASONS = "reasons.json"
log = logging.getLogger("featcache")
Decoder = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How images are made, apart from the teacher and the images.

    Attributes:
        epsilon: largest L2 distance in pixels of 0…1 from the reconstruction; 0 means no attack: reconstructions alone, what
            attacked images are to be compared with.
        step: length of a step of the ascent.
        steps: of the ascent.
        start: share of images that begin at a random point at distance ε instead of at the reconstruction.
        decoder: MODULE:CALLABLE that returns a function of images (B, 3, H, W) in 0…1 to such images, a VQGAN say; "" is a
            codebook of patches, learned of the corpus by k-means.
        codes: patches in that codebook.
        patch: side of one, in px.
        size: shorter side, in px, that larger images are reduced to first.
        seed: of the starts and the codebook.

    Raises:
        ValueError: a value is out of range.
    """

    epsilon: float = 2.0
    step: float = 2.0
    steps: int = 1
    start: float = 0.8
    decoder: str = ""
    codes: int = 1024
    patch: int = 2
    size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, range_ in (
            ("epsilon", 0 <= self.epsilon < math.inf, "0 or more"),
            ("step", 0 < self.step < math.inf, "greater than 0"),
            ("steps", self.steps >= 1, "1 or more"),
            ("start", 0 <= self.start <= 1, "from 0 to 1"),
            ("codes", self.codes >= 2, "2 or more"),
            ("patch", self.patch >= 1, "1 or more"),
            ("size", self.size >= 1, "1 or more"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise ValueError(f"@{name}={getattr(self, name)}: must be {range_}")

    @classmethod
    def of(cls, options: Mapping[str, str]) -> Recipe:
        """Of a spec's options as text."""
        found: dict[str, Any] = {}
        for name, text in options.items():
            kind = {"int": int, "float": float}.get(str(cls.__dataclass_fields__[name].type), str)
            try:
                found[name] = kind(text)
            except ValueError:
                raise ValueError(f"@{name}={text}: give a{' whole' if kind is int else ''} number") from None
        return cls(**found)


OPTIONS = (*(each.name for each in fields(Recipe)), "out")


class Adversarial(Listed):
    """`corpus` as a teacher finds it hard: discrete adversarial images (DAD, arXiv 2311.01441), lossless PNG files.

    With D a vector quantiser: x0 = D(x); for four images in five a random point at distance ε from it; ascent on the
    cross-entropy of the teacher's class probabilities with the label, within ε of x0 (L2); x' = D of what was found. Attacks
    that are put together of a codebook's patches look natural, and help with natural shifts.

    Spec: `adversarial:TEACHER::HEAD::CORPUS`, HEAD with options as in `Recipe`: `adversarial:timm/resnet50::head.safetensors
    @epsilon=4@steps=2::photos/`. TEACHER is as for `featcache extract`, HEAD a classifier on its embeddings (`evalsuite probe …
    --save FILE`), or nothing where the teacher gives logits of these classes itself (`TEACHER::@epsilon=4::photos/`).
    `@out=FILE.zip` is where the images are kept; by default under $FEATCACHE_HOME/adversarial.

    Images are made when the corpus is first opened, on the GPU where there is one, and appear there whole; opened again with
    equal options, teacher and images, they are read. Of a process that was stopped, what it had made ($FEATCACHE_HOME/adversarial/
    *.parts) is not made again: the next one goes on, to the same bytes. (The images that are looked at for that are up to 256; of the others
    their names and labels.) Ids and labels are the corpus's. Images without a label are attacked as what the teacher takes
    them for. An image that cannot be read stays so.

    The paper has ε 0.1 and steps of 0.01 (0.1 in another script of its code) for a VQGAN at 256 px. Here a patch has to leave
    the region of its code in pixels, so ε is larger, and patches small: of CIFAR-10 (32 px, ResNet-20) reconstructions have
    28.4 dB, of which ε = 1 changes 1 % of the patches, 2 14 % and 4 54 %; patches of 4 px give 23.5 dB, and ε = 4 changes 5 % of
    them. ε grows with the number of pixels.

    Raises:
        ValueError: on opening, the spec, the head or an option does not fit, or `out` holds something else; on reading, the
            image could not be read when these were made.
    """

    def __init__(self, rest: str):
        self.spec = f"adversarial:{rest}"
        teacher, head, options, images = _parsed(rest)
        out = options.pop("out", "")
        self.recipe = Recipe.of(options)
        corpus = open_any_corpus(images)
        self.ids, self.class_names = corpus.ids, corpus.class_names
        self.labels = [corpus.label(i) for i in range(len(corpus))]
        self.passed_over = passed_over(corpus)
        maker = _Maker(self, corpus, teacher, head)
        record = maker.record()
        name = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()
        home = writable_home("adversarial")
        self.path = Path(out) if out else home / f"{name}.zip"
        for folder in (home, self.path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{name}.lock"):
            if not self.path.exists():
                log.warning("%s: making %d images, once; they are kept in %s", self.spec, len(self), self.path)
                _write(self.path, record, maker, home / f"{name}.parts")
            self._reasons = _kept(self.path, record)

    def read(self, i: int) -> bytes:
        if reason := self._reasons.get(str(i)):
            raise ValueError(reason)
        return self._archive.read(_name(i))

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_archive"}


class _Maker:
    """Makes the images of one corpus, in its order."""

    def __init__(self, target: Adversarial, corpus: Corpus, teacher: str, head: str):
        from featcache.encoder import load_encoder

        self.recipe, self._corpus, self._labels = target.recipe, corpus, np.asarray(target.labels, np.int64)
        self._encoder = load_encoder(teacher)
        self._head = Head.read(head) if head else _own_head(self._encoder, corpus)
        self._own = not head
        if head and self._head.fingerprint not in (None, self._encoder.fingerprint):
            raise ValueError(
                f"{head}: was fitted to the embeddings of another encoder ({self._head.fingerprint}) than {teacher} "
                f"({self._encoder.fingerprint}); fit one with `evalsuite probe … --save FILE` on a store of this teacher"
            )
        if head and self._head.weight.shape[1] != self._encoder.embedding_dim:
            raise ValueError(
                f"{head}: is of {self._head.weight.shape[1]} dimensions, {teacher} has {self._encoder.embedding_dim}; fit one "
                "on a store of this teacher"
            )
        known = np.unique(self._labels[self._labels >= 0])
        self._column = columns_of(self._head, self._labels, Classes(corpus.spec, known, corpus.class_names))
        self._decoder = _own_decoder(self.recipe.decoder) if self.recipe.decoder else None
        self._reduced = KeptPixels(size=self.recipe.size, format="raw")

    def record(self) -> dict[str, Any]:
        """All that decides what the images are."""
        rows = hashlib.blake2b(digest_size=16)
        for sample_id, label in zip(self._corpus.ids, self._labels.tolist(), strict=True):
            rows.update(f"{sample_id}\0{label}\0".encode())
        for row in _spread(len(self._corpus), _SAMPLED):
            try:
                rows.update(hashlib.blake2b(self._corpus.read(row), digest_size=16).digest())
            except Exception:  # it will be no image among those made, either
                rows.update(bytes(16))
        return {
            "version": VERSION,
            "encoder": self._encoder.fingerprint,
            "head": "" if self._own else self._head.digest,
            "decoder": _weights(self._decoder),
            "rows": rows.hexdigest(),
            **{f"@{name}": value for name, value in asdict(self.recipe).items()},
        }

    def __len__(self) -> int:
        return len(self._corpus)

    def windows(self, parts: Path) -> Iterator[tuple[int, list[bytes | str]]]:
        """The PNG file of each row, or why there is none, of each window that has no file in `parts` yet, after its first row."""
        from featcache.machine import cores, resolve_device

        starts = [start for start in range(0, len(self), _WINDOW) if not _part(parts, start).exists()]
        if not starts:
            return
        self._encoder.to(resolve_device("auto"))
        with ThreadPoolExecutor(cores()) as pool:
            decoder = self._decoder or self._codebook(parts / "codes.npy")
            for start in starts:
                rows = range(start, min(start + _WINDOW, len(self)))
                read = dict(zip(rows, pool.map(self._read, rows), strict=True))
                made: dict[int, bytes | str] = {row: image for row, image in read.items() if isinstance(image, str)}
                for batch in _of_one_shape({row: image for row, image in read.items() if not isinstance(image, str)}):
                    found = self._attacked(np.stack([read[row] for row in batch]), batch, decoder)
                    made |= dict(zip(batch, pool.map(_png, found), strict=True))
                yield start, [made[row] for row in rows]

    def _codebook(self, path: Path) -> Codebook:
        """The one at `path`; fitted, and kept there, where there is none: what goes on is put together of the same patches."""
        if not path.exists():
            read = (self._read(row) for row in _spread(len(self), IMAGES))
            images = (image for image in read if isinstance(image, np.ndarray))
            fitted = Codebook.fit(images, codes=self.recipe.codes, patch=self.recipe.patch, seed=self.recipe.seed)
            with whole_file(path, alone=True) as file:
                np.save(file, fitted.codes, allow_pickle=False)
        return Codebook(np.load(path, allow_pickle=False), self.recipe.patch)

    def _read(self, row: int) -> UInt8[np.ndarray, "_ _ 3"] | str:
        try:
            return np.asarray(decode(self._reduced.encode(decode(self._corpus.read(row)))))
        except Exception as error:
            return f"{self._corpus.ids[row]}: {error}"

    def _attacked(
        self, pixels: UInt8[np.ndarray, "b h w 3"], rows: Sequence[int], decoder: Decoder
    ) -> UInt8[np.ndarray, "b h w 3"]:
        import torch

        from featcache.precision import full_fp32

        device = self._encoder.device
        with full_fp32(device), torch.no_grad():
            images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
            x0 = decoder(images).clamp(0, 1)
            if x0.shape != images.shape:
                raise ValueError(
                    f"decoder {self.recipe.decoder}: gives {tuple(x0.shape)} of images {tuple(images.shape)}; let it give the same"
                )
            found = decoder(self._hardened(x0, rows) if self.recipe.epsilon else x0).clamp(0, 1)
        return (found * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def _hardened(self, x0: Float[Tensor, "b 3 h w"], rows: Sequence[int]) -> Float[Tensor, "b 3 h w"]:
        """Images within ε of `x0` that the teacher takes for something else, or is less sure of."""
        import torch

        recipe = self.recipe
        column = torch.from_numpy(self._column[list(rows)]).to(x0.device)
        if (column < 0).any():
            column = torch.where(column < 0, self._logits(x0).argmax(dim=1), column)
        starts = np.stack([_start(self._corpus.ids[row], recipe, x0.shape[1:]) for row in rows])

        def loss(images: Tensor) -> Tensor:
            logits = self._logits(images)
            if not logits.requires_grad:
                raise ValueError(
                    f"{self._encoder.name} lets no gradient through to its pixels; use a teacher without no_grad or detach"
                )
            return log_odds(logits, column).sum()

        ball = L2Ball(x0, recipe.epsilon)
        return ascend(loss, x0 + torch.from_numpy(starts).to(x0), ball, step=recipe.step, steps=recipe.steps)

    def _logits(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c"]:
        import torch

        given = self._encoder.module(shown(self._encoder.image_input, images))
        if self._own:
            return given["logits"].float()
        weight, bias = (torch.from_numpy(part).to(images) for part in (self._head.weight, self._head.bias))
        return torch.nn.functional.linear(given["embedding"].float(), weight, bias)


def shown(preprocess: Preprocess, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 s s"]:
    """What the encoder is given of whole images in 0…1, with their gradient: resized as Pillow does, but for its rounding to
    whole pixels, and with "bicubic" for "lanczos", which is not to be had for tensors."""
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    mode = InterpolationMode("bicubic" if preprocess.interpolation == "lanczos" else preprocess.interpolation)
    side = preprocess.resize
    resized = F.resize(images, [side, side] if preprocess.mode == "squash" else [side], mode, antialias=True)
    cut = F.center_crop(resized, [preprocess.crop, preprocess.crop])
    if preprocess.size != preprocess.crop:
        cut = F.resize(cut, [preprocess.size, preprocess.size], mode, antialias=True)
    mean, std = (torch.tensor(each, device=images.device)[:, None, None] for each in (preprocess.mean, preprocess.std))
    return ((cut - mean) / std).contiguous()


def _start(sample_id: str, recipe: Recipe, shape: Sequence[int]) -> Float[np.ndarray, "3 h w"]:
    """From where an image's ascent begins, seen from its reconstruction: drawn from its id and the seed, whatever the batch."""
    digest = hashlib.blake2b(f"{sample_id}\0adversarial\0{recipe.seed}".encode(), digest_size=16).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "little"))
    if rng.random() >= recipe.start:
        return np.zeros(shape, np.float32)
    direction = rng.standard_normal(shape, np.float32)
    return recipe.epsilon / np.float32(np.linalg.norm(direction)) * direction


def _parsed(rest: str) -> tuple[str, str, dict[str, str], str]:
    """Teacher, head, options and corpus."""
    found = re.fullmatch(r"(.+?)::((?:(?!::|@\w+=).)*)((?:@\w+=(?:(?!::)[^@])*)*)::(.+)", rest)
    if not found:
        raise ValueError(
            f"adversarial:{rest} is not adversarial:TEACHER::HEAD[@OPTION=VALUE…]::CORPUS (for example "
            "adversarial:timm/resnet50::head.safetensors@epsilon=4::photos/)"
        )
    return found[1], found[2], options_in(found[3], f"adversarial:{rest}", OPTIONS), found[4]


def _own_head(encoder: Encoder, corpus: Corpus) -> Head:
    """Which classes the columns of the encoder's own logits are, as a head without weights."""
    remedy = "give a classifier of its embeddings (`evalsuite probe … --save FILE`): adversarial:TEACHER::FILE::CORPUS"
    if "logits" not in encoder.fields:
        raise ValueError(f"{encoder.name} gives no logits; {remedy}")
    count = encoder.fields["logits"][0]
    names = None if encoder.classes is None else list(encoder.classes)
    if names is None and corpus.class_names is not None and len(corpus.class_names) != count:
        raise ValueError(
            f"{encoder.name} tells {count} classes apart and does not name them, {corpus.spec} has {len(corpus.class_names)}; "
            + remedy
        )
    return Head(np.ones((count, 1)), np.zeros(count), np.arange(count), f"{encoder.name}'s logits", None, names)


def _own_decoder(spec: str) -> Decoder:
    from featcache.models.python import import_callable

    decoder = import_callable(spec, "decoder", "a function of images (B, 3, H, W) to images")()
    if not callable(decoder):
        raise ValueError(f"decoder {spec}: returned a {type(decoder).__name__}, not a function of images to images")
    return decoder


def _weights(decoder: Any) -> str:
    """A digest of what a decoder has of weights; "" for one that has none, or of our own."""
    if not hasattr(decoder, "state_dict"):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(decoder.state_dict().items()):
        digest.update(f"\0{name}\0{weight.dtype}\0{tuple(weight.shape)}\0".encode())
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of so many rows, evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64)).tolist()


def _of_one_shape(images: Mapping[int, np.ndarray]) -> Iterator[list[int]]:
    """The rows in batches of images of one shape, which a decoder takes together."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, image in images.items():
        alike.setdefault(image.shape, []).append(row)
    for rows in alike.values():
        yield from (rows[begin : begin + _BATCH] for begin in range(0, len(rows), _BATCH))


def _png(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _name(row: int) -> str:
    return f"{row:08d}.png"


def _part(parts: Path, start: int) -> Path:
    return parts / f"{start:08d}.zip"


def _write(path: Path, record: Mapping[str, Any], maker: _Maker, parts: Path) -> None:
    """A ZIP archive of the images, and of `made.json`: the record, and the reasons of rows without one. Windows of them lie in
    `parts` until all are made, each whole."""
    parts.mkdir(exist_ok=True)
    starts = range(0, len(maker), _WINDOW)
    before = done = sum(_WINDOW for start in starts if _part(parts, start).exists())
    if before:
        log.warning("about %s of them are made already", f"{min(before, len(maker)):,}")
    began = told = time.monotonic()
    for start, window in maker.windows(parts):
        with whole_file(_part(parts, start), alone=True) as file, zipfile.ZipFile(file, "w") as archive:
            _add(archive, {_name(start + at): image for at, image in enumerate(window) if isinstance(image, bytes)})
            reasons = {str(start + at): reason for at, reason in enumerate(window) if isinstance(reason, str)}
            archive.writestr(_REASONS, json.dumps(reasons))
        done += len(window)
        if (now := time.monotonic()) - told > _TOLD_EVERY:
            told, rate = now, (done - before) / (now - began)
            left = max(0, len(maker) - done) / rate / 60
            log.warning(
                "%s of %s images made (%.0f a second, %.0f min left)", f"{done:,}", f"{len(maker):,}", rate, left
            )
    without: dict[str, str] = {}
    with whole_file(path, alone=True) as file, zipfile.ZipFile(file, "w") as archive:
        for start in starts:
            with zipfile.ZipFile(_part(parts, start)) as part:
                without |= json.loads(part.read(_REASONS))
                _add(archive, {name: part.read(name) for name in part.namelist() if name != _REASONS})
        _add(archive, {"made.json": json.dumps({"record": record, "reasons": without})})
    shutil.rmtree(parts, ignore_errors=True)


def _add(archive: zipfile.ZipFile, files: Mapping[str, bytes | str]) -> None:
    for name, data in files.items():
        archive.writestr(zipfile.ZipInfo(name), data)  # without a date: the same bytes every time


def _kept(path: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The reasons of rows without an image, by row.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            made = json.loads(archive.read("made.json"))
            kept, reasons = made["record"], made["reasons"]
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: holds no adversarial images ({error}); choose another @out, or remove it") from None
    if kept != record:
        other = [name for name in record if kept.get(name) != record[name]]
        raise ValueError(
            f"{path}: its images were made otherwise (another {', '.join(other)}); choose another @out, or remove it"
        )
    return reasons


open_corpus = Adversarial


def made_of(rest: str) -> str:
    return _parsed(rest)[3]
