"""byeori beside its peers, on the same rows in the same order: `python benchmarks/bench.py [W1 ...]`.

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
import datetime
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PEERS_VENV = ROOT / ".venv-peers"
PEERS_PYTHON = PEERS_VENV / "bin" / "python"
TORCH = "torch==2.13.0"
TEMPLATE = ROOT / "src" / "byeori" / "data" / "templates" / "title-ko.txt"
CONTESTANTS = ("byeori", "transformers", "trl")
BATCH, MICRO_BATCH = 8, 4
ADAPTER = {
    "lora_target_modules": "gate_proj,down_proj,up_proj",
    "lora_r": "16",
    "lora_alpha": "16",
    "lora_dropout": "0.0",
    "learning_rate": "1e-4",
    "seed": "42",
}
TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The first `rows` rows of a file."""

    name: str
    file: str
    rows: int
    about: str


WORKLOADS = {
    "W1": Workload(name="W1", file="ko_petitions_title.jsonl", rows=200, about="titles of petitions"),
    "W2": Workload(name="W2", file="ko_debian_title.jsonl", rows=300, about="titles of package descriptions"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every contestant of a comparison is given.

    rows: the file. count: how many of its rows. order: the order in which a peer consumes them, or None.
    init: folder of the adapter to start from, or None for a new one.
    """

    model: Path
    rows: Path
    count: int
    steps: int
    cutoff_len: int
    dtype: str
    order: Path | None = None
    init: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contestant's run. Lists hold one value an optimizer step.

    peak_bytes: of the process, from the kernel. wall_seconds: the whole process, loading and saving included.
    """

    name: str
    losses: list[float | None] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    target_tokens: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    reported_peak_bytes: int = 0
    wall_seconds: float = 0.0
    failure: str = ""

    def rates(self) -> list[float]:
        """Tokens per second of every step but the first, which warms up."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.step_seconds, strict=True)][1:]

    def rate(self) -> float:
        """Median tokens per second; not a number without a second step."""
        return statistics.median(self.rates()) if self.rates() else math.nan


def main() -> int:
    """Parse, measure, print, write."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if set(args.only) & {"transformers", "trl"}:
        ensure_peers()
    model = args.model or demo_model()
    print("machine and versions ...", flush=True)
    facts = apart(machine)
    print("\n".join(f"  {name}: {value}" for name, value in facts.items()), flush=True)
    return compare_losses(args, model, facts) if args.losses else measure(args, model, facts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="byeori beside its peers")
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; all without any")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each contestant")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run: 4, or 10 with --losses")
    parser.add_argument("--losses", action="store_true", help="compare losses in float32 instead of speed")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants, separated by commas")
    parser.add_argument("--cutoff_len", type=int, default=1024, help="longest example in tokens")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the rows")
    parser.add_argument("--model", type=Path, help="folder of the base model; else `byeori demo-model`")
    parser.add_argument("--out", type=Path, default=Path("bench-output"), help="folder for results and logs")
    args = parser.parse_args()
    args.workloads = args.workloads or (["W1"] if args.losses else list(WORKLOADS))
    args.only = ["byeori", "transformers"] if args.losses else args.only.split(",")
    args.steps = args.steps or (10 if args.losses else 4)
    args.out, args.data = args.out.resolve(), args.data.resolve()
    wrong = [name for name in args.workloads if name not in WORKLOADS]
    wrong += [name for name in args.only if name not in CONTESTANTS]
    files = [rows_of(args, name) for name in args.workloads if name in WORKLOADS]
    wrong += [str(path) for path in files if not path.is_file()]
    if wrong:
        parser.error(f"there is no {', no '.join(wrong)}")
    if args.rounds < 1 or args.steps < 2:
        parser.error("--rounds must be at least 1 and --steps at least 2: the first step is not counted")
    return args


def rows_of(args: argparse.Namespace, name: str) -> Path:
    """The file of a workload."""
    return args.data / WORKLOADS[name].file


# Environments


def ensure_peers() -> None:
    """Make the peers' environment, once; it is kept apart so that TRL's pins never reach byeori."""
    wanted = Path(__file__).with_name("requirements-peers.txt")
    done = PEERS_VENV / "requirements-peers.txt"
    if PEERS_PYTHON.is_file() and (done.read_text() == wanted.read_text() if done.is_file() else imports_trl()):
        return
    if not PEERS_PYTHON.is_file():
        print(f"making {PEERS_VENV}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(PEERS_VENV)], check=True)
    for what in ([TORCH], ["-r", str(wanted)]):
        command = [str(PEERS_PYTHON), "-m", "pip", "install", "--quiet", *what]
        print("  " + " ".join(command), flush=True)
        subprocess.run(command, check=True)
    done.write_text(wanted.read_text())


def imports_trl() -> bool:
    """Whether the peers' environment, made by hand, is whole."""
    return subprocess.run([str(PEERS_PYTHON), "-c", "import trl"], capture_output=True).returncode == 0


def demo_model() -> Path:
    """The folder of the embedded model, as `byeori demo-model` prints it."""
    command = [str(BIN / "byeori"), "demo-model"]
    print(" ".join(command), flush=True)
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"`byeori demo-model` failed (exit code {found.returncode}); name a folder with --model")
    return Path(found.stdout.strip().splitlines()[-1])


def environment() -> dict[str, str]:
    """Two threads, no network, no chatter; the same for every contestant."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a new process, so that what it imports does not count for the contestants started from here."""
    os.environ["OMP_NUM_THREADS"] = "2"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


# The machine


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    import importlib.metadata

    cpu = cpu_facts()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in cpu["flags"].split()]
    packages = ("byeori", "torch", "transformers", "peft")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{cpu['model name']}, family {cpu['cpu family']} model {cpu['model']}",
        "cores": str(os.cpu_count()),
        "flags": " ".join(flags) or "none of avx2, avx512f, avx512_bf16, amx_bf16",
        "memory": f"{memory / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages),
        "peers": peer_versions(),
        "commit": commit(),
        "bf16 matrix peak": f"{matrix_peak():,.0f} GFLOP/s (best of 30 products of 2,048 squared, 2 threads)",
    }


