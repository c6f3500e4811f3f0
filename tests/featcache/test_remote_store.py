"""A store in a bucket is the store on disk, byte for byte; S3 is spoken with a real server on loopback."""

import json
import os
import pickle
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import warm
from tiny import tiny_encoder

import featcache.store.layout
import featcache.store.remote
from featcache import extract, open_corpus, open_store, write_store
from featcache.interchange import export_store, import_store
from featcache.store import FeatureStore
from featcache.store.index import known_stores
from featcache.store.remote import Mirror

EXACT = {"device": "cpu", "precision": "fp32+channels_last", "workers": 2, "batch_size": 4}
"""A precision that is not chosen by the clock, so that two runs are comparable byte for byte."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """8 rows a chunk for one view of the tiny encoder's embedding; and a dead writer is succeeded at once."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 8 * 6 * 2)
    monkeypatch.setattr(featcache.store.remote, "SETTLE", 0.05)


@pytest.fixture
def url(s3_bucket):
    return f"{s3_bucket}/stores/t.zarr"


@pytest.fixture
def another_home(tmp_path, monkeypatch):
    """Call it to be on another machine, as far as mirrors and known rows go."""
    return lambda name: monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / f"home-{name}"))


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


def objects(url):
    """Everything in the bucket at `url` and beside it, by another client's listing."""
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    found = filesystem.find(root.rpartition("/")[0])
    assert all(path.startswith(f"{root}/") for path in found), found
    return {path.removeprefix(f"{root}/"): filesystem.cat_file(path) for path in found}


def mirrored(url):
    root = Mirror(url).root
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def flip(url, path):
    filesystem, root = fsspec.core.url_to_fs(url)
    data = bytearray(filesystem.cat_file(f"{root}/{path}"))
    data[5] ^= 1
    filesystem.pipe_file(f"{root}/{path}", bytes(data))


# -- the same store -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [{}, {"views": 3, "augment": "rrc", "fields": ["embedding", "logits"]}])
def test_a_store_in_a_bucket_is_the_local_one_byte_for_byte(make_images, tmp_path, url, another_home, recipe):
    folder = make_images(19)
    Path(folder, "ant/broken.png").write_bytes(b"no image")
    local = extract(folder, tiny_encoder(), tmp_path / "t.zarr", **recipe, **EXACT)
    another_home("b")
    remote = extract(folder, tiny_encoder(), url, **recipe, **EXACT)
    assert remote.path == url
    assert remote.manifest.sealed == local.manifest.sealed
    assert objects(url) == files(local.path)
    assert remote.verify() == []
    another_home("c")
    read = open_store(url)
    np.testing.assert_array_equal(read.state, local.state)
    assert read.reasons == local.reasons != {}
    assert read.sample_ids.tolist() == local.sample_ids.tolist()


def test_plain_zarr_opens_the_url(url, tmp_path, rng):
    embedding = rng.normal(size=(21, 6)).astype(np.float16)
    write_store(url, embedding)
    read = "import sys, numpy, zarr; numpy.save(sys.argv[2], zarr.open_group(sys.argv[1], mode='r')['embedding'][:, 0])"
    subprocess.run([sys.executable, "-c", read, url, str(tmp_path / "read.npy")], check=True, timeout=300)
    np.testing.assert_array_equal(np.load(tmp_path / "read.npy"), embedding)


def test_a_finished_store_is_found_finished_and_its_rows_are_reused(make_images, url, tmp_path):
    folder = make_images(11)
    extract(folder, tiny_encoder(), url, **EXACT)
    for out in (f"{url}/", tmp_path / "again.zarr"):
        encoder = tiny_encoder()
        store = extract(folder, encoder, out, **EXACT)
        assert len(set(encoder.module.seen)) <= 8  # the probe alone
        assert objects(url).keys() == files(store.files.root).keys()
    assert set(known_stores()) == {tmp_path / "again.zarr", url}


def test_rows_whose_objects_have_gone_are_encoded_again(make_images, url, tmp_path):
    folder = make_images(9)
    local = extract(folder, tiny_encoder(), tmp_path / "t.zarr", **EXACT)
    shutil.rmtree(os.environ["FEATCACHE_HOME"])
    extract(folder, tiny_encoder(), url, **EXACT)
    Mirror(url).remove(*(path for path in objects(url) if path != "zarr.json"))
    again = extract(folder, tiny_encoder(), tmp_path / "again.zarr", **EXACT)
    assert files(again.path) == files(local.path)


