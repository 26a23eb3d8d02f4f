"""The model of a training run: its weights, its adapter, its objective, and what makes it fast."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import model_files, saved_model
from byeori.artifacts.starting_model import StartingModel
from byeori.batch import loader
from byeori.config import DpoSettings, TrainSettings
from byeori.data.tokenize import Example
from byeori.distributed.processes import Processes, all_reduce_min, broadcast
from byeori.errors import ConfigError
from byeori.evaluate import stop_tokens
from byeori.kernels import lora_linear, patch
from byeori.kernels.quantized_linear import QuantizedLinear
from byeori.losses.base import Objective
from byeori.losses.preference import Preference, preference
from byeori.losses.sft import SFT
from byeori.model import (
    adapter,
    embedding_rows,
    experts,
    first_use,
    forward,
    full,
    load,
    load_opened,
    load_streamed,
    lora_start,
    quantize,
    rope_scaling,
    sharding,
    wrap,
)
from byeori.model.text_model import text_config
from byeori.support import console
from byeori.support.console import Say
from byeori.train import memory, optim, schedule
from byeori.train.state import Options


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
    """Return 4 or 8 if the frozen weights are quantized."""
    return 4 if settings.load_in_4bit is True else 8 if settings.load_in_8bit else None


def variant_of(settings: TrainSettings) -> adapter.Variant:
    """Return what makes the run's adapter other than plain LoRA."""
    return adapter.Variant(
        init=settings.lora_init,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        lora_bias=settings.lora_bias,
        rank_pattern=tuple(settings.rank_pattern.items()),
        alpha_pattern=tuple(settings.alpha_pattern.items()),
        layers_to_transform=tuple(settings.layers_to_transform),
        modules_to_save=tuple(settings.modules_to_save),
        target_parameters=tuple(settings.lora_target_parameters),
        tokens=tuple(map(int, settings.trainable_token_indices)),
    )


def check(settings: TrainSettings, processes: Processes, say: Say) -> None:
    """Check the settings against the processes, with a note about what has no effect here.

    Raises:
        ConfigError: if another number of processes is asked for than there are, or batch_size cannot be divided.
    """
    if settings.nproc not in (None, processes.local_world):
        raise ConfigError("nproc starts processes from the command line only; in Python, start them with torchrun")
    size, world = settings.micro_batch_size or 1, processes.world
    if settings.batch_size % (size * world):
        raise ConfigError(
            f"batch_size {settings.batch_size} is not a multiple of micro_batch_size {size} x {world} processes; "
            f"use {size * world * max(1, settings.batch_size // (size * world))}"
        )
    if note := optim.paging_note(settings.optim, processes.device):
        say(note)


def write_beside(folder: Path, settings: TrainSettings, start: StartingModel, device: torch.device) -> None:
    """Write the files that belong beside a full model's weights: config, license, and the tokens that end an answer."""
    dtype = str(load.resolve_dtype(settings.dtype, device)).removeprefix("torch.")
    rows = variant_of(settings).rows
    model_files.copy_beside(load.local_folder(start.base, start.revision), folder, dtype=dtype, vocabulary=rows)
    stop_tokens.record(folder)


