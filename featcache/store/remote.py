"""A store at a URL (`s3://bucket/teacher.zarr`), mirrored file by file in a local folder.

A store is read and written as local files, whatever it lies on; this module moves whole files between the two: down
when one is needed and not there yet, up when one has been written durably. The mirror lies under
$FEATCACHE_HOME/mirrors, holds only what was read or written from here, and may be deleted at any time.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fsspec.asyn import sync

from featcache.disk.durable import replacing, whole_file
from featcache.disk.home import writable_home
from featcache.disk.urls import open_filesystem
from featcache.store.layout import CHECKSUM_BYTES, METADATA

TRANSFERS = 8
"""Files moved at the same time."""
PATIENCE = 60.0
"""Seconds after which a service that says nothing is given up. s3fs alone waits for 6 minutes when it reads, and for
ever when it writes: its upload waits for the server to say "100 Continue", and no timeout of botocore's covers that."""
SLOWEST = 50_000
"""Bytes a second, of each of the files that share a line: they get this much more time than `PATIENCE`."""
REFRESH = 60.0
"""Seconds between signs of life from the writer of a store."""
STALE = 600.0
"""Seconds without one after which the writer is taken for dead."""
SETTLE = 2.0
"""Seconds in which of several that take over a dead writer's lock, one wins."""

_LOCAL_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE}
_held: "dict[str, _Lock]" = {}
"""The locks that this process holds, by URL."""


