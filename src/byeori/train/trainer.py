"""One training loop for every objective.

A step computes sums over its micro-batches and divides once, by the weight of the whole step over all processes:

    loss = sum over micro-batches and processes of objective(log-probs) / sum of target weights

so the result does not depend on the number of processes, the size of the micro-batches or the packing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.distributed.processes import all_reduce_gradients, all_reduce_sum, barrier, connection_lost, whole
from byeori.errors import ConfigError
from byeori.losses.base import Sums
from byeori.model import device_batch, forward, load, sharding, wrap
from byeori.model.device_batch import DeviceBatch
from byeori.support import atomic_files
from byeori.train import checkpoint, hooks, log, memory, oom, optim, schedule
from byeori.train.async_save import Checkpoints
from byeori.train.live import Display, Seen
from byeori.train.masters import Masters
from byeori.train.oom import NoRoom
from byeori.train.prefetch import Step, idle, place, steps_from
from byeori.train.recovery import Recovery
from byeori.train.state import Interrupted, Job, Options, Progress

WriteLine = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What a step needs. noise: `length` of it is the mean length of the micro-batch's examples, for NEFTune."""

    job: Job
    progress: Progress
    optimizer: torch.optim.Optimizer
    masters: Masters
    noise: dict[str, float]
    recovery: Recovery


def train(job: Job) -> Progress:
    """Run the loop to its end.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint. Again: sharded rows did not fit.
        TrainingError: if three steps in a row were not finite.
        CheckpointError: if a checkpoint could not be read or written.
    """
    options, main = job.options, job.processes.main
    sharding.reshard(load.base_of(job.model))  # what is trained are the shards
    masters = Masters([parameter for _, parameter in checkpoint.trainable(job.model)], options.master_weights)
    optimizer = _optimizer(job, masters)
    progress, resumed = _restored(job, optimizer, masters)
    job.model.train()
    run_log = _run_log(job, progress, resumed=resumed) if main else None

    def write(line: dict[str, Any]) -> None:
        if run_log:
            run_log.write(line)
        trackers.write(line)

    with (
        hooks.stop_signals() as stop,
        hooks.neftune(job.model, options.neftune_noise_alpha) as noise,
        oom.watched(wrap.layers(load.base_of(job.model)), job.processes.device),
        _display(job, progress) as live,
        log.Trackers(
            options.report_to if main else [], folder=job.output_dir, settings=job.settings, say=live.say
        ) as trackers,
        Checkpoints(job, optimizer, masters, live.say) as checkpoints,
        steps_from(job, progress) as steps,
    ):
        recovery = Recovery(job, progress, checkpoints, live.say)
        session = Session(
            job=job, progress=progress, optimizer=optimizer, masters=masters, noise=noise, recovery=recovery
        )
        while progress.step < job.schedule.total_steps and not _has_stalled(progress, options):
            recovery.before_step()
            done = progress.step
            try:
                line = train_step(session, next(steps))
                live.step(line)
                if _is_logged(job, progress):
                    write(line)
                if progress.bad_steps:
                    recovery.on_not_finite(line["skipped_rows"])
                _after_step(session, live, write, stop, checkpoints)
            except (RuntimeError, NoRoom) as error:
                # a step fails before it changes weights; after a step that is done, its evaluation may not be
                step_done = progress.step == done or not _evaluates(job, progress.step)
                if isinstance(error, NoRoom):
                    recovery.on_out_of_memory(error, step_done=step_done)
                elif connection_lost(error):
                    recovery.on_lost_rank(step_done=step_done)
                raise
    barrier(job.processes)  # every process may read the checkpoints now
    masters.finish(optimizer)
    job.model.eval()
    return progress


def _run_log(job: Job, progress: Progress, *, resumed: bool) -> log.RunLog:
    """The log of the run, in a folder without what killed processes left and checkpoints that are not kept."""
    atomic_files.sweep(job.output_dir)
    checkpoint.prune(job.output_dir, job.options.save_total_limit, best=progress.best_step, latest=progress.step)
    return log.RunLog(job.output_dir, after_step=progress.step if resumed else None)


