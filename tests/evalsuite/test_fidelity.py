import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.spatial import procrustes
from sklearn.metrics import cohen_kappa_score

import evalsuite
from evalsuite import fidelity
from evalsuite.gram import over_all_pairs


def dense(x, y):
    """The same measures from n×n matrices."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    off = ~np.eye(len(x), dtype=bool)

    def unit(a):
        norm = np.linalg.norm(a, axis=1, keepdims=True)
        return np.divide(a, norm, out=np.zeros_like(a), where=norm > 0)

    def pearson(a, b):
        return np.corrcoef((a @ a.T)[off], (b @ b.T)[off])[0, 1]

    def centred(a):
        return unit(unit(a) - unit(a).mean(axis=0))

    def hsic(a, b):
        """Song et al. 2012, equation 5."""
        n = len(a)
        k, l_ = a @ a.T * off, b @ b.T * off
        one = np.ones(n)
        total = np.trace(k @ l_) + (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (one @ k @ l_ @ one)) / (n * (n - 3))

    width = max(x.shape[1], y.shape[1])
    padded = [np.pad(unit(a), ((0, 0), (0, width - a.shape[1]))) for a in (x, y)]
    return {
        "gram_pearson": pearson(unit(x), unit(y)),
        "gram_pearson_centred": pearson(centred(x), centred(y)),
        "cka_debiased": hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)),
        "cka_debiased_unit": hsic(unit(x), unit(y)) / np.sqrt(hsic(unit(x), unit(x)) * hsic(unit(y), unit(y))),
        "procrustes": procrustes(*padded)[2],
    }


def nearest(x, k, own, bank=None):
    """For each row of `x` (itself `own` in the bank, None for not there) its k nearest of `bank`, and their cosines."""
    bank = x if bank is None else bank
    found = []
    for i, row in enumerate(x.astype(np.float64)):
        cosine = bank.astype(np.float64) @ row / np.linalg.norm(bank.astype(np.float64), axis=1) / np.linalg.norm(row)
        if own is not None:
            cosine[own[i]] = -np.inf
        order = np.argsort(-cosine, kind="stable")[:k]
        found.append((order, cosine[order]))
    return found


def votes(found, labels):
    won = []
    for rows, cosine in found:
        weight = {c: sum(np.exp(v / 0.07) for r, v in zip(rows, cosine, strict=True) if labels[r] == c) for c in labels}
        won.append(max(sorted(weight), key=lambda c: weight[c]))
    return np.array(won)


def related(n, d, e, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.linspace(0.2, 2, d) + rng.normal(size=d)
    return x, x @ rng.normal(size=(d, e)) + 0.5 * rng.normal(size=(n, e))


def in_blocks(x, y, size):
    return lambda: ((x[i : i + size], y[i : i + size]) for i in range(0, len(x), size))


@given(
    n=st.integers(5, 60),
    d=st.integers(2, 12),
    e=st.integers(2, 12),
    block=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_equals_the_dense_formulas(n, d, e, block, seed):
    x, y = related(n, d, e, seed)
    assert over_all_pairs(in_blocks(x, y, block))[0] == pytest.approx(dense(x, y), rel=1e-8, abs=1e-8)


def test_a_large_offset_does_not_eat_the_digits():
    x, y = related(200, 10, 7, 0)
    value = over_all_pairs(in_blocks(x + 200, y, 64))[0]["cka_debiased"]
    assert value == pytest.approx(dense(x, y)["cka_debiased"], abs=1e-10)


def test_zero_rows_are_no_obstacle():
    x, y = related(30, 5, 4, 1)
    x[3] = y[3] = y[9] = 0
    assert over_all_pairs(in_blocks(x, y, 8))[0] == pytest.approx(dense(x, y), rel=1e-8)


def test_rotation_and_scale_change_nothing(rng):
    x, _ = related(50, 8, 2, 2)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    same = {"gram_pearson": 1, "gram_pearson_centred": 1, "cka_debiased": 1, "cka_debiased_unit": 1, "procrustes": 0}
    assert over_all_pairs(in_blocks(x, 3 * x @ rotation, 50))[0] == pytest.approx(same, abs=1e-10)


def test_lengths_count_against_the_raw_cka_alone(rng):
    x, _ = related(60, 8, 2, 2)
    values = over_all_pairs(in_blocks(x, x * rng.uniform(0.1, 10, (60, 1)), 60))[0]
    assert values["cka_debiased"] < 0.9
    assert values["cka_debiased_unit"] == pytest.approx(1, abs=1e-10)
    assert values["procrustes"] == pytest.approx(0, abs=1e-10)


def test_unrelated_spaces_score_near_zero(rng):
    """Biased CKA of these is 0.6; the debiased one stays within a few standard errors of 0, and what Procrustes
    leaves by chance is far from 1."""
    values, chance = over_all_pairs(in_blocks(rng.normal(size=(256, 384)), rng.normal(size=(256, 384)), 256))
    assert all(abs(value - chance[name]) < 0.03 for name, value in values.items())
    assert values["procrustes"] < 0.6


def test_what_procrustes_leaves_by_chance_is_what_shuffled_pairs_leave(rng):
    """Rows sorted by class, where shifting or shuffling within blocks would keep some of the pairing."""
    x = np.repeat(3 * rng.normal(size=(5, 6)), 40, axis=0) + rng.normal(size=(200, 6))
    y = x[:, :4] @ rng.normal(size=(4, 4))
    shuffled = [dense(x, y[rng.permutation(200)])["procrustes"] for _ in range(20)]
    chance = [over_all_pairs(in_blocks(x, y, 64), seed=seed)[1]["procrustes"] for seed in range(20)]
    assert np.mean(chance) == pytest.approx(np.mean(shuffled), abs=0.02)
    assert over_all_pairs(in_blocks(x, y, 1), seed=3)[1]["procrustes"] == pytest.approx(chance[3], abs=1e-12)


def test_centring_removes_a_shared_direction(rng):
    """Two clouds related only by how far each row lies along the common direction."""
    direction = 6 * np.eye(1, 16)
    stretch = rng.normal(1, 0.8, size=(200, 1))
    x, y = (rng.normal(size=(200, 16)) + stretch * direction for _ in range(2))
    values = over_all_pairs(in_blocks(x, y, 200))[0]
    assert values["gram_pearson"] > 0.5
    assert values["gram_pearson_centred"] < values["gram_pearson"]


def test_stores_are_joined_by_sample_id(make_store, monkeypatch):
    x, y = related(12, 6, 3, 3)
    ids = [f"image-{i}" for i in range(12)]
    order = np.array([7, 2, 11, 0, 5, 9, 3, 1, 10, 6])
    monkeypatch.setattr("evalsuite.gram._BLOCK_ROWS", 4)
    teacher = make_store("teacher", x, sample_ids=ids, failed={2: "truncated"}, fingerprint="t")
    student = make_store(
        "student", y[order], sample_ids=[ids[i] for i in order], failed={0: "truncated"}, fingerprint="s"
    )
    result = evalsuite.fidelity(teacher, student.path, k=3)
    joined = np.setdiff1d(order, [2, 7])
    half = [a[joined].astype(np.float16) for a in (x, y)]
    expected = dense(*half)
    expected["mutual_knn@3"] = np.mean(
        [len({*a[0]} & {*b[0]}) / 3 for a, b in zip(*(nearest(h, 3, np.arange(8)) for h in half), strict=True)]
    )
    assert {name: m.value for name, m in result.metrics.items()} == pytest.approx(expected, rel=1e-8)
    assert [name for name, m in result.metrics.items() if m.ci95 is not None] == ["mutual_knn@3"]
    assert result.parameters["chance"]["mutual_knn@3"] == 3 / 7
    assert result.parameters["chance"].keys() == result.metrics.keys()
    assert result.inputs["joined"] == 8
    assert (result.inputs["teacher"]["rows"], result.inputs["teacher"]["failed"]) == (11, 1)
    assert result.inputs["student"]["fingerprint"] == "s"
    assert result.remarks == [
        f"teacher {teacher.path}: left out of 12 rows: 1 failed",
        f"student {student.path}: left out of 10 rows: 1 failed",
        f"teacher {teacher.path}: 3 of 11 rows are not in {student.path}: left out",
        f"student {student.path}: 1 of 9 rows are not in {teacher.path}: left out",
    ]


def test_labels_that_differ_or_are_missing_are_remarked_on(make_store):
    x, y = related(12, 6, 3, 3)
    labels = np.repeat([0, 1, 2], 4)
    names = ["ant", "bee", "cat"]
    teacher = make_store("teacher", x, labels=labels, class_names=names)
    renumbered = make_store("other", y, labels=2 - labels, class_names=names[::-1], fingerprint="s")
    assert evalsuite.fidelity(teacher, renumbered, k=3).remarks == []
    labels[:2] = [2, -1]
    student = make_store("student", y, labels=labels, class_names=names, fingerprint="s")
    remarks = evalsuite.fidelity(teacher, student, k=3).remarks
    assert remarks == [
        f"{teacher.path} and {student.path} have different labels for 1 of 11 rows: those of {teacher.path} are taken"
    ]
    remarks = evalsuite.fidelity(student, renumbered, k=3).remarks
    assert remarks[1:] == [f"{student.path}: 1 of 12 joined rows have no label: they neither vote nor are voted on"]


def test_classes_of_one_name_are_told_apart(make_store):
    x, y = related(12, 6, 3, 3)
    names = {"labels": np.repeat([0, 1, 2], 4), "class_names": ["crane", "ant", "crane"]}
    result = evalsuite.fidelity(make_store("teacher", x, **names), make_store("student", y, fingerprint="s"), k=3)
    classes = {name.split("/")[1] for name in result.metrics if name.startswith("per_class/")}
    assert classes == {"crane (0)", "ant", "crane (2)"}


def test_other_images_under_the_same_ids_are_refused(make_store, monkeypatch):
    x, y = related(6, 3, 3, 4)
    teacher, student = make_store("teacher", x), make_store("student", y)
    monkeypatch.setattr(teacher, "content", np.arange(6 * 16, dtype=np.uint8).reshape(6, 16), raising=False)
    assert fidelity(teacher, student, k=2).inputs["joined"] == 6  # the student was made from arrays: nothing to compare
    other = teacher.content.copy()
    other[2] += 1
    monkeypatch.setattr(student, "content", other, raising=False)
    with pytest.raises(ValueError, match="different images under 1 of 6 shared ids; extract both"):
        fidelity(teacher, student)


@pytest.fixture
def pair(rng, clusters):
    """Three overlapping classes of 20, 15 and 9 rows in two spaces, and their labels (-1 for some rows)."""
    labels = np.repeat([0, 1, 3], [20, 15, 9])
    x = rng.normal(size=(4, 6))[labels] + 0.9 * rng.normal(size=(44, 6))
    y = (x @ rng.normal(size=(6, 4)) + 0.7 * rng.normal(size=(44, 4))).astype(np.float16)
    labels[[3, 30]] = -1
    return x.astype(np.float16), y, labels


NAMES = ["ant", "b/ee", "none", "dog"]


@pytest.mark.parametrize("all_labelled", [True, False])
def test_votes_and_classes_equal_the_slow_way(pair, make_store, all_labelled):
    x, y, labels = pair
    if all_labelled:
        labels = np.where(labels < 0, 1, labels)
    teacher = make_store("teacher", x, labels=labels, class_names=NAMES)
    result = fidelity(teacher, make_store("student", y, fingerprint="s"), k=5)
    values = {name: metric.value for name, metric in result.metrics.items()}
    known = np.flatnonzero(labels >= 0)
    a, b = (votes(nearest(h[known], 5, np.arange(len(known))), labels[known]) for h in (x, y))
    near = [nearest(h, 5, np.arange(44)) for h in (x, y)]
    shared = np.array([len({*p[0]} & {*q[0]}) / 5 for p, q in zip(*near, strict=True)])
    assert values["agreement/top1"] == pytest.approx(np.mean(a == b), abs=1e-12)
    assert 0.4 < values["agreement/top1"] < 1
    assert values["agreement/kappa"] == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    expected = np.mean([p == q for p in a for q in b])
    assert result.parameters["chance"]["agreement/top1"] == pytest.approx(expected, abs=1e-12)
    for label, name in ((0, "ant"), (1, "b/ee"), (3, "dog")):
        assert values[f"per_class/{name}/mutual_knn@5"] == pytest.approx(shared[labels == label].mean(), abs=1e-12)
        same = (a == b)[labels[known] == label]
        assert values[f"per_class/{name}/agreement/top1"] == pytest.approx(same.mean(), abs=1e-12)
    assert not any("none" in name for name in values)
    for name in ("mutual_knn@5", "agreement/top1", "agreement/kappa"):
        low, high = result.metrics[name].ci95
        assert low <= values[name] <= high
        assert low < high
    json.loads(result.to_json())


def test_banks_vote(pair, make_store):
    x, y, labels = pair
    bank, query = np.arange(0, 44, 2), np.arange(1, 44, 2)
    ids = [str(i) for i in bank]
    stores = {
        "teacher": make_store("teacher", x[query]),
        "student": make_store("student", y[query], fingerprint="s"),
        "teacher_bank": make_store("tb", x[bank], labels=labels[bank], sample_ids=ids),
        "student_bank": make_store("sb", y[bank[::-1]], sample_ids=ids[::-1], fingerprint="s"),
    }
    result = fidelity(**stores, k=4)
    voters = bank[labels[bank] >= 0]
    a, b = (votes(nearest(h[query], 4, None, h[voters]), labels[voters]) for h in (x, y))
    assert result.metrics["agreement/top1"].value == pytest.approx(np.mean(a == b), abs=1e-12)
    assert result.metrics["agreement/kappa"].value == pytest.approx(cohen_kappa_score(a, b), abs=1e-12)
    assert not any(name.startswith("per_class") for name in result.metrics)
    assert result.inputs["student_bank"]["rows"] == len(voters)
    lost = len(bank) - len(voters)
    assert lost
    assert result.remarks == [
        f"teacher bank {stores['teacher_bank'].path}: left out of {len(bank)} rows: {lost} without a label",
        f"student bank {stores['student_bank'].path}: {lost} of {len(bank)} rows are not in "
        f"{stores['teacher_bank'].path}: left out",
    ]
    with pytest.raises(ValueError, match="give both --teacher-bank and --student-bank"):
        fidelity(stores["teacher"], stores["student"], k=4, teacher_bank=stores["teacher_bank"])
    with pytest.raises(ValueError, match="is its own bank"):
        fidelity(**(stores | {"teacher_bank": stores["teacher"], "student_bank": stores["student"]}), k=4)
    with pytest.raises(ValueError, match=r"sb\.zarr was made by encoder .* \(s, 4 dimensions\)"):
        fidelity(**(stores | {"teacher_bank": stores["student_bank"]}), k=4)
    small = make_store("small", x[bank[:6]], labels=labels[bank[:6]], sample_ids=ids[:6])
    with pytest.raises(ValueError, match=r"k=7 exceeds the 6 labelled rows that .*small\.zarr and .*sb\.zarr share"):
        fidelity(**(stores | {"teacher_bank": small}), k=7)


def test_a_sample_of_rows_estimates_the_whole(pair, make_store, monkeypatch):
    x, y, labels = pair
    teacher, student = make_store("teacher", x, labels=labels), make_store("student", y, fingerprint="s")
    whole = fidelity(teacher, student, k=5)
    monkeypatch.setattr("evalsuite.agreement._QUERY_FLOATS", 6 * 7)
    monkeypatch.setattr("evalsuite.gram._BLOCK_ROWS", 9)
    in_blocks = fidelity(teacher, student, k=5)
    assert {n: m.value for n, m in in_blocks.metrics.items()} == pytest.approx(
        {n: m.value for n, m in whole.metrics.items()}, abs=1e-12
    )
    parts = [fidelity(teacher, student, k=5, queries=15, seed=seed) for seed in range(20)]
    assert {part.parameters["queries"] for part in parts} == {15}
    for name in ("mutual_knn@5", "agreement/top1"):
        values = [part.metrics[name].value for part in parts]
        assert len(set(values)) > 1
        assert np.mean(values) == pytest.approx(whole.metrics[name].value, abs=0.05)
    assert parts[0].metrics["gram_pearson"] == in_blocks.metrics["gram_pearson"]


def test_cosine_to_the_mapped_teacher(pair, make_store, tmp_path, rng):
    x, y, labels = pair
    teacher = make_store("teacher", x, labels=labels, class_names=NAMES)
    student = make_store("student", y, fingerprint="s")
    weight, mean = rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    path = tmp_path / "mapping.safetensors"
    for tensors in ({"mapping.weight": weight}, {"mapping.weight": weight, "mapping.mean": mean}):
        save_file(tensors, path)
        result = fidelity(teacher, student, k=5, mapping=path)
        mapped = (x.astype(np.float64) - tensors.get("mapping.mean", 0)) @ weight.T.astype(np.float64)
        norms = np.outer(np.linalg.norm(mapped, axis=1), np.linalg.norm(y.astype(np.float64), axis=1))
        cosine = mapped @ y.T.astype(np.float64) / norms
        assert result.metrics["cosine_mapped"].value == pytest.approx(np.diag(cosine).mean(), abs=1e-10)
        others = cosine[~np.eye(44, dtype=bool)].mean()
        assert result.parameters["chance"]["cosine_mapped"] == pytest.approx(others, abs=1e-10)
        of_dogs = np.diag(cosine)[labels == 3].mean()
        assert result.metrics["per_class/dog/cosine_mapped"].value == pytest.approx(of_dogs, abs=1e-10)
        assert result.metrics["cosine_mapped"].no_ci95 == "44 rows, fewer than 50"
    for tensors, said in (
        ({"mapping.weight": weight, "mapping.bias": mean}, "holds mapping.bias, mapping.weight, not a linear mapping"),
        ({"head.weight": weight}, "holds head.weight, not a linear mapping"),
        ({"mapping.weight": weight.T.copy()}, r"maps 4 dimensions to 6, but .*teacher\.zarr has 6 and .* 4"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=said):
            fidelity(teacher, student, k=5, mapping=path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"mapping\.safetensors: not a safetensors file"):
        fidelity(teacher, student, k=5, mapping=path)
    with pytest.raises(ValueError, match=r"nowhere: no such file; give mapping\.safetensors"):
        fidelity(teacher, student, k=5, mapping=tmp_path / "nowhere")


def test_one_winner_has_no_kappa(pair, make_store):
    x, y, _ = pair
    result = fidelity(make_store("teacher", x, labels=[0] * 44), make_store("student", y), k=3)
    assert result.metrics["agreement/top1"].value == result.parameters["chance"]["agreement/top1"] == 1
    assert "agreement/kappa" not in result.metrics


def test_wrong_input_names_the_stores_and_the_remedy(make_store):
    x, y = related(6, 3, 3, 5)
    teacher = make_store("teacher", x)
    with pytest.raises(ValueError, match=r"teacher\.zarr and .*few\.zarr share 3 sample ids.*extract both"):
        fidelity(teacher, make_store("few", y[:3]))
    with pytest.raises(ValueError, match=r"twice\.zarr: sample id 'a' stands 2 times"):
        fidelity(teacher, make_store("twice", y, sample_ids=list("aabcde")))
    with pytest.raises(ValueError, match=r"cannot compare .*teacher\.zarr with .*flat\.zarr: all pairs"):
        fidelity(teacher, make_store("flat", np.ones((6, 3))), k=2)
    with pytest.raises(ValueError, match="3 rows were paired"):
        over_all_pairs(in_blocks(x[:3], y[:3], 3))
    nan = x.copy()
    nan[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"nan\.zarr row 4: embedding is not finite"):
        fidelity(teacher, make_store("nan", nan), k=2)
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"k={k} does not suit the 6 rows .* use k from 1 to 5"):
            fidelity(teacher, make_store(f"small{k}", y), k=k)
    with pytest.raises(ValueError, match=r"k=2 exceeds the 1 labelled rows"):
        fidelity(teacher, make_store("rare", y, labels=[0, 0, -1, -1, -1, -1]), k=2)
    with pytest.raises(ValueError, match="queries must be at least 1"):
        fidelity(teacher, teacher, queries=0)
