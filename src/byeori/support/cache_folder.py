"""Where byeori keeps what it makes once."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where byeori keeps what it made once: $BYEORI_CACHE, or ~/.cache/byeori."""
    return Path(os.environ.get("BYEORI_CACHE", Path.home() / ".cache" / "byeori"))
