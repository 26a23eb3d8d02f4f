"""Every setting, declared once: its type, default, bounds and help text.

The command line, the YAML file, the Python API and the table in the README are all made from these classes.
Values from a command line or a YAML file arrive as text and are converted here; lists are taken with or without
quotes and brackets, also when the shell has split them (`[q_proj, v_proj]` and `["q_proj", "v_proj"]` are equal).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from byeori.errors import ConfigError


def parse_names(value: object) -> object:
    """`"[a, 'b' c]"` or `["[a,", "'b'", "c]"]` -> `["a", "b", "c"]`; other values are left to pydantic."""
    if isinstance(value, str):
        return [name for name in re.split(r"[\s,\[\]\"']+", value) if name]
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return parse_names(" ".join(value))
    return value


def _none_from_text(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in {"none", "null", ""} else value


def _paths(value: object) -> object:
    return [str(value)] if isinstance(value, (str, Path)) else value


Names = Annotated[list[str], BeforeValidator(parse_names)]
Paths = Annotated[list[str], BeforeValidator(_paths)]
OptionalInt = Annotated[int | None, BeforeValidator(_none_from_text)]
OptionalText = Annotated[str | None, BeforeValidator(_none_from_text)]

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class Settings(BaseModel):
    """Base of all settings: unknown names are refused, values cannot change once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _paths_are_text(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            name: [str(item) if isinstance(item, PurePath) else item for item in value]
            if isinstance(value, (list, tuple))
            else str(value)
            if isinstance(value, PurePath)
            else value
            for name, value in values.items()
        }


class ModelSettings(Settings):
    """Which weights, and how they are held."""

    base_model: str = Field(description="Folder or Hub id of the base model.", min_length=1)
    revision: OptionalText = Field(None, description="Branch, tag or commit of the base model on the Hub.")
    dtype: Dtype = Field("auto", description="Compute type of the weights; auto is bfloat16 where it is fast.")
    trust_remote_code: OptionalText = Field(
        None, description="Repository whose own Python code may run; it must equal base_model."
    )

    @model_validator(mode="after")
    def _remote_code_by_name(self) -> Self:
        if self.trust_remote_code is not None and self.trust_remote_code != self.base_model:
            raise ValueError(
                f"trust_remote_code names {self.trust_remote_code!r} but base_model is {self.base_model!r}; "
                "remote code runs only for the repository that is named"
            )
        return self


class DataSettings(Settings):
    """Which rows, and how they become examples."""

    data_path: Paths = Field(
        description="Rows: Hub dataset id, or file, folder or glob (jsonl, json, csv, parquet, datasets folder).",
        min_length=1,
    )
    dataset_config: OptionalText = Field(None, description="Configuration of a Hub dataset.")
    dataset_split: str = Field("train", description="Split of a Hub dataset or a datasets folder.")
    dataset_revision: OptionalText = Field(None, description="Revision of a Hub dataset.")
    max_rows: OptionalInt = Field(None, description="Use only the first N rows.", ge=1)
    template: OptionalText = Field(
        None,
        description="Template name (alpaca, title-ko, chat, prompt-completion), file, or inline text; "
        "without it the one whose columns the data has is taken.",
    )
    cutoff_len: int = Field(2048, description="Longest example in tokens; prompts are shortened, answers never.", ge=8)
    on_bad_rows: Literal["stop", "drop"] = Field(
        "stop", description="Rows without a text or an answer: stop and name them, or drop and count them."
    )
    train_on_inputs: bool = Field(False, description="Train the prompt as well as the answer.")
    add_eos_token: bool = Field(True, description="End every answer with the end-of-text token, and train it.")