def test_a_store_from_arrays_may_lie_in_a_bucket(url, tmp_path, rng):
    embedding = rng.normal(size=(21, 2, 6)).astype(np.float16)
    local, remote = (
        write_store(path, embedding, labels=np.arange(21), failed={3: "gone"}) for path in (tmp_path / "t.zarr", url)
    )
    assert objects(url) == files(local.path)
    np.testing.assert_array_equal(remote.gather([20, 3, 3], view=np.array([1, 0, 1])), embedding[[20, 3, 3], [1, 0, 1]])


def test_only_the_chunks_that_are_asked_for_are_fetched(url, rng, another_home):
    embedding = rng.normal(size=(40, 6)).astype(np.float16)
    write_store(url, embedding, labels=np.arange(40))
    another_home("b")
    store, rows = open_store(url), [17, 2, 16, 2]
    assert mirrored(url) == {"zarr.json"}
    np.testing.assert_array_equal(store.gather(rows), embedding[rows])
    assert mirrored(url) == {"zarr.json", "embedding/c/0/0/0", "embedding/c/2/0/0"}
    np.testing.assert_array_equal(store.gather_portable(rows), embedding[rows])
    np.testing.assert_array_equal(store.labels, np.arange(40))
    assert mirrored(url) == {
        "zarr.json", "embedding/zarr.json", "embedding/c/0/0/0", "embedding/c/2/0/0",
        "label/zarr.json", *(f"label/c/{i}" for i in range(5)),
    }  # fmt: skip
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).gather(range(40)), embedding)


def test_a_mirror_does_not_outlive_what_it_mirrors(url, rng, another_home):
    first, second = rng.normal(size=(2, 20, 6)).astype(np.float16)
    write_store(url, first)
    another_home("b")
    np.testing.assert_array_equal(open_store(url).gather(range(20)), first)
    another_home("c")
    open_store(url).remove()
    assert objects(url) == {}
    write_store(url, second)
    another_home("b")
    np.testing.assert_array_equal(open_store(url).gather(range(20)), second)


def test_export_reads_a_bucket_and_nothing_is_imported_into_one(url, tmp_path, rng):
    store = write_store(url, rng.normal(size=(20, 6)).astype(np.float16))
    export_store(url, tmp_path / "e.safetensors", "safetensors")
    assert files(import_store(tmp_path / "e.safetensors", tmp_path / "back.zarr").path) == objects(url)
    for refused in (
        lambda: import_store(tmp_path / "e.safetensors", f"{url}-2"),
        lambda: import_store(f"{url}/x.npy", tmp_path / "c.zarr"),
        lambda: export_store(store, f"{url}.npy", "npy"),
    ):
        with pytest.raises(ValueError, match=r"s3://.*: files are imported and exported here; give a local path"):
            refused()


def test_kept_images_are_read_from_a_bucket(make_images, url, another_home, tmp_path):
    kept = featcache.KeptPixels(size=16, format="raw")
    folder = make_images(9)
    local = extract(folder, tiny_encoder(), tmp_path / "t.zarr", pixels=kept, **EXACT)
    another_home("b")
    extract(folder, tiny_encoder(), url, pixels=kept, **EXACT)
    assert objects(url) == files(local.path)
    another_home("c")
    corpus = open_corpus(f"store:{url}")
    assert [corpus.read(i) for i in range(9)] == [local.pixels(i) for i in range(9)]


def test_a_student_is_trained_from_a_bucket(make_images, url, tmp_path, another_home):
    import distill

    folder, given = (
        make_images(12),
        {"student": "tiny", "method": "proteus", "epochs": 1, "batch_size": 4, "workers": 1},
    )
    local = extract(folder, tiny_encoder(), tmp_path / "t.zarr", **EXACT)
    another_home("b")
    extract(folder, tiny_encoder(), url, **EXACT)
    another_home("c")
    runs = {
        store: distill.fit(store, folder, out=tmp_path / name, **given)
        for name, store in (("a", str(local.path)), ("b", url))
    }
    weights = [Path(run.path, "student.safetensors").read_bytes() for run in runs.values()]
    assert weights[0] == weights[1]
    assert [run.config["store"] for run in runs.values()] == list(runs)


# -- what is refused ------------------------------------------------------------------------------------


def test_what_is_no_store_is_refused_with_the_remedy(url):
    with pytest.raises(ValueError, match=rf"{url}: no such store; make one with `featcache extract"):
        open_store(url)
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(f"{root}/holiday.jpg", b"photo")
    with pytest.raises(ValueError, match=r"already exists and is not a store; choose another --out"):
        write_store(url, np.zeros((2, 3)))
    filesystem.pipe_file(f"{root}/zarr.json", b"{}")
    with pytest.raises(ValueError, match=rf"{url}: not a feature store"):
        open_store(url)


