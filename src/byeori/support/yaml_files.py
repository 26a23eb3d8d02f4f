"""YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byeori.errors import ConfigError
from byeori.support.suggestions import nearest_file
from byeori.support.text_files import read_text


def yaml_mapping(path: str | Path, *, what: str, advice: str) -> dict[Any, Any]:
    """Return the mapping in a YAML file (safe loading only). what, advice: for errors: what it holds, how to write it.

    Raises:
        ConfigError: if the file is missing, not UTF-8, not YAML or not a mapping.
    """
    import yaml

    try:
        loaded = yaml.safe_load(read_text(Path(path), ConfigError))
    except OSError as error:
        near = "" if Path(path).exists() else nearest_file(Path(path))
        raise ConfigError(f"cannot read the {what} file {path}{near}: {error.strerror}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path} is not valid YAML{line}; {advice}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no {what}; {advice}")
    return loaded
