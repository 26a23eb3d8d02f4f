"""Accelerations are tried before a machine's first run with them: on rows of that run, against the model's own code.

    rows ── short, with a shared prefix ──> forest ──> log-probs and adapters' gradients, accelerated and plain

One that raises, does not compile or computes something else is given up, with a sentence; the run goes on by the plain
form. A run stops only if the plain form itself is wrong (forward.choose). What was tried is noted in the cache, so that
the next run of the same kind of model on the same machine begins at once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.distributed.processes import local
from byeori.kernels import dispatch, native, patch
from byeori.kernels.dropout import SeededDropout
from byeori.model import forward, load, sharding, wrap
from byeori.support import atomic_files
from byeori.support.cache_folder import cache_folder
from byeori.support.text_files import one_line

# Tokens of a row that is tried, the share of them at its end that are targets (one in), and how many rows.
_TOKENS, _TARGETS, _ROWS = 192, 6, 2
_REPEATS = 3
# How far log-probs (relative to 1 + |log p|) and the gradients of one kind of matrix (relative to their norm) may be
# apart, in 32 and in 16 bit. Rounding makes 1e-6 and 1e-5, 0.011 and 0.08 of it on Gemma 3 270M.
_WIDE, _NARROW = (5e-4, 2e-3), (0.1, 0.3)
_LAYERS = "those layers take longer and more memory"
# What accelerations are called, and what a run without them pays.
NAMES = {
    "attention": "the CPU's own attention",
    "flash": "flash attention",
    "kernels": "the fused kernels",
    "norms": "fused norms",
    "mlp": "fused feed-forward layers",
    "heads": "fused attention heads",
    "last_layer": "the shorter last layer",
    "lora": "fused LoRA layers",
    "experts": "fused adapters on experts",
    "rare_words": "leaving rare words out of gradients",
    "quantized": "dequantizing by bitsandbytes",
    "offload": "copying activations beside the computation",
    "compile": "compiled layers",
    **{f"kernels.{name}": f"the fused kernel {name}" for name in dispatch.KERNELS},
}
_COSTS = {
    **dict.fromkeys(("attention", "flash"), "attention to long rows takes longer and more memory"),
    **dict.fromkeys(
        ("kernels", *(f"kernels.{name}" for name in dispatch.KERNELS)),
        "PyTorch's own operations pass over memory several times instead of once",
    ),
    **dict.fromkeys(("norms", "mlp", "heads", "lora"), _LAYERS),
    "last_layer": "it computes every token there, also those that predict nothing",
    "rare_words": "gradients of the vocabulary take longer",
    "quantized": "PyTorch's own operations dequantize, which takes several times as long",
    "offload": "each copy is waited for",
    "compile": "steps take about a fifth longer",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """logprobs [M]. grads: kind of matrix (`q_proj.lora_A`) -> the gradients of all layers, flat."""

    logprobs: torch.Tensor
    grads: dict[str, torch.Tensor]


def known_to_work(model: Any, *, plain: bool = False) -> bool:
    """Return whether the model's accelerations were tried before on a model of this kind on this machine."""
    return _note(model, patch.in_use(load.base_of(model)), plain=plain).is_file()


