"""The combination of several adapters as an adapter: its weights and the files beside them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from byeori.artifacts import layout, records, saved_model
from byeori.artifacts.saved_model import SavedModel
from byeori.errors import ConfigError, ModelError
from byeori.model import adapter
from byeori.support.text_files import one_line

# of one run, or written anew
_OWN = (
    layout.ADAPTER, layout.ADAPTER_CONFIG, layout.CARD, layout.SETTINGS, layout.LOG, layout.LIVE, layout.ORDER,
    layout.AUDIT, layout.PLAN, layout.METRICS, layout.ROWS, layout.REPORT,
)  # fmt: skip
_OF_ONE_RUN = ("output_dir", "lora_r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")


def check(runs: Sequence[SavedModel], kind: str) -> None:
    """Raise unless adapters can be combined. kind: stack or average.

    Raises:
        ConfigError: if one has more than low-rank matrices, or their templates or ranks differ.
    """
    templates = [saved_model.template_of(run, None) for run in runs]
    configs = [records.adapter_config(run.folder) if run.is_adapter else {} for run in runs]
    for run, template, config in zip(runs, templates, configs, strict=True):
        if template != templates[0]:
            raise ConfigError(
                f"--combine {kind} needs runs of one template, and those of {runs[0].name} and {run.name} differ; "
                "leave it out, or train both with the same --template"
            )
        if more := _more_than_lora(run, config):
            raise ConfigError(f"--combine {kind} combines LoRA matrices only, and {run.name} has {more}; leave it out")
    ranks = [config["r"] for config in configs]
    if kind == "average" and len(set(ranks)) > 1:
        raise ConfigError(
            f"--combine average needs adapters of one rank, and they have {', '.join(map(str, ranks))}; give --combine "
            "stack"
        )


def _more_than_lora(run: SavedModel, config: dict[str, Any]) -> str:
    if not run.is_adapter:
        return "no adapter: it is a whole model"
    if config.get("peft_type", "LORA") != "LORA":
        return f"an adapter of the kind {config['peft_type']}"
    if run.vocabulary is not None or config.get("modules_to_save"):
        return "trained layers beside them"
    known = {"use_dora": "DoRA's magnitudes", "target_parameters": "matrices of experts", "lora_bias": "biases"}
    if config.get("bias", "none") != "none":
        return "trained biases"
    return next((words for name, words in known.items() if config.get(name)), "")


def write(model: Any, runs: Sequence[SavedModel], kind: str, folder: Path) -> None:
    """Write the combination into an empty folder, with the tokenizer and template of the runs.

    model: their base. Settings in which the runs differ are left out.

    Raises:
        ModelError: if PEFT cannot combine them.
    """
    try:
        adapter.combine(model, [run.folder for run in runs], kind, folder)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        names = ", ".join(run.name for run in runs)
        raise ModelError(f"PEFT cannot combine {names} ({one_line(error, 200)}); leave out --combine") from None
    (folder / layout.CARD).unlink(missing_ok=True)
    for path in runs[0].folder.iterdir():
        if path.is_file() and path.name not in _OWN:
            shutil.copy(path, folder / path.name)
    common = {
        name: value
        for name, value in runs[0].settings.items()
        if name not in _OF_ONE_RUN and all(run.settings.get(name) == value for run in runs)
    }
    if common:
        text = yaml.safe_dump(common, allow_unicode=True, sort_keys=False)
        (folder / layout.SETTINGS).write_text(text, encoding="utf-8")
