"""Losses of adapter variants beside plain PEFT and PyTorch on the same batches, on the embedded Gemma 3 270M.

    python benchmarks/adapter_kinds.py --steps 10

The peer is a loop of its own: PEFT's layers as PEFT makes them (PiSSA with its changed base), transformers' forward
pass one row at a time, torch.optim.AdamW (LoRA+: PEFT's create_loraplus_optimizer). Rows and tokens are those of the
run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import AutoModelForCausalLM

import byeori
from byeori import config
from byeori.batch import loader
from byeori.commands import _rows
from byeori.data import row_kinds, tokenized
from byeori.distributed.processes import Processes
from byeori.model.demo_model import embedded_model

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": ({}, {}),
    "rsLoRA": ({"use_rslora": True}, {"use_rslora": True}),
    "DoRA": ({"use_dora": True}, {"use_dora": True}),
    "PiSSA": ({"lora_init": "pissa"}, {"init_lora_weights": "pissa"}),
    "LoRA+": ({"loraplus_lr_ratio": 16}, {}),
}
TARGETS = ["q_proj", "v_proj"]
RATE, RANK, ALPHA, SEED = 2e-4, 8, 16, 42


def settings(base: Path, rows: Path, output: Path, steps: int) -> dict[str, Any]:
    return {
        "base_model": str(base),
        "data_path": str(rows),
        "output_dir": str(output),
        "max_steps": steps,
        "batch_size": 2,
        "cutoff_len": 160,
        "dtype": "float32",
        "learning_rate": RATE,
        "lr_scheduler": "constant",
        "max_grad_norm": 0,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_target_modules": TARGETS,
        "load_in_4bit": False,
        "template": "title-ko",
        "seed": SEED,
    }


def batches(values: dict[str, Any]) -> list[list[tuple[list[int], int]]]:
    """The rows of each step: (token ids, where the answer begins)."""
    given, start = _rows.begin(config.check(config.SftSettings, values))
    alone = Processes(rank=0, world=1, device=torch.device("cpu"))
    prepared, _ = _rows.prepare(given, start, row_kind=row_kinds.ANSWER, processes=alone)
    rows = tokenized.Rows(table=prepared.train)
    schedule = _rows.schedule(given, len(rows), rows)
    units = [[rows.unit(int(i))[0] for i in loader.step_rows(schedule, step, {})] for step in range(given.max_steps)]
    return [[(list(unit.token_ids), unit.targets[0][0]) for unit in step] for step in units]


def plain(base: Path, name: str, lora: dict[str, Any], steps: list[list[tuple[list[int], int]]]) -> list[float]:
    """The losses of the peer."""
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(SEED)
    shape: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = get_peft_model(causal, LoraConfig(**shape, **lora))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    if name == "LoRA+":
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16)
    losses = []
    for step in steps:
        count = sum(len(ids) - start for ids, start in step)
        total = 0.0
        optimizer.zero_grad()
        for ids, start in step:
            logp = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            loss = -logp.gather(1, torch.tensor(ids[start:])[:, None]).sum() / count
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    given = parser.parse_args()
    base = embedded_model(print)
    samples = Path(byeori.__file__).parent / "data" / "samples" / "titles-ko-train.jsonl"
    print(
        "| adapter | first loss | last loss, byeori | last loss, plain PEFT | largest difference of a step, relative |"
    )
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()[: 2 * given.steps]]
        short = [line | {"document": line["document"][:100]} for line in lines]
        rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in short), encoding="utf-8")
        for name in given.kinds:
            own, lora = KINDS[name]
            output = Path(folder) / name
            values = settings(base, rows, output, given.steps)
            byeori.sft(**values | own)
            log = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
            found = [line["loss"] for line in log if "loss" in line]
            expected = plain(base, name, lora, batches(values))
            apart = max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
            print(f"| {name} | {found[0]:.4f} | {found[-1]:.4f} | {expected[-1]:.4f} | {apart:.1e} |", flush=True)


if __name__ == "__main__":
    main()
