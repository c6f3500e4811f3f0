"""Decoding: what is refused from its header alone, and the first frame of animations."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from featcache.views import MAX_PIXELS, decode


def png_of(width, height, filler=b""):
    """A PNG file whose header promises width × height px and whose pixel data is `filler`."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filler)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (10_000, 10_000), (20_000, 20_000), (1, 2**31 - 1)])
def test_a_bomb_is_refused_before_a_pixel_is_decoded(size, monkeypatch):
    def refuse(image):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    with pytest.raises(Image.DecompressionBombError, match=r"px|pixels"):
        decode(png_of(*size))


def test_pillow_warns_where_we_refuse():
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    buffer = io.BytesIO()
    lossless = {"lossless": True} if kind == "webp" else {}
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=50, **lossless)
    assert Image.open(io.BytesIO(buffer.getvalue())).n_frames == 3
    np.testing.assert_array_equal(np.asarray(decode(buffer.getvalue())), np.asarray(frames[0]))


def test_a_file_that_would_start_another_program_is_not_an_image():
    encapsulated = io.BytesIO()
    Image.new("RGB", (4, 4)).save(encapsulated, "EPS")
    with pytest.raises(UnidentifiedImageError):
        decode(encapsulated.getvalue())