class Mirror:
    """The files of one store at `url`, and those of them that are here, under `root`; methods as of `LocalFiles`.

    All of them may be called from several threads at once.

    Raises (every method):
        ConnectionError: the network, the service or the credentials have gone; the same command resumes.
        FileNotFoundError: no such file there.
        ValueError: `url` is of a kind that nothing installed reads.
    """

    def __init__(self, url: str):
        self.url = self.path = self.identity = url.rstrip("/")
        last = re.sub(r"[^\w.-]", "_", self.url.rpartition("/")[2])[:80]
        self.root = writable_home("mirrors", f"{last}-{hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()}")
        self._filesystem, self._there = open_filesystem(self.url)
        self._fetching: dict[str, threading.Lock] = {}

    # -- reading ------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether a Zarr group is at `url`."""
        try:
            self._ask("info", f"{self._there}/{METADATA}")
        except FileNotFoundError:
            return False
        return True

    def taken(self) -> bool:
        """Whether anything is there that a new store would have to replace; arrays' metadata alone is not, which a
        creation leaves that was killed before it wrote zarr.json."""
        return any(not relative.endswith(f"/{METADATA}") for relative in self.listing())

    def open(self) -> "Mirror":
        """Fetch zarr.json afresh, and keep of the mirror only what must still be true.

        That is everything while the store is sealed under the digest that the mirror's has, and nothing otherwise; but
        while a process of this machine writes the store, the mirror is what it writes, and is kept.
        """
        lock = _Lock(self)
        self._synchronise(keep=lambda: (holder := lock.holder()) is not None and _lives_here(holder))
        return self

    def _synchronise(self, keep: Callable[[], bool] = lambda: False) -> None:
        there = self._ask("cat_file", f"{self._there}/{METADATA}", start=0)  # without, s3fs first asks for the size
        here = (self.root / METADATA).read_bytes() if (self.root / METADATA).exists() else b""
        if not (_seal(there) and _seal(there) == _seal(here)) and not keep():
            shutil.rmtree(self.root, ignore_errors=True)
        if there != here or not (self.root / METADATA).exists():
            self.root.mkdir(parents=True, exist_ok=True)
            with whole_file(self.root / METADATA) as file:
                file.write(there)

    def _here(self, relative: str) -> Path:
        """Where the local copy of a file belongs: never outside the mirror, whatever an object there is named.

        Raises:
            ValueError: its name leads out of the store.
        """
        if {"", ".", ".."} & {*relative.split("/")} or (os.sep == "\\" and {"\\", ":"} & {*relative}):
            raise ValueError(
                f"{self.url}: an object there is named {relative!r}, which leads out of the store; delete it"
            )
        return self.root / relative

    def fetch(self, relative: str) -> Path:
        """The local copy of a file, fetched if it is not here yet."""
        local = self._here(relative)
        if not local.exists():
            with self._fetching.setdefault(relative, threading.Lock()):
                if not local.exists():
                    self._download(relative, local)
        return local

    def fetch_all(self, relatives: Iterable[str]) -> None:
        """`fetch`, several at a time."""
        missing = [relative for relative in relatives if not self._here(relative).exists()]
        if missing:
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(self.fetch, missing))

    def read_afresh(self, relatives: Iterable[str]) -> Iterator[bytes]:
        """The bytes of each file, as they are at `url` now; they replace the local copies."""

        places = {relative: self._here(relative) for relative in relatives}
        with ThreadPoolExecutor(TRANSFERS) as pool:
            for local in pool.map(self._download, places, places.values()):
                yield local.read_bytes()

    def _download(self, relative: str, local: Path) -> Path:
        local.parent.mkdir(parents=True, exist_ok=True)
        with replacing(local) as partial:
            # A file's size is not known beforehand; chunks are of 16 MiB, those of kept images of more when they are large.
            self._ask("get_file", f"{self._there}/{relative}", str(partial), seconds=PATIENCE + 2**25 / SLOWEST)
        return local

    def listing(self, under: str = "") -> dict[str, int]:
        """Size in bytes of every file at `url`, or of those in the folder `under`, by path; empty if there is none."""
        self._filesystem.invalidate_cache()
        try:
            found = self._ask("find", f"{self._there}/{under}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        prefix = f"{self._there}/"
        return {path.removeprefix(prefix): found[path]["size"] for path in sorted(found) if path.startswith(prefix)}

    def tails(self, sizes: Mapping[str, int]) -> dict[str, bytes]:
        """The checksum that each file ends with, given its size: from here, or else without fetching the rest."""
        here = {relative: path for relative in sizes if (path := self._here(relative)).exists()}
        there = {relative: size for relative, size in sizes.items() if relative not in here}
        paths = [f"{self._there}/{relative}" for relative in there]
        starts, ends = [max(0, size - CHECKSUM_BYTES) for size in there.values()], list(there.values())
        read = self._ask("cat_ranges", paths, starts, ends, on_error="raise", seconds=PATIENCE + len(paths))
        return dict(zip(there, read, strict=True)) | {name: checksum_in(path) for name, path in here.items()}

    # -- writing ------------------------------------------------------------------------------------------

    def push(self, *relatives: str) -> None:
        """Copy local files to `url`, several at a time; when this returns, all of them are there.

        Raises:
            RuntimeError: another process has become the writer of this store meanwhile.
        """
        if lock := _held.get(self.url):
            lock.confirm()
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(self._upload, relatives))

    def _upload(self, relative: str) -> None:
        local, there = self._here(relative), f"{self._there}/{relative}"
        if not self._filesystem.async_impl:  # services with folders; object stores have none
            self._ask("makedirs", there.rpartition("/")[0], exist_ok=True)
        self._ask("put_file", str(local), there, seconds=PATIENCE + local.stat().st_size / SLOWEST)

    def remove(self, *relatives: str) -> None:
        """Delete files here and at `url`; those that are not there are passed over."""
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(self._delete, relatives))

    def _delete(self, relative: str) -> None:
        local = self._here(relative)
        with contextlib.suppress(FileNotFoundError):
            self._ask("rm_file", f"{self._there}/{relative}")
        local.unlink(missing_ok=True)

    def remove_all(self) -> None:
        """Delete the whole store here and at `url`, zarr.json last: until then it is still a store, if a damaged one."""
        files = self.listing()
        self.remove(*(relative for relative in files if relative != METADATA))
        self.remove(*(relative for relative in files if relative == METADATA))
        shutil.rmtree(self.root, ignore_errors=True)

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[None]:
        """Held while the store is written, on whichever machine.

        An object next to the store, `URL.lock`, says who writes it. One whose process on this machine has died, or that
        shows no sign of life for ten minutes, is taken over.

        Raises:
            ValueError: another process is writing the store.
        """
        lock = _Lock(self)
        lock.acquire()
        try:
            with contextlib.suppress(FileNotFoundError):
                self._synchronise()  # another machine may have written since this one last looked
            yield
        finally:
            lock.release()

    # -- the service --------------------------------------------------------------------------------------

    def _ask(self, name: str, *given: Any, seconds: float | None = None, **named: Any) -> Any:
        """Call a method of the file system, within `seconds` (`PATIENCE` unless given) where it can be interrupted."""
        seconds = PATIENCE if seconds is None else seconds
        try:
            if self._filesystem.async_impl:
                method = getattr(self._filesystem, f"_{name}")
                return sync(self._filesystem.loop, method, *given, timeout=seconds, **named)
            return getattr(self._filesystem, name)(*given, **named)
        except FileNotFoundError as error:
            said = " ".join(str(error).split())
            raise FileNotFoundError(f"{self.url}: not there ({said}); check the address") from error
        except FileExistsError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _LOCAL_TROUBLE:
                raise
            said = " ".join(str(error).split()) or f"no answer within {seconds:.0f} s"
            raise ConnectionError(
                f"{self.url}: {type(error).__name__}: {said}; check the network, the service and the credentials, "
                "then run the same command again: it resumes"
            ) from error


