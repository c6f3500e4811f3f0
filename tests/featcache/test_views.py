"""Views: the plain one against torchvision, the drawn ones against their definition, decoding against numpy."""

import hashlib
import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from featcache.inputs import Views
from featcache.inputs.images import Preprocess, View, decode

SIZES = [(64, 48), (48, 64), (40, 40), (33, 47), (101, 35), (5, 3), (1, 1), (7, 300), (37, 36)]


def noise(size, seed=0):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def by_torchvision(image, preprocess):
    resize = preprocess.resize if preprocess.mode == "shortest" else (preprocess.resize, preprocess.resize)
    transform = Compose([Resize(resize, InterpolationMode(preprocess.interpolation)), CenterCrop(preprocess.crop)])
    return np.asarray(transform(image))


def plain(image, preprocess, sample_id="a"):
    return preprocess.render(image, preprocess.draw(image.size, Views(), sample_id, 0))


# -- the plain view -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_plain_view_is_torchvisions_resize_and_centre_crop(size, interpolation, mode):
    for resize, crop in ((36, 32), (37, 32), (32, 32)):
        preprocess = Preprocess(resize=resize, crop=crop, size=crop, interpolation=interpolation, mode=mode)
        np.testing.assert_array_equal(plain(noise(size), preprocess), by_torchvision(noise(size), preprocess))


@given(width=st.integers(1, 150), height=st.integers(1, 150), resize=st.integers(8, 40), data=st.data())
def test_plain_view_of_any_size_is_torchvisions(width, height, resize, data):
    crop = data.draw(st.integers(1, resize))
    preprocess = Preprocess(resize=resize, crop=crop, size=crop)
    image = noise((width, height), seed=width)
    np.testing.assert_array_equal(plain(image, preprocess), by_torchvision(image, preprocess))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_plain_view_of_photographs_is_torchvisions(photographs, interpolation):
    preprocess = Preprocess(resize=256, crop=224, size=224, interpolation=interpolation)
    for _, encoded in photographs[:6]:
        reference = by_torchvision(Image.open(io.BytesIO(encoded)).convert("RGB"), preprocess)
        np.testing.assert_array_equal(plain(decode(encoded), preprocess), reference)


@pytest.mark.parametrize(
    ("size", "mode", "box"),
    [
        ((200, 100), "shortest", (60, 10, 140, 90)),
        ((100, 200), "shortest", (10, 60, 90, 140)),
        ((200, 100), "squash", (20, 10, 180, 90)),
    ],
)
def test_plain_box_in_px_of_the_image(size, mode, box):
    preprocess = Preprocess(resize=50, crop=40, size=40, mode=mode)
    assert preprocess.draw(size, Views(), "a", 0).box == pytest.approx(box)


# -- drawn views ----------------------------------------------------------------------------------------

RRC = Views(count=1000, augment="rrc")
SQUARE = Preprocess(resize=36, crop=32, size=32)


@settings(max_examples=30)
@given(width=st.integers(20, 400), height=st.integers(20, 400), view=st.integers(1, 999), sample_id=st.text())
def test_random_crops_lie_inside_within_their_ranges(width, height, view, sample_id):
    drawn = SQUARE.draw((width, height), RRC, sample_id, view)
    x0, y0, x1, y1 = drawn.box
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    assert all(side == int(side) for side in drawn.box)
    assert drawn.parameters == (x0, y0, x1, y1, drawn.flip, 0)
    w, h = x1 - x0, y1 - y0
    if max(width, height) <= 1.3 * min(width, height):  # long images may fall back to the centred square
        rounding = 1 / w + 1 / h
        assert 0.35 * (1 - rounding) <= w * h / (width * height) <= 1
        assert 3 / 4 * (1 - rounding) <= w / h <= 4 / 3 * (1 + rounding)


def test_a_very_long_image_falls_back_to_its_centred_square():
    assert SQUARE.draw((1000, 10), RRC, "a", 1).box == (495, 0, 505, 10)


