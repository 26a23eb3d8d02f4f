"""`byeori sft` and `byeori dpo`: a training run in five steps, read from top to bottom. Settings objects stop here.

settings ── begin ──> _Run ── rows ──> _Data ── plan ──> _Plan ── model ──> Job ── train ──> TrainResult
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from byeori.artifacts import layout, saved_model, sidecar
from byeori.artifacts.starting_model import StartingModel
from byeori.batch import loader
from byeori.commands import _model, _rows, _samples
from byeori.commands._model import objective_of
from byeori.commands._planned import planned_run
from byeori.commands._reference import with_reference
from byeori.config import DpoSettings, SftSettings, TrainSettings, recorded
from byeori.data import audit, tokenized
from byeori.data.row_kinds import ROW_KINDS, RowKind, for_text
from byeori.data.tokenize import Encoding
from byeori.distributed.processes import Processes, barrier, connection_lost, first_to_speak, init_processes, shutdown
from byeori.kernels import state_layers
from byeori.losses.base import Objective
from byeori.model import forward
from byeori.plan import autotune
from byeori.support import atomic_files, console
from byeori.train import checkpoint, log, memory, mirror, output_dir, reference, run_dir, trainer
from byeori.train.state import Abandoned, Job, Progress

_ORDER_ROWS = 1_000_000  # order.json is not written for longer runs


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """output_dir holds the adapter. steps, first_loss, last_loss, best_eval_loss as in train_log.jsonl."""

    output_dir: Path
    steps: int
    first_loss: float
    last_loss: float
    best_eval_loss: float | None
    shared_tokens: float


def sft(settings: SftSettings) -> TrainResult:
    """Fine-tune a LoRA adapter on prompts and answers; see SftSettings for every setting.

    Raises:
        ByeoriError: if anything is wrong that a person can put right, in one sentence.
    """
    return train(settings)


def dpo(settings: DpoSettings) -> TrainResult:
    """Fine-tune a LoRA adapter to prefer chosen to rejected answers; see DpoSettings for every setting.

    Raises:
        ByeoriError: if anything is wrong that a person can put right, in one sentence.
    """
    return train(settings)


@console.quiet_libraries()
def train(
    settings: TrainSettings, *, objective: Objective | None = None, row_kind: RowKind | None = None
) -> TrainResult:
    """Fine-tune a LoRA adapter.

    objective: what to minimise; that of the settings by default. row_kind: the kind of row that `objective` names, if
    byeori does not have it.

    Raises:
        ByeoriError: if anything is wrong that a person can put right, in one sentence.
    """
    memory.expand_segments()
    processes = init_processes()
    gpus = [processes.device] if processes.device.type == "cuda" else []
    try:
        # a run seeds PyTorch before every step; afterwards its random state is as before
        with tempfile.TemporaryDirectory(prefix="byeori-") as folder, torch.random.fork_rng(gpus):
            run = _begin(settings, objective or objective_of(settings), row_kind, processes, Path(folder))
            data = _read_rows(run)
            plan = _plan(run, data)
            job = _load_model(run, data, plan)
            return _train(run, data, plan, job)
    except RuntimeError as error:
        if not connection_lost(error):
            raise
        if first_to_speak():
            console.say("error: another process of this run failed during start-up (killed, or out of memory?)")
        raise Abandoned("another process of this run ended") from None
    finally:
        shutdown()


# ---- 1. what is asked for, checked before rows are read -------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """sidecar: a temporary folder with everything that will stand next to the adapter. resume: a checkpoint, or None.

    say: shows a sentence, once for all processes.
    """

    settings: TrainSettings
    start: StartingModel
    objective: Objective
    row_kind: RowKind
    processes: Processes
    say: Callable[[str], None]
    output: Path
    sidecar: Path
    mirror: mirror.Mirror | None
    resume: Path | None


def _begin(
    settings: TrainSettings, objective: Objective, row_kind: RowKind | None, processes: Processes, folder: Path
) -> _Run:
    say = console.say if processes.main else (lambda text: None)
    settings, start = _rows.begin(settings)
    row_kind = row_kind or for_text(ROW_KINDS[objective.row_kind], settings.text_column)
    log.check_trackers(settings.report_to)
    output = Path(settings.output_dir)
    output_dir.check_not_the_start(output, settings.base_model)
    _model.check(settings, processes, say)
    memory.reset_peak(processes.device)
    copies = mirror.Mirror(settings.mirror_to) if settings.mirror_to else None
    wanted, overwrite = settings.resume_from_checkpoint, settings.overwrite_output_dir
    mirror.fetch_latest(copies, wanted, output, say, processes)
    resume = run_dir.claim(output, wanted, overwrite, say, processes)
    mirror.check_agreement(resume, processes)
    if resume is None and wanted is None and not overwrite:
        mirror.check_free(copies, processes)
    if resume is not None:
        run_dir.check_same_run(resume, settings.model_dump(by_alias=True), row_kind.name)
        saved_model.check_base_weights(resume, Path(start.base), start.base, option="--base_model")
    return _Run(
        settings=settings,
        start=start,
        objective=objective,
        row_kind=row_kind,
        processes=processes,
        say=say,
        output=output,
        sidecar=folder,
        mirror=copies,
        resume=resume,
    )


# ---- 2. rows, tokenized ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """content: a hash of what the training rows were tokenized to. name: what a person calls a row.

    audit: as audit.json holds it.
    """

    rows: tokenized.Rows
    held_out: tokenized.Rows | None
    content: str
    encoding: Encoding
    name: Callable[[int], str]
    audit: dict[str, Any]


def _read_rows(run: _Run) -> _Data:
    settings = run.settings
    day = run_dir.day_of(run.resume, run.processes)
    prepared, encoding = _rows.prepare(settings, run.start, row_kind=run.row_kind, processes=run.processes, day=day)
    findings = audit.sentences(prepared.audit, cutoff_len=settings.cutoff_len, policy=settings.on_bad_rows)
    for line in [*prepared.notes, *findings]:
        run.say(line)
    audit.refuse_bad_rows(prepared.audit, settings.on_bad_rows)
    with atomic_files.disk_errors(run.sidecar):
        facts = recorded(settings) | {"row_kind": run.row_kind.name}
        whole = settings.finetune == "full"
        sidecar.write_sidecar(run.sidecar, encoding, facts, run.start.tokenizer_folder(), whole=whole)
        if whole:
            _model.write_beside(run.sidecar, settings, run.start, run.processes.device)
    run.start.release_tokenizer()  # all that is needed of it is in the sidecar folder
    content = tokenized.content(prepared.train)
    if run.resume is not None:
        run_dir.check_same_rows(run.resume, content)
    held_out = prepared.held_out and tokenized.Rows(table=prepared.held_out)
    rows = tokenized.Rows(table=prepared.train)
    name = prepared.table.name
    return _Data(rows=rows, held_out=held_out, content=content, encoding=encoding, name=name, audit=prepared.audit)


# ---- 3. the steps, and what the settings leave open -----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """settings, processes: with everything that was left to the plan decided."""

    settings: TrainSettings
    processes: Processes
    schedule: loader.Schedule
    forecast: autotune.Forecast | None


def _plan(run: _Run, data: _Data) -> _Plan:
    settings = run.settings
    schedule = _rows.schedule(settings, len(data.rows), data.rows)
    if settings.max_steps is not None and schedule.total_steps < settings.max_steps:
        run.say(f"{settings.num_epochs:g} epochs are {schedule.total_steps} steps, fewer than --max_steps")
    chosen = autotune.choose(
        planned_run(settings, run.objective),
        run.start,
        data.rows,
        schedule,
        run.processes,
        run.say,
        trust_remote_code=settings.trust_remote_code is not None,
    )
    settings = settings.model_copy(update=chosen.settings)
    return _Plan(settings=settings, processes=chosen.processes, schedule=schedule, forecast=chosen.forecast)


# ---- 4. the model, and the log-probs of a reference -----------------------------------------------------------------


def _load_model(run: _Run, data: _Data, plan: _Plan) -> Job:
    """Load the model with its adapter, speed it up and check it against its own forward pass."""
    settings, processes, schedule = plan.settings, plan.processes, plan.schedule
    rows, held_out = data.rows, data.held_out
    met = reference.rows_of_first_epoch(schedule) if run.resume is None else []
    examples = (example for step in met for row in step for example in rows.unit(int(row)))
    model = _model.trained_model(settings, run.start, processes, run.say, None if run.resume else examples)
    forward.use_forest_attention(model)
    _model.speed_up(model, settings, int(rows.lengths().mean() * schedule.total_steps), processes, run.say)
    first = [rows.unit(int(i))[0] for i in loader.step_rows(schedule, 0, {})[:4]]
    apart = _model.tried(model, first, processes, run.say)
    if apart:
        run.say(f"Rows are computed one at a time, prefixes are not shared: {apart}")
    elif note := state_layers.note(model):
        run.say(note)
    options = _model.training_options(settings, schedule, processes.device, one_at_a_time=apart is not None)
    if run.objective.reference:
        rows = with_reference(
            settings, run.start, processes, run.say, model, options, rows, reference.rows_of_first_epoch(schedule)
        )
        if held_out:
            parts = reference.in_order(len(held_out), schedule.batch_size)
            held_out = with_reference(settings, run.start, processes, run.say, model, options, held_out, parts)
    sample = None
    if held_out and settings.sample_rows:
        sample = _samples.sampler(model, data.encoding, held_out, settings.sample_rows, data.name)
    return Job(
        model=model,
        sample=sample,
        train_rows=rows,
        eval_rows=held_out,
        objective=run.objective,
        schedule=schedule,
        options=options,
        processes=processes,
        output_dir=run.output,
        write_sidecar=lambda folder: shutil.copytree(run.sidecar, folder, dirs_exist_ok=True),
        settings=recorded(settings),
        resume=run.resume,
        mirror=run.mirror,
        planned_bytes=plan.forecast.peak if plan.forecast else 0,
    )


# ---- 5. training, and the finished adapter --------------------------------------------------------------------------


def _train(run: _Run, data: _Data, plan: _Plan, job: Job) -> TrainResult:
    with run_dir.exclusive(run.output) if job.processes.main else nullcontext():
        return _train_alone(run, data, plan, job)


def _train_alone(run: _Run, data: _Data, plan: _Plan, job: Job) -> TrainResult:
    if job.processes.main:
        _make_output(run, job, data)
    progress = trainer.train(job)
    kept, forecast = _keep_best(run, job, progress), plan.forecast
    peak = memory.peak_memory_bytes(job.processes.device)
    if forecast is not None:
        run.say(forecast.compared(peak))
        if job.processes.main:
            forecast.record_speed(log.read(job.output_dir), job.processes.world)
    write_weights = checkpoint.weights_writer(job.model, job.processes)
    if job.processes.main:
        _write_adapter(run, job, write_weights, data.audit, forecast, peak)
    barrier(job.processes)
    result = TrainResult(
        output_dir=run.output,
        steps=progress.step,
        first_loss=progress.first_loss,
        last_loss=progress.last_loss,
        best_eval_loss=progress.best_loss,
        shared_tokens=1 - progress.unique_tokens / max(1, progress.tokens),
    )
    run.say(_summary(result, kept, whole=run.settings.finetune == "full"))
    return result


def _keep_best(run: _Run, job: Job, progress: Progress) -> int:
    """Give the model the adapter of the best evaluation, if it is to be kept; returns the step of the adapter."""
    best = progress.best_step
    if best is None or best == progress.step or run.settings.keep == "last":
        return progress.step
    folder = job.output_dir / f"checkpoint-{best}"
    if not folder.is_dir():
        run.say(f"The best step's {folder} is not here; the weights are those of the last step")
        return progress.step
    checkpoint.load_adapter(folder, job.model)
    return best


def _make_output(run: _Run, job: Job, data: _Data) -> None:
    """Make the folder of the run, and write what is known before its first step."""
    wanted = run.settings.resume_from_checkpoint
    clear = run.settings.overwrite_output_dir and run.resume is None
    run_dir.make(run.output, clear=clear, resume=run.resume, anew=wanted is None, say=run.say)
    if run.mirror:
        run.mirror.set_others_aside(run.resume, run.say)
    sidecar.write_start(run.sidecar, run.start.base, run.start.revision, data.content, data.encoding.day)
    schedule, rows = job.schedule, job.train_rows
    if schedule.total_steps * schedule.batch_size > _ORDER_ROWS:
        return
    source = tokenized.column(rows.table, "row").to_numpy()  # one by one they take milliseconds each
    orders: dict[int, np.ndarray] = {}
    steps = (loader.step_rows(schedule, step, orders) for step in range(schedule.total_steps))
    order = [int(source[rows.starts[int(index)]]) for step in steps for index in step]
    atomic_files.write(run.output / layout.ORDER, json.dumps(order))


def _write_adapter(
    run: _Run,
    job: Job,
    write_weights: Callable[[Path], None],
    report: dict[str, Any],
    forecast: autotune.Forecast | None,
    peak: int,
) -> None:
    output = run.output
    with checkpoint.write_errors(output / "adapter"), atomic_files.files_into(output) as folder:
        write_weights(folder)
        job.write_sidecar(folder)
        sidecar.write_run_facts(folder, output, report)
        (output / layout.METRICS).unlink(missing_ok=True)  # of an earlier adapter
        if forecast is not None:
            forecast.write(folder, peak)
    if run.mirror:
        run.mirror.put_files(output, [path.name for path in output.iterdir() if path.is_file() and path.name[0] != "."])


def _summary(result: TrainResult, kept: int, *, whole: bool) -> str:
    saved = f"; shared prefixes saved {result.shared_tokens:.0%} of the tokens" if result.shared_tokens > 0.005 else ""
    best = f", best eval_loss {result.best_eval_loss:.4f}" if result.best_eval_loss is not None else ""
    losses = f"loss {result.first_loss:.4f} -> {result.last_loss:.4f}"
    of = ""
    if result.best_eval_loss is not None:
        of = f" (step {kept}, the last)" if kept == result.steps else f" (step {kept}, the best; see --keep)"
    what = "Model" if whole else "Adapter"
    return f"Done: {result.steps} steps, {losses}{best}{saved}. {what} in {result.output_dir}{of}"
