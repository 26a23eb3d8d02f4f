"""One real step to compare to its rehearsal: random weights, the same code, on the device of this machine.

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
from byeori.plan.measured_step import Step
from byeori.plan.rehearsal import Adapter, Rehearsal
from byeori.train import memory

_ROOM = 0.8  # the fraction of the free memory that may be used


def run(
    config: Any,
    adapter: Adapter,
    examples: Sequence[Example],
    expected: Rehearsal,
    *,
    dtype: torch.dtype,
    recompute: str,
    objective: Objective,
    accumulates: bool,
    device: torch.device,
    fast_paths: Sequence[str],
) -> dict[str, Any]:
    """Return what was predicted, what was measured, and the speed of the step.

    Raises:
        ConfigError: if the step would not fit here.
    """
    gc.collect()  # what another model in this process left behind is not of this step
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    free = memory.available_bytes(device)
    if expected.peak > _ROOM * free:
        raise ConfigError(
            f"--calibrate: the step needs {expected.peak / GIB:.1f} GiB and {free / GIB:.1f} GiB are free on {device}; "
            "give a smaller model or smaller micro-batches"
        )
    model = rehearsal.build(config, adapter, dtype, recompute=recompute, fast_paths=fast_paths, device=str(device))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    optimizer = measured_step.make_optimizer(model)
    one_sequence = not forward.use_forest_attention(model)

    def step() -> Step:
        step = measured_step.run(
            model,
            optimizer,
            examples,
            objective=objective,
            ends=(1, 1),
            accumulates=accumulates,
            one_sequence=one_sequence,
        )
        if on_gpu:
            torch.cuda.synchronize(device)
        return step

    first = step()
    if on_gpu:
        measured, reserved = torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device)
    else:
        measured, reserved = max(peak.total for peak in first.peaks.values()), memory.peak_memory_bytes(device)
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    return {
        "device": str(device),
        "tokens": first.tokens,
        "predicted_bytes": expected.peak,
        "measured_bytes": measured,
        "error": expected.peak / measured - 1,
        "held_by_process_bytes": reserved,
        "seconds": round(seconds, 3),
        "flops_per_second": round(first.flops / seconds),
    }


def sentence(calibration: dict[str, Any]) -> str:
    """Return the same in words."""
    tokens, seconds = calibration["tokens"], calibration["seconds"]
    measured, predicted = calibration["measured_bytes"] / GIB, calibration["predicted_bytes"] / GIB
    return (
        f"Measured on {calibration['device']}: a step of {tokens:,} tokens took {measured:.3f} GiB, predicted "
        f"{predicted:.3f} ({calibration['error']:+.2%}); {tokens / seconds:,.0f} tokens/s, "
        f"{calibration['flops_per_second'] / 1e12:.3g} TFLOPS"
    )
