"""Folders that runs and results are written to: may this one be used, and what is written beside an adapter."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from byeori import config
from byeori.artifacts import model_card
from byeori.data import audit, preference, tokenize
from byeori.data.sources import ROW, Table
from byeori.data.tokenize import Encoding
from byeori.distributed import processes as parallel
from byeori.errors import CheckpointError, ConfigError, DataError, TemplateError
from byeori.model.fingerprint import base_fingerprint
from byeori.support import hub
from byeori.train import checkpoint, log, oom

TEMPLATE = "template.txt"
SETTINGS = "byeori.yaml"
BASE = "byeori_base.json"
AUDIT = "audit.json"
METRICS = "metrics.json"
CARD = "README.md"
LAUNCH = ".torchrun"
_RUN_FILES = ("adapter_config.json", checkpoint.ADAPTER, log.FILE, SETTINGS, BASE, AUDIT, METRICS, "order.json")
# settings that decide which rows a step has, and what they become
_SAME_ROWS = (
    "batch_size",
    "seed",
    "max_rows",
    "val_set_size",
    "group_by_length",
    "cutoff_len",
    "train_on_inputs",
    "add_eos_token",
)


# ---- output folders ----------------------------------------------------------------------------------------------


def claim(
    output: Path, resume: str | None, overwrite: bool, tell: Callable[[str], None], processes: parallel.Processes
) -> Path | None:
    """See whether a run may write into the folder, and leave it as it is; the checkpoint to go on from, or None.

    Raises:
        CheckpointError: the folder holds another run, cannot be written, or has nothing to resume.
    """
    folder: Path | None = None
    restarted = parallel.add_up([float(processes.main and _restarted(output))], processes)[0] > 0
    if restarted and (whole := checkpoint.newest(output, tell)):
        tell(f"Started again by torchrun; going on from {whole}")
        return whole
    if resume == "latest":
        folder = checkpoint.newest(output, tell)
        if folder is None and checkpoint.steps(output):
            raise CheckpointError(f"no checkpoint in {output} is whole; start anew with --overwrite_output_dir")
        if folder is None:
            tell(f"No checkpoint in {output} yet; starting at step 0")
    elif resume is not None:
        folder = Path(resume)
        if not folder.is_dir():
            raise CheckpointError(
                f"there is no checkpoint {folder}; --resume_from_checkpoint takes a folder or `latest`"
            )
    if processes.main:
        if _held(output) and resume is None and not overwrite and not restarted:
            raise CheckpointError(
                f"{output} holds another run; go on with --resume_from_checkpoint latest, choose another --output_dir, "
                "or start anew with --overwrite_output_dir"
            )
        check_writable(output)
    parallel.wait(processes)
    return folder


def _restarted(output: Path) -> bool:
    """Whether torchrun --max-restarts started this process again, and the run in the folder is the one that ended."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    path = output / LAUNCH
    return again and path.is_file() and path.read_text(encoding="utf-8") == _launch()


def _launch() -> str:
    """What all attempts of one torchrun have in common: the id that it was given, or its process."""
    given = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return given if given != "none" else str(os.getppid())


def check_not_the_start(output: Path, base: str) -> None:
    """See whether the folder that a run writes to is another one than that of the weights it begins from.

    Raises:
        ConfigError: it is the same, or that of a run whose checkpoint this is.
    """
    start = Path(base).resolve()
    own = start.parent == output.resolve() and start.name.startswith("checkpoint-")
    if Path(base).is_dir() and (own or start == output.resolve()):
        raise ConfigError(f"--output_dir {output} holds the weights that the run begins from; give another folder")


