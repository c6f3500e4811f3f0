"""A language model's head, beside the stores of its hidden states: with both, its logits are known, and no teacher is asked."""

import logging
from pathlib import Path

import numpy as np

from featcache.disk.durable import appearing
from featcache.disk.refusals import writing
from featcache.disk.urls import asking_service, is_url, open_filesystem
from featcache.encoder import Encoder
from featcache.head import Head
from featcache.store import FeatureStore
from featcache.store.layout import HIDDEN

log = logging.getLogger("featcache")


def head_beside(store: FeatureStore) -> str:
    """Where the head of a store's encoder lies: `NAME.zarr.head.safetensors`."""
    return f"{store.path}.head.safetensors"


def head_file(encoder: Encoder, fields: tuple[str, ...]) -> bytes | None:
    """The head that reads hidden states, in fp32, as `Head.read` reads it; None where there is none, or they are not among `fields`.
    The encoder is left in fp32."""
    if HIDDEN not in fields or encoder.token_head is None:
        return None
    head = encoder.to(encoder.device).token_head
    assert head is not None
    weight = head.weight.detach().cpu().numpy()
    bias = np.zeros(len(weight), np.float32) if head.bias is None else head.bias.detach().cpu().numpy()
    return Head(weight, bias, np.arange(len(bias)), fingerprint=encoder.fingerprint).to_bytes(encoder=encoder.name)


def write_head(store: FeatureStore, content: bytes, *, overwrite: bool) -> None:
    """Write the head beside the store, unless it is there. Another file that is there stays, with a warning, but where it is to be
    replaced."""
    place = head_beside(store)
    with writing(place):
        there = _there(place)
        if there is None or (overwrite and there != content):
            _write(place, content)
        elif there != content:
            log.warning("%s: is not the head of %s; remove it, and extract again", place, store.encoder_name)


def _there(place: str) -> bytes | None:
    if not is_url(place):
        return Path(place).read_bytes() if Path(place).exists() else None
    filesystem, path = open_filesystem(place)
    with asking_service(path):
        return bytes(filesystem.cat_file(path)) if filesystem.exists(path) else None


def _write(place: str, content: bytes) -> None:
    if is_url(place):
        filesystem, path = open_filesystem(place)
        with asking_service(path):
            filesystem.pipe_file(path, content)
    else:
        with appearing(Path(place), folder=False, making_room=lambda: Path(place).unlink(missing_ok=True)) as building:
            building.write_bytes(content)