def trained_model(
    settings: TrainSettings,
    start: StartingModel,
    processes: Processes,
    say: Say,
    first_rows: Iterator[Example] | None,
) -> Any:
    """Load the base model with a new adapter, with the one that is trained further, or with its own weights trained.

    first_rows: those of the first epoch, by which EVA starts an adapter; None if it is loaded from a checkpoint.

    Raises:
        ConfigError: if it cannot be trained as the settings say.
    """
    if settings.finetune == "full":
        return _whole_model(settings, start, processes, say)
    base = _base(settings, start, processes, say)
    variant = variant_of(settings)
    if processes.sharded and (variant.tokens or variant.modules_to_save):
        raise ConfigError(
            "sharded weights are not trained themselves; add --parallel ddp for trained tokens and modules"
        )
    with adapter.without_bitsandbytes(base):
        lines = experts.notes(base, variant.target_parameters, bits(settings))
    for line in lines:
        say(line)
    if start.adapter is None:
        embedding_rows.resize(base, variant.rows)
    with sharding.whole_shapes(base, processes.device):
        if start.adapter is not None:
            return saved_model.with_adapter(base, start.adapter, trainable=True)
        model = adapter.attach(
            base,
            r=settings.lora_r,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            targets=settings.lora_target_modules,
            seed=settings.seed,
            revision=settings.revision,  # a scaled base is a folder, which has none
            variant=variant,
        )
    for adapter_config in model.peft_config.values():
        adapter_config.base_model_name_or_path = rope_scaling.origin(adapter_config.base_model_name_or_path)
    slow = processes.main and settings.lora_init not in ("default", "gaussian")
    with console.progress(f"Starting the adapter ({settings.lora_init})", shown=slow) as on_progress:
        more = _start_values(model, settings, start, processes, first_rows)
        lora_start.begin(model, settings.lora_init, settings.use_dora, on_progress, **more)
    broadcast(lora_start.tensors(model), processes)  # singular vectors have no sign of their own
    if tied := adapter.tied_targets(model):
        kind = text_config(base.config).model_type
        say(f"Adapting {', '.join(tied)}: {adapter.untied_note(kind)}")
    lora_linear.fuse(model)
    if note := lora_linear.note(model):
        say(note)
    return model


def _start_values(
    model: Any,
    settings: TrainSettings,
    start: StartingModel,
    processes: Processes,
    first_rows: Iterator[Example] | None,
) -> dict[str, Any]:
    """What lora_start.begin needs besides the weights that are trained on."""
    base = load.base_of(model)
    if settings.lora_init == "loftq":
        if not any(isinstance(module, QuantizedLinear) for module in base.modules()):
            raise ConfigError(f"--lora_init loftq: {settings.base_model} is stored in 4 or 8 bit; give its original")
        trusted = settings.trust_remote_code is not None
        read = load_streamed.before_quantizing(start.base, base, revision=start.revision, trust_remote_code=trusted)
        return {"stored": read}
    if settings.lora_init != "eva" or first_rows is None:
        return {}
    if processes.sharded:
        raise ConfigError("--lora_init eva runs the whole model before training; add --parallel ddp")
    forward.use_plain_attention(model)
    ranks = max(settings.lora_r, *settings.rank_pattern.values(), 0)
    return {"batches": lora_start.batches(first_rows, rank=ranks, device=processes.device)}


def _whole_model(settings: TrainSettings, start: StartingModel, processes: Processes, say: Say) -> Any:
    """The base model with its own weights trained."""
    if start.adapter is not None:
        raise ConfigError(
            f"{settings.base_model} is an adapter, and finetune full trains a model; merge it first with `byeori merge`"
        )
    if load.resolve_dtype(settings.dtype, processes.device) == torch.float16:
        raise ConfigError("finetune full: this GPU computes in float16, where gradients overflow; add --dtype float32")
    train = partial(full.unfreeze, layers=settings.train_layers)
    sharded = {"train": train, "masters": settings.master_weights == "float32"} if processes.sharded else {}
    base = _base(settings, start, processes, say, **sharded)
    embedding_rows.resize(base, variant_of(settings).rows)
    return base if processes.sharded else train(base)


