"""YAML files, read safely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byeori.errors import ConfigError
from byeori.support.text_files import read_text


def yaml_mapping(path: str | Path, *, what: str, advice: str) -> dict[Any, Any]:
    """What a YAML file holds (safe loading only). what, advice: what it should hold, and how to write that.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, not a mapping.
    """
    import yaml

    try:
        loaded = yaml.safe_load(read_text(Path(path), ConfigError))
    except OSError as error:
        raise ConfigError(f"cannot read the {what} file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path} is not valid YAML{line}; {advice}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no {what}; {advice}")
    return loaded
