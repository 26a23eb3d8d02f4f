"""The command line: parse -> settings -> recipe; nothing else. `--help` does not import torch."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from byeori import __version__, config
from byeori.distributed import launch
from byeori.errors import AGAIN, SAID, ByeoriError, ConfigError, may_speak
from byeori.support.suggestions import nearest

COMMANDS: dict[str, tuple[type[config.Settings] | None, str]] = {
    "sft": (config.SftSettings, "fine-tune a LoRA adapter on prompts and answers"),
    "dpo": (config.DpoSettings, "fine-tune a LoRA adapter to prefer chosen answers to rejected ones"),
    "plan": (config.PlanSettings, "what a run needs, and on which machine, before one is paid for; no GPU needed"),
    "preview": (config.PreviewSettings, "show what the model will see, before any weights are loaded"),
    "merge": (config.MergeSettings, "write an adapter into its base model"),
    "generate": (config.GenerateSettings, "answer a prompt, or every row of a table"),
    "compare": (config.CompareSettings, "base and tuned answer the same rows; a report with intervals"),
    "publish": (config.PublishSettings, "upload a finished adapter or merged model to the Hub"),
    "demo": (config.DemoSettings, "the whole job on the embedded model and the sample rows"),
    "demo-model": (None, "print the folder of the embedded model, made the first time"),
}
# settings that may be given without their flag, in this order
POSITIONAL = {"generate": ["model"], "compare": ["adapter"], "publish": ["folder", "repo_id"]}
_BOOLEANS = {"true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"}
# A process that is not torchrun's first waits so long with its error: the first one says the same, and torchrun then
# ends the others. Only an error of its own is heard.
_OTHERS_WAIT = 5.0


class _Parser(argparse.ArgumentParser):
    """Errors become a ConfigError, one sentence, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, for its help and for completion."""
    parser = _Parser(prog="byeori", description="Fine-tune open language models, and prove that it helped.")
    parser.add_argument("--version", action="version", version=f"byeori {__version__}")
    parser.add_argument("--print-completion", choices=["bash", "zsh", "tcsh"], help="print a shell completion script")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (kind, words) in COMMANDS.items():
        sub = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".", allow_abbrev=False)
        for place in POSITIONAL.get(name, []):
            sub.add_argument(place, nargs="?", metavar=place.upper())
        if kind is not None:
            add_settings(sub, kind)
    return parser


def add_settings(parser: argparse.ArgumentParser, kind: type[config.Settings]) -> None:
    """One flag for each setting; values stay text here and are checked in config.py."""
    parser.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of settings; flags win")
    for name, field in _flags(kind).items():
        default = "" if field.default in (None, [], {}) else f" (default {field.default})"
        words = (config.words(field) + (" (required)" if field.is_required() else default)).replace("%", "%%")
        values: dict[str, Any] = {"help": words, "default": argparse.SUPPRESS}
        if alone := _alone(field):
            metavar = "BOOL" if field.annotation is bool else "VALUE"
            parser.add_argument(f"--{name}", nargs="?", const=alone, metavar=metavar, **values)
        elif _is_list(field.annotation):
            parser.add_argument(f"--{name}", nargs="+", metavar="VALUE", **values)
        else:
            parser.add_argument(f"--{name}", metavar="VALUE", **values)


def _flags(kind: type[config.Settings]) -> dict[str, Any]:
    """Settings by the names of their flags; the columns of a template have flags of their own."""
    return {field.alias or name: field for name, field in config.in_order(kind).items() if name != "columns"}


def _alone(field: Any) -> str | None:
    """What a flag without a value means; None where it needs one."""
    return "True" if field.annotation is bool else (field.json_schema_extra or {}).get("alone")


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list or any(_is_list(part) for part in typing.get_args(annotation))


def normalise(kind: type[config.Settings], arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Flags as argparse takes them, and the `--document TEXT` pairs that no setting is called.

    `--data-path` and `--data_path` are the same flag. A flag's value is joined to it (`--lora_r=-1`), so that values
    may begin with a dash, and a bare true/false flag does not swallow what follows it.

    Raises:
        ConfigError: a column without a value.
    """
    fields = _flags(kind)
    out: list[str] = []
    columns: dict[str, str] = {}
    index = 0
    while index < len(arguments):
        flag, equals, value = arguments[index].partition("=")
        name = flag[2:].replace("-", "_")
        following = arguments[index + 1] if index + 1 < len(arguments) else None
        index += 1
        if not flag.startswith("--") or not name:
            out.append(arguments[index - 1])
            continue
        known = name in fields or name in ("config", "help")
        column = not known and "columns" in kind.model_fields
        if not equals and following is not None and not following.startswith("--"):
            scalar = column or name == "config" or (name in fields and not _is_list(fields[name].annotation))
            if name in fields and _alone(fields[name]):
                scalar = following.lower() in _BOOLEANS | set(typing.get_args(fields[name].annotation))
            if scalar:
                equals, value, index = "=", following, index + 1
        if not column:
            alone = None if equals or name not in fields else _alone(fields[name])
            out.append(f"--{name}={alone}" if alone else f"--{name}{equals}{value}")
        elif not equals:
            raise ConfigError(f"{flag} needs a value: {flag} TEXT or {flag} @file")
        else:
            columns[flag[2:]] = value
    return out, columns