def check_same_run(resume: Path, settings: config.TrainSettings) -> None:
    """A checkpoint is a number of steps; it means the same rows only under the same settings.

    Raises:
        CheckpointError: the run that wrote it put other rows into its steps, or made other examples of them.
    """
    path = resume / SETTINGS
    checkpoint.check_whole(resume)
    if not (resume / checkpoint.STATE).is_file() or not path.is_file():
        return
    saved, now = config.read_yaml(str(path)), settings.model_dump(by_alias=True)
    if ("loss" in saved) != ("loss" in now):
        raise CheckpointError(
            f"the checkpoint {resume} was written by byeori {'dpo' if 'loss' in saved else 'sft'}; "
            f"to train its weights further, give it as --base_model"
        )
    for name in _SAME_ROWS:
        if name in saved and saved[name] != now[name]:
            raise CheckpointError(
                f"the checkpoint {resume} was written with --{name} {saved[name]}, not {now[name]}; go on with the "
                "same settings, or take the finished adapter to train its weights further"
            )


def check_same_rows(resume: Path, content: str) -> None:
    """See whether the rows are still tokenized to what a checkpoint was trained on. content: their hash.

    Raises:
        CheckpointError: the data, the template or the tokenizer is another one.
    """
    path = resume / BASE
    if not (resume / checkpoint.STATE).is_file() or not path.is_file():  # no step of a run, or an older byeori's
        return
    if json.loads(path.read_text(encoding="utf-8")).get("rows_sha256") != content:
        raise CheckpointError(
            f"the rows are not those that the checkpoint {resume} was trained on: the data or the template has "
            "changed; go on with the same, or give the checkpoint as --base_model to train its weights further on these"
        )


def _held(output: Path) -> bool:
    return any((output / name).exists() for name in _RUN_FILES) or bool(checkpoint.steps(output))


def make(output: Path, *, clear: bool, resume: Path | None, anew: bool, tell: Callable[[str], None]) -> None:
    """Make the folder of a run that is about to start. clear: an earlier run in it goes now, and not before.

    anew: nobody asked to go on with one. Under torchrun it notes whose run this is, so that another attempt goes on
    from its checkpoints.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(output):
        if clear:
            for name in _RUN_FILES:
                (output / name).unlink(missing_ok=True)
            for _, folder in checkpoint.steps(output):
                checkpoint.remove(folder)
        output.mkdir(parents=True, exist_ok=True)
        if anew and not _restarted(output):
            (output / oom.NOTE).unlink(missing_ok=True)
        if resume is not None:
            _only_those_behind(resume, output, tell)
        (output / LAUNCH).unlink(missing_ok=True)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            (output / LAUNCH).write_text(_launch(), encoding="utf-8")


def _only_those_behind(resume: Path, output: Path, tell: Callable[[str], None]) -> None:
    """Leave in the folder the checkpoints that led to this one: later ones are of another run, which `latest` would
    take for this one's. The best one so far comes along from where the run was."""
    own = resume.resolve().parent == output.resolve()
    last = max((step for step, folder in checkpoint.steps(output) if folder.resolve() == resume.resolve()), default=0)
    for step, folder in checkpoint.steps(output):
        if not own or step > last:
            free = checkpoint.aside(folder.name, lambda name: (output / name).exists())
            folder.rename(output / free)
            tell(f"{folder} is not of this run; it is {free} now")
    best = checkpoint.best_of(resume)
    if best is not None and not (output / best.name).exists() and checkpoint.verify(best) is None:
        checkpoint.duplicate(best, output / best.name)


def check_writable(folder: Path) -> None:
    """See whether files can be written into a folder that is there or can be made; leaves no trace.

    Raises:
        CheckpointError: they cannot.
    """
    there = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".byeori-", dir=there)).rmdir()
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {folder} ({there}: {error.strerror}); choose another --output_dir"
        ) from None


def check_result(output: Path, marker: str, overwrite: bool) -> None:
    """See whether results may be written into a folder, and leave it as it is.

    Raises:
        CheckpointError: it holds results already, or cannot be written.
    """
    if (output / marker).exists() and not overwrite:
        raise CheckpointError(f"{output} holds results already; choose another --output_dir or --overwrite_output_dir")
    check_writable(output)


