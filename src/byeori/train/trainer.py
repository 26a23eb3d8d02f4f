"""One training loop for every objective.

A step computes sums over its micro-batches and divides once, by the weight of the whole step over all processes:

    loss = sum over micro-batches and processes of objective(log-probs) / sum of target weights

so the result does not depend on the number of processes, the size of the micro-batches or the packing.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from byeori.artifacts import layout
from byeori.batch import forest as forests
from byeori.distributed import processes
from byeori.errors import TrainingError
from byeori.losses.base import Sums
from byeori.model import device_batch, forward, wrap
from byeori.model.device_batch import DeviceBatch
from byeori.support import atomic_files
from byeori.train import checkpoint, hooks, log, memory, oom, optim
from byeori.train.async_save import Writer
from byeori.train.oom import NoRoom
from byeori.train.prefetch import Step, idle, place, steps_from
from byeori.train.state import Abandoned, Again, Interrupted, Job, Options, Run

_BAD_STEPS = 3


def train(job: Job) -> Run:
    """Run the loop to its end.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint. Again: sharded rows did not fit.
        TrainingError: three steps in a row were not finite.
        CheckpointError: a checkpoint could not be read or written.
    """
    parameters = [parameter for _, parameter in checkpoint.trainable(job.model)]
    options, run = job.options, Run()
    optimizer = optim.make(
        options.optim, parameters, betas=options.betas, epsilon=options.epsilon, weight_decay=options.weight_decay
    )
    resumed = checkpoint.load_training_state(job.resume, job.model, optimizer) if job.resume else None
    run.restore(resumed or {})
    shown = job.processes.main
    noted = oom.remembered(job.output_dir) if shown else 0
    run.halvings = max(run.halvings, int(processes.add_up([noted], job.processes)[0]))
    job.model.train()
    if shown:
        atomic_files.sweep(job.output_dir)
        checkpoint.prune(job.output_dir, options.save_total_limit, best=run.best_step, latest=run.step)
    run_log = log.RunLog(job.output_dir, after_step=run.step if resumed else None) if shown else None

    def write(line: dict[str, Any]) -> None:
        if run_log:
            run_log.write(line)
        trackers.write(line)

    report_to = options.report_to if shown else []
    with (
        hooks.stop_signals() as stop,
        hooks.neftune(job.model, options.neftune_noise_alpha) as noise,
        log.Live(job.plan.total_steps, start=run.step, shown=shown) as live,
        log.Trackers(report_to, folder=job.output_dir, settings=job.settings, say=live.say) as trackers,
        Writer(live.say) as writer,
        steps_from(job, run) as steps,
    ):
        good = replace(run)  # as it was before the bad steps that may come
        while run.step < job.plan.total_steps and not _has_stalled(run, options):
            done = run.step
            good = replace(run) if run.bad_steps == 0 else good
            try:
                line = train_step(job, run, next(steps), optimizer, parameters, noise, live)
                live.update(line)
                if run.step % options.logging_steps == 0 or run.step == job.plan.total_steps or run.bad_steps:
                    write(line)
                if run.bad_steps == _BAD_STEPS:
                    _save(job, good, optimizer, writer)
                    raise TrainingError(_bad_end(line["skipped_rows"], good.step, job.output_dir))
                _after_step(job, run, optimizer, live, write, stop, writer)
            except (RuntimeError, NoRoom) as error:
                # a step fails before it changes weights; where it is done, its evaluation may not be
                _keep(job, run, optimizer, writer, error, whole=run.step == done or not _evaluates(job, run.step))
                raise
    processes.wait(job.processes)  # every process may read the checkpoints now
    job.model.eval()
    return run


def train_step(
    job: Job,
    run: Run,
    step: Step,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    noise: dict[str, float],
    live: log.Live,
) -> dict[str, Any]:
    """One optimizer step; returns its log line."""
    began, options = time.perf_counter(), job.options
    examples = [example for unit in step.units for example in unit]

    def compute(found: dict[str, torch.Tensor], halvings: int) -> None:
        torch.manual_seed((options.seed * 1_000_003 + run.step) * 4099 + job.processes.rank)  # dropout, NEFTune
        optimizer.zero_grad(set_to_none=True)
        _gradients(job, step, noise, found, halvings)

    totals = _summed(job, run, live, ["loss", "unique_tokens", *job.objective.logged], compute)
    loss, unique_tokens = totals.pop("loss"), int(totals.pop("unique_tokens"))
    processes.add_gradients(parameters, job.processes)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
    rate = optim.learning_rate(
        run.step,
        total=job.plan.total_steps,
        warmup=options.warmup,
        kind=options.lr_scheduler,
        peak=options.learning_rate,
    )
    more: dict[str, Any] = {}
    if math.isfinite(loss) and math.isfinite(norm):
        _update(optimizer, parameters, rate, norm, options.max_grad_norm)
        run.bad_steps, run.last_loss = 0, loss
        run.first_loss = loss if run.step == 0 else run.first_loss
    else:
        more["skipped_rows"] = [unit[0].row + 1 for unit in step.units]
        run.bad_steps += 1
        named = ", ".join(map(str, more["skipped_rows"]))
        live.say(f"step {run.step + 1}: the loss or its gradient is not finite; the step is skipped (rows {named})")
    if run.halvings:
        more["micro_batches_halved"] = run.halvings
    run.step += 1
    tokens = sum(len(forests.needed(example)) for example in examples)
    run.tokens, run.unique_tokens = run.tokens + tokens, run.unique_tokens + unique_tokens
    return {
        "step": run.step,
        "epoch": round(run.step / job.plan.steps_per_epoch, 4),
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


def _summed(
    job: Job,
    run: Run,
    live: log.Live,
    names: list[str],
    compute: Callable[[dict[str, torch.Tensor], int], None],
) -> dict[str, float]:
    """Numbers over all micro-batches and processes, in micro-batches that fit; `run` keeps their size."""

    def on_split(halvings: int, why: NoRoom | None) -> None:
        run.halvings = halvings
        where = f"{len(why.rows)} rows ({why.tokens} tokens) did" if why else "another process's rows did"
        live.say(
            f"step {run.step + 1}: {where} not fit in memory together; from here on micro-batches are split into "
            f"{2**halvings}, and the step is computed again with the same result"
        )

    return oom.summed(compute, names, job.processes, halvings=run.halvings, on_split=on_split)


def _gradients(job: Job, step: Step, noise: dict[str, float], found: dict[str, torch.Tensor], halvings: int) -> None:
    """Forward and backward over this process's part of a step; its part of the loss and of what is logged."""
    weight = job.objective.weight([example.target_count for unit in step.units for example in unit])
    for batch in step.batches(job, halvings):
        forest = batch.forest
        noise["length"] = forest.separate_tokens / len(forest.rows)
        there_and_back = partial(_there_and_back, job, batch, weight)
        for name, value in oom.attempt(there_and_back, forest.rows, forest.unique_tokens).items():
            found[name] += value
        found["unique_tokens"] += forest.unique_tokens
    for forest in idle(step.units, job.options, job.processes, halvings):
        (_sums(job, device_batch.place(forest, job.processes.device)).total * 0).backward()


