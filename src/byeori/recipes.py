"""The jobs, wired together: read each from top to bottom. Settings objects stop here."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from byeori.answers import CompareResult, check_columns, check_cutoff, compare, generate, load_table, say
from byeori.batch import loader
from byeori.config import (
    MergeSettings,
    PreviewSettings,
    PublishSettings,
    SftSettings,
)
from byeori.data import audit, cache, sources, template, tokenize
from byeori.data.template import Template
from byeori.data.tokenize import Encoding
from byeori.errors import ConfigError
from byeori.model import embedded, forward, load, lora, norm, parallel
from byeori.objective.sft import sft_sum
from byeori.result import folder as folders
from byeori.result import merge as merging
from byeori.result import preview as previews
from byeori.result import publish as publishing
from byeori.train import checkpoint, log, trainer

if TYPE_CHECKING:
    from datasets import Dataset

# what the matrix units need to be busy, and what a small machine's memory bears
_MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
BAR_ROWS = 20_000  # fewer rows are tokenized in a moment, and need no bar in a log file
ORDER_ROWS = 1_000_000  # order.json is not written for longer runs


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Rows ready to train: tokenized tables of usable rows, and the audit."""

    train: Dataset
    held_out: Dataset | None
    found: dict[str, Any]
    notes: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SftResult:
    """output_dir holds the adapter. steps, first_loss, last_loss, best_eval_loss as in train_log.jsonl."""

    output_dir: Path
    steps: int
    first_loss: float
    last_loss: float
    best_eval_loss: float | None
    shared_tokens: float


# ---- sft ---------------------------------------------------------------------------------------------------------


def sft(settings: SftSettings) -> SftResult:
    """Fine-tune a LoRA adapter on prompts and answers; see SftSettings for every setting.

    Raises:
        ByeoriError: anything that a person can put right, in one sentence.
    """
    log.quiet_libraries()
    processes = parallel.start()
    tell = say if processes.main else (lambda text: None)
    try:
        with tempfile.TemporaryDirectory(prefix="byeori-") as kept:
            return _sft(settings, processes, tell, Path(kept))
    finally:
        parallel.finish()


def _sft(settings: SftSettings, processes: parallel.Processes, tell: Any, kept: Path) -> SftResult:
    output = Path(settings.output_dir)
    resume = folders.claim(output, settings.resume_from_checkpoint, settings.overwrite_output_dir, tell, processes)
    if resume is not None:
        folders.check_same_run(resume, settings)
    _check_batch(settings, processes.world)
    prepared, how = prepare(settings, val_set_size=settings.val_set_size, seed=settings.seed, processes=processes)
    for line in [*prepared.notes, *audit.sentences(prepared.found, cutoff_len=settings.cutoff_len)]:
        tell(line)
    audit.refuse_bad_rows(prepared.found, settings.on_bad_rows)
    with checkpoint.write_errors(kept):
        folders.write_beside(kept, how, settings)
    del how  # a tokenizer of 262,144 words takes 0.6 GB; all that is needed of it now lies in `kept`

    plan = loader.schedule(
        len(prepared.train),
        batch_size=settings.batch_size,
        num_epochs=settings.num_epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
        lengths=cache.lengths(prepared.train) if settings.group_by_length else None,
    )
    model = _adapted_model(settings, processes, tell)
    forest_runs = forward.use_forest_attention(model)
    if not forest_runs:
        tell("This model's layers do not use transformers' attention interface: rows are computed one at a time")
    if processes.main:
        first = [cache.example(prepared.train, int(i)) for i in loader.step_rows(plan, 0, {})[:4]]
        forward.self_check(model, first, plain=not forest_runs)
    _speed_up(model, settings, int(cache.lengths(prepared.train).mean() * plan.total_steps), processes, tell)
    job = trainer.Job(
        model=model,
        train_rows=prepared.train,
        eval_rows=prepared.held_out,
        objective=sft_sum,
        plan=plan,
        options=_options(settings, plan, processes.device, one_at_a_time=not forest_runs),
        processes=processes,
        output_dir=output,
        beside=lambda folder: shutil.copytree(kept, folder, dirs_exist_ok=True),
        settings=settings.model_dump(),
        resume=resume,
    )
    if processes.main:
        folders.make(output, clear=settings.overwrite_output_dir and resume is None)
        _write_order(output, plan, prepared.train)
    run = trainer.train(job)
    result = _finish_sft(job, run, prepared, settings)
    tell(_closing_words(result, output))
    return result