def make_result(output: Path, names: list[str]) -> None:
    """Make a folder for results; what an earlier comparison left there goes.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for name in names:
            (output / name).unlink(missing_ok=True)


def check_output_file(path: Path, inputs: list[str]) -> None:
    """See whether answers may be written to a file.

    Raises:
        CheckpointError: it is a folder, one of the inputs, or its folder cannot be written.
    """
    if path.is_dir():
        raise CheckpointError(f"--output {path} is a folder; give a file, for instance {path / 'answers.jsonl'}")
    if any(Path(item).exists() and path.exists() and path.samefile(item) for item in inputs):
        raise CheckpointError(f"--output {path} is the table that is read; give another file")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"there is no folder {path.parent} for --output {path}; make it or give another file")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into one sentence.

    Raises:
        CheckpointError: the disk is full or read-only.
    """
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise CheckpointError(f"{path} could not be written ({reason}); what was finished before is kept") from None


def write(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        CheckpointError: the disk is full or read-only.
    """
    with writing(path):
        path.write_text(text, encoding="utf-8")


def write_beside(folder: Path, how: Encoding, settings: config.Settings) -> None:
    """Tokenizer, template, chat template and resolved settings: all that a server needs for the trained prompt."""
    tokenizer = how.tokenizer
    if how.template is not None:
        (folder / TEMPLATE).write_text(how.template.text, encoding="utf-8")
        before = tokenizer.chat_template
        tokenizer.chat_template = tokenize.served_template(how)
        tokenizer.save_pretrained(str(folder))
        tokenizer.chat_template = before
    else:
        tokenizer.save_pretrained(str(folder))
    config.write_yaml(settings, folder / SETTINGS)
    names = ("byeori", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors")
    versions = {name: version(name) for name in names}
    (folder / "versions.json").write_text(json.dumps(versions, indent=1), encoding="utf-8")


def write_start(folder: Path, base: str, revision: str | None, content: str) -> None:
    """What a run began from: the base, and its rows by a hash of their tokens."""
    record = {"base_model": base, "sha256": fingerprint(base, revision), "rows_sha256": content}
    (folder / BASE).write_text(json.dumps(record, indent=1), encoding="utf-8")


def write_run_facts(folder: Path, output: Path, found: dict[str, Any]) -> None:
    """The audit, the log, and the model card, unless a card of the user's own lies there."""
    (folder / AUDIT).write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    shutil.copy(output / log.FILE, folder / log.FILE)
    own = output / CARD
    if not own.is_file() or model_card.is_generated(own.read_text(encoding="utf-8", errors="replace")):
        (folder / CARD).write_text(model_card.model_card(folder, name=output.resolve().name), encoding="utf-8")


def fingerprint(base: str, revision: str | None) -> str:
    """A hash that tells a base whose weights are here from others."""
    local = Path(base)
    return base_fingerprint(local if local.is_dir() else hub.cached(base, hub.WEIGHTS, revision=revision))


# ---- rows, and progress ------------------------------------------------------------------------------------------


def comparable(table: Table, how: Encoding, policy: str, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """The rows that can be compared: with a prompt and an answer.

    Raises:
        DataError: a row has none and nobody asked to drop such rows, or no row is left.
    """
    kept, bad = [], []
    for row in table.rows:
        try:
            preference.encode_pair(row, how) if how.group == 2 else tokenize.encode_row(row, how)
        except TemplateError as error:
            bad.append({"row": table.name(row[ROW]), "reason": str(error)})
        else:
            kept.append(dict(row))
    if bad and policy == "stop":
        raise DataError(f"{audit.named(bad)}; mend the data, or drop such rows with --on_bad_rows drop")
    if not kept:
        raise DataError(
            f"no row of {', '.join(path for path, _ in table.parts)} can be compared: each lacks a text or an answer"
        )
    if bad:
        tell(f"{len(bad):,} row{'' if len(bad) == 1 else 's'} dropped: {audit.named(bad)}")
    return kept


@contextmanager
def progress(words: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal (a line every so often elsewhere); yields a function of (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    moving = shown and log.moving()
    columns = (TextColumn(words), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not moving, transient=True) as bar:
        task = bar.add_task(words, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if shown and not moving:
                print(f"{words} {done}/{total}", file=sys.stderr, flush=True)

        yield show
