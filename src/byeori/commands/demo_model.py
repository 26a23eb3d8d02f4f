"""`byeori demo-model`: print the folder of the embedded model, which is unpacked on first use."""

from __future__ import annotations

from pathlib import Path

from byeori.config import DemoModelSettings
from byeori.model import demo_model as embedded
from byeori.support import console
from byeori.support.console import say


@console.quiet_libraries()
def demo_model(settings: DemoModelSettings | None = None) -> Path:
    """Return the folder of the embedded model. settings: it has none.

    Raises:
        ModelError: if the extra `demo` is not installed.
    """
    return embedded.embedded_model(say)