def _there_and_back(job: Job, batch: DeviceBatch, weight: float) -> dict[str, torch.Tensor]:
    sums = _sums(job, batch)
    (sums.total / weight).backward()
    return _logged(sums, weight)


def _sums(job: Job, batch: DeviceBatch) -> Sums:
    logprobs = forward.forest_logprobs(job.model, batch, plain=job.options.one_at_a_time)
    return job.objective.sums(logprobs, batch.targets)


def _logged(sums: Sums, weight: float) -> dict[str, torch.Tensor]:
    return {name: value.detach().double() / weight for name, value in [("loss", sums.total), *sums.logged.items()]}


def _update(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    rate: float,
    norm: float,
    limit: float,
) -> None:
    if limit and norm > limit:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], limit / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _bad_end(rows: list[int], step: int, output_dir: Path) -> str:
    kept = f"{output_dir / f'checkpoint-{step}'} holds the run from before" if step else "no step was good"
    return (
        f"the loss was not finite in {_BAD_STEPS} steps in a row, last with rows {', '.join(map(str, rows))}; "
        f"lower --learning_rate or look at these rows; {kept}"
    )


def _after_step(
    job: Job,
    run: Run,
    optimizer: torch.optim.Optimizer,
    live: log.Live,
    write: Callable[[dict[str, Any]], None],
    stop: threading.Event,
    writer: Writer,
) -> None:
    """Evaluate, save and stop where it is time.

    The log is written before the checkpoint, so that a checkpoint is never ahead of the log.
    """
    options, last = job.options, run.step == job.plan.total_steps
    writer.check()
    stopping = processes.add_up([float(stop.is_set())], job.processes)[0] > 0
    finished, improved = last, False
    if _evaluates(job, run.step):
        means = evaluate(job, run, live)
        loss = means["loss"]
        improved = math.isfinite(loss) and (run.best_loss is None or loss < run.best_loss)
        if improved:
            run.best_loss, run.best_step, run.evaluations_without_gain = loss, run.step, 0
        else:
            run.evaluations_without_gain += 1
        write(
            {
                "step": run.step,
                "epoch": round(run.step / job.plan.steps_per_epoch, 4),
                **{f"eval_{name}": value for name, value in means.items()},
            }
        )
        live.say(f"step {run.step}: eval_loss {loss:.4f}" + (" (best so far)" if improved else ""))
        if _has_stalled(run, options):
            live.say(f"no improvement in {run.evaluations_without_gain} evaluations; the best was step {run.best_step}")
            finished = True
    if improved or finished or stopping or _due(run.step, options.save_steps, job.plan.steps_per_epoch, last):
        _save(job, run, optimizer, writer)
    if stopping and not finished:
        writer.wait()
        raise Interrupted(
            f"stopped at step {run.step}; everything is in {job.output_dir / f'checkpoint-{run.step}'}; go on with the "
            "same command and --resume_from_checkpoint latest"
        )