def test_another_store_is_not_overwritten_unless_asked(make_images, url, another_home, tmp_path):
    folder = make_images(9)
    extract(folder, tiny_encoder(1), url, **EXACT)
    with pytest.raises(ValueError, match=rf"{url}: was made by another encoder .* replace it with --overwrite"):
        extract(folder, tiny_encoder(2), url, **EXACT)
    another_home("b")
    extract(folder, tiny_encoder(2), url, overwrite=True, **EXACT)
    another_home("c")
    assert objects(url) == files(extract(folder, tiny_encoder(2), tmp_path / "t.zarr", **EXACT).path)


def test_a_creation_that_was_cut_short_is_begun_again(url, monkeypatch, rng):
    push = Mirror.push

    def cut(self, *files):
        push(self, *(file for file in files if file != "zarr.json"))
        if "zarr.json" in files:
            raise ConnectionError("cut")

    monkeypatch.setattr(Mirror, "push", cut)
    with pytest.raises(ConnectionError, match="cut"):
        write_store(url, np.zeros((20, 6)))
    assert "embedding/zarr.json" in objects(url)
    monkeypatch.undo()
    embedding = rng.normal(size=(20, 6)).astype(np.float16)
    np.testing.assert_array_equal(write_store(url, embedding).gather(range(20)), embedding)


# -- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["embedding/c/1/0/0", "state/c/0", "label/zarr.json", "sample_id/c/2"])
def test_damage_in_the_bucket_is_found_and_repaired(make_images, url, tmp_path, another_home, victim):
    folder = make_images(21)
    whole = files(extract(folder, tiny_encoder(), tmp_path / "t.zarr", **EXACT).path)
    another_home("b")
    extract(folder, tiny_encoder(), url, **EXACT)
    flip(url, victim)
    problems = open_store(url).verify()  # the mirror has the file as it was
    assert len(problems) == 1, problems
    another_home("c")
    assert open_store(url).verify() == problems
    assert len(problems) == 1
    encoder = tiny_encoder()
    assert extract(folder, encoder, url, **EXACT).verify() == []
    assert objects(url) == whole
    assert len(set(encoder.module.seen)) <= 8 + 8  # the probe and one unit


def test_what_was_deleted_from_or_added_to_the_bucket_is_named(make_images, url):
    folder = make_images(21)
    extract(folder, tiny_encoder(), url, **EXACT)
    whole = objects(url)
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.rm_file(f"{root}/content/c/2/0")
    filesystem.pipe_file(f"{root}/notes.txt", b"")
    assert open_store(url).verify() == ["content chunk 2 (rows 16–20): missing", "notes.txt: not part of the store"]
    extract(folder, tiny_encoder(), url, **EXACT)
    assert objects(url) == whole


# -- interrupted ----------------------------------------------------------------------------------------


