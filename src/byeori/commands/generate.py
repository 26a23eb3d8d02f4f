"""`byeori generate`: answer one prompt, or every row of a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from byeori.artifacts import saved_model
from byeori.artifacts.saved_model import SavedModel
from byeori.commands import _engine
from byeori.commands._rows import load_table
from byeori.config import CompareSettings, GenerateSettings
from byeori.data import tokenize
from byeori.data.sources import Table
from byeori.data.tokenize import Encoding
from byeori.errors import ConfigError
from byeori.evaluate import generate as answering
from byeori.evaluate.engines.base import Answer, Sampling, check_prompts
from byeori.evaluate.engines.plain import Plain
from byeori.support import atomic_files, console, journal, output_paths
from byeori.support.console import say
from byeori.support.suggestions import nearest
from byeori.support.text_files import read_text


@console.quiet_libraries()
def generate(settings: GenerateSettings) -> list[str]:
    """Answer one prompt (printed while it is generated) or every row of a table; returns the answers."""
    output = Path(settings.output) if settings.output else None
    if output:
        output_paths.check_output_file(output, list(settings.data_path or []), settings.overwrite)
    saved = saved_model.find(settings.model, settings.base_model)
    if settings.data_path:
        return _answer_table(settings, saved, output)
    return [_answer_prompt(settings, saved, output)]


def _answer_table(settings: GenerateSettings, saved: SavedModel, output: Path | None) -> list[str]:
    sampling = _engine.sampling_of(settings, saved)
    template = saved_model.template_of(saved, settings.template)
    table = load_and_note(settings, saved)
    if template:
        table = table.with_columns(template.columns, optional=template.columns)
        template.check_columns(table.rows.column_names, with_answer=False)
    encoding = saved_model.encoding(saved, template, cutoff_len=_longest_prompt(sampling))
    rows = [dict(row) for row in table.rows]
    prompts = answering.encode_prompts(rows, encoding, table.name)
    column = answering.answer_column(table.rows.column_names)
    if column != "output":
        say(f"The rows already have a column 'output'; the answers are in the column {column!r}")
    check_prompts(prompts, sampling)
    open_engine = _engine.opener(settings, saved, encoding, prompts, suffix=template.suffix if template else "")
    depends_on = _engine.depends_on(settings, saved, sampling, prompts)
    again = None if settings.overwrite else "--overwrite"
    with journal.unfinished(output, depends_on, overwrite=again) as kept:
        if kept.items:
            say(f"{len(kept.items):,} of {len(rows):,} rows were answered before; continuing with the others")
        with console.progress("Answering") as on_progress:
            answers, text = answering.answer_rows(
                open_engine,
                rows,
                prompts,
                sampling,
                column=column,
                journal=kept,
                on_progress=on_progress,
            )
        if output:
            atomic_files.write(output, text)
    if output:
        say(f"Answers in {output}")
    else:
        sys.stdout.write(console.shown(text))
    return answers


def _longest_prompt(sampling: Sampling) -> int:
    """Return the length in tokens from which prompts are shortened as in training, to leave room for an answer."""
    if sampling.max_length is None:
        return sys.maxsize
    return sampling.max_length - min(sampling.max_new_tokens, sampling.max_length // 2)


def _answer_prompt(settings: GenerateSettings, saved: SavedModel, output: Path | None) -> str:
    encoding, prompt = _raw_prompt(settings.raw, saved) if settings.raw is not None else _prompt(settings, saved)
    suffix = encoding.template.suffix if encoding.template and settings.raw is None else ""
    engine = _engine.opener(settings, saved, encoding, [prompt], suffix=suffix)()
    found: list[Answer] = []
    sampling = _engine.sampling_of(settings, saved)
    shown = output is None and isinstance(engine, Plain)
    stream = {"stream": lambda text: print(console.shown(text), end="", flush=True)} if shown else {}
    engine.answers({0: prompt}, sampling, "tuned", lambda _, answer: found.append(answer), **stream)
    answer = found[0].text
    if output:
        atomic_files.write(output, answer + "\n")
    elif not shown:
        print(console.shown(answer))
    return answer


def _raw_prompt(raw: str, saved: SavedModel) -> tuple[Encoding, list[int]]:
    encoding = saved_model.raw_encoding(saved)
    return encoding, tokenize.encode_text(_text_or_file(raw), encoding)


def _prompt(settings: GenerateSettings, saved: SavedModel) -> tuple[Encoding, list[int]]:
    template = saved_model.template_of(saved, settings.template)
    names = template.prompt_columns if template else ["prompt"]
    values = _values(settings, names, template.optional_columns if template else set())
    row: Any = values if template else {"messages": [{"role": "user", "content": values["prompt"]}]}
    encoding = saved_model.encoding(saved, template)
    return encoding, tokenize.encode_prompt(row, encoding)


def _values(settings: GenerateSettings, names: list[str], optional: set[str]) -> dict[str, str]:
    """Return the texts of the prompt's columns, from flags, the free argument or standard input.

    Raises:
        ConfigError: if a flag is unknown, a column has no text, or a file cannot be read.
    """
    flags = {name.replace("-", "_"): value for name, value in settings.columns.items()}
    keys = {name: name.replace("-", "_") for name in names}
    if unknown := next((name for name in flags if name not in keys.values()), None):
        known = [*names, *(name for name in type(settings).model_fields if name != "columns")]
        raise ConfigError(
            f"--{unknown} is neither a flag nor a column of the template{nearest(unknown, known)}; "
            f"its prompt has the columns {', '.join(names)}"
        )
    values = {name: flags[key] for name, key in keys.items() if key in flags}
    missing = [name for name in names if name not in values and name not in optional]
    if settings.input_text is not None:
        free = missing or [name for name in names if name not in values]
        if len(free) != 1:
            usage = " ".join(f"--{name} TEXT" for name in names)
            raise ConfigError(f"the prompt has {len(free)} columns without a value; pass each by name: {usage}")
        values[free[0]] = settings.input_text
        missing = []
    values = {name: _text_or_file(value).strip("\n") for name, value in values.items()}
    if len(missing) == 1:
        values[missing[0]] = _standard_input(f"the column {missing[0]!r}")
    elif missing:
        raise ConfigError("give " + ", ".join(f"--{name} TEXT" for name in missing) + " (or @file)")
    return values


def _text_or_file(value: str) -> str:
    """Return the text of a flag, or of the file in `@file`."""
    if not value.startswith("@"):
        return value
    try:
        return read_text(Path(value[1:]), ConfigError)
    except OSError as error:
        raise ConfigError(f"cannot read {value[1:]}: {error.strerror}; check the path after the @") from None


def _standard_input(name: str) -> str:
    """Return the text on standard input, asking for it on a terminal. name: of what is missing."""
    missing = f"{name} is missing: pass it as a flag or on standard input"
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(missing)
    if sys.stdin.isatty():
        say(f"Type {name}, then press Ctrl-D:")
    try:
        text = sys.stdin.read().strip("\n")
    except UnicodeDecodeError:
        raise ConfigError(f"{name} on standard input is not UTF-8; convert it, for example with iconv") from None
    if not text.strip():
        raise ConfigError(missing)
    return text


def load_and_note(settings: GenerateSettings | CompareSettings, saved: SavedModel) -> Table:
    """Load the table of the settings with the names that the run gave its columns, and print its notes."""
    table = load_table(settings, saved.settings.get("columns"))
    for note in table.notes:
        say(note)
    return table
