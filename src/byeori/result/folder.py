"""Folders that runs leave and results start from: what is written beside an adapter, and how it is opened again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from byeori import config
from byeori.data import sources, template, tokenize
from byeori.data.tokenize import Encoding
from byeori.errors import CheckpointError, ConfigError, DataError, ModelError, TemplateError
from byeori.model import load, lora, parallel
from byeori.model.fingerprint import base_fingerprint
from byeori.result import card, generate
from byeori.train import checkpoint, log

TEMPLATE = "template.txt"
SETTINGS = "byeori.yaml"
BASE = "byeori_base.json"
AUDIT = "audit.json"
_RUN_FILES = (
    "adapter_config.json",
    checkpoint.ADAPTER,
    log.FILE,
    SETTINGS,
    TEMPLATE,
    BASE,
    AUDIT,
    "order.json",
    "README.md",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A model ready to answer. is_adapter: the base with an adapter on it (which can be switched off)."""

    model: Any
    tokenizer: Any
    is_adapter: bool
    base_name: str


# ---- output folders ----------------------------------------------------------------------------------------------


def claim(
    output: Path,
    resume: str | None,
    overwrite: bool,
    tell: Callable[[str], None],
    processes: parallel.Processes,
) -> Path | None:
    """Make the output folder of a run ready; the checkpoint to go on from, or None.

    Raises:
        CheckpointError: the folder holds another run, cannot be written, or has nothing to resume.
    """
    folder: Path | None = None
    if resume == "latest":
        folder = checkpoint.newest(output, tell)
        if folder is None and checkpoint.steps(output):
            raise CheckpointError(
                f"no checkpoint in {output} is whole; start anew with --overwrite_output_dir"
            )
        if folder is None:
            tell(f"No checkpoint in {output} yet; starting at step 0")
    elif resume is not None:
        folder = Path(resume)
    if processes.main:
        held = [name for name in _RUN_FILES if (output / name).exists()] or checkpoint.steps(output)
        if held and resume is None and not overwrite:
            raise CheckpointError(
                f"{output} holds another run; go on with --resume_from_checkpoint latest, choose another --output_dir, "
                "or start anew with --overwrite_output_dir"
            )
        if held and overwrite and resume is None:
            _clear(output)
        try:
            output.mkdir(parents=True, exist_ok=True)
            (output / ".writable").touch()
            (output / ".writable").unlink()
        except OSError as error:
            raise CheckpointError(
                f"cannot write into {output} ({error.strerror}); choose another --output_dir"
            ) from None
    parallel.wait(processes)
    return folder


def _clear(output: Path) -> None:
    for name in _RUN_FILES:
        (output / name).unlink(missing_ok=True)
    for _, folder in checkpoint.steps(output):
        shutil.rmtree(folder)


def claim_result(output: Path, marker: str, overwrite: bool) -> None:
    """Make a folder for results, refusing to write over an earlier one.

    Raises:
        CheckpointError: it holds results already, or cannot be made.
    """
    if (output / marker).exists() and not overwrite:
        raise CheckpointError(
            f"{output} holds results already; choose another --output_dir or --overwrite_output_dir"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {output} ({error.strerror}); choose another --output_dir"
        ) from None


def write_beside(folder: Path, how: Encoding, settings: config.Settings) -> None:
    """Tokenizer, template, chat template and resolved settings: all that a server needs for the trained prompt."""
    tokenizer = how.tokenizer
    if how.template is not None:
        (folder / TEMPLATE).write_text(how.template.text, encoding="utf-8")
        before = tokenizer.chat_template
        tokenizer.chat_template = template.chat_template(
            how.template, tokenizer.bos_token if how.bos is not None else ""
        )
        tokenizer.save_pretrained(str(folder))
        tokenizer.chat_template = before
    else:
        tokenizer.save_pretrained(str(folder))
    config.write_yaml(settings, folder / SETTINGS)
    names = ("byeori", "torch", "transformers", "peft", "datasets", "tokenizers", "safetensors")
    versions = {name: version(name) for name in names}
    (folder / "versions.json").write_text(json.dumps(versions, indent=1), encoding="utf-8")


