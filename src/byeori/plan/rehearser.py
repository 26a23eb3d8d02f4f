"""The rehearsals that the plan of one run asks for, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from byeori.kernels import patch
from byeori.losses.base import Objective
from byeori.model import load
from byeori.plan import calibrate, machines, rehearsal
from byeori.plan.candidates import PlanInput, SearchSpace
from byeori.plan.rehearsal import Adapter, Rehearsal
from byeori.plan.workload import MicroBatch, Workload

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """The settings of a run that decide its memory and speed, by plain values. None: the plan chooses.

    dtype, parallel, micro_batch_size, micro_batch_tokens, speed: as the settings of the same name. recompute: none,
    selective or full. four_bit, eight_bit: whether the frozen weights are quantized.
    """

    objective: Objective
    adapter: Adapter
    dtype: str
    recompute: str | None
    four_bit: bool | None
    eight_bit: bool
    parallel: str
    micro_batch_size: int | None
    micro_batch_tokens: int | None
    share_prefixes: bool
    speed: tuple[str, ...]

    @property
    def bits(self) -> int | None:
        """4 or 8 if the settings ask for quantized weights."""
        return 4 if self.four_bit else 8 if self.eight_bit else None


class Rehearser:
    """Rehearses steps of one run and remembers each.

    Raises:
        ModelError: if no model can be made of the config. ConfigError: if it has no layers to quantize as asked.
    """

    def __init__(self, config: Any, run: PlannedRun) -> None:
        self.config, self.run = config, run
        self._stage = rehearsal.stage(config, run.bits)
        self._known: dict[Any, Rehearsal] = {}

    @property
    def search_space(self) -> SearchSpace:
        """What the settings leave to the plan."""
        return SearchSpace(
            recompute=self.run.recompute,
            four_bit=False if self.run.eight_bit or not self._stage.packable else self.run.four_bit,
            sharding={"ddp": False, "fsdp": True, "hsdp": True}.get(self.run.parallel),
        )

    def dtype(self, device: str) -> torch.dtype:
        """What the run computes in on this kind of device."""
        if self.run.dtype == "auto" and device == "cuda":
            return torch.bfloat16
        return load.resolve_dtype(self.run.dtype, _CPU)

    def rehearse(
        self,
        micro: MicroBatch,
        recompute: str,
        four_bit: bool,
        device: str,
        *,
        usual: bool = False,
        explain: bool = False,
    ) -> Rehearsal:
        """Return what a step over the largest micro-batch takes, or over a typical one."""
        examples = micro.usual if usual else micro.worst
        content = tuple((tuple(example.token_ids), example.targets) for example in examples)
        key = (content, micro.several, recompute, four_bit, device, explain)
        if key not in self._known:
            self._known[key] = rehearsal.rehearse(
                self._stage,
                self.run.adapter,
                examples,
                dtype=self.dtype(device),
                recompute=recompute,
                four_bit=four_bit,
                objective=self.run.objective,
                device=device,
                several=micro.several,
                wanted=self.run.speed,
                explain=explain,
            )
        return self._known[key]

    def plan_input(self, work: Workload, table: machines.Table) -> PlanInput:
        """What candidates are made from."""
        return PlanInput(
            work=work,
            choice=self.search_space,
            table=table,
            rehearse=self.rehearse,
            usual=self._costs(work.micros[0]),
            half=self.run.dtype != "float32",
            least=self.smallest_weights,
        )

    def _costs(self, measured: MicroBatch) -> Callable[[MicroBatch, str], tuple[float, float, float]]:
        """Operations, those of the forward pass and tokens of any typical micro-batch, in proportion to one of them."""

        def costs(micro: MicroBatch, device: str) -> tuple[float, float, float]:
            found = self.rehearse(measured, "none", False, "cuda", usual=True)
            part = sum(len(e.token_ids) for e in micro.usual) / sum(len(e.token_ids) for e in measured.usual)
            return found.flops * part, found.forward_flops * part, found.tokens * part

        return costs

    def smallest_weights(self, four_bit: bool) -> float:
        """Bytes that the weights take at least."""
        return self._stage.numbers * (0.5 if four_bit else self.dtype("cuda").itemsize)

    def micro_batch_tokens(self, device: str) -> int:
        """Those of the settings, or the default of a kind of device, cpu or cuda."""
        default = load.micro_batch_tokens(self.run.dtype, torch.device(device), self._stage.numbers)
        return self.run.micro_batch_tokens or default

    def weight_count(self, micro: MicroBatch) -> int:
        """How many numbers the frozen model has."""
        return self.rehearse(micro, "none", False, "cuda").weight_count

    def calibrated(self, micro: MicroBatch) -> dict[str, Any]:
        """One real step over a typical micro-batch on this machine, next to its rehearsal."""
        device = torch.device("cuda") if torch.cuda.is_available() else _CPU
        recompute = self.run.recompute or "none"
        found = self.rehearse(micro, recompute, False, device.type, usual=True)
        return calibrate.run(
            self.config,
            self.run.adapter,
            micro.usual,
            found,
            dtype=self.dtype(device.type),
            recompute=recompute,
            objective=self.run.objective,
            several=micro.several,
            device=device,
            chosen=patch.parts(list(self.run.speed), device),
        )