def _optimizer(job: Job, masters: Masters) -> torch.optim.Optimizer:
    options, tables, rates = job.options, _tables(job.model), _rates(job)
    if masters.sharded and options.optim in optim.OF_WHOLE_MATRICES:
        raise ConfigError(
            f"--optim {options.optim} works on whole matrices, and each process of this run has rows of them "
            "(--parallel fsdp); choose --parallel ddp if the weights fit, or --optim adamw"
        )
    pairs = list(zip(masters.parameters, masters.held, strict=True))
    return optim.make(
        options.optim,
        masters.held,
        betas=options.betas,
        epsilon=options.epsilon,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        apart={id(held) for parameter, held in pairs if id(parameter) in tables},
        rates={id(held): rates[id(parameter)] for parameter, held in pairs if id(parameter) in rates},
    )


def _rates(job: Job) -> dict[int, float]:
    """The learning rate of parameters that have one of their own, as a factor of that of the others, by id.

    LoRA+ (Hayou et al., arXiv:2402.12354) raises that of B, and of vectors as PEFT does.
    """
    options, tables = job.options, _tables(job.model)
    rates = {
        id(parameter): options.loraplus_lr_ratio
        for name, parameter in checkpoint.trainable(job.model)
        if "lora_B" in name or parameter.dim() == 1
    }
    if options.embedding_learning_rate is not None:
        rates |= dict.fromkeys(tables, options.embedding_learning_rate / options.learning_rate)
    return rates