def _adapted_model(settings: SftSettings, processes: parallel.Processes, tell: Any) -> Any:
    """The base model with a new adapter on it."""
    dtype = load.resolve_dtype(settings.dtype, processes.device)
    tell(f"Loading {settings.base_model} in {str(dtype).removeprefix('torch.')} on {processes.device}")
    base = load.load_model(
        settings.base_model,
        dtype=dtype,
        device=processes.device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code is not None,
    )
    model = lora.attach(
        base,
        r=settings.lora_r,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        targets=settings.lora_target_modules,
        seed=settings.seed,
    )
    lora.fuse(model)
    return model


def _speed_up(model: Any, settings: SftSettings, row_tokens: int, processes: parallel.Processes, tell: Any) -> None:
    """Recompute, then compile or else fuse, as the settings say.

    row_tokens: tokens of the whole run, for a batch of one row.
    """
    base = model.get_base_model()
    if settings.gradient_checkpointing:
        parallel.recompute_layers(base)
    tokens = row_tokens * settings.batch_size // processes.world
    pays = settings.compile == "auto" and parallel.compiling_pays(base, tokens, processes.device)
    if settings.compile == "on" or pays:
        tell(f"Compiling {parallel.compile_layers(base)} layers: the first steps take about half a minute longer")
    else:
        norm.fuse_norms(base)


def _check_batch(settings: SftSettings, world: int) -> None:
    size = settings.micro_batch_size or 1
    if settings.batch_size % (size * world):
        raise ConfigError(
            f"batch_size {settings.batch_size} is not a multiple of micro_batch_size {size} x {world} processes; "
            f"take {size * world * max(1, settings.batch_size // (size * world))}"
        )


def _options(
    settings: SftSettings, plan: loader.Schedule, device: torch.device, *, one_at_a_time: bool
) -> trainer.Options:
    from byeori.train.optim import warmup_count

    same = set(trainer.Options.__dataclass_fields__) & set(type(settings).model_fields)
    values = {name: getattr(settings, name) for name in same} | {
        "warmup": warmup_count(plan.total_steps, settings.warmup_steps, settings.warmup_ratio),
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "epsilon": settings.adam_epsilon,
        "share_prefixes": settings.share_prefixes != "off" and not one_at_a_time,
        "one_at_a_time": one_at_a_time,
        "micro_batch_tokens": settings.micro_batch_tokens or _MICRO_BATCH_TOKENS[device.type],
    }
    return trainer.Options(**values)


def _write_order(output: Path, plan: loader.Schedule, rows: Dataset) -> None:
    """order.json: the source rows in the order in which the run consumes them."""
    if plan.total_steps * plan.batch_size > ORDER_ROWS:
        return
    source, orders = rows["row"], {}  # type: ignore[var-annotated]
    order = [int(source[int(i)]) for step in range(plan.total_steps) for i in loader.step_rows(plan, step, orders)]
    (output / "order.json").write_text(json.dumps(order), encoding="utf-8")


def _finish_sft(job: trainer.Job, run: trainer.Run, prepared: Prepared, settings: SftSettings) -> SftResult:
    """Write the finished adapter into output_dir: of the best step with early stopping, else of the last."""
    if settings.early_stopping_patience and run.best_step not in (None, run.step):
        checkpoint.load_adapter(job.output_dir / f"checkpoint-{run.best_step}", job.model)
    result = SftResult(
        output_dir=job.output_dir,
        steps=run.step,
        first_loss=run.first_loss,
        last_loss=run.last_loss,
        best_eval_loss=run.best_loss,
        shared_tokens=1 - run.unique_tokens / max(1, run.tokens),
    )
    if job.processes.main:

        def fill(folder: Path) -> None:
            checkpoint.save_adapter(folder, job.model)
            job.beside(folder)
            folders.write_run_facts(folder, job.output_dir, prepared.found, settings)

        checkpoint.move_in(job.output_dir, fill)
    parallel.wait(job.processes)
    return result


def _closing_words(result: SftResult, output: Path) -> str:
    saved = f"; shared prefixes saved {result.shared_tokens:.0%} of the tokens" if result.shared_tokens > 0.005 else ""
    best = f", best eval_loss {result.best_eval_loss:.4f}" if result.best_eval_loss is not None else ""
    losses = f"loss {result.first_loss:.4f} -> {result.last_loss:.4f}"
    return f"Done: {result.steps} steps, {losses}{best}{saved}. Adapter in {output}"


# ---- rows --------------------------------------------------------------------------------------------------------


