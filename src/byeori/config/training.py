"""Settings of training, and of `byeori preview`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, model_validator

from byeori.config.adapters import LoraSettings
from byeori.config.base import (
    DATA,
    ESSENTIAL,
    EXPERT,
    LOGGING,
    MEMORY,
    OPTIMISATION,
    SAVING,
    Columns,
    Dtype,
    Folder,
    HeldOut,
    Model,
    Name,
    Names,
    OptionalFloat,
    OptionalInt,
    OptionalName,
    OptionalPath,
    OptionalText,
    Paths,
    Recompute,
    Settings,
    Switch,
    Tokens,
    from_json,
    none_from_text,
    on_off,
    setting,
)
from byeori.config.full import FullSettings
from byeori.config.optimisation import OptimisationSettings
from byeori.support.data_urls import is_database
from byeori.support.suggestions import nearest
from byeori.support.text_files import redacted

SPEED = ("attention", "kernels", "norms", "mlp", "heads", "last_layer", "rare_words")
TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


def check_trackers(names: list[str]) -> None:
    """Raise ValueError unless these are names of trackers, or none."""
    unknown = [f"{name!r}{nearest(name, list(TRACKERS))}" for name in names if name not in (*TRACKERS, "none")]
    if unknown:
        raise ValueError(f"--report_to: unknown {', '.join(unknown)}; the trackers are {', '.join(sorted(TRACKERS))}")


class ModelSettings(Settings):
    """Which weights, and in which type."""

    base_model: Model = setting("Base model, or adapter to train further: folder or Hub id.", ..., ESSENTIAL)
    revision: OptionalName = setting("Branch, tag or commit of base_model on the Hub.", None, EXPERT)
    dtype: Dtype = setting(
        "Compute type of the weights. auto is bfloat16 on hardware that computes it natively.", "auto", MEMORY
    )
    trust_remote_code: OptionalName = setting(
        "Repository whose own Python code may run. It must be the same as base_model.", None, EXPERT
    )

    rope_scaling: Annotated[Literal["yarn", "linear", "dynamic", "llama3"] | None, BeforeValidator(none_from_text)] = (
        setting("Scale rotary positions, for a cutoff_len beyond the model's maximum length.", None, DATA)
    )
    rope_factor: OptionalFloat = setting(
        "Factor of rope_scaling. none is cutoff_len divided by the model's maximum length.", None, DATA, gt=1, le=1000
    )

    @model_validator(mode="after")
    def _factor_of_a_scaling(self) -> Self:
        if self.rope_factor is not None and self.rope_scaling is None:
            raise ValueError("rope_factor needs rope_scaling, such as yarn")
        return self

    @model_validator(mode="after")
    def _remote_code_by_name(self) -> Self:
        if self.trust_remote_code is not None and self.trust_remote_code != self.base_model:
            raise ValueError(
                f"trust_remote_code is {self.trust_remote_code!r} but base_model is {self.base_model!r}; "
                "remote code runs only if both name the same repository"
            )
        return self


class DataSettings(Settings):
    """Which rows, and how they become examples."""

    data_path: Paths = setting(
        "Rows: files, folders, Hub datasets or URLs. "
        "A file or glob is jsonl, json, csv, tsv, xlsx, parquet or arrow, text also compressed; a folder may also be "
        "one saved by datasets; URLs are s3://, gs://, postgresql:// and the like. Several may have weights: "
        "`a.jsonl:0.7 b.jsonl:0.3`.",
        ...,
        ESSENTIAL,
        min_length=1,
    )
    dataset_config: OptionalName = setting("Configuration of a Hub dataset, or sheet of a workbook.", None, DATA)
    dataset_split: Name = setting("Split of a Hub dataset or a datasets folder.", "train", DATA)
    dataset_revision: OptionalName = setting("Branch, tag or commit of a Hub dataset.", None, DATA)
    query: OptionalText = setting(
        "SQL query of the rows to read from a database in data_path, such as `postgresql://host/db`.", None, DATA
    )
    columns: Columns = setting(
        "Names for columns, such as `prompt=질문 chosen=좋은답`. "
        "A column inside another is written with a dot: `prompt=translation.ko`.",
        {},
        DATA,
    )
    max_rows: OptionalInt = setting("Use only the first N rows of each data_path.", None, DATA, ge=1)
    template: OptionalText = setting(
        "Prompt template: a name, a file or the text itself. "
        "Names: alpaca, title-ko, question-answer, chat, prompt-completion. The default is the first one whose columns "
        "the data has.",
        None,
        ESSENTIAL,
    )
    cutoff_len: int = setting(
        "Maximum length of an example in tokens. Prompts are shortened to fit, answers never are.",
        2048,
        ESSENTIAL,
        ge=8,
    )
    on_bad_rows: Literal["stop", "drop"] = setting(
        "What to do with rows that lack text or an answer. stop names them and ends the run, drop skips and counts "
        "them.",
        "stop",
        DATA,
    )
    special_tokens_in_text: Literal["keep", "escape"] = setting(
        "What a row's text becomes where it looks like a control token, such as <|im_end|>. "
        "escape leaves it text, keep makes it the token.",
        "escape",
        DATA,
    )
    train_on_inputs: bool = setting("Train on the prompt as well as the answer.", False, DATA)
    add_eos_token: bool = setting("End every answer with the end-of-text token, and train it.", True, DATA)

    @model_validator(mode="after")
    def _query_fits(self) -> Self:
        databases = [path for path in self.data_path or [] if is_database(path)]
        if databases and not self.query:
            raise ValueError(f"{redacted(databases[0])} is a database; select its rows with --query 'SELECT ...'")
        if self.query and not databases:
            raise ValueError("query needs a database in data_path, such as sqlite:///rows.db or postgresql://host/db")
        return self


class SourceSettings(Settings):
    """Further sources of rows, and texts without answers."""

    validation_path: Annotated[Paths | None, BeforeValidator(none_from_text)] = setting(
        "Rows for evaluation, like data_path. It takes the place of val_set_size.", None, DATA
    )
    mix_by: Literal["rows", "tokens"] = setting(
        "What the weights of data_path are shares of, as in `a.jsonl:0.7 b.jsonl:0.3`. tokens counts trained tokens; "
        "no row is repeated.",
        "rows",
        DATA,
    )
    text_column: OptionalName = setting(
        "Column of plain text to train on as a whole (continued pretraining). Documents are cut into pieces of "
        "cutoff_len tokens.",
        None,
        DATA,
    )

    @model_validator(mode="after")
    def _one_way_to_read(self) -> Self:
        given = self.model_dump()
        if self.validation_path and given.get("val_set_size"):
            raise ValueError("val_set_size and validation_path exclude each other; give one of them")
        for name, default in (("template", None), ("train_on_inputs", False), ("train_turns", "all")):
            if self.text_column and given.get(name, default) != default:
                raise ValueError(f"{name} does not apply to text_column, which trains the whole text; leave it out")
        return self


class ChatSettings(Settings):
    """How conversations become examples."""

    train_turns: Literal["all", "last"] = setting(
        "Which assistant turns of a conversation to train. weight, loss, train or masked on a turn exclude it.",
        "all",
        DATA,
    )
    chat_template: OptionalText = setting(
        "Chat template to use instead of the model's: a Jinja file, or chatml, llama3 or gemma. "
        "It is saved with the weights.",
        None,
        DATA,
    )
    add_tokens: Tokens = setting(
        "New tokens for the tokenizer, such as `<tool> </tool>`. Their rows of the embedding and the head start at the "
        "mean and are trained with the adapter.",
        [],
        DATA,
    )
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(from_json)] = setting(
        "Values for the chat template as JSON, such as '{\"enable_thinking\": false}'. "
        "They become the defaults of the saved template.",
        None,
        DATA,
        metavar="JSON",
    )


class RunSettings(Settings):
    """How long, how fast, and what is saved."""

    output_dir: Folder = setting("Folder for the adapter, its checkpoints and its logs.", ..., ESSENTIAL)
    batch_size: int = setting("Examples per optimizer step, over all processes.", 8, ESSENTIAL, ge=1, le=1_000_000)
    micro_batch_size: OptionalInt = setting(
        "Examples per forward pass and process. none packs as many as fit into micro_batch_tokens.", None, MEMORY, ge=1
    )
    micro_batch_tokens: OptionalInt = setting(
        "Maximum tokens per forward pass if micro_batch_size is none. none is 2048 on a CPU (4096 with AMX) and 4096 "
        "on a GPU (more for models under 1.2 billion weights), or less if that does not fit.",
        None,
        MEMORY,
        ge=1,
        le=10_000_000,
    )
    val_set_size: HeldOut = setting(
        "Rows held out for evaluation: a count (200) or a fraction (0.05).", 0, ESSENTIAL, ge=0
    )
    group_by_length: bool = setting("Put rows of similar length into the same step.", False, DATA)
    seed: int = setting(
        "Random seed of row order, split, dropout and adapter initialisation.", 42, EXPERT, ge=0, lt=2**32
    )
    sample_rows: int = setting(
        "Held-out rows that the model answers at every evaluation, for the log and live.html.", 0, LOGGING, ge=0, le=100
    )
    logging_steps: int = setting("Log every N steps.", 1, LOGGING, ge=1)
    eval_steps: OptionalInt = setting("Evaluate every N steps. none is once per epoch.", None, SAVING, ge=1)
    save_steps: OptionalInt = setting("Save a checkpoint every N steps. none is once per epoch.", None, SAVING, ge=1)
    save_total_limit: OptionalInt = setting(
        "Number of checkpoints to keep besides the best one. none keeps all.", 3, SAVING, ge=1
    )
    mirror_to: OptionalPath = setting(
        "Folder or URL that checkpoints are copied to. URLs are those of fsspec (s3://, gs://, ...); "
        "`resume_from_checkpoint latest` restores from it.",
        None,
        SAVING,
    )
    early_stopping_patience: OptionalInt = setting(
        "Stop after this many evaluations without improvement.", None, SAVING, ge=1
    )
    keep: Literal["auto", "best", "last"] = setting(
        "The adapter that is saved at the end: of the step with the lowest eval_loss, or of the last step. "
        "auto is best where rows are held out.",
        "auto",
        SAVING,
    )
    resume_from_checkpoint: OptionalPath = setting(
        "Checkpoint folder to resume from, or `latest`. A finished adapter is trained further.", None, ESSENTIAL
    )
    overwrite_output_dir: bool = setting("Start over in an output_dir that holds another run.", False, SAVING)
    report_to: Names = setting(f"Experiment trackers: {', '.join(TRACKERS)}.", [], LOGGING)
    nproc: OptionalInt = setting(
        "Processes on this machine. none is one per GPU, 1 uses a single process.", None, EXPERT, ge=1, le=1024
    )
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = setting(
        "How several processes share the weights. ddp replicates them, fsdp shards over all processes, hsdp over those "
        "of each machine; auto shards if they would not fit otherwise.",
        "auto",
        MEMORY,
    )
    cpu_offload: bool = setting("Keep sharded weights in CPU memory while they are not in use.", False, MEMORY)
    load_in_4bit: Literal["auto"] | bool = setting(
        "Quantize the frozen weights to 4 bits (NF4 with double quantization). auto does so if nothing else fits.",
        "auto",
        MEMORY,
        alone="True",
    )
    load_in_8bit: bool = setting("Quantize the frozen weights to 8 bits.", False, MEMORY)
    share_prefixes: Switch = setting(
        "Compute prefixes that examples share only once. auto is on for every model that supports it.", "auto", EXPERT
    )
    compile: Switch = setting(
        "torch.compile every layer in place of most of speed. auto does so in long runs, for layers that speed does "
        "not support.",
        "auto",
        EXPERT,
    )
    speed: Annotated[Names, BeforeValidator(on_off)] = setting(
        f"Which accelerations to use. auto enables all supported ones, off none; or some of {', '.join(SPEED)}.",
        ["auto"],
        EXPERT,
        min_length=1,
    )
    gradient_checkpointing: Recompute = setting(
        "Recompute activations in the backward pass to save memory. selective recomputes every second layer, full all "
        "of them, offload all with their inputs in CPU memory; True means full, auto follows the plan.",
        "auto",
        MEMORY,
        alone="full",
    )


class TrainSettings(
    ModelSettings,
    DataSettings,
    SourceSettings,
    ChatSettings,
    RunSettings,
    OptimisationSettings,
    FullSettings,
    LoraSettings,
):
    """Settings that every kind of training has."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.load_in_4bit is True and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both set; choose one of them")
        if self.lora_init == "loftq" and not (self.load_in_4bit is True or self.load_in_8bit):
            raise ValueError("lora_init loftq starts from what quantizing loses; add load_in_4bit or load_in_8bit")
        if self.early_stopping_patience is not None and self.val_set_size == 0 and not self.validation_path:
            raise ValueError("early_stopping_patience needs rows to evaluate on; set val_set_size or validation_path")
        if self.sample_rows and self.val_set_size == 0 and not self.validation_path:
            raise ValueError("sample_rows needs rows to evaluate on; set val_set_size or validation_path")
        if self.keep == "best" and self.val_set_size == 0:
            raise ValueError("keep best needs rows to evaluate on; set val_set_size")
        check_trackers(self.report_to)
        unknown = [f"{name!r}{nearest(name, list(SPEED))}" for name in self.speed if name not in SPEED]
        if unknown and self.speed not in (["auto"], ["off"]):
            raise ValueError(f"--speed: unknown {', '.join(unknown)}; give auto, off, or some of {', '.join(SPEED)}")
        return self


