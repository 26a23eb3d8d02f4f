"""The folder for everything that is made once: kernels, the embedded model, reference log-probs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $BYEORI_CACHE, or ~/.cache/byeori."""
    return Path(os.environ.get("BYEORI_CACHE", Path.home() / ".cache" / "byeori"))