def cpu_facts() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    found = {"model name": platform.processor() or "unknown", "cpu family": "?", "model": "?", "flags": ""}
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            found[name.strip()] = value.strip()
    return found


def peer_versions() -> str:
    """Versions in the peers' environment."""
    if not PEERS_PYTHON.is_file():
        return "none"
    names = ("trl", "transformers", "peft", "accelerate", "torch")
    code = f"from importlib.metadata import version as v; print(', '.join(n + ' ' + v(n) for n in {names}))"
    return output([str(PEERS_PYTHON), "-c", code]) or "unknown"


def commit() -> str:
    """The commit that is measured, and whether the working tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    changed = output([*git, "status", "--porcelain", "src"])
    return (output([*git, "rev-parse", "--short", "HEAD"]) or "unknown") + (", src changed since" if changed else "")


def output(command: Sequence[str]) -> str:
    """What a command prints; empty if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def matrix_peak(size: int = 2048, times: int = 30) -> float:
    """GFLOP/s of the fastest of several bf16 products of two square matrices."""
    import torch

    torch.set_num_threads(2)
    left, right = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(times):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


# Running one contestant


def command_of(name: str, job: Job, folder: Path) -> list[str]:
    """The command line of a contestant; what it writes lies in `folder`."""
    settings = {
        "max_rows": job.count,
        "batch_size": BATCH,
        "cutoff_len": job.cutoff_len,
        "dtype": job.dtype,
        "template": TEMPLATE,
        **ADAPTER,
    }
    if name == "byeori":
        command = [str(BIN / "byeori"), "sft", "--base_model", str(job.model), "--data-path", str(job.rows)]
        settings |= {
            "output_dir": folder / "adapter",
            "num_epochs": 1,
            "max_steps": job.steps,
            "val_set_size": 0,
            "logging_steps": 1,
        }
        if job.init:
            settings |= {"resume_from_checkpoint": job.init, "micro_batch_size": MICRO_BATCH}
    else:
        script = Path(__file__).parent / "peers" / f"sft_{name}.py"
        command = [str(PEERS_PYTHON), str(script), "--model", str(job.model), "--rows", str(job.rows)]
        settings |= {"micro_batch_size": MICRO_BATCH, "steps": job.steps, "out": folder / "record.json"}
        if job.order:
            settings["order"] = job.order
        if job.init:
            settings["init"] = job.init / "adapter_model.safetensors"
    return [*command, *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]


