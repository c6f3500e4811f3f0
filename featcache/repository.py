"""A repository on the Hugging Face hub: pushed whole, in one commit, and fetched once, into the hub's own cache.

The token is the hub's own affair: `HF_TOKEN`, or what `hf auth login` left. It is never asked for, passed on or written here.
"""

import contextlib
import fnmatch
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featcache import hub
from featcache.public import secret_in, without_secrets

CARD = "README.md"
_TEXTS = (".md", ".json", ".jsonl", ".toml")


@dataclass(frozen=True, kw_only=True)
class Repository:
    """`USER/NAME[@REVISION]`.

    Attributes:
        kind: "model" or "dataset".
        revision: a branch, a tag or a commit; "" for main.
    """

    name: str
    kind: str
    revision: str = ""

    @classmethod
    def parse(cls, text: str, kind: str) -> "Repository":
        """Raises ValueError where the text is none."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        match = re.fullmatch(r"([^/@\s]+/[^/@\s]+)(?:@([^@\s]+))?", text)
        try:
            if match is None:
                raise HFValidationError("one slash, no blanks")
            validate_repo_id(match[1])
        except HFValidationError as error:
            why = str(error).partition(": '")[0].rstrip(".")
            raise ValueError(
                f"{text!r} is no repository of the hub ({why}); give USER/NAME, with @REVISION for another than main"
            ) from None
        return cls(name=match[1], kind=kind, revision=match[2] or "")

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        return f"{without_secrets(constants.ENDPOINT)}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push left on the hub.

    Attributes:
        commit: the repository's, in hex.
        files: its files that were pushed, sorted.
        bytes: of them all.
        changed: whether the push made a commit; not where all of it was there already.
    """

    repository: Repository
    commit: str
    files: tuple[str, ...]
    bytes: int
    changed: bool


def require_token(repository: Repository) -> None:
    """Raises ValueError where there is none to push with; what may be written with it, the hub alone knows."""
    from huggingface_hub import get_token

    if not get_token():
        raise ValueError(f"{repository}: no token: set HF_TOKEN, or log in with `hf auth login`")


def push_folder(
    folder: Path,
    repository: Repository,
    *,
    owned: Sequence[str],
    private: bool = False,
    message: str,
    licence: str | None = None,
    overwrite: bool = False,
) -> Pushed:
    """Make the files of a folder those of a repository, which is made where there is none; other files in it stay.

    The large files go first, then one commit shows them all: an interrupted push shows nothing, and the next one does not
    send again what the hub has.

    Args:
        repository: its revision is a branch, which is made where there is none.
        owned: patterns of the files that an earlier push may have left, and which go where the folder has them no more.
        private: of a new repository.
        message: of the commit.
        licence: for the card's metadata, as the hub names it ("apache-2.0").
        overwrite: replace files that are there and differ; the hub keeps the earlier commits, and the metadata that the user
            gave the card stay.

    Raises:
        ValueError: no token (see `require_token`), or none that may write there; the repository is public, and `private` is asked for; it holds
            other files of these names; a text of the folder holds a secret.
        ConnectionError: the hub cannot be reached, asks to wait, or has another push under way.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    require_token(repository)
    api, branch = HfApi(library_name="featcache"), repository.revision or "main"
    if re.fullmatch("[0-9a-f]{40}", branch):
        raise ValueError(f"{branch} is a commit, which stays as it is; give a branch as revision")
    with _writing(repository):
        head, remote, is_new = _there(api, repository, branch, private)
        if licence or (overwrite and CARD in remote):
            _complete_card(
                folder / CARD, replace(repository, revision=head), licence, keep=overwrite and CARD in remote
            )
        _refuse_secrets(folder)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        changed = [name for name, path in files.items() if remote.get(name) not in _digests(path, name in remote)]
        stale = [name for name in remote if name not in files and any(fnmatch.fnmatch(name, each) for each in owned)]
        replaced = [*(name for name in changed if name in remote), *stale]
        if replaced and not (overwrite or is_new):
            raise ValueError(
                f"it holds other files already ({', '.join(replaced[:3])}{', …' if len(replaced) > 3 else ''}); push with "
                "--overwrite for a new commit, which leaves the earlier ones in its history, or to another name or --revision"
            )
        commit = head
        if changed or stale:
            if is_new:
                api.create_branch(
                    repository.name, repo_type=repository.kind, branch=branch, revision=head, exist_ok=True
                )
            commit = api.create_commit(
                repository.name,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name]) for name in changed),
                    *(CommitOperationDelete(path_in_repo=name) for name in stale),
                ],
                commit_message=message,
                repo_type=repository.kind,
                revision=branch,
                parent_commit=head,
            ).oid
    size = sum(path.stat().st_size for path in files.values())
    return Pushed(repository=repository, commit=commit, files=tuple(files), bytes=size, changed=bool(changed or stale))


def fetch_folder(
    repository: Repository, spec: str, patterns: Sequence[str], needed: Sequence[str], *, failed: str, remedy: str
) -> Path:
    """The files of a repository, as they are in the hub's cache; those that are not yet, fetched. The folder's name is the commit.

    Args:
        spec: that the user gave.
        patterns: of the files wanted.
        needed: of these, those that are there or nothing is: where the revision is a commit, they need no network.
        failed, remedy: in words, see `hub.fetching`.

    Raises:
        ValueError: there is no such repository or revision, or neither a network nor the files in the cache.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    if re.fullmatch("[0-9a-f]{40}", repository.revision) and needed:
        of: dict[str, Any] = {"repo_type": repository.kind, "revision": repository.revision}
        cached = [try_to_load_from_cache(repository.name, name, **of) for name in needed]
        if all(isinstance(path, str) for path in cached):
            return Path(str(cached[0])).parent
    with hub.fetching(spec, failed, remedy):
        found = snapshot_download(
            repository.name,
            repo_type=repository.kind,
            revision=repository.revision or None,
            allow_patterns=list(patterns),
            library_name="featcache",
        )
    return Path(found)


