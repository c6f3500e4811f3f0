"""Which pictures a report has, and what it reads of stores."""

import base64
import io
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from photo_cases import CLASSES, SECRET, World, colour_of, make_world, pixels
from PIL import Image
from report_cases import Page, ood_result
from tiny import tiny_encoder
from typer.testing import CliRunner

import evalsuite
from evalsuite import Result, report
from evalsuite.report.pictures import MOST, SIDE, thumbnail
from featcache import extract
from featcache.corpora.folder import Folder
from featcache.extraction.samples import content_hash
from featcache.inputs.images import KeptPixels, decode
from featcache.store.from_arrays import write_store
from featcache_cli import programs

pytestmark = pytest.mark.filterwarnings("ignore:.*rows differ")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def page(world: World, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "r.html"
    return Page(report(world.results, out, names={"vit": "teacher"}, images=world.images))


def colours(world: World) -> dict[tuple[str, str], tuple[int, int, int]]:
    """By set and sample id, in the order they were drawn in, which is not the corpora's."""
    number, found = 0, {}
    for name, corpus in world.photos.items():
        count = len(corpus) // len(CLASSES)
        for of_class in CLASSES:
            for i in range(count):
                found[name, f"{of_class}/{i}.jpg"] = colour_of(number)
                number += 1
    return found


def shown(page: Page, picture: dict) -> str:
    return page.data["pictures"][picture["picture"]]["name"]


def similar(colour: tuple[int, int, int], source: str) -> bool:
    return np.abs(pixels(source).reshape(-1, 3).mean(axis=0) - colour).max() < 12


def test_galleries_show_what_a_detector_gets_wrong(world: World, page: Page) -> None:
    samples = Result.read(world.results[1]).samples
    of_id, of_ood = (samples[f"score/knn:k=3/{key}"] for key in ("id_test", "near/moths"))
    limit = max(score for score in of_id if (of_id < score).mean() < 0.95)  # the 35th of 36
    gallery = next(each for each in page.charts("edges") if each["title"] == "teacher")
    near, test = gallery["strips"]
    assert (near["name"], test["name"]) == ("near-OOD: moths", "ID test")
    accepted = int((of_ood <= limit).sum())
    assert near["note"] == f"{accepted} of 27 accepted ({100 * accepted / 27:.1f} %)"
    assert test["note"] == f"1 of 36 rejected ({100 / 36:.1f} %)"
    assert [shown(page, each) for each in near["groups"]["most like ID"]] == [
        str(samples["sample_id/near/moths"][row]) for row in np.argsort(of_ood)[:8]
    ]
    assert [shown(page, each) for each in test["groups"]["least like ID"]] == [
        str(samples["sample_id/id_test"][row]) for row in np.argsort(-of_id)[:8]
    ]
    for each, score in zip(near["groups"]["most like ID"], np.sort(of_ood), strict=False):
        assert each["words"] == f"{score:.4g}, {'accepted' if score <= limit else 'rejected'}"
        assert each.get("mark", "") == ("wrong" if score <= limit else "")
    axes = [each["axis"]["line"] for each in page.charts("scores") if each["title"] == "teacher"]
    assert axes == [pytest.approx(limit)], "the threshold in the histogram"


def test_every_picture_is_of_its_sample(world: World, page: Page) -> None:
    """The same ids are in all three folders; hashes tell them apart."""
    of = colours(world)
    for name, strip in zip(("near", "test"), page.charts("edges")[0]["strips"], strict=True):
        for each in next(iter(strip["groups"].values())):
            source = page.data["pictures"][each["picture"]]["source"]
            assert similar(of[name, shown(page, each)], source)
            assert pixels(source).shape[:2] == (round(SIDE * 80 / 120), SIDE), "whole, and small"
    places = page.charts("map")[0]["sets"]
    assert [len(each["pictures"]) for each in places] == [36, 27]
    for name, of_set in zip(("test", "near"), places, strict=True):
        ids = world.photos[name].ids
        for row, number in enumerate(of_set["pictures"]):
            picture = page.data["pictures"][number]
            assert picture["name"] == ids[row]
            assert similar(of[name, ids[row]], picture["source"])
    assert len({each["source"] for each in page.data["pictures"]}) == len(page.data["pictures"]), "each once"


def test_a_picture_is_pixels_and_nothing_else(page: Page) -> None:
    for each in page.data["pictures"]:
        encoded = base64.b64decode(each["source"].removeprefix("data:image/webp;base64,"), validate=True)
        assert encoded[12:15] == b"VP8", "the first chunk of a WebP file, and the only one"
        assert int.from_bytes(encoded[16:20], "little") + 20 + len(encoded) % 2 >= len(encoded) - 1
        assert SECRET.encode() not in encoded
        assert not {"exif", "icc_profile", "xmp"} & Image.open(io.BytesIO(encoded)).info.keys()


@pytest.mark.parametrize(
    ("image", "form", "size"),
    [
        (Image.new("CMYK", (200, 100), (9, 99, 9, 9)), "JPEG", (64, 32)),
        (Image.new("RGBA", (1, 500), (9, 99, 9, 9)), "PNG", (1, 64)),
        (Image.new("L", (3, 2), 9), "PNG", (3, 2)),
        (Image.fromarray(np.full((90, 70), 40_000, np.uint16)), "PNG", (50, 64)),
    ],
)
def test_pictures_are_small_whatever_the_image(image: Image.Image, form: str, size: tuple[int, int]) -> None:
    file = io.BytesIO()
    image.save(file, form)
    assert pixels(thumbnail(decode(file.getvalue()))).shape == (size[1], size[0], 3)


def test_the_policy_lets_in_pictures_where_there_are_some(world: World, page: Page, tmp_path: Path) -> None:
    def policy(of: Page) -> list[str]:
        return next(
            str(a["content"]) for _, a in of.elements if a.get("http-equiv") == "Content-Security-Policy"
        ).split("; ")

    assert "img-src data:" in policy(page)
    assert not [rule for rule in policy(Page(report(world.results, tmp_path / "r.html"))) if "img-src" in rule]
    assert not [tag for tag, _ in page.elements if tag == "img"], "they are made by the page's own script"
    assert "<img" not in page.source, "not even in a class's name"


def test_neighbours_are_those_of_a_slow_loop(world: World, page: Page) -> None:
    near = {}
    for encoder in ("vit", "small"):
        rows = world.embeddings[encoder, "test"]
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = rows @ rows.T
        np.fill_diagonal(cosine, -2)
        near[encoder] = np.argsort(-cosine, axis=1)[:, :4]
    ids, labels = world.photos["test"].ids, world.photos["test"].labels
    names = world.photos["test"].class_names
    (gallery,) = page.charts("neighbours")
    assert len(gallery["strips"]) == 8
    common = []
    for strip in gallery["strips"]:
        row = list(ids).index(shown(page, strip["head"]))
        both = set(near["vit"][row]) & set(near["small"][row])
        assert strip["note"] == f"{len(both)} of 4 nearest in common"
        assert strip["name"] == names[labels[row]]
        for side, encoder in (("teacher", "vit"), ("student", "small")):
            found = strip["groups"][side]
            assert [shown(page, each) for each in found] == [ids[other] for other in near[encoder][row]]
            marked = [other for each, other in zip(found, near[encoder][row], strict=True) if "mark" in each]
            assert set(marked) == both
        common.append(len(both))
    assert common == sorted(common), "from the fewest in common to the most"


def test_confused_classes_are_those_of_a_slow_vote(world: World, page: Page) -> None:
    labels, names = {name: np.array(of.labels) for name, of in world.photos.items()}, world.photos["bank"].class_names
    unit = {
        name: of / np.linalg.norm(of, axis=1, keepdims=True)
        for (by, name), of in world.embeddings.items()
        if by == "small"
    }
    pairs: Counter[tuple[str, str]] = Counter()
    for row, true in zip(unit["test"], labels["test"], strict=True):
        cosine = unit["bank"] @ row
        nearest = np.argsort(-cosine)[:5]
        votes = np.bincount(labels["bank"][nearest], weights=np.exp(cosine[nearest] / 0.07), minlength=3)
        if votes.argmax() != true:
            pairs[names[true], names[votes.argmax()]] += 1
    gallery = next(each for each in page.charts("confused") if each["title"] == "small")
    found = {strip["name"]: int(strip["note"].split()[0]) for strip in gallery["strips"]}
    assert found == {f"{true} → {taken}": count for (true, taken), count in pairs.most_common(6)}
    assert gallery["note"].startswith(f"{sum(pairs.values())} of 36 queries are wrong")
    for strip in gallery["strips"]:
        true, taken = strip["name"].split(" → ")
        wrong, of_bank = strip["groups"].values()
        assert {shown(page, each).split("/")[0] for each in wrong} == {true}
        assert {shown(page, each).split("/")[0] for each in of_bank} == {taken}
        assert all(0 < int(each["words"].split()[0]) <= 100 for each in wrong)
    table = next(each for each in page.charts("knn-classes") if each["title"] == "small")
    accuracy = {name: 1 - sum(count for (true, _), count in pairs.items() if true == name) / 12 for name in names}
    assert {row[0]: row[2]["value"] for row in table["rows"]} == pytest.approx(accuracy)


def test_what_a_classifier_confuses_is_shown_while_it_is_the_same(world: World, tmp_path: Path) -> None:
    bank, test = (Path(Result.read(world.results[2]).inputs[name]["path"]) for name in ("bank", "query"))
    head = tmp_path / "head.safetensors"
    evalsuite.probe(train=bank, test=test, save=head, c=[1.0])
    result = evalsuite.classify(test=test, head=head)
    page = Page(report([result], tmp_path / "r.html", images=world.images))
    confusion = result.parameters["confusion"]
    pairs = {f"{true} → {taken}": n for true, of in confusion.items() for taken, n in of.items() if taken != true}
    (gallery,) = page.charts("misclassified")
    assert {strip["name"]: int(strip["note"].split()[0]) for strip in gallery["strips"]} == pairs
    for strip in gallery["strips"]:
        (wrong,) = strip["groups"].values()
        assert {shown(page, each).split("/")[0] for each in wrong} == {strip["name"].split(" → ")[0]}
        sure = [int(each["words"].split()[0]) for each in wrong]
        assert sure == sorted(sure, reverse=True)
    evalsuite.probe(train=test, test=bank, save=head, c=[1.0])
    page = Page(report([result], tmp_path / "r.html"))
    assert page.data["unread"] == [f"{test}: its classifier gives other answers by now"]


def test_tables_of_classes_count_what_is_beyond_the_threshold(world: World, page: Page) -> None:
    samples, (table, *_) = Result.read(world.results[1]).samples, page.charts("ood-classes")
    of_id, of_ood = (samples[f"score/knn:k=3/{key}"] for key in ("id_test", "near/moths"))
    expected = {}
    for title, name, scores in (("ID test", "test", of_id), ("near-OOD: moths", "near", of_ood)):
        corpus = world.photos[name]
        for number, of_class in enumerate(corpus.class_names):
            of = scores[np.array(corpus.labels) == number]
            expected[f"{title}: {of_class}"] = (len(of), float((of > np.sort(of_id)[34]).mean()))
    assert {row[0]: (row[1], row[2]["value"]) for row in table["rows"]} == expected
    assert {row[0] for row in page.charts("fidelity-classes")[0]["rows"]} == set(CLASSES)


def test_maps_by_class_and_from_id_to_ood(world: World, page: Page) -> None:
    kinds = Counter(each["where"]["Map"] for each in page.charts("map"))
    assert kinds == {"by set": 2, "by class": 2, "ID against OOD": 2}
    by_class = next(each for each in page.charts("map") if each["where"]["Map"] == "by class")
    names = world.photos["test"].class_names
    assert [(each["name"], each["tone"], each["rows"]) for each in by_class["sets"]] == [
        *((name, "class", 12) for name in names),
        ("near-OOD: moths", "rest", 27),
    ]
    across = next(each for each in page.charts("map") if each["where"]["Map"] == "ID against OOD")
    unit = {
        name: of / np.linalg.norm(of, axis=1, keepdims=True)
        for (by, name), of in world.embeddings.items()
        if by == "vit"
    }
    origin = unit["test"][::2].mean(axis=0)
    direction = unit["near"][::2].mean(axis=0) - origin
    direction /= np.linalg.norm(direction)
    width = (np.array(across["high"]) - across["low"]) / across["steps"]
    for of_set, name in zip(across["sets"], ("test", "near"), strict=True):
        found = across["low"][0] + np.array(of_set["x"]) * width[0]
        assert found == pytest.approx((unit[name][1::2] - origin) @ direction, abs=width[0])


def test_a_wrong_picture_is_never_shown(world: World, tmp_path: Path) -> None:
    """Not even where a file has been replaced since."""
    shutil.copytree(world.images[1], tmp_path / "test")
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "test/ant/3.jpg")
    (tmp_path / "test/bee/4.jpg").write_bytes(b"not an image")
    (tmp_path / "test/bee/5.jpg").unlink()
    with pytest.warns(RuntimeWarning, match="images: ") as warned:
        page = Page(report(world.results[1:2], tmp_path / "r.html", images=[str(tmp_path / "test")]))
    names = [each["name"] for each in page.data["pictures"]]
    assert len(names) == 33
    assert not {"ant/3.jpg", "bee/4.jpg", "bee/5.jpg"} & set(names)
    of = colours(world)
    assert all(similar(of["test", each["name"]], each["source"]) for each in page.data["pictures"])
    said = [str(each.message) for each in warned]
    # One replaced, one damaged, and all of the OOD set but one: other images have their ids.
    assert said[0].startswith("images: 28 samples are in no corpus with the image that was measured")
    assert said[1].startswith("images: 2 samples are in no corpus that was given")
    assert page.data["unpictured"] == [each.removeprefix("images: ") for each in said]
    assert [strip["name"] for strip in page.charts("edges")[0]["strips"]] == ["ID test"], "nothing of the OOD set's own"


