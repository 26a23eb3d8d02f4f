"""byeori plan: what a run needs, on which machine, how long it takes and what it costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import records, saved_model, starting_model
from byeori.artifacts.starting_model import StartingModel
from byeori.commands._planned import planned_run
from byeori.config import PlanSettings, TrainSettings
from byeori.data.row_kinds import ROW_KINDS, RowKind, for_text
from byeori.errors import ConfigError, ModelError
from byeori.model import load, rope_scaling, skeleton
from byeori.plan import calibrate, candidates, machines, page, prices, report, workload
from byeori.plan.machines import Machine, Table
from byeori.plan.rehearser import Rehearser
from byeori.plan.report import PlanResult
from byeori.plan.workload import Workload
from byeori.support import atomic_files, collector, console
from byeori.support.console import say
from byeori.support.yaml_files import yaml_text


@console.quiet_libraries()
@collector.rare()
def plan(settings: PlanSettings) -> PlanResult | None:
    """Plan a run, print the plan, and write the files that the settings ask for.

    Returns None if only prices are to be updated, and no model is given.

    Raises:
        ByeoriError: if a setting, a file or the model is wrong.
    """
    table = _table(settings)
    if settings.base_model is None and not settings.shape:
        return None
    result, rehearser = _planned(settings, table)
    _print(settings, result, rehearser)
    if settings.write:
        atomic_files.write(Path(settings.write), yaml_text(chosen_settings(settings, result)))
        missing = [f"--{name}" for name in ("base_model", "data_path") if not getattr(settings, name)]
        add = f"; add {' and '.join(missing)}" if missing else ""
        say(f"Settings in {settings.write}: byeori {settings.planned} --config {settings.write}{add}")
    return result


def _table(settings: PlanSettings) -> Table:
    table = machines.read(settings.machines, settings.prices, settings.provider)
    machines.check_names(table, settings.gpu)
    if settings.update_prices:

        def named(name: str, gigabytes: float) -> str | None:
            machine = machines.of_device(table.machines, name, gigabytes)
            return machine.name if machine else None

        file, count = prices.update(named)
        say(f"{count} prices of today in {file}")
        table = machines.read(settings.machines, settings.prices, settings.provider)
    return table


def _planned(settings: PlanSettings, table: Table) -> tuple[PlanResult, Rehearser]:
    training: TrainSettings = settings.training()
    start = None
    if settings.data_path:
        from byeori.commands._rows import begin

        training, start = begin(training)
    training, config = _model(settings, training, start)
    training, notes = _with_cutoff(training, config, settings.base_model or "this shape")
    rehearser = Rehearser(config, planned_run(training))
    selected = _machines(settings, table, rehearser)
    device = "cuda" if any(machine.device == "cuda" for machine in selected) else "cpu"
    work, left_out = _workload(settings, training, start, rehearser, rehearser.micro_batch_tokens(device))
    with console.progress("Rehearsing", shown=console.moving()) as on_progress:
        plan_input = replace(rehearser.plan_input(work, table), spot=settings.spot)
        everywhere = candidates.all_machines(plan_input, selected, on_progress)
    if all(candidate.refused for candidate in everywhere):
        raise ConfigError(f"{everywhere[0].refused}; training would not start")
    result = PlanResult(
        model=settings.base_model or f"a {config.model_type} model by hand",
        objective=settings.planned,
        weights=rehearser.weight_count,
        about=_about(training),
        notes=(*notes, *_notes(training), *_stored(rehearser), *_old(selected), *left_out),
        workload=work,
        table=table,
        candidates=tuple(everywhere),
        ranked=tuple(candidates.ranked(everywhere, settings.order)),
        order=settings.order,
        calibration=calibrate.run(rehearser, work.micro_batches[-1]) if settings.calibrate else None,
    )
    return result, rehearser


def _machines(settings: PlanSettings, table: Table, rehearser: Rehearser) -> list[Machine]:
    """Those that are asked for; without a choice all GPUs and this machine's CPU."""
    if settings.here:
        return [machines.this_gpu(table) or machines.this_cpu(table, rehearser.dtype("cpu"))]
    selected = machines.select(table, settings.gpu)
    if not settings.gpu or any(name.lower() == "cpu" for name in settings.gpu):
        selected.append(machines.this_cpu(table, rehearser.dtype("cpu")))
    return selected


