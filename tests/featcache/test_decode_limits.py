"""Decoding: what is refused from its header alone, what others read too, and the first frame of animations."""

import io
import os
import struct
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from featcache.inputs import Views, _decoding
from featcache.inputs.images import MAX_PIXELS, Preprocess, decode

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height, filler=b""):
    """A PNG file whose header promises width × height px and whose pixel data is `filler`."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filler)) + chunk(b"IEND", b"")


def saved(image, kind, **given):
    file = io.BytesIO()
    image.save(file, kind, **given)
    return file.getvalue()


@pytest.fixture
def noise(rng):
    return Image.fromarray(rng.integers(0, 256, (9, 14, 3), dtype=np.uint8))


# -- size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (17_000, 17_000), (60_000, 60_000), (1, 2**31 - 1)])
def test_a_bomb_is_refused_before_a_pixel_is_decoded(size, monkeypatch):
    def refuse(image):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    with pytest.raises(Image.DecompressionBombError, match=rf"more than .* FEATCACHE_MAX_PIXELS={size[0] * size[1]}"):
        decode(png_of(*size))


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "webp"])
def test_images_above_pillows_limit_are_decoded_one_at_a_time_and_its_limit_stays(monkeypatch, noise, kind):
    monkeypatch.setattr(_decoding, "_ALONE", 50)
    encoded = saved(noise, kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    at_work, most, load = 0, 0, _decoding._rgb

    def counting(image):
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        result = load(image)
        at_work -= 1
        return result

    monkeypatch.setattr(_decoding, "_rgb", counting)
    threads = [threading.Thread(target=decode, args=(encoded,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (decode(encoded).size, most, Image.MAX_IMAGE_PIXELS) == (noise.size, 1, 50)


def test_the_limit_can_be_set(monkeypatch, noise):
    monkeypatch.setenv("FEATCACHE_MAX_PIXELS", "125")
    with pytest.raises(Image.DecompressionBombError, match="14 × 9 px: more than 125 px"):
        decode(saved(noise, "png"))
    assert decode(saved(noise, "png"), max_pixels=126).size == (14, 9)
    monkeypatch.setenv("FEATCACHE_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="FEATCACHE_MAX_PIXELS=many: give a whole number"):
        decode(saved(noise, "png"))


def test_a_photograph_of_108_megapixels_is_read(monkeypatch):
    rows = np.zeros((9000, 1 + 3 * 12_000), np.uint8)
    rows[:, 1:4] = 7, 8, 9
    monkeypatch.setattr("warnings.warn", lambda *_: pytest.fail("warned"))
    image = decode(png_of(12_000, 9000, rows.tobytes()))
    assert (image.size, image.getpixel((0, 8999))) == ((12_000, 9000), (7, 8, 9))


LONG = [(1, 20_000), (20_000, 1), (1, 1_000_000), (300_000, 3)]


def test_memory_is_bounded_by_the_image_and_the_crop_however_long_the_image():
    code = f"""
import resource, sys
from PIL import Image
from featcache.inputs import Views
from featcache.inputs.images import KeptPixels, Preprocess
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in {LONG}:
    image = Image.new("RGB", size, (9, 9, 9))
    for filter in ("nearest", "bilinear", "bicubic", "lanczos"):
        for mode in ("shortest", "squash"):
            preprocess = Preprocess(resize=256, crop=224, size=224, interpolation=filter, mode=mode)
            for views in (Views(), Views(count=2, augment="rrc")):
                for view in range(views.count):
                    pixels = preprocess.render(image, preprocess.draw(size, views, "a", view))
                    assert pixels.shape == (224, 224, 3) and (pixels == 9).all()
    KeptPixels(size=256).encode(image)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert int(done.stdout) < 200, "MiB"


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_the_crop_of_a_long_image_is_pillows_bit_for_bit(rng, interpolation):
    for size in [(1, 40), (2, 333), (400, 3), (5, 81), (7, 700), (31, 2000), (900, 33), (35, 600), (700, 40), (4, 65)]:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        for resize, crop in ((36, 32), (37, 32), (33, 33)):
            preprocess = Preprocess(resize=resize, crop=crop, size=crop, interpolation=interpolation)
            whole = (
                (resize, resize * size[1] // size[0]) if size[0] < size[1] else (resize * size[0] // size[1], resize)
            )
            left, top = ((side - crop) / 2 for side in whole)
            left, top = round(left), round(top)
            filter = Image.Resampling[interpolation.upper()]
            expected = image.resize(whole, filter).crop((left, top, left + crop, top + crop))
            found = preprocess.render(image, preprocess.draw(size, Views(), "a", 0))
            np.testing.assert_array_equal(found, np.asarray(expected), f"{size} {resize}")


def test_an_image_that_does_not_fit_into_memory_is_named(tmp_path, monkeypatch):
    from featcache.corpora import open_corpus
    from featcache.extraction.samples import Wanted, read_sample

    Image.new("RGB", (8, 8)).save(tmp_path / "large.png")
    monkeypatch.setattr("featcache.inputs.images.decode", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError, match=r"large\.png: does not fit into memory; .*FEATCACHE_MAX_PIXELS"):
        read_sample(open_corpus(str(tmp_path)), 0, Views(), [Wanted(Preprocess(resize=8, crop=8, size=8))])


# -- EXIF -----------------------------------------------------------------------------------------------


def exif_of(entries, order="<", after=b""):
    """EXIF data of one directory; `entries`: tag, type, count and 4 bytes, or what lies at an offset."""
    data = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}LH", 8, len(entries))
    at, more = 8 + 2 + 12 * len(entries) + 4, b""
    for tag, kind, count, value in entries:
        data += struct.pack(f"{order}HHL", tag, kind, count)
        if len(value) > 4:
            data, more = data + struct.pack(f"{order}L", at + len(more)), more + value
        else:
            data += value.ljust(4, b"\0")
    return b"Exif\0\0" + data + bytes(4) + more + after


