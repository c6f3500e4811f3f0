"""Corrupted images: the reference implementation's own, whatever order and threads they are read in."""

import io
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from featcache import KeptPixels, open_corpus
from featcache.corpora.corrupted import COMMON, EXTRA, Corrupted, corrupt
from featcache.inputs.images import decode

imagecorruptions = pytest.importorskip("imagecorruptions", reason="needs featcache[robustness]")


@pytest.fixture
def photos(tmp_path, rng):
    """Three smooth pictures, 47 × 40 px, in two classes; returns their folder."""
    for name in ("ant/0.png", "ant/1.png", "bee/2.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(rng, (47, 40)).save(path)
    return str(tmp_path / "photos")


def smooth(rng, size):
    return Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)


def pixels(encoded):
    return np.asarray(decode(encoded))


def by_the_package(image, name, severity, seed):
    np.random.seed(seed)
    own = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
    return imagecorruptions.corrupt(image, severity, name, **own)


def test_the_names_are_the_packages():
    assert list(COMMON) == imagecorruptions.get_corruption_names("common")
    assert list(EXTRA) == imagecorruptions.get_corruption_names("validation")


@pytest.mark.parametrize("name", [*COMMON, *EXTRA])
def test_images_are_what_the_package_makes_of_them(photos, name):
    clean, corpus = open_corpus(photos), open_corpus(f"corrupted:{name}:3:{photos}")
    assert (corpus.ids, corpus.class_names) == (clean.ids, clean.class_names)
    assert [corpus.label(i) for i in range(3)] == [0, 0, 1]
    for i in (0, 2):
        before = pixels(clean.read(i))
        found = pixels(corpus.read(i))
        np.testing.assert_array_equal(found, by_the_package(before, name, 3, corpus.seed(i)))
        assert np.abs(found.astype(int) - before).mean() > 0.5


def test_bytes_depend_on_neither_order_nor_threads_and_numpys_generator_is_left_alone(photos):
    corpora = [open_corpus(f"corrupted:{name}:{level}:{photos}") for name in (*COMMON, *EXTRA) for level in (2, 5)]
    jobs = [(corpus, i) for corpus in corpora for i in range(3)]
    np.random.seed(1)
    expected = np.random.RandomState(1).random(3).tolist()
    alone = [corpus.read(i) for corpus, i in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: job[0].read(job[1]), reversed(jobs)))
    assert together[::-1] == alone
    assert np.random.random(3).tolist() == expected


def test_each_sample_and_severity_draws_its_own(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in "ab":
        Image.new("RGB", (40, 40), (120, 130, 140)).save(tmp_path / f"photos/{name}.png")
    light, heavy = (open_corpus(f"corrupted:motion_blur:{level}:{tmp_path / 'photos'}") for level in (1, 5))
    assert len({light.seed(0), light.seed(1), heavy.seed(0), heavy.seed(1)}) == 4
    noise = open_corpus(f"corrupted:gaussian_noise:1:{tmp_path / 'photos'}")
    assert noise.read(0) != noise.read(1)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "I;16"])
def test_every_kind_of_image_becomes_rgb(tmp_path, rng, mode):
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, (36, 40), np.uint16))
    else:
        image = smooth(rng, (40, 36)).convert(mode)
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos/0.tif")
    corpus = open_corpus(f"corrupted:contrast:2:{tmp_path / 'photos'}")
    before = pixels((tmp_path / "photos/0.tif").read_bytes())
    np.testing.assert_array_equal(pixels(corpus.read(0)), imagecorruptions.corrupt(before, 2, "contrast"))


def test_large_images_are_reduced_first_and_small_ones_refused(tmp_path, rng):
    (tmp_path / "photos").mkdir()
    smooth(rng, (90, 61)).save(tmp_path / "photos/large.png")
    smooth(rng, (60, 31)).save(tmp_path / "photos/small.png")
    corpus = open_corpus(f"corrupted:pixelate:4@size=40:{tmp_path / 'photos'}")
    image = decode((tmp_path / "photos/large.png").read_bytes())
    reduced = pixels(KeptPixels(size=40, format="raw").encode(image))
    assert reduced.shape == (40, 59, 3)
    np.testing.assert_array_equal(pixels(corpus.read(0)), imagecorruptions.corrupt(reduced, 4, "pixelate"))
    with pytest.raises(ValueError, match=r"small\.png: 60 × 31 px; corruptions need 32 px"):
        corpus.read(1)
    assert open_corpus(corpus.spec).read(0) == corpus.read(0)


def test_corruptions_can_be_piled_up(photos):
    corpus = open_corpus(f"corrupted:contrast:1:corrupted:brightness:2:{photos}")
    inner = open_corpus(f"corrupted:brightness:2:{photos}")
    expected = imagecorruptions.corrupt(pixels(inner.read(1)), 1, "contrast")
    np.testing.assert_array_equal(pixels(corpus.read(1)), expected)


def test_spatter_without_a_drop_leaves_the_image_as_it_was(rng):
    image = np.asarray(smooth(rng, (32, 32)))

    def drops(seed):
        from skimage.filters import gaussian

        layer = np.random.RandomState(seed).normal(0.65, 0.3, (32, 32))
        return bool((gaussian(layer, sigma=4) >= 0.69).any())

    dry = next(seed for seed in range(1000) if not drops(seed))
    np.testing.assert_array_equal(corrupt(image, "spatter", 1, dry), image)


def test_nothing_is_printed(capsys, rng):
    for name in ("zoom_blur", "snow"):
        corrupt(np.asarray(smooth(rng, (71, 33))), name, 5, 0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("corrupted:gausian_noise:3:{}", "unknown corruption 'gausian_noise'; did you mean gaussian_noise"),
        ("corrupted:fog:6:{}", r"severity 6 of fog: give 1 \(light\) to 5 \(heavy\)"),
        ("corrupted:fog:0:{}", "severity 0 of fog"),
        ("corrupted:fog:3@size=31:{}", "size 31: corruptions need a shorter side of 32 px or more"),
        ("corrupted:fog:{}", r"is not corrupted:NAME:SEVERITY\[@size=PX\]:CORPUS"),
        ("corrupted:fog:3:nowhere", "nowhere: no such folder"),
    ],
)
def test_wrong_specs_are_refused_with_the_remedy(photos, spec, message):
    with pytest.raises(ValueError, match=message):
        open_corpus(spec.format(photos))


def test_without_the_package_the_extra_is_named(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ValueError, match=r"pip install 'featcache\[robustness\]'"):
        Corrupted(open_corpus(photos), "fog", 1)


def test_files_are_lossless_png(photos):
    encoded = open_corpus(f"corrupted:fog:1:{photos}").read(0)
    assert Image.open(io.BytesIO(encoded)).format == "PNG"


def test_an_image_too_long_to_be_corrupted_is_refused_with_its_name(tmp_path):
    Image.new("RGB", (40, 20_000)).save(tmp_path / "long.png")
    with pytest.raises(ValueError, match=r"long\.png: 20,000 px long; corruptions take 16,384 px a side at most"):
        open_corpus(f"corrupted:fog:1:{tmp_path}").read(0)
