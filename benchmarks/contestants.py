"""The contestants, and running one of them to its end in a process of its own."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import BIN, ROOT, environment, python_of

BATCH, MICRO_BATCH = 8, 4
ADAPTER = {
    "lora_target_modules": "gate_proj,down_proj,up_proj",
    "lora_r": "16",
    "lora_alpha": "16",
    "learning_rate": "1e-4",
    "seed": "42",
}
BETA = "0.1"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A library with its settings.

    library: byeori, or the end of a script's name in peers/. commands: what it can do. flags: beside the shared ones.
    about: for the reader of the table. micro_batch: rows (DPO: pairs) at once; a peer's padding goes with it.
    """

    name: str
    library: str
    about: str
    commands: tuple[str, ...] = ("sft", "dpo")
    flags: tuple[str, ...] = ()
    micro_batch: dict[str, int] = field(default_factory=lambda: {"sft": MICRO_BATCH, "dpo": 1})


CONTESTANTS = {
    found.name: found
    for found in (
        Contestant(
            name="byeori",
            library="byeori",
            about="its defaults. Of a row over cutoff_len it shortens the prompt and keeps the answer",
        ),
        Contestant(
            name="byeori-apart",
            library="byeori",
            flags=("--share_prefixes", "off"),
            about="the same with --share_prefixes off: every sequence is computed by itself",
        ),
        Contestant(
            name="byeori-bf16",
            library="byeori",
            flags=("--dtype", "bfloat16"),
            about="the same with --dtype bfloat16, on a processor without units for it: products run in float32",
        ),
        Contestant(
            name="transformers",
            library="transformers",
            commands=("sft",),
            about="Trainer and PEFT as in alpaca-lora's script. Of a row over cutoff_len it cuts the answer off, and "
            "computes the row all the same",
        ),
        Contestant(
            name="trl",
            library="trl",
            about="SFTTrainer with loss on the completion only, DPOTrainer with the adapter off as reference; its own "
            "defaults otherwise (gradient checkpointing among them). It drops a row whose answer is cut off",
        ),
        Contestant(
            name="trl-tuned",
            library="trl",
            flags=("--gradient_checkpointing", "off"),
            about="the same without gradient checkpointing",
        ),
        Contestant(
            name="llamafactory",
            library="llamafactory",
            flags=("--gradient_checkpointing", "off"),
            about="LLaMA-Factory without gradient checkpointing. Of a row over cutoff_len it cuts prompt and answer",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every contestant of a comparison is given.

    command: sft or dpo. rows: the file. count: how many of its rows. template: byeori's; a DPO peer has its own.
    order: the order in which a peer consumes them, or None. init: folder of the adapter to start from, or None.
    """

    command: str
    model: Path
    rows: Path
    count: int
    template: Path
    steps: int
    cutoff_len: int
    dtype: str
    lora_dropout: float = 0.0
    order: Path | None = None
    init: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contestant's run. Lists hold one value an optimizer step.

    unique_tokens: those that were computed. reference_seconds: of the whole run, where the reference is computed before
    training. peak_bytes: of the process, from the kernel. wall_seconds: the process, loading and saving included.
    """

    name: str
    losses: list[float | None] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    unique_tokens: list[int] = field(default_factory=list)
    target_tokens: list[int] = field(default_factory=list)
    reference_seconds: float = 0.0
    peak_bytes: int = 0
    reported_peak_bytes: int = 0
    wall_seconds: float = 0.0
    failure: str = ""

    def seconds(self) -> list[float]:
        """Of every step but the first, which warms up; with its tokens' part of the reference."""
        each = self.reference_seconds / max(1, sum(self.tokens))
        return [s + each * t for s, t in zip(self.step_seconds, self.tokens, strict=True)][1:]

    def rates(self) -> list[float]:
        """Tokens per second of every step but the first."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens[1:], self.seconds(), strict=True)]

    def rate(self) -> float:
        """Median tokens per second; not a number without a second step."""
        return statistics.median(self.rates()) if self.rates() else math.nan


def command_of(who: Contestant, job: Job, folder: Path) -> list[str]:
    """The command line of a contestant; what it writes lies in `folder`."""
    settings: dict[str, Any] = {
        "max_rows": job.count,
        "batch_size": BATCH,
        "cutoff_len": job.cutoff_len,
        "dtype": job.dtype,
        "template": job.template,
        "lora_dropout": job.lora_dropout,
        **ADAPTER,
        **({"beta": BETA} if job.command == "dpo" else {}),
    }
    if who.library == "byeori":
        command = [str(BIN / "byeori"), job.command, "--base_model", str(job.model), "--data-path", str(job.rows)]
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
        script = Path(__file__).parent / "peers" / f"{job.command}_{who.library}.py"
        command = [str(python_of(who.library)), str(script), "--model", str(job.model), "--rows", str(job.rows)]
        settings |= {
            "micro_batch_size": who.micro_batch[job.command],
            "steps": job.steps,
            "out": folder / "record.json",
        }
        if job.order:
            settings["order"] = job.order
        if job.init:
            settings["init"] = job.init / "adapter_model.safetensors"
    return [*command, *(part for key, value in settings.items() for part in (f"--{key}", str(value))), *who.flags]


def run(who: Contestant, job: Job, folder: Path) -> Run:
    """Run a contestant to its end in an empty folder and read what it wrote."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command, log = command_of(who, job, folder), folder / "log.txt"
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        stream.write(" ".join(command) + "\n")
        stream.flush()
        around = environment(folder / "cache")
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=around, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seen: dict[str, Any] = {"peak_bytes": usage.ru_maxrss * 1024, "wall_seconds": time.perf_counter() - start}
    if child.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        print("\n".join(f"    {line}" for line in tail), flush=True)
        return Run(name=who.name, failure=ending(child.returncode), **seen)
    found = read_byeori(folder) if who.library == "byeori" else read_peer(folder)
    if who.library == "byeori" and job.command == "dpo" and not found["reference_seconds"]:
        return Run(name=who.name, failure="did not say how long the reference took", **seen)
    return Run(name=who.name, **found, **seen)


def ending(code: int) -> str:
    """How a process failed, in words."""
    if code == -9:
        return "killed (out of memory?)"
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def read_byeori(folder: Path) -> dict[str, Any]:
    """The step lines of train_log.jsonl, and what `byeori dpo` says about its reference."""
    lines = (folder / "adapter" / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [line for line in map(json.loads, lines) if {"step", "loss", "tokens", "seconds"} <= line.keys()]
    said = re.findall(r"^Reference log-probs .* in ([\d.]+) s$", (folder / "log.txt").read_text(encoding="utf-8"), re.M)
    return {
        "losses": [step["loss"] for step in steps],
        "step_seconds": [step["seconds"] for step in steps],
        "tokens": [step["tokens"] for step in steps],
        "unique_tokens": [step["unique_tokens"] for step in steps],
        "target_tokens": [step["target_tokens"] for step in steps],
        "reference_seconds": sum(map(float, said)),
        "reported_peak_bytes": max((step.get("peak_memory_bytes") or 0 for step in steps), default=0),
    }


def read_peer(folder: Path) -> dict[str, Any]:
    """A peer's record; a peer computes every token."""
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    columns = ("losses", "step_seconds", "tokens", "target_tokens", "reference_seconds")
    return {
        **{name: record[name] for name in columns},
        "unique_tokens": record["tokens"],
        "reported_peak_bytes": record["peak_rss_bytes"],
    }


def order_of(folder: Path, steps: int) -> Path | None:
    """The order in which byeori took the rows, if it wrote one long enough for the peers to follow."""
    path = folder / "adapter" / "order.json"
    if not path.is_file():
        return None
    return path if len(json.loads(path.read_text(encoding="utf-8"))) >= steps * BATCH else None
