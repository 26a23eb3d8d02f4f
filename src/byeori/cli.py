"""The command line: parse -> settings -> recipe; nothing else. `--help` does not import torch."""

from __future__ import annotations

import argparse
import os
import sys
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from byeori import __version__, config
from byeori.errors import ByeoriError, ConfigError

COMMANDS: dict[str, tuple[type[config.Settings] | None, str]] = {
    "sft": (config.SftSettings, "fine-tune a LoRA adapter on prompts and answers"),
    "preview": (config.PreviewSettings, "show what the model will see, before any weights are loaded"),
    "merge": (config.MergeSettings, "write an adapter into its base model"),
    "generate": (config.GenerateSettings, "answer a prompt, or every row of a table"),
    "compare": (config.CompareSettings, "base and tuned answer the same rows; a report with intervals"),
    "publish": (config.PublishSettings, "upload a finished adapter or merged model to the Hub"),
    "demo": (config.DemoSettings, "the whole job on the embedded model and the sample rows"),
    "demo-model": (None, "print the folder of the embedded model, made the first time"),
}
# settings that may be given without their flag
POSITIONAL = {"generate": ["model"], "compare": ["adapter"], "publish": ["folder", "repo_id"]}


class _Parser(argparse.ArgumentParser):
    """Errors become a ConfigError, one sentence, with the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, made from the settings classes."""
    parser = _Parser(prog="byeori", description="Fine-tune open language models, and prove that it helped.")
    parser.add_argument("--version", action="version", version=f"byeori {__version__}")
    parser.add_argument(
        "--print-completion", choices=["bash", "zsh", "tcsh"], help="print a shell completion script"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, (kind, words) in COMMANDS.items():
        sub = commands.add_parser(
            name, help=words, description=words[0].upper() + words[1:] + ".", allow_abbrev=False
        )
        if kind is not None:
            add_settings(sub, kind, POSITIONAL.get(name, []))
    return parser


def add_settings(
    parser: argparse.ArgumentParser, kind: type[config.Settings], positional: Sequence[str] = ()
) -> None:
    """One flag for each setting; values stay text here and are checked in config.py."""
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of settings; flags win"
    )
    for name, field in kind.model_fields.items():
        default = (
            "" if field.is_required() or field.default in (None, [], {}) else f" (default {field.default})"
        )
        words = ((field.description or "") + default).replace("%", "%%")
        values: dict[str, Any] = {"help": words, "default": argparse.SUPPRESS}
        if name == "columns":
            continue
        if name in positional:
            parser.add_argument(name, nargs="?", metavar=name.upper(), **values)
            parser.add_argument(f"--{name}", dest=name, help=argparse.SUPPRESS, default=argparse.SUPPRESS)
        elif field.annotation is bool:
            parser.add_argument(f"--{field.alias or name}", nargs="?", const=True, metavar="BOOL", **values)
        elif _is_list(field.annotation):
            parser.add_argument(f"--{name}", nargs="+", metavar="VALUE", **values)
        else:
            parser.add_argument(f"--{name}", metavar="VALUE", **values)


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is list or any(
        _is_list(part) for part in typing.get_args(annotation)
    )


def normalise(arguments: Sequence[str]) -> list[str]:
    """`--data-path` and `--data_path` are the same flag; values are left alone."""
    out = []
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2 and not argument.startswith("--print-completion"):
            flag, equals, value = argument[2:].partition("=")
            argument = "--" + flag.replace("-", "_") + equals + value
        out.append(argument)
    return out


def settings_from(
    kind: type[config.S], parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> config.S:
    """Flags over the YAML file over the defaults.

    Raises:
        ConfigError: an unknown flag, or any setting that is wrong.
    """
    known, rest = parser.parse_known_args(normalise(arguments))
    values = vars(known)
    values.pop("command", None)
    values.pop("print_completion", None)
    path = values.pop("config", None)
    if "columns" in kind.model_fields:
        values["columns"], rest = _columns(rest)
    if rest:
        flags = [f"--{field.alias or name}" for name, field in kind.model_fields.items()]
        raise ConfigError(
            f"there is no flag {rest[0]}{config.nearest(rest[0], flags)}; see {parser.prog} --help"
        )
    return config.check(kind, (config.read_yaml(path) if path else {}) | values)


def _columns(rest: list[str]) -> tuple[dict[str, str], list[str]]:
    """`--document TEXT` pairs that no setting is called; anything else is left over."""
    columns: dict[str, str] = {}
    index = 0
    while index < len(rest) and rest[index].startswith("--"):
        flag, equals, value = rest[index][2:].partition("=")
        if not equals:
            if index + 1 >= len(rest):
                break
            value, index = rest[index + 1], index + 1
        columns[flag] = value
        index += 1
    return columns, rest[index:]


def run(name: str, arguments: Sequence[str], prog: str | None = None) -> None:
    """Run one command."""
    kind = COMMANDS[name][0]
    parser = _Parser(prog=prog or f"byeori {name}", description=COMMANDS[name][1], allow_abbrev=False)
    if kind is not None:
        add_settings(parser, kind, POSITIONAL.get(name, []))
    settings = settings_from(kind or config.Settings, parser, arguments)
    if name == "demo-model":
        from byeori import recipes

        print(recipes.demo_model())
    elif name == "demo":
        from byeori import demo

        demo.demo(typing.cast(config.DemoSettings, settings))
    else:
        from byeori import recipes

        getattr(recipes, name)(settings)


def _main(arguments: Sequence[str]) -> None:
    first = arguments[0] if arguments else "--help"
    if first in COMMANDS:
        run(first, arguments[1:])
        return
    if not first.startswith("-"):
        raise ConfigError(
            f"there is no command {first!r}{config.nearest(first, list(COMMANDS))}; see byeori --help"
        )
    parser = build_parser()
    found = parser.parse_args(arguments or ["--help"])
    if found.print_completion:
        import shtab

        print(shtab.complete(parser, found.print_completion))


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    """Entry point; `command` fixes the command for the scripts named after the tutorial's.

    Returns the exit code: 0, 2 with one sentence for anything that a person can put right, 130 when stopped.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if command:
            run(command, given, prog=os.path.basename(sys.argv[0]))  # noqa: PTH119
        else:
            _main(given)
    except ByeoriError as error:
        stopped = type(error).__name__ == "Interrupted"
        print(f"{'' if stopped else 'error: '}{error}", file=sys.stderr)
        return 130 if stopped else 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