@pytest.mark.parametrize("least", [0.35, 0.08])
def test_random_crops_fill_their_ranges(least):
    """Area is uniform in `crop_area`…1, aspect log-uniform in 3/4…4/3 and half of the views are mirrored."""
    recipe = Views(count=1000, augment="rrc", crop_area=least)
    drawn = [SQUARE.draw((1200, 1200), recipe, "a", view) for view in range(1, 1000)]
    sides = np.array([(v.box[2] - v.box[0], v.box[3] - v.box[1]) for v in drawn])
    area, aspect = sides.prod(1) / 1200**2, np.log(sides[:, 0] / sides[:, 1])
    assert least * 0.99 < area.min() < least + 0.02
    assert area.max() > 0.93
    assert abs(aspect.mean()) < 0.02
    assert np.abs(aspect).max() == pytest.approx(np.log(4 / 3), abs=0.01)
    assert 440 < sum(v.flip for v in drawn) < 560


def test_a_drawn_view_depends_on_seed_id_and_number_and_on_nothing_else():
    def draw(seed=0, sample_id="a", view=1, preprocess=SQUARE, count=4):
        return preprocess.draw((300, 200), Views(count=count, augment="rrc", seed=seed), sample_id, view)

    assert draw() == draw(count=9) == draw(preprocess=Preprocess(resize=64, crop=64, size=8))
    assert len({draw(), draw(seed=1), draw(sample_id="b"), draw(view=2), draw(view=3)}) == 5


def test_drawn_views_stay_what_they_always_were():
    """Stores already made are replayed with these; a change here makes every one of them wrong."""
    recipe = Views(count=3, augment="rrc", seed=7)
    assert [SQUARE.draw((300, 200), recipe, "n01/é.jpg", view).parameters for view in (1, 2)] == [
        (61, 19, 271, 178, 1, 0),
        (29, 17, 177, 165, 0, 0),
    ]


def digest_of_views(order):
    image, recipe = noise((90, 70)), Views(count=4, augment="rrc", seed=3)
    pixels = {i: SQUARE.render(image, SQUARE.draw(image.size, recipe, "x/1.png", i)).tobytes() for i in order}
    return hashlib.sha256(b"".join(pixels[i] for i in sorted(pixels))).hexdigest()


def test_views_are_the_same_in_another_process_in_another_order():
    program = "import test_views; print(test_views.digest_of_views([3, 1, 0, 2]))"
    other = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == digest_of_views(range(4))


def ramp(width, height):
    """Red is the column, green is the row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))


@settings(max_examples=30)
@given(width=st.integers(24, 250), height=st.integers(24, 250), view=st.integers(0, 20), size=st.integers(4, 24))
def test_pixels_come_from_the_box(width, height, view, size):
    """On a ramp, each pixel's colour is where in the image it was taken; at any rendering size."""
    preprocess = Preprocess(resize=24, crop=20, size=size, interpolation="bilinear")
    drawn = preprocess.draw((width, height), RRC, "a", view)
    x0, y0, x1, y1 = drawn.box
    columns = x0 + (np.arange(size) + 0.5) * (x1 - x0) / size - 0.5
    rows = y0 + (np.arange(size) + 0.5) * (y1 - y0) / size - 0.5
    pixels = preprocess.render(ramp(width, height), drawn)
    assert pixels.shape == (size, size, 3)
    slack = 1.01 + 0.25 * max((x1 - x0), (y1 - y0)) / size  # at the border a filter is cut off on one side
    np.testing.assert_allclose(pixels[0, :, 0], columns[::-1] if drawn.flip else columns, atol=slack)
    np.testing.assert_allclose(pixels[:, 0, 1], rows, atol=slack)


@given(width=st.integers(1, 200), height=st.integers(1, 200), resize=st.integers(1, 60), data=st.data())
def test_a_student_may_render_the_plain_box_at_any_size(width, height, resize, data):
    crop, size = data.draw(st.integers(1, resize)), data.draw(st.integers(1, 40))
    preprocess = Preprocess(resize=resize, crop=crop, size=size)
    assert plain(noise((width, height)), preprocess).shape == (size, size, 3)


