"""Hold the plan against public runs: `python benchmarks/public_runs.py` prints tables, `--write` puts them into docs.

measured_runs.csv has runs of other trainers with their settings and sources. The first, third, fifth ... run of every
source is for fitting: `--fit` prints the shares of the peak that they reached, as src/byeori/plan/machines.yaml has
them: the mean of each GPU's runs, times the spread of all runs around the means of their GPUs. The tables are about the
other runs, to which nothing was fitted. near_limits.csv has runs that ran out of memory, or nearly. Falcon in 4 bit is
left out: byeori does not quantize its layers.

Other trainers keep full logits, so their memory lies above byeori's; torchtune (compiled, packed, chunked output layer)
is the nearest method.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

from byeori.data.tokenize import Example
from byeori.losses.preference import Preference, preference
from byeori.losses.sft import SFT
from byeori.plan import candidates, machines, rehearsal, speed
from byeori.plan.machines import GIB, Machine, Range, Table
from byeori.plan.rehearsal import Rehearsal
from byeori.plan.trained import Full

HERE = Path(__file__).parent
_KOREAN = """source=출처, published number=공개된 값, runs=실행, median error=중앙값, lowest=최저, highest=최고,
all=모두, runs with a speed=속도가 공개된 실행, inside the printed range=출력한 범위 안, run=실행,
published GiB=공개된 GiB,
planned GiB=계획 GiB, the plan says=계획의 답, fits=됨, does not fit=안 됨, out of memory=메모리 부족,
slowest over fastest=가장 느린 쪽 ÷ 가장 빠른 쪽, allocated=할당, reserved=예약"""
_WORDS = {"alloc": "allocated", "smi": "nvidia-smi"}
_PAIRS = dict(pair.split("=") for pair in re.split(r",\s", _KOREAN))
PAGES = {"plan.md": _WORDS, "plan.ko.md": _PAIRS | {short: _PAIRS.get(word, word) for short, word in _WORDS.items()}}
# What nvidia-smi shows beyond what is allocated, as a fraction of what is not resident, without expandable segments.
DEFAULT_ALLOCATOR = {False: 0.36, True: 0.44}  # on one GPU, on several
NEAR = 0.85  # of a GPU's memory
_LIMIT = re.compile(r"^I-\w+-(\d+)")  # GB, to which these runs were confined


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A public run beside its plan. memory: planned GiB for the number that was published, and that number, if any.

    need: GiB that the plan gives for nvidia-smi, of `limit`. fits: what it says. times: seconds of a micro-batch,
    the fastest and the slowest planned, and measured, if a speed was published.
    """

    run: dict[str, str]
    memory: Range | None
    need: float
    limit: float
    fits: bool
    times: tuple[float, float, float] | None

    @property
    def near(self) -> bool:
        """Whether it ran out of memory, or nearly."""
        full = self.memory is not None and self.memory[1] > NEAR * self.limit
        return full or self.run["memory_kind"] == "oom"

    @property
    def name(self) -> str:
        """What a person calls it."""
        run, cards = self.run, int(self.run["count"])
        how = "4 bit, " * (run["four_bit"] == "True") + "all weights, " * (run["targets"] == "full")
        shared = {"fsdp": " sharded", "ddp": " with copies"}.get(run["parallel"], "") if cards > 1 else ""
        source = re.sub(r" \(max ctx\)| bench| README| max ctx", "", run["source"])
        rows = f"{run['micro_batch']} x {int(run['row_tokens']):,} tokens"
        return f"{source}: {run['model']}, {how}{rows}" + (f" on {cards}{shared}" if cards > 1 else "")


