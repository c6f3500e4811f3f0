"""Mirror: whole files between a URL and a local folder; one writer, whichever machine it is on. S3 is a real server."""

import json
import os
import signal
import socket
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
import warm

import featcache.store.remote
from featcache.store.remote import Mirror


@pytest.fixture(params=["s3", "file"])
def url(request, tmp_path):
    """Where a store is to be, of a service with exclusive creation and of a plain folder."""
    return (
        f"{request.getfixturevalue('s3_bucket')}/a/t.zarr" if request.param == "s3" else f"file://{tmp_path}/a/t.zarr"
    )


def put(url, files):
    filesystem, root = fsspec.core.url_to_fs(url)
    for path, data in files.items():
        filesystem.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(f"{root}/{path}", data)


def group(digest=None):
    return json.dumps({"attributes": {"featcache": {"sealed": {"digest": digest} if digest else None}}}).encode()


def mirrored(mirror):
    return {p.relative_to(mirror.root).as_posix() for p in mirror.root.rglob("*") if p.is_file()}


def read_remotely(url, path=""):
    filesystem, root = fsspec.core.url_to_fs(url + path)
    return filesystem.cat_file(root)


# -- files ----------------------------------------------------------------------------------------------


def test_files_go_up_and_come_down_as_they_are(url):
    mirror = Mirror(url)
    files = {"zarr.json": b"{}", "x/c/0": bytes(range(256)) * 999, "x/c/10": b"tail", "x/zarr.json": b"[]"}
    for path, data in files.items():
        (mirror.root / path).parent.mkdir(parents=True, exist_ok=True)
        (mirror.root / path).write_bytes(data)
    assert not mirror.exists()
    assert mirror.listing() == {}
    mirror.push(*files)
    assert mirror.exists()
    assert {path: read_remotely(url, f"/{path}") for path in files} == files
    assert mirror.listing() == {path: len(data) for path, data in files.items()}
    assert mirror.tails({"x/c/0": 256 * 999, "x/c/10": 4}) == {"x/c/0": b"\xfc\xfd\xfe\xff", "x/c/10": b"tail"}
    for path in files:
        (mirror.root / path).unlink()
    mirror.fetch_all(["x/c/0", "x/c/10"])
    assert mirrored(mirror) == {"x/c/0", "x/c/10"}
    assert {path: mirror.fetch(path).read_bytes() for path in files} == files
    mirror.remove("nowhere", "x/c/0")
    assert set(mirror.listing()) == set(files) - {"x/c/0"} == mirrored(mirror)
    mirror.remove_all()
    assert mirror.listing() == {}
    assert not mirror.root.exists()


def test_a_file_that_many_threads_need_is_fetched_once(url, monkeypatch):
    put(url, {"x": b"x" * 100_000})
    asked, ask = [], Mirror._ask
    monkeypatch.setattr(
        Mirror, "_ask", lambda self, *given, **named: (asked.append(given), ask(self, *given, **named))[1]
    )
    mirror = Mirror(url)
    with ThreadPoolExecutor(8) as pool:
        assert {path.read_bytes() for path in pool.map(mirror.fetch, ["x"] * 32)} == {b"x" * 100_000}
    assert len(asked) == 1
    assert mirrored(mirror) == {"x"}


def test_what_is_not_there_leaves_nothing_behind(url):
    mirror = Mirror(url)
    with pytest.raises(FileNotFoundError, match="not there") as error:
        mirror.fetch("x/c/0")
    assert "\n" not in str(error.value)
    assert url in str(error.value)
    assert not mirrored(mirror)
    with pytest.raises(FileNotFoundError):
        mirror.open()


def test_urls_have_mirrors_of_their_own(tmp_path):
    roots = {Mirror(f"file://{tmp_path}/{name}").root for name in ("a/t.zarr", "b/t.zarr", "b/t.zarr/")}
    assert len(roots) == 2