def test_a_students_rendering_is_a_resize_of_the_teachers_box():
    image = noise((200, 100))
    preprocess = Preprocess(resize=50, crop=40, size=10, interpolation="nearest")
    np.testing.assert_array_equal(
        plain(image, preprocess), np.asarray(image.crop((60, 10, 140, 90)).resize((10, 10), Image.Resampling.NEAREST))
    )
    box = preprocess.draw(image.size, RRC, "a", 1)
    cut = np.asarray(image.crop(box.box).resize((10, 10), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(preprocess.render(image, box), cut[:, ::-1] if box.flip else cut)


def test_flip_views_mirror_the_plain_one():
    image, recipe = noise((70, 50)), Views(count=3, augment="flip")
    views = [SQUARE.render(image, SQUARE.draw(image.size, recipe, "a", number)) for number in range(3)]
    np.testing.assert_array_equal(views[1], views[0][:, ::-1])
    np.testing.assert_array_equal(views[2], views[0])
    assert (views[1] != views[0]).any()


def test_view_0_of_any_recipe_is_the_plain_view():
    draws = [
        SQUARE.draw((70, 50), Views(count=c, augment=a, seed=5), "a", 0)
        for c, a in ((1, "none"), (2, "flip"), (2, "rotate4"), (2, "rotate4_crop"), (2, "rrc"))
    ]
    assert all(drawn == View(draws[0].box) for drawn in draws)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"augment": "mixup", "count": 2}, "unknown augment 'mixup'; known: none, flip, rotate4, rotate4_crop, rrc"),
        ({"count": 2}, "2 views with augment 'none'.*--augment flip, rotate4, rotate4_crop or rrc"),
        ({"augment": "rrc"}, "1 views with augment 'rrc': give --views 2 or more"),
        ({"count": 0}, "0 views"),
        ({"count": 2, "augment": "rrc", "crop_area": 0}, "crop area 0 is no share"),
        ({"count": 2, "augment": "rrc", "crop_area": 1.5}, "crop area 1.5 is no share"),
        ({"count": 2, "augment": "flip", "crop_area": 0.5}, "crop area 0.5 with augment 'flip': only --augment rrc"),
    ],
)
def test_a_wrong_recipe_is_refused(given, message, unchecked):
    with pytest.raises(ValueError, match=message):
        Views(**given)


@pytest.mark.parametrize(
    "given", [{}, {"count": 3, "augment": "rrc"}, {"count": 3, "augment": "rrc", "crop_area": 0.8}]
)
def test_a_recipe_is_read_back_from_its_record(given):
    recipe = Views(**given)
    assert Views.from_record({**recipe.record, "parameters": ["x0"]}) == recipe
    assert ("crop_area" in recipe.record) == ("crop_area" in given), "as stores made before there was a choice"


@pytest.mark.parametrize(
    "given",
    [
        {"resize": 10, "crop": 11, "size": 8},
        {"resize": 10, "crop": 0, "size": 8},
        {"resize": 10, "crop": 10, "size": 0},
        {"resize": 10, "crop": 10, "size": 10, "interpolation": "cubic"},
        {"resize": 10, "crop": 10, "size": 10, "mode": "pad"},
    ],
)
def test_wrong_preprocessing_is_refused(given, unchecked):
    with pytest.raises(ValueError, match=r"crop <= resize|is not one of|is not 'shortest'"):
        Preprocess(**given)


def test_preprocessing_survives_json():
    preprocess = Preprocess(resize=20, crop=16, size=8, mean=(0.1, 0.2, 0.3), mode="squash", interpolation="lanczos")
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


# -- decoding -------------------------------------------------------------------------------------------


def encode(image, kind="png", **given):
    buffer = io.BytesIO()
    image.save(buffer, kind, **given)
    return buffer.getvalue()


def decoded(image, kind="png", **given):
    result = decode(encode(image, kind, **given))
    assert result.mode == "RGB"
    return np.asarray(result)


@pytest.fixture
def pixels(rng):
    return rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)


def test_grey_is_repeated_in_three_channels(pixels):
    grey = pixels[..., 0]
    np.testing.assert_array_equal(decoded(Image.fromarray(grey)), np.stack([grey] * 3, 2))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped(pixels, mode):
    alpha = np.tile(np.array([0, 128, 255], np.uint8), (12, 3))
    colour = pixels if mode == "RGBA" else pixels[..., :1]
    expected = pixels if mode == "RGBA" else np.repeat(colour, 3, 2)
    np.testing.assert_array_equal(decoded(Image.fromarray(np.dstack([colour, alpha]))), expected)


