"""`byeori demo-model`: print the folder of the embedded model, which is made on the first call."""

from __future__ import annotations

from pathlib import Path

from byeori.model import demo_model as embedded
from byeori.support import console
from byeori.support.console import say


@console.quiet_libraries()
def demo_model() -> Path:
    """Return the folder of the embedded model.

    Raises:
        ModelError: if the extra `demo` is not installed.
    """
    return embedded.embedded_model(say)