MISTYPED = [
    (0x010F, 4, 1, b"\x07\0\0\0"),  # Make, a number
    (0x011A, 2, 6, b"72/1\0\0"),  # XResolution, text
    (0x0131, 5, 1, bytes(8)),  # Software, 0/0
    (0x0132, 3, 1, b"\x01\0"),
]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_mistyped_tags_beside_the_orientation_do_not_matter(noise, kind, orientation):
    given = {"lossless": True} if kind == "webp" else {}
    clean = saved(noise, kind, exif=exif_of([(0x0112, 3, 1, struct.pack("<H", orientation))]), **given)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(clean))))
    entries = sorted([*MISTYPED, (0x0112, 3, 1, struct.pack("<H", orientation))])
    np.testing.assert_array_equal(np.asarray(decode(saved(noise, kind, exif=exif_of(entries), **given))), expected)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "form", "value"),
    [
        (1, "B", 6), (3, "H", 6), (4, "L", 6), (6, "b", 6), (7, "B", 6), (8, "h", 6), (9, "l", 6), (11, "f", 6.0), (12, "d", 6.0),
    ],
)  # fmt: skip
def test_an_orientation_of_any_type_of_number_is_followed(noise, order, kind, form, value):
    encoded = saved(noise, "png", exif=exif_of([(0x0112, kind, 1, struct.pack(order + form, value))], order))
    np.testing.assert_array_equal(np.asarray(decode(encoded)), np.rot90(np.asarray(noise), -1))


@pytest.mark.parametrize(
    ("entry", "turned"),
    [
        ((0x0112, 2, 2, b"6\0"), True),
        ((0x0112, 5, 1, struct.pack("<LL", 12, 2)), True),
        ((0x0112, 5, 1, struct.pack("<LL", 6, 0)), False),
        ((0x0112, 2, 3, b"up\0"), False),
        ((0x0112, 3, 1, b"\x09\0"), False),
        ((0x0112, 3, 0, b"\x06\0"), False),
        ((0x0112, 99, 1, b"\x06\0"), False),
        ((0x0112, 4, 1 << 30, b"\xff\xff\xff\x7f"), False),
    ],
)
def test_an_orientation_that_is_no_number_turns_nothing(noise, entry, turned):
    upright = np.asarray(noise)
    expected = np.rot90(upright, -1) if turned else upright
    np.testing.assert_array_equal(np.asarray(decode(saved(noise, "png", exif=exif_of([entry])))), expected)


def test_damaged_exif_data_turn_nothing(noise):
    whole = exif_of([(0x0112, 3, 1, b"\x06\0")])
    for cut in range(7, 26):  # up to the entry of the orientation
        np.testing.assert_array_equal(np.asarray(decode(saved(noise, "png", exif=whole[:cut]))), np.asarray(noise))
    np.testing.assert_array_equal(
        np.asarray(decode(saved(noise, "png", exif=b"Exif\0\0XX" + whole[8:]))), np.asarray(noise)
    )


def test_a_tiff_with_mistyped_tags_is_turned(noise):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[0x0112], info[0x010F], info.tagtype[0x010F] = 6, 7, 4
    np.testing.assert_array_equal(
        np.asarray(decode(saved(noise, "tiff", tiffinfo=info))), np.rot90(np.asarray(noise), -1)
    )