def test_a_palette_with_transparency_keeps_its_colours(rng):
    index, palette = rng.integers(0, 4, (6, 5), dtype=np.uint8), rng.integers(0, 256, (4, 3), dtype=np.uint8)
    image = Image.frombytes("P", (5, 6), index.tobytes())
    image.putpalette(palette.ravel().tolist())
    for transparency in (1, bytes([0, 100, 255, 7])):
        np.testing.assert_array_equal(decoded(image, transparency=transparency), palette[index])
    np.testing.assert_array_equal(decoded(image), palette[index])


@pytest.mark.parametrize(
    ("ink", "rgb"), [((0, 255, 255, 0), (255, 0, 0)), ((255, 0, 255, 0), (0, 255, 0)), ((0, 0, 0, 255), (0, 0, 0))]
)
def test_cmyk_jpeg(ink, rgb):
    result = decoded(Image.new("CMYK", (16, 16), ink), "jpeg", quality=95)
    np.testing.assert_allclose(result, np.broadcast_to(rgb, (16, 16, 3)), atol=4)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_cmyk_tiff(rng, compression):
    ink = rng.integers(0, 256, (12, 9, 4), dtype=np.uint8)
    result = decoded(Image.frombytes("CMYK", (9, 12), ink.tobytes()), "tiff", compression=compression)
    light = 255.0 - ink
    np.testing.assert_allclose(result, light[..., :3] * light[..., 3:] / 255, atol=0.51)


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bits_become_8(rng, kind):
    deep = rng.integers(0, 2**16, (6, 5), dtype=np.uint16)
    deep[0, :4] = 0, 255, 256, 65535
    np.testing.assert_array_equal(decoded(Image.fromarray(deep), kind), np.stack([deep >> 8] * 3, 2))


def test_signed_16_bits_become_8(rng):
    deep = rng.integers(0, 2**15, (6, 5), dtype=np.uint16)
    unsigned = encode(Image.fromarray(deep), "tiff", tiffinfo={SAMPLEFORMAT: 1})
    tag = struct.pack("<HHI", SAMPLEFORMAT, 3, 1)
    signed = unsigned.replace(tag + b"\1", tag + b"\2")
    assert Image.open(io.BytesIO(signed)).mode == "I"
    np.testing.assert_array_equal(np.asarray(decode(signed)), np.stack([deep >> 8] * 3, 2))


@pytest.mark.parametrize("top", [1, 255, 65535])
@pytest.mark.parametrize(("kind", "named"), [(np.float32, "floating-point"), (np.int32, "32-bit integer")])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_pixels_without_an_agreed_range_are_refused(kind, named, top, compression):
    image = Image.fromarray(np.linspace(0, top, 30).reshape(6, 5).astype(kind))
    with pytest.raises(ValueError, match=f"{named} pixels have no agreed range; convert the image to 8 or 16 bits"):
        decode(encode(image, "tiff", compression=compression))


def test_a_bilevel_tiff_need_not_say_its_bits(rng):
    black_and_white = rng.integers(0, 2, (6, 5), dtype=np.uint8) * 255
    encoded = encode(Image.fromarray(black_and_white).convert("1"), "tiff")
    assert BITSPERSAMPLE not in Image.open(io.BytesIO(encoded)).tag_v2
    np.testing.assert_array_equal(np.asarray(decode(encoded)), np.stack([black_and_white] * 3, 2))


