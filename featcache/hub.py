"""The hub that libraries fetch weights and data from: whether it can be reached, before they wait for it."""

import contextlib
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from featcache.public import without_secrets

SECONDS = 8.0
"""For a connection; a slow one is no reason to give up, for the answer is not waited for."""


@contextlib.contextmanager
def fetching(spec: str, failed: str, remedy: str, url: str | None = None) -> Iterator[None]:
    """Around a library's call that may fetch something; where nothing answers, it gets what is in the cache or nothing.

    Args:
        spec, failed: of what is fetched, and that it is not, in words, for the message.
        remedy: what to do without a network.
        url: where the library will look; the Hugging Face hub when None.

    Raises:
        ValueError: the library raised something, in one line.
    """
    from huggingface_hub import constants

    address = url or constants.ENDPOINT
    offline = constants.HF_HUB_OFFLINE and url is None
    fault = "" if offline else unreachable(address)
    try:
        with _from_the_cache() if fault else contextlib.nullcontext():
            yield
    except Exception as error:  # hub, network and cache errors share no base class
        if offline:
            why = "HF_HUB_OFFLINE is set, and they are not in the cache; unset it"
        elif fault:
            why = f"no connection to {_host(address)}: {fault}, and they are not in the cache; connect"
        else:
            why = in_words(error)
        raise ValueError(f"{spec}: {failed} ({why}); {remedy}") from None


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error comes from; None where it comes from none."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return int(response.status_code)
        error = error.__cause__ or error.__context__
    return None


def in_words(error: Exception) -> str:
    """What a library that asks the hub raised, in one line without secrets."""
    status = status_of(error)
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # which says more than "while uploading"
        error = error.__cause__
    kind = type(error).__name__
    if kind == "RepositoryNotFoundError":
        return "no such repository, or one that needs another login; check the name, HF_TOKEN and `hf auth whoami`"
    if kind == "RevisionNotFoundError":
        return "no such branch, tag or commit; leave the revision out for the newest"
    known = {
        401: "the hub does not know this token (401); give HF_TOKEN a valid one, or `hf auth login`",
        403: "this token may not do that (403); give it the right, or take the name of a user or organisation that it may write to",
        429: "the hub asks to wait (429, too many requests); try again in some minutes",
    }
    if status in known:
        return known[status]
    said = " ".join(without_secrets(str(error)).split())
    return f"{kind}: {said[:160]}{'…' if len(said) > 160 else ''}"


def _host(address: str) -> str:
    return urlsplit(address).netloc.rpartition("@")[2]


def unreachable(url: str) -> str:
    """Why no connection to this address can be made, in words; "" when one can, however slow."""
    found: queue.Queue[str] = queue.Queue()
    # Name servers that do not answer are waited for without a limit, so in a thread of its own.
    threading.Thread(target=lambda: found.put(_connect(url)), daemon=True).start()
    seconds = max(SECONDS, float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 0))
    try:
        return found.get(timeout=seconds)
    except queue.Empty:
        return f"no answer in {seconds:g} s"


def _connect(url: str) -> str:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(url, timeout=SECONDS)  # knows the user's proxies and certificates
    except Exception as error:
        slow = "ReadTimeout" in type(error).__name__
        return "" if slow else " ".join(without_secrets(str(error)).split()) or type(error).__name__
    return ""


@contextlib.contextmanager
def _from_the_cache() -> Iterator[None]:
    """The libraries do not try to connect, and do not tell of each attempt."""
    from huggingface_hub import constants

    modules: list[Any] = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before, told = [module.HF_HUB_OFFLINE for module in modules], logging.root.manager.disable
    for module in modules:
        module.HF_HUB_OFFLINE = True
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(told)
        for module, offline in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = offline
