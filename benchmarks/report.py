"""Runs -> Markdown tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from contestants import ADAPTER, BATCH, CONTESTANTS, Run
from machine import Sizes
from workloads import WORKLOADS

COLUMNS = (
    "",
    "tokens/s (median)",
    "medians of the runs",
    "byeori is faster by",
    "share of peak",
    "peak memory",
    "byeori needs",
    "tokens a step",
    "computed",
    "targets",
    "whole run",
)


def speed_table(name: str, runs: Sequence[Run], sizes: Sizes, note: str) -> list[str]:
    """The table of a workload: medians, and byeori's advantage over every other."""
    work = WORKLOADS[name]
    lines = [
        f"## {name}: {work.about} ({work.file}, {note})",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * (len(COLUMNS) - 1),
    ]
    ours = medians([found for found in runs if found.name == "byeori" and not found.failure])
    for key in CONTESTANTS:
        group = [found for found in runs if found.name == key]
        good = [found for found in group if not found.failure]
        if good:
            lines.append(speed_row(key, good, ours, sizes, reference=work.command == "dpo"))
        empty = " |" * (len(COLUMNS) - 2)
        lines += [
            f"| {key} | failed: {found.failure}; {gigabytes(found.peak_bytes)} by then{empty}"
            for found in group
            if found.failure
        ]
    return [*lines, ""]


def medians(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Tokens per second over all counted steps of all runs, and the peak of memory; None without a run."""
    rates = [rate for found in runs for rate in found.rates()]
    return (statistics.median(rates), statistics.median(r.peak_bytes for r in runs)) if rates else None


def speed_row(key: str, runs: Sequence[Run], ours: tuple[float, float] | None, sizes: Sizes, *, reference: bool) -> str:
    """One line of the table."""
    rate, peak = medians(runs) or (math.nan, math.nan)
    faster, memory = "", ""
    if key != "byeori" and ours:
        faster, memory = f"{ours[0] / rate:.1f} x", f"{100 * ours[1] / peak:.0f} %"
    spread = ", ".join(f"{found.rate():,.0f}" for found in runs)
    share = statistics.median(part for found in runs for part in shares(found, sizes, reference=reference))
    tokens, unique, targets = (
        statistics.mean(count for found in runs for count in column(found))
        for column in (lambda r: r.tokens, lambda r: r.unique_tokens, lambda r: r.target_tokens)
    )
    wall = statistics.median(found.wall_seconds for found in runs)
    cells = [key, f"{rate:,.0f}", spread, faster, f"{100 * share:.1f} %", gigabytes(peak), memory]
    return "| " + " | ".join([*cells, f"{tokens:,.0f}", f"{unique:,.0f}", f"{targets:,.0f}", f"{wall:,.0f} s"]) + " |"


def shares(found: Run, sizes: Sizes, *, reference: bool) -> list[float]:
    """The share of the machine's peak that the steps after the first reached."""
    steps = zip(found.unique_tokens[1:], found.target_tokens[1:], found.seconds(), strict=True)
    return [
        sizes.flops(tokens, targets, reference=reference) / seconds / sizes.peak for tokens, targets, seconds in steps
    ]


def gigabytes(count: float) -> str:
    """Bytes as GB (10^9)."""
    return f"{count / 1e9:.1f} GB"


def heading(facts: dict[str, str], *, dtype: str, steps: int, rounds: int, names: Sequence[str]) -> list[str]:
    """The heading: what was measured, on what, and how to read it."""
    return [
        "# byeori and its peers",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        f"Weights in {dtype}, adapters of rank {ADAPTER['lora_r']} on {ADAPTER['lora_target_modules']}, batches of "
        f"{BATCH} (DPO: pairs), {steps} steps, {rounds} round(s), without the first step of each. Tokens are those of "
        "the examples, without padding; a prefix that byeori computes once for several counts in each. The time of "
        "DPO's reference is in, for everyone, whether it is computed in the step or before training. Memory is the "
        "peak of the whole process.",
        "",
        "Share of peak: 4 FLOP per weight outside the embeddings and token computed, and per weight of the head and "
        "target (6 with DPO's reference), over the time and the matrix peak. Attention and adapters are not "
        "counted, nor what a peer computes of the head where there is no target; the rare words that byeori leaves out "
        "of the head's gradient are.",
        "",
        *(f"- {name}: {CONTESTANTS[name].about}; {batches(name)}." for name in names),
        "",
    ]


def batches(name: str) -> str:
    """How a contestant splits a step."""
    who = CONTESTANTS[name]
    if who.library == "byeori":
        return "micro-batches by tokens"
    return "micro-batches of " + ", ".join(f"{who.micro_batch[command]} ({command})" for command in who.commands)


def finish(path: Path, text: str) -> None:
    """Print the report and keep it."""
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"\n{text}\nwritten to {path}", flush=True)
