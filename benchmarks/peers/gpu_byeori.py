"""byeori's own training step on random rows; `--set speed=norms,mlp` and the like change its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_common as common
import torch

from byeori.batch import loader
from byeori.commands import _model
from byeori.config import SftSettings
from byeori.data.tokenize import Example
from byeori.distributed.processes import Processes
from byeori.kernels import forest_attention, lora_linear
from byeori.losses.preference import Preference, preference
from byeori.losses.sft import SFT
from byeori.model import adapter, forward
from byeori.train import checkpoint, prefetch, trainer
from byeori.train.async_save import Checkpoints
from byeori.train.recovery import Recovery
from byeori.train.state import Job, Progress


class Rows:
    """The rows of a trainer; reference log-probs are added as they are computed."""

    def __init__(self, units: list[list[Example]]) -> None:
        self.units = units

    def __len__(self) -> int:
        return len(self.units)

    def unit(self, index: int) -> list[Example]:
        """A row's examples."""
        return self.units[index]


def units_of(rows: list[dict[str, list[int]]]) -> list[list[Example]]:
    """A row's answers as examples."""
    out = []
    for number, row in enumerate(rows):
        prompt = row["prompt"]
        answers = [part for name, part in row.items() if name != "prompt"]
        spans = [((len(prompt), len(prompt) + len(answer)),) for answer in answers]
        out.append(
            [
                Example(token_ids=prompt + answer, targets=span, row=number)
                for answer, span in zip(answers, spans, strict=True)
            ]
        )
    return out


@torch.no_grad()
def find_reference(job: Job, rows: Rows, wanted: list[int]) -> None:
    """What `byeori dpo` computes before training: the log-probs without the adapter, on the same forests."""
    units = [rows.units[index] for index in wanted]
    found: dict[int, list[float]] = {}
    with job.model.disable_adapter():
        parts = [
            (forest, forward.forest_logprobs(job.model, forest))
            for forest in prefetch.pack(units, job.options, job.processes)
        ]
    for forest, logprobs in parts:
        for row, value in zip(forest.target_owner.tolist(), logprobs.tolist(), strict=True):
            found.setdefault(forest.rows[row], []).append(value)
    for index in wanted:
        values, done = found[index], 0
        for place, example in enumerate(rows.units[index]):
            rows.units[index][place] = replace(example, reference=tuple(values[done : done + example.target_count]))
            done += example.target_count


def attention_pairs(forest: Any) -> int:
    """Queries times keys of a forest."""
    return sum(
        sum(stop - start for start, stop in keys) * (end - begin) - (end - begin) * (end - begin - 1) // 2
        for begin, end, keys in forest_attention.layout(forest).nodes
    )


# What --set accepts besides byeori's settings: attention is cuda_calls.FULL, liger=on puts the kernels of Liger in the
# place of the layers' own code.
PRIVATE = {"attention": ("cascade", "gather"), "liger": ("on", "off")}


def asked(args: Any) -> dict[str, str]:
    """What --set says."""
    found = dict(setting.split("=", 1) for setting in args.set)
    for name in found.keys() & PRIVATE.keys():
        if found[name] not in PRIVATE[name]:
            raise SystemExit(f"{name} is one of {', '.join(PRIVATE[name])}, not {found[name]}")
    return found


def settings_of(args: Any, work: common.Workload) -> SftSettings:
    """byeori's defaults, and what --set says."""
    given = {name: value for name, value in asked(args).items() if name not in PRIVATE}
    return SftSettings(
        base_model="none",
        data_path=["none"],
        output_dir="none",
        batch_size=work.rows,
        lr_scheduler="constant",
        micro_batch_tokens=work.tokens,
        **given,
    )


def in_order(units: list[list[Example]], plan: loader.Schedule) -> Rows:
    """The rows laid out so that the run's random order meets them as the other contenders do."""
    out: list[list[Example]] = [[] for _ in units]
    for unit, index in zip(units, loader.epoch_order(plan, 0).tolist(), strict=True):
        out[index] = [replace(example, row=index) for example in unit]
    return Rows(out)


