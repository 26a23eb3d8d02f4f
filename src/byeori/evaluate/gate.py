"""Conditions that a comparison must meet: `--fail-unless 'chrf.low > 0'` -> pass, or exit code 3 and one sentence.

    condition   NAME.PART OPERATOR NUMBER     chrf.low > 0 · retention.loss.high < 0.05 · label.tuned >= 90
    NAME        a measure; retention.NAME; lead.BASELINE.NAME, what the tuned model has over a baseline; RUN.NAME
    PART        low, mean, high: of tuned - base with its 95% interval; base, tuned: the means of the models
    also        doubts == 0: reasons why a gain may say nothing about the task; rows >= 40

Nothing of a condition is executed: names are looked up in metrics.json.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from byeori.errors import ConfigError, GateError
from byeori.support.suggestions import nearest

PARTS = ("low", "mean", "high", "base", "tuned")
COUNTS = ("rows", "doubts")
RETENTION = "retention."

_LEAD = re.compile(r"((?:[^:]+\.)?)lead\.([^.]+)\.(.+)")  # `contains:TEXT` may hold anything
_CONDITION = re.compile(r"\s*(.+?)\s*(>=|<=|==|!=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """text: as it was given. name: with its prefix, without its part; part: "" for a count."""

    text: str
    name: str
    part: str
    operator: str
    bound: float


def parse(texts: Sequence[str], names: Sequence[str], baselines: Sequence[str] = ()) -> list[Condition]:
    """Return the conditions. names: measures that will be there, those of retention as `retention.NAME`.

    baselines: names of those that may be there.

    Raises:
        ConfigError: if one cannot be read, or names something else.
    """
    return [_parse(text, names, baselines) for text in texts]


def _parse(text: str, names: Sequence[str], baselines: Sequence[str]) -> Condition:
    flag = f"--fail-unless {text!r}"
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConfigError(f"{flag} is no condition; write one such as 'chrf.low > 0' (<, <=, >, >=, == or != a number)")
    path, sign, bound = match.groups()
    if path in COUNTS:
        return Condition(text=text, name=path, part="", operator=sign, bound=float(bound))
    name, _, part = path.rpartition(".")
    rival, bare = _lead(name)
    if rival and rival not in baselines:
        raise ConfigError(f"{flag}: there is no baseline {rival!r}{nearest(rival, list(baselines))}")
    if path in names or part not in PARTS:
        name = path if path in names else name or path
        parts = ", ".join(f"{name}.{known}" for known in PARTS) if name in names else ""
        near = nearest(part, PARTS) if name in names else nearest(path, [*names, *COUNTS])
        advice = f"give one of {parts}" if parts else f"the measures are {', '.join(names)}"
        raise ConfigError(f"{flag}: {path!r} is not a number of the comparison{near}; {advice}")
    if bare not in names:
        if RETENTION in bare and not any(RETENTION in known for known in names):
            raise ConfigError(f"{flag}: it is about general rows; give byeori compare --retention FILE")
        raise ConfigError(f"{flag}: there is no measure {bare!r}{nearest(bare, names)}; they are {', '.join(names)}")
    if rival and part not in PARTS[:3]:
        raise ConfigError(f"{flag}: of a lead there are low, mean and high, and no {part!r}")
    return Condition(text=text, name=name, part=part, operator=sign, bound=float(bound))


def check(conditions: Sequence[Condition], metrics: Mapping[str, Any]) -> None:
    """Raise unless the numbers of a comparison meet every condition.

    Raises:
        GateError: naming each condition that is not met, with the number.
    """
    failed = []
    for condition in conditions:
        value = value_of(condition, metrics)
        if value is None:
            failed.append(f"{condition.text} (not measured)")
        elif not _OPERATORS[condition.operator](value, condition.bound):
            failed.append(f"{condition.text} (the number is {_shown(value)})")
    if failed:
        raise GateError(f"the comparison does not meet --fail-unless: {'; '.join(failed)}")


def value_of(condition: Condition, metrics: Mapping[str, Any]) -> float | None:
    """Return the number that a condition is about, None if it was not measured."""
    if condition.name == "doubts":
        return float(sum(finding["undermines"] for finding in metrics.get("findings") or ()))
    if condition.name == "rows":
        return float(metrics["rows"])
    name, source = condition.name, metrics
    if name.startswith(RETENTION):
        name, source = name.removeprefix(RETENTION), metrics.get("retention") or {}
    rival, name = _lead(name)
    if rival:
        found: Mapping[str, Any] = next(
            (item for item in metrics.get("baselines") or () if item["name"] == rival), {"lead": {}}
        )
        source = {"difference": found["lead"]}
    table: Mapping[str, Any] = source.get(condition.part if condition.part in ("base", "tuned") else "difference") or {}
    value = table.get(name)
    if condition.part not in ("base", "tuned"):
        value = (value or {}).get(condition.part)
    return None if value is None or not math.isfinite(value) else float(value)


def _lead(name: str) -> tuple[str, str]:
    """Return the baseline over which a lead is meant, "" for none, and the measure; a run's name may stand before."""
    match = _LEAD.fullmatch(name)
    return (match[2], match[1] + match[3]) if match else ("", name)


def _shown(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
