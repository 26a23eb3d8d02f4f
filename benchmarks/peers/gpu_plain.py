"""The tutorial's method: padded micro-batches of 4, PEFT's own adapter, autocast, log-probs of whole rows of logits.

SFT as alpaca-lora's script and transformers' Trainer do it, DPO as its authors wrote it: both answers with their
prompts side by side, once with the adapter and once without. Also `--reference`: the first step in float32, one
sequence at a time, which the contenders' first losses are compared with.
"""

from __future__ import annotations

import sys
from typing import Any

import gpu_common as common
import torch
import torch.nn.functional as F

MICRO_BATCH = 4
Sequence = tuple[list[int], int]


def sequences(row: dict[str, list[int]]) -> list[Sequence]:
    """Each prompt followed by its answer, and where the answer starts."""
    return [(row["prompt"] + part, len(row["prompt"])) for name, part in row.items() if name != "prompt"]


def logprobs(model: Any, batch: list[Sequence]) -> torch.Tensor:
    """Sum of an answer's log-probs [rows]: padded on the right, all logits, as the tutorial's trainers compute them."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in batch], device=common.device())
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in batch], device=common.device())
    trained = torch.zeros_like(mask, dtype=torch.bool)
    for place, (row, start) in enumerate(batch):
        trained[place, start : len(row)] = True
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    found = -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(batch), -1)
    return (found * trained[:, 1:]).sum(dim=1)


def step(model: Any, optimizer: Any, work: common.Workload, rows: list[dict[str, list[int]]]) -> float:
    """One optimizer step; the loss, or the mean log-prob of a chosen answer."""
    here = common.device()
    size = MICRO_BATCH if not work.pairs else MICRO_BATCH // 2
    targets = sum(len(ids) - start for row in rows for ids, start in sequences(row))
    total = 0.0
    for at in range(0, len(rows), size):
        batch = [each for row in rows[at : at + size] for each in sequences(row)]
        with torch.autocast(here.type, torch.bfloat16, enabled=here.type == "cuda"):
            found = logprobs(model, batch)
            if work.pairs:
                with torch.no_grad(), model.disable_adapter():
                    reference = logprobs(model, batch)
                apart = (found - reference).view(-1, 2)
                loss = -F.logsigmoid(0.1 * (apart[:, 0] - apart[:, 1])).sum() / len(rows)
                total += float(found.view(-1, 2)[:, 0].detach().sum()) / len(rows)
            else:
                loss = -found.sum() / targets
                total += float(loss.detach())
        loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total


@torch.no_grad()
def exact(model: Any, work: common.Workload, rows: list[dict[str, list[int]]]) -> float:
    """The first step's number, one sequence at a time."""
    found = [[(logprobs(model, [each])[0].item(), len(each[0]) - each[1]) for each in sequences(row)] for row in rows]
    if work.pairs:
        return sum(row[0][0] for row in found) / len(rows)
    return -sum(row[0][0] for row in found) / sum(row[0][1] for row in found)


def adapted(args: Any, work: common.Workload) -> Any:
    """PEFT's adapter on all linear layers."""
    from peft import LoraConfig, get_peft_model

    if work.bits == 4:
        raise RuntimeError("4 bit is not part of the tutorial's way here: weights are random, not loaded")
    base = common.model_of(args.shape, args.small)
    config = LoraConfig(r=common.RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def main() -> None:
    """Measure and write."""
    reference = "--reference" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--reference"]
    args = common.arguments("the tutorial's way")
    held: dict[str, Any] = {}

    def run(work: common.Workload) -> common.Record:
        record = common.Record(contender="", workload=work.name)
        rows = common.rows_of(work, 1 if reference else args.steps, common.config_of(args.shape, args.small).vocab_size)
        if "model" not in held:
            held["model"] = (
                common.model_of(args.shape, args.small, dtype=torch.float32) if reference else adapted(args, work)
            )
        model = held["model"]
        if reference:
            record.first = exact(model, work, rows)
            return record
        common.clear(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=common.LEARNING_RATE)
        for number in range(args.steps):
            part = rows[number * work.rows : (number + 1) * work.rows]
            seconds, found = common.timed(lambda part=part: step(model, optimizer, work, part))
            record.seconds.append(seconds)
            common.count_rows(record, part)
            record.first = found if number == 0 else record.first
        record.peak_bytes = common.peak()
        return record

    common.run_all("reference" if reference else "plain", args, run)


if __name__ == "__main__":
    main()
