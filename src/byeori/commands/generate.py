"""`byeori generate`: answer one prompt, or every row of a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from byeori.artifacts import saved_model
from byeori.commands._rows import load_table
from byeori.config import CompareSettings, GenerateSettings, GenerationSettings
from byeori.data import template, tokenize
from byeori.data.sources import Table
from byeori.data.tokenize import Encoding
from byeori.distributed.processes import init_processes
from byeori.errors import ConfigError
from byeori.evaluate import generate as generation
from byeori.support import atomic_files, console, output_paths
from byeori.support.console import say
from byeori.support.suggestions import nearest


@console.quiet_libraries()
def generate(settings: GenerateSettings) -> list[str]:
    """Answer one prompt (printed as it grows) or every row of a table; returns the answers."""
    sampling, output = sampling_of(settings), Path(settings.output) if settings.output else None
    if output:
        output_paths.check_output_file(output, list(settings.data_path or []))
    found = saved_model.find(settings.model, settings.base_model)
    if settings.data_path:
        return _generate_table(settings, found, sampling, output)
    how, prompt = _one_prompt(settings, found)
    model = saved_model.load_weights(found, settings.dtype, init_processes().device)
    suffix = how.template.suffix if how.template and settings.raw is None else ""
    streamed = output is None and not suffix.strip()
    answer = generation.answer(
        model,
        how.tokenizer,
        [prompt],
        sampling,
        suffix=suffix,
        max_length=found.max_length,
        stream=(lambda text: print(text, end="", flush=True)) if streamed else None,
    )[0].text
    if output:
        atomic_files.write(output, answer + "\n")
    elif not streamed:
        print(answer)
    return [answer]


def _generate_table(
    settings: GenerateSettings, found: saved_model.SavedModel, sampling: generation.Sampling, output: Path | None
) -> list[str]:
    table = load_and_note(settings)
    chosen = saved_model.template_of(found, settings.template)
    if chosen:
        chosen.check_columns(table.rows.column_names, with_answer=False)
    how = saved_model.encoding(found, chosen, cutoff_len=_room(found, sampling))
    rows = [dict(row) for row in table.rows]
    prompts = generation.encode_prompts(rows, how, table.name)
    column = generation.answer_column(table.rows.column_names)
    if column != "output":
        say(f"The rows have a column 'output', which stays; answers are in the column {column!r}")
    model = saved_model.load_weights(found, settings.dtype, init_processes().device)
    with console.progress("Answering") as on_progress:
        answers, text = generation.answer_rows(
            model,
            how,
            rows,
            prompts,
            sampling,
            column=column,
            batch_size=settings.generation_batch_size,
            max_length=found.max_length,
            output=output,
            on_progress=on_progress,
        )
    if output:
        say(f"Answers in {output}")
    else:
        sys.stdout.write(text)
    return answers


def _room(found: saved_model.SavedModel, sampling: generation.Sampling) -> int:
    """The longest prompt that leaves room for an answer; longer ones lose text as they do in training."""
    if found.max_length is None:
        return sys.maxsize
    return found.max_length - min(sampling.max_new_tokens, found.max_length // 2)


def _one_prompt(settings: GenerateSettings, found: saved_model.SavedModel) -> tuple[Encoding, list[int]]:
    if settings.raw is not None:
        how = saved_model.raw_encoding(found)
        text = generation.text_or_file(settings.raw)
        return how, list(tokenize.fit((template.Segment(text=text, trained=False),), how)[0].token_ids)
    chosen = saved_model.template_of(found, settings.template)
    names = chosen.prompt_columns if chosen else ["prompt"]
    optional = chosen.optional_columns if chosen else set()
    given = {name.replace("-", "_"): value for name, value in settings.columns.items()}
    unknown = [name for name in given if name not in {column.replace("-", "_") for column in names}]
    if unknown:
        flags = [*names, *(name for name in type(settings).model_fields if name != "columns")]
        raise ConfigError(
            f"--{unknown[0]} is neither a flag nor a column of the template{nearest(unknown[0], flags)}; "
            f"its prompt has the columns {', '.join(names)}"
        )
    values = {column: given[column.replace("-", "_")] for column in names if column.replace("-", "_") in given}
    if settings.input_text is not None:
        free = [name for name in names if name not in values]
        free = [name for name in free if name not in optional] or free
        if len(free) != 1:
            columns = " ".join(f"--{name} TEXT" for name in names)
            raise ConfigError(f"the prompt has {len(free)} columns without a value; give each by name: {columns}")
        values[free[0]] = settings.input_text
    values = {name: generation.text_or_file(value).strip("\n") for name, value in values.items()}
    missing = [name for name in names if name not in optional and name not in values]
    if len(missing) == 1:
        values[missing[0]] = generation.standard_input(f"the column {missing[0]!r}")
    elif missing:
        raise ConfigError("give " + ", ".join(f"--{name} TEXT" for name in missing) + " (or @file)")
    row: Any = values if chosen else {"messages": [{"role": "user", "content": values["prompt"]}]}
    how = saved_model.encoding(found, chosen)
    return how, tokenize.encode_prompt(row, how)


def load_and_note(settings: GenerateSettings | CompareSettings) -> Table:
    table = load_table(settings)
    for note in table.notes:
        say(note)
    return table


def sampling_of(settings: GenerationSettings) -> generation.Sampling:
    names = generation.Sampling.__dataclass_fields__
    return generation.Sampling(**{name: getattr(settings, name) for name in names})
