"""What the peers share: arguments, rows, the model, and a record of every optimizer step.

Nothing here changes how a peer trains. The record costs two sums over integer tensors and one clock
reading a micro-batch, which is far below a thousandth of a step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import re
import resource
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")


def arguments(description: str) -> argparse.Namespace:
    """The command line of every peer."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--rows", required=True, type=Path, help="rows, one JSON object a line")
    parser.add_argument("--max_rows", type=int, help="use only the first N rows")
    parser.add_argument("--template", type=Path, help="text whose last {column} is the answer (SFT)")
    parser.add_argument("--order", type=Path, help="JSON list of row indices, in the order they are consumed")
    parser.add_argument("--init", type=Path, help="adapter (.safetensors, PEFT's names) to start from")
    parser.add_argument("--out", required=True, type=Path, help="JSON file for the record")
    parser.add_argument("--cutoff_len", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--micro_batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--lora_target_modules", default="gate_proj,down_proj,up_proj")
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--lora_alpha", type=float, default=16)
    parser.add_argument("--lora_dropout", type=float, default=0.0)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1, help="DPO's")
    parser.add_argument("--gradient_checkpointing", choices=("on", "off"), help="the library's default without it")
    parser.add_argument("--precompute_ref", choices=("on", "off"), default="off", help="DPO: reference before training")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    if args.batch_size % args.micro_batch_size:
        parser.error("--batch_size is no multiple of --micro_batch_size")
    return args


def read_rows(args: argparse.Namespace) -> list[dict[str, str]]:
    """SFT rows as `prompt` and `completion`, in the order in which they are to be consumed."""
    template = args.template.read_text(encoding="utf-8")
    return [split_row(row, template) for row in ordered(args)]


def read_pairs(args: argparse.Namespace) -> list[dict[str, str]]:
    """Preference rows as `prompt`, `chosen` and `rejected`, in the order in which they are to be consumed."""
    return [pair_of(row) for row in ordered(args)]


def ordered(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that the run's steps need, as they stand in the file."""
    lines = args.rows.read_text(encoding="utf-8").splitlines()[: args.max_rows]
    rows = [json.loads(line) for line in lines]
    order = list(range(len(rows))) if args.order is None else json.loads(args.order.read_text(encoding="utf-8"))
    outside = [index for index in order if not 0 <= index < len(rows)]
    if outside:
        raise SystemExit(f"{args.order} names row {outside[0]}, but there are {len(rows)} rows")
    return [rows[index] for index in order[: args.steps * args.batch_size]]


def pair_of(row: dict[str, Any]) -> dict[str, str]:
    """The prompt as byeori's template `question-answer` writes it; a system prompt only if there is one."""
    system = f"### System:\n{row['system']}\n\n" if row.get("system") else ""
    prompt = f"{system}### User:\n{row['question']}\n\n### Assistant:\n"
    return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}


def split_row(row: dict[str, Any], template: str) -> dict[str, str]:
    """Fill the template in. Braces inside a value stay as they are.

    `("### Q: {q}\\n### A: {a}\\n", {"q": "1+1", "a": "2"})` -> prompt `### Q: 1+1\\n### A: `, completion `2`.
    """
    text = template.rstrip()
    if "[[" in text or "{{" in text or not text.endswith("}"):
        raise SystemExit("the peers know plain {columns} only, and the last one must end the template")
    head, answer = text[: text.rindex("{")], text[text.rindex("{") + 1 : -1]
    prompt = re.sub(r"\{([^{}\n]*)\}", lambda match: str(row[match.group(1)]), head)
    return {"prompt": prompt, "completion": str(row[answer])}


def load_tokenizer(args: argparse.Namespace) -> Any:
    """The model's tokenizer; one without a padding token pads with its end-of-text token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(args: argparse.Namespace) -> Any:
    """The base model with its weights in `--dtype`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))


def lora_config(args: argparse.Namespace) -> Any:
    """The same adapter for every peer."""
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules.split(","),
        bias="none",
        task_type="CAUSAL_LM",
    )


def load_adapter(model: Any, path: Path | None) -> None:
    """Overwrite a PEFT model's adapter with the one in `path`; every tensor must find its place."""
    if path is None:
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(path)
    different = set(weights) ^ set(get_peft_model_state_dict(model))
    if different:
        raise SystemExit(f"{path} does not fit: {len(different)} names differ, such as {min(different)}")
    set_peft_model_state_dict(model, weights)


def shared_settings(args: argparse.Namespace) -> dict[str, Any]:
    """TrainingArguments that every peer gets; whatever is not named keeps the library's default."""
    chosen = {"gradient_checkpointing": args.gradient_checkpointing == "on"} if args.gradient_checkpointing else {}
    return {
        **chosen,
        "output_dir": str(args.out.with_suffix(".trainer")),
        "per_device_train_batch_size": args.micro_batch_size,
        "gradient_accumulation_steps": args.batch_size // args.micro_batch_size,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "linear",
        "bf16": args.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "seed": args.seed,
        "train_sampling_strategy": "sequential",  # the rows are already in order
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


@dataclass(kw_only=True)
class Record:
    """One value an optimizer step.

    losses: mean negative log-likelihood of the step's target tokens (DPO: mean over its pairs), unrounded; null where
        a step has none (the Trainer divides by zero then, which is what cutting off every answer leads to).
    step_seconds: from the first micro-batch's forward until the optimizer has stepped.
    tokens: tokens that are not padding. padded_tokens: with padding. target_tokens: tokens in the loss.
    reference_seconds: of the whole run, for the reference's log-probs where they are computed before training.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    padded_tokens: list[int] = field(default_factory=list)
    target_tokens: list[int] = field(default_factory=list)
    reference_seconds: float = 0.0

    def begin(self) -> None:
        """A step begins."""
        for column in (self.losses, self.tokens, self.padded_tokens, self.target_tokens):
            column.append(0)
        self._started = time.perf_counter()

    def add(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        """A micro-batch is done; its loss is already divided by the target tokens, or the pairs, of the whole step."""
        self.losses[-1] += loss.item()
        self.tokens[-1] += int(inputs["attention_mask"].sum())
        self.padded_tokens[-1] += inputs["attention_mask"].numel()
        targets = inputs["labels"] != -100 if "labels" in inputs else inputs["completion_mask"]
        self.target_tokens[-1] += int(targets[:, 1:].sum())

    def end(self) -> None:
        """The optimizer has stepped."""
        self.step_seconds.append(time.perf_counter() - self._started)

    def write(self, path: Path, name: str) -> None:
        """Everything as one JSON object."""
        columns = {column.name: getattr(self, column.name) for column in fields(self)}
        columns["losses"] = [loss if math.isfinite(loss) else None for loss in self.losses]
        found = {"name": name, **columns, "peak_rss_bytes": peak_rss_bytes(), "versions": versions()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


class Clock(TrainerCallback):
    """Tells the record where optimizer steps begin and end."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Before the first micro-batch of a step."""
        self.record.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the optimizer."""
        self.record.end()


class Recorded:
    """Mixed in before a Trainer: passes each micro-batch's unrounded loss to `self.record`."""

    record: Record

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's own step, and then the record."""
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        self.record.add(loss, inputs)
        return loss


def run(trainer: Any, args: argparse.Namespace, name: str) -> None:
    """Train, and write the record."""
    trainer.record = Record(reference_seconds=getattr(trainer, "reference_seconds", 0.0))
    trainer.add_callback(Clock(trainer.record))
    trainer.train()
    trainer.record.write(args.out, name)


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """Versions of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
