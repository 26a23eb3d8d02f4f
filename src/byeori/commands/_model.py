"""The model of a training run: where its weights lie and how, its adapter, and what makes it fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from byeori.artifacts import saved_model
from byeori.artifacts.starting_model import StartingModel
from byeori.config import DpoSettings, TrainSettings
from byeori.distributed.processes import Processes
from byeori.errors import ConfigError
from byeori.kernels import lora_linear, patch
from byeori.losses.base import Objective
from byeori.losses.preference import Preference, preference
from byeori.losses.sft import SFT
from byeori.model import adapter, load, load_streamed, sharding, wrap
from byeori.train import memory, optim

Tell = Callable[[str], None]


def objective_of(settings: TrainSettings) -> Objective:
    """Return what a run minimises."""
    if not isinstance(settings, DpoSettings):
        return SFT
    constants = Preference(
        loss=settings.loss,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
        gamma=settings.simpo_gamma,
    )
    return preference(constants)


def bits(settings: TrainSettings) -> int | None:
    """4 or 8 where the frozen weights are packed."""
    return 4 if settings.load_in_4bit is True else 8 if settings.load_in_8bit else None


def check(settings: TrainSettings, processes: Processes, tell: Tell) -> None:
    """Say what the settings mean here.

    Raises:
        ConfigError: more processes are asked for than there are.
    """
    if settings.nproc not in (None, processes.local_world):
        raise ConfigError("nproc starts processes from the command line only; in Python, start them with torchrun")
    if note := optim.paging_note(settings.optim, processes.device):
        tell(note)


def adapted_model(settings: TrainSettings, start: StartingModel, processes: Processes, tell: Tell) -> Any:
    """The base model with a new adapter on it, or with the one that is trained further."""
    dtype, packed = load.resolve_dtype(settings.dtype, processes.device), bits(settings)
    held = f"{packed} bit, computing in " if packed else ""
    tell(f"Loading {settings.base_model} in {held}{str(dtype).removeprefix('torch.')} on {processes.device}")
    where: dict[str, Any] = {
        "dtype": dtype,
        "revision": start.revision,
        "trust_remote_code": settings.trust_remote_code is not None,
    }
    if packed and processes.device.type == "cpu":
        memory.keep_large_blocks_apart()
    if packed or processes.sharded:
        offload = settings.cpu_offload and processes.sharded
        base = load_streamed.load_streamed(start.base, processes=processes, bits=packed, offload=offload, **where)
    else:
        base = load.load_model(start.base, device=processes.device, **where)
    with sharding.shown_whole(base, processes.device):
        if start.adapter is not None:
            return saved_model.with_adapter(base, start.adapter, trainable=True)
        model = adapter.attach(
            base,
            r=settings.lora_r,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=settings.lora_target_modules,
            seed=settings.seed,
            revision=start.revision,
        )
    lora_linear.fuse(model)
    return model


def speed_up(model: Any, settings: TrainSettings, row_tokens: int, processes: Processes, tell: Tell) -> None:
    """Recompute, then fuse or else compile, as the settings say.

    row_tokens: tokens of the whole run, for a batch of one row.
    """
    base, chosen = model.get_base_model(), patch.parts(settings.speed, processes.device)
    if settings.gradient_checkpointing != "none":
        wrap.recompute_layers(base, settings.gradient_checkpointing)
    tokens = row_tokens * settings.batch_size // processes.world
    if settings.compile == "on":
        chosen = [part for part in chosen if part in ("attention", "kernels")]
    patch.everywhere(chosen)
    with sharding.last_layer_whole(base):
        fused = patch.fuse(base, chosen)
    pays = settings.compile == "auto" and not fused and wrap.compiling_pays(base, tokens, processes.device)
    if settings.compile == "on" or pays:
        tell(f"Compiling {wrap.compile_layers(base)} layers: the first steps take about half a minute longer")