def prepare(
    settings: SftSettings | PreviewSettings, *, val_set_size: float, seed: int, processes: parallel.Processes
) -> tuple[Prepared, Encoding]:
    """Rows -> tokenized tables, their audit and how they were made; no weights are loaded."""
    trusted = settings.trust_remote_code is not None
    if processes.main is False:
        parallel.wait(processes)  # the first process fills the cache, the others read it
    config = load.load_config(settings.base_model, revision=settings.revision, trust_remote_code=trusted)
    tokenizer, notes = load.load_tokenizer(settings.base_model, revision=settings.revision, trust_remote_code=trusted)
    check_cutoff(settings.cutoff_len, load.positions_limit(config), settings.base_model)
    rows = load_table(settings)
    chosen, note = _template(settings.template, rows.column_names)
    how = tokenize.encoding(
        tokenizer,
        chosen,
        cutoff_len=settings.cutoff_len,
        add_eos_token=settings.add_eos_token,
        train_on_inputs=settings.train_on_inputs,
    )
    train_rows, held_out_rows = sources.split_rows(rows, val_set_size, seed)
    shown = processes.main and (log.moving() or len(rows) > BAR_ROWS)
    train = cache.encode_table(train_rows, how, progress=shown)
    held_out = cache.encode_table(held_out_rows, how, progress=shown) if held_out_rows else None

    def name(row: int) -> str:
        return sources.row_name(settings.data_path, row)

    found = audit.audit(train, held_out, name)
    train, held_out = cache.usable(train), cache.usable(held_out) if held_out is not None else None
    if len(train):
        sample = [cache.example(train, index) for index in range(min(len(train), 1000))]
        found["shared_prefix"] = round(previews.shared_prefix(sample), 4)
    found["template"] = chosen.name if chosen else template.CHAT
    if processes.main:
        parallel.wait(processes)
    return Prepared(train=train, held_out=held_out, found=found, notes=[*notes, note]), how


def _template(spec: str | None, columns: list[str]) -> tuple[Template | None, str]:
    """The template for rows with these columns, and a sentence that names it."""
    chosen = template.resolve(spec or template.choose(columns))
    check_columns(chosen, columns, with_answer=True)
    trained = f"trains the column {chosen.answer_column!r}" if chosen else "trains every assistant turn"
    return chosen, f"Template {chosen.name if chosen else template.CHAT}: {trained}"


def preview(settings: PreviewSettings) -> dict[str, Any]:
    """Show what the model will see, before any weights are loaded; returns the audit."""
    log.quiet_libraries()
    alone = parallel.start()
    prepared, how = prepare(settings, val_set_size=settings.val_set_size, seed=settings.seed, processes=alone)
    shown = [cache.example(prepared.train, index) for index in range(min(settings.rows, len(prepared.train)))]
    names = [sources.row_name(settings.data_path, example.row) for example in shown]
    pieces = [previews.pieces(example, how.tokenizer) for example in shown]
    words = [*prepared.notes, *audit.sentences(prepared.found, cutoff_len=settings.cutoff_len)]
    if settings.html:
        page = previews.page(list(zip(names, pieces, strict=True)), words, prepared.found)
        folders.write(Path(settings.html), page)
        say(f"Preview in {settings.html}")
    if settings.json_output:
        print(json.dumps(prepared.found, ensure_ascii=False, indent=1))
    else:
        previews.show(list(zip(names, pieces, strict=True)), words, prepared.found)
    return prepared.found


# ---- merge, publish ---------------------------------------------------------------------------


def merge(settings: MergeSettings) -> Any:
    """Write an adapter into its base; returns what merge_report.json holds."""
    log.quiet_libraries()
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Merging", total=None)

        def on_progress(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total)

        result = merging.merge(
            adapter=Path(settings.peft_model_path),
            base=settings.base_model_name_or_path,
            output_dir=Path(settings.output_dir),
            dtype=settings.dtype,
            verify=settings.verify,
            overwrite=settings.overwrite_output_dir,
            on_progress=on_progress,
        )
    say(f"Merged model in {settings.output_dir}")
    return result


def publish(settings: PublishSettings) -> Any:
    """Upload a finished adapter or merged model to the Hub."""
    return publishing.publish(
        folder=Path(settings.folder),
        repo_id=settings.repo_id,
        private=settings.private,
        dry_run=settings.dry_run,
        revision=settings.revision,
        commit_message=settings.commit_message,
        on_line=print,
    )


def demo_model() -> Path:
    """The folder of the embedded model."""
    log.quiet_libraries()
    return embedded.embedded_model(say)


__all__ = [
    "CompareResult",
    "Prepared",
    "SftResult",
    "compare",
    "demo_model",
    "generate",
    "merge",
    "prepare",
    "preview",
    "publish",
    "sft",
]
