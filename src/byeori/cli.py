"""The command line: parse it into settings and run the command. `--help` imports no torch."""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from byeori import __version__, config
from byeori.config import flags
from byeori.config import help as helps
from byeori.distributed import launch
from byeori.errors import AGAIN, SAID, ByeoriError, ConfigError, ModelError, may_speak, no_memory
from byeori.support import cgroups, collector, language
from byeori.support.console import say
from byeori.support.language import later, tr
from byeori.support.suggestions import nearest
from byeori.support.text_files import one_line, sentence

COMMANDS: dict[str, type[config.Settings]] = {
    "sft": config.SftSettings,
    "dpo": config.DpoSettings,
    "plan": config.PlanSettings,
    "rent": config.RentSettings,
    "preview": config.PreviewSettings,
    "merge": config.MergeSettings,
    "export": config.ExportSettings,
    "generate": config.GenerateSettings,
    "chat": config.ChatSettings,
    "serve": config.ServeSettings,
    "compare": config.CompareSettings,
    "audit": config.AuditSettings,
    "publish": config.PublishSettings,
    "studio": config.StudioSettings,
    "doctor": config.DoctorSettings,
    "demo": config.DemoSettings,
    "demo-model": config.DemoModelSettings,
}
_SHELLS = ("bash", "zsh", "tcsh")
_TOP = {
    "--help": later("show this help"),
    "--version": later("show the version"),
    "--lang ko|en": later("language of pages, notes, errors and help, with any command"),
    "--print-completion SHELL": later("print a completion script for bash, zsh or tcsh"),
}
# Seconds that a process other than torchrun's first waits with its error: the first one reports the same error, after
# which torchrun ends the others. Only an error of its own is then printed.
_OTHERS_WAIT = 5.0
_CHECKPOINTS = "checkpoints that were finished are kept: go on with --resume_from_checkpoint latest"
_LESS = "end other programs, take fewer or shorter rows at once (--batch_size, --cutoff_len, --max_new_tokens)"
_ANSWERS = "finished answers are kept in the output: the same command goes on behind them"
_AS_IT_WAS = "what was in the output folder is as it was: run the same command again"
_KEPT = {
    **dict.fromkeys(("sft", "dpo"), _CHECKPOINTS),
    **dict.fromkeys(("generate", "compare", "audit"), _ANSWERS),
    **dict.fromkeys(("merge", "export"), _AS_IT_WAS),
    "publish": "the repository has all of the files or none: run the same command again",
}
"""What is left of a command that was stopped outside its steps."""


def run(name: str, arguments: Sequence[str], prog: str | None = None) -> int:
    """Run one command and return its exit code."""
    kind, prog = COMMANDS[name], prog or f"byeori {name}"
    if asked := [item for item in arguments if item in flags.HELP]:
        print(helps.help_text(kind, name, prog=prog, full="all" in asked[0]))
        return 0
    settings = flags.settings_from(kind, arguments, see=f"{prog} --help")
    from byeori.commands import checks

    checks.check(settings)
    if isinstance(settings, config.TrainSettings):
        code = launch.start_group(settings.nproc, [name, *arguments], say, cores=cgroups.cores_to_divide())
        if code is not None:
            return code
    if name in ("plan", "rent") and sys.stderr.isatty():
        # the first seconds have no bar
        print(language.translated("Loading PyTorch ..."), end="\r", file=sys.stderr, flush=True)
    function = name.replace("-", "_")
    with collector.paused():
        module = importlib.import_module(f"byeori.commands.{'train' if name in ('sft', 'dpo') else function}")
    with collector.unwatched():
        result = getattr(module, function)(settings)
    if name == "demo-model":
        print(result)
    return 0


# ---- byeori without a command ------------------------------------------------------------------------------------


def _main(arguments: Sequence[str]) -> int:
    first = arguments[0] if arguments else "--help"
    flag, _, shell = first.partition("=")
    if first in COMMANDS:
        return run(first, arguments[1:])
    if first in flags.HELP:
        print(_overview())
    elif first == "--version":
        print(f"byeori {__version__}")
    elif flag == "--print-completion":
        print(completion(shell or "".join(arguments[1:2])))
    elif first.startswith("-"):
        known = [item.split()[0] for item in _TOP]
        raise ConfigError(f"there is no flag {first}{nearest(first, known)}; see byeori --help")
    else:
        raise ConfigError(f"there is no command {first!r}{nearest(first, list(COMMANDS))}; see byeori --help")
    return 0


