"""Settings of the plan: those of training, of which none has to be given, and what is asked about machines."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from byeori.config.base import Names, OptionalInt, OptionalText, Paths, Settings, check
from byeori.config.training import DpoSettings, SftSettings, TrainSettings


def _names_with_spaces(value: object) -> object:
    """`RTX 4090,H100` -> two names; also as a list."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        value = ",".join(value)
    return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value


class PlanSettings(DpoSettings):
    """byeori plan: what a run will need, on which machine, before one is paid for."""

    base_model: OptionalText = Field(  # type: ignore[assignment]
        None, description="Folder or Hub id of the base model; its config.json is enough."
    )
    data_path: Paths | None = Field(  # type: ignore[assignment]
        None, description="Rows, for their real lengths and shared prefixes; without them lengths are assumed."
    )
    output_dir: str = Field("adapter", description="Where --write says that the run puts its adapter.", min_length=1)
    objective: Literal["auto", "sft", "dpo"] = Field(
        "auto", description="What will be run; auto is dpo where a setting of dpo alone is given."
    )
    shape: Names = Field(
        [],
        description="A model by hand instead of base_model: hidden_size=4096 num_hidden_layers=32 ..., as config.json "
        "names them; model_type=llama where none is given.",
    )
    gpu: Annotated[list[str], BeforeValidator(_names_with_spaces)] = Field(
        [], description="Only these GPUs, by name, with commas between them."
    )
    assumed_rows: int = Field(10_000, description="Rows to assume without data_path.", ge=1, le=10**10)
    assumed_tokens: OptionalInt = Field(
        None, description="Tokens of an average row to assume without data_path; none is half of cutoff_len.", ge=8
    )
    machines: OptionalText = Field(None, description="Your own table of GPUs (a copy of plan/machines.yaml).")
    prices: OptionalText = Field(None, description="Your own prices, dollars an hour (a copy of plan/prices.yaml).")
    explain: bool = Field(False, description="Show where each byte of the peak comes from.")
    calibrate: bool = Field(
        False, description="Run one real step here, with random weights, and show the plan's error."
    )
    json_output: bool = Field(False, alias="json", description="Print one JSON object instead.")
    write: OptionalText = Field(None, description="Save the best settings to this file, for --config of sft or dpo.")
    skypilot: OptionalText = Field(None, description="Save a SkyPilot task for the best machine to this file.")

    model_config = ConfigDict(**{**Settings.model_config, "populate_by_name": True})

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        return self  # training's own checks are made by `training` below, for the objective that is planned

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.base_model is not None and self.shape:
            raise ValueError("base_model and shape are given together; a plan is of one model, so give one of them")
        if self.base_model is None and not self.shape:
            raise ValueError("no model is named; give --base_model, or --shape with a model's sizes")
        return self

    @property
    def planned(self) -> Literal["sft", "dpo"]:
        """sft or dpo."""
        if self.objective != "auto":
            return self.objective
        own = set(DpoSettings.model_fields) - set(TrainSettings.model_fields)
        return "dpo" if own & self.model_fields_set else "sft"

    def given(self) -> dict[str, Any]:
        """The settings of training that were given, by name."""
        kind = SftSettings if self.planned == "sft" else DpoSettings
        names = [name for name in kind.model_fields if name in self.model_fields_set]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def training(self) -> SftSettings | DpoSettings:
        """The settings of the run that is planned, with every check that training makes.

        Raises:
            ConfigError: training would refuse them.
        """
        stand_in = {"base_model": "(by hand)", "data_path": ["(assumed)"], "output_dir": self.output_dir}
        if self.planned == "sft":
            return check(SftSettings, stand_in | self.given())
        return check(DpoSettings, stand_in | self.given())
