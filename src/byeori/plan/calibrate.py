"""One real step beside its rehearsal: random weights, the same code, on the device that is here.

On a GPU the truth is torch.cuda.max_memory_allocated; on the CPU it is the peak of the storages that PyTorch made.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch

from byeori.data.tokenize import Example
from byeori.errors import ConfigError
from byeori.losses.base import Objective
from byeori.model import forward
from byeori.plan import measured_step, rehearsal
from byeori.plan.machines import GIB
from byeori.plan.rehearsal import Adapter, Rehearsal
from byeori.train import memory

_ROOM = 0.8  # of what is free may be taken


def run(
    config: Any,
    adapter: Adapter,
    examples: Sequence[Example],
    expected: Rehearsal,
    *,
    dtype: torch.dtype,
    recompute: str,
    objective: Objective,
    several: bool,
    device: torch.device,
    chosen: Sequence[str],
) -> dict[str, Any]:
    """What was expected, what came, and the speed of the step.

    Raises:
        ConfigError: the step would not fit here.
    """
    gc.collect()  # what another model in this process left behind is not of this step
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    free = memory.available_bytes(device)
    if expected.peak > _ROOM * free:
        raise ConfigError(
            f"--calibrate: the step needs {expected.peak / GIB:.1f} GiB and {free / GIB:.1f} GiB are free on {device}; "
            "give a smaller model or smaller micro-batches"
        )
    model = rehearsal.build(config, adapter, dtype, recompute=recompute, chosen=chosen, device=str(device))
    plain = not forward.use_forest_attention(model)
    how: dict[str, Any] = {"objective": objective, "ends": (1, 1), "several": several, "plain": plain}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    optimizer = measured_step.optimizer_of(model)
    found = measured_step.run(model, optimizer, examples, **how)
    if device.type == "cuda":
        measured, reserved = torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device)
        torch.cuda.synchronize(device)
    else:
        measured, reserved = max(peak.total for peak in found.peaks.values()), memory.peak_memory_bytes(device)
    began = time.perf_counter()
    measured_step.run(model, optimizer, examples, **how)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return {
        "device": str(device),
        "tokens": found.tokens,
        "predicted_bytes": expected.peak,
        "measured_bytes": measured,
        "error": expected.peak / measured - 1,
        "held_by_process_bytes": reserved,
        "seconds": round(seconds, 3),
        "flops_per_second": round(found.flops / seconds),
    }


def sentence(found: dict[str, Any]) -> str:
    """The same in words."""
    speed = f"{found['tokens'] / found['seconds']:,.0f} tokens/s, {found['flops_per_second'] / 1e12:.3g} TFLOPS"
    took, said = found["measured_bytes"] / GIB, found["predicted_bytes"] / GIB
    return (
        f"Measured on {found['device']}: a step of {found['tokens']:,} tokens took {took:.3f} GiB, predicted "
        f"{said:.3f} ({found['error']:+.2%}); {speed}"
    )
