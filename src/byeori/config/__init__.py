"""Every setting, declared once: the command line, YAML files, the Python API and docs/settings.md come from here."""

from byeori.config.base import (
    S,
    Settings,
    check,
    choices,
    extra,
    in_order,
    parse_names,
    read_yaml,
    recorded,
    setting,
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
    "extra",
    "in_order",
    "parse_names",
    "read_yaml",
    "recorded",
    "setting",
    "write_yaml",
]