def settings_from(
    kind: type[config.S], parser: argparse.ArgumentParser, arguments: Sequence[str], positional: Sequence[str] = ()
) -> config.S:
    """Flags over the YAML file over the defaults.

    Raises:
        ConfigError: an unknown flag, a name that a flag before it took, or any setting that is wrong.
    """
    flags, columns = normalise(kind, arguments)
    known, rest = parser.parse_known_args(flags)
    values = vars(known)
    path = values.pop("config", None)
    for place in positional:
        if place not in values and rest and not rest[0].startswith("-"):
            values[place] = rest.pop(0)
    if columns and {"data_path", "raw"} & set(values):  # columns are for one prompt: these are misspelt flags
        rest += [f"--{name}" for name in columns]
    if rest:
        raise ConfigError(_unknown(kind, rest, arguments) + f"; see {parser.prog} --help")
    if columns:
        values["columns"] = columns
    values = (config.read_yaml(path, kind) if path else {}) | values
    for place in positional:
        taken = [name for name, value in values.items() if name in known and isinstance(value, list) and value[1:]]
        if place not in values and taken:
            raise ConfigError(
                f"{place} is missing: give it before --{taken[0]}, which takes every name that comes after it"
            )
    return config.check(kind, values)


def _unknown(kind: type[config.Settings], rest: list[str], arguments: Sequence[str]) -> str:
    """What is wrong with the words that are left over."""
    there = _flags(kind)
    wrong = [item.partition("=")[0] for item in rest if item.startswith("-")]
    if wrong:
        known = [f"--{name}" for name in there]
        return "there is no flag " + ", ".join(f"{flag}{nearest(flag, known)}" for flag in wrong)
    flag = dict(zip(arguments[1:], arguments, strict=False)).get(rest[0], "")  # the one that stands before it
    name = flag[2:].replace("-", "_")
    if flag.startswith("--") and name in there:
        return f"--{name} {rest[0]!r}: give one of {', '.join(config.choices(there[name].annotation))}"
    return f"{rest[0]!r} belongs to no flag"


def run(name: str, arguments: Sequence[str], prog: str | None = None) -> int:
    """Run one command; its exit code."""
    kind = COMMANDS[name][0]
    places = POSITIONAL.get(name, [])
    words = COMMANDS[name][1]
    parser = _Parser(prog=prog or f"byeori {name}", description=words[0].upper() + words[1:] + ".", allow_abbrev=False)
    usage = ["%(prog)s", *(place.upper() for place in places), "[--setting VALUE ...]"]
    if kind is not None and "columns" in kind.model_fields:
        usage.insert(-1, "[--COLUMN TEXT ...]")
        parser.description = f"{parser.description} --COLUMN TEXT: {kind.model_fields['columns'].description}"
    parser.usage = " ".join(usage)
    add_settings(parser, kind or config.Settings)
    settings = settings_from(kind or config.Settings, parser, arguments, places)
    if isinstance(settings, config.TrainSettings):
        code = launch.start_group(settings.nproc, [name, *arguments])
        if code is not None:
            return code
    module_name = "train" if name in ("sft", "dpo") else name.replace("-", "_")
    with _uncollected():
        module = importlib.import_module(f"byeori.commands.{module_name}")
    if name == "demo-model":
        print(module.demo_model())
    else:
        getattr(module, name)(settings)
    return 0


@contextmanager
def _uncollected() -> Iterator[None]:
    """Importing creates a million objects that stay; collecting garbage meanwhile would add a tenth to the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _main(arguments: Sequence[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in COMMANDS:
        return run(first, arguments[1:])
    if not first.startswith("-"):
        raise ConfigError(f"there is no command {first!r}{nearest(first, list(COMMANDS))}; see byeori --help")
    parser = build_parser()
    found = parser.parse_args(arguments or ["--help"])
    if found.print_completion:
        import shtab

        print(shtab.complete(parser, found.print_completion))
    return 0


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    """Entry point; `command` fixes the command for the scripts named after the tutorial's.

    Returns the exit code: 0, 2 with one sentence for anything that a person can put right, 130 when stopped.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = os.environ.get("RANK", "0") == "0"
    try:
        if command:
            return run(command, given, prog=Path(sys.argv[0]).name)
        return _main(given)
    except ByeoriError as error:
        stopped = type(error).__name__ == "Interrupted"
        if type(error).__name__ == "Abandoned":
            return 2
        if type(error).__name__ == "Again" and SAID in os.environ:  # whoever started these processes goes on
            return AGAIN
        if not first:
            time.sleep(_OTHERS_WAIT)
        if (first or not stopped) and may_speak():
            print(f"{'' if stopped else 'error: '}{' '.join(str(error).split())}", file=sys.stderr)
        return 130 if stopped else 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(2 * _OTHERS_WAIT)  # most likely a connection that broke when another process ended
        raise


if __name__ == "__main__":
    sys.exit(main())
