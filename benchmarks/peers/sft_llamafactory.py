"""LLaMA-Factory's SFT, through its own `run_exp`, on rows as its alpaca format has them.

Its audio module imports torchaudio, whose wheels on PyPI are built for CUDA and do not load beside a CPU torch; text
needs none of it, so an empty module stands in. Its gradient checkpointing is on unless it is switched off.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import common
import torch

_PLAIN = "byeori_bench"


def main(stage: str = "sft") -> None:
    """Train and write the record."""
    args = common.arguments(f"LLaMA-Factory, stage {stage}")
    sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    from llamafactory.train.tuner import run_exp

    register_template()
    record = common.Record()
    watch(stage, record)
    run_exp(settings(args, stage), callbacks=[common.Clock(record)])
    record.write(args.out, "llamafactory")


def register_template() -> None:
    """The prompt as it stands in the row, the answer and the end-of-text token."""
    from llamafactory.data.formatter import EmptyFormatter, StringFormatter
    from llamafactory.data.template import register_template

    register_template(
        name=_PLAIN,
        format_prefix=EmptyFormatter(slots=[{"bos_token"}]),
        format_user=StringFormatter(slots=["{{content}}"]),
        format_assistant=StringFormatter(slots=["{{content}}", {"eos_token"}]),
    )


def watch(stage: str, record: common.Record) -> None:
    """Pass each micro-batch's loss to the record."""
    if stage == "sft":
        from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer as Trainer
    else:
        from llamafactory.train.dpo.trainer import CustomDPOTrainer as Trainer
    step = Trainer.training_step

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen = dict(inputs)  # the DPO trainer takes labels out
        loss = step(self, model, inputs, *args, **kwargs)
        record.add(loss, seen)
        return loss

    Trainer.training_step = training_step


def settings(args: argparse.Namespace, stage: str) -> dict[str, Any]:
    """What `llamafactory-cli train` would read from a file."""
    return {
        "model_name_or_path": args.model,
        "stage": stage,
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": args.lora_r,
        "lora_alpha": int(args.lora_alpha),
        "lora_dropout": args.lora_dropout,
        "lora_target": args.lora_target_modules,
        "dataset_dir": str(write_rows(args, stage)),
        "dataset": "rows",
        "template": _PLAIN,
        "cutoff_len": args.cutoff_len,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": args.gradient_checkpointing == "off",
        "per_device_train_batch_size": args.micro_batch_size,
        "gradient_accumulation_steps": args.batch_size // args.micro_batch_size,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",
        "bf16": args.dtype == "bfloat16",
        "use_cpu": True,
        "seed": args.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": str(args.out.with_suffix(".trainer")),
        **({"pref_beta": args.beta, "pref_loss": "sigmoid"} if stage == "dpo" else {}),
    }


def write_rows(args: argparse.Namespace, stage: str) -> Path:
    """A folder with the rows and the dataset_info.json that describes them."""
    rows = common.read_rows(args) if stage == "sft" else common.read_pairs(args)
    answers = {"response": "completion"} if stage == "sft" else {"chosen": "chosen", "rejected": "rejected"}
    folder = args.out.with_suffix(".data")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    info = {"file_name": "rows.json", "ranking": stage == "dpo", "columns": {"prompt": "prompt", **answers}}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": info}), encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
