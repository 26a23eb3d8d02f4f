"""The model card: README.md of a finished adapter or merged model, made from the files next to it.

    adapter_config.json, byeori.yaml, template.txt, audit.json, metrics.json, train_log.jsonl, merge_report.json
        ──(each one optional)──> YAML header + Markdown

The metrics, audit and log of a merged model are those of its adapter, in the adapter's folder. Of a local path only
the last name is shown, and no text of data or settings can break out of its fence or cell.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from byeori.artifacts import layout
from byeori.artifacts.serving import fenced, usage
from byeori.data import row_kinds
from byeori.errors import ByeoriError, ModelError
from byeori.support import hub
from byeori.support.atomic_files import sha256
from byeori.support.foreign_files import json_file, json_lines
from byeori.support.text_files import exists, read_text
from byeori.support.yaml_files import yaml_mapping

MARK = "<!-- This card was written by byeori; it is written anew unless this line is removed. -->"

_SHOWN = (
    "finetune",
    "train_layers",
    "seed",
    "num_epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "lr_scheduler",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "cutoff_len",
    "train_on_inputs",
    "add_eos_token",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "neftune_noise_alpha",
    "loss",
    "beta",
    "dtype",
)
_DATA_ENDINGS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_UNKNOWN = "A causal language model; no file next to it tells how it was made."


def is_local_path(text: str) -> bool:
    """Return whether this is a path on one machine (`/a/b`, `~/a`, `../a`, `C:\\a`, `file://a`)."""
    return "\n" not in text and bool(re.match(r"(/|~|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\|file:)", text))


def last_name(text: str) -> str:
    """`/home/me/rows.jsonl` -> `rows.jsonl`; `C:\\models\\gemma` -> `gemma`."""
    return re.split(r"[/\\]", text.rstrip("/\\"))[-1] or "local"


def public_name(text: str) -> str:
    """Return a Hub id as it is, and the last name of anything local."""
    return text if is_hub_id(text) else last_name(text)


def is_hub_id(text: str) -> bool:
    """Return whether this is `name` or `user/name` on the Hub, and not a local file or folder."""
    shaped = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text) is not None
    return shaped and not text.lower().endswith(_DATA_ENDINGS) and not Path(text).exists()


def model_card(
    folder: Path,
    *,
    name: str | None = None,
    paths: dict[str, Path] | None = None,
    exported: dict[str, Any] | None = None,
) -> str:
    """Return the README.md of a folder. name: its Hub id, or the folder that it will be in, if not this one.

    paths: what `findings` returns for it, if that is known already. exported: export_report.json, for the card of an
    export of this folder.
    """
    adapter = _read_json(folder / layout.ADAPTER_CONFIG)
    settings = _read_settings(folder / layout.SETTINGS)
    report = _read_json(folder / layout.MERGE_REPORT)
    merged, known = not adapter, bool(adapter or settings or report)
    full = settings.get("finetune") == "full" and merged
    tags = ["byeori", *([] if full else ["lora"]), row_kinds.recorded(settings).command] if known else []
    base = str(adapter.get("base_model_name_or_path") or settings.get("base_model") or report.get("base") or "")
    found_in = paths or findings(folder)
    data = settings.get("data_path") or []
    sources = [str(item) for item in (data if isinstance(data, list) else [data])]
    name = name or folder.resolve().name
    parts = [
        _header(base, sources, merged=merged, tags=tags),
        MARK,
        f"# {_inline(name.rpartition('/')[2])}",
        _what(base, adapter, report, full=full) if known else _UNKNOWN,
        _template(folder / layout.TEMPLATE),
        _data(sources, _read_json(found_in[layout.AUDIT])),
        _settings(settings, adapter, found_in[layout.LOG]),
        _result(_read_json(found_in[layout.METRICS]), report),
        _export(exported or {}),
        usage(
            folder,
            name,
            public_name(base) if base else "BASE_MODEL",
            adapter,
            exported or {},
            _read_json(_folder_of(base) / layout.CONFIG if adapter else folder / layout.CONFIG),
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _folder_of(base: str) -> Path:
    """The folder of a base, if it is here or in the Hub's cache."""
    if not base or (exists(base) and Path(base).is_dir()):
        return Path(base)
    try:
        return hub.cached(base, (layout.CONFIG,))
    except (OSError, ValueError):
        return Path(base)


def findings(folder: Path) -> dict[str, Path]:
    """Return the paths of metrics.json, audit.json and train_log.jsonl of an adapter or a merged model, by name.

    Those of a merged model may be in its adapter's folder, if that still has the weights that were merged: they are
    hashed to know that.
    """
    paths = {name: folder / name for name in (layout.METRICS, layout.AUDIT, layout.LOG)}
    report = _read_json(folder / layout.MERGE_REPORT)
    adapter = Path(str(report.get("adapter") or folder))
    weights = adapter / layout.ADAPTER
    if report and exists(str(weights)) and weights.is_file() and sha256(weights) == report.get("adapter_sha256"):
        paths = {name: path if path.is_file() else adapter / name for name, path in paths.items()}
    return paths


def is_generated(text: str) -> bool:
    """Return whether a card may be overwritten: it is byeori's own, or the blank one that PEFT writes."""
    return MARK in text or "[More Information Needed]" in text


def _header(base: str, paths: list[str], *, merged: bool, tags: list[str]) -> str:
    fields: dict[str, Any] = {}
    if base and is_hub_id(base):
        fields["base_model"] = base
        fields["base_model_relation"] = "finetune" if merged else "adapter"
    fields["library_name"] = "transformers" if merged else "peft"
    fields["pipeline_tag"] = "text-generation"
    if tags:
        fields["tags"] = tags
    if datasets := [path for path in paths if "/" in path and is_hub_id(path)]:
        fields["datasets"] = datasets
    return f"---\n{yaml.safe_dump(fields, allow_unicode=True, sort_keys=False)}---"