class Wire:
    """A TCP proxy in front of a server, that can be cut and mended."""

    def __init__(self, server):
        host, port = server.removeprefix("http://").split(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._whole = threading.Event()
        self._whole.set()
        self._open = True
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def cut(self):
        self._whole.clear()

    def mend(self):
        self._whole.set()

    def close(self):
        self._open = False
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self):
        self._listener.settimeout(0.02)
        while self._open:
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            if not self._whole.is_set():
                client.close()
                continue
            thread = threading.Thread(target=self._carry, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _carry(self, client):
        with client, socket.create_connection(self._server) as server, selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while self._whole.is_set():
                for key, _ in ready.select(0.02):
                    try:
                        data = key.fileobj.recv(65536)
                        key.data.sendall(data)
                    except OSError:
                        return
                    if not data:
                        return


@pytest.fixture
def wire(s3_bucket, s3_server, monkeypatch):
    wire = Wire(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.address)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's patience is not what is tested
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield wire
    wire.close()


def test_a_lost_connection_is_one_line_and_the_same_command_resumes(make_images, url, tmp_path, wire, another_home):
    folder = make_images(29)
    local = extract(folder, tiny_encoder(), tmp_path / "t.zarr", **EXACT)
    another_home("b")

    def cut_in_the_third_unit(at):
        if at.done > 16:
            wire.cut()

    with pytest.raises(ConnectionError) as error:
        extract(folder, tiny_encoder(), url, progress=cut_in_the_third_unit, **EXACT)
    assert url in str(error.value)
    assert "run the same command again: it resumes" in str(error.value)
    assert "\n" not in str(error.value)
    wire.mend()
    with pytest.raises(ValueError, match=r"extraction has not finished \(2 of 4 chunks done\)"):
        open_store(url)
    second = tiny_encoder()
    store = extract(folder, second, url, **EXACT)
    assert len(set(second.module.seen)) == 8 + 29 - 16  # the probe, and what was not finished
    assert objects(url) == files(local.path)
    assert store.manifest.sealed == local.manifest.sealed


def test_another_machine_resumes_what_one_left(make_images, url, tmp_path, another_home):
    folder = make_images(29)
    local = extract(folder, tiny_encoder(), tmp_path / "t.zarr", **EXACT)

    def stop(at):
        if at.done > 16:
            raise KeyboardInterrupt

    another_home("b")
    with pytest.raises(KeyboardInterrupt):
        extract(folder, tiny_encoder(), url, progress=stop, **EXACT)
    another_home("c")
    encoder = tiny_encoder()
    extract(folder, encoder, url, **EXACT)
    assert len(set(encoder.module.seen)) == 8 + 29 - 20
    assert objects(url) == files(local.path)


def test_a_unit_in_progress_survives_on_another_machine(make_images, url, tmp_path, another_home, monkeypatch):
    monkeypatch.setattr(featcache.extraction.job, "SAVE_SECONDS", 0.0)
    folder = make_images(29)
    local = extract(folder, tiny_encoder(), tmp_path / "t.zarr", **EXACT)

    def stop(at):
        if at.done == 20:
            raise KeyboardInterrupt

    another_home("b")
    with pytest.raises(KeyboardInterrupt):
        extract(folder, tiny_encoder(), url, progress=stop, **EXACT)
    assert "unfinished.npz" in objects(url)
    another_home("c")
    encoder = tiny_encoder()
    extract(folder, encoder, url, **EXACT)
    assert len(set(encoder.module.seen)) == 8 + 29 - 20
    assert objects(url) == files(local.path)


# -- one writer -----------------------------------------------------------------------------------------


WRITE = """
    import sys, time
    import featcache.store.layout
    from tiny import tiny_encoder
    featcache.store.layout.CHUNK_BYTES = 8 * 6 * 2
    def pause(at):
        if at.done > 16:
            print("paused", flush=True)
            time.sleep(600)
    featcache.extract(sys.argv[1], tiny_encoder(), sys.argv[2], progress=pause, device="cpu",
                      precision="fp32+channels_last", workers=2, batch_size=4)
"""


def test_a_second_writer_is_refused_and_a_killed_one_is_succeeded(make_images, url, tmp_path, another_home):
    folder = make_images(29)
    local = extract(folder, tiny_encoder(), tmp_path / "t.zarr", **EXACT)
    other = warm.Warm(
        textwrap.dedent(WRITE), folder, url, env=os.environ | {"FEATCACHE_HOME": str(tmp_path / "home-b")}
    )
    try:
        other.wait_for("paused")
        another_home("c")
        with pytest.raises(
            ValueError, match=rf"{url}: another process \(.*, pid {other.pid}\) is writing this store; wait"
        ):
            extract(folder, tiny_encoder(), url, **EXACT)
        reader = FeatureStore(url)
        assert (reader.sealed, reader.pending_chunks()) == (False, [2, 3])
        assert reader.verify() == []
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    encoder = tiny_encoder()
    extract(folder, encoder, url, **EXACT)
    assert len(set(encoder.module.seen)) == 8 + 29 - 16
    assert objects(url) == files(local.path)


# -- the commands ---------------------------------------------------------------------------------------


def command(*arguments):
    ran = warm.run(warm.PROGRAM, *arguments)
    return ran.returncode, ran.stdout, ran.stderr


def test_the_commands_take_urls(url, rng):
    write_store(url, rng.normal(size=(40, 6)).astype(np.float16), labels=np.arange(40) % 4, class_names=list("abcd"))
    code, said, wrong = command("featcache", "info", url, "--json", "-")
    assert (code, json.loads(said)["rows"]) == (0, 40), wrong
    code, said, wrong = command("featcache", "verify", url)
    assert (code, f"whole {url}" in wrong) == (0, True), wrong
    code, said, wrong = command("evalsuite", "knn", "--bank", url, "--query", url, "--k", "1", "--json", "-")
    assert (code, json.loads(said)["inputs"]["bank"]["path"]) == (0, url), wrong
    code, said, wrong = command("featcache", "rm", url)
    assert (code, objects(url)) == (0, {}), wrong
    code, said, wrong = command("featcache", "info", url)
    assert (code, wrong.count("\n")) == (2, 1), wrong
    assert f"error: {url}: no such store" in wrong
