"""One training loop for every objective.

A step computes sums over its micro-batches and divides once, by the weight of the whole step over all processes:

    loss = sum over micro-batches and processes of objective(log-probs) / sum of target weights

so the result does not depend on the number of processes, the size of the micro-batches or the packing.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from byeori.batch import forest as forests
from byeori.batch import loader
from byeori.batch.forest import Forest
from byeori.data import cache
from byeori.data.tokenize import Example
from byeori.errors import TrainingError
from byeori.model import forward, parallel
from byeori.model.parallel import Processes
from byeori.train import checkpoint, log, memory, optim

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_BAD_STEPS = 3


class Interrupted(TrainingError):
    """The run was asked to stop; a checkpoint was written first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a run goes; the settings of the same names, resolved."""

    learning_rate: float
    lr_scheduler: str
    warmup: int
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    max_grad_norm: float
    micro_batch_size: int | None
    micro_batch_tokens: int
    share_prefixes: bool
    one_at_a_time: bool
    neftune_noise_alpha: float
    seed: int
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    save_total_limit: int | None
    early_stopping_patience: int | None
    report_to: list[str]


@dataclass(kw_only=True)
class Run:
    """What changes while a run goes on; `state()` of it is in every checkpoint."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    bad_steps: int = 0
    last_loss: float = math.nan
    first_loss: float = math.nan
    tokens: int = 0
    unique_tokens: int = 0
    orders: dict[int, np.ndarray] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """As plain JSON."""
        return {key: value for key, value in vars(self).items() if key != "orders"}

    def restore(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for key, value in state.items():
            setattr(self, key, value)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a run needs.

    beside: writes what belongs beside an adapter (tokenizer, template, settings) into a folder.
    note: shows a sentence on the terminal.
    """

    model: Any
    train_rows: Dataset
    eval_rows: Dataset | None
    objective: Objective
    plan: loader.Schedule
    options: Options
    processes: Processes
    output_dir: Path
    beside: Callable[[Path], object]
    settings: dict[str, Any]
    resume: Path | None = None


def train(job: Job) -> Run:
    """Run the loop to its end.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint. TrainingError: three steps in a row were not finite.
        CheckpointError: a checkpoint could not be read or written.
    """
    names_parameters = checkpoint.trainable(job.model)
    parameters = [parameter for _, parameter in names_parameters]
    options, run = job.options, Run()
    optimizer = optim.adamw(parameters, betas=options.betas, epsilon=options.epsilon, weight_decay=options.weight_decay)
    resumed = checkpoint.load_training_state(job.resume, job.model, optimizer) if job.resume else None
    run.restore(resumed or {})
    job.model.train()
    shown = job.processes.main
    if shown:
        checkpoint.sweep(job.output_dir)
    writer = log.RunLog(job.output_dir, after_step=run.step if resumed else None) if shown else None
    trackers = log.Trackers(options.report_to if shown else [], folder=job.output_dir, settings=job.settings)

    def write(line: dict[str, Any]) -> None:
        if writer:
            writer.write(line)
        trackers.write(line)

    with (
        _stop_signals() as stop,
        _neftune(job.model, options.neftune_noise_alpha) as noise,
        log.Live(job.plan.total_steps, start=run.step, shown=shown) as live,
    ):
        while run.step < job.plan.total_steps and not _has_stalled(run, options):
            line = train_step(job, run, optimizer, parameters, noise, live)
            live.update(line)
            if run.step % options.logging_steps == 0 or run.step == job.plan.total_steps:
                write(line)
            _after_step(job, run, optimizer, live, write, stop)
    trackers.close()
    job.model.eval()
    return run


def train_step(
    job: Job,
    run: Run,
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    noise: dict[str, float],
    live: log.Live,
) -> dict[str, Any]:
    """One optimizer step; returns its log line."""
    began, options = time.perf_counter(), job.options
    torch.manual_seed((options.seed * 1_000_003 + run.step) * 4099 + job.processes.rank)  # dropout, NEFTune
    examples = [cache.example(job.train_rows, int(i)) for i in loader.step_rows(job.plan, run.step, run.orders)]
    mine = _mine(examples, job.processes)
    weight = float(sum(example.target_count for example in examples))
    optimizer.zero_grad(set_to_none=True)
    memory.give_back(job.processes.device)
    loss, unique = 0.0, 0
    for batch in pack(mine, options):
        noise["length"] = batch.separate_tokens / len(batch.rows)
        part = _objective(job, batch) / weight
        part.backward()
        loss += part.item()
        unique += batch.unique_tokens
    parallel.add_gradients(parameters, job.processes)
    loss, unique_all = parallel.add_up([loss, float(unique)], job.processes)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()
    rate = optim.learning_rate(
        run.step,
        total=job.plan.total_steps,
        warmup=options.warmup,
        kind=options.lr_scheduler,
        peak=options.learning_rate,
    )
    if math.isfinite(loss) and math.isfinite(norm):
        _update(optimizer, parameters, rate, norm, options.max_grad_norm)
        run.bad_steps, run.last_loss = 0, loss
        run.first_loss = loss if run.step == 0 else run.first_loss
    else:
        _skip(run, [example.row for example in examples], live)
    run.step += 1
    tokens = sum(len(forests.needed(example)) for example in examples)
    run.tokens, run.unique_tokens = run.tokens + tokens, run.unique_tokens + int(unique_all)
    return {
        "step": run.step,
        "epoch": round(run.step / job.plan.steps_per_epoch, 4),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "unique_tokens": int(unique_all),
        "target_tokens": int(weight),
        "seconds": round(time.perf_counter() - began, 4),
        "peak_memory_bytes": memory.peak_memory_bytes(job.processes.device),
    }


def _mine(examples: list[Example], processes: Processes) -> list[Example]:
    costs = [len(example.token_ids) for example in examples]
    return [examples[index] for index in loader.share_of(processes.rank, processes.world, costs)]


def pack(examples: Sequence[Example], options: Options) -> Iterator[Forest]:
    """The micro-batches of one process, as forests."""
    costs = [len(forests.needed(example)) for example in examples]
    size = 1 if options.one_at_a_time else options.micro_batch_size
    for group in loader.micro_batches(costs, size=size, tokens=options.micro_batch_tokens):
        if group:
            yield forests.build([examples[index] for index in group], share=options.share_prefixes)


def _objective(job: Job, batch: Forest) -> torch.Tensor:
    logprobs = forward.forest_logprobs(job.model, batch, plain=job.options.one_at_a_time)
    return job.objective(logprobs, torch.from_numpy(batch.target_weight).to(logprobs))


def _update(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    rate: float,
    norm: float,
    limit: float,
) -> None:
    if limit and norm > limit:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(limit / (norm + 1e-6))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def _skip(run: Run, rows: list[int], live: log.Live) -> None:
    run.bad_steps += 1
    named = ", ".join(str(row + 1) for row in rows)
    live.say(f"step {run.step + 1}: the loss or its gradient is not finite; the step is skipped (rows {named})")
    if run.bad_steps == _BAD_STEPS:
        raise TrainingError(
            f"the loss was not finite in {_BAD_STEPS} steps in a row, last with rows {named}; "
            "lower --learning_rate or look at these rows; the checkpoints hold the weights from before"
        )


def _after_step(
    job: Job,
    run: Run,
    optimizer: torch.optim.Optimizer,
    live: log.Live,
    write: Callable[[dict[str, Any]], None],
    stop: threading.Event,
) -> None:
    """Evaluate, save and stop where it is time.

    The log is written before the checkpoint, so that a checkpoint is never ahead of the log.
    """
    options, last = job.options, run.step == job.plan.total_steps
    stopping = parallel.add_up([float(stop.is_set())], job.processes)[0] > 0
    finished, improved = last, False
    if job.eval_rows is not None and _due(run.step, options.eval_steps, job.plan.steps_per_epoch, last):
        loss = evaluate(job)
        improved = run.best_loss is None or loss < run.best_loss
        if improved:
            run.best_loss, run.best_step, run.evaluations_without_gain = loss, run.step, 0
        else:
            run.evaluations_without_gain += 1
        write({"step": run.step, "epoch": round(run.step / job.plan.steps_per_epoch, 4), "eval_loss": loss})
        live.say(f"step {run.step}: eval_loss {loss:.4f}" + (" (best so far)" if improved else ""))
        if _has_stalled(run, options):
            live.say(f"no improvement in {run.evaluations_without_gain} evaluations; the best was step {run.best_step}")
            finished = True
    if improved or finished or stopping or _due(run.step, options.save_steps, job.plan.steps_per_epoch, last):
        _save(job, run, optimizer)
    if stopping and not finished:
        raise Interrupted(
            f"stopped at step {run.step}; everything is in {job.output_dir / f'checkpoint-{run.step}'}; go on with the "
            "same command and --resume_from_checkpoint latest"
        )


def _has_stalled(run: Run, options: Options) -> bool:
    patience = options.early_stopping_patience
    return patience is not None and run.evaluations_without_gain >= patience


def _due(step: int, every: int | None, per_epoch: int, last: bool) -> bool:
    return last or step % (every or per_epoch) == 0


def _save(job: Job, run: Run, optimizer: torch.optim.Optimizer) -> None:
    if job.processes.main:

        def fill(folder: Path) -> None:
            checkpoint.save_training_state(folder, job.model, optimizer, run.state())
            job.beside(folder)

        checkpoint.save(job.output_dir / f"checkpoint-{run.step}", fill)
        checkpoint.prune(job.output_dir, job.options.save_total_limit, best=run.best_step, latest=run.step)
    parallel.wait(job.processes)


@torch.no_grad()
def evaluate(job: Job) -> float:
    """Mean loss per trained token over the evaluation rows, over all processes."""
    assert job.eval_rows is not None
    job.model.eval()
    total, weight = 0.0, 0.0
    for start in range(0, len(job.eval_rows), job.plan.batch_size):
        stop = min(start + job.plan.batch_size, len(job.eval_rows))
        examples = [cache.example(job.eval_rows, index) for index in range(start, stop)]
        for batch in pack(_mine(examples, job.processes), job.options):
            with parallel.uncompiled():
                total += _objective(job, batch).item()
            weight += batch.target_count
    job.model.train()
    total, weight = parallel.add_up([total, weight], job.processes)
    return total / weight


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event; the step in progress is finished first. A second Ctrl-C stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def ask(number: int, frame: Any) -> None:
        if event.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _neftune(model: Any, alpha: float) -> Iterator[dict[str, float]]:
    """NEFTune (arXiv:2310.05914): uniform noise of size alpha / sqrt(L d) on the embeddings while training.

    L, the mean length of the micro-batch's examples, is read from the yielded dict, d is the embedding's size.
    """
    state = {"length": 1.0}
    if not alpha:
        yield state
        return

    def add(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        if not model.training:
            return output
        size = alpha / math.sqrt(state["length"] * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-size, size)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield state
    finally:
        handle.remove()
