"""byeori plan, wired together: settings -> model, rows and machines -> rehearsals -> offers -> words and files."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import starting_model as starts
from byeori.artifacts.starting_model import StartingModel
from byeori.commands._planned import planned_run
from byeori.config import PlanSettings, TrainSettings
from byeori.errors import ConfigError, ModelError
from byeori.model import load
from byeori.plan import calibrate, candidates, machines, report, skypilot, workload
from byeori.plan.candidates import Candidate, RunConfig
from byeori.plan.machines import Machine
from byeori.plan.rehearser import Rehearser
from byeori.plan.workload import Workload
from byeori.support import atomic_files, console
from byeori.support.suggestions import nearest
from byeori.support.text_files import one_line

_CPU = torch.device("cpu")


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Say what a run will need and on which machine; returns what --json prints.

    Raises:
        ByeoriError: anything that a person can put right, in one sentence.
    """
    console.quiet_libraries()
    table = machines.read(settings.machines, settings.prices)
    machines.refuse_unknown(table.machines, settings.gpu)
    given: TrainSettings = settings.training()
    training, begun = starts.begin(given) if settings.data_path else (given, None)
    config = _config(settings, begun)
    training, notes = _cutoff(training, config, settings.base_model or "this shape")
    rehearser = Rehearser(config, planned_run(training))
    found = _machines(settings, table, rehearser)
    work, left_out = _work(settings, training, begun, rehearser)
    case = rehearser.plan_input(work, table)
    with _rarely_collecting():
        offers = candidates.offers(case, found)
    if all(offer.refused for offer in offers):
        raise ConfigError(f"{offers[0].refused}; training would not start")
    ranked = candidates.ranked(offers)
    subject = report.Subject(
        name=settings.base_model or f"a {config.model_type} model by hand",
        objective=settings.planned,
        weights=rehearser.weight_count(work.micros[0]),
        notes=(
            *notes,
            *_notes(training),
            work.assumed,
            *left_out,
            f"{work.steps:,} steps, {work.tokens:,.0f} tokens to compute",
        ),
    )
    result = report.as_json(subject, case, offers, ranked)
    shown = report.lines(subject, case, offers, ranked)
    best = ranked[0] if ranked else None
    if settings.explain:
        way, device = (best.way, best.machine.device) if best else (next(iter(offers)).way, "cuda")
        assert way is not None
        peak = rehearser.rehearse(way.micro, way.recompute, way.four_bit, device, explain=True)
        shown += ["", *report.explained(peak, way.words)]
    if settings.calibrate:
        result["calibration"] = rehearser.calibrated(work.micros[-1])
        shown += ["", calibrate.sentence(result["calibration"])]
    print(json.dumps(result, ensure_ascii=False, indent=1) if settings.json_output else "\n".join(shown))
    _write(settings, best, rehearser)
    return result


@contextmanager
def _rarely_collecting() -> Iterator[None]:
    """A rehearsal makes and frees millions of small objects; looking for cycles takes an eighth of its time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


# ---- what is planned -----------------------------------------------------------------------------------------------


def _config(settings: PlanSettings, begun: StartingModel | None) -> Any:
    """The model's config: from its folder or the Hub, of an adapter's base, or by hand."""
    if settings.base_model is None:
        return _by_hand(settings.shape)
    name, revision = settings.base_model, settings.revision
    if begun is not None:
        name, revision = begun.base, begun.revision
    elif starts.is_adapter(name):
        recorded = json.loads((load.local_folder(name) / "adapter_config.json").read_text(encoding="utf-8"))
        name, revision = recorded["base_model_name_or_path"], recorded.get("revision")
    return load.load_config(name, revision=revision, trust_remote_code=settings.trust_remote_code is not None)


def _by_hand(shape: list[str]) -> Any:
    """
    Raises:
        ConfigError: not `name=number`, no such kind of model, or sizes that do not go together.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    values: dict[str, Any] = {}
    for item in shape:
        name, equals, text = item.partition("=")
        try:
            values[name] = text if name == "model_type" else json.loads(text)
        except ValueError:
            raise ConfigError(f"--shape {item!r}: write name=number, such as hidden_size=4096") from None
        if not equals or (isinstance(values[name], int) and values[name] < 1):
            raise ConfigError(f"--shape {item!r}: write name=number, such as hidden_size=4096")
    kind = values.pop("model_type", "llama")
    if kind not in CONFIG_MAPPING:
        near = nearest(kind, list(CONFIG_MAPPING))
        raise ConfigError(
            f"--shape: transformers knows no model_type {kind}{near}; give one that it knows, or leave it out"
        )
    try:
        config = AutoConfig.for_model(kind, **values)
    except Exception as error:  # transformers checks every kind of config in its own way
        text = one_line(error, 200)
        raise ConfigError(f"--shape: no {kind} model has these sizes: {text}") from None
    if unknown := [name for name in values if name not in type(config)().to_dict()]:
        raise ConfigError(f"--shape: a {kind} config has no {', '.join(unknown)}")
    return config


def _check_shape(config: Any) -> None:
    """
    Raises:
        ModelError: sizes that cannot be, which PyTorch would find out only in the middle of a step.
    """
    text = config.get_text_config()
    hidden, heads = getattr(text, "hidden_size", None), getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None)
    if hidden and heads and hidden % heads and getattr(text, "head_dim", None) in (None, hidden // heads):
        raise ModelError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}: no such model can be")
    if heads and groups and heads % groups:
        raise ModelError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")


