"""What all settings share: how one is declared, how text becomes a value, and the sentences for wrong values.

Values from a command line or a YAML file arrive as text and are converted here. Lists are accepted with or without
quotes and brackets, also when the shell has split them (`[q_proj, v_proj]` and `["q_proj", "v_proj"]` are equal).
"""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path, PurePath
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from byeori.errors import ConfigError
from byeori.support.language import catalogue, chosen
from byeori.support.suggestions import nearest
from byeori.support.text_files import redacted
from byeori.support.yaml_files import yaml_mapping

# Groups of settings, in the order in which help shows them.
GROUPS = (
    "essentials",
    "LoRA",
    "data",
    "optimisation",
    "memory",
    "evaluation and saving",
    "generation",
    "logging",
    "expert",
)
ESSENTIAL, LORA, DATA, OPTIMISATION, MEMORY, SAVING, GENERATION, LOGGING, EXPERT = GROUPS
_FIRST = ("base_model", "data_path", "output_dir")  # of every list of settings


def setting(
    description: str,
    default: Any,
    group: str,
    *,
    alone: str | None = None,
    metavar: str | None = None,
    **bounds: Any,
) -> Any:
    """Declare a setting.

    description: what it does; `--help` shows the first sentence only. default: ... if it is required. group: one of
    GROUPS. alone: the value of its flag without a value. metavar: what `--help` calls its value. bounds: as for
    pydantic.Field.
    """
    extra: Any = {"group": group, "alone": alone} | ({"metavar": metavar} if metavar else {})
    return Field(default, description=description, json_schema_extra=extra, **bounds)


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


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _named(paths: list[str]) -> list[str]:
    if not all(path.strip() for path in paths):
        raise ValueError("an empty name is not a path; give a file, a folder or a dataset")
    return paths


def on_off(value: object) -> object:
    """Turn true and false, which YAML makes of the words on and off, back into these words; also in a list."""
    if isinstance(value, list):
        return [on_off(item) for item in value]
    return ("on" if value else "off") if isinstance(value, bool) else value


def token_texts(value: object) -> object:
    """`"<tool> [end]"` -> `["<tool>", "[end]"]`, `'["a b"]'` -> `["a b"]`; other values are left to pydantic."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith('["'):
        return from_json(value)
    return [] if value.strip() == "none" else value.split()


def from_json(value: object) -> object:
    """Return what JSON text holds; other values are left to pydantic."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("give JSON, such as '{\"enable_thinking\": false}'") from None


def recompute_kind(value: object) -> object:
    """Accept True and False, the values of older versions, as full and none."""
    text = str(value).strip().lower()
    return "full" if text in ("true", "1", "yes", "on") else "none" if text in ("false", "0", "no", "off") else value


def _count_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("give a fraction below 1 or a whole number of rows")
    return value


def column_names(value: object) -> object:
    """`["prompt=질문"]` or `"prompt=질문"` -> `{"prompt": "질문"}`; other values are left to pydantic."""
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)):
        return value
    pairs = [str(word).partition("=") for word in words]
    if not all(name and column for name, _, column in pairs):
        raise ValueError("give NAME=COLUMN, such as prompt=질문")
    return {name.strip(): column.strip() for name, _, column in pairs}


Names = Annotated[list[str], BeforeValidator(parse_names)]
Tokens = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(token_texts), "TOKEN"]
Paths = Annotated[list[str], BeforeValidator(_paths), AfterValidator(_named), "PATH"]
Texts = Annotated[list[str], BeforeValidator(_texts), "TEXT"]
Columns = Annotated[dict[str, str], BeforeValidator(column_names), "NAME=COLUMN"]
HeldOut = Annotated[float, AfterValidator(_count_or_share)]
OptionalInt = Annotated[int | None, BeforeValidator(none_from_text)]
OptionalFloat = Annotated[float | None, BeforeValidator(none_from_text)]
OptionalText = Annotated[str | None, BeforeValidator(none_from_text)]
# a text in Annotated is what help shows for the value
Model = Annotated[str, Field(min_length=1), "MODEL"]
Models = Annotated[list[str], BeforeValidator(_paths), AfterValidator(_named), "MODEL"]
Folder = Annotated[str, Field(min_length=1), "PATH"]
Name = Annotated[str, "NAME"]
OptionalModel = Annotated[OptionalText, "MODEL"]
OptionalPath = Annotated[OptionalText, "PATH"]
OptionalName = Annotated[OptionalText, "NAME"]

Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(on_off)]
Recompute = Annotated[Literal["auto", "none", "selective", "full", "offload"], BeforeValidator(recompute_kind)]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class Settings(BaseModel):
    """Base of all settings: unknown names are errors, and values do not change after validation.

    inputs: settings that a command line may give without their flags, in this order. own_flags: the setting whose
    keys are flags of their own, for those that no setting has.
    """

    inputs: ClassVar[tuple[str, ...]] = ()
    own_flags: ClassVar[str | None] = None
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @property
    def without_effect(self) -> set[str]:
        """Settings that do nothing beside the others."""
        return set()

    @model_validator(mode="before")
    @classmethod
    def _paths_are_text(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: value
            if name in ("raw", "input_text")
            else [_expand(item) for item in value]
            if isinstance(value, (list, tuple))
            else _expand(value)
            for name, value in values.items()
        }


def _expand(value: object) -> object:
    """Return a path as text, with `~/` expanded, which a shell does not do in `--name=~/x`, nor YAML anywhere."""
    if isinstance(value, PurePath):
        return str(value)
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


S = TypeVar("S", bound=Settings)