def test_without_hashes_there_is_no_picture(tmp_path: Path) -> None:
    """All sets here have samples of the same ids: without hashes, an ID image would be shown as an OOD one."""
    world = make_world(tmp_path, hashed=False)
    with pytest.warns(RuntimeWarning, match="are of stores that keep no hash of their images"):
        page = Page(report(world.results[1:2], tmp_path / "r.html", images=world.images[1:2]))
    assert page.data["pictures"] == []
    assert {each["where"]["Map"] for each in page.charts("map")} == {"by set", "by class", "ID against OOD"}


def test_what_cannot_be_read_is_said(world: World, tmp_path: Path) -> None:
    result = Result.read(world.results[1])
    result.inputs["id_test"]["path"] = str(tmp_path / "gone.zarr")
    result.inputs["near"]["moths"]["fingerprint"] = "another"
    page = Page(report([result], tmp_path / "r.html"))
    assert page.data["unread"] == [
        f"{tmp_path}/gone.zarr: it is not there (or not on this machine)",
        f"{result.inputs['near']['moths']['path']}: it is of another encoder by now (vit)",
    ]
    assert [each.get("where") for each in page.charts("map")] == [None], "by set alone"
    assert (page.charts("edges"), page.charts("ood-classes"), page.data["pictures"]) == ([], [], [])


