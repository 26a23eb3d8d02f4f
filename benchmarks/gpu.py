"""byeori on one GPU, compared with TRL and the tutorial's method: `python benchmarks/gpu.py --out gpu-output`.

Random weights of the shapes of Llama 3.1 8B and Qwen 3 8B, LoRA of rank 16 on every linear layer, bf16; nothing is
downloaded. Contenders alternate, each in its own process, which runs one workload after another. What does not fit
`--budget` seconds is not started, and named. Tokens per second is the median over steps but the first. A share of the
peak is the arithmetic that the computed tokens need (4 operations a weight and token, for a frozen weight has no
gradient; attention's own beside it) over the peak of an 8,192-square bf16 product measured here.

`--small` runs tiny shapes, on a CPU too: it shows that everything works, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(__file__).resolve().parent / "peers"
WORKLOADS = ("packed", "dpo1024", "short", "dpo2048", "nf4")
# Weights of the linear layers of the decoder, and of its output embedding; layers, query heads x head size.
SIZES = {"llama3-8b": (6.98e9, 128256 * 4096, 32, 4096), "qwen3-8b": (6.95e9, 151936 * 4096, 36, 4096)}
# Seconds of a process outside its steps: imports, drawing weights, compiling.
_START = 75.0


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A script of peers/ and what it is given."""

    name: str
    script: str
    extra: tuple[str, ...] = ()


def main() -> int:
    """Measure, print, write."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    machine = json.loads(output([sys.executable, str(PEERS / "gpu_common.py")], args, timeout=120)[0] or "{}")
    print(f"{machine.get('device', 'no device')}: {machine.get('peak', math.nan) / 1e12:.1f} TFLOP/s", flush=True)
    records, skipped = [], []
    for shape in args.shapes.split(","):
        reference = run(Contender(name="reference", script="gpu_plain.py", extra=("--reference",)), shape, args, began)
        records += reference or []
        for number in range(args.rounds):
            for contender in contenders(args):
                found = run(contender, shape, args, began, trace=number == 0 and contender.name == "byeori")
                if found is None:
                    skipped.append(f"{contender.name} on {shape}, round {number + 1}")
                records += found or []
    skipped += [f"{r['contender']} on {r['shape']}, {r['workload']}" for r in records if r["note"] == "no time left"]
    report = "\n".join([*heading(machine), *table(records, machine), *traces(records), *left_out(skipped)])
    print(report)
    (args.out / "gpu.md").write_text(report + "\n", encoding="utf-8")
    (args.out / "gpu.json").write_text(json.dumps({"machine": machine, "records": records}, indent=1), encoding="utf-8")
    return 0 if any(record["seconds"] for record in records) else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="byeori on one GPU beside TRL and the tutorial's way")
    parser.add_argument("--out", type=Path, default=Path("gpu-output"), help="folder for the table, JSON and logs")
    parser.add_argument("--budget", type=float, default=500, help="seconds; what does not fit is named")
    parser.add_argument("--shapes", default="llama3-8b,qwen3-8b")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--only", default="byeori,trl,plain", help="contenders; `byeori:compile=off` changes a setting")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--wheels", type=Path, help="folder of wheels (trl, liger_kernel) to put on the path")
    parser.add_argument("--trace", action="store_true", help="a step of byeori's under the profiler")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.small:
        args.shapes, args.steps = "llama3-8b", 2
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first step is not counted")
    wrong = [name for name in args.workloads.split(",") if name not in WORKLOADS]
    wrong += [name for name in args.shapes.split(",") if name not in SIZES]
    wrong += [name for name in args.only.split(",") if name.split(":")[0] not in ("byeori", "trl", "plain")]
    if wrong:
        parser.error(f"there is no {', no '.join(wrong)}")
    if args.wheels:
        unpack(args.wheels, args.out / "site")
    return args


def unpack(wheels: Path, site: Path) -> None:
    """Install wheels for the child processes; their dependencies are installed already."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade", "--target"]
    subprocess.run([*command, str(site), *map(str, sorted(wheels.glob("*.whl")))], check=True)


def contenders(args: argparse.Namespace) -> list[Contender]:
    """The contenders in their order. `byeori:speed=norms+mlp:compile=off` is byeori with these settings."""
    out = []
    for name in args.only.split(","):
        kind, *settings = name.split(":")
        extra = [word for setting in settings for word in ("--set", setting.replace("+", ","))]
        out.append(Contender(name=name, script=f"gpu_{kind}.py", extra=tuple(extra)))
    return out