def write_run_facts(folder: Path, output: Path, found: dict[str, Any], settings: config.SftSettings) -> None:
    """The audit, which base it was, and the model card."""
    (folder / AUDIT).write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
    base = {"base_model": settings.base_model, "sha256": _fingerprint(settings)}
    (folder / BASE).write_text(json.dumps(base, indent=1), encoding="utf-8")
    shutil.copy(output / log.FILE, folder / log.FILE)
    (folder / "README.md").write_text(card.model_card(folder), encoding="utf-8")


def _fingerprint(settings: config.SftSettings) -> str | None:
    local = Path(settings.base_model)
    if not local.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        found = snapshot_download(
            settings.base_model, revision=settings.revision, allow_patterns=patterns, local_files_only=True
        )
        local = Path(found)
    return base_fingerprint(local)


# ---- opening what a run left -------------------------------------------------------------------------------------


def open_model(name: str, base: str | None, dtype_name: str, device: torch.device) -> Opened:
    """A model or an adapter on its base, from a folder or the Hub.

    Raises:
        ModelError, HubError: not there, damaged, or an adapter that does not fit its base.
    """
    from peft import PeftConfig, PeftModel

    dtype = load.resolve_dtype(dtype_name, device)
    is_adapter = (Path(name) / "adapter_config.json").is_file() or (
        not Path(name).exists() and _hub_adapter(name)
    )
    if not is_adapter:
        tokenizer, _ = load.load_tokenizer(name)
        return Opened(
            model=load.load_model(name, dtype=dtype, device=device),
            tokenizer=tokenizer,
            is_adapter=False,
            base_name=name,
        )
    try:
        recorded = PeftConfig.from_pretrained(name).base_model_name_or_path
    except (ValueError, OSError, TypeError) as error:
        raise ModelError(f"the adapter_config.json of {name} cannot be read: {error}") from None
    base_name = base or recorded
    if not base_name:
        raise ModelError(f"the adapter {name} does not say which base it belongs to; give --base_model")
    tokenizer, _ = load.load_tokenizer(name if (Path(name) / "tokenizer_config.json").exists() else base_name)
    model = load.load_model(base_name, dtype=dtype, device=device)
    if (Path(name) / "adapter_model.bin").exists() and not (Path(name) / checkpoint.ADAPTER).exists():
        raise ModelError(
            f"{name} holds a pickle (adapter_model.bin), which is never loaded; convert it to safetensors"
        )
    try:
        tuned = PeftModel.from_pretrained(model, name, use_safetensors=True)
    except (RuntimeError, ValueError, OSError, TypeError) as error:
        first = str(error).strip().splitlines()[0][:300]
        raise ModelError(f"the adapter {name} does not fit the base {base_name}: {first}") from None
    except (
        Exception
    ) as error:  # safetensors raises its own kind, which does not inherit from any of the above
        raise ModelError(f"the adapter {name} is damaged: {error}") from None
    lora.fuse(tuned)
    return Opened(model=tuned.eval(), tokenizer=tokenizer, is_adapter=True, base_name=base_name)


def _hub_adapter(name: str) -> bool:
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return file_exists(name, "adapter_config.json")
    except (HfHubHTTPError, HFValidationError, OSError):
        return False


def encoding_of(name: str, tokenizer: Any, spec: str | None, *, cutoff_len: int = sys.maxsize) -> Encoding:
    """The template that was saved beside the weights (or the one named), and how it becomes tokens.

    Raises:
        TemplateError: nothing was saved and nothing is named.
    """
    saved = Path(name) / TEMPLATE
    if spec is not None:
        chosen = template.resolve(spec)
    elif saved.is_file():
        chosen = template.parse(saved.read_text(encoding="utf-8"), TEMPLATE)
    elif tokenizer.chat_template:
        chosen = None
    else:
        raise TemplateError(f"{name} has neither a saved {TEMPLATE} nor a chat template; give --template")
    return tokenize.encoding(
        tokenizer,
        chosen,
        cutoff_len=cutoff_len,
        add_eos_token=tokenizer.eos_token_id is not None,
        train_on_inputs=False,
    )