# -- what of the mirror is kept -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [("one", "one", True), ("one", "two", False), ("one", None, False), (None, None, False), (None, "one", False)],
)
def test_mirrored_chunks_are_kept_only_under_the_same_seal(url, before, after, kept):
    put(url, {"zarr.json": group(before), "x": b"old"})
    Mirror(url).open().fetch("x")
    put(url, {"zarr.json": group(after), "x": b"new"})
    mirror = Mirror(url).open()
    assert (mirror.root / "zarr.json").read_bytes() == group(after)
    assert mirror.fetch("x").read_bytes() == (b"old" if kept else b"new")


def test_what_a_process_of_this_machine_is_writing_is_not_dropped_by_a_reader(url):
    put(url, {"zarr.json": group()})
    writer = Mirror(url).open()
    with writer.only_writer():
        writer.open()
        (writer.root / "x").write_bytes(b"not yet pushed")
        Mirror(url).open()
        writer.push("x")
    assert read_remotely(url, "/x") == b"not yet pushed"


# -- one writer -----------------------------------------------------------------------------------------


HOLD = """
    import sys, time
    from featcache.store.remote import Mirror
    with Mirror(sys.argv[1]).only_writer():
        print("held", flush=True)
        time.sleep(600)
"""


@pytest.fixture
def other_writer(url):
    """Another process that holds the lock of `url`."""
    process = warm.Warm(textwrap.dedent(HOLD), url)
    process.wait_for("held")
    yield process
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_second_writer_is_refused_and_a_killed_one_is_succeeded(url, other_writer, monkeypatch):
    monkeypatch.setattr(featcache.store.remote, "SETTLE", 0.05)
    with (
        pytest.raises(
            ValueError, match=rf"{socket.gethostname()}, pid {other_writer.pid}\) is writing this store; wait"
        ),
        Mirror(url).only_writer(),
    ):
        raise AssertionError
    other_writer.send_signal(signal.SIGKILL)
    other_writer.communicate()
    with Mirror(url).only_writer():
        assert json.loads(read_remotely(url, ".lock"))["pid"] == os.getpid()
    assert not fsspec.core.url_to_fs(url)[0].exists(f"{fsspec.core.url_to_fs(url)[1]}.lock")


def test_two_writers_of_one_process_exclude_each_other_too(url):
    with Mirror(url).only_writer(), pytest.raises(ValueError, match="is writing this store"):
        Mirror(url).only_writer().__enter__()
    with Mirror(url).only_writer():
        pass


@pytest.mark.parametrize(("silent", "taken_over"), [(30.0, False), (601.0, True)])
def test_a_writer_on_another_machine_is_believed_for_ten_minutes(url, monkeypatch, silent, taken_over):
    monkeypatch.setattr(featcache.store.remote, "SETTLE", 0.05)
    alive = featcache.store.remote.time.time() - silent
    holder = {"id": "theirs", "host": "elsewhere", "numbers": "", "pid": os.getpid(), "alive": alive}
    put(url.rpartition("/")[0], {"t.zarr.lock": json.dumps(holder).encode()})
    if taken_over:
        with Mirror(url).only_writer():
            pass
    else:
        with pytest.raises(ValueError, match=r"another process \(elsewhere, pid"), Mirror(url).only_writer():
            raise AssertionError


def test_of_many_threads_that_start_at_once_one_writes(url):
    begin, end, outcomes = threading.Barrier(6), threading.Barrier(6), []

    def write(_):
        begin.wait()
        try:
            with Mirror(url).only_writer():
                outcomes.append("wrote")
                end.wait()
        except ValueError:
            outcomes.append("refused")
            end.wait()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(6)))
    assert sorted(outcomes) == ["refused"] * 5 + ["wrote"]


def test_of_two_that_saw_no_lock_the_first_to_create_it_writes(url, other_writer, monkeypatch):
    look, looks = featcache.store.remote._Lock.holder, []

    def see_nothing_at_first(lock):
        looks.append(lock)
        return look(lock) if len(looks) > 1 else None

    monkeypatch.setattr(featcache.store.remote._Lock, "holder", see_nothing_at_first)
    before = read_remotely(url, ".lock")
    with pytest.raises(ValueError, match=rf"pid {other_writer.pid}\) is writing"), Mirror(url).only_writer():
        raise AssertionError
    assert read_remotely(url, ".lock") == before


