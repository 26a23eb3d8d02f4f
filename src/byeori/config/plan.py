"""Settings of `byeori plan`: those of training, all optional, and which machines to plan for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, model_validator

from byeori.config.base import (
    ESSENTIAL,
    EXPERT,
    Folder,
    Model,
    Names,
    OptionalInt,
    OptionalModel,
    OptionalPath,
    OptionalText,
    Paths,
    Settings,
    check,
    setting,
)
from byeori.config.training import DpoSettings, SftSettings, TrainSettings


def _names_with_spaces(value: object) -> object:
    """`RTX 4090,H100` -> two names; also as a list."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


class PlanSettings(DpoSettings):
    """byeori plan: predict memory, time and price of a run on each GPU; no GPU needed."""

    full_rate: ClassVar[float | None] = None  # that of the training that is planned
    base_model: OptionalModel = setting(  # type: ignore[assignment]
        "Base model: a folder or a Hub id. Its config.json is enough.", None, ESSENTIAL
    )
    data_path: Paths | None = setting(  # type: ignore[assignment]
        "Rows, for their real lengths and shared prefixes. Without them lengths are assumed.", None, ESSENTIAL
    )
    output_dir: Folder = setting("Folder of the adapter in the settings that write saves.", "adapter", EXPERT)
    objective: Literal["auto", "sft", "dpo"] = setting(
        "Kind of training. auto is dpo if a setting of dpo is given.", "auto", ESSENTIAL
    )
    shape: Names = setting(
        "A model by its sizes in place of base_model, named as in config.json: hidden_size=4096 num_hidden_layers=32. "
        "model_type is llama unless given.",
        [],
        EXPERT,
    )
    gpu: Annotated[list[str], BeforeValidator(_names_with_spaces)] = setting(
        "Plan for these GPUs only. Separate names by commas.", [], ESSENTIAL
    )
    assumed_rows: int = setting("Number of rows to assume without data_path.", 10_000, EXPERT, ge=1, le=10**10)
    assumed_tokens: OptionalInt = setting(
        "Mean tokens per row to assume without data_path. none is half of cutoff_len.", None, EXPERT, ge=8
    )
    order: Literal["cheapest", "fastest", "smallest"] = setting(
        "Which machine is best: by cost, time or memory.", "cheapest", ESSENTIAL, alias="for"
    )
    here: bool = setting("Plan for this machine only.", False, ESSENTIAL)
    provider: OptionalText = setting("Count only prices of this provider (runpod, vast, ...).", None, ESSENTIAL)
    spot: bool = setting("Count spot prices: cheaper machines that may be taken away.", False, EXPERT)
    prices: OptionalPath = setting(
        "Your own prices: a table like plan/prices.csv, or YAML lines like H100: 2.5.", None, ESSENTIAL
    )
    update_prices: bool = setting("First read today's prices from gpuhunt, for this and later plans.", False, EXPERT)
    machines: OptionalPath = setting("Your own table of GPUs, a copy of plan/machines.yaml.", None, EXPERT)
    table: bool = setting("Print one line for every GPU.", False, ESSENTIAL)
    explain: bool = setting("Show what the peak memory consists of.", False, ESSENTIAL)
    html: OptionalPath = setting("Also draw cost against time in this HTML file.", None, ESSENTIAL)
    calibrate: bool = setting(
        "Run one real step with random weights on this machine, show the error of the plan, and keep the measured "
        "speed for later plans.",
        False,
        EXPERT,
    )
    json_output: bool = setting("Print JSON.", False, ESSENTIAL, alias="json")
    write: OptionalPath = setting("Save the best settings to this file, for --config of sft or dpo.", None, ESSENTIAL)

    model_config = ConfigDict(**{**Settings.model_config, "populate_by_name": True})

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        return self  # `training` below makes the checks of the objective that is planned

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.base_model is not None and self.shape:
            raise ValueError("base_model and shape exclude each other; give one of them")
        if self.base_model is None and not self.shape and not self.update_prices:
            raise ValueError("no model is given; give --base_model, or --shape with the sizes of a model")
        if self.here and self.gpu:
            raise ValueError("here and gpu exclude each other; give one of them")
        return self

    @property
    def planned(self) -> Literal["sft", "dpo"]:
        """Return the kind of training that is planned."""
        if self.objective != "auto":
            return self.objective
        own = set(DpoSettings.model_fields) - set(TrainSettings.model_fields)
        return "dpo" if own & self.model_fields_set else "sft"

    def given(self) -> dict[str, Any]:
        """Return the settings of training that were given, by name."""
        kind = SftSettings if self.planned == "sft" else DpoSettings
        names = [name for name in kind.model_fields if name in self.model_fields_set]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def training(self) -> SftSettings | DpoSettings:
        """Return the settings of the planned run, checked as training checks them.

        Raises:
            ConfigError: if training would refuse them.
        """
        stand_in = {"base_model": "(by hand)", "data_path": ["(assumed)"], "output_dir": self.output_dir}
        if self.planned == "sft":
            return check(SftSettings, stand_in | self.given())
        return check(DpoSettings, stand_in | self.given())


class RentSettings(PlanSettings):
    """byeori rent: plan, and write the files that rent the best machine (SkyPilot, dstack, RunPod)."""

    base_model: Model = setting("Base model: a folder or a Hub id.", ..., ESSENTIAL)
    data_path: Paths = setting("Rows: files, folders, Hub datasets or URLs.", ..., ESSENTIAL)
    rent_dir: Folder = setting("Folder for the files that rent a machine.", "rent", ESSENTIAL)

    inputs: ClassVar[tuple[str, ...]] = ("base_model", "data_path")
