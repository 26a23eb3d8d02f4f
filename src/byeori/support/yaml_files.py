"""YAML files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from byeori.errors import ConfigError
from byeori.support.suggestions import nearest_file
from byeori.support.text_files import one_line, read_text

_MOST_VALUES = 100_000


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
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply; {advice}") from None
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError) as error:  # a month 13, an unhashable name
        raise ConfigError(f"{path} has a value that YAML cannot read ({one_line(error, 100)}); {advice}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path} is not valid YAML{line}; {advice}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no {what}; {advice}")
    if _size(loaded, {}) > _MOST_VALUES:
        raise ConfigError(f"{path} has more than {_MOST_VALUES:,} values once its aliases are written out; {advice}")
    return loaded


def yaml_text(values: dict[str, Any]) -> str:
    """Return YAML, with text of several lines as it is."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump(values, Dumper=Dumper, allow_unicode=True, sort_keys=False)


def _size(value: Any, known: dict[int, float]) -> float:
    """Return how many values there would be if aliases were copies; one that contains itself has no end."""
    if not isinstance(value, (dict, list, set, tuple)):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # of an alias to what it is part of
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(item, known) for item in items)
    return known[id(value)]