def test_of_two_that_succeed_a_dead_writer_the_last_to_say_so_writes(url, monkeypatch):
    dead = {"id": "dead", "host": "elsewhere", "numbers": "", "pid": 1, "alive": 0.0}
    lock, other = {"t.zarr.lock": json.dumps(dead).encode()}, dead | {"id": "other", "alive": 1e12}
    put(url.rpartition("/")[0], lock)
    say = {"t.zarr.lock": json.dumps(other).encode()}
    monkeypatch.setattr(featcache.store.remote.time, "sleep", lambda seconds: put(url.rpartition("/")[0], say))
    with pytest.raises(ValueError, match=r"another process \(elsewhere, pid 1\) is writing"), Mirror(url).only_writer():
        raise AssertionError
    assert json.loads(read_remotely(url, ".lock")) == other


def test_the_holder_shows_signs_of_life_and_notices_when_it_was_succeeded(url, monkeypatch):
    monkeypatch.setattr(featcache.store.remote, "REFRESH", 0.05)
    mirror = Mirror(url)
    mirror.root.mkdir(parents=True)
    (mirror.root / "x").write_bytes(b"x")
    with mirror.only_writer():
        first = read_remotely(url, ".lock")
        deadline = threading.Event()
        while read_remotely(url, ".lock") == first:
            deadline.wait(0.02)
        theirs = json.loads(first) | {"id": "theirs"}
        while json.loads(read_remotely(url, ".lock"))["id"] != "theirs":  # a sign of life may be on its way
            put(url.rpartition("/")[0], {"t.zarr.lock": json.dumps(theirs).encode()})
            deadline.wait(0.3)
        with pytest.raises(RuntimeError, match="another process has taken over writing"):
            mirror.push("x")
    assert json.loads(read_remotely(url, ".lock")) == theirs


# -- services that fail ---------------------------------------------------------------------------------


ACTIONS = {
    "open": lambda mirror: mirror.open(),
    "fetch": lambda mirror: mirror.fetch("y"),
    "push": lambda mirror: mirror.push("x"),
    "listing": lambda mirror: mirror.listing(),
    "tails": lambda mirror: mirror.tails({"y": 9}),
    "remove": lambda mirror: mirror.remove("x"),
    "write": lambda mirror: mirror.only_writer().__enter__(),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_silent_server_is_given_up_in_one_clear_line(action, s3_bucket, monkeypatch):
    """It accepts connections and never answers: s3fs alone would upload for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(featcache.store.remote, "PATIENCE", 0.3)
        monkeypatch.setattr(featcache.store.remote, "SLOWEST", 1e9)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        mirror = Mirror(f"{s3_bucket}/t.zarr")
        mirror.root.mkdir(parents=True)
        (mirror.root / "x").write_bytes(b"x")
        with pytest.raises(ConnectionError) as error:
            ACTIONS[action](mirror)
    assert f"{s3_bucket}/t.zarr: " in str(error.value)
    assert "run the same command again: it resumes" in str(error.value)
    assert "\n" not in str(error.value)


def test_refused_credentials_are_a_lost_connection(url, monkeypatch):
    def refuse(*given, **named):
        raise PermissionError("Access\nDenied")

    mirror = Mirror(url)
    monkeypatch.setattr(type(mirror._filesystem), "_cat_file" if url.startswith("s3") else "cat_file", refuse)
    with pytest.raises(ConnectionError, match=r"t\.zarr: PermissionError: Access Denied; check"):
        mirror.open()


def test_a_full_disk_here_is_not_blamed_on_the_service(url, monkeypatch):
    put(url, {"x": b"x"})

    def full(*given, **named):
        raise OSError(28, "No space left on device")

    mirror = Mirror(url)
    monkeypatch.setattr(type(mirror._filesystem), "_get_file" if url.startswith("s3") else "get_file", full)
    with pytest.raises(OSError, match="No space left") as error:
        mirror.fetch("x")
    assert not isinstance(error.value, ConnectionError)
