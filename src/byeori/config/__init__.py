"""Every setting, declared once."""

from byeori.config.base import (
    S,
    Settings,
    check,
    choices,
    in_order,
    parse_names,
    read_yaml,
    recorded,
    table,
    words,
    write_yaml,
)
from byeori.config.plan import PlanSettings
from byeori.config.results import (
    CompareSettings,
    DemoSettings,
    GenerateSettings,
    GenerationSettings,
    MergeSettings,
    PublishSettings,
)
from byeori.config.training import SPEED, DataSettings, DpoSettings, PreviewSettings, SftSettings, TrainSettings

__all__ = [
    "SPEED",
    "CompareSettings",
    "DataSettings",
    "DemoSettings",
    "DpoSettings",
    "GenerateSettings",
    "GenerationSettings",
    "MergeSettings",
    "PlanSettings",
    "PreviewSettings",
    "PublishSettings",
    "S",
    "Settings",
    "SftSettings",
    "TrainSettings",
    "check",
    "choices",
    "in_order",
    "parse_names",
    "read_yaml",
    "recorded",
    "table",
    "words",
    "write_yaml",
]
