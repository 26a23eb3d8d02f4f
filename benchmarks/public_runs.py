"""Hold the plan against public runs: `python benchmarks/public_runs.py` prints Markdown tables.

measured_runs.csv has runs of other trainers with their settings and sources. The shares of the peak, the floor of a
layer and the speed of gathering in src/byeori/plan/machines.yaml were set from summaries of all of them, and checked on
the first, third, fifth ... run of every source (`--fit` prints what these say); what is printed is the others, which
are therefore not blind. Other trainers keep full logits, so their memory lies above byeori's; torchtune (compiled,
packed, chunked output layer) is the nearest method.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from byeori.data.tokenize import Example
from byeori.losses.preference import Preference, preference
from byeori.losses.sft import SFT
from byeori.plan import candidates, machines, rehearsal, speed
from byeori.plan.machines import GIB, Machine, Table
from byeori.plan.rehearsal import Rehearsal

MODELS: dict[str, dict[str, Any]] = {
    "qwen1-1.8b": {
        "model_type": "qwen2",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 5504,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "qwen1-7b": {
        "model_type": "qwen2",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
    },
    "qwen1-72b": {
        "model_type": "qwen2",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "intermediate_size": 24576,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    },
    "phi-1.5": {
        "model_type": "phi",
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "intermediate_size": 8192,
        "vocab_size": 51200,
        "max_position_embeddings": 2048,
        "partial_rotary_factor": 0.5,
    },
    "stablelm-alpha-3b": {
        "model_type": "gpt_neox",
        "hidden_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "intermediate_size": 16384,
        "vocab_size": 50688,
        "max_position_embeddings": 4096,
    },
    "llama2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama2-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "yi-34b": {
        "model_type": "llama",
        "hidden_size": 7168,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "intermediate_size": 20480,
        "vocab_size": 64000,
        "max_position_embeddings": 4096,
    },
    "llama3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "llama3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "llama32-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "llama32-3b": {
        "model_type": "llama",
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "tinyllama": {
        "model_type": "llama",
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "falcon-7b": {
        "model_type": "falcon",
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "vocab_size": 65024,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "new_decoder_architecture": False,
    },
    "qwen25-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
    },
}

# What nvidia-smi shows beyond what is allocated, as a fraction of what is not resident, without expandable segments.
DEFAULT_ALLOCATOR = {False: 0.36, True: 0.44}  # on one GPU, on several


def rehearse(run: dict[str, str], known: dict[str, rehearsal.Architecture]) -> Rehearsal:
    """The step of a run as byeori would do it: rows of one length, all of it trained."""
    if run["model"] not in known:
        known[run["model"]] = rehearsal.architecture(AutoConfig.for_model(**MODELS[run["model"]]))
    length, rows = int(run["row_tokens"]), int(run["micro_batch"])
    if run["objective"] == "sft":
        examples = [Example(token_ids=[17 + i, *[16] * (length - 1)], targets=((1, length),)) for i in range(rows)]
    else:
        half = length // 2
        ids = [[17 + i, *[16] * (half - 1), *[18 + side] * half] for i in range(rows) for side in range(2)]
        examples = [Example(token_ids=each, targets=((half, 2 * half),)) for each in ids]
    return rehearsal.rehearse(
        known[run["model"]],
        rehearsal.Adapter(
            r=int(run["lora_r"]), alpha=16, dropout=float(run["dropout"]), targets=tuple(run["targets"].split())
        ),
        examples,
        dtype=torch.bfloat16,
        recompute=run["checkpointing"],
        bits=4 if run["four_bit"] == "True" else None,
        objective=SFT if run["objective"] == "sft" else preference(Preference(loss="sigmoid", beta=0.1)),
        accumulates=int(run["batch"]) > rows * int(run["count"]),
    )


def machine_of(run: dict[str, str], table: Table) -> Machine:
    """Its machine in the plan's table."""
    return next(m for m in table.machines if m.name == {"A6000": "RTX A6000"}.get(run["gpu"], run["gpu"]))


def memory(run: dict[str, str], found: Rehearsal, table: Table) -> tuple[float, float]:
    """GiB: what the plan says for the number that was published, and that number."""
    machine, several = machine_of(run, table), int(run["count"]) > 1
    shards = int(run["count"]) if run["parallel"] == "fsdp" else 1
    allocated = dict(candidates.memory(found, table, machine, shards))
    del allocated[candidates.OUTSIDE]
    planned = sum(allocated.values()) + machine.workspace
    if run["memory_kind"] != "alloc":
        resident = sum(size for part, size in found.resident.items() if part != "weights") + allocated["weights"]
        planned += int(DEFAULT_ALLOCATOR[several] * (planned - resident))
    return planned / GIB, float(run["memory_gib"])


