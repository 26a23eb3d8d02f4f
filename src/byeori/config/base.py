"""Every setting, declared once: its type, default, bounds and help text.

The command line, the YAML file, the Python API and the table in the README are all made from these classes: here is
what they share, `training` and `results` hold the settings themselves.
Values from a command line or a YAML file arrive as text and are converted here; lists are taken with or without
quotes and brackets, also when the shell has split them (`[q_proj, v_proj]` and `["q_proj", "v_proj"]` are equal).
"""

from __future__ import annotations

import re
import typing
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from byeori.errors import ConfigError
from byeori.support.suggestions import nearest
from byeori.support.yaml_files import yaml_mapping

_FIRST = ("base_model", "data_path", "output_dir")  # of every list of settings


def parse_names(value: object) -> object:
    """`"[a, 'b' c]"` or `["[a,", "'b'", "c]"]` -> `["a", "b", "c"]`; other values are left to pydantic."""
    if isinstance(value, str):
        return [name for name in re.split(r"[\s,\[\]\"']+", value) if name]
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return parse_names(" ".join(value))
    return value


def none_from_text(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in {"none", "null", ""} else value


def _paths(value: object) -> object:
    return [str(value)] if isinstance(value, (str, Path)) else value


def _named(paths: list[str]) -> list[str]:
    if not all(path.strip() for path in paths):
        raise ValueError("an empty name is no path; name a file, a folder or a dataset")
    return paths


def on_off(value: object) -> object:
    """The words on and off, which YAML reads as true and false; also in a list."""
    if isinstance(value, list):
        return [on_off(item) for item in value]
    return ("on" if value else "off") if isinstance(value, bool) else value


def recompute_kind(value: object) -> object:
    """True and False, as this setting was once given, are full and none."""
    text = str(value).strip().lower()
    return "full" if text in ("true", "1", "yes", "on") else "none" if text in ("false", "0", "no", "off") else value


def _count_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("neither a fraction below 1 nor a whole count")
    return value


Names = Annotated[list[str], BeforeValidator(parse_names)]
Paths = Annotated[list[str], BeforeValidator(_paths), AfterValidator(_named)]
HeldOut = Annotated[float, AfterValidator(_count_or_share)]
OptionalInt = Annotated[int | None, BeforeValidator(none_from_text)]
OptionalText = Annotated[str | None, BeforeValidator(none_from_text)]

Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(on_off)]
Recompute = Annotated[Literal["auto", "none", "selective", "full", "offload"], BeforeValidator(recompute_kind)]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class Settings(BaseModel):
    """Base of all settings: unknown names are refused, values cannot change once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _paths_are_text(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: [_place(item) for item in value]
            if isinstance(value, (list, tuple))
            else _place(value)
            if name != "raw"
            else value
            for name, value in values.items()
        }


def _place(value: object) -> object:
    """A path as text; `~/` is the user's home, which a shell does not see in `--name=~/x`, nor YAML anywhere."""
    if isinstance(value, PurePath):
        return str(value)
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


S = TypeVar("S", bound=Settings)


def check(kind: type[S], values: dict[str, Any]) -> S:
    """Make settings from loose values.

    Raises:
        ConfigError: one sentence that names every setting that is wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(kind, item) for item in error.errors())) from None


def _sentence(kind: type[Settings], item: Any) -> str:
    name = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "missing":
        return f"--{name} is missing: {str(kind.model_fields[name].description).rstrip('.')}"
    if item["type"] == "extra_forbidden":
        return f"there is no setting {name!r}{nearest(name, list(kind.model_fields))}"
    message = item["msg"].removeprefix("Value error, ")
    if not name:
        return message
    if item["type"].startswith("bool"):
        return f"--{name} {item['input']!r}: give True or False"
    return f"--{name} {_short(item['input'])}: {message[0].lower()}{message[1:]}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def read_yaml(path: str, kind: type[Settings] | None = None) -> dict[str, Any]:
    """Settings from a YAML file (safe loading only). kind: whose names are the only ones allowed.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or a name in it that is unknown or there twice.
    """
    loaded = yaml_mapping(path, what="settings", advice="write one `name: value` a line")
    values = {str(name).replace("-", "_"): value for name, value in loaded.items()}
    values.pop("row_kind", None)  # which byeori.yaml records with the settings of a run
    if twice := [name for name in loaded if "-" in str(name) and str(name).replace("-", "_") in loaded]:
        both = ", ".join(f"{name} and {name.replace('-', '_')}" for name in twice)
        raise ConfigError(f"{path} has one setting under two names ({both}); keep one of them")
    there = [field.alias or name for name, field in kind.model_fields.items()] if kind else list(values)
    unknown = [f"{name!r}{nearest(name, there)}" for name in values if name not in there]
    if unknown:
        raise ConfigError(
            f"{path} names no setting with {', '.join(unknown)}; the settings are in `byeori COMMAND --help`"
        )
    return values


def recorded(settings: Settings) -> dict[str, Any]:
    """Return every setting by name, as a run records them and `--config` reads them."""
    return settings.model_dump(by_alias=True, exclude={"overwrite_output_dir"})  # nobody deletes a run by its own file


def write_yaml(settings: Settings, path: Path) -> None:
    """Write every setting with its value, as `--config` reads them."""
    import yaml

    text = yaml.safe_dump(recorded(settings), allow_unicode=True, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def in_order(kind: type[Settings]) -> dict[str, FieldInfo]:
    """Settings by name as they are shown: the model, the rows and where it all goes, then the others."""
    there = kind.model_fields
    needed = [name for name, field in there.items() if field.is_required()]
    first = [*(name for name in needed if name not in _FIRST), *(name for name in _FIRST if name in there)]
    return {name: there[name] for name in dict.fromkeys([*first, *there])}


def choices(annotation: Any) -> list[str]:
    """The words that a setting takes where it takes only some."""
    if annotation is bool:
        return ["True", "False"]
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return list(map(str, parts))
    return [word for part in parts for word in choices(part)]


def words(field: FieldInfo) -> str:
    """What a setting does, and its values where it takes only some."""
    found = [] if field.annotation is bool else choices(field.annotation)
    return f"{field.description} One of {', '.join(found)}." if found else str(field.description)


def table(kind: type[Settings], *, besides: type[Settings] | None = None) -> str:
    """A Markdown table of the settings: name, default, what it does. besides: only what `kind` has and that has not."""
    rows = ["| setting | default | what it does |", "|---|---|---|"]
    known = besides.model_fields if besides else {}
    for name, field in in_order(kind).items():
        if name in known and known[name].default == field.default:
            continue
        default = "required" if field.is_required() else f"`{_show(field.default)}`"
        rows.append(f"| `--{field.alias or name}` | {default} | {words(field)} |")
    return "\n".join(rows)


def _show(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
