"""Settings of what is made of an adapter: merge, generate, compare, publish, and the demo."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from byeori.config.base import Dtype, OptionalInt, OptionalText, Paths, Settings, none_from_text
from byeori.config.training import DataSettings


def _repository(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError("it is no repository; give user/name")
    return name


class MergeSettings(Settings):
    """byeori merge: write the adapter into its base."""

    peft_model_path: str = Field(description="Folder or Hub id of the adapter.", min_length=1)
    output_dir: str = Field(description="Folder for the merged model.", min_length=1)
    base_model_name_or_path: OptionalText = Field(
        None, description="Base model; without it the one that the adapter names."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the merged weights; auto keeps the base's."
    )
    verify: bool = Field(True, description="Load both models and compare their logits on prompts as they were trained.")
    overwrite_output_dir: bool = Field(False, description="Replace a model that is already in output_dir.")


class GenerationSettings(Settings):
    """How answers are made."""

    max_new_tokens: int = Field(256, description="Longest answer in tokens.", ge=1, le=1_000_000)
    temperature: float = Field(0.0, description="0 is greedy; above it answers are sampled.", ge=0, le=10)
    top_p: float = Field(1.0, description="Nucleus sampling: smallest set of tokens with this probability.", gt=0, le=1)
    top_k: int = Field(0, description="Sample among the k likeliest tokens; 0 is all.", ge=0)
    repetition_penalty: float = Field(1.0, description="Above 1 makes repeated tokens less likely.", gt=0, le=10)
    generation_batch_size: int = Field(8, description="Prompts answered at once.", ge=1, le=100_000)
    seed: int = Field(42, description="Seed of sampling and of the bootstrap.", ge=0, lt=2**32)


class GenerateSettings(GenerationSettings):
    """byeori generate: answer one prompt, or every row of a table."""

    model: str = Field(description="Folder or Hub id of an adapter or a model.", min_length=1)
    base_model: OptionalText = Field(None, description="Base model; without it the one that the adapter names.")
    dtype: Dtype = Field("auto", description="Compute type of the weights; auto is bfloat16 where it is fast.")
    template: OptionalText = Field(None, description="Template; without it the one saved beside the weights.")
    data_path: Annotated[Paths | None, BeforeValidator(none_from_text)] = Field(
        None, description="Answer every row of this table."
    )
    dataset_config: OptionalText = Field(None, description="Configuration of a Hub dataset.")
    dataset_split: str = Field("train", description="Split of a Hub dataset or a datasets folder.")
    max_rows: OptionalInt = Field(None, description="Answer only the first N rows.", ge=1)
    output: OptionalText = Field(None, description="File for the answers (.jsonl); without it standard output.")
    raw: str | None = Field(None, description="A finished prompt, used as it is; @file reads it from a file.")
    columns: dict[str, str] = Field(
        {},
        description="The value of a column of the template, under its own name: --document TEXT, or --document @file "
        "to read it from a file.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = {"raw": self.raw is not None, "data_path": bool(self.data_path), "columns": bool(self.columns)}
        names = [name for name, there in given.items() if there]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} are given together; an answer has one source, so give one of them")
        return self


class CompareSettings(GenerationSettings, DataSettings):
    """byeori compare: base and tuned answer the same rows."""

    adapter: str = Field(description="Folder or Hub id of the adapter.", min_length=1)
    output_dir: str = Field(description="Folder for report.html, rows.jsonl and metrics.json.", min_length=1)
    base_model: OptionalText = Field(None, description="Base model; without it the one that the adapter names.")
    dtype: Dtype = Field("auto", description="Compute type of the weights; auto is bfloat16 where it is fast.")
    max_new_tokens: int = Field(128, description="Longest answer in tokens.", ge=1, le=1_000_000)
    bootstrap: int = Field(2000, description="Resamples behind each 95% interval.", ge=100, le=1_000_000)
    overwrite_output_dir: bool = Field(False, description="Replace a comparison that is already in output_dir.")


class PublishSettings(Settings):
    """byeori publish: upload a finished adapter or merged model to the Hub."""

    folder: str = Field(description="Folder of a finished adapter or merged model.", min_length=1)
    repo_id: Annotated[str, AfterValidator(_repository)] = Field(description="Where it goes: user/name.")
    private: bool = Field(False, description="Create the repository as private.")
    dry_run: bool = Field(False, description="List the files and print the card; upload nothing.")
    revision: str = Field("main", description="Branch to upload to.")
    commit_message: str = Field("Upload model with byeori", description="Message of the commit on the Hub.")


class DemoSettings(Settings):
    """byeori demo: the whole job on the embedded model and the sample rows."""

    output_dir: str = Field("demo-output", description="Folder for everything that the demo makes.", min_length=1)