def times(run: dict[str, str], found: Rehearsal, table: Table, machine: Machine) -> tuple[float, float, float]:
    """Seconds of a micro-batch: the fastest and the slowest planned, and measured."""
    count, tokens = int(run["count"]), int(run["row_tokens"]) * int(run["micro_batch"])
    again = candidates.RECOMPUTE[run["checkpointing"]][1]
    cost = speed.Cost(found.flops - again * found.forward_flops, found.forward_flops, found.tokens)
    how: dict[str, Any] = {"again": again, "processes": count, "sharded": run["parallel"] == "fsdp"}
    bounds = speed.seconds(table, machine, found, cost, **how)
    assert bounds is not None
    return *bounds, tokens * count / float(run["tokens_per_second"])


def halves(runs: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The first, third, fifth ... run of every source, and the others."""
    sources: dict[str, list[dict[str, str]]] = defaultdict(list)
    for run in runs:
        sources[run["source"]].append(run)
    return [run for group in sources.values() for run in group[::2]], [
        run for group in sources.values() for run in group[1::2]
    ]


def fit(runs: list[dict[str, str]], known: dict[str, Any], table: Table) -> None:
    """Print what runs say about the share of the peak, and about the floor of a layer."""
    shares, floors = defaultdict(list), []
    for run in runs:
        if run["tokens_per_second"]:
            found, machine = rehearse(run, known), machine_of(run, table)
            *_, measured = times(run, found, table, machine)
            tokens = int(run["row_tokens"]) * int(run["micro_batch"])
            if tokens >= speed.LEAST_TOKENS and run["parallel"] != "fsdp":
                shares[machine.name].append(found.flops / machine.flops / measured)
            elif tokens <= 512 and run["four_bit"] == "False" and not run["parallel"]:
                again = candidates.RECOMPUTE[run["checkpointing"]][1]
                floors.append(1000 * measured / found.layers / (1 + again / 2))
    for name, values in shares.items():
        chosen = next(m for m in table.machines if m.name == name).share
        print(f"{name}: {min(values):.2f} to {max(values):.2f} on {len(values)} runs; machines.yaml has {chosen}")
    print(f"ms a layer at up to 512 tokens: {min(floors):.1f} to {max(floors):.1f} on {len(floors)} runs")


def report(runs: list[dict[str, str]], known: dict[str, Any], table: Table) -> None:
    """Print the errors of memory and of time by source, and every run near the limit of its GPU."""
    errors, inside, widths, near = defaultdict(list), defaultdict(list), [], []
    for run in runs:
        found, machine = rehearse(run, known), machine_of(run, table)
        if run["memory_gib"]:
            planned, measured = memory(run, found, table)
            errors[run["source"], run["memory_kind"]].append(planned / measured - 1)
            if measured > 0.85 * machine.memory / GIB or "max ctx" in run["source"]:
                near.append((run, planned, measured, machine))
        if run["tokens_per_second"]:
            low, high, measured = times(run, found, table, machine)
            inside[run["source"]].append(low <= measured <= high)
            widths.append(high / low)
    print("| source | published number | runs | median error | lowest | highest |\n|---|---|---:|---:|---:|---:|")
    for (source, kind), values in errors.items():
        cells = [statistics.median(values), min(values), max(values)]
        print(f"| {source} | {kind} | {len(values)} | " + " | ".join(f"{each:+.0%}" for each in cells) + " |")
    print("\n| source | runs with a speed | inside the printed range |\n|---|---:|---:|")
    for source, hits in inside.items():
        print(f"| {source} | {len(hits)} | {sum(hits)} |")
    every = [hit for hits in inside.values() for hit in hits]
    print(f"| all | {len(every)} | {sum(every)} ({sum(every) / len(every):.0%}) |")
    print(f"\nThe slowest is {statistics.median(widths):.1f} times the fastest (median).")
    limits = {"I-hf-12": 12, "I-hf-16": 16, "I-hf-24": 24, "I-hf-40": 40, "I-us-8": 8, "I-us-24": 24}
    print("\n| run that fitted | GPU, GB | published GiB | planned GiB | the plan says |\n|---|---:|---:|---:|---|")
    for run, planned, measured, machine in near:
        size = limits.get(run["id"], round(machine.memory / GIB))
        verdict = "fits" if planned <= size * 0.97 else "does not fit"
        print(f"| {run['id']} | {size} | {measured:.1f} | {planned:.1f} | {verdict} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="print what the other half of the runs says")
    given = parser.parse_args()
    with Path(__file__).with_name("measured_runs.csv").open(encoding="utf-8", newline="") as file:
        fitted, held_out = halves(list(csv.DictReader(file)))
    known: dict[str, rehearsal.Architecture] = {}
    table = replace(machines.read(), prices=())
    (fit if given.fit else report)(fitted if given.fit else held_out, known, table)


if __name__ == "__main__":
    main()
