"""A student of several teachers: of a store that was derived from theirs."""

import numpy as np
import pytest

import featcache
from distill.training.fit import fit
from featcache.extraction.extract import extract


@pytest.fixture
def teachers(images, make_teacher, tmp_path):
    """Two stores of the same crops, seen by teachers of 12 and of 5 dimensions."""
    return [
        extract(
            str(images),
            make_teacher(dim),
            tmp_path / f"{dim}.zarr",
            views=2,
            augment="rrc",
            device="cpu",
            precision="fp32",
        )
        for dim in (12, 5)
    ]


@pytest.mark.parametrize(("name", "derived_from", "dim"), [("mean", [0, 0], 12), ("join", [0, 1], 17)])
def test_a_student_learns_from_a_derived_store(teachers, images, tmp_path, name, derived_from, dim):
    store = featcache.derive(name, [teachers[number] for number in derived_from], tmp_path / "derived.zarr")
    first = teachers[0].manifest
    assert store.manifest.corpus == first.corpus.without("passed_over")
    assert (store.manifest.views, store.manifest.encoder.preprocess) == (first.views, first.encoder.preprocess)
    np.testing.assert_array_equal(store.row("view", 3), teachers[0].row("view", 3))
    run = fit(
        store, str(images), out=tmp_path / "run", student="tiny", embedding_dim=4, image_size=16, epochs=1, batch_size=16,
        method="cosine", device="cpu",
    )  # fmt: skip
    assert (run.path / "student.safetensors").exists()
    assert store.embedding_dim == dim


def test_teachers_that_see_other_parts_of_an_image_leave_no_preprocessing(teachers, images, make_teacher, tmp_path):
    other = make_teacher(12)
    object.__setattr__(other.preprocess, "crop", 14)
    seen = extract(str(images), other, tmp_path / "o.zarr", views=2, augment="rrc", device="cpu", precision="fp32")
    store = featcache.derive("mean", [teachers[0], seen], tmp_path / "derived.zarr")
    with pytest.raises(ValueError, match="does not record how its images were cropped"):
        fit(store, str(images), out=tmp_path / "run", student="tiny", epochs=1, device="cpu")