# ---- what is planned -----------------------------------------------------------------------------------------------


def _model(settings: PlanSettings, training: TrainSettings, start: StartingModel | None) -> tuple[TrainSettings, Any]:
    """The settings, with those that an adapter decides, and the config: of a folder, of the Hub, or made by hand."""
    trusted, given, name = settings.trust_remote_code is not None, settings.base_model, "this shape"
    rope = rope_scaling.of_settings(training.model_dump())
    if start is not None:  # whose folder has its positions scaled
        return training, load.load_config(start.base, revision=start.revision, trust_remote_code=trusted)
    if given is None:
        config = skeleton.config_of(settings.shape)
    elif starting_model.is_adapter(given, settings.revision):
        folder = load.local_folder(given, settings.revision)
        shape = starting_model.adapter_shape(training.model_dump(), training.model_fields_set, folder)
        training = training.model_copy(update=shape)
        recorded, rope = records.adapter_config(folder), rope_scaling.of_settings(saved_model.run_settings(folder))
        name = recorded.get("base_model_name_or_path") or ""
        if not name:
            raise ModelError(f"the adapter {given} does not name its base model; give that with --base_model")
        config = load.load_config(name, revision=recorded.get("revision"), trust_remote_code=trusted)
    else:
        name = given
        config = load.load_config(given, revision=settings.revision, trust_remote_code=trusted)
    if rope is not None:
        config = type(config).from_dict(rope_scaling.scaled(config.to_dict(), rope, name))
    return training, config


def _with_cutoff(training: TrainSettings, config: Any, name: str) -> tuple[TrainSettings, list[str]]:
    """The settings with a cutoff_len that the model can have, and a note if that is not the default."""
    skeleton.check_sizes(config)
    longest = load.positions_limit(config)
    if longest is not None and training.cutoff_len > longest and "cutoff_len" not in training.model_fields_set:
        note = f"cutoff_len is {longest}, the maximum length of {name}"
        return training.model_copy(update={"cutoff_len": longest}), [note]
    starting_model.check_cutoff(training.cutoff_len, longest, name)
    return training, []


