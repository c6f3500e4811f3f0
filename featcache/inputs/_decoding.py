"""An encoded image file → its upright RGB pixels; what is no image, or too large to hold, is refused."""

import contextlib
import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile

FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF", "JPEG2000",
    "DDS", "DIB", "ICNS", "ICO", "PCX", "PSD", "QOI", "SGI", "SUN", "TGA",
)  # fmt: skip
"""What Pillow may decode, in the order of trying. Not all that it can: EPS, for one, would start Ghostscript on a
stranger's file. HEIF where the package pillow-heif is installed, or a plugin of that name is registered."""

MAX_PIXELS = 1 << 28
"""Larger images are refused unread: 268 million, a GiB as Pillow holds them. $FEATCACHE_MAX_PIXELS sets another limit."""

_ALONE = 89_478_485
"""Images larger than this are decoded one at a time. Pillow's own limit: there it warns, at twice as many it raises."""
_one_large = threading.Lock()

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_EXIF_TYPES = {
    1: "B", 2: "c", 3: "H", 4: "L", 5: "LL", 6: "b", 7: "B", 8: "h", 9: "l", 10: "ll", 11: "f", 12: "d", 13: "L",
}  # fmt: skip
"""As `struct` writes them. Orientation ought to be of type 3."""

_TEXTS = (b"iCCP", b"tEXt", b"zTXt", b"iTXt")
_MAY_TURN = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_MAX_TEXT = 1 << 20
"""Bytes of a compressed text, unpacked, that Pillow accepts."""


def decode(encoded: bytes, max_pixels: int | None = None) -> Image.Image:
    """Encoded image file → upright RGB image. EXIF orientation applied, 16-bit scaled to 8, alpha dropped.

    Of an animation, the first frame. Texts and colour profiles are passed over, however long or damaged.

    Args:
        max_pixels: the most that the image may have; by default $FEATCACHE_MAX_PIXELS, else `MAX_PIXELS`.

    Raises:
        DecompressionBombError: more than that, by the header; no pixel has been decoded.
        ValueError: floating-point or 32-bit integer pixels, whose black and white nobody can tell.
        Exception: whatever Pillow raises on bytes that are no image, or are truncated.
    """
    encoded, limit = _without_texts(encoded), max_pixels or _limit()
    try:
        image = _opened(encoded)
    except Image.DecompressionBombError:  # some plugins ask for Pillow's limit themselves
        with _alone():
            image = _opened(encoded)
    pixels = image.width * image.height
    if pixels > limit:
        raise Image.DecompressionBombError(
            f"{image.width} × {image.height} px: more than {limit:,} px in all; to read it, set FEATCACHE_MAX_PIXELS={pixels}"
        )
    # Mode "I" also holds 16 bits, of PNG and PPM files always.
    long = image.mode == "I" and isinstance(image, TiffImageFile) and image.tag_v2[BITSPERSAMPLE][0] > 16
    if image.mode == "F" or long:
        kind = "32-bit integer" if long else "floating-point"
        raise ValueError(f"{kind} pixels have no agreed range; convert the image to 8 or 16 bits")
    with _alone() if pixels > _ALONE else contextlib.nullcontext():
        image.load()
        return _rgb(_upright(image))


def known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that can be decoded here."""
    _register_heif()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def _register_heif() -> None:
    """Pillow's own plugins, and pillow-heif where it is installed and nobody has registered another."""
    Image.init()
    if "HEIF" not in Image.OPEN:
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()


def _limit() -> int:
    given = os.environ.get("FEATCACHE_MAX_PIXELS", "")
    if given and not re.fullmatch(r"[1-9]\d*", given):
        raise ValueError(f"FEATCACHE_MAX_PIXELS={given}: give a whole number of px, width × height")
    return int(given) if given else MAX_PIXELS


def _opened(encoded: bytes) -> ImageFile.ImageFile:
    """The file as Pillow opens it, its header read. `Image.open`, but for the number of px, which is ours to judge."""
    file, prefix = io.BytesIO(encoded), encoded[:16]
    for name in known_formats():
        factory, accepts = Image.OPEN[name]
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):  # how a plugin says: not mine
            accepted = _looks_like_tga(encoded) if name == "TGA" else accepts is None or accepts(prefix)
            if accepted and not isinstance(accepted, str):  # a string says what Pillow was built without
                file.seek(0)
                return factory(file, "")
    heif = "; HEIF images need the package pillow-heif" if is_heif(encoded) else ""
    raise UnidentifiedImageError(f"not an image that Pillow knows ({len(encoded)} bytes){heif}")