class _Lock:
    """The object `URL.lock`: host and process of the one writer of a store, and when it was last alive.

    It is created exclusively where the service can (S3's `If-None-Match`); whoever holds it looks every minute whether
    it still does. Times are the holders' clocks: services such as S3 refuse clocks that are a quarter of an hour off.
    """

    def __init__(self, mirror: Mirror):
        self._mirror = mirror
        self._path = f"{mirror._there}.lock"
        self.id = uuid.uuid4().hex
        self._seen = 0.0
        self._lost = False
        self._released = threading.Event()
        self._turn = threading.Lock()

    def holder(self) -> dict[str, Any] | None:
        """What the lock says, or None when there is none."""
        try:
            return dict(json.loads(self._mirror._ask("cat_file", self._path, start=0)))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # half written, by a service that does not write files in one step
            return {"alive": 0.0}

    def acquire(self) -> None:
        """Take the lock, or raise ValueError naming who has it."""
        if _held.setdefault(self._mirror.url, self) is not self:
            self._refuse(_this_process())
        try:
            holder = self.holder()
            if holder is None:
                try:
                    self._write(mode="create")
                except (FileExistsError, ConnectionError):
                    if self.holder() is None:
                        raise
            elif time.time() - holder["alive"] < STALE and (_lives_here(holder) or not _on_this_machine(holder)):
                self._refuse(holder)
            else:
                self._write()
                time.sleep(SETTLE)
            holder = self.holder() or {}
            if holder.get("id") != self.id:
                self._refuse(holder)
        except BaseException:
            del _held[self._mirror.url]
            raise
        threading.Thread(target=self._stay_alive, daemon=True).start()

    def confirm(self) -> None:
        """Say that the holder is alive, when it is time to.

        Raises:
            RuntimeError: it is no longer the holder.
        """
        with self._turn:
            if not self._lost and time.time() - self._seen > REFRESH:
                if (self.holder() or {}).get("id") == self.id:
                    self._write()
                else:
                    self._lost = True
            if self._lost:
                raise RuntimeError(
                    f"{self._mirror.url}: another process has taken over writing this store while this one did not "
                    "answer; wait for it, then run the same command again"
                )

    def release(self) -> None:
        """Let go; a lock that cannot be deleted now is taken over by the next writer."""
        self._released.set()
        del _held[self._mirror.url]
        with self._turn, contextlib.suppress(OSError):
            if (self.holder() or {}).get("id") == self.id:
                self._mirror._ask("rm_file", self._path)

    def _stay_alive(self) -> None:
        while not self._released.wait(REFRESH):
            with contextlib.suppress(OSError, RuntimeError):  # what is written next says so
                self.confirm()

    def _write(self, mode: str = "overwrite") -> None:
        now = time.time()
        text = json.dumps({"id": self.id, **_this_process(), "alive": now})
        if not self._mirror._filesystem.async_impl:
            self._mirror._ask("makedirs", self._path.rpartition("/")[0], exist_ok=True)
        self._mirror._ask("pipe_file", self._path, text.encode(), mode=mode)
        self._seen = now

    def _refuse(self, holder: Mapping[str, Any]) -> None:
        raise ValueError(
            f"{self._mirror.url}: another process ({holder.get('host')}, pid {holder.get('pid')}) is writing this store; "
            "wait for it, or choose another --out"
        )


def _this_process() -> dict[str, Any]:
    try:  # containers may share a host's name, not its process numbers
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbers = ""
    return {"host": socket.gethostname(), "numbers": numbers, "pid": os.getpid()}


def _on_this_machine(holder: Mapping[str, Any]) -> bool:
    here = _this_process()
    return all(holder.get(key) == here[key] for key in ("host", "numbers"))


def _lives_here(holder: Mapping[str, Any]) -> bool:
    """Whether `holder` is a process of this machine that is running, or a lock that this process still holds."""
    if not _on_this_machine(holder):
        return False
    if holder["pid"] == os.getpid():
        return holder["id"] in {lock.id for lock in _held.values()}
    try:
        if os.name == "posix":  # elsewhere, this signal would not merely ask
            os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def checksum_in(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-CHECKSUM_BYTES, os.SEEK_END)
        return file.read()


def _seal(group: bytes) -> str | None:
    """The digest that a zarr.json is sealed under, or None."""
    try:
        return json.loads(group)["attributes"]["featcache"]["sealed"]["digest"]
    except (ValueError, KeyError, TypeError):
        return None
