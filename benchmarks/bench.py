"""byeori and its peers on the same rows in the same order: `python benchmarks/bench.py [W1 ...]`.

Contestants alternate (byeori, transformers, trl, byeori, ...), each in its own process with two threads.
Tokens per second is the median over optimizer steps, without the first of each run, of tokens that are
not padding divided by seconds. Peak memory is the largest resident set of the whole process as the kernel
counts it, so loading is in it.

`--losses` compares byeori's first losses with the plain method's instead: float32, dropout 0, the same
initial adapter.

This process imports the standard library only: a child inherits its parent's peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from contestants import BATCH, CONTESTANTS, Job, Run, order_of, run
from machine import ROOT, Sizes, apart, demo_model, ensure, facts, matrix_peak, sizes_of, type_here
from report import finish, gigabytes, heading, speed_table
from workloads import WORKLOADS, few_shot_rows

from losses import STEPS, compare_losses


def main() -> int:
    """Parse, measure, print, write."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    args.only = available(args)
    model = args.model or demo_model()
    print("machine and versions ...", flush=True)
    args.dtype = args.dtype or apart(type_here)
    peak = apart(matrix_peak, args.dtype)
    shown = apart(facts) | {
        "matrix peak": f"{peak / 1e9:,.0f} GFLOP/s in {args.dtype} (best of 30 products of 2,048 squared, 2 threads)"
    }
    print("\n".join(f"  {name}: {value}" for name, value in shown.items()), flush=True)
    if args.losses:
        return compare_losses(args, model, shown)
    weights, head = apart(sizes_of, model)
    return measure(args, model, shown, Sizes(weights=weights, head=head, peak=peak))


def available(args: argparse.Namespace) -> list[str]:
    """The contestants asked for whose environments can be made; losses need the first peers'."""
    kept = []
    for name in args.only:
        library = CONTESTANTS[name].library
        problem = "" if library == "byeori" or args.losses else ensure(library)
        if problem and library != "llamafactory":
            raise SystemExit(f"{name} could not be installed: {problem}")
        if problem:
            print(f"{name} could not be installed and is left out: {problem}", flush=True)
        else:
            kept.append(name)
    if args.losses and (problem := ensure("trl")):
        raise SystemExit(f"the peers could not be installed: {problem}")
    return kept


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="byeori and its peers")
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; all without any")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contestant")
    steps = ", ".join(f"{count} ({command})" for command, count in STEPS.items())
    parser.add_argument("--steps", type=int, help=f"optimizer steps of a run: 4, or with --losses {steps}")
    parser.add_argument("--losses", action="store_true", help="compare losses in float32 instead of speed")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    parser.add_argument(
        "--share",
        choices=("auto", "on", "both"),
        default="auto",
        help="both: byeori with --share_prefixes off as well (byeori-apart); auto: where a workload's rows share much",
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="else bfloat16 where there are units for it")
    parser.add_argument("--cutoff_len", type=int, help="longest example in tokens: W1, W2 1,024, else 2,048")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="of every contestant; the tutorial's is 0.05")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the rows")
    parser.add_argument("--model", type=Path, help="folder of the base model; else `byeori demo-model`")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help="folder for results and logs")
    args = parser.parse_args()
    args.workloads = args.workloads or (["W1", "W3"] if args.losses else list(WORKLOADS))
    args.only = args.only.split(",")
    args.out, args.data = args.out.resolve(), args.data.resolve()
    wrong = [name for name in args.workloads if name not in WORKLOADS]
    wrong += [name for name in args.only if name not in CONTESTANTS]
    files = [args.data / WORKLOADS[name].file for name in args.workloads if name in WORKLOADS]
    wrong += [str(path) for path in files if not path.is_file()]
    if wrong:
        parser.error(f"there is no {', no '.join(wrong)}")
    if args.rounds < 1 or (args.steps or 2) < 2:
        parser.error("--rounds must be at least 1 and --steps at least 2: the first step is not counted")
    return args


