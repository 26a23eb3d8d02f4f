"""The machine, and the environments and processes that contestants run in."""

from __future__ import annotations

import datetime
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENVIRONMENTS = {"transformers": ".venv-peers", "trl": ".venv-peers", "llamafactory": ".venv-llamafactory"}
TORCH = "torch==2.13.0"
# Without what it depends on: torchvision and torchaudio from PyPI are built for CUDA and break a CPU torch's imports.
LLAMAFACTORY = "llamafactory==0.9.5"


# Environments


def python_of(library: str) -> Path:
    """The interpreter of a peer's environment."""
    return ROOT / ENVIRONMENTS[library] / "bin" / "python"


def ensure(library: str) -> str:
    """Make a peer's environment, once, apart from byeori's so that pins never meet; what went wrong, or nothing."""
    python = python_of(library)
    wanted = Path(__file__).with_name(f"requirements{ENVIRONMENTS[library].removeprefix('.venv')}.txt")
    done = python.parent.parent / wanted.name
    if python.is_file() and done.is_file() and done.read_text() == wanted.read_text():
        return ""
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    for what in ([TORCH], ["-r", str(wanted)], *([["--no-deps", LLAMAFACTORY]] if library == "llamafactory" else [])):
        command = [str(python), "-m", "pip", "install", "--quiet", *what]
        print("  " + " ".join(command), flush=True)
        found = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if found.returncode:
            errors = [line for line in found.stderr.splitlines() if line.startswith("ERROR")]
            return "; ".join(errors) or f"pip ended with {found.returncode}"
    done.write_text(wanted.read_text())
    return ""


def demo_model() -> Path:
    """The folder of the embedded model, as `byeori demo-model` prints it."""
    command = [str(BIN / "byeori"), "demo-model"]
    print(" ".join(command), flush=True)
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"`byeori demo-model` failed (exit code {found.returncode}); name a folder with --model")
    return Path(found.stdout.strip().splitlines()[-1])


def environment(cache: Path) -> dict[str, str]:
    """The environment of every contestant: two threads, no network, no progress output, no caches of earlier runs."""
    return {
        **os.environ,
        "BYEORI_CACHE": str(cache),
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


def facts() -> dict[str, str]:
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
        "peers": peer_versions("trl"),
        "LLaMA-Factory": peer_versions("llamafactory"),
        "commit": commit(),
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


def peer_versions(library: str) -> str:
    """Versions in a peer's environment."""
    names = ("trl", "transformers", "peft", "accelerate", "torch", *(("llamafactory",) * (library == "llamafactory")))
    code = f"from importlib.metadata import version as v; print(', '.join(n + ' ' + v(n) for n in {names}))"
    return output([str(python_of(library)), "-c", code]) or "none"


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


def type_here() -> str:
    """Return bfloat16 if the processor has units for it; else the peers' products take hundreds of times as long."""
    import torch

    from byeori.model.load import resolve_dtype

    return str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")


def matrix_peak(dtype: str, size: int = 2048, times: int = 30) -> float:
    """FLOP/s of the fastest of several products of two square matrices."""
    import torch

    from byeori.kernels import bf16_matmul

    torch.set_num_threads(2)
    left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    best = math.inf
    with bf16_matmul.prepared(left.dtype, left.device):
        for _ in range(times):
            start = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a model. weights: those outside embeddings and head. head: those of the LM head. peak: FLOP/s."""

    weights: int
    head: int
    peak: float

    def flops(self, tokens: float, targets: float, *, reference: bool) -> float:
        """What a LoRA step has to compute: 2 FLOP per weight forward, 2 backward, 2 more with a reference."""
        return (6 if reference else 4) * (self.weights * tokens + self.head * targets)


def sizes_of(model: Path) -> tuple[int, int]:
    """Weights outside embeddings and head, and weights of the head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    vocabulary = {id(layer.weight): layer.weight.numel() for layer in _ends(empty)}
    return sum(weight.numel() for weight in empty.parameters()) - sum(vocabulary.values()), _ends(empty)[
        1
    ].weight.numel()


def _ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()
