"""A run's step rehearsed in every way that its settings leave open, each once, and ahead of time in other processes."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from byeori.artifacts.starting_model import objective_of
from byeori.commands import _model as weights
from byeori.config import TrainSettings
from byeori.kernels import patch
from byeori.losses.base import Objective
from byeori.model import load
from byeori.plan import calibrate, candidates, machines, rehearsal
from byeori.plan.candidates import PlanInput, SearchSpace
from byeori.plan.rehearsal import Adapter, Rehearsal
from byeori.plan.workload import MicroBatch, Workload

_CPU = torch.device("cpu")


class _Way(NamedTuple):
    """What `rehearse` is asked."""

    micro: MicroBatch
    recompute: str
    four_bit: bool
    device: str
    usual: bool = False


_SPEED_OF = ("none", False, "cuda")  # the way whose operations stand for all
_forked: tuple[Rehearser, list[list[_Way]]]  # in a process that rehearses ahead: what there is to rehearse


def _be_forked(rehearser: Rehearser, groups: list[list[_Way]]) -> None:
    global _forked
    rehearser.__dict__["_known"] = {}  # where the other processes' work is
    _forked = rehearser, groups
    torch.set_num_threads(1)  # the threads of the process that it was forked from are not there


def _rehearse(number: int) -> list[Rehearsal]:
    rehearser, groups = _forked
    return [rehearser.rehearse(**way._asdict()) for way in groups[number]]


def _key(
    micro: MicroBatch, recompute: str, four_bit: bool, device: str, usual: bool = False, **more: bool
) -> tuple[Any, ...]:
    examples = micro.usual if usual else micro.worst
    return id(examples), micro.several, recompute, four_bit, device, *more.items()


@dataclass(frozen=True, kw_only=True)
class Rehearser:
    """A model and the settings of its training; remembers what it has rehearsed.

    Raises:
        ModelError: no model can be made of the config. ConfigError: it has no layers to hold in the bits asked for.
    """

    config: Any
    training: TrainSettings

    def __post_init__(self) -> None:
        self.__dict__["_stage"] = rehearsal.stage(self.config, weights.bits(self.training))
        self.__dict__["_known"] = {}

    @property
    def objective(self) -> Objective:
        """That of the run."""
        return objective_of(self.training)

    @property
    def adapter(self) -> Adapter:
        """That of the run."""
        how = self.training
        targets = tuple(how.lora_target_modules)
        return Adapter(r=how.lora_r, alpha=how.lora_alpha, dropout=how.lora_dropout, targets=targets)

    @property
    def recompute(self) -> str:
        """What the settings say of it; none where they leave it open, full where its inputs go to the CPU."""
        given = self.training.gradient_checkpointing
        return {"offload": "full", "auto": "none"}.get(given, given)

    @property
    def choice(self) -> SearchSpace:
        """What the settings leave open."""
        how = self.training
        cannot = how.load_in_8bit or not self.__dict__["_stage"].packable
        four_bit = False if cannot else how.load_in_4bit
        return SearchSpace(
            recompute=None if how.gradient_checkpointing == "auto" else self.recompute,
            four_bit=None if four_bit == "auto" else four_bit,
            sharding={"ddp": False, "fsdp": True, "hsdp": True}.get(how.parallel),
        )

    def dtype(self, device: str) -> torch.dtype:
        """What the run computes in on this kind of device."""
        if self.training.dtype == "auto" and device == "cuda":
            return torch.bfloat16
        return load.resolve_dtype(self.training.dtype, _CPU)

    def rehearse(
        self, micro: MicroBatch, recompute: str, four_bit: bool, device: str, *, usual: bool = False, **more: bool
    ) -> Rehearsal:
        """The largest micro-batch of this size, or a usual one."""
        examples = micro.usual if usual else micro.worst
        key = _key(micro, recompute, four_bit, device, usual, **more)
        known = self.__dict__["_known"]
        if key in known and not isinstance(known[key], Rehearsal):
            known[key] = known[key]()
        if key not in known:
            known[key] = rehearsal.rehearse(
                self.__dict__["_stage"],
                self.adapter,
                examples,
                dtype=self.dtype(device),
                recompute=recompute,
                four_bit=four_bit,
                objective=self.objective,
                device=device,
                several=micro.several,
                wanted=self.training.speed,
                **more,
            )
        return known[key]

    @contextmanager
    def ahead(self, work: Workload, memory: dict[str, int]) -> Iterator[None]:
        """Inside it other processes rehearse what may be asked for, where the system can fork them.

        memory: of each kind of device, the most that one has.
        """
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
        if cores < 2 or torch.cuda.is_initialized():  # a fork has nothing of the threads that serve a GPU
            yield
            return
        groups, known = self._groups(work, memory), self.__dict__["_known"]
        with multiprocessing.get_context("fork").Pool(cores, _be_forked, (self, groups)) as pool:
            for number, group in enumerate(groups):
                found = pool.apply_async(_rehearse, (number,))
                for place, way in enumerate(group):
                    known[_key(**way._asdict())] = lambda found=found, place=place: found.get()[place]
            yield
        self.__dict__["_known"] = {key: found for key, found in known.items() if isinstance(found, Rehearsal)}

    def _groups(self, work: Workload, memory: dict[str, int]) -> list[list[_Way]]:
        """What may be asked for; a group shares its models. The most work first: a CPU's attention is written out."""
        again = [self.choice.recompute] if self.choice.recompute else list(candidates.AGAIN)
        packed = [False, True] if self.choice.four_bit is None else [self.choice.four_bit]
        groups: list[list[_Way]] = []
        for device, most in memory.items():
            count = max(candidates.COUNTS) if device == "cuda" else 1
            fitting = [four_bit for four_bit in packed if self.least(four_bit) <= most * count]
            for four_bit in fitting:
                for some in (
                    [how for how in again if how == "selective"],
                    [how for how in again if how != "selective"],
                ):
                    groups.append([_Way(micro, how, four_bit, device) for how in some for micro in work.micros])
            if not fitting:  # then one way is asked for, to say what it lacks
                groups.append([_Way(work.micros[-1], again[-1], packed[-1], device)])
        same = [group for group in groups if any(way[1:4] == _SPEED_OF for way in group)]
        (same[0] if same else groups[-1]).append(_Way(work.micros[0], *_SPEED_OF, usual=True))
        return sorted(filter(None, groups), key=lambda group: (group[0].device == "cpu", len(group)), reverse=True)

    def case(self, work: Workload, table: machines.Table) -> PlanInput:
        """What offers are made from."""

        def usual(micro: MicroBatch, device: str) -> tuple[float, float, float]:
            found = self.rehearse(work.micros[0], *_SPEED_OF, usual=True)
            part = sum(len(e.token_ids) for e in micro.usual) / sum(len(e.token_ids) for e in work.micros[0].usual)
            return found.flops * part, found.forward_flops * part, found.tokens * part

        half = self.training.dtype != "float32"
        return PlanInput(
            work=work,
            choice=self.choice,
            table=table,
            rehearse=self.rehearse,
            usual=usual,
            half=half,
            least=self.least,
        )

    def least(self, four_bit: bool) -> float:
        """Bytes that the weights take at least."""
        return self.__dict__["_stage"].numbers * (0.5 if four_bit else self.dtype("cuda").itemsize)

    def micro_batch_tokens(self, kind: str) -> int:
        """Of the settings, or what is usual on a kind of device, cpu or cuda."""
        usual = load.micro_batch_tokens(self.training.dtype, torch.device(kind), self.__dict__["_stage"].numbers)
        return self.training.micro_batch_tokens or usual

    def weights(self, micro: MicroBatch) -> int:
        """How many numbers the model has."""
        return self.rehearse(micro, "none", False, "cuda").weight_count

    def calibrated(self, micro: MicroBatch) -> dict[str, Any]:
        """One real step of a usual micro-batch here, beside its rehearsal."""
        device = torch.device("cuda") if torch.cuda.is_available() else _CPU
        found = self.rehearse(micro, self.recompute, False, device.type, usual=True)
        return calibrate.run(
            self.config,
            self.adapter,
            micro.usual,
            found,
            dtype=self.dtype(device.type),
            recompute=self.recompute,
            objective=self.objective,
            several=micro.several,
            device=device,
            chosen=patch.parts(self.training.speed, device),
        )
