"""The first checks of every command: paths, template and columns. They import no torch, so mistakes show at once.

Only what is cheap and certain is checked here, by the functions that the command itself calls later.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from byeori.artifacts import layout
from byeori.config import (
    AuditSettings,
    CompareSettings,
    DataSettings,
    DpoSettings,
    ExportSettings,
    GenerateSettings,
    MergeSettings,
    PlanSettings,
    PreviewSettings,
    Settings,
    TrainSettings,
    metavar,
)
from byeori.data import columns as table_columns
from byeori.data import documents, places, row_kinds, template
from byeori.data.readers import csv, ending, jsonl
from byeori.data.readers.text import DAMAGED
from byeori.data.template import Template
from byeori.errors import CheckpointError, ConfigError
from byeori.evaluate import baselines, gate, judge, measures, metrics, several
from byeori.model import names
from byeori.support import output_paths
from byeori.train import output_dir

_SMALL = 2_000_000  # bytes: a table up to this size is read for its columns


def check(settings: Settings) -> None:
    """Raise the error that the command would raise later, if a path, the template or a column is wrong.

    Raises:
        ByeoriError: if a model, a table or a template is missing, or the output cannot be written.
    """
    _check_paths(settings)
    for name in ("base_model", "model", "adapter", "peft_model_path", "base_model_name_or_path"):
        given = getattr(settings, name, None)
        for model in given if isinstance(given, list) else [given]:
            if model is not None:
                names.check_name(model)
    if isinstance(settings, DataSettings | GenerateSettings):
        chosen = template.resolve(settings.template) if settings.template else None
        places.check_paths(list(settings.data_path or []), settings.dataset_split)
        if isinstance(settings, TrainSettings | PreviewSettings):
            places.check_paths(list(settings.validation_path or []), settings.dataset_split)
            chosen = documents.template_of(settings.text_column) if settings.text_column else chosen
        if isinstance(settings, TrainSettings | PreviewSettings) and settings.data_path:
            _check_columns(settings, chosen)
    _check_output(settings)


def measurable(settings: CompareSettings) -> list[str]:
    """Return the measures of a comparison that a condition may name.

    Raises:
        ConfigError: if a metric is unknown.
    """
    own = [measure.name for measure in measures.parse(settings.metric)]
    found = [
        *metrics.ROW_METRICS,
        *metrics.PAIR_METRICS,
        *own,
        *(["judge"] if settings.judge else []),
        *([f"{gate.RETENTION}loss"] if settings.retention else []),
    ]
    runs = several.names(settings.adapter, settings.combine)
    return [f"{run}.{name}" for run in runs for name in found] if runs[1:] else found


def _check_paths(settings: Settings) -> None:
    """Raise for a path that the system cannot even look up: too long, a loop of links, a folder without permission."""
    for name, field in type(settings).model_fields.items():
        if metavar(field) not in ("PATH", "MODEL"):
            continue
        value = getattr(settings, name)
        for path in value if isinstance(value, list) else [value]:
            if not isinstance(path, str) or "://" in path:
                continue
            try:
                Path(path).expanduser().stat()
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError, RuntimeError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise ConfigError(f"--{name} {path[:80]!r} is no usable path: {reason}; give another one") from None


def _check_output(settings: Settings) -> None:
    if isinstance(settings, TrainSettings) and not isinstance(settings, PlanSettings):
        output = Path(settings.output_dir)
        output_dir.check_not_the_start(output, settings.base_model)
        if settings.resume_from_checkpoint not in (None, "latest") and settings.mirror_to is None:
            output_dir.check_checkpoint(Path(settings.resume_from_checkpoint))
        # another attempt of torchrun resumes; the other processes may be on machines without the folder
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and os.environ.get("RANK", "0") == "0":
            resumes = settings.resume_from_checkpoint is not None
            output_dir.check_free(output, occupied_ok=resumes or settings.overwrite_output_dir)
    elif isinstance(settings, CompareSettings):
        for path in settings.data_path:
            if (Path(path) / layout.ADAPTER_CONFIG).is_file():
                raise ConfigError(
                    f"{path} is an adapter and not rows; behind several adapters name them with --data-path"
                )
        output_paths.check_result(Path(settings.output_dir), layout.ROWS, settings.overwrite_output_dir)
        places.check_paths([settings.retention] if settings.retention else [], "train")
        judge.read_prompt(settings.judge_prompt)
        gate.parse(settings.fail_unless, measurable(settings), baselines.NAMES)
    elif isinstance(settings, AuditSettings):
        if (Path(settings.output_dir) / layout.SETTINGS).is_file():  # its audit.json is about tokens
            raise CheckpointError(f"{settings.output_dir} is the folder of a run; choose another --output_dir")
        output_paths.check_result(Path(settings.output_dir), layout.ROWS, settings.overwrite_output_dir)
        places.check_paths(list(settings.data_path or []), settings.dataset_split)
        places.check_paths(list(settings.test or []), "train")
    elif isinstance(settings, ExportSettings):
        places.check_paths(list(settings.data_path or []), "train")
        overwrite = settings.overwrite_output_dir
        output_paths.check_model_output(Path(settings.output_dir), overwrite, marker=layout.EXPORT_REPORT)
    elif isinstance(settings, MergeSettings):
        output_paths.check_model_output(Path(settings.output_dir), settings.overwrite_output_dir)
    elif isinstance(settings, GenerateSettings) and settings.output:
        output_paths.check_output_file(Path(settings.output), list(settings.data_path or []), settings.overwrite)


def _check_columns(settings: TrainSettings | PreviewSettings, chosen: Template | None) -> None:
    """Raise unless the columns of the only table, if it is small or a csv file, fit the template."""
    columns = _columns(settings.data_path)
    if columns is not None:
        columns = table_columns.renamed(columns, settings.columns)
        columns += [
            name for name in (chosen.columns if chosen else ()) if "." in name and table_columns.has(columns, name)
        ]
    if columns is None or (chosen is None and settings.template is None and not _is_plain_model(settings.base_model)):
        return
    if isinstance(settings, PreviewSettings):
        kind = row_kinds.of_table(columns, chosen)
    elif isinstance(settings, PlanSettings):
        kind = row_kinds.PREFERENCE if settings.planned == "dpo" else row_kinds.ANSWER
    else:
        kind = row_kinds.PREFERENCE if isinstance(settings, DpoSettings) else row_kinds.ANSWER
    if chosen is not None or settings.template is not None:
        row_kinds.for_text(kind, settings.text_column).check_columns(columns, chosen)
    elif kind is row_kinds.ANSWER and "text" not in columns:  # its values decide as well, and those of pairs
        template.choose(columns)


def _is_plain_model(name: str) -> bool:
    """Return whether a folder holds a model without a template, so that the columns alone choose one."""
    folder = Path(name)
    own = any((folder / file).exists() for file in (layout.ADAPTER_CONFIG, layout.TEMPLATE))
    return folder.is_dir() and not own


def _columns(paths: Sequence[str]) -> list[str] | None:
    """Return the columns of a table as a template names them, or None if that takes more than a glance."""
    path = Path(places.split_weight(paths[0])[0]).expanduser()
    if len(paths) > 1 or not path.is_file():
        return None
    found: dict[str, None] = {}
    try:
        if ending(path) in csv.ENDINGS:
            found = dict.fromkeys(next((row for _, row in csv.records(path)), {}))
        elif ending(path) in jsonl.ENDINGS and path.stat().st_size <= _SMALL:
            for _, row in jsonl.records(path):
                found.update(dict.fromkeys(row))
    except (OSError, UnicodeDecodeError, *DAMAGED):  # the reader says what is wrong with the file
        return None
    return [table_columns.plain_name(name) for name in found] or None