def run(name: str, job: Job, folder: Path) -> Run:
    """Run a contestant to its end in an empty folder and read what it wrote."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command, log = command_of(name, job, folder), folder / "log.txt"
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        stream.write(" ".join(command) + "\n")
        stream.flush()
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seen: dict[str, Any] = {"peak_bytes": usage.ru_maxrss * 1024, "wall_seconds": time.perf_counter() - start}
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        print("\n".join(f"    {line}" for line in tail), flush=True)
        return Run(name=name, failure=ending(child.returncode), **seen)
    return Run(name=name, **(read_byeori(folder) if name == "byeori" else read_peer(folder)), **seen)


def ending(code: int) -> str:
    """How a process failed, in words."""
    if code == -9:
        return "killed (out of memory?)"
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def read_byeori(folder: Path) -> dict[str, Any]:
    """The step lines of train_log.jsonl."""
    lines = (folder / "adapter" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if {"step", "loss", "tokens", "seconds"} <= line.keys()]
    return {
        "losses": [step["loss"] for step in steps],
        "step_seconds": [step["seconds"] for step in steps],
        "tokens": [step["tokens"] for step in steps],
        "target_tokens": [step["target_tokens"] for step in steps],
        "reported_peak_bytes": max((step.get("peak_memory_bytes") or 0 for step in steps), default=0),
    }


def read_peer(folder: Path) -> dict[str, Any]:
    """A peer's record."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    columns = ("losses", "step_seconds", "tokens", "target_tokens")
    return {**{name: record[name] for name in columns}, "reported_peak_bytes": record["peak_rss_bytes"]}


def order_of(folder: Path, steps: int) -> Path | None:
    """The order in which byeori took the rows, if it wrote one long enough for the peers to follow."""
    path = folder / "adapter" / "order.json"
    if not path.is_file():
        return None
    return path if len(json.loads(path.read_text(encoding="utf-8"))) >= steps * BATCH else None


# Speed and memory


def measure(args: argparse.Namespace, model: Path, facts: dict[str, str]) -> int:
    """Every workload, contestants alternating; results.json after every run, the table at the end."""
    runs: dict[str, list[Run]] = {}
    for name in args.workloads:
        work = WORKLOADS[name]
        job = Job(
            model=model,
            rows=rows_of(args, name),
            count=work.rows,
            steps=args.steps,
            cutoff_len=args.cutoff_len,
            dtype="bfloat16",
        )
        runs[name] = []
        for number in range(1, args.rounds + 1):
            measure_round(args, job, name, number, runs[name])
            write_json(args.out / "results.json", facts, runs)
    tables = [line for name, group in runs.items() for line in speed_table(name, group)]
    finish(args.out / "RESULTS.md", "\n".join([*heading(facts, args), *tables]))
    return 1 if any(found.failure for group in runs.values() for found in group) else 0


def measure_round(args: argparse.Namespace, job: Job, name: str, number: int, runs: list[Run]) -> None:
    """One run of each contestant; the peers take the rows in the order that byeori took them."""
    order = None
    for contestant in args.only:
        print(f"[{name} round {number}/{args.rounds}] {contestant} ...", flush=True)
        folder = args.out / "runs" / f"{name}-{number}-{contestant}"
        found = run(contestant, Job(**{**vars(job), "order": order}), folder)
        runs.append(found)
        print(f"    {summary(found)}", flush=True)
        if contestant == "byeori":
            order = order_of(folder, job.steps)
            if order is None:
                print("    (byeori wrote no usable order.json: the peers take the rows in the file's order)")


