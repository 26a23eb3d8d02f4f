"""One real step to compare to its rehearsal: random weights, the same code, on the device of this machine.

On a GPU the truth is torch.cuda.max_memory_allocated; on the CPU it is the peak of the storages that PyTorch made.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from byeori.errors import ConfigError
from byeori.kernels import patch
from byeori.model import forward
from byeori.plan import machines, measured_step, rehearsal, speed
from byeori.plan.machines import GIB
from byeori.plan.measured_step import Step
from byeori.plan.rehearser import Rehearser
from byeori.plan.workload import MicroBatch
from byeori.train import memory

_ROOM = 0.8  # the fraction of the free memory that may be used


def run(rehearser: Rehearser, micro_batch: MicroBatch) -> dict[str, Any]:
    """Return what was predicted for a typical micro-batch, what was measured, and the speed of the step.

    Raises:
        ConfigError: if the step would not fit here.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu, planned = device.type == "cuda", rehearser.run
    recompute = planned.recompute or "none"
    expected = rehearser.rehearse(micro_batch, recompute, False, device.type, typical=True).peak
    gc.collect()  # what another model in this process left behind is not of this step
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    free = memory.available_bytes(device)
    if expected > _ROOM * free:
        raise ConfigError(
            f"--calibrate: the step needs {expected / GIB:.1f} GiB and {free / GIB:.1f} GiB are free on {device}; "
            "give a smaller model or smaller micro-batches"
        )
    model = rehearsal.build(
        rehearser.config,
        planned.adapter,
        rehearser.dtype(device.type),
        recompute=recompute,
        fast_paths=patch.parts(list(planned.speed), device),
        device=str(device),
    )
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    more: dict[str, Any] = {"masters": measured_step.make_masters(model, planned.adapter.masters)}
    optimizer = measured_step.make_optimizer(model, planned.optim, planned.momentum, **more)
    more.update(accumulates=micro_batch.accumulates, one_sequence=not forward.use_forest_attention(model), ends=(1, 1))

    def step() -> Step:
        result = measured_step.run(model, optimizer, micro_batch.typical, objective=planned.objective, **more)
        if on_gpu:
            torch.cuda.synchronize(device)
        return result

    first = step()
    if on_gpu:
        measured, reserved = torch.cuda.max_memory_allocated(device) - before, torch.cuda.max_memory_reserved(device)
    else:
        measured, reserved = max(peak.total for peak in first.peaks.values()), memory.peak_memory_bytes(device)
    began = time.perf_counter()
    step()
    seconds = time.perf_counter() - began
    _record(first, seconds, rehearser.dtype("cpu"), on_gpu=on_gpu)
    return {
        "device": str(device),
        "tokens": first.tokens,
        "predicted_bytes": expected,
        "measured_bytes": measured,
        "error": expected / measured - 1,
        "held_by_process_bytes": reserved,
        "seconds": round(seconds, 3),
        "flops_per_second": round(first.flops / seconds),
    }


def _record(step: Step, seconds: float, dtype: torch.dtype, *, on_gpu: bool) -> None:
    """Keep the step's share of the device's peak for later plans. dtype: what a CPU computes in."""
    gpu = machines.this_gpu(machines.read()) if on_gpu else None
    peak = gpu.flops if gpu else 0.0 if on_gpu else machines.measured_peak(dtype)
    if peak and (not on_gpu or step.tokens >= speed.LEAST_TOKENS):
        work: dict[str, Any] = {"flops": step.flops, "seconds": seconds, "peak": peak}
        speed.record(speed.Measured(device=gpu.name if gpu else "CPU", four_bit=False, **work))


def sentence(calibration: dict[str, Any]) -> str:
    """Return the same in words."""
    tokens, seconds = calibration["tokens"], calibration["seconds"]
    measured, predicted = calibration["measured_bytes"] / GIB, calibration["predicted_bytes"] / GIB
    return (
        f"Measured on {calibration['device']}: a step of {tokens:,} tokens took {measured:.3f} GiB, predicted "
        f"{predicted:.3f} ({calibration['error']:+.2%}); {tokens / seconds:,.0f} tokens/s, "
        f"{calibration['flops_per_second'] / 1e12:.3g} TFLOPS"
    )