def run(
    contender: Contender, shape: str, args: argparse.Namespace, began: float, *, trace: bool = False
) -> list[dict[str, Any]] | None:
    """Run one process; None if there is no time for it."""
    left = args.budget - (time.monotonic() - began)
    if left < (5 if args.small else _START):
        return None
    name = f"{contender.name.replace(':', '_')}-{shape}-{time.monotonic_ns()}"
    result = args.out / f"{name}.json"
    command = [sys.executable, str(PEERS / contender.script), "--shape", shape, "--workloads", args.workloads]
    command += ["--steps", str(args.steps), "--seconds", str(left / 2), "--out", str(result), *contender.extra]
    command += ["--small"] * args.small + ["--trace"] * (trace and args.trace)
    print(f"{contender.name} on {shape} ...", flush=True)
    told, error = output(command, args, timeout=left)
    (args.out / f"{name}.log").write_text(told + error, encoding="utf-8")
    if not result.is_file():
        reason = (error.strip().splitlines() or ["no result"])[-1][:200]
        empty: dict[str, Any] = {name: [] for name in ("seconds", "tokens", "computed", "targets", "pairs")}
        missing = {**empty, "workload": "all", "first": None, "trace": None, "note": reason}
        return [{**missing, "contender": contender.name, "shape": shape}]
    found = json.loads(result.read_text(encoding="utf-8"))
    return [{**record, "contender": contender.name, "shape": shape} for record in found["records"]]


def output(command: list[str], args: argparse.Namespace, timeout: float) -> tuple[str, str]:
    """What a command prints, and what it complains of; it is ended when its time is over."""
    path = os.pathsep.join(map(str, [args.out / "site", ROOT / "src", os.environ.get("PYTHONPATH", "")]))
    threads = {"OMP_NUM_THREADS": "1"} if args.small else {}
    env = os.environ | threads | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        return "", f"{(error.stderr or b'').decode(errors='replace')}\nended after {timeout:.0f} s"
    return done.stdout, done.stderr


# The table


def heading(machine: dict[str, Any]) -> list[str]:
    """What the numbers depend on."""
    versions = ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
    peak = machine.get("peak", math.nan) / 1e12
    return [f"{machine.get('device', 'no device')}, {peak:,.1f} TFLOP/s (8,192-square bf16 product); {versions}", ""]


def work_in(record: dict[str, Any], step: int) -> float:
    """Operations that a step needs: forward, and a backward that makes no gradient for a frozen weight."""
    weights, head, layers, width = SIZES[record["shape"]]
    again = 1.5 if record["workload"].startswith("dpo") else 1.0  # the reference is a forward pass more
    linear = 4 * weights * record["computed"][step] + 4 * head * record["targets"][step]
    return again * (linear + 12 * layers * width * record["pairs"][step])


def speeds(records: list[dict[str, Any]], field: str) -> float:
    """Median of tokens per second over the steps of all rounds, the first of each left out."""
    rates = [t / s for r in records for t, s in zip(r[field][1:], r["seconds"][1:], strict=False)]
    return statistics.median(rates) if rates else math.nan


def table(records: list[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    """One row for each workload and contender; `all` are the rows' tokens, `computed` those less what is shared."""
    lines = [
        "| shape | workload | contender | tokens/s, all | computed | share of peak | byeori is faster by | peak GB | "
        "first loss off by | |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    exact = {(r["shape"], r["workload"]): r["first"] for r in records if r["contender"] == "reference"}
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["contender"] != "reference":
            groups.setdefault((record["shape"], record["workload"], record["contender"]), []).append(record)
    for (shape, workload, name), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        every, own = speeds(group, "tokens"), speeds(groups.get((shape, workload, "byeori"), []), "tokens")
        shares = [
            work_in(r, at) / r["seconds"][at] / machine.get("peak", math.nan)
            for r in group
            for at in range(1, len(r["seconds"]))
        ]
        first, target = group[0]["first"], exact.get((shape, workload))
        off = f"{abs(first - target) / abs(target):.1e}" if first is not None and target else ""
        peak = max((r.get("peak_bytes", 0) for r in group), default=0) / 1e9
        columns = [shape, workload, name, number(every, ",.0f"), number(speeds(group, "computed"), ",.0f")]
        columns += [number(statistics.median(shares) if shares else math.nan, ".0%")]
        columns += ["" if name == "byeori" else number(own / every, ".2f", " x"), number(peak, ".1f"), off]
        lines.append(f"| {' | '.join([*columns, group[0]['note']])} |")
    return lines


def number(value: float, form: str, unit: str = "") -> str:
    """Format a number; empty if there is none."""
    return format(value, form) + unit if math.isfinite(value) else ""


def traces(records: list[dict[str, Any]]) -> list[str]:
    """What the GPU did in a step of byeori's."""
    lines = []
    for record in records:
        if record["trace"]:
            trace = record["trace"]
            lines += [
                "",
                f"{record['shape']}, {record['workload']}: a step of {trace['seconds']:.2f} s under the profiler, ",
            ]
            lines[-1] += f"the GPU idle {trace['gpu_idle_share']:.1%} of it"
            lines += ["", "| kernel | calls | ms | share |", "|---|---:|---:|---:|"]
            for kernel in trace["kernels"]:
                name = kernel["name"].replace("|", "\\|")
                lines.append(f"| `{name}` | {kernel['calls']} | {kernel['milliseconds']:.1f} | {kernel['share']:.1%} |")
    return lines


def left_out(skipped: list[str]) -> list[str]:
    """What there was no time for."""
    return ["", "No time was left for: " + "; ".join(skipped) + "."] if skipped else []


if __name__ == "__main__":
    sys.exit(main())
