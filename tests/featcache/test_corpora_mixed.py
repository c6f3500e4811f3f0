"""Mixtures of a corpus's images: what each kind is made of, whatever order and threads it is read in."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_encoder

from featcache import extract, open_corpus
from featcache.inputs.images import decode

COUNT = 24
WIDTH, HEIGHT = 24, 18


@pytest.fixture
def photos(tmp_path, rng):
    """Five pictures of noise, 24 × 18 px, each of values of its own: picture n's are 50 n … 50 n + 49."""
    (tmp_path / "photos").mkdir()
    for n in range(5):
        pixels = rng.integers(50 * n, 50 * n + 50, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{n}.png")
    return str(tmp_path / "photos")


def pixels(encoded):
    return np.asarray(decode(encoded))


def mixed(photos, kind):
    """The pictures of a kind, and all images that they may be made of."""
    corpus, clean = open_corpus(f"mixed:{COUNT}:{photos}"), open_corpus(photos)
    sources = [pixels(clean.read(n)) for n in range(5)]
    return [pixels(corpus.read(i)) for i, name in enumerate(corpus.ids) if name.endswith(kind)], sources


def test_they_are_numbered_and_have_no_labels(photos):
    corpus = open_corpus(f"mixed:{COUNT}:{photos}")
    assert len(corpus) == len(set(corpus.ids)) == COUNT
    assert [name.split("-")[1] for name in corpus.ids] == ["blend", "join", "piece", "shuffle"] * (COUNT // 4)
    assert {corpus.label(i) for i in range(COUNT)} == {-1}
    assert corpus.class_names is None


def test_blends_are_weighted_means_of_two_images(photos):
    blends, sources = mixed(photos, "blend")
    weights = []
    for blend in blends:
        assert blend.shape == (HEIGHT, WIDTH, 3)
        fits = []
        for a in sources:
            for b in sources:
                difference = a.astype(float) - b
                weight = (difference * (blend - b.astype(float))).sum() / max(1.0, (difference**2).sum())
                fits.append((np.abs(weight * a + (1 - weight) * b - blend).max(), weight))
        error, weight = min(fits)
        assert error <= 1.0  # of rounding to whole values, in the picture and so in the fitted weight
        weights.append(weight)
    assert all(0.29 < weight < 0.71 or weight == 0 for weight in weights)  # 0: an image with itself
    assert len({round(weight, 6) for weight in weights}) > 2


def test_joins_are_parts_of_two_images(photos):
    joins, sources = mixed(photos, "join")
    splits = set()
    for join in joins:
        which = join[..., 0] // 50  # each image has values of its own
        a, b = int(which[0, 0]), int(which[-1, -1])
        rows, columns = int((which[:, 0] == a).sum()), int((which[0] == a).sum())
        expected = sources[b].copy()
        expected[:rows, :columns] = sources[a][:rows, :columns]
        np.testing.assert_array_equal(join, expected)
        if a != b:
            assert (rows == HEIGHT) != (columns == WIDTH)
            assert 6 <= rows <= 12 or 8 <= columns <= 16, "a third to two thirds"
            splits.add((rows, columns))
    assert {rows == HEIGHT for rows, _ in splits} == {True, False}


def test_pieces_are_squares_of_one_image(photos):
    pieces, sources = mixed(photos, "piece")
    for piece in pieces:
        assert piece.shape == (HEIGHT, HEIGHT, 3)
        found = False
        for source in sources:
            for side in range(5, 12):  # 8 … 30 % of 24 × 18 px
                for top in range(HEIGHT - side + 1):
                    for left in range(WIDTH - side + 1):
                        square = Image.fromarray(source[top : top + side, left : left + side])
                        found = found or np.array_equal(
                            square.resize((HEIGHT, HEIGHT), Image.Resampling.BICUBIC), piece
                        )
        assert found


def test_shuffles_are_an_images_quarters_in_other_colours(photos):
    shuffles, sources = mixed(photos, "shuffle")

    def quarters(image):
        return sorted(
            np.sort(image[y : y + 9, x : x + 12].reshape(-1, 3), axis=1).tobytes() for y in (0, 9) for x in (0, 12)
        )

    known = [quarters(source) for source in sources]
    negative = [quarters(255 - source) for source in sources]
    found = [quarters(shuffle) in known + negative for shuffle in shuffles]
    assert all(found)
    assert not any(np.array_equal(shuffle, source) for shuffle in shuffles for source in sources)


def test_bytes_depend_on_neither_order_nor_threads_nor_count(photos):
    corpus = open_corpus(f"mixed:{COUNT}:{photos}")
    expected = [corpus.read(i) for i in range(COUNT)]
    with ThreadPoolExecutor(8) as pool:
        order = [*reversed(range(COUNT))] * 3
        assert list(pool.map(open_corpus(f"mixed:{COUNT}:{photos}").read, order)) == [expected[i] for i in order]
    more = open_corpus(f"mixed:{COUNT + 5}:{photos}")
    assert [more.read(i) for i in range(COUNT)] == expected
    assert more.ids[:COUNT] == corpus.ids


def test_large_images_are_reduced_and_others_take_the_first_ones_size(tmp_path, rng):
    for name, size in (("a", (600, 512)), ("b", (40, 300))):
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(tmp_path / f"{name}.png")
    corpus = open_corpus(f"mixed:{COUNT}:{tmp_path}")
    sizes = {decode(corpus.read(i)).size for i, name in enumerate(corpus.ids) if name.endswith(("blend", "join"))}
    assert sizes == {(300, 256), (40, 300)}


def test_an_image_that_cannot_be_read_fails_what_is_made_of_it_and_is_named(photos, tmp_path):
    (tmp_path / "photos" / "2.png").write_bytes(b"no image")
    Image.new("RGB", (1, 30)).save(tmp_path / "photos" / "3.png")
    store = extract(f"mixed:{COUNT}:{photos}", tiny_encoder(), tmp_path / "s.zarr", device="cpu", precision="fp32")
    reasons = list(store.reasons.values())
    assert 0 < len(reasons) < COUNT
    assert all("2.png: " in reason or "3.png: " in reason for reason in reasons)
    assert any("2.png: " in reason for reason in reasons)
    assert any("3.png: 1 × 30 px; mixing needs 2 px a side or more" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("mixed:{photos}", "is not mixed:COUNT:CORPUS"),
        ("mixed:8:", "is not mixed:COUNT:CORPUS"),
        ("mixed:-1:{photos}", "is not mixed:COUNT:CORPUS"),
        ("mixed:0:{photos}", "give a COUNT of 1 or more"),
    ],
)
def test_what_is_wrong_with_a_spec_is_said(photos, spec, said):
    with pytest.raises(ValueError, match=said):
        open_corpus(spec.format(photos=photos))


def test_an_image_too_long_to_be_mixed_is_refused_with_its_name(tmp_path):
    Image.new("RGB", (20, 20_000)).save(tmp_path / "long.png")
    with pytest.raises(ValueError, match=r"long\.png: 20 × 20000 px; mixing takes 16,384 px a side at most"):
        open_corpus(f"mixed:1:{tmp_path}").read(0)
