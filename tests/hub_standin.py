"""A stand-in of the Hugging Face hub's HTTP API on loopback, as `huggingface_hub`, `timm` and `datasets` speak to it: repositories
with commits and branches, large files by LFS, tokens, and whatever goes wrong on request."""

import base64
import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flask
import pytest
from werkzeug.serving import make_server

TOKEN, STRANGER, UNKNOWN = "hf_OwnSecretOfMine", "hf_SecretOfAStranger", "hf_NobodyKnowsThis"
USERS = {TOKEN: "me", STRANGER: "stranger"}
CLIENTS_OWN = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""What huggingface_hub's upload warns of, of its own code."""
LARGE = ("*.safetensors", "*.parquet")
"""What goes by LFS."""


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}\0{branch}\0{sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        oid = {**self.tags, **self.branches}.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else refuse(404, "RevisionNotFound", "no such revision")


@dataclass
class Failure:
    """Requests of this method and path are answered so, as often as said, once as many as `after` have passed."""

    method: str
    path: str
    status: int
    times: int = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    meanwhile: Any = None


def refuse(status: int, code: str, message: str) -> Any:
    flask.abort(
        flask.Response(json.dumps({"error": message}), status, {"X-Error-Code": code, "X-Error-Message": message})
    )


class Hub:
    """Attributes:
    repositories: by kind and name. lfs: uploaded content by sha256. requests: "METHOD path" of each. failures: to come."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[Failure] = []
        self.app = flask.Flask("hub")
        self.app.before_request(self._before)
        for rule, methods, view in (
            ("/", ["GET"], lambda: "hub"),
            ("/api/repos/create", ["POST"], self.create),
            ("/api/validate-yaml", ["POST"], lambda: {"errors": [], "warnings": []}),
            ("/api/<kind>s/<user>/<name>", ["GET"], self.info),
            ("/api/<kind>s/<user>/<name>/revision/<path:revision>", ["GET"], self.info),
            ("/api/<kind>s/<user>/<name>/refs", ["GET"], self.refs),
            ("/api/<kind>s/<user>/<name>/tree/<revision>", ["GET"], self.tree),
            ("/api/<kind>s/<user>/<name>/tree/<revision>/<path:under>", ["GET"], self.tree),
            ("/api/<kind>s/<user>/<name>/paths-info/<revision>", ["POST"], self.paths_info),
            ("/api/<kind>s/<user>/<name>/branch/<branch>", ["POST"], self.branch),
            ("/api/<kind>s/<user>/<name>/preupload/<revision>", ["POST"], self.preupload),
            ("/api/<kind>s/<user>/<name>/commit/<revision>", ["POST"], self.commit),
            ("/<user>/<name>.git/info/lfs/objects/batch", ["POST"], self.batch),
            ("/datasets/<user>/<name>.git/info/lfs/objects/batch", ["POST"], self.batch),
            ("/lfs/<oid>", ["PUT"], self.upload),
            ("/<user>/<name>/resolve/<revision>/<path:path>", ["GET"], self.resolve),
            ("/datasets/<user>/<name>/resolve/<revision>/<path:path>", ["GET"], self.resolve),
        ):
            name = f"{rule} {methods}"
            self.app.add_url_rule(rule, name, view, methods=methods)

    @contextmanager
    def served(self) -> Iterator[str]:
        server = make_server("127.0.0.1", 0, self.app, threaded=True)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def fail(self, method: str, path: str, status: int, **rest: Any) -> None:
        self.failures.append(Failure(method, path, status, **rest))

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> None:
        """A public repository of somebody's with these files."""
        self.repositories[kind, name] = Repository(private=False)
        self.repositories[kind, name].commit("main", files, "theirs")

    def files(self, kind: str, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repositories[kind, name].at(revision)[1]

    def head(self, kind: str, name: str, revision: str = "main") -> str:
        return self.repositories[kind, name].branches[revision]

    def asked(self, pattern: str) -> list[str]:
        return fnmatch.filter(self.requests, pattern)

    # -- the API --------------------------------------------------------------------------------------------

    def _before(self) -> Any:
        request = flask.request
        self.requests.append(f"{request.method} {request.path}")
        for failure in self.failures:
            if failure.times and request.method == failure.method and fnmatch.fnmatch(request.path, failure.path):
                if failure.after:
                    failure.after -= 1
                    continue
                failure.times -= 1
                if failure.meanwhile:
                    failure.meanwhile()
                    return None
                return flask.Response("{}", failure.status, failure.headers)
        return None

    def _user(self) -> str:
        """Who asks; "" for nobody in particular."""
        token = flask.request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in USERS:
            refuse(401, "", "Invalid credentials in Authorization header")
        return USERS.get(token, "")

    def _readable(self, kind: str, user: str, name: str) -> Repository:
        found, asks = self.repositories.get((kind, f"{user}/{name}")), self._user()
        if found is None or (found.private and asks != user):
            refuse(404 if asks else 401, "RepoNotFound", "Repository not found")
        assert found
        return found

    def _writable(self, kind: str, user: str, name: str) -> Repository:
        found = self._readable(kind, user, name)
        if self._user() != user:
            refuse(403, "", f"You don't have the rights to write to {user}/{name}")
        return found

    def create(self) -> Any:
        given = flask.request.get_json()
        asks, user = self._user(), given["organization"]
        if not asks:
            refuse(401, "", "Invalid username or password.")
        if user != asks:
            refuse(403, "", f'You don\'t have the rights to create a model under the namespace "{user}"')
        key = (given.get("type") or "model", f"{user}/{given['name']}")
        if key in self.repositories:
            return {"error": "You already created this repo", "url": f"{flask.request.host_url}{key[1]}"}, 409
        private = given.get("private") is True or given.get("visibility") == "private"
        self.repositories[key] = Repository(private=private)
        self.repositories[key].commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return {"url": f"{flask.request.host_url}{key[1]}", "name": key[1]}

    def info(self, kind: str, user: str, name: str, revision: str = "main") -> Any:
        repository = self._readable(kind, user, name)
        oid, files = repository.at(revision)
        siblings = [{"rfilename": path} for path in files]
        return {"id": f"{user}/{name}", "sha": oid, "private": repository.private, "siblings": siblings, "tags": []}

    def refs(self, kind: str, user: str, name: str) -> Any:
        repository = self._readable(kind, user, name)
        named = [("branches", "heads", repository.branches), ("tags", "tags", repository.tags)]
        return {"converts": []} | {
            key: [{"name": each, "ref": f"refs/{ref}/{each}", "targetCommit": oid} for each, oid in of.items()]
            for key, ref, of in named
        }

    def tree(self, kind: str, user: str, name: str, revision: str, under: str = "") -> Any:
        files = self._readable(kind, user, name).at(revision)[1]
        inside = {path: data for path, data in files.items() if not under or path.startswith(f"{under}/")}
        if under and not inside:
            refuse(404, "EntryNotFound", "no such folder")
        if flask.request.args.get("recursive", "").lower() == "true":
            return flask.jsonify([_entry(path, data) for path, data in inside.items()])
        depth = len(under) + 1 if under else 0
        folders = sorted({path[: path.index("/", depth)] for path in inside if "/" in path[depth:]})
        here = [_entry(path, data) for path, data in inside.items() if "/" not in path[depth:]]
        return flask.jsonify(
            [{"type": "directory", "path": each, "oid": "0" * 40, "size": 0} for each in folders] + here
        )

    def paths_info(self, kind: str, user: str, name: str, revision: str) -> Any:
        files = self._readable(kind, user, name).at(revision)[1]
        given = flask.request.get_json(silent=True) or {"paths": flask.request.form.getlist("paths")}
        found = []
        for path in given["paths"]:
            if path in files:
                found.append(_entry(path, files[path]))
            elif any(each.startswith(f"{path}/") for each in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return flask.jsonify(found)

    def branch(self, kind: str, user: str, name: str, branch: str) -> Any:
        repository = self._writable(kind, user, name)
        if branch in repository.branches:
            return {"error": "Reference already exists"}, 409
        start = (flask.request.get_json(silent=True) or {}).get("startingPoint", "main")
        repository.branches[branch] = repository.at(start)[0]
        return {}

    def preupload(self, kind: str, user: str, name: str, revision: str) -> Any:
        files = self._writable(kind, user, name).at(revision)[1]
        told = [
            {
                "path": (path := each["path"]),
                "uploadMode": "lfs" if _large(path) else "regular",
                "shouldIgnore": False,
                "oid": _oid(path, files[path]) if path in files else None,
            }
            for each in flask.request.get_json()["files"]
        ]
        return {"files": told}

    def batch(self, user: str, name: str) -> Any:
        self._writable("dataset" if flask.request.path.startswith("/datasets/") else "model", user, name)
        objects: list[dict[str, Any]] = []
        for each in flask.request.get_json()["objects"]:
            href = f"{flask.request.host_url}lfs/{each['oid']}?X-Amz-Signature=SignedInSecret"
            there = each["oid"] in self.lfs
            objects.append(each if there else {**each, "actions": {"upload": {"href": href}}})
        return {"transfer": "basic", "objects": objects}

    def upload(self, oid: str) -> Any:
        data = flask.request.get_data()
        assert hashlib.sha256(data).hexdigest() == oid
        assert "Authorization" not in flask.request.headers  # it is for another host
        self.lfs[oid] = data
        return ""

    def commit(self, kind: str, user: str, name: str, revision: str) -> Any:
        repository = self._writable(kind, user, name)
        head, before = repository.at(revision)
        files, message = dict(before), ""
        for line in flask.request.get_data().splitlines():
            what, value = (record := json.loads(line))["key"], record["value"]
            if what == "header":
                message = value["summary"]
                if value.get("parentCommit", head) != head:
                    refuse(412, "", "A commit has happened since. Please refresh and try again.")
            elif what == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif what == "lfsFile":
                if value["oid"] not in self.lfs:
                    refuse(400, "", "LFS pointer pointed to a file that does not exist")
                files[value["path"]] = self.lfs[value["oid"]]
            elif what == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(revision, files, message)
        return {"commitOid": oid, "commitUrl": f"{flask.request.host_url}{user}/{name}/commit/{oid}"}

    def resolve(self, user: str, name: str, revision: str, path: str) -> Any:
        kind = "dataset" if flask.request.path.startswith("/datasets/") else "model"
        oid, files = self._readable(kind, user, name).at(revision)
        if path not in files:
            refuse(404, "EntryNotFound", "Entry not found")
        response = flask.Response(files[path], mimetype="application/octet-stream")
        response.headers |= {"X-Repo-Commit": oid, "ETag": f'"{_oid(path, files[path])}"', "Accept-Ranges": "bytes"}
        response.make_conditional(flask.request, accept_ranges=True, complete_length=len(files[path]))
        return response


def _large(path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in LARGE)


def _oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _large(path) else _blob(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    if _large(path):
        sha = hashlib.sha256(data).hexdigest()
        entry |= {"oid": _blob(sha.encode()), "lfs": {"oid": sha, "size": len(data), "pointerSize": 130}}
    return entry


@contextmanager
def hub_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that this process's libraries take for the hub, with a cache of its own; logged in as `me`."""
    from huggingface_hub import constants

    hub = Hub()
    with hub.served() as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in speaks LFS alone
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
