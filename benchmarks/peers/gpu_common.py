"""What the contenders of gpu.py share: shapes, rows of token ids, a random model, and a record of their steps.

Nothing is downloaded and no text is tokenized: weights are drawn from a configuration, rows are token ids.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

RANK, LEARNING_RATE = 16, 1e-4
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3-8b": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 8192,
        },
    ),
}
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 200,
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """rows: of a step. prompt, answer: tokens of a row; lengths between a quarter and all of `answer` where `packed`.

    tokens: of a micro-batch of byeori's, or of a packed row of a peer's. pairs: preferences (two answers a row).
    """

    name: str
    about: str
    rows: int
    prompt: int
    answer: int
    tokens: int = 4096
    packed: bool = False
    pairs: bool = False
    bits: int = 16


WORKLOADS = {
    work.name: work
    for work in (
        Workload(
            name="packed",
            about="SFT, texts of 256 to 1,024, packed to 4,096",
            rows=26,
            prompt=1,
            answer=1024,
            packed=True,
        ),
        Workload(name="dpo1024", about="DPO, prompt 1,024, answers 128", rows=8, prompt=1024, answer=128, pairs=True),
        Workload(name="short", about="SFT, prompt 700, answer 20", rows=24, prompt=700, answer=20),
        Workload(name="dpo2048", about="DPO, prompt 2,048, answers 256", rows=4, prompt=2048, answer=256, pairs=True),
        Workload(
            name="nf4", about="the first one, weights in NF4", rows=26, prompt=1, answer=1024, packed=True, bits=4
        ),
    )
}


@dataclass(kw_only=True)
class Record:
    """One workload of one contender; lists hold one value an optimizer step, the first of which warms up.

    tokens: of the rows. computed: that the model read. pairs: of queries and keys that attention met, in one layer.
    first: loss of the first step (mean over trained tokens); for preferences the mean log-prob of a chosen answer.
    """

    contender: str
    workload: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    first: float | None = None
    peak_bytes: int = 0
    trace: dict[str, Any] | None = None
    note: str = ""


def arguments(contender: str) -> argparse.Namespace:
    """The command line of every contender."""
    parser = argparse.ArgumentParser(description=contender)
    parser.add_argument("--shape", default="llama3-8b", choices=SHAPES)
    parser.add_argument("--workloads", default="packed")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further workload after so many")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--set", action="append", default=[], help="a setting of byeori's, name=value")
    return parser.parse_args()


def work_of(name: str, small: bool) -> Workload:
    """A workload, or its small form: everything a 32nd as long."""
    from dataclasses import replace

    work = WORKLOADS[name]
    if not small:
        return work
    return replace(
        work, rows=4, prompt=max(1, work.prompt // 32), answer=max(4, work.answer // 32), tokens=work.tokens // 32
    )


def rows_of(work: Workload, steps: int, words: int) -> list[dict[str, list[int]]]:
    """Rows as `prompt` and `completion`, or `prompt`, `chosen` and `rejected`; the same for every contender."""
    random = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return random.integers(3, words, count).tolist()

    out = []
    for _ in range(work.rows * steps):
        answer = int(random.integers(work.answer // 4, work.answer + 1)) if work.packed else work.answer
        row = {"prompt": draw(work.prompt)}
        row |= {"chosen": draw(answer), "rejected": draw(answer)} if work.pairs else {"completion": draw(answer)}
        out.append(row)
    return out


def device() -> torch.device:
    """The GPU, or the CPU for the small form."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config_of(shape: str, small: bool) -> Any:
    """The configuration of a model."""
    from transformers import AutoConfig

    kind, sizes = SHAPES[shape]
    return AutoConfig.for_model(kind, **sizes | (_SMALL if small else {}), tie_word_embeddings=False)


def model_of(shape: str, small: bool, *, dtype: torch.dtype | None = None, attention: str = "sdpa") -> Any:
    """Random weights, drawn on the device that computes: the same in every process."""
    from transformers import AutoModelForCausalLM

    here = device()
    dtype = dtype or (torch.bfloat16 if here.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    with here:
        drawn = torch.bfloat16 if here.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config_of(shape, small), dtype=drawn, attn_implementation=attention)
    model.config.use_cache = False
    return model.to(dtype)


def clear(model: Any) -> None:
    """An adapter as it was before the first step: B is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()


def timed(step: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, until the GPU has done it."""
    wait()
    began = time.perf_counter()
    found = step()
    wait()
    return time.perf_counter() - began, found


def wait() -> None:
    """Until the GPU has nothing to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fresh() -> None:
    """Forget the peak of memory, and what the workload before left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """The most bytes that tensors took on the GPU since `fresh`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def count_rows(record: Record, rows: list[dict[str, list[int]]], computed: int = 0, pairs: int = 0) -> None:
    """A step's counts; a contender that computes every sequence whole says no more. Padding is not counted."""
    lengths = [len(row["prompt"]) + len(part) for row in rows for name, part in row.items() if name != "prompt"]
    record.tokens.append(sum(lengths))
    record.targets.append(sum(len(part) for row in rows for name, part in row.items() if name != "prompt"))
    record.computed.append(computed or sum(lengths))
    record.pairs.append(pairs or sum(length * (length + 1) // 2 for length in lengths))


def run_all(contender: str, args: argparse.Namespace, run: Callable[[Workload], Record]) -> None:
    """Run workloads one after another; what failed says why, and what there was no time for says so."""
    began, records = time.perf_counter(), []
    for name in args.workloads.split(","):
        record = Record(contender=contender, workload=name)
        if time.perf_counter() - began > args.seconds:
            record.note = "no time left"
        else:
            fresh()
            try:
                record = run(work_of(name, args.small))
            except Exception as error:
                record.note = " ".join(f"{type(error).__name__}: {error}".split())[:300].replace("|", "/")
        record.contender = contender
        records.append(asdict(record))
        args.out.write_text(json.dumps({"records": records, "versions": versions()}, indent=1), encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of the packages that matter."""
    found = {}
    for package in ("torch", "transformers", "peft", "trl", "accelerate", "liger-kernel", "bitsandbytes", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summary(profile: Any, seconds: float) -> dict[str, Any]:
    """Of a profile: the share of time in which the GPU ran nothing, and the kernels that took most of the rest."""
    spans, kernels = [], dict[str, list[float]]()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            spans.append((event.time_range.start, event.time_range.end))
            kernels.setdefault(event.name[:90], []).append(event.time_range.elapsed_us())
    busy, until = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    top = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:20]
    return {
        "seconds": seconds,
        "gpu_idle_share": 1 - busy / 1e6 / seconds,
        "kernels": [
            {"name": name, "calls": len(times), "milliseconds": sum(times) / 1e3, "share": sum(times) / 1e6 / seconds}
            for name, times in top
        ],
    }


if __name__ == "__main__":  # the peak of this machine's matrix units, as a number of TFLOP/s
    size, times = (8192, 20) if torch.cuda.is_available() else (512, 3)
    left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    took = timed(lambda: [left @ right for _ in range(times)])[0]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(json.dumps({"device": name, "peak": 2 * size**3 * times / took, "versions": versions()}))
