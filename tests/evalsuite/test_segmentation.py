"""Segmentation, against scikit-learn, PyTorch's interpolation and slow loops."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_world import dense_encoder, write_photos
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

import evalsuite
from evalsuite.intervals import ratio_of_sums
from evalsuite.segmented import Masked
from featcache import extract
from featcache.inputs import Views
from featcache.rows import Rows
from featcache_cli.evalsuite import app

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")


def store_of(folder: Path, out: str, encoder=None, spec: str = ""):
    fields = ["embedding", "dense"]
    encoder = encoder or dense_encoder()
    return extract(spec or f"masks:{folder}", encoder, folder / out, fields=fields, device="cpu", precision="fp32")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path)


def by_torch(store, row: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Truth and prediction of square photographs, which the encoder sees whole."""
    logits = torch.from_numpy(np.asarray(store.gather(np.array([row]), "dense", np.array([0]))).astype(np.float32))
    taken = F.interpolate(logits, mask.shape, mode="bilinear", align_corners=False).argmax(1)[0].numpy()
    return (mask > 0).ravel().astype(int), taken.ravel()


def test_it_is_scikit_learns_of_all_pixels_to_the_last_digit(photos):
    store = store_of(photos, "s.zarr")
    masks = [np.asarray(Image.open(photos / f"masks/{row}.png")) for row in range(8)]
    truth, taken = map(
        np.concatenate, zip(*(by_torch(store, row, mask) for row, mask in enumerate(masks)), strict=True)
    )
    found = evalsuite.segmentation(store).metrics
    scores = {
        "iou": sklearn_metrics.jaccard_score,
        "f1": sklearn_metrics.f1_score,
        "accuracy": sklearn_metrics.recall_score,
    }
    for metric, score in scores.items():
        for name, value in zip(("background", "foreground"), score(truth, taken, average=None), strict=True):
            assert found[f"per_class/{name}/segmentation/{metric}"].value == value
        assert found[f"segmentation/{metric}"].value == score(truth, taken, average="macro")
    assert found["segmentation/pixel_accuracy"].value == sklearn_metrics.accuracy_score(truth, taken)


def test_pixels_outside_the_encoders_square_and_ignored_ones_count_for_nothing(tmp_path):
    """Against a loop over the mask's pixels, of a landscape format whose middle the encoder sees."""
    write_photos(tmp_path, count=5, size=(33, 20))
    for path in (tmp_path / "masks").iterdir():
        mask = np.array(Image.open(path))
        mask[3:5] = 9
        Image.fromarray(mask).save(path)
    store = store_of(tmp_path, "s.zarr", dense_encoder(resize=18), f"masks:{tmp_path}@ignore=9")
    rows, counts = Rows.of(store), np.zeros((2, 2), int)
    for row in range(5):
        mask = np.asarray(Image.open(tmp_path / f"masks/{row}.png"))
        left, top, right, bottom = dense_encoder(resize=18).preprocess.draw((33, 20), Views(), "", 0).box
        logits = rows.take(np.array([row]), "dense")[0]
        for y in range(20):
            for x in range(33):
                if mask[y, x] == 9 or not (left <= x + 0.5 < right and top <= y + 0.5 < bottom):
                    continue
                v, u = ((a + 0.5 - lo) / (hi - lo) * 4 - 0.5 for a, lo, hi in ((y, top, bottom), (x, left, right)))
                v, u = min(max(v, 0), 3), min(max(u, 0), 3)
                j, i = min(int(v), 2), min(int(u), 2)
                near = logits[:, j : j + 2, i : i + 2]
                at = np.einsum("cji,j,i->c", near, [1 - (v - j), v - j], [1 - (u - i), u - i])
                counts[int(mask[y, x] > 0), at.argmax()] += 1
    found = evalsuite.segmentation(store).parameters["confusion"]
    names = ("background", "foreground")
    assert [[found.get(a, {}).get(b, 0) for b in names] for a in names] == counts.tolist()


def test_classes_are_matched_by_name(photos):
    plain = evalsuite.segmentation(store_of(photos, "a.zarr"))
    named = dense_encoder(names=("foreground", "background"))
    with torch.no_grad():
        named.module.head.weight.copy_(named.module.head.weight.flip(0))
    assert evalsuite.segmentation(store_of(photos, "b.zarr", named)).metrics == plain.metrics