def _workload(
    settings: PlanSettings, training: TrainSettings, start: StartingModel | None, rehearser: Rehearser, tokens: int
) -> tuple[Workload, list[str]]:
    """The steps that are planned, and sentences on the rows that are in none of them. tokens: of a micro-batch."""
    from byeori.commands._rows import schedule

    run = rehearser.run
    row_kind = for_text(ROW_KINDS[run.objective.row_kind], training.text_column)
    if start is not None:
        rows, left_out = _rows(training, start, row_kind)
        steps = schedule(training, len(rows), rows)
        size, share = run.micro_batch_size, run.share_prefixes
        return workload.of_rows(rows, schedule=steps, world=1, size=size, tokens=tokens, share=share), left_out
    mean = settings.assumed_tokens or max(8, training.cutoff_len // 2)
    if mean > training.cutoff_len:
        raise ConfigError(f"--assumed_tokens {mean} is beyond cutoff_len {training.cutoff_len}")
    work = workload.assumed(
        cutoff_len=training.cutoff_len,
        mean=mean,
        rows=settings.assumed_rows,
        per_row=row_kind.examples,
        schedule=schedule(training, settings.assumed_rows),
        size=run.micro_batch_size,
        tokens=tokens,
        share=run.share_prefixes,
        all_trained=run.all_trained,
    )
    return work, []


def _rows(training: TrainSettings, start: StartingModel, row_kind: RowKind) -> tuple[Any, list[str]]:
    """The tokenized rows of the run, and sentences on those that are left out."""
    from byeori.commands._rows import prepare
    from byeori.data import audit, tokenized
    from byeori.distributed import processes

    alone = processes.Processes(rank=0, world=1, device=torch.device("cpu"))
    prepared, _ = prepare(training, start, row_kind=row_kind, processes=alone)
    audit.refuse_bad_rows(prepared.audit, training.on_bad_rows)
    rows = tokenized.Rows(table=prepared.train)
    return rows, audit.left_out(prepared.audit, training.on_bad_rows)


def _about(training: TrainSettings) -> str:
    layers = ", ".join(training.lora_target_modules)
    epochs = f"{training.num_epochs:g} epoch{'' if training.num_epochs == 1 else 's'}"
    batch = f"batch_size {training.batch_size}, {epochs}, cutoff_len {training.cutoff_len:,}"
    if training.finetune == "full":
        trained = f"layers {training.train_layers}" if training.train_layers else "all weights"
        return f"full fine-tuning of {trained} ({training.master_weights} master weights, {training.optim}); {batch}"
    kind = "DoRA" if training.use_dora else "rsLoRA" if training.use_rslora else "LoRA"
    start = "" if training.lora_init == "default" else f" ({training.lora_init})"
    return f"{kind}{start} of rank {training.lora_r} on {layers}; {batch}"


def _stored(rehearser: Rehearser) -> list[str]:
    if rehearser.stored is None:
        return []
    method, bits = rehearser.stored
    if bits < 16:
        return [f"the weights are stored quantized ({method}) and counted in {bits} bit, opened layer by layer"]
    held = f", then held in {rehearser.run.bits} bit" if rehearser.run.bits else ""
    return [f"the weights are stored quantized ({method}); a run opens them to 16 bit when it loads them{held}"]


def _old(selected: list[Machine]) -> list[str]:
    names = ", ".join(machine.name for machine in selected if machine.capability < machines.OLDEST)
    advice = "PyTorch's wheels since 2.11 have no code for it; install one built for CUDA 12.6"
    return [f"{names}: {advice}"] if names else []


def _notes(training: TrainSettings) -> list[str]:
    notes = []
    if training.dtype == "float32":
        notes.append("float32: no speed is predicted")
    if training.optim.startswith("paged"):
        notes.append("paged optimizer states count as GPU memory; they move to the CPU's memory if the GPU runs out")
    if training.compile == "on":
        notes.append("compiled layers need less memory than is shown here")
    if training.nproc is not None:
        notes.append(f"nproc {training.nproc} is not counted: a plan has one process for each GPU")
    return notes


# ---- what is shown and written -------------------------------------------------------------------------------------


def _print(settings: PlanSettings, result: PlanResult, rehearser: Rehearser) -> None:
    if settings.html:
        atomic_files.write(Path(settings.html), page.render(result))
        say(f"Picture in {settings.html}")
    if settings.json_output:
        print(json.dumps(result.as_json(), ensure_ascii=False, indent=1))
        return
    lines = report.lines(result, _next(settings))
    if settings.table:
        lines += ["", *report.table(result)]
    if settings.explain:
        shown = result.best or result.candidates[0]
        config, device = shown.run_config, shown.machine.kind
        assert config is not None
        peak = rehearser.rehearse(config.micro_batch, config.recompute, config.four_bit, device, explain=True)
        lines += ["", *report.by_part(shown), *report.explanation(peak, config.label)]
    if result.calibration:
        lines += ["", calibrate.sentence(result.calibration)]
    print("\n".join(lines))


def _next(settings: PlanSettings) -> str:
    """What to do with a plan."""
    more = [name for name in ("--table", "--explain", "--html FILE") if not getattr(settings, name[2:].split()[0])]
    see = f"; more with {', '.join(more)}" if more else ""
    if settings.here:
        return f"byeori {settings.planned} with the same settings{see}"
    return f"byeori rent or byeori plan --write run.yaml, with the same settings{see}"


def chosen_settings(settings: PlanSettings, result: PlanResult) -> dict[str, Any]:
    """Return the settings of the best run. What was given stays, except micro-batches, which a plan may make smaller.

    Raises:
        ConfigError: if no machine is enough.
    """
    if result.best is None:
        raise ConfigError("no machine is enough, so there are no settings to save; plan for others with --gpu")
    given = settings.given()
    chosen = {
        name: value
        for name, value in result.best.settings.items()
        if name.startswith("micro_batch") or given.get(name, "auto") == "auto"
    }
    price = result.best.price
    if price is not None and price.kind == "spot" and "save_steps" not in given:
        chosen["save_steps"] = report.save_steps(result.best, result.workload.steps)
    return given | chosen | {"output_dir": settings.output_dir}