def _overview() -> str:
    lines = [tr("usage: byeori COMMAND [INPUTS] [--FLAG VALUE ...]"), ""]
    lines += [tr("Fine-tune open language models, and check that it helped."), "", tr("commands:")]
    lines += [f"  {name:<12}{tr(config.about(kind))}" for name, kind in COMMANDS.items()]
    lines += ["", tr("flags:"), *(f"  {flag:<26}{tr(about)}" for flag, about in _TOP.items()), ""]
    lines += [tr("The model or adapter may be given first without its flag, then what the command works on:")]
    lines += [f"  {line}" for line in ("byeori merge my-adapter merged", 'byeori generate my-adapter "text"')]
    lines += ["", tr("byeori COMMAND --help shows the essential settings of a command, --help-all every one.")]
    return "\n".join(lines)


def _language(arguments: Sequence[str]) -> list[str]:
    """Take `--lang ko` or `--lang en` from the command line; anything else of this name may be a template's column."""
    rest = list(arguments)
    for at, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        value = value if equals else "".join(rest[at + 1 : at + 2])
        if flag == "--lang" and (value in language.LANGUAGES or rest[0] != "generate"):
            if value not in language.LANGUAGES:
                raise ConfigError(f"--lang {value!r}: give ko or en")
            os.environ[language.VARIABLE] = value  # the processes of a group inherit it
            del rest[at : at + (1 if equals else 2)]
            break
    return rest


def completion(shell: str) -> str:
    """Return a completion script.

    Raises:
        ConfigError: if the shell is not supported.
    """
    if shell not in _SHELLS:
        raise ConfigError(f"--print-completion {shell!r}: give one of {', '.join(_SHELLS)}; see byeori --help")
    import argparse

    import shtab

    # shtab reads the flags from argparse, which parses nothing here
    parser = argparse.ArgumentParser(prog="byeori")
    for flag in ("--version", "--print-completion"):
        parser.add_argument(flag)
    commands = parser.add_subparsers()
    for name, kind in COMMANDS.items():
        sub = commands.add_parser(name, help=config.about(kind))
        sub.add_argument("--config")
        for flag, field in flags.flags(kind).items():
            values: dict[str, Any] = {"choices": config.choices(field.annotation) or None}
            action = sub.add_argument(f"--{flag}", help=str(field.description).replace("%", "%%"), **values)
            if config.metavar(field) == "PATH":
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


# ---- entry point -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, command: str | None = None) -> int:
    """Run the command line and return the exit code.

    The exit code is 0, 2 after one sentence for anything that the user can fix, 3 if a comparison does not meet a
    condition, or 130 when interrupted.
    command: fixes the command, for the scripts that are named after the tutorial's.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # the process ends with this command: do not collect its garbage once more at the end
        atexit.register(gc.freeze)
        cgroups.make_threads_polite()
    first = os.environ.get("RANK", "0") == "0"
    with _sigterm_as_ctrl_c():
        return _guarded(given, command, first)


def _guarded(given: list[str], command: str | None, first: bool) -> int:
    """Run the command line; errors become sentences and exit codes."""
    try:
        given = _language(given)
        if command:
            return run(command, given, prog=Path(sys.argv[0]).name)
        return _main(given)
    except ByeoriError as error:
        interrupted = type(error).__name__ == "Interrupted"
        if type(error).__name__ == "Abandoned":
            return 2
        if type(error).__name__ == "Again" and SAID in os.environ:  # the process that started this group restarts it
            return AGAIN
        if not first:
            time.sleep(_OTHERS_WAIT)
        if (first or not interrupted) and may_speak():
            print(f"{'' if interrupted else tr('error: ')}{language.translated(sentence(error))}", file=sys.stderr)
        return 130 if interrupted else error.exit_code
    except KeyboardInterrupt:
        name = command or (given[0] if given else "")
        stopped = f"stopped; {_KEPT[name]}" if name in _KEPT else "stopped"
        say(stopped)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if said := _as_sentence(error):
            print(f"{tr('error: ')}{language.translated(sentence(said))}", file=sys.stderr)
            return said.exit_code
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            time.sleep(2 * _OTHERS_WAIT)  # probably a connection that broke when another process ended
        raise


def _as_sentence(error: Exception) -> ByeoriError | None:
    """What may happen at any place: memory runs out, in each library's own class, or a text is too long for a path."""
    if no_memory(error):
        return ModelError(f"memory ran out ({one_line(error, 160)}); {_LESS}, or use a machine with more")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = one_line(error.filename, 80)
        return ConfigError(f"{name} is longer than the name of a file may be; give another path")
    return None


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Stop on SIGTERM as on Ctrl-C: temporary files go, and a line says what is kept.

    Of several processes each ends at once, as torchrun expects it of those that outlive one that failed.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