def _tables(model: Any) -> set[int]:
    """The ids of what is trained of the embedding and the head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {id(parameter) for module in modules if module is not None for parameter in module.parameters()}


def _display(job: Job, progress: Progress) -> Display:
    total, main = job.schedule.total_steps, job.processes.main
    seen = Seen(total=total, epochs=total / job.schedule.steps_per_epoch, planned=job.planned_bytes)
    earlier = log.read(job.output_dir) if main and progress.step else ()
    return Display(
        seen, job.output_dir, title=job.output_dir.resolve().name, start=progress.step, shown=main, earlier=earlier
    )


def _restored(job: Job, optimizer: torch.optim.Optimizer, masters: Masters) -> tuple[Progress, bool]:
    """The progress of the checkpoint that is resumed, and whether there is one."""
    progress = Progress()
    state: dict[str, Any] | None = None
    if job.resume:
        state = checkpoint.load_training_state(job.resume, job.model, optimizer, masters, job.processes)
    progress.restore(state or {})
    noted = oom.remembered(job.output_dir) if job.processes.main else 0
    progress.halvings = max(progress.halvings, int(all_reduce_sum([noted], job.processes)[0]))
    return progress, bool(state)


def _is_logged(job: Job, progress: Progress) -> bool:
    last = progress.step == job.schedule.total_steps
    return progress.step % job.options.logging_steps == 0 or last or progress.bad_steps > 0


# ---- a step --------------------------------------------------------------------------------------------------------


def train_step(session: Session, step: Step) -> dict[str, Any]:
    """Compute one optimizer step; returns its log line."""
    began, job, progress = time.perf_counter(), session.job, session.progress
    examples = [example for unit in step.units for example in unit]

    def compute(sums: dict[str, torch.Tensor], halvings: int) -> None:
        # dropout and NEFTune: the same numbers when the step is computed again
        torch.manual_seed((job.options.seed * 1_000_003 + progress.step) * 4099 + job.processes.rank)
        session.masters.zero_grad()
        _gradients(job, step, session.noise, sums, halvings)

    totals = _all_sums(session, ["loss", "unique_tokens", *job.objective.logged], compute)
    loss, unique_tokens = totals.pop("loss"), int(totals.pop("unique_tokens"))
    parameters = session.masters.with_gradients
    all_reduce_gradients(parameters, job.processes)
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])).item()
    options = job.options
    rate = schedule.learning_rate(
        progress.step,
        total=job.schedule.total_steps,
        warmup=options.warmup,
        kind=options.lr_scheduler,
        peak=options.learning_rate,
        more=options.lr_scheduler_kwargs,
    )
    more: dict[str, Any] = {}
    if math.isfinite(loss) and math.isfinite(norm):
        _update(session, rate, norm)
        progress.bad_steps, progress.last_loss = 0, loss
        progress.first_loss = loss if progress.step == 0 else progress.first_loss
    else:
        progress.bad_steps += 1
        more["skipped_rows"] = [unit[0].row + 1 for unit in step.units]
    if progress.halvings:
        more["micro_batches_halved"] = progress.halvings
    progress.step += 1
    tokens = sum(len(forests.needed(example)) for example in examples)
    progress.tokens, progress.unique_tokens = progress.tokens + tokens, progress.unique_tokens + unique_tokens
    return {
        "step": progress.step,
        "epoch": round(progress.step / job.schedule.steps_per_epoch, 4),
        "loss": loss,
        **totals,
        **more,
        "learning_rate": rate,
        "grad_norm": norm,
        "rows": len(step.units),
        "tokens": tokens,
        "unique_tokens": unique_tokens,
        "target_tokens": sum(example.target_count for example in examples),
        "seconds": round(time.perf_counter() - began, 4),
        "peak_memory_bytes": memory.peak_memory_bytes(job.processes.device),
    }


def _all_sums(
    session: Session, names: list[str], compute: Callable[[dict[str, torch.Tensor], int], None]
) -> dict[str, float]:
    """Sums over all micro-batches and processes, in micro-batches that fit."""
    halvings, on_split = session.progress.halvings, session.recovery.on_split
    return oom.summed(compute, names, session.job.processes, halvings=halvings, on_split=on_split)


def _gradients(job: Job, step: Step, noise: dict[str, float], sums: dict[str, torch.Tensor], halvings: int) -> None:
    """Forward and backward over this process's part of a step; adds its part of the loss and of what is logged."""
    weight = job.objective.weight([example.target_count for unit in step.units for example in unit])
    for batch in step.batches(job, halvings):
        forest = batch.forest
        noise["length"] = forest.separate_tokens / len(forest.rows)
        forward_backward = partial(_forward_backward, job, batch, weight)
        for name, value in oom.attempt(forward_backward, forest.rows, forest.unique_tokens).items():
            sums[name] += value
        sums["unique_tokens"] += forest.unique_tokens
    for forest in idle(step.units, job.options, job.processes, halvings):
        with forward.accelerated(job.model):
            (_sums(job, device_batch.place(forest, job.processes.device)).total * 0).backward()


def _forward_backward(job: Job, batch: DeviceBatch, weight: float) -> dict[str, torch.Tensor]:
    with forward.accelerated(job.model):
        sums = _sums(job, batch)
        (sums.total / weight).backward()
    return _logged(sums, weight)


def _sums(job: Job, batch: DeviceBatch) -> Sums:
    logprobs = forward.forest_logprobs(job.model, batch, plain=job.options.one_at_a_time)
    return job.objective.sums(logprobs, batch.targets)


def _logged(sums: Sums, weight: float) -> dict[str, torch.Tensor]:
    return {name: value.detach().double() / weight for name, value in [("loss", sums.total), *sums.logged.items()]}


def _update(session: Session, rate: float, norm: float) -> None:
    options, processes = session.job.options, session.job.processes
    if options.max_grad_norm and norm > options.max_grad_norm:
        grads = [p.grad for p in session.masters.with_gradients if p.grad is not None]
        torch._foreach_mul_(grads, options.max_grad_norm / (norm + 1e-6))
    for group in session.optimizer.param_groups:
        group["lr"] = rate * group.get(optim.RATE, 1.0)
    # processes with whole weights round alike
    own = processes.rank if session.masters.sharded else 0
    session.masters.step(session.optimizer, (options.seed * 1_000_003 + session.progress.step) * 4099 + own)