def test_a_store_that_is_another_by_now_is_left_out(world: World, tmp_path: Path) -> None:
    """One damaged or made anew ends no report."""
    knn, fidelity = Result.read(world.results[0]), Result.read(world.results[4])
    knn.inputs["bank"]["rows"] += 1
    fidelity.inputs["student"]["path"] = str(make_bad(tmp_path / "bad.zarr", world))
    fidelity.inputs["student"]["fingerprint"] = "arrays"
    page = Page(report([knn, fidelity], tmp_path / "r.html"))
    assert page.data["unread"][0].endswith("vit-bank.zarr: it has other rows by now")
    assert "share 0 sample ids" in page.data["unread"][1]
    assert {each["key"] for each in page.data["sections"]} == {"tradeoff", "fidelity-classes"}
    with pytest.warns(RuntimeWarning, match="images: none is shown: no result here says of which samples"):
        report([fidelity], tmp_path / "r.html", images=world.images[0])


def make_bad(path: Path, world: World) -> Path:
    """Other samples than those that were compared, as many."""
    count = len(world.photos["test"])
    write_store(path, np.random.default_rng(0).normal(size=(count, 8)), sample_ids=[f"other/{i}" for i in range(count)])
    return path


def test_other_samples_under_the_same_path_are_not_taken(world: World, tmp_path: Path) -> None:
    result = Result.read(world.results[1])
    result.samples["content/id_test"][0] += np.uint64(1)
    page = Page(report([result], tmp_path / "r.html"))
    assert "no longer holds the samples that were measured" in page.data["unread"][0]
    assert (
        {each["where"]["Map"] for each in page.charts("map")} == {"by set"}
        if page.charts("map")[0].get("where")
        else True
    )