def _base(settings: TrainSettings, start: StartingModel, processes: Processes, say: Say, **trained: Any) -> Any:
    """The base model, quantized and sharded as the settings say. trained: see load_streamed."""
    dtype, quantized = load.resolve_dtype(settings.dtype, processes.device), bits(settings)
    config = load.load_config(start.base, revision=start.revision, trust_remote_code=bool(settings.trust_remote_code))
    held = f"{quantized} bit, computing in " if quantized else ""
    say(f"Loading {settings.base_model} in {held}{str(dtype).removeprefix('torch.')} on {processes.device}")
    if note := load_opened.note(config, dtype, quantized):
        say(note)
    source: dict[str, Any] = {
        "dtype": dtype,
        "revision": start.revision,
        "trust_remote_code": settings.trust_remote_code is not None,
    }
    if (quantize.stored(config) or ("", 16))[1] == quantized and not processes.sharded:
        quantized = None  # they are stored so
    if quantized and processes.device.type == "cpu":
        memory.keep_large_blocks_apart()
    if not quantized and not processes.sharded:
        return load.load_model(start.base, device=processes.device, **source)
    offload = settings.cpu_offload and processes.sharded
    return load_streamed.load_streamed(
        start.base, processes=processes, bits=quantized, offload=offload, **trained, **source
    )


def speed_up(model: Any, settings: TrainSettings, row_tokens: int, processes: Processes, say: Say) -> None:
    """Apply recomputation, then fused or else compiled layers, as the settings say.

    row_tokens: of the whole run, for a batch of one row.
    """
    base, chosen = load.base_of(model), patch.parts(settings.speed, processes.device)
    if settings.gradient_checkpointing != "none":
        wrap.recompute_layers(base, settings.gradient_checkpointing)
    tokens = row_tokens * settings.batch_size // processes.world
    if settings.compile == "on":
        chosen = [part for part in chosen if part in ("attention", "kernels")]
    with sharding.last_layer_whole(base):
        fused = patch.fuse(base, chosen)
    for note in patch.notes(base, chosen, load.compute_dtype(base), processes.device):
        say(note)
    pays = settings.compile == "auto" and not fused and wrap.compiling_pays(base, tokens, processes.device)
    if settings.compile == "on" or pays:
        say(f"Compiling {wrap.compile_layers(base)} layers: the first steps take about half a minute longer")


def tried(model: Any, first: list[Example], processes: Processes, say: Say) -> str | None:
    """Try the model on some rows, and give up the accelerations that fail here; return why rows run one at a time.

    Raises:
        ModelError: if its plain form computes something else than its own code.
    """
    base, failed = load.base_of(model), False
    with wrap.uncompiled():
        try:
            apart = forward.choose(model, first)
            failed = apart is not None
        except torch.OutOfMemoryError:
            raise
        except Exception:  # any kernel's; whether it is the model's own fault shows without accelerations
            failed = True
        if failed:
            with patch.without(base, patch.in_use(base)):
                apart = forward.choose(model, first)
    plain = apart is not None
    known = first_use.known_to_work(model, plain=plain) and not (failed and not plain)
    if all_reduce_min(float(known), processes) < 1:  # sharded weights need every process
        for line in first_use.give_up_broken(model, first, plain=plain):
            say(line)
    return apart


def training_options(
    settings: TrainSettings, steps: loader.Schedule, device: torch.device, *, one_at_a_time: bool
) -> Options:
    """Resolve the settings that the training loop needs."""
    same = set(Options.__dataclass_fields__) & set(type(settings).model_fields)
    tokens = settings.micro_batch_tokens or load.micro_batch_tokens(settings.dtype, device)
    total = steps.total_steps
    warmup = schedule.warmup_count(total, settings.warmup_steps, settings.warmup_ratio)
    rate = schedule.arguments(
        settings.lr_scheduler,
        total=total,
        warmup=warmup,
        peak=settings.learning_rate,
        floor=settings.min_lr_ratio,
        more=settings.lr_scheduler_kwargs,
    )
    values = {name: getattr(settings, name) for name in same} | {
        "warmup": warmup,
        "lr_scheduler_kwargs": rate,
        "betas": settings.betas,
        "epsilon": settings.adam_epsilon,
        "momentum": settings.momentum_or_default,
        "master_weights": settings.master_weights if settings.finetune == "full" else None,
        "share_prefixes": settings.share_prefixes != "off" and not one_at_a_time,
        "one_at_a_time": one_at_a_time,
        "micro_batch_tokens": tokens,
    }
    return Options(**values)
