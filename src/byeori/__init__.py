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

Every function takes the settings of the command of the same name (config.py) as keywords.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# The folder plan/ and the function plan() have one name. Python binds a folder's name in its parent when it imports the
# folder first: here, above the function, and never again.
import byeori.plan  # noqa: F401
from byeori import config
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

if TYPE_CHECKING:
    from byeori.commands.compare import CompareResult
    from byeori.commands.train import TrainResult
    from byeori.export.merge import MergeResult
    from byeori.export.publish import PublishResult
    from byeori.plan.report import PlanResult

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


def sft(**settings: Any) -> TrainResult:
    """Fine-tune a LoRA adapter; keywords are config.SftSettings. Raises ByeoriError."""
    from byeori.commands import train as command

    return command.sft(config.check(config.SftSettings, settings))


def dpo(**settings: Any) -> TrainResult:
    """Prefer chosen answers to rejected ones; keywords are config.DpoSettings. Raises ByeoriError."""
    from byeori.commands import train as command

    return command.dpo(config.check(config.DpoSettings, settings))


def plan(**settings: Any) -> PlanResult:
    """What a run needs, on which machine; keywords are config.PlanSettings. Returns the plan. Raises ByeoriError."""
    from byeori.commands import plan as planning

    return planning.plan(config.check(config.PlanSettings, settings))


def preview(**settings: Any) -> dict[str, Any]:
    """Show what the model will see; keywords are config.PreviewSettings. Returns the audit. Raises ByeoriError."""
    from byeori.commands import preview as command

    return command.preview(config.check(config.PreviewSettings, settings))


def merge(**settings: Any) -> MergeResult:
    """Write an adapter into its base; keywords are config.MergeSettings. Raises ByeoriError."""
    from byeori.commands import merge as command

    result: MergeResult = command.merge(config.check(config.MergeSettings, settings))
    return result


def generate(**settings: Any) -> list[str]:
    """Answer a prompt or a table; keywords are config.GenerateSettings. Returns the answers. Raises ByeoriError."""
    from byeori.commands import generate as command

    return command.generate(config.check(config.GenerateSettings, settings))


def compare(**settings: Any) -> CompareResult:
    """Base and tuned side by side; keywords are config.CompareSettings. Raises ByeoriError."""
    from byeori.commands import compare as command

    return command.compare(config.check(config.CompareSettings, settings))


def publish(**settings: Any) -> PublishResult:
    """Upload to the Hub; keywords are config.PublishSettings. Raises ByeoriError."""
    from byeori.commands import publish as command

    result: PublishResult = command.publish(config.check(config.PublishSettings, settings))
    return result


def demo(**settings: Any) -> CompareResult:
    """The whole job on the embedded model; keywords are config.DemoSettings. Raises ByeoriError."""
    from byeori.commands import demo as demonstration

    return demonstration.demo(config.check(config.DemoSettings, settings))


def demo_model() -> Path:
    """The folder of the embedded model, made the first time. Raises ModelError."""
    from byeori.commands import demo_model as command

    return command.demo_model()
