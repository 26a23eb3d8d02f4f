"""Every setting, declared once: the command line, YAML files, the Python API and docs/settings.md come from here."""
# ruff: noqa: F401

from byeori.config.base import (
    S,
    Settings,
    about,
    check,
    choices,
    in_order,
    metavar,
    parse_names,
    read_yaml,
    recorded,
    write_yaml,
)
from byeori.config.plan import PlanSettings, RentSettings
from byeori.config.results import (
    AuditSettings,
    ChatSettings,
    CompareSettings,
    DemoModelSettings,
    DemoSettings,
    DoctorSettings,
    ExportSettings,
    GenerateSettings,
    GenerationSettings,
    MergeSettings,
    PublishSettings,
    SamplingSettings,
    ServeSettings,
    StudioSettings,
)
from byeori.config.training import SPEED, DataSettings, DpoSettings, PreviewSettings, SftSettings, TrainSettings
