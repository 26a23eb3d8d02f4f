"""The jobs that train, wired together: sft and dpo, read from top to bottom. Settings objects stop here."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byeori.artifacts import base_check, layout, sidecar
from byeori.artifacts import layout as folders
from byeori.artifacts.starting_model import StartingModel, begin
from byeori.batch import loader
from byeori.commands import _model as weights
from byeori.commands._model import objective_of
from byeori.commands._planned import planned_run
from byeori.commands._rows import Prepared, prepare, schedule
from byeori.config import DpoSettings, SftSettings, TrainSettings, recorded
from byeori.data import audit, tokenized
from byeori.data.row_kinds import ROW_KINDS, RowKind
from byeori.distributed import processes as parallel
from byeori.errors import ConfigError
from byeori.kernels import dispatch
from byeori.losses.base import Objective
from byeori.model import forward, load, wrap
from byeori.plan import autotune
from byeori.support import atomic_files, cache_folder, console
from byeori.support.console import say
from byeori.train import checkpoint, log, memory, output_dir, run_dir, trainer
from byeori.train import mirror as remote
from byeori.train.reference import in_order, met, with_reference
from byeori.train.state import Abandoned, Job, Options, Run

ORDER_ROWS = 1_000_000  # order.json is not written for longer runs


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """output_dir holds the adapter. steps, first_loss, last_loss, best_eval_loss as in train_log.jsonl."""

    output_dir: Path
    steps: int
    first_loss: float
    last_loss: float
    best_eval_loss: float | None
    shared_tokens: float


# ---- sft, dpo ----------------------------------------------------------------------------------------------------


def sft(settings: SftSettings) -> TrainResult:
    """Fine-tune a LoRA adapter on prompts and answers; see SftSettings for every setting.

    Raises:
        ByeoriError: anything that a person can put right, in one sentence.
    """
    return train(settings)


def dpo(settings: DpoSettings) -> TrainResult:
    """Fine-tune a LoRA adapter to prefer chosen answers to rejected ones; see DpoSettings for every setting.

    Raises:
        ByeoriError: anything that a person can put right, in one sentence.
    """
    return train(settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Context:
    """What every part of a run asks for. tell: shows a sentence, once for all processes."""

    settings: TrainSettings
    start: StartingModel
    objective: Objective
    row_kind: RowKind
    processes: parallel.Processes
    tell: Callable[[str], None]


def train(
    settings: TrainSettings, *, objective: Objective | None = None, row_kind: RowKind | None = None
) -> TrainResult:
    """Train a LoRA adapter.

    objective: what to minimise; that of the settings by default. row_kind: the kind of row that `objective` names,
    unless byeori has it.

    Raises:
        ByeoriError: anything that a person can put right, in one sentence.
    """
    console.quiet_libraries()
    processes = parallel.start()
    tell = say if processes.main else (lambda text: None)
    try:
        with tempfile.TemporaryDirectory(prefix="byeori-") as kept:
            settings, start = begin(settings)
            log.check_trackers(settings.report_to)
            output_dir.check_not_the_start(Path(settings.output_dir), settings.base_model)
            weights.check(settings, processes, tell)
            objective = objective or objective_of(settings)
            run = _Context(
                settings=settings,
                start=start,
                objective=objective,
                row_kind=row_kind or ROW_KINDS[objective.row_kind],
                processes=processes,
                tell=tell,
            )
            memory.count_anew(processes.device)
            return _run(run, Path(kept))
    except RuntimeError as error:
        if not parallel.connection_broke(error):
            raise
        if parallel.first_to_speak():
            say("error: another process of this run ended before training began (killed, or out of memory?)")
        raise Abandoned("another process of this run ended") from None
    finally:
        parallel.finish()


def _run(context: _Context, kept: Path) -> TrainResult:
    settings, processes, output = context.settings, context.processes, Path(context.settings.output_dir)
    mirror = remote.Mirror(settings.mirror_to) if settings.mirror_to else None
    remote.before_resuming(mirror, settings.resume_from_checkpoint, output, context.tell, processes)
    resume = run_dir.claim(
        output, settings.resume_from_checkpoint, settings.overwrite_output_dir, context.tell, processes
    )
    remote.check_agreement(resume, processes)
    if resume is None and settings.resume_from_checkpoint is None and not settings.overwrite_output_dir:
        remote.check_free(mirror, processes)
    if resume is not None:
        run_dir.check_same_run(resume, settings.model_dump(by_alias=True), context.row_kind.name)
        base_check.check_weights(resume, Path(context.start.base), context.start.base, option="--base_model")
    _check_batch(settings, processes.world)
    prepared = _prepared(context, kept)
    content = tokenized.content(prepared.train)
    if resume is not None:
        run_dir.check_same_rows(resume, content)
    rows = tokenized.Rows(table=prepared.train, per_row=context.row_kind.examples)
    held_out = prepared.held_out and tokenized.Rows(table=prepared.held_out, per_row=context.row_kind.examples)
    plan = schedule(settings, len(rows), rows)
    if settings.max_steps is not None and plan.total_steps < settings.max_steps:
        context.tell(f"{settings.num_epochs:g} epochs are {plan.total_steps} steps, fewer than --max_steps")
    chosen = autotune.choose(
        planned_run(settings, context.objective),
        context.start,
        rows,
        plan,
        processes,
        context.tell,
        trust_remote_code=settings.trust_remote_code is not None,
    )
    processes, forecast = chosen.processes, chosen.forecast
    settings = settings.model_copy(update=chosen.settings)
    context = replace(context, settings=settings, processes=processes)
    model, options = _model(context, rows, plan)
    if context.objective.reference:
        rows = _with_reference(context, model, rows, met(plan), options)
        if held_out:
            parts = in_order(len(held_out), plan.batch_size)
            held_out = _with_reference(context, model, held_out, parts, options)
    job = Job(
        model=model,
        train_rows=rows,
        eval_rows=held_out,
        objective=context.objective,
        plan=plan,
        options=options,
        processes=processes,
        output_dir=output,
        beside=lambda folder: shutil.copytree(kept, folder, dirs_exist_ok=True),
        settings=settings.model_dump(),
        resume=resume,
        mirror=mirror,
        planned_bytes=forecast.peak if forecast else 0,
    )
    if processes.main:
        clear, anew = settings.overwrite_output_dir and resume is None, settings.resume_from_checkpoint is None
        run_dir.make(output, clear=clear, resume=resume, anew=anew, tell=context.tell)
        if mirror:
            mirror.only_those_behind(resume, context.tell)
        sidecar.write_start(kept, context.start.base, context.start.revision, content)
        _write_order(output, plan, rows)
    run = trainer.train(job)
    result = _finish(job, run, prepared, context, forecast)
    context.tell(_closing_words(result, output))
    return result


def _prepared(context: _Context, kept: Path) -> Prepared:
    """The rows, once their audit is shown and nothing in it stops the run; what lies beside an adapter is in `kept`."""
    settings = context.settings
    prepared, how = prepare(settings, context.start, row_kind=context.row_kind, processes=context.processes)
    findings = audit.sentences(prepared.found, cutoff_len=settings.cutoff_len, policy=settings.on_bad_rows)
    for line in [*prepared.notes, *findings]:
        context.tell(line)
    audit.refuse_bad_rows(prepared.found, settings.on_bad_rows)
    with atomic_files.disk_errors(kept):
        sidecar.write_beside(kept, how, recorded(settings) | {"row_kind": context.row_kind.name})
    context.start.let_go_of_tokenizer()  # all that is needed of it lies in `kept`
    return prepared


def _model(context: _Context, rows: tokenized.Rows, plan: loader.Schedule) -> tuple[Any, Options]:
    """The model with its adapter, checked against its own forward pass and sped up."""
    settings, processes = context.settings, context.processes
    model = weights.adapted_model(settings, context.start, processes, context.tell)
    forest_runs = forward.use_forest_attention(model)
    if not forest_runs:
        context.tell(
            "This model's layers do not use transformers' attention interface: rows are computed one at a time"
        )
    weights.speed_up(model, settings, int(rows.lengths().mean() * plan.total_steps), processes, context.tell)
    if processes.main or processes.sharded:
        first = [rows.unit(int(i))[0] for i in loader.step_rows(plan, 0, {})[:4]]
        with wrap.uncompiled():
            forward.self_check(model, first, plain=not forest_runs)
    return model, _options(settings, plan, processes.device, one_at_a_time=not forest_runs)


def _with_reference(
    context: _Context, model: Any, rows: tokenized.Rows, parts: list[np.ndarray], options: Options
) -> tokenized.Rows:
    """The rows with the reference's log-probs, from the file where an earlier run of the same content left them."""
    start, device = context.start, context.processes.device
    said = [sidecar.fingerprint(start.base, start.revision), tokenized.content(rows.table)]
    if start.adapter is not None:
        said.append(hashlib.sha256((start.adapter.folder / layout.ADAPTER).read_bytes()).hexdigest())
    packed = (options.share_prefixes, options.micro_batch_size, options.micro_batch_tokens, [*map(len, parts)])
    said += [str(next(model.parameters()).dtype), str(weights.bits(context.settings)), device.type, str(packed)]
    # what follows only rounds otherwise, but then the first step would not begin at a margin of zero
    said += [str(context.settings.speed), dispatch.sources()]
    name = hashlib.sha256("\0".join(said).encode()).hexdigest()[:32]
    began = time.perf_counter()
    with console.progress("Reference", shown=context.processes.main) as on_progress:
        found = with_reference(
            model,
            rows,
            parts,
            file=cache_folder.cache_folder() / "reference" / f"{name}.f32",
            fresh=start.adapter is None,
            options=options,
            processes=context.processes,
            on_progress=on_progress,
        )
    context.tell(f"Reference log-probs of {sum(map(len, parts))} rows in {time.perf_counter() - began:.2f} s")
    return found