def job_of(args: Any, work: common.Workload, model: Any, rows: Rows, plan: loader.Schedule) -> Job:
    """As `byeori sft` and `byeori dpo` put it together."""
    settings, processes = settings_of(args, work), here()
    return Job(
        model=model,
        train_rows=rows,  # type: ignore[arg-type]
        eval_rows=None,
        objective=preference(Preference(loss="sigmoid", beta=0.1)) if work.pairs else SFT,
        schedule=plan,
        options=_model.training_options(settings, plan, processes.device, one_at_a_time=False),
        processes=processes,
        output_dir=Path(),
        write_sidecar=lambda folder: None,
        settings={},
    )


def measure(args: Any, work: common.Workload, model: Any) -> common.Record:
    """Steps of a workload."""
    traced = args.trace and torch.cuda.is_available()
    steps = args.steps + (2 if traced else 0)
    record = common.Record(contender="byeori", workload=work.name)
    texts = common.rows_of(work, steps, model.config.vocab_size)
    units = units_of(texts)
    plan = loader.schedule(len(units), batch_size=work.rows, num_epochs=1, max_steps=None, seed=0)
    rows = in_order(units, plan)
    common.clear(model)
    job = job_of(args, work, model, rows, plan)
    parameters = [parameter for _, parameter in checkpoint.trainable(model)]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    run, orders = Progress(), {}
    recovery = Recovery(job, run, Checkpoints(job, optimizer, print), print)
    session = trainer.Session(
        job=job, progress=run, optimizer=optimizer, parameters=parameters, noise={}, recovery=recovery
    )
    needed = 0.0
    model.train()
    wanted = [loader.step_rows(job.schedule, step, orders).tolist() for step in range(steps)]
    references = []
    if job.objective.reference:
        references = [common.timed(lambda part=part: find_reference(job, rows, part))[0] for part in wanted]
    with prefetch.steps_from(job, run) as ready:
        for number in range(args.steps):
            step = next(ready)
            forests = [batch.forest for batch in step.placed]
            needed, line = common.timed(lambda step=step: trainer.train_step(session, step))
            record.seconds.append(needed + (references[number] if references else 0.0))
            part = texts[number * work.rows : (number + 1) * work.rows]
            common.count_rows(record, part, line["unique_tokens"], sum(map(attention_pairs, forests)))
            if number == 0:
                record.first = line["logps_chosen"] if work.pairs else line["loss"]
        if traced:
            record.trace = trace(lambda: trainer.train_step(session, next(ready)))
    record.peak_bytes = common.peak()
    record.note = "; ".join(args.set)
    return record


def trace(step: Any) -> dict[str, Any]:
    """A step under the profiler, after one that warms it up."""
    from torch.profiler import ProfilerActivity, profile

    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        seconds = common.timed(step)[0]
    return common.summary(found, seconds)


def adapted(args: Any, work: common.Workload) -> Any:
    """The random model with a new adapter, as fast as the settings make it."""
    base = common.model_of(args.shape, args.small)
    if asked(args).get("liger") == "on":
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(base, rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False)
    if work.bits == 4:
        try:
            from byeori.model import quantize
        except ImportError:
            raise RuntimeError("this byeori does not hold weights in 4 bit") from None
        quantize.quantize_loaded(base, 4)
    model = adapter.attach(base, r=common.RANK, alpha=16, dropout=0.0, targets=["all-linear"], seed=0)
    lora_linear.fuse(model)
    assert forward.use_forest_attention(model)
    _model.speed_up(model, settings_of(args, work), 0, here(), lambda text: None)
    return model


def here() -> Processes:
    """The only process."""
    return Processes(rank=0, world=1, device=common.device())


def main() -> None:
    """Measure and write."""
    args = common.arguments("byeori")
    if full := asked(args).get("attention"):
        from byeori.kernels import cuda_calls

        cuda_calls.FULL = full
    forest_attention.register()

    held: dict[int, Any] = {}  # one model for all workloads of as many bits

    def run(work: common.Workload) -> common.Record:
        if work.bits not in held:
            held.clear()
            common.fresh()
            held[work.bits] = adapted(args, work)
        return measure(args, work, held[work.bits])

    common.run_all("byeori", args, run)


if __name__ == "__main__":
    main()