def check(kind: type[S], values: dict[str, Any]) -> S:
    """Return validated settings.

    Raises:
        ConfigError: if a setting is missing, unknown or wrong; the sentence names every one of them.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(kind, item) for item in error.errors())) from None
    except UnicodeEncodeError as error:  # of a name that is not UTF-8, in a setting that is compared with a pattern
        raise ConfigError(f"a setting holds bytes that are no text: {error.object[:80]!r}; give it as UTF-8") from None


def _sentence(kind: type[Settings], item: Any) -> str:
    name = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "missing":
        text = summary(kind.model_fields[name])
        if chosen() == "ko":
            text = korean(kind.__name__.removesuffix("Settings").lower(), name).split(". ")[0].rstrip(".")
        return f"--{name} is missing: {text}"
    if item["type"] == "extra_forbidden":
        return f"there is no setting {name!r}{nearest(name, list(kind.model_fields))}"
    message = item["msg"].removeprefix("Value error, ")
    if not name:
        return message
    if item["type"].startswith("bool"):
        return f"--{name} {item['input']!r}: give True or False"
    near = nearest(str(item["input"]), choices(kind.model_fields[name].annotation)) if name in kind.model_fields else ""
    return f"--{name} {_short(item['input'])}{near}: {message[0].lower()}{message[1:]}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def read_yaml(path: str, kind: type[Settings] | None = None) -> dict[str, Any]:
    """Return the settings in a YAML file (safe loading only). kind: the only settings that are allowed in it.

    Raises:
        ConfigError: if the file is missing, is not a YAML mapping, or holds a name that is unknown or given twice.
    """
    loaded = yaml_mapping(path, what="settings", advice="write one `name: value` a line")
    values = {str(name).replace("-", "_"): value for name, value in loaded.items()}
    values.pop("row_kind", None)  # which byeori.yaml records with the settings of a run
    if twice := [name for name in loaded if "-" in str(name) and str(name).replace("-", "_") in loaded]:
        both = ", ".join(f"{name} and {name.replace('-', '_')}" for name in twice)
        raise ConfigError(f"{path} has the same setting twice ({both}); keep one of them")
    known = [field.alias or name for name, field in kind.model_fields.items()] if kind else list(values)
    unknown = [f"{name!r}{nearest(name, known)}" for name in values if name not in known]
    if unknown:
        raise ConfigError(
            f"{path} has unknown settings: {', '.join(unknown)}; `byeori COMMAND --help-all` lists the known ones"
        )
    return values


def recorded(settings: Settings) -> dict[str, Any]:
    """Return the settings by name, as a run records them and `--config` reads them; passwords in URLs are left out.

    Those that have no effect are not among them.
    """
    # overwrite_output_dir is left out: repeating a run with its own file must not delete it
    values = settings.model_dump(by_alias=True, exclude={"overwrite_output_dir", *settings.without_effect})
    return {name: _without_passwords(value) for name, value in values.items()}


def _without_passwords(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_passwords(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def write_yaml(settings: Settings, path: Path) -> None:
    """Write every setting with its value, as `--config` reads them."""
    import yaml

    text = yaml.safe_dump(recorded(settings), allow_unicode=True, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def in_order(kind: type[Settings]) -> dict[str, FieldInfo]:
    """Return the settings by name in the order of display: the model, the data, the output, then the others."""
    fields = kind.model_fields
    needed = [name for name, field in fields.items() if field.is_required()]
    first = [*(name for name in needed if name not in _FIRST), *(name for name in _FIRST if name in fields)]
    return {name: fields[name] for name in dict.fromkeys([*first, *fields])}


def about(kind: type[Settings]) -> str:
    """Return what the command of these settings does."""
    return (kind.__doc__ or "").partition(": ")[2].rstrip(".")


def choices(annotation: Any) -> list[str]:
    """Return the values of a setting that accepts only certain ones, else an empty list."""
    if annotation is bool:
        return ["True", "False"]
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return list(map(str, parts))
    return [word for part in parts for word in choices(part)]


def is_list(annotation: Any) -> bool:
    """Return whether a command line gives a setting as several words: a list (or None), or names with their texts."""
    if typing.get_origin(annotation) is dict:
        return typing.get_args(annotation)[1:] != (Any,)
    return typing.get_origin(annotation) is list or any(is_list(part) for part in typing.get_args(annotation))


def extra(field: FieldInfo, name: Literal["group", "alone"]) -> str | None:
    """Return what `setting` declared beside the type, default and description."""
    declared = field.json_schema_extra
    return typing.cast("str | None", declared.get(name)) if isinstance(declared, dict) else None


def alone(field: FieldInfo) -> str | None:
    """Return the value of a flag that is given without one, or None if the flag needs a value."""
    return "True" if field.annotation is bool else extra(field, "alone")


def metavar(field: FieldInfo) -> str | None:
    """Return what help shows for a value (MODEL, PATH, NAME), if the type of the setting says it."""
    inside = [item for part in typing.get_args(field.annotation) for item in getattr(part, "__metadata__", ())]
    return next((item for item in (*field.metadata, *inside) if isinstance(item, str)), None)


def summary(field: FieldInfo) -> str:
    """Return the first sentence of what a setting does, without its full stop."""
    return str(field.description).split(". ")[0].rstrip(".")


def korean(command: str, name: str) -> str:
    """Return what a setting of a command does, in Korean."""
    texts, name = catalogue("byeori.config"), {"json": "json_output", "for": "order"}.get(name, name)
    return texts.get(command, {}).get(name) or texts["every command"][name]


def shown(value: object) -> str:
    """Return a default as the command line and a YAML file accept it."""
    if isinstance(value, (list, dict)):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
