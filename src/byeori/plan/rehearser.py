"""The rehearsals that the plan of one run asks for, each made once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from byeori.losses.base import Objective
from byeori.model import load, quantize
from byeori.plan import machines, rehearsal
from byeori.plan.candidates import PlanInput, SearchSpace
from byeori.plan.rehearsal import Rehearsal
from byeori.plan.speed import Cost
from byeori.plan.trained import Adapter, Full
from byeori.plan.workload import Examples, MicroBatch, Workload

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """The settings of a run that decide its memory and speed, by plain values. None: the plan chooses.

    dtype, parallel, micro_batch_size, micro_batch_tokens, speed, optim, momentum, cpu_offload: as the settings of the
    same name.
    recompute: none, selective, full or offload. four_bit, eight_bit: whether the frozen weights are quantized.
    all_trained: prompts as well as answers.
    """

    objective: Objective
    adapter: Adapter | Full
    dtype: str
    recompute: str | None
    four_bit: bool | None
    eight_bit: bool
    parallel: str
    micro_batch_size: int | None
    micro_batch_tokens: int | None
    share_prefixes: bool
    speed: tuple[str, ...]
    optim: str = "adamw"
    momentum: float = 0.0
    cpu_offload: bool = False
    all_trained: bool = False

    @property
    def bits(self) -> int | None:
        """4 or 8 if the settings ask for quantized weights."""
        return 4 if self.four_bit else 8 if self.eight_bit else None

    @property
    def sets_micro_batches(self) -> bool:
        """Whether the settings say how large micro-batches are."""
        return self.micro_batch_size is not None or self.micro_batch_tokens is not None


class Rehearser:
    """Rehearses steps of one run, each once.

    stored: of quantize.stored; bitsandbytes' checkpoints are rehearsed in 4 or 8 bit as byeori's own would be.

    Raises:
        ModelError: if no model can be made of the config. ConfigError: if it has no layers to quantize as asked.
    """

    def __init__(self, config: Any, run: PlannedRun) -> None:
        self.stored = quantize.stored(config)
        if self.stored is not None and (bits := self.stored[1]) < 16:  # nothing is quantized once more
            run = replace(run, four_bit=bits == 4, eight_bit=bits == 8)
        self.config, self.run = config, run
        self._architecture = rehearsal.architecture(config, run.bits)
        self.weight_count = self._architecture.weight_count
        self._known: dict[Any, tuple[Examples, Rehearsal]] = {}

    @property
    def search_space(self) -> SearchSpace:
        """What the settings leave to the plan."""
        return SearchSpace(
            recompute=self.run.recompute,
            four_bit=False if self.run.eight_bit or not self._architecture.quantizable else self.run.four_bit,
            sharding={"ddp": False, "fsdp": True, "hsdp": True}.get(self.run.parallel),
        )

    def dtype(self, device: str) -> torch.dtype:
        """Return what the run computes in on this kind of device."""
        if self.run.dtype == "auto" and device != "cpu":
            return torch.float16 if device == machines.OLD_CUDA else torch.bfloat16
        return load.resolve_dtype(self.run.dtype, _CPU)

    def rehearse(
        self,
        micro_batch: MicroBatch,
        recompute: str,
        four_bit: bool,
        device: str,
        *,
        typical: bool = False,
        explain: bool = False,
    ) -> Rehearsal:
        """Return what a step over the largest micro-batch needs, or over a typical one. device: as Machine.kind."""
        examples = micro_batch.typical if typical else micro_batch.largest
        key = (*map(id, examples), micro_batch.accumulates, recompute, four_bit, device, explain)
        if key not in self._known:
            result = rehearsal.rehearse(
                self._architecture,
                self.run.adapter,
                examples,
                dtype=self.dtype(device),
                recompute=recompute,
                bits=4 if four_bit else 8 if self.run.eight_bit else None,
                optim=self.run.optim,
                momentum=self.run.momentum,
                objective=self.run.objective,
                device="cpu" if device == "cpu" else "cuda",
                capability=7.5 if device == machines.OLD_CUDA else 8.0,
                accumulates=micro_batch.accumulates,
                share=micro_batch.share,
                speed=self.run.speed,
                explain=explain,
            )
            self._known[key] = examples, result  # the examples too, so that their ids stay theirs
        return self._known[key][1]

    def plan_input(self, workload: Workload, table: machines.Table) -> PlanInput:
        """Return what candidates are made from."""
        measured = workload.micro_batches[0]

        def typical_cost(micro_batch: MicroBatch) -> Cost:
            """In proportion to one that is rehearsed."""
            cost = self.rehearse(measured, "none", False, "cuda", typical=True)
            ratio = sum(len(e.token_ids) for e in micro_batch.typical) / sum(len(e.token_ids) for e in measured.typical)
            return Cost(cost.flops * ratio, cost.forward_flops * ratio, cost.tokens * ratio)

        return PlanInput(
            workload=workload,
            search_space=self.search_space,
            table=table,
            rehearse=self.rehearse,
            typical_cost=typical_cost,
            speed_known=self.run.dtype != "float32",
            smallest_weights=self.smallest_weights,
            cpu_offload=self.run.cpu_offload,
        )

    def smallest_weights(self, four_bit: bool) -> float:
        """Return bytes that the weights take at least."""
        return self.weight_count * (0.5 if four_bit else 1 if self.run.eight_bit else self.dtype("cuda").itemsize)

    def micro_batch_tokens(self, device: str) -> int:
        """Return those of the settings, or the default for a kind of device, cpu or cuda."""
        default = load.micro_batch_tokens(self.run.dtype, torch.device(device), self.weight_count)
        return self.run.micro_batch_tokens or default
