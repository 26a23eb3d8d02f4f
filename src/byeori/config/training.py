"""Settings of the jobs that train, and of what is looked at before."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from byeori.config.base import (
    Dtype,
    HeldOut,
    Names,
    OptionalInt,
    OptionalText,
    Paths,
    Recompute,
    Settings,
    Switch,
    on_off,
)

SPEED = ("attention", "kernels", "norms", "mlp", "heads", "last_layer", "rare_words")


class ModelSettings(Settings):
    """Which weights, and how they are held."""

    base_model: str = Field(description="Folder or Hub id of the base model.", min_length=1)
    revision: OptionalText = Field(None, description="Branch, tag or commit of base_model on the Hub.")
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
        description="Template name (alpaca, title-ko, question-answer, chat, prompt-completion), file, or inline text; "
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
        description="Most tokens computed at once when micro_batch_size is none; none is 2048 on a CPU (4096 with AMX) "
        "and 4096 on a GPU (more for models under 1.2 billion weights), or less where that does not fit.",
        ge=1,
        le=10_000_000,
    )
    num_epochs: float = Field(3, description="Passes over the training rows.", gt=0, le=10_000)
    max_steps: OptionalInt = Field(None, description="Stop after this many optimizer steps.", ge=1, le=1_000_000_000)
    learning_rate: float = Field(2e-4, description="Peak learning rate.", gt=0, le=10)
    lr_scheduler: Literal["linear", "cosine", "constant"] = Field("linear", description="Shape after the warmup.")
    warmup_steps: OptionalInt = Field(None, description="Steps of linear warmup; wins over warmup_ratio.", ge=0)
    warmup_ratio: float = Field(0.0, description="Share of all steps used for warmup.", ge=0, lt=1)
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = Field(
        "adamw", description="AdamW of PyTorch, or of bitsandbytes: moments in 8 bit, or paged to the CPU's memory."
    )
    weight_decay: float = Field(0.0, description="AdamW's decoupled weight decay.", ge=0, le=1)
    adam_beta1: float = Field(0.9, description="AdamW's first moment decay.", ge=0, lt=1)
    adam_beta2: float = Field(0.999, description="AdamW's second moment decay.", ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, description="AdamW's epsilon.", gt=0, le=1)
    max_grad_norm: float = Field(1.0, description="Gradient norm is clipped to this; 0 switches clipping off.", ge=0)
    val_set_size: HeldOut = Field(
        0, description="Rows held out for evaluation: a count (200) or a fraction (0.05).", ge=0
    )
    group_by_length: bool = Field(False, description="Put rows of similar length into the same step.")
    seed: int = Field(42, description="Seed of order, split, dropout and adapter initialisation.", ge=0, lt=2**32)
    logging_steps: int = Field(1, description="Write a log line every N steps.", ge=1)
    eval_steps: OptionalInt = Field(None, description="Evaluate every N steps; none is once an epoch.", ge=1)
    save_steps: OptionalInt = Field(None, description="Write a checkpoint every N steps; none is once an epoch.", ge=1)
    save_total_limit: OptionalInt = Field(3, description="Checkpoints kept besides the best one; none keeps all.", ge=1)
    mirror_to: OptionalText = Field(
        None,
        description="Shared folder or URL (s3://, gs://, anything fsspec knows) that checkpoints are copied to, and "
        "that `latest` fetches them from.",
    )
    early_stopping_patience: OptionalInt = Field(
        None, description="Stop after this many evaluations without improvement.", ge=1
    )
    resume_from_checkpoint: OptionalText = Field(
        None, description="Checkpoint folder, `latest`, or a finished adapter to train further."
    )
    overwrite_output_dir: bool = Field(False, description="Start anew in an output_dir that holds another run.")
    report_to: Names = Field([], description="Trackers: tensorboard, wandb, trackio, mlflow; none unless asked for.")
    nproc: OptionalInt = Field(
        None, description="Processes on this machine; none is one for each GPU, 1 switches it off.", ge=1, le=1024
    )
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = Field(
        "auto",
        description="Several processes: whole weights in each (ddp), sharded over all (fsdp) or over each machine's "
        "(hsdp); auto shards where the plan says that they do not fit.",
    )
    cpu_offload: bool = Field(False, description="Keep sharded weights in the CPU's memory between their uses.")
    load_in_4bit: Literal["auto"] | bool = Field(
        "auto",
        description="Hold the frozen weights in 4 bit (NF4, double quantisation); auto where nothing else fits.",
        json_schema_extra={"alone": "True"},
    )
    load_in_8bit: bool = Field(False, description="Hold the frozen weights in 8 bit.")
    share_prefixes: Switch = Field(
        "auto",
        description="Compute a prefix that examples share once (auto is on where the model allows it).",
    )
    compile: Switch = Field(
        "auto",
        description="torch.compile each layer instead of most of speed; auto: in long runs, layers that "
        "speed does not know.",
    )
    speed: Annotated[Names, BeforeValidator(on_off)] = Field(
        ["auto"],
        description=f"What makes a step faster: {', '.join(SPEED)}; auto is all that the device has; or off.",
        min_length=1,
    )
    gradient_checkpointing: Recompute = Field(
        "auto",
        description="Recompute layers in the backward pass to save memory: every other one (selective), all (full), "
        "or all with their inputs kept in the CPU's memory (offload); True is full, auto what the plan says.",
        json_schema_extra={"alone": "full"},
    )


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


class TrainSettings(ModelSettings, DataSettings, RunSettings, LoraSettings):
    """What every training job has."""

    base_model: str = Field(
        description="Folder or Hub id of the base model, or of an adapter to train further.", min_length=1
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.load_in_4bit is True and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are given together; give one of them")
        if self.early_stopping_patience is not None and self.val_set_size == 0:
            raise ValueError("early_stopping_patience needs rows to evaluate on; set val_set_size")
        known = {"tensorboard", "wandb", "trackio", "mlflow"}
        unknown = [name for name in self.report_to if name not in known and name != "none"]
        if unknown:
            raise ValueError(f"--report_to does not know {', '.join(unknown)}; it knows {', '.join(sorted(known))}")
        unknown = [name for name in self.speed if name not in SPEED]
        if unknown and self.speed not in (["auto"], ["off"]):
            raise ValueError(
                f"--speed does not know {', '.join(unknown)}; it is auto, off, or some of {', '.join(SPEED)}"
            )
        return self


class SftSettings(TrainSettings):
    """byeori sft: fine-tune on prompts and answers."""


class DpoSettings(TrainSettings):
    """byeori dpo: prefer the chosen answer of each row to the rejected one; an example is a pair."""

    learning_rate: float = Field(1e-5, description="Peak learning rate.", gt=0, le=10)
    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"] = Field(
        "sigmoid", description="Preference loss; sigmoid is DPO's own, simpo and orpo need no reference."
    )
    beta: float = Field(0.1, description="How strongly the model is held to the reference.", gt=0, le=1000)
    label_smoothing: float = Field(
        0.0, description="Share of pairs assumed to be labelled the wrong way round (sigmoid, simpo).", ge=0, lt=0.5
    )
    simpo_gamma: float = Field(0.5, description="SimPO's target margin.", ge=0, le=1000)

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        if self.train_on_inputs:
            raise ValueError("train_on_inputs has no meaning for pairs, which share their prompt; leave it out")
        if self.label_smoothing and self.loss not in ("sigmoid", "simpo"):
            raise ValueError(f"label_smoothing belongs to the losses sigmoid and simpo, not {self.loss}")
        if self.simpo_gamma != type(self).model_fields["simpo_gamma"].default and self.loss != "simpo":
            raise ValueError(f"simpo_gamma belongs to the loss simpo, not {self.loss}")
        return self


class PreviewSettings(ModelSettings, DataSettings):
    """byeori preview: what the model will see, before any weights are loaded."""

    val_set_size: HeldOut = Field(0, description="Rows held out for evaluation: a count or a fraction.", ge=0)
    seed: int = Field(42, description="Seed of the split.", ge=0, lt=2**32)
    rows: int = Field(3, description="Rows shown in full.", ge=0, le=1000)
    html: OptionalText = Field(None, description="Write the preview to this HTML file as well.")
    json_output: bool = Field(False, alias="json", description="Print one JSON object instead.")

    model_config = ConfigDict(**{**Settings.model_config, "populate_by_name": True})
