"""`byeori chat`: talk to a model in the terminal, or to an adapter and its base at once; keep pairs for DPO.

Lines are read from standard input, which may be a pipe: one line for each column of the prompt, or each message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from byeori.artifacts import saved_model
from byeori.commands import _engine
from byeori.config import ChatSettings
from byeori.distributed.processes import init_processes
from byeori.errors import ByeoriError, ConfigError, TemplateError
from byeori.evaluate.chat import Chat
from byeori.evaluate.engines.base import Answer, Sampling, Side
from byeori.evaluate.engines.plain import Plain
from byeori.evaluate.generate import json_line
from byeori.support import atomic_files, console
from byeori.support.console import say
from byeori.support.terminal import Terminal

_HELP = """\
/save        keep a pair for `byeori dpo`: the answer, and a better one that you type
/save N      the same with answer N as the better one, of two or more: with --base, or after /retry
/save N M    the same with answer N as the better and answer M as the worse one
/retry       answer once more, with other random numbers
/base        let the base answer as well, or stop that
/system TEXT set the system message, and start anew
/new         start anew
/exit        leave (Ctrl-D too); Ctrl-C stops an answer
\"\"\"          begins and ends a text of several lines"""


@console.quiet_libraries()
def chat(settings: ChatSettings) -> None:
    """Talk to a model until the input ends."""
    saved = saved_model.find(settings.model, settings.base_model)
    if settings.base and not saved.is_adapter:
        raise ConfigError(f"--base compares an adapter with its base, and {settings.model} is a whole model")
    chosen = saved_model.template_of(saved, settings.template)
    if chosen and settings.system is not None:
        raise ConfigError("--system is for chat templates, and this model has a template of its own; leave it out")
    session = Chat(encoding=saved_model.encoding(saved, chosen), system=settings.system)
    model = saved_model.load_weights(saved, settings.dtype, init_processes().device)
    engine = Plain(model, saved.tokenizer, chosen.suffix if chosen else "")
    sides: list[Side] = ["base", "tuned"] if settings.base else ["tuned"]
    _Talk(session, engine, _engine.sampling_of(settings, saved), sides, saved.is_adapter, Path(settings.pairs)).run()


