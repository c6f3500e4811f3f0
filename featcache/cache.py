"""Where stores live when nobody says where."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def cache_home() -> Path:
    """$FEATCACHE_HOME, by default ~/.cache/featcache."""
    return Path(os.environ.get("FEATCACHE_HOME") or Path.home() / ".cache" / "featcache")


def default_store_path(manifest: Mapping[str, Any]) -> Path:
    """A path named by what the store will hold: encoder, corpus, views and fields."""
    encoder, corpus = manifest["encoder"], manifest["corpus"]
    identity = [encoder["fingerprint"], corpus["digest"], manifest["views"], manifest["fields"]]
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=6).hexdigest()
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in encoder["name"])[:80]
    return cache_home() / "stores" / f"{name}-{digest}.zarr"