def _check_batch(settings: TrainSettings, world: int) -> None:
    size = settings.micro_batch_size or 1
    if settings.batch_size % (size * world):
        raise ConfigError(
            f"batch_size {settings.batch_size} is not a multiple of micro_batch_size {size} x {world} processes; "
            f"take {size * world * max(1, settings.batch_size // (size * world))}"
        )


def _options(settings: TrainSettings, plan: loader.Schedule, device: torch.device, *, one_at_a_time: bool) -> Options:
    from byeori.train.optim import warmup_count

    same = set(Options.__dataclass_fields__) & set(type(settings).model_fields)
    values = {name: getattr(settings, name) for name in same} | {
        "warmup": warmup_count(plan.total_steps, settings.warmup_steps, settings.warmup_ratio),
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "epsilon": settings.adam_epsilon,
        "share_prefixes": settings.share_prefixes != "off" and not one_at_a_time,
        "one_at_a_time": one_at_a_time,
        "micro_batch_tokens": settings.micro_batch_tokens or load.micro_batch_tokens(settings.dtype, device),
    }
    return Options(**values)


def _write_order(output: Path, plan: loader.Schedule, rows: tokenized.Rows) -> None:
    """order.json: the source rows in the order in which the run consumes them."""
    if plan.total_steps * plan.batch_size > ORDER_ROWS:
        return
    source = tokenized.column(rows.table, "row").to_numpy()  # one by one they take milliseconds each
    orders: dict[int, np.ndarray] = {}
    steps = (loader.step_rows(plan, step, orders) for step in range(plan.total_steps))
    order = [int(source[rows.per_row * int(index)]) for step in steps for index in step]
    atomic_files.write(output / "order.json", json.dumps(order))


