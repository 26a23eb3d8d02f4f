"""byeori: fine-tune open language models, and prove that it helped.

    import byeori

    byeori.plan(base_model="...", data_path="rows.jsonl")
    byeori.rent(base_model="...", data_path="rows.jsonl")
    byeori.preview(base_model="...", data_path="rows.jsonl")
    byeori.sft(base_model="...", data_path="rows.jsonl", output_dir="adapter")
    byeori.dpo(base_model="adapter", data_path="pairs.jsonl", output_dir="preferred")
    byeori.merge(peft_model_path="adapter", output_dir="merged")
    byeori.export(model="merged", format="gguf", output_dir="gguf")
    byeori.generate(model="merged", columns={"document": "..."})
    byeori.compare(adapter="adapter", data_path="held_out.jsonl", output_dir="report")
    byeori.audit(adapter="adapter", output_dir="audit")
    byeori.publish(folder="merged", repo_id="user/name")
    byeori.demo(output_dir="demo-output")

Every function accepts the settings of the command of the same name as keywords; `help(byeori.sft)` lists them. Types
for editors and checkers are in __init__.pyi, which scripts/api_stub.py makes from the settings.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# The folders export/, plan/ and studio/ and the functions of these names share them. Python sets a folder's name in its
# parent when it first imports the folder: here, before the functions are defined, and never again.
import byeori.export
import byeori.plan  # noqa: F401
from byeori import config
from byeori.config import keywords
from byeori.errors import (
    ByeoriError,
    CheckpointError,
    ConfigError,
    DataError,
    GateError,
    HubError,
    ModelError,
    TemplateError,
    TooLongError,
    TrainingError,
)

importlib.import_module("byeori.studio")  # as above; it stands above commands/, which read the version here

__version__ = "0.1.0"

__all__ = [
    "ByeoriError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GateError",
    "HubError",
    "ModelError",
    "TemplateError",
    "TooLongError",
    "TrainingError",
    "audit",
    "chat",
    "compare",
    "demo",
    "demo_model",
    "doctor",
    "dpo",
    "export",
    "generate",
    "merge",
    "plan",
    "preview",
    "publish",
    "rent",
    "serve",
    "sft",
    "studio",
]


def _function(name: str, kind: type[config.Settings], result: str) -> Callable[..., Any]:
    """Return the function of a command. result: the type that it returns, for its signature."""

    def run(**settings: Any) -> Any:
        checked = config.check(kind, settings)
        from byeori.commands import checks

        checks.check(checked)
        module = importlib.import_module(f"byeori.commands.{'train' if name in ('sft', 'dpo') else name}")
        return getattr(module, name)(checked)

    run.__name__ = run.__qualname__ = name
    run.__doc__ = keywords.docstring(kind)
    run.__signature__ = keywords.signature(kind, result)  # type: ignore[attr-defined]
    return run


sft = _function("sft", config.SftSettings, "TrainResult")
dpo = _function("dpo", config.DpoSettings, "TrainResult")
plan = _function("plan", config.PlanSettings, "PlanResult")
rent = _function("rent", config.RentSettings, "PlanResult")
preview = _function("preview", config.PreviewSettings, "PreviewResult")
merge = _function("merge", config.MergeSettings, "MergeResult")
export = _function("export", config.ExportSettings, "ExportResult")
generate = _function("generate", config.GenerateSettings, "list[str]")
chat = _function("chat", config.ChatSettings, "None")
compare = _function("compare", config.CompareSettings, "CompareResult")
audit = _function("audit", config.AuditSettings, "AuditResult")
serve = _function("serve", config.ServeSettings, "None")
publish = _function("publish", config.PublishSettings, "PublishResult")
studio = _function("studio", config.StudioSettings, "None")
doctor = _function("doctor", config.DoctorSettings, "DoctorResult")
demo = _function("demo", config.DemoSettings, "CompareResult")
demo_model = _function("demo_model", config.DemoModelSettings, "Path")