def test_stores_are_left_alone_where_asked(world: World, tmp_path: Path) -> None:
    page = Page(report(world.results, tmp_path / "r.html", stores=False, images=world.images))
    parts = {each["key"] for each in page.data["sections"]}
    assert "edges" in parts, "ids and hashes are in the result"
    assert not parts & {"confused", "knn-classes", "neighbours", "ood-classes"}
    assert page.data["unread"] == []


def test_images_that_a_store_keeps_need_not_be_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stores = {}
    for name, count in (("train", 8), ("test", 6), ("near", 6)):
        for i in range(count):
            path = tmp_path / name / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
        kept = {"pixels": KeptPixels(size=20)} if name == "test" else {}
        stores[name] = extract(Folder(str(tmp_path / name)), tiny_encoder(), tmp_path / f"{name}.zarr", **kept)
    result = evalsuite.ood(
        id_train=stores["train"], id_test=stores["test"], near={"n": stores["near"]}, detectors=["knn:k=1"]
    )
    page = Page(report([result], tmp_path / "r.html"))
    assert {each["name"] for each in page.data["pictures"]} == set(Folder(str(tmp_path / "test")).ids)
    assert pixels(page.data["pictures"][0]["source"]).shape == (20, 20, 3), "never enlarged"
    assert page.data["unpictured"][0].startswith("6 samples are in no corpus"), "of the OOD set, said but not warned of"