def _keep(
    job: Job, run: Run, optimizer: torch.optim.Optimizer, writer: Writer, error: RuntimeError | NoRoom, *, whole: bool
) -> None:
    """Save what a run has done that ends without memory, or without its other processes.

    whole: its last step is done, with all that follows it.
    """
    broke = isinstance(error, RuntimeError) and processes.connection_broke(error)
    if isinstance(error, NoRoom) and job.processes.sharded and not error.alone:
        _go_on_smaller(job, run, optimizer, writer, error, whole)
    if whole and (isinstance(error, NoRoom) or (broke and not checkpoint.is_there(job.output_dir, run.step))):
        _save(job, run, optimizer, writer)
    if broke:
        _abandon(job, run, writer)


def _go_on_smaller(
    job: Job, run: Run, optimizer: torch.optim.Optimizer, writer: Writer, error: NoRoom, save: bool
) -> NoReturn:
    """The others cannot leave the failed pass: this process alone keeps the run, for the next attempt."""
    if processes.first_to("go on smaller"):
        oom.remember(job.output_dir, run.halvings + 1)
        run.halvings += 1
        if save and run.step:
            _write(job, run, optimizer, writer)
        writer.wait()
    raise Again(
        f"step {run.step + save}: {len(error.rows)} rows ({error.tokens} tokens) do not fit in memory together; "
        "go on with the same command and --resume_from_checkpoint latest, which splits micro-batches in two"
    )


def _abandon(job: Job, run: Run, writer: Writer) -> NoReturn:
    """Another process is gone: finish what is being written, and let one of those that are left say so."""
    writer.wait()
    if processes.first_to_speak():
        whole = checkpoint.newest(job.output_dir)
        remedy = f"everything up to {whole.name} is in {job.output_dir}" if whole else "no checkpoint was written yet"
        print(
            f"error: another process of this run ended at step {run.step + 1} (killed, or out of memory?); {remedy}; "
            "go on with the same command and --resume_from_checkpoint latest",
            file=sys.stderr,
            flush=True,
        )
    raise Abandoned("another process of this run ended")


def _has_stalled(run: Run, options: Options) -> bool:
    patience = options.early_stopping_patience
    return patience is not None and run.evaluations_without_gain >= patience


def _evaluates(job: Job, step: int) -> bool:
    last = step == job.plan.total_steps
    return job.eval_rows is not None and _due(step, job.options.eval_steps, job.plan.steps_per_epoch, last)


def _due(step: int, every: int | None, per_epoch: int, last: bool) -> bool:
    return last or step % (every or per_epoch) == 0


def _save(job: Job, run: Run, optimizer: torch.optim.Optimizer, writer: Writer) -> None:
    """Copy the run to memory and let the writer put it on the disk."""
    if job.processes.main and run.step > 0:
        _write(job, run, optimizer, writer)


def _write(job: Job, run: Run, optimizer: torch.optim.Optimizer, writer: Writer) -> None:
    copied = checkpoint.snapshot(job.model, optimizer, run.state())
    step, best = run.step, run.best_step

    def fill(folder: Path) -> None:
        copied.write(folder)
        job.beside(folder)
        atomic_files.flush(job.output_dir / layout.LOG)

    def write() -> None:
        checkpoint.save(job.output_dir / f"checkpoint-{step}", fill)
        checkpoint.prune(job.output_dir, job.options.save_total_limit, best=best, latest=step)
        if job.mirror:
            job.mirror.put(job.output_dir / f"checkpoint-{step}")

    writer.submit(write)


@torch.no_grad()
def evaluate(job: Job, run: Run, live: log.Live) -> dict[str, float]:
    """Loss and what the objective logs, as means over the evaluation rows of all processes."""
    rows = job.eval_rows
    assert rows is not None
    job.model.eval()
    parts = [range(at, min(at + job.plan.batch_size, len(rows))) for at in range(0, len(rows), job.plan.batch_size)]

    weights = [0.0] * len(parts)

    def compute(found: dict[str, torch.Tensor], halvings: int) -> None:
        for number, part in enumerate(parts):
            units = [rows.unit(index) for index in part]
            weights[number] = job.objective.weight([example.target_count for unit in units for example in unit])
            for batch in place(job, units, halvings):
                with wrap.uncompiled():
                    sums = oom.attempt(partial(_sums, job, batch), batch.forest.rows, batch.forest.unique_tokens)
                for name, value in _logged(sums, 1.0).items():
                    found[name] += value
            for forest in idle(units, job.options, job.processes, halvings):
                with wrap.uncompiled():
                    _sums(job, device_batch.place(forest, job.processes.device))

    totals = _summed(job, run, live, ["loss", *job.objective.logged], compute)
    job.model.train()
    return {name: total / sum(weights) for name, total in totals.items()}