_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def is_heif(start: bytes) -> bool:
    """Whether a file that starts so is HEIF, as telephones write it."""
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF


def _looks_like_tga(encoded: bytes) -> bool:
    """TGA files begin with no mark of their own, so all that their header can say is asked."""
    if len(encoded) < 18:
        return False
    palette, kind = encoded[1:3]
    width, height, depth = struct.unpack_from("<HHB", encoded, 12)
    return (
        (palette, kind) in {(1, 1), (1, 9), (0, 2), (0, 10), (0, 3), (0, 11)}
        and width * height > 0
        and depth in (1, 8, 16, 24, 32)
    )


def _without_texts(encoded: bytes) -> bytes:
    """A PNG file without its texts and colour profile: no pixel depends on them, and Pillow refuses long ones.

    Texts that may say how the image is turned stay. Whatever else is wrong with the file stays wrong.
    """
    if not encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return encoded
    parts, start, at = [], 0, 8
    while at + 12 <= len(encoded):
        kind, content = encoded[at + 4 : at + 8], at + 8
        end = content + int.from_bytes(encoded[at : at + 4], "big") + 4
        if end > len(encoded) or kind == b"IEND":
            break
        if kind in _TEXTS and not _may_turn(kind, encoded[content : end - 4]):
            parts.append(encoded[start:at])
            start = end
        at = end
    return b"".join([*parts, encoded[start:]]) if parts else encoded


def _may_turn(kind: bytes, content: bytes) -> bool:
    if kind == b"iCCP" or not content.startswith(_MAY_TURN):
        return False
    text = content[content.index(b"\0") + 1 :]
    if kind == b"tEXt" or (kind == b"iTXt" and text[:1] == b"\0"):
        return len(text) <= _MAX_TEXT
    packed = text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[-1]
    with contextlib.suppress(zlib.error):
        return len(zlib.decompressobj().decompress(packed, _MAX_TEXT + 1)) < _MAX_TEXT
    return False


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One image at a time, without Pillow's limit."""
    with _one_large:
        theirs = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = theirs


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF data says, else its XMP data: `ImageOps.exif_transpose`, but for writing them anew.

    TIFF files have been turned on loading.
    """
    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:
        with contextlib.suppress(ValueError):
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    orientation = _orientation(exif) if exif else None
    if orientation is None and isinstance(image, TiffImageFile):
        orientation = _number(image.getexif().get(_ORIENTATION))
    if orientation is None:
        xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
        said = re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp.encode() if isinstance(xmp, str) else xmp)
        orientation = int(said[1]) if said else None
    method = _TURNS.get(orientation or 1)
    return image if method is None else image.transpose(method)


def _orientation(exif: bytes) -> int | None:
    """What tag 274 of EXIF data says, whatever else is wrong with them; 0 for what is no number."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    found = None
    with contextlib.suppress(struct.error):
        if order:
            (directory,) = struct.unpack_from(f"{order}L", exif, 4)
            (count,) = struct.unpack_from(f"{order}H", exif, directory)
            for at in range(directory + 2, directory + 2 + 12 * count, 12):
                tag, kind, length = struct.unpack_from(f"{order}HHL", exif, at)
                if tag != _ORIENTATION:
                    continue
                found = 0
                if kind in _EXIF_TYPES and length:
                    form = order + _EXIF_TYPES[kind]
                    within = struct.calcsize(form) * length <= 4
                    values = struct.unpack_from(
                        form, exif, at + 8 if within else struct.unpack_from(f"{order}L", exif, at + 8)[0]
                    )
                    found = _number(values[0] if len(values) == 1 else values[0] / values[1] if values[1] else 0)
    return found


def _number(value: object) -> int | None:
    """An orientation of whatever type: text and bytes too. None for None."""
    while isinstance(value, tuple) and value:
        value = value[0]
    if isinstance(value, bytes):
        value = value.strip(b"\0 ")
        value = int(value) if value.isdigit() else value[0] if len(value) == 1 else 0
    elif isinstance(value, str):
        value = int(value) if value.isascii() and value.strip().isdigit() else 0
    if value is None:
        return None
    number = float(value)  # type: ignore[arg-type]
    return int(number) if 1 <= number <= 8 and number == int(number) else 0


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")