def _finish(
    job: Job, run: Run, prepared: Prepared, context: _Context, forecast: autotune.Forecast | None
) -> TrainResult:
    """Write the finished adapter into output_dir: of the best step with early stopping, else of the last."""
    if context.settings.early_stopping_patience and run.best_step not in (None, run.step):
        best = job.output_dir / f"checkpoint-{run.best_step}"
        if best.is_dir():
            checkpoint.load_adapter(best, job.model)
        else:
            context.tell(f"The best step's {best} is not here; the adapter is that of the last step")
    result = TrainResult(
        output_dir=job.output_dir,
        steps=run.step,
        first_loss=run.first_loss,
        last_loss=run.last_loss,
        best_eval_loss=run.best_loss,
        shared_tokens=1 - run.unique_tokens / max(1, run.tokens),
    )
    took = memory.peak_memory_bytes(job.processes.device)
    if forecast is not None:
        context.tell(forecast.compared(took))
    if job.processes.main:
        output = job.output_dir
        with checkpoint.write_errors(output / "adapter"), atomic_files.files_into(output) as folder:
            checkpoint.save_adapter(folder, job.model)
            job.beside(folder)
            sidecar.write_run_facts(folder, output, prepared.found)
            (output / folders.METRICS).unlink(missing_ok=True)  # the scores of an earlier adapter
            if forecast is not None:
                forecast.write(folder, took)
        if job.mirror:
            names = [path.name for path in job.output_dir.iterdir() if path.is_file() and path.name[0] != "."]
            job.mirror.put_files(job.output_dir, names)
    parallel.wait(job.processes)
    return result


def _closing_words(result: TrainResult, output: Path) -> str:
    saved = f"; shared prefixes saved {result.shared_tokens:.0%} of the tokens" if result.shared_tokens > 0.005 else ""
    best = f", best eval_loss {result.best_eval_loss:.4f}" if result.best_eval_loss is not None else ""
    losses = f"loss {result.first_loss:.4f} -> {result.last_loss:.4f}"
    return f"Done: {result.steps} steps, {losses}{best}{saved}. Adapter in {output}"