class _Talk:
    """The loop between the terminal, the conversation and the engine."""

    def __init__(
        self, session: Chat, engine: Plain, sampling: Sampling, sides: list[Side], has_base: bool, pairs: Path
    ) -> None:
        self.chat, self.engine, self.sampling, self.sides = session, engine, sampling, sides
        self.has_base, self.pairs = has_base, pairs
        self.terminal = Terminal()

    def run(self) -> None:
        """Ask and answer until the input ends."""
        template = self.chat.template
        what = f"The prompt's columns: {', '.join(self.chat.columns)}. " if template else ""
        self.terminal.note(f"{what}/help shows what else you can type; Ctrl-D ends")
        while True:
            try:
                values = self._question()
                self._answer(self.chat.ask(values))
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.terminal.by_hand:
                    raise
                self.terminal.note("\nCtrl-D or /exit ends")
            except ByeoriError as error:
                self.chat.forget_question()
                say(f"error: {error}")
            if not self.chat.columns:  # the template asks nothing, so there is one answer
                return

    def _question(self) -> dict[str, str]:
        """Read what is asked next, doing what lines with a / say before it."""
        values: dict[str, str] = {}
        optional = self.chat.template.optional_columns if self.chat.template else set()
        for column in self.chat.columns:
            while True:
                line = self.terminal.ask(column, " (may be empty)" if column in optional else "")
                if line.startswith("/") and self._command(*line[1:].split(maxsplit=1)):
                    values.clear()
                    return self._question()
                if line.strip() or column in optional:
                    break
            values[column] = line
        return values

    def _answer(self, prompt: list[int]) -> None:
        """Let each side answer; Ctrl-C stops the answer of one."""
        for side in self.sides:
            name = side if self.has_base else ""
            number = len(self.chat.answers) + 1
            with self.terminal.answer(f"[{number}] {name}" if len(self.sides) > 1 or number > 1 else "") as emit:
                text = self._generate(prompt, side, emit)
            self.chat.add(name, text)

    def _generate(self, prompt: list[int], side: Side, emit: Callable[[str], None]) -> str:
        """Return an answer, or the part of it that there was at Ctrl-C."""
        found: list[Answer] = []
        parts: list[str] = []

        def stream(text: str) -> None:
            parts.append(text)
            emit(text)

        try:
            self.engine.answers({0: prompt}, self.sampling, side, lambda _, answer: found.append(answer), stream)
        except KeyboardInterrupt:
            if not self.terminal.by_hand:
                raise
            emit(" [stopped]\n")
            return "".join(parts).strip()
        return found[0].text

    # ---- commands ----------------------------------------------------------------------------------------------

    def _command(self, name: str = "", rest: str = "") -> bool:
        """Do what a line with a / says; False if it is no command but text, such as a path."""
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: say(_HELP),
            "save": self._save,
            "retry": self._retry,
            "base": self._toggle_base,
            "system": self._system,
            "new": lambda _: self._new(),
            "exit": self._exit,
            "quit": self._exit,
        }
        if name not in commands:
            if name.isalpha():
                say(f"There is no command /{name}; /help lists them")
            return name.isalpha()
        try:
            commands[name](rest)
        except ByeoriError as error:
            say(f"error: {error}")
        return True

    def _retry(self, _: str) -> None:
        if not self.sampling.temperature:
            raise TemplateError("without a temperature the answer would be the same; start with --temperature 0.7")
        self.sampling = replace(self.sampling, seed=self.sampling.seed + 1)
        self._answer(self.chat.prompt_again())

    def _save(self, numbers: str) -> None:
        """Append a pair to the file; see _HELP."""
        answers = [text for _, text in self.chat.answers]
        if not answers:
            raise TemplateError("nothing has been answered yet")
        if not numbers:
            chosen, rejected = self.terminal.ask("better answer"), answers[-1]
        else:
            chosen, rejected = (answers[at] for at in _chosen(numbers, len(answers)))
        pair = self.chat.pair(chosen, rejected)
        with atomic_files.disk_errors(self.pairs), self.pairs.open("a", encoding="utf-8") as file:
            file.write(json_line(pair))
        say(f"Kept in {self.pairs}")

    def _toggle_base(self, _: str) -> None:
        if not self.has_base:
            raise ConfigError("this is a whole model; only an adapter has a base")
        self.sides = ["tuned"] if len(self.sides) > 1 else ["base", "tuned"]
        say(f"Answers by: {', '.join(self.sides)}")

    def _system(self, text: str) -> None:
        if self.chat.template:
            raise ConfigError("system messages are for chat templates, and this model has a template of its own")
        self.chat.system = text or None
        self._new()

    def _new(self) -> None:
        self.chat.start_anew()
        say("Starting anew")

    def _exit(self, _: str) -> None:
        raise EOFError


def _chosen(numbers: str, count: int) -> tuple[int, int]:
    """`2` -> (1, 0), `2 3` -> (1, 2): the indices of the better and the worse of so many answers.

    Raises:
        TemplateError: if that names no two answers.
    """
    words = numbers.split()
    wanted = [int(word) - 1 for word in words if word.isdecimal() and len(word) < 10]
    if len(wanted) == 1 and count == 2:
        wanted.append(1 - wanted[0])
    if len(wanted) != 2 or len(words) > 2 or not all(0 <= at < count for at in wanted):
        which = "give two of them: /save BETTER WORSE" if count > 1 else "/save alone asks for a better one"
        raise TemplateError(f"there {'is 1 answer' if count == 1 else f'are {count} answers'}; {which}")
    return wanted[0], wanted[1]