def _there(api: Any, repository: Repository, branch: str, private: bool) -> tuple[str, dict[str, str], bool]:
    """The commit that a push goes on from, what git or LFS call the content of each file there, and whether the branch is
    new. A repository that is not there yet is made."""
    from huggingface_hub.errors import RepositoryNotFoundError

    of: dict[str, Any] = {"repo_id": repository.name, "repo_type": repository.kind}
    try:
        info = api.repo_info(**of)
    except RepositoryNotFoundError:
        api.create_repo(**of, private=private, exist_ok=True)
        info = api.repo_info(**of)
    if private and not info.private:
        raise ValueError(
            "it is public already, and --private is for a new one; make it private in its settings on the hub"
        )
    refs = api.list_repo_refs(**of)
    if branch in {each.name for each in refs.tags}:
        raise ValueError(f"{branch} is a tag, which stays where it is; give a branch as revision")
    heads = {each.name: each.target_commit for each in refs.branches}
    head = heads.get(branch, info.sha)
    files = api.list_repo_tree(**of, revision=head, recursive=True)
    digests = {each.path: each.lfs.sha256 if each.lfs else each.blob_id for each in files if hasattr(each, "blob_id")}
    return head, digests, branch not in heads


def _digests(path: Path, wanted: bool) -> tuple[str, ...]:
    """What LFS and what git call this content; nothing where it is not `wanted`."""
    if not wanted:
        return ()
    blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        large = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        while part := file.read(2**20):
            blob.update(part)
    return large, blob.hexdigest()


def _complete_card(card: Path, there: Repository, licence: str | None, *, keep: bool) -> None:
    """Put the licence, and what the user wrote into the metadata of the card that is `there`, into the new card's."""
    from huggingface_hub import hf_hub_download, metadata_load, metadata_save

    ours = metadata_load(card) or {}
    theirs: dict[str, Any] = {}
    if keep:
        earlier = hf_hub_download(
            there.name, CARD, repo_type=there.kind, revision=there.revision, library_name="featcache"
        )
        theirs = metadata_load(earlier) or {}
    metadata_save(card, {**theirs, **ours, **({"license": licence} if licence else {})})


def _refuse_secrets(folder: Path) -> None:
    """Raises ValueError where one of the texts holds one: what is pushed cannot be taken back."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TEXTS and (secret := secret_in(path.read_text(encoding="utf-8"))):
            raise ValueError(
                f"{path.name} would tell {secret}; nothing is pushed: keep credentials in the environment, and make it anew"
            )


@contextlib.contextmanager
def _writing(repository: Repository) -> Iterator[None]:
    """What the hub, its client or the network raise becomes one line, without secrets."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except Exception as error:  # hub, network and cache errors share no base class
        status = hub.status_of(error)
        if status is None and type(error) is ValueError:  # ours
            raise ValueError(f"{repository}: {without_secrets(str(error))}") from None
        again = "push again: what the hub has already is not sent twice"
        if isinstance(error, OfflineModeIsEnabled):
            raise ValueError(f"{repository}: HF_HUB_OFFLINE is set; unset it to push") from None
        if status in (400, 401, 403, 404, 422):
            raise ValueError(f"{repository}: {hub.in_words(error)}") from None
        if status in (409, 412):
            raise ConnectionError(
                f"{repository}: somebody else pushed to it meanwhile ({status}); look, then push again"
            ) from None
        if isinstance(error, OSError) and status is None and error.filename:  # of this disk
            raise
        where = without_secrets(constants.ENDPOINT)
        raise ConnectionError(f"{repository}: {where}: {hub.in_words(error)}; {again}") from None