class SftSettings(TrainSettings):
    """byeori sft: fine-tune a LoRA adapter, or the whole model, on prompts and answers."""

    full_rate: ClassVar[float | None] = 2e-5
    inputs: ClassVar[tuple[str, ...]] = ("base_model", "data_path")


class DpoSettings(TrainSettings):
    """byeori dpo: fine-tune a LoRA adapter, or the whole model, to prefer chosen to rejected answers."""

    full_rate: ClassVar[float | None] = 5e-7
    inputs: ClassVar[tuple[str, ...]] = ("base_model", "data_path")

    learning_rate: float = setting(
        "Peak learning rate. With finetune full the default is 5e-7.", 1e-5, ESSENTIAL, gt=0, le=10
    )
    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"] = setting(
        "Preference loss. sigmoid is the loss of DPO; simpo and orpo need no reference model.", "sigmoid", ESSENTIAL
    )
    beta: float = setting("How closely the model is held to the reference model.", 0.1, ESSENTIAL, gt=0, le=1000)
    label_smoothing: float = setting(
        "Fraction of pairs assumed to be labelled the wrong way round (sigmoid, simpo).",
        0.0,
        OPTIMISATION,
        ge=0,
        lt=0.5,
    )
    simpo_gamma: float = setting("Target reward margin of SimPO.", 0.5, OPTIMISATION, ge=0, le=1000)

    @model_validator(mode="after")
    def _loss_fits(self) -> Self:
        if self.text_column:
            raise ValueError("text_column is for sft; pairs have answers")
        if self.train_on_inputs:
            raise ValueError("train_on_inputs does not apply to pairs, which share their prompt; leave it out")
        if self.label_smoothing and self.loss not in ("sigmoid", "simpo"):
            raise ValueError(f"label_smoothing belongs to the losses sigmoid and simpo, not {self.loss}")
        if self.simpo_gamma != type(self).model_fields["simpo_gamma"].default and self.loss != "simpo":
            raise ValueError(f"simpo_gamma belongs to the loss simpo, not {self.loss}")
        return self


class PreviewSettings(ModelSettings, DataSettings, SourceSettings, ChatSettings):
    """byeori preview: show the tokens that training will see; no weights are loaded."""

    inputs: ClassVar[tuple[str, ...]] = ("base_model", "data_path")

    val_set_size: HeldOut = setting("Rows held out for evaluation: a count (200) or a fraction (0.05).", 0, DATA, ge=0)
    seed: int = setting("Random seed of the split.", 42, EXPERT, ge=0, lt=2**32)
    rows: int = setting("Number of rows to show in full.", 3, ESSENTIAL, ge=0, le=1000)
    html: OptionalPath = setting("Also write the preview to this HTML file.", None, ESSENTIAL)
    json_output: bool = setting("Print JSON.", False, ESSENTIAL, alias="json")
    tokens: bool = setting("With --json, print token ids and trained spans of every shown example.", False, ESSENTIAL)

    model_config = ConfigDict(**{**Settings.model_config, "populate_by_name": True})
