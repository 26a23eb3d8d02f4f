"""`byeori studio`: the local page. It stands above this folder, whose commands it starts as processes of their own."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from byeori.config import StudioSettings
from byeori.errors import ConfigError


def studio(settings: StudioSettings) -> None:
    """Serve the page until Ctrl-C. Runs that it started go on.

    Raises:
        ConfigError: if the extra is not installed, the folder does not exist, or the port is taken.
    """
    for module in ("starlette", "uvicorn", "python_multipart"):
        if find_spec(module) is None:
            raise ConfigError("the page needs the extra studio; pip install '.[studio]' in byeori's checkout")
    importlib.import_module("byeori.studio.server").serve(settings)