@pytest.mark.parametrize(
    ("encoder", "options", "message"),
    [
        (dense_encoder(names=("sky", "road")), "", "its maps are of sky, road, the masks of background, foreground"),
        (dense_encoder(classes=3), "", "its maps are of 3 classes, the masks of background, foreground"),
        (dense_encoder(), "@classes=a:0,b:1", r"0\.png: its mask holds the value 255, which is of no class"),
    ],
)
def test_other_classes_are_refused(photos, encoder, options, message):
    store = store_of(photos, "s.zarr", encoder)
    with pytest.raises(ValueError, match=message):
        evalsuite.segmentation(store, masks=f"masks:{photos}{options}")


def test_what_is_not_there_or_has_changed_is_refused(photos):
    store = store_of(photos, "s.zarr")
    with pytest.raises(ValueError, match="images: has no masks; give --masks masks:FOLDER"):
        evalsuite.segmentation(store, masks=str(photos / "images"))
    bare = extract(f"masks:{photos}", dense_encoder(), photos / "bare.zarr", fields=["embedding"], device="cpu")
    with pytest.raises(ValueError, match="has no dense; extract it again with --fields embedding,dense"):
        evalsuite.segmentation(bare)
    (photos / "few.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match=r"lacks 6 of the 8 images .*first: 0\.png"):
        evalsuite.segmentation(store, masks=f"masks:{photos}@list=few.txt")
    Image.new("L", (3, 3)).save(photos / "masks/2.png")
    with pytest.raises(ValueError, match=r"2\.png: its mask is 3 × 3 px, the image 24 × 24"):
        evalsuite.segmentation(store)
    (photos / "masks/1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1\.png: its mask cannot identify"):
        evalsuite.segmentation(store)
    Image.new("RGB", (24, 24)).save(photos / "images/0.png")
    with pytest.raises(ValueError, match=r"0\.png: has changed since"):
        evalsuite.segmentation(store)


def test_images_without_a_mask_are_left_out_and_said(photos):
    (photos / "few.txt").write_text("\n".join("01234567"[:6]))
    found = evalsuite.segmentation(store_of(photos, "s.zarr"), masks=f"masks:{photos}@labelled=few.txt")
    assert found.inputs["masks"]["images"] == 6
    assert any("left out 2 images without a mask" in remark for remark in found.remarks)


def test_the_interval_is_a_bootstraps_over_images(rng):
    part, whole = rng.integers(0, 50, (40, 2)), rng.integers(50, 90, (40, 2))
    found = ratio_of_sums(part, whole)
    draws = rng.integers(0, 40, (2000, 40))
    values = (part[draws].sum(axis=1) / whole[draws].sum(axis=1)).mean(axis=1)
    np.testing.assert_allclose(found.ci95, np.quantile(values, [0.025, 0.975]), atol=0.01)
    assert found.value == (part.sum(axis=0) / whole.sum(axis=0)).mean()
    # Linearised, as comparisons take it: the same spread.
    spread = found.parts["images"].influence.std(ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(spread, values.std(), rtol=0.1)
    assert ratio_of_sums(part[:4], whole[:4]).none == "4 images, fewer than 5"
    assert ratio_of_sums(part[[0] * 9], whole[[0] * 9]).none == "all of 9 images are alike"


def test_two_results_are_compared_image_by_image(photos):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (evalsuite.segmentation(store_of(photos, f"{seed}.zarr", dense_encoder(seed))) for seed in (0, 1))
        found = evalsuite.compare(a, b)
        again = evalsuite.compare(a, a)
    for name in ("segmentation/iou", "per_class/foreground/segmentation/f1"):
        assert found.metrics[name].value == b.metrics[name].value - a.metrics[name].value
        assert again.metrics[name].value == 0


def test_the_command_says_what_it_measured(photos):
    store_of(photos, "s.zarr")
    out = CliRunner().invoke(app, ["segmentation", "--test", str(photos / "s.zarr"), "--json", str(photos / "r.json")])
    assert out.exit_code == 0, out.output
    assert "segmentation/iou" in out.output
    assert evalsuite.Result.read(photos / "r.json").samples["per_class/foreground/segmentation/iou"].shape == (8, 3)
    bad = CliRunner().invoke(app, ["segmentation", "--test", str(photos / "s.zarr"), "--masks", str(photos / "images")])
    assert isinstance(bad.exception, ValueError)


def test_a_corpus_may_be_given_open(photos):
    from featcache.corpora import open_corpus

    assert len(Masked(Rows.of(store_of(photos, "s.zarr")), open_corpus(f"masks:{photos}"))) == 8
