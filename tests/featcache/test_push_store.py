"""A store as a data set on the hub and back, bit for bit; against a stand-in of the hub, with its real client and `datasets`."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_standin import CLIENTS_OWN, TOKEN, hub_here
from huggingface_hub import constants
from test_interchange import IDS, files, make_store

from featcache.interchange import export_store, hf_dataset, import_store, push_store
from featcache.repository import Repository
from featcache.store import open_store
from featcache.store.from_arrays import write_store
from featcache_cli import programs

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytestmark = CLIENTS_OWN
REPOSITORY = "me/features"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_here(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(hf_dataset, "SHARD_BYTES", 1)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs featcache[hf]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", constants.ENDPOINT)
    datasets.disable_progress_bars()
    return datasets


def test_it_comes_back_bit_for_bit(hub, tmp_path, small_shards):
    """Views, several fields, failed rows, odd ids; in three shards."""
    store = make_store(tmp_path / "a.zarr")
    pushed = push_store(store, REPOSITORY, private=True)
    names = [f"data/train-{i:05}-of-00003.parquet" for i in range(3)]
    assert pushed.files == ("README.md", *names, "manifest.json")
    back = import_store(f"hf:{REPOSITORY}", tmp_path / "b.zarr")
    assert files(tmp_path / "b.zarr") == files(tmp_path / "a.zarr")
    assert (back.fingerprint, back.manifest) == (store.fingerprint, store.manifest)
    again = push_store(back, REPOSITORY)
    assert (again.changed, again.commit) == (False, pushed.commit)


def test_fewer_shards_take_the_place_of_more(hub, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(hf_dataset, "SHARD_BYTES", 1)
        first = push_store(make_store(tmp_path / "a.zarr"), REPOSITORY)
    other = make_store(tmp_path / "b.zarr", views=1, failed=())
    with pytest.raises(ValueError, match=r"it holds other files already .*--overwrite"):
        push_store(other, REPOSITORY)
    second = push_store(other, REPOSITORY, overwrite=True)
    assert [name for name in hub.files("dataset", REPOSITORY) if name.endswith(".parquet")] == [second.files[1]]
    import_store(f"hf:{REPOSITORY}@{first.commit}", tmp_path / "c.zarr")
    import_store(f"hf:{REPOSITORY}", tmp_path / "d.zarr")
    assert files(tmp_path / "c.zarr") == files(tmp_path / "a.zarr")
    assert files(tmp_path / "d.zarr") == files(tmp_path / "b.zarr")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    import_store(f"hf:{REPOSITORY}", tmp_path / "e.zarr")
    with pytest.raises(ValueError, match=r"hf:me/nothing: the data set cannot be had .HF_HUB_OFFLINE is set"):
        import_store("hf:me/nothing", tmp_path / "f.zarr")


def test_datasets_opens_it_from_the_hub(hub, tmp_path, datasets, small_shards):
    store = make_store(tmp_path / "a.zarr")
    pushed = push_store(store, REPOSITORY, licence="cc-by-4.0")
    rows = datasets.load_dataset(REPOSITORY, split="train", revision=pushed.commit)
    assert rows.features["label"] == datasets.ClassLabel(names=["ant", "béé"])
    assert rows["sample_id"][:] == IDS
    np.testing.assert_array_equal(rows["label"][:], store.labels)
    for view, column in enumerate(("embedding", "embedding_1")):
        np.testing.assert_array_equal(np.float16(rows[column][:]), store.read("embedding")[:, view])
    np.testing.assert_array_equal(np.float16(rows["logits"][:]), store.read("logits")[:, 0])
    card = hub.files("dataset", REPOSITORY)["README.md"].decode()
    code = card.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code, names)
    assert names["rows"]["sample_id"][:] == [each for row, each in enumerate(IDS) if row not in (2, 9)]
    assert rows[2]["reason"] == "OSError: bad\n\\line"


@pytest.mark.parametrize("class_names", [None, ["one", "one"]])
def test_datasets_opens_what_it_has_no_classlabel_for(tmp_path, datasets, class_names):
    labels = None if class_names is None else np.array([0, 1, -1])
    store = write_store(tmp_path / "s.zarr", np.eye(3), labels=labels, class_names=class_names)
    export_store(store, tmp_path / "out", "hf-dataset")
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert rows["label"][:] == ([-1] * 3 if labels is None else [0, 1, -1])
    assert ("class_name" in rows.features) == (class_names is not None)
    import_store(tmp_path / "out", tmp_path / "back.zarr")
    assert files(tmp_path / "back.zarr") == files(tmp_path / "s.zarr")


def test_the_card_says_what_is_in_it(hub, tmp_path):
    push_store(make_store(tmp_path / "a.zarr"), REPOSITORY, revision="v1")
    card = hub.files("dataset", REPOSITORY, "v1")["README.md"].decode()
    for said in (
        "| teacher | timm/x, fingerprint `f00d` |", "| precision | fp32 |", "| rows | 11, 2 of them failed |",
        "| classes | 2 |", "size=8 mean=[0.1,", "count=2 augment=rrc seed=3", "- 2 × OSError: bad \\line",
        '("me/features", revision="v1", split="train")', "`featcache import hf:me/features@v1 STORE`", "None is given",
    ):  # fmt: skip
        assert said in card
    assert "license" not in card.split("---")[1]


def test_a_data_set_of_somebody_else_is_imported(hub, tmp_path):
    """Two shards, labels as ClassLabel; its source is recorded with the commit."""
    told = json.dumps({"info": {"features": {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}}}})
    rows = np.arange(20, dtype=np.float32).reshape(5, 4)
    pushed = {}
    for shard, here in enumerate((slice(0, 3), slice(3, 5))):
        table = pa.table({"embedding": rows[here].tolist(), "label": [1, 0, 1, 0, 1][here]})
        pq.write_table(table.replace_schema_metadata({"huggingface": told}), tmp_path / "shard.parquet")
        pushed[f"data/train-{shard:05}-of-00002.parquet"] = (tmp_path / "shard.parquet").read_bytes()
    hub.add("dataset", REPOSITORY, pushed)
    store = import_store(f"hf:{REPOSITORY}", tmp_path / "s.zarr", encoder_name="theirs")
    np.testing.assert_array_equal(store.gather(np.arange(5)), rows)
    assert (store.labels.tolist(), store.class_names) == ([1, 0, 1, 0, 1], ["ant", "bee"])
    assert store.manifest.extraction.imported == f"hf:{REPOSITORY}@{hub.head('dataset', REPOSITORY)}"
    hub.add(
        "dataset",
        "me/splits",
        {**pushed, "data/test-00000-of-00001.parquet": (tmp_path / "shard.parquet").read_bytes()},
    )
    with pytest.raises(ValueError, match=r"holds several splits \(test, train\)"):
        import_store("hf:me/splits", tmp_path / "t.zarr")


def test_damage_is_seen(hub, tmp_path, small_shards):
    push_store(make_store(tmp_path / "a.zarr"), REPOSITORY)
    whole = {name: data for name, data in hub.files("dataset", REPOSITORY).items()}
    shards = [name for name in whole if name.endswith(".parquet")]
    lost = {name: data for name, data in whole.items() if name != shards[1]}
    swapped = {**whole, shards[0]: whole[shards[1]], shards[1]: whole[shards[0]]}
    for name, (tree, said) in {
        "lost": (lost, "7 rows, 11 when it was exported"),
        "swapped": (swapped, "changed since the export"),
        "cut": ({**whole, shards[0]: whole[shards[0]][:100]}, "not a whole parquet file"),
        "empty": ({"README.md": b"hi"}, "^hf:me/empty: holds no .parquet files"),
    }.items():
        hub.add("dataset", f"me/{name}", tree)
        with pytest.raises(ValueError, match=said):
            import_store(f"hf:me/{name}", tmp_path / f"{name}.zarr")
        assert not (tmp_path / f"{name}.zarr").exists()


def test_a_manifest_with_a_password_is_not_pushed(hub, tmp_path):
    store = make_store(tmp_path / "a.zarr")
    corpus = store.manifest.corpus.changed(spec="https://me:secret@host/photos/")
    store.seal(store.manifest.changed(corpus=corpus))
    said = r"a\.zarr: corpus of its manifest would tell an address with a password; nothing is pushed"
    with pytest.raises(ValueError, match=said):
        push_store(open_store(tmp_path / "a.zarr"), REPOSITORY)
    assert not hub.repositories


SECRETS = {
    "a token of the Hugging Face hub": "hf_" + "aB3" * 12,
    "a key of AWS": "x?key=AKIA" + "Q7" * 8,
    "a token of GitHub": "ghp_" + "x" * 36,
    "a private key": "-----BEGIN RSA PRIVATE KEY-----",
    "a signed address": "https://host/a.png?Signature=abc",
}


@pytest.mark.parametrize("what", SECRETS)
def test_a_secret_among_ids_or_classes_is_named_by_its_field_and_not_pushed(hub, tmp_path, what):
    ids, secret = [f"hf_{i}/AKIA {i}.png" for i in range(12)], SECRETS[what]
    given = {"embedding": np.eye(12, 4, dtype=np.float16), "labels": np.zeros(12, int)}
    for name, classes, row in (("ids", ["cat"], 7), ("classes", [secret], 99), ("none", ["cat"], 99)):
        these = [secret if i == row else each for i, each in enumerate(ids)]
        write_store(tmp_path / f"{name}.zarr", **given, class_names=classes, sample_ids=these)
    for name, where in (("ids", "sample_id of row 7"), ("classes", "corpus of its manifest")):
        with pytest.raises(ValueError, match=f"{where} would tell {what}; nothing is pushed") as refused:
            push_store(tmp_path / f"{name}.zarr", REPOSITORY)
        assert secret not in str(refused.value)
    assert not hub.repositories
    assert push_store(tmp_path / "none.zarr", REPOSITORY).changed


def test_without_a_token_nothing_is_written_first(hub, tmp_path, monkeypatch):
    store = make_store(tmp_path / "a.zarr")
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("featcache.interchange.export_store", None)
    with pytest.raises(ValueError, match="me/features: no token: set HF_TOKEN"):
        push_store(store, REPOSITORY)


def test_the_commands(hub, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_store(tmp_path / "a.zarr")

    def run(line):
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as ended:
            programs.run_featcache()
        return ended.value.code or 0, capfd.readouterr().err

    code, err = run(f"featcache push a.zarr {REPOSITORY} --revision v1 --dry-run")
    assert (code, hub.repositories) == (0, {}), err
    assert "would push me/features@v1: 11 rows" in err
    assert not list(Path(os.environ["FEATCACHE_HOME"]).glob("pushing*"))
    code, err = run(
        f"featcache push a.zarr {REPOSITORY} --private --revision v1 --message hello --license mit --json push.json"
    )
    assert code == 0, err
    assert f"pushed {constants.ENDPOINT}/datasets/me/features/tree/v1: 3 files" in err
    assert "featcache import hf:me/features@v1 STORE" in err
    told, repository = json.loads(Path("push.json").read_text()), hub.repositories["dataset", REPOSITORY]
    assert (told["commit"], told["revision"], told["kind"], told["rows"]) == (
        repository.branches["v1"],
        "v1",
        "dataset",
        11,
    )
    assert (repository.private, repository.messages[-1]) == (True, "hello")
    assert "license: mit" in hub.files("dataset", REPOSITORY, "v1")["README.md"].decode()
    code, err = run(f"featcache import hf:{REPOSITORY}@v1 b.zarr")
    assert code == 0, err
    assert files(tmp_path / "b.zarr") == files(tmp_path / "a.zarr")
    monkeypatch.setenv("HF_TOKEN", "")
    code, err = run(f"featcache push a.zarr {REPOSITORY}")
    assert (code, "no token: set HF_TOKEN, or log in with `hf auth login`" in err) == (2, True), err
    assert not re.search(r"Traceback", err)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not list(Path(os.environ["FEATCACHE_HOME"]).glob("pushing/*"))


def test_failed_rows_are_not_taken_for_embeddings_where_the_manifest_is_gone(tmp_path):
    for name, failed in (("a", (2, 9)), ("whole", ())):
        store = make_store(tmp_path / f"{name}.zarr", failed=failed)
        export_store(store, tmp_path / name, "hf-dataset")
        (tmp_path / name / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match="2 of its rows failed when they were extracted, and hold zeros; leave out those"
    ):
        import_store(tmp_path / "a", tmp_path / "b.zarr", encoder_name="x")
    assert not (tmp_path / "b.zarr").exists()
    assert len(import_store(tmp_path / "whole", tmp_path / "c.zarr", encoder_name="x").ok) == len(store)


@pytest.mark.parametrize("name", ["x--y", ".x", "x.git", "n" * 120, "a/b", "a b", "x@"])
def test_names_that_the_hub_takes_for_none_are_refused_before_anything_is_sent(name):
    with pytest.raises(ValueError, match=r"is no repository of the hub \(.*give USER/NAME"):
        Repository.parse(f"me/{name}", "dataset")