def measure(args: argparse.Namespace, model: Path, shown: dict[str, str], sizes: Sizes) -> int:
    """Every workload, contestants alternating; results.json after every run, the tables at the end."""
    runs: dict[str, list[Run]] = {}
    tables: list[str] = []
    for name in args.workloads:
        job, note = job_of(args, name, model)
        print(f"{name}: {note}", flush=True)
        runs[name] = []
        for number in range(1, args.rounds + 1):
            measure_round(args, job, name, number, runs[name])
            write_json(args.out / "results.json", shown, runs)
        tables += speed_table(name, runs[name], sizes, note)
        finish(args.out / "RESULTS.md", "\n".join([*heading_of(args, shown), *tables]))
    return 1 if any(found.failure for group in runs.values() for found in group) else 0


def job_of(args: argparse.Namespace, name: str, model: Path) -> tuple[Job, str]:
    """What the contestants of a workload are given, and what its rows are."""
    work = WORKLOADS[name]
    rows, note = args.data / work.file, f"first {work.rows} rows"
    if work.few_shot:
        source, rows = rows, args.out / f"{name}.jsonl"
        note = apart(few_shot_rows, model, source, work.rows, rows)
    cutoff_len = args.cutoff_len or work.cutoff_len
    job = Job(
        command=work.command,
        model=model,
        rows=rows,
        count=work.rows,
        template=work.template,
        steps=args.steps or 4,
        cutoff_len=cutoff_len,
        dtype=args.dtype,
        lora_dropout=args.lora_dropout,
    )
    dropped = f", dropout {args.lora_dropout:g}" if args.lora_dropout else ""
    return job, f"{note}, cutoff_len {cutoff_len}{dropped}"


def measure_round(args: argparse.Namespace, job: Job, name: str, number: int, runs: list[Run]) -> None:
    """Run each contestant once; the peers get the rows in the order in which byeori used them."""
    for contestant in contestants_of(args, name):
        print(f"[{name} round {number}/{args.rounds}] {contestant} ...", flush=True)
        folder = args.out / "runs" / f"{name}-{number}-{contestant}"
        found = run(CONTESTANTS[contestant], job, folder)
        runs.append(found)
        print(f"    {summary(found)}", flush=True)
        if CONTESTANTS[contestant].library == "byeori":
            job = replace(job, order=order_of(folder, job.steps))
            if job.order is None:
                print("    (byeori wrote no usable order.json: the peers take the rows in the file's order)")


def contestants_of(args: argparse.Namespace, name: str) -> list[str]:
    """Those asked for that can do the workload."""
    work = WORKLOADS[name]
    apart_too = args.share == "both" or (args.share == "auto" and work.shares)
    asked = [*args.only, "byeori-apart"] if args.share == "both" else args.only
    able = [key for key in CONTESTANTS if key in asked and work.command in CONTESTANTS[key].commands]
    left_out = {"byeori-apart": not apart_too, "byeori-bf16": args.dtype == "bfloat16"}
    return [key for key in able if not left_out.get(key)]


def summary(found: Run) -> str:
    """One line about a run."""
    if found.failure:
        return f"FAILED: {found.failure}, after {found.wall_seconds:.0f} s and {gigabytes(found.peak_bytes)}"
    speed = f"{found.rate():,.0f} tokens/s, {gigabytes(found.peak_bytes)}"
    return f"{speed}, {len(found.tokens)} steps, {found.wall_seconds:.0f} s in all"


def heading_of(args: argparse.Namespace, shown: dict[str, str]) -> list[str]:
    """The report's head, with the contestants that took part."""
    names = [key for key in CONTESTANTS if any(key in contestants_of(args, name) for name in args.workloads)]
    return heading(shown, dtype=args.dtype, steps=args.steps or 4, rounds=args.rounds, names=names)


def write_json(path: Path, shown: dict[str, str], runs: dict[str, Sequence[Run]]) -> None:
    """Everything that was measured, step by step."""
    groups = {name: [asdict(item) for item in group] for name, group in runs.items()}
    found = {"machine": shown, "batch": BATCH, "runs": groups}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
