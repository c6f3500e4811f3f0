"""Which files are images: by their suffix, else by how they begin; and how the others are called in a count."""

import os
from collections.abc import Callable
from functools import cache

from PIL import Image

from featcache.inputs.images import is_heif, known_formats

START = 32
"""Bytes that `begins_like_image` wants."""

_OTHERS = {
    ".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".md", ".rst",
    ".html", ".htm", ".css", ".js", ".py", ".ipynb", ".sh", ".log", ".lock", ".cls", ".npy", ".npz", ".pt", ".pth",
    ".pkl", ".pickle", ".safetensors", ".onnx", ".parquet", ".arrow", ".feather", ".h5", ".hdf5", ".mat", ".db",
    ".sqlite", ".lmdb", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".mp4", ".m4v", ".avi",
    ".mov", ".mkv", ".webm", ".mp3", ".wav", ".flac", ".ogg", ".pdf", ".ps", ".eps", ".svg", ".ai", ".doc", ".docx",
    ".xls", ".xlsx", ".ppt", ".pptx", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".dng", ".arw", ".srf", ".sr2", ".orf",
    ".rw2", ".pef", ".srw", ".raf", ".raw", ".rwl", ".3fr", ".fff", ".iiq", ".erf", ".mef", ".mos", ".dcr", ".kdc",
    ".x3f",
}  # fmt: skip
"""Suffixes that are taken at their word: nobody calls an image so, or, of a camera's raw files, Pillow would read no more
than a thumbnail."""

_HEIF = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))


@cache
def suffixes() -> frozenset[str]:
    """Of files that can be decoded here, in lower case, with the dot."""
    known = {*known_formats(), "MPO"}  # several JPEG in one file; the first is read
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in known)


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def is_image(name: str, start: Callable[[], bytes]) -> bool:
    """Whether a file of this name, which `start` gives the first bytes of, is an image that can be decoded here."""
    return has_suffix(name) or (may_be_image(name) and begins_like_image(start()))


def has_suffix(name: str) -> bool:
    return suffix_of(name) in suffixes()


def may_be_image(name: str) -> bool:
    """Whether the name leaves it open."""
    suffix = suffix_of(name)
    return suffix not in suffixes() and suffix not in _OTHERS and suffix not in _HEIF


def begins_like_image(start: bytes) -> bool:
    """Whether a file that begins so is of a kind known by its first bytes, and can be decoded here."""
    kinds = {
        "JPEG": start.startswith(b"\xff\xd8\xff"),
        "PNG": start.startswith(b"\x89PNG\r\n\x1a\n"),
        "GIF": start.startswith((b"GIF87a", b"GIF89a")),
        "WEBP": start[:4] == b"RIFF" and start[8:12] == b"WEBP",
        "BMP": start[:2] == b"BM" and start[6:10] == bytes(4) and start[14:18] in _BMP_HEADERS,
        "TIFF": start.startswith((b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0")),
        "AVIF": start[4:12] in (b"ftypavif", b"ftypavis"),
        "HEIF": is_heif(start),
        "JPEG2000": start.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0")),
        "PPM": start[:1] == b"P" and start[1:2] in b"123456" and start[2:3] in b" \t\r\n" and start[3:4].isdigit(),
        "QOI": start.startswith(b"qoif"),
        "PSD": start.startswith(b"8BPS\0\x01"),
    }
    return any(found and kind in known_formats() for kind, found in kinds.items())


_BMP_HEADERS = {bytes([size, 0, 0, 0]) for size in (12, 40, 52, 56, 64, 108, 124)}


def called(name: str) -> str:
    """How a file that is no image is counted: `.txt files`."""
    suffix = suffix_of(name)
    if suffix in _HEIF:
        return f"{suffix} files (to read them: pip install pillow-heif)"
    if not suffix:
        return "files without a suffix"
    return f"{suffix} files" if len(suffix) <= 12 and suffix.isprintable() else "files of other kinds"
