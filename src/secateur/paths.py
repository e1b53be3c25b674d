"""Where secateur keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: ``$SECATEUR_CACHE`` when set, else ``~/.cache/secateur``. It is made when missing."""
    folder = Path(os.environ.get("SECATEUR_CACHE") or Path.home() / ".cache" / "secateur").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