def _what(base: str, adapter: dict[str, Any], report: dict[str, Any], *, full: bool) -> str:
    origin = f"`{_code(public_name(base))}`" if base else "its base model"
    tool = "byeori"
    if adapter:
        text = (
            f"A LoRA adapter (rank {_inline(adapter.get('r', '?'))}) for {origin}, trained with {tool}. It works only "
            "together with that base model, and with the prompt below."
        )
    elif full:
        text = f"{origin} fine-tuned in full with {tool}. It expects the prompt below."
    else:
        text = f"{origin} fine-tuned with LoRA and merged into one model with {tool}. It expects the prompt below."
    numbers = [report.get(name) for name in ("max_abs_difference", "max_logit")]
    if report.get("verdict") == "equal" and all(isinstance(number, (int, float)) for number in numbers):
        text += (
            f" Its logits were compared with those of the adapter on the base: largest difference {numbers[0]:.2g}, "
            f"largest logit {numbers[1]:.3g} ({_inline(report.get('dtype', '-'))})."
        )
    return text + " The licence and terms of the base model apply."


def _template(path: Path) -> str:
    if not path.is_file():
        return ""
    lead = "The `{columns}` are filled in; the model writes the last one."
    return f"## Prompt template\n\n{lead}\n\n{fenced(read_text(path, ModelError))}"


def _data(paths: list[str], audit: dict[str, Any]) -> str:
    lines = [f"- `{_code(public_name(path))}`" for path in paths]
    counts = {key: value for key, value in audit.items() if isinstance(value, (int, float)) and value is not True}
    if counts:
        lines += ["", "| count | |", "|---|---|", *(f"| {_inline(key)} | {_number(counts[key])} |" for key in counts)]
    return "## Data\n\n" + "\n".join(lines) if lines else ""


def _settings(settings: dict[str, Any], adapter: dict[str, Any], log: Path) -> str:
    shown = {name: settings[name] for name in _SHOWN if settings.get(name) is not None}
    if settings.get("finetune") == "full":
        shown = {name: value for name, value in shown.items() if not name.startswith("lora_")}
    if adapter and not settings:
        shown = {
            name: adapter[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules") if name in adapter
        }
    shown |= _last_losses(log)
    if not shown:
        return ""
    rows = [f"| {_inline(name)} | {_inline(_number(value))} |" for name, value in shown.items()]
    return "\n".join(["## Training", "", "| setting | value |", "|---|---|", *rows])


def _last_losses(log: Path) -> dict[str, Any]:
    """Steps, last training loss and last evaluation loss of a run's log."""
    losses: dict[str, Any] = {}
    names = {"step": "steps", "loss": "last training loss", "eval_loss": "last evaluation loss"}
    for entry in json_lines(log) if log.is_file() else ():
        losses |= {names[key]: entry[key] for key in names if isinstance(entry.get(key), (int, float))}
    return losses


def _result(metrics: dict[str, Any], report: dict[str, Any]) -> str:
    sides = [metrics.get(key) for key in ("base", "tuned", "difference")]
    if not all(isinstance(side, dict) for side in sides):
        return ""
    base, tuned, difference = (side or {} for side in sides)
    rows = [
        f"| {_inline(name)} | {_number(base[name])} | {_number(tuned.get(name))} | {_interval(difference.get(name))} |"
        for name in base
        if base[name] is not None
    ]
    if not rows:
        return ""
    count = metrics.get("rows")
    over = f" over {count:,} rows" if isinstance(count, int) else ""
    lead = f"Base and tuned model on the same prompts{over}; the difference is tuned - base, with its 95% interval."
    return "\n".join(["## Result", "", lead, "", "| metric | base | tuned | difference |", "|---|---|---|---|", *rows])


def _export(report: dict[str, Any]) -> str:
    """Say what was exported, and how its answers compare with the original's."""
    if not report:
        return ""
    files = ", ".join(f"`{_code(name)}`" for name in report["files"])
    lines = [f"{files} ({_inline(report['weights'])})."]
    for engine, found in report["checks"].items():
        rows = found["rows"]
        text = f"{_inline(engine)}: {found['equal_prompts']} of {rows} prompts have the trained token ids"
        if "equal_answers" in found:
            text += f", {found['equal_answers']} of {rows} greedy answers are equal to those of the original"
        lines.append(f"- {text}.")
    lines += [f"- {_inline(note)}." for note in report["notes"]]
    return "## Export\n\n" + lines[0] + "\n\n" + "\n".join(lines[1:])


def _interval(value: Any) -> str:
    if not isinstance(value, dict) or value.get("mean") is None:
        return "-"
    return f"{_number(value['mean'])} ({_number(value.get('low'))} to {_number(value.get('high'))})"


def _inline(value: object) -> str:
    """One line of Markdown text that ends no table cell and starts no markup."""
    text = re.sub(r"\s+", " ", ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")[:300]


def _code(text: str) -> str:
    """Text for a code span, which knows no escapes."""
    return re.sub(r"[`|\s]+", " ", text)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _inline("-" if value is None else value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is missing or something else."""
    try:
        value = json_file(path)
    except ByeoriError:
        return {}
    return value if isinstance(value, dict) else {}


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return yaml_mapping(path, what="settings", advice="copy it again")
    except ByeoriError:
        return {}