def _cutoff(training: TrainSettings, config: Any, name: str) -> tuple[TrainSettings, list[str]]:
    _check_shape(config)
    positions = load.positions_limit(config)
    if positions is not None and training.cutoff_len > positions and "cutoff_len" not in training.model_fields_set:
        said = f"cutoff_len is {positions}: {name} has no more positions"
        return training.model_copy(update={"cutoff_len": positions}), [said]
    starts.check_cutoff(training.cutoff_len, positions, name)
    return training, []


def _notes(training: TrainSettings) -> list[str]:
    layers = ", ".join(training.lora_target_modules)
    epochs = f"{training.num_epochs:g} epoch{'' if training.num_epochs == 1 else 's'}"
    batch = f"batch_size {training.batch_size}, {epochs}, cutoff_len {training.cutoff_len:,}"
    out = [f"LoRA of rank {training.lora_r} on {layers}; {batch}"]
    if training.dtype == "float32":
        out.append("in float32, whose speed is not predicted")
    if training.gradient_checkpointing == "offload":
        out.append("what the layers keep goes to the CPU's memory, so the GPU keeps less than is shown here")
    if training.optim != "adamw":
        out.append(f"the optimizer is counted as adamw; {training.optim} takes less")
    if training.load_in_8bit:
        out.append("the weights are counted in 16 bit; in 8 bit they take half")
    if training.compile == "on":
        out.append("compiled layers keep less than is shown here")
    if training.cpu_offload:
        out.append("cpu_offload is not counted: sharded weights go to the CPU's memory, so a GPU keeps less, and waits")
    if training.nproc is not None:
        out.append(f"nproc {training.nproc} is not counted: a plan has one process for each GPU")
    return out


def _machines(settings: PlanSettings, table: machines.Table, rehearser: Rehearser) -> list[Machine]:
    return machines.pick([*table.machines, machines.this_cpu(table, rehearser.dtype("cpu"))], settings.gpu)


def _work(
    settings: PlanSettings, training: TrainSettings, begun: StartingModel | None, rehearser: Rehearser
) -> tuple[Workload, list[str]]:
    """The steps that are planned, and in words which rows are in none of them."""
    from byeori.commands._rows import prepare, schedule
    from byeori.data.row_kinds import ROW_KINDS

    row_kind = ROW_KINDS[rehearser.run.objective.row_kind]
    size, tokens = training.micro_batch_size, rehearser.micro_batch_tokens("cuda")
    rows, left_out = None, []
    count = settings.assumed_rows
    if begun is not None:
        from byeori.data import audit, tokenized
        from byeori.distributed import processes

        alone = processes.Processes(rank=0, world=1, device=_CPU)
        prepared, _ = prepare(training, begun, row_kind=row_kind, processes=alone)
        audit.refuse_bad_rows(prepared.found, training.on_bad_rows)
        left_out = audit.left_out(prepared.found, training.on_bad_rows)
        rows = tokenized.Rows(table=prepared.train, per_row=row_kind.examples)
        count = len(rows)
    steps = schedule(training, count, rows)
    if rows is not None:
        share = training.share_prefixes != "off"
        return workload.of_rows(rows, plan=steps, world=1, size=size, tokens=tokens, share=share), left_out
    mean = settings.assumed_tokens or max(8, training.cutoff_len // 2)
    if mean > training.cutoff_len:
        raise ConfigError(f"--assumed_tokens {mean} is beyond cutoff_len {training.cutoff_len}")
    work = workload.made_up(
        cutoff_len=training.cutoff_len,
        mean=mean,
        rows=count,
        per_row=row_kind.examples,
        plan=steps,
        size=size,
        tokens=tokens,
    )
    return work, left_out


# ---- files ---------------------------------------------------------------------------------------------------------


def _write(settings: PlanSettings, best: Candidate | None, rehearser: Rehearser) -> None:
    from byeori.support.console import say

    if not settings.write and not settings.skypilot:
        return
    if best is None or best.way is None:
        raise ConfigError("no machine is enough, so there are no settings to save; plan for others with --gpu")
    chosen = _chosen(settings, best.way)
    if settings.write:
        atomic_files.write(Path(settings.write), _yaml(chosen))
        missing = [f"--{name}" for name in ("base_model", "data_path") if name not in chosen]
        add = f"; add {' and '.join(missing)}" if missing else ""
        say(f"Settings in {settings.write}: byeori {settings.planned} --config {settings.write}{add}")
    if settings.skypilot:
        if not settings.data_path or not settings.base_model:
            raise ConfigError("--skypilot needs --base_model and --data_path, which the rented machine trains")
        there, mounts = skypilot.travelling(chosen)
        size = rehearser.rehearse(best.way.micro, best.way.recompute, best.way.four_bit, "cuda").weight_count * 2
        task = skypilot.task(
            best, objective=settings.planned, settings=there, text=_yaml(there), weight_bytes=size, mounts=mounts
        )
        atomic_files.write(Path(settings.skypilot), _yaml(task))
        inside = " (inside a checkout of byeori)" if task["workdir"] == "." else ""
        say(f"Task in {settings.skypilot}: sky launch {settings.skypilot}{inside}")


def _chosen(settings: PlanSettings, way: RunConfig) -> dict[str, Any]:
    """The settings of the run: what was given stays, but for micro-batches, which a plan may make smaller."""
    given = settings.given()
    open_to = {
        name: value
        for name, value in way.settings.items()
        if name.startswith("micro_batch") or given.get(name, "auto") == "auto"
    }
    return given | open_to | {"output_dir": settings.output_dir}


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Text of several lines as it is."""

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump(values, Dumper=Dumper, allow_unicode=True, sort_keys=False)
