"""Masks: read as their classes say, refused where they are not such, and rendered as the image's own view."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.corpora import has_target, open_corpus, target
from featcache.inputs import Views
from featcache.inputs.images import Preprocess
from featcache.masks import MASK, MaskClasses, refuse_other_size, render

TIE = (-1e-9, 1e-9)
ROADS = MaskClasses(names=("background", "road"), values=(0, 255), ignored=(7,))


def encoded(pixels: np.ndarray, kind: str = "PNG", palette: bool = False) -> bytes:
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette([9, 8, 7] * 256)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images a to d, of 8 × 6 px, masks of all but d."""
    rng = np.random.default_rng(0)
    for kind, names in (("images", "abcd"), ("masks", "abc")):
        (tmp_path / kind).mkdir()
        for name in names:
            pixels = rng.integers(0, 256, (6, 8, 3)) if kind == "images" else 255 * rng.integers(0, 2, (6, 8))
            suffix = "jpg" if kind == "images" else "png"
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / kind / f"{name}.{suffix}")
    return tmp_path


@pytest.mark.parametrize("palette", [False, True])
def test_values_are_classes(palette):
    mask = np.array([[0, 255], [7, 255]], np.uint8)
    assert ROADS.decode(encoded(mask, palette=palette)).tolist() == [[1, 2], [0, 2]]


def test_masks_of_one_bit_of_16_bits_and_of_equal_channels():
    assert ROADS.decode(encoded(np.array([[True, False]]))).tolist() == [[2, 1]]
    assert ROADS.decode(encoded(np.array([[255, 0]], np.uint16))).tolist() == [[2, 1]]
    assert ROADS.decode(encoded(np.repeat(np.array([[[255], [0]]], np.uint8), 3, axis=2))).tolist() == [[2, 1]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            np.array([[0, 3, 4]], np.uint8),
            "holds the value 3, 4, which is of no class .known: 0 background, 255 road, 7 ignored",
        ),
        (np.array([[[1, 2, 3]]], np.uint8), "its pixels are colours; write one value a pixel"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        ROADS.decode(encoded(mask))


def test_a_jpeg_mask_is_refused_where_compression_changed_it():
    noise = 255 * np.random.default_rng(0).integers(0, 2, (16, 16)).astype(np.uint8)
    with pytest.raises(ValueError, match="lossy compression, write the mask as PNG"):
        ROADS.decode(encoded(noise, "JPEG"))


@pytest.mark.parametrize("size", [9, 6, 13])
@pytest.mark.parametrize("augment", ["flip", "rotate4_crop", "rrc"])
def test_a_mask_follows_its_images_view_to_the_pixel(augment, size):
    """Against a loop over pixels: turn and mirror back, into the box, the pixel there."""
    preprocess, views = Preprocess(resize=10, crop=9, size=size), Views(count=5, augment=augment)
    mask = np.random.default_rng(1).integers(1, 4, (14, 11)).astype(np.uint8)
    for number in range(5):
        view = preprocess.draw((11, 14), views, "a", number)
        found = render(mask, preprocess, view)
        left, top, right, bottom = view.box
        differing = 0
        for row in range(size):
            for column in range(size):
                r, c = row, column
                for _ in range(view.turns):  # of a picture turned counter-clockwise, where this pixel was before
                    r, c = c, size - 1 - r
                c = size - 1 - c if view.flip else c
                x, y = left + (c + 0.5) * (right - left) / size, top + (r + 0.5) * (bottom - top) / size
                inside = 0 <= x < 11 and 0 <= y < 14
                # Where a centre lies between two pixels, Pillow's sums may end on either side.
                near = {mask[math.floor(y + e), math.floor(x + d)] for e in TIE for d in TIE} if inside else {0}
                differing += found[row, column] not in near
        # At the encoder's own size the plain image is resized whole and cut in whole px: half a pixel of the resized one apart.
        assert differing == 0 or (view.plain and size == preprocess.crop)
        if view.plain and size == preprocess.crop:
            levels = Image.fromarray(mask).resize((10, 12), Image.Resampling.NEAREST).crop((0, 2, 9, 11))
            wanted = np.asarray(levels)[:, ::-1] if view.flip else np.asarray(levels)
            assert (found == wanted).all()


def test_a_corpus_tells_labelled_images_from_others_by_a_list(folder):
    (folder / "labelled.txt").write_text("c\na.jpg\n\n")
    corpus = open_corpus(f"masks:{folder}@labelled=labelled.txt@classes=field:0,road:255")
    assert corpus.ids == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert [has_target(corpus, i, MASK) for i in range(4)] == [True, False, True, False]
    assert target(corpus, 1, MASK) is None
    assert target(corpus, 2, MASK) == (folder / "masks/c.png").read_bytes()
    assert corpus.mask_classes.names == ("field", "road")


def test_a_corpus_of_a_list_has_only_those(folder):
    (folder / "few.txt").write_text("d\nb\n")
    corpus = open_corpus(f"masks:{folder}@list=few.txt")
    assert corpus.ids == ["b.jpg", "d.jpg"]
    assert corpus.read(1) == (folder / "images/d.jpg").read_bytes()
    assert [has_target(corpus, i, MASK) for i in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("options", "lines", "message"),
    [
        ("@list=l.txt", "a\nx\n", r"l\.txt, line 2: x is none of the images"),
        ("@list=l.txt", "a\na.jpg\n", r"l\.txt, line 2: a\.jpg is named twice"),
        ("@list=l.txt", "\n", r"l\.txt: names no image; write one id a line"),
        ("@labelled=l.txt", "d\n", r"l\.txt: names d\.jpg, which has no mask"),
        ("@list=none.txt", "", r"none\.txt: cannot be read as a list"),
        ("@masks=elsewhere", "", "elsewhere: no such folder of masks"),
        ("@classes=a:0,b:x", "", "give classes as @classes=NAME:VALUE"),
        ("@classes=a:0,b:0", "", "names and values of their own; give each once"),
        ("@colour=red", "", "@colour=red: no such option"),
    ],
)
def test_what_a_corpus_of_masks_cannot_be_is_refused(folder, options, lines, message):
    (folder / "l.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        open_corpus(f"masks:{folder}{options}")


def test_other_corpora_have_no_masks_and_say_which_have(folder):
    corpus = open_corpus(str(folder / "images"))
    assert not has_target(corpus, 0, MASK)
    with pytest.raises(ValueError, match="has no mask of any sample; give masks:FOLDER"):
        target(corpus, 0, MASK)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(
        ValueError, match=r"a\.jpg: its mask is 3 × 2 px, the image 4 × 2; write the mask in the image's size"
    ):
        refuse_other_size("a.jpg", np.ones((2, 3), np.uint8), (4, 2))
