"""Where featcache keeps what it makes for itself."""

import os
from pathlib import Path


def cache_home() -> Path:
    """$FEATCACHE_HOME, by default ~/.cache/featcache."""
    return Path(os.environ.get("FEATCACHE_HOME") or Path.home() / ".cache" / "featcache")