def give_up_broken(model: Any, examples: list[Example], *, plain: bool = False) -> list[str]:
    """Give up the model's accelerations that fail here; return a sentence for each.

    examples: rows of the run. plain: the model runs one row at a time.
    """
    base = load.base_of(model)
    used = patch.in_use(base)
    groups = _groups(examples, load.positions_limit(base.config), plain=plain)
    with _moved_adapters(model):
        with patch.without(base, used), wrap.recomputed(base):  # all plain layers at once are more than a step needs
            expected = compute(model, groups, plain=plain)
        broken = _broken(model, base, used, groups, expected, plain=plain)
    patch.drop(base, broken)
    if not broken:
        with suppress(OSError):
            note = _note(model, used, plain=plain)
            note.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.write(note, json.dumps(used))
    return [
        f"{NAMES[part][0].upper()}{NAMES[part][1:]} ({part}) {why}, so this run does without; {_COSTS[part]}. "
        "Please report it with the output of `byeori doctor`"
        for part, why in broken.items()
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One acceleration alone. plain, fast: seconds of a pass without and with it, None if it fails."""

    part: str
    problem: str | None
    plain: float | None = None
    fast: float | None = None


def trials(model: Any, examples: list[Example], only: Collection[str] | None = None) -> Iterator[Trial]:
    """Try each of the model's accelerations alone against its plain form, and measure both. only: some of them."""
    base = load.base_of(model)
    used = patch.in_use(base)
    groups = _groups(examples, load.positions_limit(base.config), plain=False)
    with _moved_adapters(model):
        with patch.without(base, used):
            expected = compute(model, groups, plain=False)
        for part in used if only is None else only:
            others = [other for other in used if other != part and (part, other) != ("last_layer", "heads")]
            without = [*others, part]
            with patch.without(base, others):
                why = problem(model, groups, expected, plain=False)
            if why is not None:
                yield Trial(part=part, problem=why)
                continue
            times: dict[bool, list[float]] = {False: [], True: []}
            for fast in (False, True) * _REPEATS:
                with patch.without(base, others if fast else without):
                    times[fast].append(_seconds(model, groups))
            yield Trial(part=part, problem=None, plain=median(times[False]), fast=median(times[True]))


def _seconds(model: Any, groups: list[list[Example]]) -> float:
    began = time.perf_counter()
    compute(model, groups, plain=False)  # whose results are copied to the CPU, so that a GPU has finished
    return time.perf_counter() - began


def _broken(
    model: Any, base: Any, used: list[str], groups: list[list[Example]], expected: Computed, *, plain: bool
) -> dict[str, str]:
    """The parts that fail, and how: tried all at once, else one by one, then what is left all at once.

    Kernels are tried within the parts that call them, also one by one; dropout's, which is off here, by itself.
    """

    def with_(parts: Collection[str], without: Collection[str]) -> str | None:
        with patch.without(base, [*(part for part in used if part not in parts), *without]):
            return problem(model, groups, expected, plain=plain)

    broken = _dropout_problem(model) if "kernels" in used else {}
    if with_(used, broken) is None:
        return broken
    for part in used:
        if part == "kernels" or (part == "last_layer" and "heads" in broken):  # which goes with them
            continue
        if why := with_({part, "heads"} if part == "last_layer" else {part}, ()):
            broken[part] = why
    rest = [part for part in used if part not in broken]
    if "kernels" in used and with_(rest, broken):
        single = [f"kernels.{name}" for name in dispatch.KERNELS]
        found = {one: why for one in single if (why := with_(rest, [other for other in single if other != one]))}
        all_of_them = found and (len(found) > 1 or with_(rest, found))  # a compiler's or a driver's fault
        broken |= {"kernels": next(iter(found.values()))} if all_of_them else found
    why = with_([part for part in used if part not in broken], [part for part in broken if "." in part])
    return broken if why is None else {part: broken.get(part, f"with the others {why}") for part in used}


def _dropout_problem(model: Any) -> dict[str, str]:
    """What is wrong with the kernel of dropout, if the model has any: it drops what PyTorch's operations drop."""
    if not any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        return {}
    ones = torch.ones(64, 96, device=forward.compute_device(model), dtype=load.compute_dtype(model))
    found = []
    try:
        for without in ((), ("kernels",)):
            with patch.without(load.base_of(model), without), forward.accelerated(model):
                found.append(SeededDropout(0.25, 1).apply(ones).cpu())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler, a driver and a launch raise what they like
        return {"kernels.dropout": f"fails here ({one_line(error, 200)})"}
    return {} if torch.equal(*found) else {"kernels.dropout": "drops other numbers here"}


def problem(model: Any, groups: list[list[Example]], expected: Computed, *, plain: bool) -> str | None:
    """Return what is wrong with the model as it runs now, or None."""
    try:
        wide = load.compute_dtype(model) in (torch.float32, torch.float64)
        return differs(compute(model, groups, plain=plain), expected, _WIDE if wide else _NARROW)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a kernel's compiler, its driver, or its launch: all have their own classes
        return f"fails here ({one_line(error, 200)})"


def compute(model: Any, groups: list[list[Example]], *, plain: bool) -> Computed:
    """Return the log-probs and the gradients of their negative mean, as in training but for dropout."""
    training = model.training
    model.train()  # or nothing is recomputed, and compiled layers are compiled once more in training
    for module in model.modules():
        module.training = not _is_random(module)
    sharding.reshard(load.base_of(model))  # the gradients are those of the shards
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    logprobs = []
    try:
        for group in groups:
            with forward.accelerated(model):  # the backward pass as well
                found = forward.forest_logprobs(model, forests.build(group), plain=plain)
                (-found.mean()).backward()
            logprobs.append(found.detach().float().cpu())
        grads = [local(torch.zeros_like(p) if p.grad is None else p.grad) for _, p in trained]
    finally:
        model.train(training)
        for _, parameter in trained:
            parameter.grad = None
    kinds: dict[str, list[torch.Tensor]] = {}
    for (name, _), grad in zip(trained, grads, strict=True):
        kind = ".".join(word for word in name.split(".") if not word.isdecimal())
        kinds.setdefault(kind, []).append(grad.detach().float().cpu().flatten())
    return Computed(logprobs=torch.cat(logprobs), grads={kind: torch.cat(parts) for kind, parts in kinds.items()})


def _is_random(module: Any) -> bool:
    """Whether a module draws random numbers while it trains: its own rate of dropout, or a router's noise."""
    rates = [value for name, value in vars(module).items() if "drop" in name or "jitter" in name]
    rates += [getattr(module, "p", None)] if "Dropout" in type(module).__name__ else []
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def differs(computed: Computed, expected: Computed, limits: tuple[float, float]) -> str | None:
    """Return how two results differ by more than `limits` of log-probs and gradients, or None."""
    most_logprobs, most_grads = limits
    difference = float(((computed.logprobs - expected.logprobs).abs() / (1 + expected.logprobs.abs())).mean())
    if not difference <= most_logprobs:
        return f"gives other log-probs here (by {difference:.2g})"
    most = max(float(grad.norm()) for grad in expected.grads.values())
    for kind, grad in expected.grads.items():
        apart = float((computed.grads[kind] - grad).norm()) / max(float(grad.norm()), 0.01 * most)
        if not apart <= most_grads:
            return f"gives other gradients here ({kind.rpartition('layers.')[2]}, by {apart:.2g})"
    return None


def _groups(examples: list[Example], limit: int | None, *, plain: bool) -> list[list[Example]]:
    """Short rows made of the run's, as forests: some alone, and two that share a prefix."""
    length = min(_TOKENS, limit or _TOKENS)
    rows = []
    for example in examples[:_ROWS]:
        ids = (list(example.token_ids) * (1 + length // len(example.token_ids)))[:length]
        rows.append(Example(token_ids=ids, targets=((length - length // _TARGETS, length),)))
    rows += forward.branches(examples[0], limit)
    return [[row] for row in rows] if plain else [rows]


@contextmanager
def _moved_adapters(model: Any) -> Iterator[None]:
    """Give new adapters, whose B is zero, some effect inside: without it the gradient of A is zero, right or wrong."""
    before = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_B" in name
    }
    generator = torch.Generator().manual_seed(0)
    parameters = dict(model.named_parameters())
    try:
        with torch.no_grad():
            for name, value in before.items():
                noise = torch.randn(value.shape, generator=generator) * 0.02
                parameters[name].add_(noise.to(value))
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                parameters[name].copy_(value)


def _note(model: Any, used: list[str], *, plain: bool) -> Path:
    """The file that says that this was tried; its name covers the kind of model, its parts, machine and versions."""
    device = forward.compute_device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else native.processor()
    kinds = {f"{path.rpartition('.')[2]} {type(module).__qualname__}" for path, module in model.named_modules()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    versions = [version(library) for library in ("torch", "transformers", "peft")]
    parts = [
        name,
        str(load.compute_dtype(model)),
        used,
        plain,
        sorted(kinds),
        sorted(shapes),
        versions,
        dispatch.sources(),
    ]
    parts += [model.config.to_json_string()]
    return cache_folder() / "first_use" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()