def test_a_portable_float_map_is_refused():
    with pytest.raises(ValueError, match="floating-point pixels have no agreed range"):
        decode(encode(Image.new("F", (4, 3)), "ppm"))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation_is_applied(pixels, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, plain = Image.fromarray(pixels), decoded(Image.fromarray(pixels), "jpeg", quality=95, subsampling=0)
    np.testing.assert_array_equal(decoded(image, exif=exif), upright(pixels))
    np.testing.assert_array_equal(decoded(image, "webp", lossless=True, exif=exif), upright(pixels))
    np.testing.assert_array_equal(decoded(image, "tiff", exif=exif), upright(pixels))
    np.testing.assert_array_equal(decoded(image, "tiff", compression="tiff_lzw", exif=exif), upright(pixels))
    np.testing.assert_array_equal(decoded(image, "jpeg", quality=95, subsampling=0, exif=exif), upright(plain))


def test_a_truncated_jpeg_raises(photographs):
    whole = photographs[0][1]
    assert decode(whole).size
    for share in (0.1, 0.6, 0.95):
        with pytest.raises(OSError, match=r"truncated|not an image|broken"):
            decode(whole[: int(share * len(whole))])


@pytest.mark.parametrize("encoded", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_raise(encoded):
    with pytest.raises(Exception, match=r"."):
        decode(encoded)


def test_rotate4_turns_the_plain_view_counter_clockwise_by_quarters():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    preprocess = Preprocess(resize=24, crop=20, size=20)
    recipe = Views(count=8, augment="rotate4")
    views = [preprocess.draw(image.size, recipe, "x", number) for number in range(8)]
    plain = Image.fromarray(preprocess.render(image, views[0]))
    for number, view in enumerate(views):
        assert view.parameters[-1] == number % 4
        np.testing.assert_array_equal(preprocess.render(image, view), np.asarray(plain.rotate(90 * number)))


TURNED = Views(count=16, augment="rotate4_crop", seed=3)


def test_rotate4_crop_is_random_crop_of_the_padded_image_then_a_turn():
    """At the size of CIFAR, to the pixel: torchvision's RandomCrop(32, padding=4), whose place is told by the box."""
    image, preprocess = noise((32, 32)), Preprocess(resize=32, crop=32, size=32)
    padded = np.pad(np.asarray(image), ((4, 4), (4, 4), (0, 0)))
    for number in range(1, 16):
        view = preprocess.draw(image.size, TURNED, "x", number)
        x, y = (int(start) for start in view.box[:2])
        cut = padded[4 + y : 36 + y, 4 + x : 36 + x]
        expected = np.rot90(cut[:, ::-1] if view.flip else cut, number % 4)
        np.testing.assert_array_equal(preprocess.render(image, view), expected)


def test_rotate4_crops_places_are_uniform_and_each_views_own():
    drawn = [SQUARE.draw((36, 36), TURNED, str(sample), view) for sample in range(600) for view in range(1, 4)]
    plain = SQUARE.draw((36, 36), Views(), "", 0).box
    moved = np.array([np.subtract(view.box, plain) for view in drawn])
    np.testing.assert_array_equal(moved[:, :2], moved[:, 2:])
    for axis in range(2):
        values, counts = np.unique(moved[:, axis], return_counts=True)
        np.testing.assert_array_equal(values, np.arange(-4, 5))
        assert counts.min() > 140  # of 1,800 / 9, five standard deviations
    assert abs(np.corrcoef(moved[:, :2].T)[0, 1]) < 0.12
    of_a_sample = moved[:, 0].reshape(600, 3)
    assert np.abs(np.corrcoef(of_a_sample.T) - np.eye(3)).max() < 0.2


def test_four_views_are_mirrored_together_and_the_first_four_never():
    flips = np.array([[SQUARE.draw((40, 30), TURNED, str(i), view).flip for view in range(16)] for i in range(200)])
    groups = flips.reshape(200, 4, 4)
    assert (groups == groups[:, :, :1]).all()
    assert not groups[:, 0].any()
    assert all(70 < groups[:, group, 0].sum() < 130 for group in (1, 2, 3))
    assert abs(np.corrcoef(groups[:, 1, 0], groups[:, 2, 0])[0, 1]) < 0.3


def test_rotate4_crop_stays_what_it_always_was():
    """Stores already made are replayed with these; a change here makes every one of them wrong."""
    assert [SQUARE.draw((72, 36), TURNED, "n02/é.jpg", view).parameters for view in (1, 4, 7)] == [
        (17, 0, 49, 32, 0, 1),
        (24, 6, 56, 38, 1, 0),
        (24, -2, 56, 30, 1, 3),
    ]


def test_a_crop_beyond_the_image_is_black_there_at_any_size():
    """A student at another resolution, or of a smaller copy, sees the same: white where the image is, black beyond."""
    white = Image.new("RGB", (64, 64), "white")
    for size in (8, 32, 100):
        preprocess = Preprocess(resize=32, crop=32, size=size, interpolation="bilinear")
        for number in range(1, 16):
            view = Preprocess(resize=32, crop=32, size=32).draw(white.size, TURNED, "x", number)
            for image in (white, white.resize((16, 16))):
                pixels = preprocess.render(image, view, white.size)
                covered = [max(0, min(64, end) - max(0, start)) / 64 for start, end in (view.box[::2], view.box[1::2])]
                assert pixels.mean() / 255 == pytest.approx(covered[0] * covered[1], abs=0.02)