def test_the_orientation_of_xmp_counts_where_exif_has_none(noise):
    xmp = b'<x xmlns:tiff="t" tiff:Orientation="8"/>'
    for encoded in (saved(noise, "webp", lossless=True, xmp=xmp), with_chunks(saved(noise, "png"), xmp_chunk(xmp))):
        np.testing.assert_array_equal(np.asarray(decode(encoded)), np.rot90(np.asarray(noise)))


# -- long texts and profiles ----------------------------------------------------------------------------


def with_chunks(png, *chunks):
    """Some before the pixels, the same again after them, which Pillow reads too."""
    start = png.index(b"IDAT") - 4
    return png[:start] + b"".join(chunks) + png[start:-12] + b"".join(chunks) + png[-12:]


def xmp_chunk(text, packed=False):
    return chunk(
        b"iTXt", b"XML:com.adobe.xmp\0" + bytes([packed, 0]) + b"\0\0" + (zlib.compress(text) if packed else text)
    )


LONG_TEXTS = {
    "tEXt": chunk(b"tEXt", b"Comment\0" + b"x" * (70 << 20)),
    "zTXt": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 << 20))),
    "iTXt": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(3 << 20))),
    "xmp": xmp_chunk(b"x" * (3 << 20), packed=True),
    "exif": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(3 << 20))),
    "iCCP": chunk(b"iCCP", b"icc\0\0" + zlib.compress(os.urandom(2 << 20))),
    "broken": chunk(b"zTXt", b"Comment\0\0no deflate"),
    "wrong sum": chunk(b"tEXt", b"a\0b")[:-4] + b"oops",
}


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_texts_and_profiles_of_any_length_are_passed_over(noise, name):
    encoded = with_chunks(saved(noise, "png"), LONG_TEXTS[name])
    np.testing.assert_array_equal(np.asarray(decode(encoded)), np.asarray(noise))
    turned = with_chunks(saved(noise, "png", exif=exif_of([(0x0112, 3, 1, b"\x06\0")])), LONG_TEXTS[name])
    np.testing.assert_array_equal(np.asarray(decode(turned)), np.rot90(np.asarray(noise), -1))


def test_a_png_that_is_cut_short_is_refused_all_the_same(noise):
    whole = with_chunks(saved(noise, "png"), LONG_TEXTS["broken"])
    with pytest.raises(Exception, match=r"truncated|broken|not an image"):
        decode(whole[: len(whole) // 2])


# -- formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["avif", "bmp", "dds", "dib", "gif", "icns", "ico", "jpeg2000", "pcx", "ppm", "qoi", "sgi", "tga", "tiff", "webp"]
)  # fmt: skip
def test_what_pillow_reads_is_read_as_pillow_reads_it(kind, rng):
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    encoded = saved(image, kind)
    np.testing.assert_array_equal(
        np.asarray(decode(encoded)), np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    )


@pytest.mark.parametrize("rle", [False, True])
@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_tga_is_known_by_its_whole_header(noise, mode, rle):
    image = noise.convert(mode)
    encoded = saved(image, "tga", **({"compression": "tga_rle"} if rle else {}))
    np.testing.assert_array_equal(np.asarray(decode(encoded)), np.asarray(image.convert("RGB")))
    for at, wrong in ((1, 9), (2, 200), (16, 7)):
        with pytest.raises(UnidentifiedImageError):
            decode(encoded[:at] + bytes([wrong]) + encoded[at + 1 :])


def test_heif_says_what_it_needs(monkeypatch):
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(_decoding, "_register_heif", lambda: None)
    with pytest.raises(UnidentifiedImageError, match="HEIF images need the package pillow-heif"):
        decode(b"\0\0\0\x18ftypheic" + bytes(100))


def test_a_registered_heif_plugin_is_used(monkeypatch, noise):
    monkeypatch.setitem(
        Image.OPEN,
        "HEIF",
        (lambda file, name: Image.open(io.BytesIO(saved(noise, "png"))), lambda start: start[4:12] == b"ftypheic"),
    )
    np.testing.assert_array_equal(np.asarray(decode(b"\0\0\0\x18ftypheic" + bytes(100))), np.asarray(noise))


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


@pytest.mark.parametrize("start", [b"", b"\0", b"BM", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"\xff\xd8\xff"])
def test_a_file_that_ends_at_once_is_refused_as_no_image(start):
    with pytest.raises((UnidentifiedImageError, OSError), match=r"not an image that Pillow knows|truncated"):
        decode(start)