class RunSettings(Settings):
    """How long, how fast, and what is kept."""

    output_dir: str = Field(description="Folder for the adapter, its checkpoints and logs.", min_length=1)
    batch_size: int = Field(8, description="Examples in one optimizer step, over all processes.", ge=1, le=1_000_000)
    micro_batch_size: OptionalInt = Field(
        None,
        description="Examples computed at once on one process; none packs as many as fit micro_batch_tokens.",
        ge=1,
    )
    micro_batch_tokens: OptionalInt = Field(
        None,
        description="Most tokens computed at once when micro_batch_size is none; none is 1024 on a CPU, 4096 on a GPU.",
        ge=1,
        le=10_000_000,
    )
    num_epochs: float = Field(3, description="Passes over the training rows.", gt=0, le=10_000)
    max_steps: OptionalInt = Field(None, description="Stop after this many optimizer steps.", ge=1, le=1_000_000_000)
    learning_rate: float = Field(2e-4, description="Peak learning rate.", gt=0, le=10)
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field("linear", description="Shape after the warmup.")
    warmup_steps: OptionalInt = Field(None, description="Steps of linear warmup; wins over warmup_ratio.", ge=0)
    warmup_ratio: float = Field(0.0, description="Share of all steps used for warmup.", ge=0, lt=1)
    weight_decay: float = Field(0.0, description="AdamW's decoupled weight decay.", ge=0, le=1)
    adam_beta1: float = Field(0.9, description="AdamW's first moment decay.", ge=0, lt=1)
    adam_beta2: float = Field(0.999, description="AdamW's second moment decay.", ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, description="AdamW's epsilon.", gt=0, le=1)
    max_grad_norm: float = Field(1.0, description="Gradient norm is clipped to this; 0 switches clipping off.", ge=0)
    val_set_size: float = Field(
        0, description="Rows held out for evaluation: a count (200) or a fraction (0.05).", ge=0
    )
    group_by_length: bool = Field(False, description="Put rows of similar length into the same step.")
    seed: int = Field(42, description="Seed of order, split, dropout and adapter initialisation.", ge=0, lt=2**32)
    logging_steps: int = Field(1, description="Write a log line every N steps.", ge=1)
    eval_steps: OptionalInt = Field(None, description="Evaluate every N steps; none is once an epoch.", ge=1)
    save_steps: OptionalInt = Field(None, description="Write a checkpoint every N steps; none is once an epoch.", ge=1)
    save_total_limit: OptionalInt = Field(3, description="Checkpoints kept besides the best one; none keeps all.", ge=1)
    early_stopping_patience: OptionalInt = Field(
        None, description="Stop after this many evaluations without improvement.", ge=1
    )
    resume_from_checkpoint: OptionalText = Field(
        None, description="Checkpoint folder, `latest`, or a finished adapter to train further."
    )
    overwrite_output_dir: bool = Field(False, description="Start anew in an output_dir that holds another run.")
    report_to: Names = Field([], description="Trackers: tensorboard, wandb, trackio, mlflow; none unless asked for.")
    share_prefixes: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compute a prefix that examples share once (auto is on where the model allows it).",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="torch.compile each layer; auto does it where there is a compiler and the run is long enough.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute layers in the backward pass to save memory.")


