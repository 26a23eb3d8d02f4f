"""`byeori demo`: fine-tune, merge, generate and compare with the embedded model and the Korean sample rows."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path

import torch

from byeori.commands.compare import CompareResult, compare
from byeori.commands.demo_model import demo_model
from byeori.commands.generate import generate
from byeori.commands.merge import merge
from byeori.commands.train import sft
from byeori.config import CompareSettings, DemoSettings, GenerateSettings, MergeSettings, SftSettings, check
from byeori.model import load
from byeori.model.demo_model import TERMS
from byeori.plan.machines import measured_peak
from byeori.support.console import say

# FLOP/s of a processor on which three epochs and all later steps take less than ten minutes.
_FAST = 250e9


def demo(settings: DemoSettings) -> CompareResult:
    """Run the demo. Every step is the function that the command line calls.

    Raises:
        ByeoriError: if a step fails.
    """
    began, output = time.monotonic(), Path(settings.output_dir)
    samples = Path(str(resources.files("byeori.data") / "samples"))
    say(TERMS)
    _step(1, "the embedded model, Gemma 3 270M")
    base = str(demo_model())
    adapter, merged = str(output / "adapter"), str(output / "merged")
    _step(2, "fine-tune: Korean news text -> title, LoRA on gate/up/down")
    epochs = _epochs()
    sft(
        check(
            SftSettings,
            {
                "base_model": base,
                "data_path": str(samples / "titles-ko-train.jsonl"),
                "output_dir": adapter,
                "val_set_size": 16,
                "num_epochs": epochs,
                "learning_rate": 3e-4,
                "lora_target_modules": "gate_proj, down_proj, up_proj",
                "lr_scheduler": "cosine",
                "warmup_ratio": 0.05,
                "overwrite_output_dir": True,
            },
        )
    )
    _step(3, "merge the adapter into the base")
    merge(check(MergeSettings, {"peft_model_path": adapter, "output_dir": merged, "overwrite_output_dir": True}))
    _step(4, "generate with the merged model")
    held_out = samples / "titles-ko-test.jsonl"
    document = json.loads(held_out.read_text(encoding="utf-8").splitlines()[0])["document"]
    say(f"document: {document}")
    generate(check(GenerateSettings, {"model": merged, "columns": {"document": document}, "max_new_tokens": 48}))
    _step(5, "compare base and tuned on held-out rows")
    result = compare(
        check(
            CompareSettings,
            {
                "adapter": adapter,
                "data_path": str(held_out),
                "output_dir": str(output / "report"),
                "max_new_tokens": 48,
                "generation_batch_size": 11,
                "overwrite_output_dir": True,
            },
        )
    )
    say(f"Finished in {(time.monotonic() - began) / 60:.1f} minutes")
    print(result.report)
    return result


def _epochs() -> int:
    """Return 3, or 1 if there is no GPU and the processor would take too long."""
    if torch.cuda.is_available():
        return 3
    speed = measured_peak(load.resolve_dtype("auto", torch.device("cpu")))
    if speed >= _FAST:
        return 3
    say(f"One epoch instead of three: this processor reaches {speed / 1e9:,.0f} GFLOP/s")
    return 1


def _step(number: int, text: str) -> None:
    say(f"\n[{number}/5] {text}")