class Noise:
    """Images that no format makes small."""

    spec, class_names = "noise", None

    def __init__(self, count: int) -> None:
        self.ids = [str(i) for i in range(count)]

    def __len__(self) -> int:
        return len(self.ids)

    def label(self, i: int) -> int:
        return -1

    def read(self, i: int) -> bytes:
        noise = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return b"P6 %d %d 255\n" % (SIDE, SIDE) + noise.tobytes()


def test_a_page_full_of_pictures_stays_under_3_mb(tmp_path: Path) -> None:
    results, noise = [ood_result(f"f{n}", f"vit{n}", n, rows=1000) for n in range(3)], Noise(1002)
    hashes = np.array([int.from_bytes(content_hash(noise.read(i))[:8], "little") for i in range(1002)], np.uint64)
    for result in results:
        ids = {key: of for key, of in result.samples.items() if key.startswith("sample_id/")}
        result.samples |= {key.replace("sample_id", "content"): hashes[: len(of)] for key, of in ids.items()}
    done = []
    page = report(results, tmp_path / "r.html", images=[])
    bare = page.stat().st_size
    with pytest.warns(RuntimeWarning, match="have no room: a page has 1,000 pictures at most"):
        page = report(results, tmp_path / "r.html", images=[noise], progress=lambda now, of: done.append((now, of)))
    assert bare + 1_000_000 < page.stat().st_size < 3_000_000
    assert done[-1] == (1002, 1002)
    pictures = [each["pictures"] for each in Page(page).charts("map")[0]["sets"]]
    for of_set in pictures:
        with_one = np.flatnonzero(np.array(of_set) >= 0)
        assert 200 < len(with_one) <= MOST
        assert np.diff(with_one).max() <= 4 * len(of_set) / len(with_one), "spread over the set"


def test_the_command_takes_corpora(world: World, tmp_path: Path) -> None:
    app, out = programs.app("evalsuite"), tmp_path / "r.html"
    images = [word for spec in world.images for word in ("--images", spec)]
    found = CliRunner().invoke(app, ["report", *map(str, world.results), "--out", str(out), *images])
    assert found.exit_code == 0, found.output
    assert len(Page(out).data["pictures"]) > 60
    found = CliRunner().invoke(
        app, ["report", str(world.results[0]), "--out", str(out), "--images", str(tmp_path / "no")]
    )
    assert isinstance(found.exception, ValueError)
    assert "no such folder" in str(found.exception)