class LoraSettings(Settings):
    """The adapter (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    lora_r: int = Field(16, description="Rank of the adapter.", ge=1, le=4096)
    lora_alpha: float = Field(16, description="Scale of the adapter; its output is multiplied by alpha / r.", gt=0)
    lora_dropout: float = Field(0.0, description="Dropout on the adapter's input.", ge=0, lt=1)
    lora_target_modules: Names = Field(
        ["all-linear"],
        description="Layers that get an adapter, by the end of their names, or all-linear.",
        min_length=1,
    )
    neftune_noise_alpha: float = Field(
        0.0, description="NEFTune noise on embeddings (arXiv:2310.05914); 0 is off.", ge=0
    )


class SftSettings(ModelSettings, DataSettings, RunSettings, LoraSettings):
    """byeori sft: fine-tune on prompts and answers."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.val_set_size >= 1 and self.val_set_size != int(self.val_set_size):
            raise ValueError(f"val_set_size {self.val_set_size} is neither a fraction below 1 nor a whole count")
        if self.early_stopping_patience is not None and self.val_set_size == 0:
            raise ValueError("early_stopping_patience needs rows to evaluate on; set val_set_size")
        known = {"tensorboard", "wandb", "trackio", "mlflow"}
        unknown = [name for name in self.report_to if name not in known and name != "none"]
        if unknown:
            raise ValueError(f"report_to does not know {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
        return self


class PreviewSettings(ModelSettings, DataSettings):
    """byeori preview: what the model will see, before any weights are loaded."""

    val_set_size: float = Field(0, description="Rows held out for evaluation: a count or a fraction.", ge=0)
    seed: int = Field(42, description="Seed of the split.", ge=0, lt=2**32)
    rows: int = Field(3, description="Rows shown in full.", ge=0, le=1000)
    html: OptionalText = Field(None, description="Write the preview to this HTML file as well.")
    json_output: bool = Field(False, alias="json", description="Print one JSON object instead.")

    model_config = ConfigDict(**{**Settings.model_config, "populate_by_name": True})


class MergeSettings(Settings):
    """byeori merge: write the adapter into its base."""

    peft_model_path: str = Field(description="Folder of the adapter.", min_length=1)
    output_dir: str = Field(description="Folder for the merged model.", min_length=1)
    base_model_name_or_path: OptionalText = Field(
        None, description="Base model; without it the one that the adapter names."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the merged weights; auto keeps the base's."
    )
    verify: bool = Field(True, description="Load both models and compare their logits on real prompts.")
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
    data_path: Annotated[Paths | None, BeforeValidator(_none_from_text)] = Field(
        None, description="Answer every row of this table."
    )
    dataset_config: OptionalText = Field(None, description="Configuration of a Hub dataset.")
    dataset_split: str = Field("train", description="Split of a Hub dataset or a datasets folder.")
    max_rows: OptionalInt = Field(None, description="Answer only the first N rows.", ge=1)
    output: OptionalText = Field(None, description="File for the answers (.jsonl); without it standard output.")
    raw: OptionalText = Field(None, description="A finished prompt, used as it is; @file reads it from a file.")
    columns: dict[str, str] = Field(
        {},
        description="Values of the template's columns; on the command line --document TEXT or --document @file.",
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

    adapter: str = Field(description="Folder of the adapter.", min_length=1)
    output_dir: str = Field(description="Folder for report.html, rows.jsonl and metrics.json.", min_length=1)
    base_model: OptionalText = Field(None, description="Base model; without it the one that the adapter names.")
    dtype: Dtype = Field("auto", description="Compute type of the weights; auto is bfloat16 where it is fast.")
    max_new_tokens: int = Field(128, description="Longest answer in tokens.", ge=1, le=1_000_000)
    bootstrap: int = Field(2000, description="Resamples behind each 95% interval.", ge=100, le=1_000_000)
    overwrite_output_dir: bool = Field(False, description="Replace a comparison that is already in output_dir.")


class PublishSettings(Settings):
    """byeori publish: upload a finished adapter or merged model to the Hub."""

    folder: str = Field(description="Folder of a finished adapter or merged model.", min_length=1)
    repo_id: str = Field(description="Where it goes: user/name.", pattern=r"^[\w.-]+/[\w.-]+$")
    private: bool = Field(False, description="Create the repository as private.")
    dry_run: bool = Field(False, description="List the files and print the card; upload nothing.")
    revision: str = Field("main", description="Branch to upload to.")
    commit_message: str = Field("Upload model with byeori", description="Message of the commit on the Hub.")


class DemoSettings(Settings):
    """byeori demo: the whole job on the embedded model and the sample rows."""

    output_dir: str = Field("demo-output", description="Folder for everything that the demo makes.", min_length=1)


S = TypeVar("S", bound=Settings)


def nearest(name: str, known: list[str]) -> str:
    """` (did you mean X?)`, or nothing where no name is near."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def check(kind: type[S], values: dict[str, Any]) -> S:
    """Make settings from loose values.

    Raises:
        ConfigError: one sentence that names every setting that is wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(kind, item) for item in error.errors())) from None


def _sentence(kind: type[Settings], item: Any) -> str:
    name = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "missing":
        return f"--{name} is missing: {kind.model_fields[name].description}"
    if item["type"] == "extra_forbidden":
        return f"there is no setting {name!r}{nearest(name, list(kind.model_fields))}"
    message = item["msg"].removeprefix("Value error, ")
    if not name:
        return message
    if item["type"].startswith("bool"):
        return f"--{name} {item['input']!r}: give True or False"
    return f"--{name} {_short(item['input'])}: {message[0].lower()}{message[1:]}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def read_yaml(path: str, kind: type[Settings] | None = None) -> dict[str, Any]:
    """Settings from a YAML file (safe loading only). kind: whose names are the only ones allowed.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, or an unknown name in it.
    """
    import yaml

    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise ConfigError(f"{path} is not valid YAML{line}; write one `name: value` a line") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no settings; write one `name: value` a line")
    values = {str(name).replace("-", "_"): value for name, value in loaded.items()}
    there = [field.alias or name for name, field in kind.model_fields.items()] if kind else list(values)
    unknown = [f"{name!r}{nearest(name, there)}" for name in values if name not in there]
    if unknown:
        raise ConfigError(
            f"{path} names no setting with {', '.join(unknown)}; the settings are in `byeori COMMAND --help`"
        )
    return values


def write_yaml(settings: Settings, path: Path) -> None:
    """Resolved settings, every one with its value, as `--config` reads them."""
    import yaml

    text = yaml.safe_dump(settings.model_dump(by_alias=True), allow_unicode=True, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def table(kind: type[Settings]) -> str:
    """A Markdown table of the settings: name, default, what it does."""
    rows = ["| setting | default | what it does |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        default = "required" if field.is_required() else f"`{_show(field.default)}`"
        rows.append(f"| `--{field.alias or name}` | {default} | {field.description} |")
    return "\n".join(rows)


def _show(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
