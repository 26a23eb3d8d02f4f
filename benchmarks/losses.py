"""byeori's first losses and those of the plain method: transformers' Trainer for SFT, TRL's DPOTrainer for DPO."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

from contestants import ADAPTER, BATCH, CONTESTANTS, Job, Run, order_of, run
from machine import apart
from report import finish
from workloads import WORKLOADS, few_shot_rows, short_rows

STEPS = {"sft": 10, "dpo": 5}
PLAIN = {"sft": "transformers", "dpo": "trl-tuned"}
TOLERANCES = {"sft": 1e-3, "dpo": 1e-4}


def compare_losses(args: argparse.Namespace, model: Path, facts: dict[str, str]) -> int:
    """Both from one adapter over the same rows; 1 if they differ."""
    equal = True
    lines = [
        "# Losses: byeori and the plain method",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        f"float32, dropout 0, batches of {BATCH}, one initial adapter, the same rows in the same order, all of them "
        "within cutoff_len.",
        "",
    ]
    init = args.out / "losses" / "initial-adapter"
    print("making the initial adapter ...", flush=True)
    apart(make_adapter, model, init)
    for name in args.workloads:
        table, within = loss_table(name, *run_losses(args, name, model, init))
        lines += table
        equal &= within
        finish(args.out / "LOSSES.md", "\n".join(lines))
    return 0 if equal else 1


def run_losses(args: argparse.Namespace, name: str, model: Path, init: Path) -> tuple[Run, Run]:
    """Both contestants on exactly the rows of one epoch, so that their schedules end at the same step."""
    work, folder = WORKLOADS[name], args.out / "losses" / name
    folder.mkdir(parents=True, exist_ok=True)
    steps, cutoff_len = args.steps or STEPS[work.command], args.cutoff_len or work.cutoff_len
    source, rows = args.data / work.file, folder / "rows.jsonl"
    if work.few_shot:
        whole, source = source, folder / "few-shot.jsonl"
        apart(few_shot_rows, model, whole, work.rows, source)
    note = apart(short_rows, model, work, source, steps * BATCH, cutoff_len, rows)
    print(f"{name}: {note}", flush=True)
    job = Job(
        command=work.command,
        model=model,
        rows=rows,
        count=steps * BATCH,
        template=work.template,
        steps=steps,
        cutoff_len=cutoff_len,
        dtype="float32",
        init=init,
    )
    ours = run_one("byeori", job, folder)
    order = order_of(folder / "byeori", steps)
    if order is None:
        raise SystemExit(f"{folder / 'byeori' / 'adapter'} has no order.json of {steps * BATCH} rows")
    return ours, run_one(PLAIN[work.command], replace(job, order=order), folder)


def run_one(contestant: str, job: Job, folder: Path) -> Run:
    """A contestant's run; a failure ends the comparison."""
    print(f"[{folder.name} losses] {contestant} ...", flush=True)
    found = run(CONTESTANTS[contestant], job, folder / contestant)
    if found.failure:
        raise SystemExit(f"{contestant}: {found.failure}; see {folder / contestant / 'log.txt'}")
    print(f"    {found.wall_seconds:.0f} s", flush=True)
    return found


def loss_table(name: str, ours: Run, theirs: Run) -> tuple[list[str], bool]:
    """Both losses step by step, and whether every step is within the tolerance."""
    tolerance = TOLERANCES[WORKLOADS[name].command]
    lines = [
        f"## {name}",
        "",
        f"| step | byeori | {theirs.name} | relative difference | targets |",
        "|---:|---:|---:|---:|---:|",
    ]
    worst = 0.0 if len(ours.losses) == len(theirs.losses) else math.inf
    for step, (left, right) in enumerate(zip(ours.losses, theirs.losses, strict=False)):
        difference = math.inf if left is None or right is None else abs(left - right) / abs(right)
        worst = max(worst, difference)
        targets = {ours.target_tokens[step], theirs.target_tokens[step]}
        counts = " / ".join(map(str, sorted(targets)))
        shown = " | ".join("none" if loss is None else f"{loss:.6f}" for loss in (left, right))
        lines.append(f"| {step + 1} | {shown} | {difference:.1e} | {counts} |")
    equal = worst <= tolerance
    verdict = "within" if equal else "NOT within"
    return [*lines, "", f"Largest relative difference {worst:.1e}: {verdict} {tolerance:.0e}.", ""], equal


def make_adapter(model: Path, folder: Path) -> None:
    """An adapter as PEFT initialises it (B = 0), saved in PEFT's format."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(int(ADAPTER["seed"]))
    config = LoraConfig(
        r=int(ADAPTER["lora_r"]),
        lora_alpha=int(ADAPTER["lora_alpha"]),
        lora_dropout=0.0,
        target_modules=ADAPTER["lora_target_modules"].split(","),
        bias="none",
        task_type="CAUSAL_LM",
    )
    get_peft_model(base, config).save_pretrained(folder)