# ---- after a step ---------------------------------------------------------------------------------------------------


def _after_step(
    session: Session, live: Display, write: WriteLine, stop: threading.Event, checkpoints: Checkpoints
) -> None:
    """Evaluate, save and stop if it is time. The log is written before the checkpoint, so it is never behind it."""
    job, progress = session.job, session.progress
    checkpoints.check()
    stopping = all_reduce_sum([float(stop.is_set())], job.processes)[0] > 0
    last = progress.step == job.schedule.total_steps
    improved = _evaluates(job, progress.step) and _evaluate_and_log(session, live, write)
    finished = last or _has_stalled(progress, job.options)
    if improved or finished or stopping or _is_due(progress.step, job.options.save_steps, job):
        checkpoints.save(progress)
    if stopping and not finished:
        checkpoints.wait()
        raise Interrupted(
            f"stopped at step {progress.step}; everything is in {job.output_dir / f'checkpoint-{progress.step}'}; go "
            "on with the same command and --resume_from_checkpoint latest"
        )


def _evaluate_and_log(session: Session, live: Display, write: WriteLine) -> bool:
    """Evaluate; whether the loss is the lowest so far."""
    job, progress = session.job, session.progress
    with session.masters.averaged(session.optimizer):
        means = evaluate(session)
    loss = means["loss"]
    improved = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
    if improved:
        progress.best_loss, progress.best_step, progress.evaluations_without_gain = loss, progress.step, 0
    else:
        progress.evaluations_without_gain += 1
    at = {"step": progress.step, "epoch": round(progress.step / job.schedule.steps_per_epoch, 4)}
    live.say(f"step {progress.step}: eval_loss {loss:.4f}" + (" (best so far)" if improved else ""))
    lines: list[dict[str, Any]] = [at | {f"eval_{name}": value for name, value in means.items()}]
    if job.sample:
        with session.masters.averaged(session.optimizer):
            lines.append(at | {"samples": job.sample()})
    for line in lines:
        write(line)
        live.note(line)
    if _has_stalled(progress, job.options):
        count = progress.evaluations_without_gain
        live.say(f"no improvement in {count} evaluations; the best was step {progress.best_step}")
    return improved


def _has_stalled(progress: Progress, options: Options) -> bool:
    patience = options.early_stopping_patience
    return patience is not None and progress.evaluations_without_gain >= patience


def _evaluates(job: Job, step: int) -> bool:
    return job.eval_rows is not None and _is_due(step, job.options.eval_steps, job)


def _is_due(step: int, every: int | None, job: Job) -> bool:
    return step == job.schedule.total_steps or step % (every or job.schedule.steps_per_epoch) == 0


@torch.no_grad()
def evaluate(session: Session) -> dict[str, float]:
    """Return the loss and what the objective logs, as means over the evaluation rows of all processes."""
    job = session.job
    rows, size = job.eval_rows, job.schedule.batch_size
    assert rows is not None
    job.model.eval()
    parts = [range(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]
    weights = [0.0] * len(parts)

    def compute(sums: dict[str, torch.Tensor], halvings: int) -> None:
        for number, part in enumerate(parts):
            units = [rows.unit(index) for index in part]
            weights[number] = job.objective.weight([example.target_count for unit in units for example in unit])
            for batch in place(job, units, halvings):
                with wrap.uncompiled():
                    batch_sums = oom.attempt(partial(_sums, job, batch), batch.forest.rows, batch.forest.unique_tokens)
                for name, value in _logged(batch_sums, 1.0).items():
                    sums[name] += value
            for forest in idle(units, job.options, job.processes, halvings):
                with wrap.uncompiled():
                    _sums(job, device_batch.place(forest, job.processes.device))

    totals = _all_sums(session, ["loss", *job.objective.logged], compute)
    job.model.train()
    return {name: total / sum(weights) for name, total in totals.items()}