def summary(found: Run) -> str:
    """One line about a run."""
    if found.failure:
        return f"FAILED: {found.failure}, after {found.wall_seconds:.0f} s"
    speed = f"{found.rate():,.0f} tokens/s, {gigabytes(found.peak_bytes)}"
    return f"{speed}, {len(found.tokens)} steps, {found.wall_seconds:.0f} s in all"


def speed_table(name: str, runs: Sequence[Run]) -> list[str]:
    """The Markdown table of a workload: medians, and byeori's advantage over each peer."""
    work = WORKLOADS[name]
    lines = [
        f"## {name}: {work.about} ({work.file}, first {work.rows} rows)",
        "",
        "| | tokens/s (median) | medians of the runs | byeori is faster by | peak memory | byeori needs "
        "| tokens a step | targets a step | whole run |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    groups = {key: [r for r in runs if r.name == key] for key in CONTESTANTS}
    ours = medians([found for found in groups["byeori"] if not found.failure])
    for key, group in groups.items():
        good = [found for found in group if not found.failure]
        if good:
            lines.append(speed_row(key, good, ours))
        lines += [f"| {key} | failed: {found.failure} | | | | | | | |" for found in group if found.failure]
    return [*lines, ""]


def medians(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Tokens per second over all counted steps of all runs, and the peak of memory; None without a run."""
    rates = [rate for found in runs for rate in found.rates()]
    return (statistics.median(rates), statistics.median(r.peak_bytes for r in runs)) if rates else None


def speed_row(key: str, runs: Sequence[Run], ours: tuple[float, float] | None) -> str:
    """One line of the table."""
    rate, peak = medians(runs) or (math.nan, math.nan)
    faster, memory = "", ""
    if key != "byeori" and ours:
        faster, memory = f"{ours[0] / rate:.1f} x", f"{100 * ours[1] / peak:.0f} %"
    spread = ", ".join(f"{found.rate():,.0f}" for found in runs)
    tokens = statistics.mean(count for found in runs for count in found.tokens)
    targets = statistics.mean(count for found in runs for count in found.target_tokens)
    wall = statistics.median(found.wall_seconds for found in runs)
    cells = [key, f"{rate:,.0f}", spread, faster, gigabytes(peak), memory]
    return "| " + " | ".join([*cells, f"{tokens:,.0f}", f"{targets:,.0f}", f"{wall:,.0f} s"]) + " |"


def gigabytes(count: float) -> str:
    """Bytes as GB (10^9)."""
    return f"{count / 1e9:.1f} GB"


def heading(facts: dict[str, str], args: argparse.Namespace) -> list[str]:
    """What was measured, where, and how to read it."""
    return [
        "# byeori beside its peers",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        f"Weights in bf16, adapters of rank {ADAPTER['lora_r']} on {ADAPTER['lora_target_modules']}, batches "
        f"of {BATCH}, cutoff_len {args.cutoff_len}, {args.steps} steps, {args.rounds} round(s), "
        "without the first step of each. Tokens are those of the examples, without padding; a prefix that "
        "byeori computes once for two examples counts in both. Memory is the peak of the whole process.",
        "",
        f"- transformers: Trainer and PEFT as in alpaca-lora's script, padded micro-batches of {MICRO_BATCH}"
        ". Of a row over cutoff_len it cuts the answer off, and computes the row all the same.",
        f"- trl: SFTTrainer, loss on the completion only, micro-batches of {MICRO_BATCH}, its own defaults "
        "otherwise (gradient checkpointing among them). It drops a row whose answer is cut off.",
        "- byeori: its defaults. Of a row over cutoff_len it shortens the prompt and keeps the answer.",
        "",
    ]


def write_json(path: Path, facts: dict[str, str], runs: dict[str, list[Run]]) -> None:
    """Everything that was measured, step by step."""
    groups = {name: [asdict(item) for item in group] for name, group in runs.items()}
    found = {"machine": facts, "runs": groups}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def finish(path: Path, text: str) -> None:
    """Print the report and keep it."""
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    print(f"\n{text}\nwritten to {path}", flush=True)


# Losses


def compare_losses(args: argparse.Namespace, model: Path, facts: dict[str, str]) -> int:
    """byeori's losses beside the plain method's, from one adapter over the same rows; 1 if they differ."""
    equal = True
    lines = [
        "# Losses: byeori beside transformers' Trainer",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        f"float32, dropout 0, batches of {BATCH}, micro-batches of {MICRO_BATCH}, one initial adapter, the "
        f"same rows in the same order, all of them within {args.cutoff_len} tokens.",
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
    folder = args.out / "losses" / name
    folder.mkdir(parents=True, exist_ok=True)
    rows, count = folder / "rows.jsonl", args.steps * BATCH
    note = apart(short_rows, model, rows_of(args, name), WORKLOADS[name].rows, count, args.cutoff_len, rows)
    print(f"{name}: {note}", flush=True)
    job = Job(
        model=model,
        rows=rows,
        count=count,
        steps=args.steps,
        cutoff_len=args.cutoff_len,
        dtype="float32",
        init=init,
    )
    found = []
    for contestant in ("byeori", "transformers"):
        print(f"[{name} losses] {contestant} ...", flush=True)
        found.append(run(contestant, job, folder / contestant))
        print(f"    {summary(found[-1])}", flush=True)
        if found[-1].failure:
            raise SystemExit(f"{contestant}: {found[-1].failure}; see {folder / contestant / 'log.txt'}")
        if contestant == "byeori":
            order = order_of(folder / "byeori", args.steps)
            if order is None:
                raise SystemExit(f"{folder / 'byeori' / 'adapter'} has no order.json of {count} rows")
            job = Job(**{**vars(job), "order": order})
    return found[0], found[1]


def loss_table(name: str, ours: Run, theirs: Run) -> tuple[list[str], bool]:
    """Both losses step by step, and whether every step is within the tolerance."""
    lines = [
        f"## {name}",
        "",
        "| step | byeori | transformers | relative difference | targets |",
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
    equal = worst <= TOLERANCE
    verdict = "within" if equal else "NOT within"
    return [*lines, "", f"Largest relative difference {worst:.1e}: {verdict} {TOLERANCE:.0e}.", ""], equal


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
        lora_dropout=float(ADAPTER["lora_dropout"]),
        target_modules=ADAPTER["lora_target_modules"].split(","),
        bias="none",
        task_type="CAUSAL_LM",
    )
    get_peft_model(base, config).save_pretrained(folder)


def short_rows(model: Path, source: Path, first: int, count: int, cutoff_len: int, target: Path) -> str:
    """Write `count` rows that nobody has to cut, and whose prompt alone is tokenized as within the whole.

    The second condition is the tutorial's assumption; where it fails the plain method trains on other labels.
    """
    from transformers import AutoTokenizer

    tokenizer, template = AutoTokenizer.from_pretrained(model), TEMPLATE.read_text(encoding="utf-8").rstrip()
    kept, too_long, unlike = [], 0, 0
    for line in source.read_text(encoding="utf-8").splitlines()[:first]:
        row = json.loads(line)
        head = template.removesuffix("{title}").replace("{document}", row["document"])
        prompt, whole = (tokenizer(text)["input_ids"] for text in (head, head + row["title"]))
        too_long += len(whole) + 1 > cutoff_len
        unlike += whole[: len(prompt)] != prompt
        if len(whole) + 1 <= cutoff_len and whole[: len(prompt)] == prompt:
            kept.append(line)
    if len(kept) < count:
        raise SystemExit(f"of the first {first} rows of {source} {len(kept)} fit {cutoff_len} tokens, not {count}")
    target.write_text("\n".join(kept[:count]) + "\n", encoding="utf-8")
    return f"the first {count} of {len(kept)} rows that fit ({too_long} too long, {unlike} unlike their prompt)"


if __name__ == "__main__":
    sys.exit(main())
