"""byeori doctor: what this machine has, and whether every acceleration works on it, in a block for a report."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from byeori import __version__
from byeori.config import DoctorSettings
from byeori.kernels import dispatch, native, patch
from byeori.model import first_use, load, wrap
from byeori.model.trial import trial_model, trial_rows
from byeori.support import cgroups, console
from byeori.support.cache_folder import cache_folder
from byeori.support.console import say
from byeori.support.text_files import one_line, redacted
from byeori.train import memory

_LIBRARIES = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "accelerate", "bitsandbytes")
_OPTIONAL = ("triton", "fla-core", "vllm", "xllamacpp")
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DoctorResult:
    """lines: as printed. problems: what to put right, one sentence each; empty where all is well."""

    lines: tuple[str, ...]
    problems: tuple[str, ...]


@console.quiet_libraries()
def doctor(settings: DoctorSettings) -> DoctorResult:
    """Print what this machine has, try every acceleration, and end with what to put right.

    Raises:
        ModelError: if even the plain form cannot run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines: list[str] = []
    problems: list[str] = []
    parts = [_versions(problems), _machine(problems), _compilers(problems)]
    for part in [*parts, _hub(problems) if not settings.offline else iter(()), _accelerations(device, problems)]:
        for line in part:
            print(line, flush=True)
            lines.append(line)
    ending = ["", *(f"To put right: {problem}" for problem in problems)] if problems else ["", "No problem was found."]
    print("\n".join(ending))
    say("Please paste all of the above into a report.")
    return DoctorResult(lines=(*lines, *ending), problems=tuple(problems))


# ---- what is installed ----------------------------------------------------------------------------------------------


def _versions(problems: list[str]) -> Iterator[str]:
    yield f"byeori {__version__}, Python {platform.python_version()}, {platform.platform()}"
    found = {name: _version(name) for name in (*_LIBRARIES, *_OPTIONAL)}
    yield ", ".join(f"{name} {number}" for name, number in found.items() if number)
    problems.extend(_outside(found))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _outside(found: dict[str, str | None]) -> Iterator[str]:
    """A sentence for each library that is not in the range that byeori declares."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in metadata.requires("byeori") or ()]
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return
    for requirement in declared:
        number = found.get(requirement.name)
        if number and requirement.marker is None and not requirement.specifier.contains(number, prereleases=True):
            yield (
                f"{requirement.name} {number} is not in the tested range {requirement.specifier}; "
                f"pip install '{requirement}'"
            )


# ---- the machine ----------------------------------------------------------------------------------------------------


def _machine(problems: list[str]) -> Iterator[str]:
    name = re.search(r"^model name\s*: (.*)$", native.processor(), flags=re.MULTILINE)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cgroups.quota()
    threads = f"{torch.get_num_threads()} threads"
    limit = f", limited to {quota:g} by the container" if quota else ""
    yield f"CPU: {name[1] if name else platform.machine()}, {allowed} of {os.cpu_count()} cores{limit}, {threads}"
    if quota and torch.get_num_threads() > cgroups.cores():
        problems.append(f"more threads than the container's {quota:g} cores; set OMP_NUM_THREADS={cgroups.cores()}")
    free = memory.available_bytes(torch.device("cpu"))
    yield f"memory: {memory.total_bytes() / _GIB:.1f} GiB, {free / _GIB:.1f} GiB available"
    yield from _disks(problems)
    yield from _gpus(problems)


def _disks(problems: list[str]) -> Iterator[str]:
    for words, folder in (("cache", cache_folder()), ("working folder", Path.cwd())):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        yield f"disk: {free / _GIB:.1f} GiB free for the {words} {folder}"
        if free < 2 * _GIB:
            problems.append(f"the disk of the {words} {folder} is nearly full; make room there")
        if not os.access(there, os.W_OK):
            problems.append(f"the {words} {folder} cannot be written; set BYEORI_CACHE, or work in another folder")


def _gpus(problems: list[str]) -> Iterator[str]:
    if not torch.cuda.is_available():
        yield f"GPU: none that PyTorch sees (its build is for {torch.version.cuda or torch.version.hip or 'CPUs'})"
        if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
            problems.append("this machine has an NVIDIA GPU that PyTorch does not see; install a CUDA build of torch")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield (
            f"GPU {index}: {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{total / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free, CUDA {torch.version.cuda}"
        )
        if free < 0.8 * total:
            problems.append(f"GPU {index} is in use by other processes ({(total - free) / _GIB:.1f} GiB)")


def _compilers(problems: list[str]) -> Iterator[str]:
    found = [name for name in ("gcc", "cc", "clang", "g++") if shutil.which(name)]
    units = {2: "AMX tiles", 1: "AVX-512 vectors", 0: "no bfloat16 units"}[native.tiles()]
    why = native.problem()
    yield f"C compilers: {', '.join(found) or 'none'}; the C kernels are {'off' if why else 'on'} ({units})"
    if why:
        problems.append(f"the C kernels are off: {why}")
    if torch.cuda.is_available() and not dispatch.has_triton():
        problems.append("the fused GPU kernels are off; pip install triton")


def _hub(problems: list[str]) -> Iterator[str]:
    from huggingface_hub import HfApi, constants, get_session, get_token

    address, token = redacted(constants.ENDPOINT), get_token()
    login = "logged in" if token else "not logged in (`hf auth login`)"
    try:
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        get_session().head(constants.ENDPOINT, timeout=5)
        if token:
            login = f"logged in as {HfApi(token=token).whoami().get('name')}"
        yield f"Hub: {address} answers, {login}"
    except Exception as error:  # whatever a network can raise
        why = one_line(error, 120).replace(token or "\0", "***")
        yield f"Hub: {address} does not answer, {login}"
        problems.append(f"the Hub cannot be used ({why}); models and data must be in local folders")


# ---- every acceleration ---------------------------------------------------------------------------------------------


def _accelerations(device: torch.device, problems: list[str]) -> Iterator[str]:
    """Try each on a small model of random weights: what it computes, and its time beside the plain form's."""
    dtype = load.resolve_dtype("auto", device)
    yield f"accelerations, on a small model in {str(dtype).removeprefix('torch.')} on {device}:"
    yield f"  {'':<12}{'result':<28}{'plain':>10}{'accelerated':>14}"
    for trial in _trials(device, dtype):
        seconds = [f"{1000 * value:.0f} ms" if value else "-" for value in (trial.plain, trial.fast)]
        result = "fails" if trial.problem else "as the plain form"
        yield f"  {trial.part:<12}{result:<28}{seconds[0]:>10}{seconds[1]:>14}"
        if trial.problem:
            problems.append(f"{first_use.NAMES[trial.part]} ({trial.part}) {trial.problem}; runs do without it")


def _trials(device: torch.device, dtype: torch.dtype) -> Iterator[first_use.Trial]:
    """Those of every run; then those that some runs have, each on a model of its own."""
    model, base = trial_model(device, dtype)
    patch.fuse(base, patch.parts(["auto"], device))
    yield from first_use.trials(model, trial_rows())
    if importlib.util.find_spec("bitsandbytes"):
        yield from first_use.trials(trial_model(device, dtype, bits=4)[0], trial_rows(), ["quantized"])
    if device.type == "cuda":  # on a CPU nothing is moved, and compiling takes minutes
        model, base = trial_model(device, dtype)
        wrap.recompute_layers(base, "offload")
        yield from first_use.trials(model, trial_rows(), ["offload"])
        model, base = trial_model(device, dtype)
        wrap.compile_layers(base)
        yield from first_use.trials(model, trial_rows(), ["compile"])