def bare(how: Encoding) -> Encoding:
    """The same without an end-of-text token, for text that is a prompt already."""
    return replace(how, eos=None)


def comparable(rows: Any, how: Encoding, paths: list[str], policy: str) -> list[dict[str, Any]]:
    """The rows that can be compared: with a prompt and an answer.

    Raises:
        DataError: a row has none and nobody asked to drop such rows, or no row is left.
    """
    kept = []
    for row in rows:
        try:
            tokenize.encode_row(row, how)
        except TemplateError as error:
            if policy == "stop":
                name = sources.row_name(paths, row[sources.ROW])
                raise DataError(
                    f"{name}: {error}; mend it, or drop such rows with --on_bad_rows drop"
                ) from None
            continue
        kept.append(dict(row))
    if not kept:
        raise DataError(f"no row of {', '.join(paths)} can be compared: each lacks a text or an answer")
    return kept


def shown_settings(adapter: str) -> dict[str, object]:
    """The settings of the run that made an adapter, for the report."""
    path = Path(adapter) / SETTINGS
    return dict(config.read_yaml(str(path))) if path.is_file() else {}


# ---- answering ---------------------------------------------------------------------------------------------------


def answer_rows(
    opened: Opened,
    how: Encoding,
    rows: list[dict[str, Any]],
    sampling: generate.Sampling,
    batch_size: int,
    output: str | None,
) -> list[str]:
    """Answer every row; written as rows with an `output` column, each batch at once, at the end in the rows' order."""
    prompts = [tokenize.encode_prompt(row, how) for row in rows]
    suffix = how.template.suffix if how.template else ""
    answers: dict[int, str] = {}
    path = Path(output) if output else None

    def line(index: int) -> str:
        row = {name: value for name, value in rows[index].items() if name != sources.ROW}
        return json.dumps({**row, "output": answers[index]}, ensure_ascii=False) + "\n"

    with progress("Answering") as on_progress:
        for batch in generate.batches(prompts, batch_size):
            found = generate.answer(
                opened.model, opened.tokenizer, [prompts[i] for i in batch], sampling, suffix=suffix
            )
            answers.update({index: item.text for index, item in zip(batch, found, strict=True)})
            if path:
                with path.open("a" if len(answers) > len(batch) else "w", encoding="utf-8") as file:
                    file.writelines(map(line, batch))
            on_progress(len(answers), len(rows))
    text = "".join(line(index) for index in range(len(rows)))
    if path:
        path.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return [answers[index] for index in range(len(rows))]


def text_or_file(value: str) -> str:
    """A flag's text; `@file` is the file's text.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8-sig").strip("\n")
    except OSError as error:
        raise ConfigError(f"cannot read {value[1:]}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"{value[1:]} is not UTF-8; convert it, for instance with iconv -f cp949 -t utf-8"
        ) from None


def standard_input(what: str) -> str:
    """What stands on standard input; asked for where a person sits there."""
    if sys.stdin is None or sys.stdin.closed:
        raise ConfigError(f"{what} is missing: give it as a flag or on standard input")
    if sys.stdin.isatty():
        print(f"Type {what}, then Ctrl-D:", file=sys.stderr)
    text = sys.stdin.read().strip("\n")
    if not text.strip():
        raise ConfigError(f"{what} is missing: give it as a flag or on standard input")
    return text


@contextmanager
def progress(words: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal (a line every so often elsewhere); yields a function of (done, total)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    moving = console.is_terminal or console.is_jupyter
    columns = (TextColumn(words), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not moving, transient=True) as bar:
        task = bar.add_task(words, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not moving:
                print(f"{words} {done}/{total}", file=sys.stderr, flush=True)

        yield show