def rehearse(run: dict[str, str], known: dict[str, rehearsal.Architecture]) -> Rehearsal:
    """The step of a run as byeori would do it: rows of one length, all of it trained."""
    if run["model"] not in known:
        sizes = yaml.safe_load((HERE / "public_models.yaml").read_text(encoding="utf-8"))
        known[run["model"]] = rehearsal.architecture(AutoConfig.for_model(**sizes[run["model"]]))
    length, rows = int(run["row_tokens"]), int(run["micro_batch"])
    if run["objective"] == "sft":
        examples = [Example(token_ids=[17 + i, *[16] * (length - 1)], targets=((1, length),)) for i in range(rows)]
    else:
        half = length // 2
        ids = [[17 + i, *[16] * (half - 1), *[18 + side] * half] for i in range(rows) for side in range(2)]
        examples = [Example(token_ids=each, targets=((half, 2 * half),)) for each in ids]
    adapter = rehearsal.Adapter(
        r=int(run["lora_r"]), alpha=16, dropout=float(run["dropout"]), targets=tuple(run["targets"].split())
    )
    return rehearsal.rehearse(
        known[run["model"]],
        Full(layers=None, masters="stochastic") if run["targets"] == "full" else adapter,
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


def compare(run: dict[str, str], known: dict[str, rehearsal.Architecture], table: Table) -> Compared:
    """Plan a run."""
    found, machine = rehearse(run, known), machine_of(run, table)
    confined = _LIMIT.match(run["id"])
    limit = int(confined[1]) * 1e9 if confined and "max ctx" in run["source"] else machine.memory
    parts = candidates.memory(found, table, machine, int(run["count"]) if run["parallel"] == "fsdp" else 1)
    need = sum(parts.values())
    return Compared(
        run=run,
        memory=memory(run, found, parts, machine) if run["memory_gib"] else None,
        need=need / GIB,
        limit=limit / GIB,
        fits=need <= limit * (1 - table.headroom),
        times=times(run, found, table, machine) if run["tokens_per_second"] else None,
    )


def memory(run: dict[str, str], found: Rehearsal, parts: dict[str, int], machine: Machine) -> Range:
    """GiB: what the plan says for the number that was published, and that number."""
    allocated = sum(size for part, size in parts.items() if part != candidates.OUTSIDE) + machine.workspace
    if run["memory_kind"] != "alloc":
        resident = sum(size for part, size in found.resident.items() if part != "weights") + parts["weights"]
        allocated += int(DEFAULT_ALLOCATOR[int(run["count"]) > 1] * (allocated - resident))
    return allocated / GIB, float(run["memory_gib"])


def times(run: dict[str, str], found: Rehearsal, table: Table, machine: Machine) -> tuple[float, float, float]:
    """Seconds of a micro-batch: the fastest and the slowest planned, and measured."""
    count, tokens = int(run["count"]), int(run["row_tokens"]) * int(run["micro_batch"])
    again = candidates.RECOMPUTE[run["checkpointing"]][1]
    cost = speed.Cost(found.flops - again * found.forward_flops, found.forward_flops, found.tokens)
    how: dict[str, Any] = {"again": again, "processes": count, "sharded": run["parallel"] == "fsdp"}
    bounds = speed.seconds(table, machine, found, cost, **how)
    assert bounds is not None
    return *bounds, tokens * count / float(run["tokens_per_second"])


def read(name: str) -> list[dict[str, str]]:
    """The runs of a file of this folder."""
    with (HERE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def halves(runs: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The first, third, fifth ... run of every source, and the others."""
    sources: dict[str, list[dict[str, str]]] = defaultdict(list)
    for run in runs:
        sources[run["source"]].append(run)
    return [run for group in sources.values() for run in group[::2]], [
        run for group in sources.values() for run in group[1::2]
    ]


def shares(runs: Sequence[dict[str, str]], table: Table) -> dict[str, Range]:
    """What runs with enough tokens and whole weights say about the share of each GPU's peak."""
    found: dict[str, list[float]] = defaultdict(list)
    known: dict[str, rehearsal.Architecture] = {}
    for run in runs:
        tokens = int(run["row_tokens"]) * int(run["micro_batch"])
        if run["tokens_per_second"] and tokens >= speed.LEAST_TOKENS and run["parallel"] != "fsdp":
            machine, step = machine_of(run, table), rehearse(run, known)
            found[machine.name].append(step.flops / machine.flops / times(run, step, table, machine)[2])
    means = {name: statistics.geometric_mean(values) for name, values in found.items()}
    spread = [value / means[name] for name, values in found.items() for value in values]
    return {name: (mean * min(spread), mean * max(spread)) for name, mean in means.items()}


def floors(runs: Sequence[dict[str, str]], table: Table) -> list[float]:
    """Milliseconds of a layer, forward and backward, in runs of at most 512 tokens."""
    found, known = [], {}
    for run in runs:
        small = int(run["row_tokens"]) * int(run["micro_batch"]) <= 512
        if run["tokens_per_second"] and small and run["four_bit"] == "False" and not run["parallel"]:
            step, again = rehearse(run, known), candidates.RECOMPUTE[run["checkpointing"]][1]
            found.append(1000 * times(run, step, table, machine_of(run, table))[2] / step.layers / (1 + again / 2))
    return found


def gathers(runs: Sequence[dict[str, str]], table: Table) -> dict[str, Range]:
    """GB/s at which sharded weights arrived over PCIe, by run: in what the fastest and the slowest computation leave.

    Only runs whose slowest computation leaves half of the time; in the others either may hide behind the other.
    """
    found, known = {}, dict[str, rehearsal.Architecture]()
    for run in runs:
        machine = machine_of(run, table)
        if run["tokens_per_second"] and run["parallel"] == "fsdp" and machine.link.startswith("PCIe"):
            step, again, count = rehearse(run, known), candidates.RECOMPUTE[run["checkpointing"]][1], int(run["count"])
            seconds = times(run, step, table, machine)[2]
            left = [seconds - step.flops / machine.flops / share for share in machine.share]
            gathered = (2 + again) * step.resident["weights"] * (count - 1) / count / 1e9
            if left[0] > seconds / 2:
                found[run["id"]] = gathered / left[1], gathered / left[0]
    return found


def by_memory(compared: Sequence[Compared]) -> list[list[str]]:
    """Errors of memory by source."""
    errors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for each in compared:
        if each.memory is not None:
            errors[each.run["source"], each.run["memory_kind"]].append(each.memory[0] / each.memory[1] - 1)
    rows = [["source", "published number", "runs", "median error", "lowest", "highest"]]
    for (source, kind), values in errors.items():
        cells = [f"{each:+.0%}" for each in (statistics.median(values), min(values), max(values))]
        rows.append([source, kind, str(len(values)), *cells])
    return rows


def by_time(compared: Sequence[Compared]) -> list[list[str]]:
    """How many speeds lie inside the printed range, and how wide that is, by source."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for each in compared:
        if each.times is not None:
            found[each.run["source"]].append(each.times)
    found["all"] = [times for group in found.values() for times in group]
    rows = [["source", "runs with a speed", "inside the printed range", "slowest over fastest"]]
    for source, group in found.items():
        inside = sum(low <= measured <= high for low, high, measured in group)
        width = statistics.median(high / low for low, high, _ in group)
        rows.append([source, str(len(group)), f"{inside} ({inside / len(group):.0%})", f"{width:.1f}"])
    return rows


def by_limit(compared: Sequence[Compared]) -> list[list[str]]:
    """What the plan says of runs at the limit of their GPU; those that ran out of memory first."""
    rows = [["run", "GB", "published GiB", "planned GiB", "the plan says"]]
    for each in sorted((each for each in compared if each.near), key=lambda each: each.memory is not None):
        published = f"{each.memory[1]:.1f}" if each.memory else "out of memory"
        says = "fits" if each.fits else "does not fit"
        rows.append([each.name, f"{each.limit:.0f}", published, f"{each.need:.1f}", says])
    return rows


def markdown(rows: list[list[str]], words: dict[str, str]) -> str:
    """A table; words: in another language."""
    lines = [[words.get(cell, cell) for cell in row] for row in rows]
    numbers = [bool(re.match(r"[+\-\d]", row)) for row in rows[1]]
    marks = ["---:" if number else "---" for number in numbers]
    shown = ["| " + " | ".join(line) + " |" for line in (lines[0], *lines[1:])]
    return "\n".join([shown[0], "|" + "|".join(marks) + "|", *shown[1:]])


def tables() -> dict[str, list[list[str]]]:
    """What stands between marks in docs/plan.md, by the names of the marks."""
    table, known = replace(machines.read(), prices=()), {}
    held_out, limits = (
        [compare(run, known, table) for run in runs if not (run["four_bit"] == "True" and "falcon" in run["model"])]
        for runs in (halves(read("measured_runs.csv"))[1], read("near_limits.csv"))
    )
    return {
        "public-time": by_time(held_out),
        "public-memory": by_memory(held_out),
        "public-limits": by_limit([*limits, *held_out]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="print what the runs for fitting say")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/plan.md and docs/plan.ko.md")
    given = parser.parse_args()
    if given.fit:
        runs, table = halves(read("measured_runs.csv"))[0], replace(machines.read(), prices=())
        for name, (low, high) in shares(runs, table).items():
            chosen = next(m for m in table.machines if m.name == name).share
            print(f"{name}: {low:.2f} to {high:.2f}; machines.yaml has {chosen}")
        for name, (low, high) in gathers(runs, table).items():
            print(f"{name}: sharded weights arrived at {low:.1f} to {high:.1f} GB/s")
        print("ms a layer at up to 512 tokens:", *(f"{each:.1f}" for each in sorted(floors(runs, table))))
        return
    found = tables()
    for rows in found.values():
        print("\n" + markdown(rows, _WORDS))
    for page, words in PAGES.items() if given.write else ():
        path = HERE.parent / "docs" / page
        text = path.read_text(encoding="utf-8")
        for name, rows in found.items():
            block = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
            text = re.sub(
                block, lambda m, rows=rows, words=words: f"{m[1]}{markdown(rows, words)}\n{m[2]}", text, flags=re.S
            )
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
