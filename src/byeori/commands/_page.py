"""What the report of a comparison says about the run: its title, its settings, and what training took."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byeori.artifacts import layout
from byeori.artifacts.model_card import is_local_path, last_name
from byeori.config import DpoSettings, SftSettings
from byeori.data import template as templates
from byeori.data.template import Template
from byeori.evaluate.report_numbers import rows_counted
from byeori.plan import machines, prices
from byeori.support.language import tr
from byeori.support.pages import DASH
from byeori.support.text_files import redacted

_NAMED_ABOVE = ("base_model", "data_path", "output_dir", "row_kind")


def title_of(template: Template | None, rows: int) -> str:
    """Return what the page is about: the name of the template and the number of rows."""
    if template is None:
        name = tr("Chat")
    else:
        shipped = (name for name, text in templates.shipped().items() if text.strip() == template.text.strip())
        name = next(shipped, "") or tr("Own template")
    return tr("{template}: base and tuned on {rows}", template=name, rows=rows_counted(rows))


def settings_of_page(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that differ from their defaults, and the others; of local paths only the last name."""
    kind = DpoSettings if "loss" in settings else SftSettings
    fields = {field.alias or name: field for name, field in kind.model_fields.items()}
    changed: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _NAMED_ABOVE:
            continue
        field = fields.get(name)
        at_default = (
            field is not None and not field.is_required() and field.get_default(call_default_factory=True) == value
        )
        (others if at_default else changed)[name] = _shown(value)
    return changed, others


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return ", ".join(f"{name}={item}" for name, item in value.items()) or None
    if isinstance(value, str):
        return last_name(value) if is_local_path(value) else redacted(value)
    return f"{value:g}" if isinstance(value, float) else value


def run_facts(folder: Path, log: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return what training took: time, machine, tokens, speed, memory and cost, as far as the run's files tell.

    Each is what counts, and what is said beside it in small letters.
    """
    steps = [line for line in log if "loss" in line and "seconds" in line]
    if not steps:
        return {}
    last = max(int(line["step"]) for line in steps)
    whole = last / len(steps)  # a log of every tenth step has a tenth of the seconds
    seconds, tokens = (whole * sum(float(line.get(name) or 0) for line in steps) for name in ("seconds", "tokens"))
    trained = whole * sum(float(line.get("target_tokens") or 0) for line in steps)
    about = "" if whole == 1 else "~"
    plan = _plan(folder)
    count = int(plan.get("processes") or 1)
    facts = {
        tr("Training time"): (about + duration(seconds), ""),
        tr("Steps"): (f"{last:,}", tr("{count} epochs", count=f"{steps[-1].get('epoch', 0):g}")),
        tr("Tokens"): (about + short(tokens), tr("{count} trained", count=short(trained))),
        tr("Speed"): (f"{tokens / max(seconds, 1e-9):,.0f}", tr("tokens per second")),
    }
    if plan:
        peak, planned = (f"{plan[key]['peak_bytes'] / 2**30:.1f} GiB" for key in ("measured", "predicted"))
        facts[tr("Machine")] = (str(plan["device"]), f"x {count}" if count > 1 else "")
        facts[tr("Peak memory")] = (peak, tr("{size} planned", size=planned))
        facts[tr("Cost")] = _cost(plan, count, seconds / 3600)
    return facts


def _plan(folder: Path) -> dict[str, Any]:
    try:
        plan: dict[str, Any] = json.loads((folder / layout.PLAN).read_text(encoding="utf-8"))
        return plan if plan["device"] and plan["measured"]["peak_bytes"] and plan["predicted"]["peak_bytes"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _cost(plan: Mapping[str, Any], count: int, hours: float) -> tuple[str, str]:
    """Return what the time would cost at the cheapest known price of the machine, and that price."""
    table = machines.read()
    gpu = machines.of_device(table.machines, str(plan["device"]), float(plan["memory_bytes"]) / 1e9)
    known = prices.offers(table.prices, gpu.name, count) if gpu else []
    if not known:
        return DASH, tr("no price known")
    price = known[0].usd_per_gpu_hour
    return f"${price * count * hours:,.2f}", tr(
        "at ${price} an hour ({provider})", price=f"{price:,.2f}", provider=known[0].provider
    )


def duration(seconds: float) -> str:
    """Return a time as people say it: 48 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return tr("{count} s", count=round(seconds))
    minutes = round(seconds / 60)
    if minutes < 90:
        return tr("{count} min", count=minutes)
    return tr("{hours} h {minutes} min", hours=minutes // 60, minutes=minutes % 60)


def short(count: float) -> str:
    """Return a large count in three digits: 950, 12.4k, 3.1M, 2.0B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return f"{count:.0f}"
