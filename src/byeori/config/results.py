"""Settings of the commands that use an adapter, such as merge, generate, compare and audit; and of the demo."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, model_validator

from byeori.config.base import (
    DATA,
    ESSENTIAL,
    GENERATION,
    LOGGING,
    MEMORY,
    SAVING,
    Dtype,
    Folder,
    Model,
    Models,
    Name,
    Names,
    OptionalInt,
    OptionalModel,
    OptionalName,
    OptionalPath,
    OptionalText,
    Paths,
    Settings,
    Texts,
    none_from_text,
    on_off,
    setting,
)
from byeori.config.training import TRACKERS, DataSettings, check_trackers

_BASE = "Base model of the adapter. The default is the one that the adapter names."
_DTYPE = "Compute type of the weights. auto is bfloat16 on hardware that computes it natively."


def _repository(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError("not a repository id; give user/name")
    return name


def _addresses(value: object) -> object:
    """`https://a.org,https://b.org` or several words -> a list of addresses, without a slash at the end."""
    words = value if isinstance(value, (list, tuple)) else [value]
    found = [item.rstrip("/") for word in words for item in re.split(r"[\s,]+", str(word)) if item]
    if wrong := [item for item in found if not re.fullmatch(r"https?://[\w.*:-]+", item)]:
        raise ValueError(f"{wrong[0]} is no address; give one such as https://hub.example.org")
    return found


class MergeSettings(Settings):
    """byeori merge: write an adapter into its base model."""

    inputs: ClassVar[tuple[str, ...]] = ("peft_model_path", "output_dir")

    peft_model_path: Model = setting("Adapter to merge: a folder or a Hub id.", ..., ESSENTIAL)
    output_dir: Folder = setting("Folder for the merged model.", ..., ESSENTIAL)
    base_model_name_or_path: OptionalModel = setting(_BASE, None, ESSENTIAL)
    dtype: Dtype = setting("Type of the merged weights. auto keeps that of the base model.", "auto", ESSENTIAL)
    onto: Literal["auto", "base", "opened"] = setting(
        "Weights that the adapter is added to: those of the base, or those that training in 4 or 8 bit opened. auto is "
        "the base's, unless it is stored quantized.",
        "auto",
        ESSENTIAL,
    )
    verify: bool = setting(
        "Check the merged model: load both models and compare their logits on training prompts.", True, ESSENTIAL
    )
    overwrite_output_dir: bool = setting("Replace the model in output_dir.", False, ESSENTIAL)


class ExportSettings(Settings):
    """byeori export: write a model or adapter for llama.cpp, Ollama or vLLM, and check it there."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "output_dir")

    model: Model = setting("Model or adapter to export: a folder or a Hub id.", ..., ESSENTIAL)
    output_dir: Folder = setting("Folder for the export.", ..., ESSENTIAL)
    format: Literal["gguf", "ollama", "vllm"] = setting(
        "gguf is a file for llama.cpp, ollama adds a Modelfile, vllm is a folder that vLLM serves as it is. An adapter "
        "becomes a LoRA beside its base.",
        ...,
        ESSENTIAL,
    )
    base_model: OptionalModel = setting(_BASE, None, ESSENTIAL)
    quantize: Literal["auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] = setting(
        "Precision of the weights in a GGUF file. auto keeps that of the model.", "auto", ESSENTIAL
    )
    check: Annotated[Literal["on", "off"], BeforeValidator(on_off)] = setting(
        "Compare prompts and greedy answers of the export with those of the original.", "on", ESSENTIAL, alone="on"
    )
    check_rows: int = setting("Rows to compare.", 8, ESSENTIAL, ge=1, le=10_000)
    data_path: Annotated[Paths | None, BeforeValidator(none_from_text)] = setting(
        "Table of the rows to compare. The default is the one that was trained.", None, ESSENTIAL
    )
    max_new_tokens: int = setting("Maximum length of a compared answer in tokens.", 48, ESSENTIAL, ge=1, le=100_000)
    vllm_python: OptionalPath = setting("Python of an environment with vLLM, to check --format vllm.", None, ESSENTIAL)
    overwrite_output_dir: bool = setting("Replace the export in output_dir.", False, ESSENTIAL)

    @model_validator(mode="after")
    def _belongs_to_the_format(self) -> Self:
        if self.format == "vllm" and self.quantize != "auto":
            raise ValueError(f"--quantize {self.quantize} is for gguf and ollama; leave it out")
        if self.format != "vllm" and self.vllm_python is not None:
            raise ValueError("--vllm_python is for --format vllm; leave it out")
        return self


class SamplingSettings(Settings):
    """How an answer is generated."""

    max_new_tokens: int = setting("Maximum length of an answer in tokens.", 256, ESSENTIAL, ge=1, le=1_000_000)
    temperature: float = setting("Sampling temperature. 0 is greedy decoding.", 0.0, GENERATION, ge=0, le=10)
    top_p: float = setting(
        "Nucleus sampling: sample from the smallest set of tokens with this probability.", 1.0, GENERATION, gt=0, le=1
    )
    top_k: int = setting("Sample from the k most likely tokens. 0 is all.", 0, GENERATION, ge=0)
    repetition_penalty: float = setting(
        "Repetition penalty. Values above 1 make repeated tokens less likely.", 1.0, GENERATION, gt=0, le=10
    )
    seed: int = setting("Random seed of sampling and of the choice of few_shots.", 42, GENERATION, ge=0, lt=2**32)


class GenerationSettings(SamplingSettings):
    """How many answers are generated."""

    engine: Literal["auto", "transformers", "vllm", "llamacpp"] = setting(
        "Program that generates. auto is vLLM where it is installed and there is a GPU, else transformers.",
        "auto",
        GENERATION,
    )
    generation_batch_size: int = setting("Maximum number of prompts per batch.", 32, GENERATION, ge=1, le=100_000)
    generation_batch_tokens: int = setting(
        "Maximum number of tokens per batch of transformers: prompts and the longest answers they may get.",
        16_384,
        GENERATION,
        ge=1,
    )


class GenerateSettings(GenerationSettings):
    """byeori generate: answer a prompt, or every row of a table."""

    inputs: ClassVar[tuple[str, ...]] = ("model", "input_text")
    own_flags: ClassVar[str | None] = "columns"

    model: Model = setting("Model or adapter: a folder or a Hub id.", ..., ESSENTIAL)
    input_text: str | None = setting(
        "The prompt column that no other flag gives, or the user message of a chat. @file reads it from a file.",
        None,
        ESSENTIAL,
    )
    base_model: OptionalModel = setting(_BASE, None, ESSENTIAL)
    dtype: Dtype = setting(_DTYPE, "auto", MEMORY)
    template: OptionalText = setting("Prompt template. The default is the one saved with the weights.", None, ESSENTIAL)
    data_path: Annotated[Paths | None, BeforeValidator(none_from_text)] = setting(
        "Answer every row of this table.", None, ESSENTIAL
    )
    dataset_config: OptionalName = setting("Configuration of a Hub dataset.", None, DATA)
    dataset_split: Name = setting("Split of a Hub dataset or a datasets folder.", "train", DATA)
    max_rows: OptionalInt = setting("Answer only the first N rows.", None, DATA, ge=1)
    output: OptionalPath = setting("File for the answers (.jsonl). The default is standard output.", None, ESSENTIAL)
    overwrite: bool = setting("Replace the file in output.", False, ESSENTIAL)
    raw: str | None = setting(
        "A complete prompt, used without a template. @file reads it from a file.", None, ESSENTIAL
    )
    columns: dict[str, str] = setting(
        "Prompt columns by name: --document TEXT, or --document @file to read the value from a file.", {}, ESSENTIAL
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        text = self.input_text is not None
        given = {"raw": self.raw is not None, "data_path": bool(self.data_path), "columns": bool(self.columns)}
        if not self.columns:
            given["input_text"] = text
        names = [name for name, there in given.items() if there]
        if len(names) > 1:
            raise ValueError(f"{' and '.join(names)} exclude each other; give one of them")
        return self


class CompareSettings(GenerationSettings, DataSettings):
    """byeori compare: answer the same rows with base and tuned model, and report the difference."""

    inputs: ClassVar[tuple[str, ...]] = ("adapter", "data_path")

    adapter: Models = setting(
        "Adapter to compare with its base model: a folder or a Hub id. Several are compared with each other as well.",
        ...,
        ESSENTIAL,
    )
    combine: Annotated[Literal["stack", "average"] | None, BeforeValidator(none_from_text)] = setting(
        "Compare a combination of the adapters as well, and write it to output_dir. stack adds their updates, average "
        "averages their matrices.",
        None,
        ESSENTIAL,
    )
    output_dir: Folder = setting("Folder for report.html, rows.jsonl and metrics.json.", ..., ESSENTIAL)
    base_model: OptionalModel = setting(_BASE, None, ESSENTIAL)
    dtype: Dtype = setting(_DTYPE, "auto", MEMORY)
    max_new_tokens: int = setting("Maximum length of an answer in tokens.", 128, ESSENTIAL, ge=1, le=1_000_000)
    metric: Texts = setting(
        "Measures of your own beside the built-in ones. The first decides: contains, number, label, json_valid, "
        "json_fields, tool_call, rouge_l_morphemes, contains:TEXT, regex:PATTERN, or my_module:function with the "
        "arguments row, reference, answer.",
        [],
        ESSENTIAL,
    )
    fail_unless: Texts = setting(
        "Condition that the numbers must meet, such as 'chrf.low > 0', or the exit code is 3. May be given repeatedly.",
        [],
        ESSENTIAL,
    )
    retention: OptionalPath = setting(
        "Table of general rows: the loss of both models there shows what the tuned one forgot.", None, ESSENTIAL
    )
    judge: OptionalText = setting(
        "Address of an OpenAI-compatible endpoint, http://host/v1, whose model says which answer is better, asked "
        "in both orders, with the key in BYEORI_JUDGE_KEY or OPENAI_API_KEY.",
        None,
        ESSENTIAL,
    )
    judge_model: OptionalName = setting("Model of the judge.", None, ESSENTIAL)
    judge_prompt: OptionalPath = setting(
        "File with the question for the judge: {prompt}, {reference}, {first} and {second} are filled in.",
        None,
        ESSENTIAL,
    )
    judge_price: OptionalText = setting(
        "Price of the judge in dollars per million tokens of prompts and of answers, such as 0.15,0.60.",
        None,
        ESSENTIAL,
    )
    few_shots: int = setting(
        "Training rows in the prompt of a baseline: the base model that is shown examples. 0 leaves it out.",
        3,
        SAVING,
        ge=0,
        le=100,
    )
    overwrite_output_dir: bool = setting("Replace the comparison in output_dir.", False, SAVING)
    report_to: Names = setting(
        f"Experiment trackers that get the numbers, in the run of the training where it used them: "
        f"{', '.join(TRACKERS)}. The default is those of the training; none is for none.",
        [],
        LOGGING,
    )

    @model_validator(mode="after")
    def _trackers_are_known(self) -> Self:
        check_trackers(self.report_to)
        return self

    @model_validator(mode="after")
    def _combines_several(self) -> Self:
        if not self.adapter:
            raise ValueError("--adapter needs the name of an adapter")
        if self.combine and len(self.adapter) == 1:
            raise ValueError(f"--combine {self.combine} needs at least two adapters; give another one or leave it out")
        return self

    @model_validator(mode="after")
    def _judge_is_complete(self) -> Self:
        if self.judge is None and (self.judge_model or self.judge_prompt or self.judge_price):
            raise ValueError("--judge_model, --judge_prompt and --judge_price need --judge, the address of the judge")
        if self.judge_price and not re.fullmatch(r"\d*\.?\d+,\d*\.?\d+", self.judge_price):
            raise ValueError(f"--judge_price {self.judge_price!r} is not two prices; give them such as 0.15,0.60")
        if self.judge is not None and self.judge_model is None:
            raise ValueError("--judge needs --judge_model, the name of the model there")
        if self.judge is not None and not re.match(r"https?://[^/]", self.judge):
            raise ValueError(f"--judge {self.judge!r} is no address; give one such as http://localhost:8000/v1")
        return self


class AuditSettings(Settings):
    """byeori audit: find wrong, useless and repeated rows, with what a trained adapter knows of them."""

    inputs: ClassVar[tuple[str, ...]] = ("adapter", "data_path")

    adapter: Model = setting("Adapter whose training rows to audit: a folder or a Hub id.", ..., ESSENTIAL)
    output_dir: Folder = setting("Folder for audit.json and rows.jsonl.", ..., ESSENTIAL)
    data_path: Annotated[Paths | None, BeforeValidator(none_from_text)] = setting(
        "Rows to audit. The default is those that the adapter was trained on.", None, ESSENTIAL
    )
    test: Annotated[Paths | None, BeforeValidator(none_from_text)] = setting(
        "Test rows, which must not be near copies of the audited ones.", None, ESSENTIAL
    )
    base_model: OptionalModel = setting(_BASE, None, ESSENTIAL)
    template: OptionalText = setting("Prompt template. The default is the one saved with the weights.", None, ESSENTIAL)
    dataset_config: OptionalName = setting("Configuration of a Hub dataset, or sheet of a workbook.", None, DATA)
    dataset_split: Name = setting("Split of a Hub dataset or a datasets folder.", "train", DATA)
    max_rows: OptionalInt = setting("Audit only the first N rows.", None, DATA, ge=1)
    dtype: Dtype = setting(_DTYPE, "auto", MEMORY)
    overwrite_output_dir: bool = setting("Replace the audit in output_dir.", False, SAVING)

    @model_validator(mode="after")
    def _names_rows(self) -> Self:
        given = {"dataset_config", "dataset_split"} & self.model_fields_set
        if given and not self.data_path:
            raise ValueError(f"--{min(given)} is about data_path, which is not given; leave it out")
        if self.template is not None and not self.data_path:
            raise ValueError("--template is for rows of data_path; those of the run are read by its own")
        return self


class ChatSettings(SamplingSettings):
    """byeori chat: talk to a model in the terminal, or to an adapter and its base side by side."""

    inputs: ClassVar[tuple[str, ...]] = ("model",)

    model: Model = setting("Model or adapter: a folder or a Hub id.", ..., ESSENTIAL)
    base: bool = setting("Let the base model answer as well, with the adapter switched off.", False, ESSENTIAL)
    base_model: OptionalModel = setting(_BASE, None, ESSENTIAL)
    dtype: Dtype = setting(_DTYPE, "auto", MEMORY)
    template: OptionalText = setting("Prompt template. The default is the one saved with the weights.", None, ESSENTIAL)
    system: OptionalText = setting("System message of a chat.", None, ESSENTIAL)
    pairs: Folder = setting("File to which /save appends pairs for byeori dpo.", "pairs.jsonl", ESSENTIAL)
    seed: int = setting("Random seed of sampling.", 42, GENERATION, ge=0, lt=2**32)


class ServeSettings(Settings):
    """byeori serve: serve a model or an adapter with vLLM, llama.cpp or transformers."""

    inputs: ClassVar[tuple[str, ...]] = ("model",)

    model: Model = setting("Model or adapter: a folder or a Hub id.", ..., ESSENTIAL)
    engine: Literal["auto", "vllm", "llamacpp", "transformers"] = setting(
        "Server to start. auto is the first of these that is installed.", "auto", ESSENTIAL
    )
    host: Name = setting("Address to listen on. 0.0.0.0 lets other machines in.", "127.0.0.1", ESSENTIAL)
    port: int = setting("Port to listen on.", 8000, ESSENTIAL, ge=1, le=65535)
    base_model: OptionalModel = setting(_BASE, None, ESSENTIAL)
    dtype: Dtype = setting(_DTYPE, "auto", MEMORY)
    engine_args: OptionalText = setting(
        'More arguments for the server: --engine_args="--max-model-len 4096".', None, ESSENTIAL
    )


class PublishSettings(Settings):
    """byeori publish: upload a finished adapter or merged model to the Hub."""

    inputs: ClassVar[tuple[str, ...]] = ("folder", "repo_id")

    folder: Folder = setting("Folder of a finished adapter or merged model.", ..., ESSENTIAL)
    repo_id: Annotated[Name, AfterValidator(_repository)] = setting(
        "Repository to upload to: user/name.", ..., ESSENTIAL
    )
    private: bool = setting("Create the repository as private.", False, ESSENTIAL)
    fail_unless: Texts = setting(
        "Condition that the last comparison must meet, such as 'chrf.low > 0'; else nothing is uploaded.", [], ESSENTIAL
    )
    dry_run: bool = setting("List the files and print the model card without uploading anything.", False, ESSENTIAL)
    revision: Name = setting("Branch to upload to.", "main", ESSENTIAL)
    commit_message: str = setting("Message of the commit on the Hub.", "Upload model with byeori", ESSENTIAL)


class StudioSettings(Settings):
    """byeori studio: the whole road on a local web page, from rows to an exported model."""

    inputs: ClassVar[tuple[str, ...]] = ("folder",)

    folder: Folder = setting("Folder to work in. The page opens no file outside it.", ".", ESSENTIAL)
    port: int = setting("Port to listen on. 0 is any free one.", 8080, ESSENTIAL, ge=0, le=65535)
    models: Annotated[Paths | None, BeforeValidator(none_from_text)] = setting(
        "Further folders whose models may be chosen.", None, ESSENTIAL
    )
    open_browser: Annotated[Literal["auto", "on", "off"], BeforeValidator(on_off)] = setting(
        "Open the page in a browser. auto does so where there is a display.", "auto", ESSENTIAL, alone="on"
    )
    root_path: str = setting(
        "Path under which a proxy passes the page on without removing it, such as /proxy/8080.", "", ESSENTIAL
    )
    origin: Annotated[list[str], BeforeValidator(_addresses)] = setting(
        "Further addresses of the page behind a proxy, such as https://hub.example.org or https://*.colab.dev.",
        [],
        ESSENTIAL,
        metavar="URL",
    )


class DemoSettings(Settings):
    """byeori demo: fine-tune, merge, generate and compare with the embedded model and sample rows."""

    output_dir: Folder = setting("Folder for everything that the demo writes.", "demo-output", ESSENTIAL)


class DoctorSettings(Settings):
    """byeori doctor: check this machine: its versions, memory and disks, and every acceleration."""

    offline: bool = setting("Do not ask the Hugging Face Hub.", False, ESSENTIAL)


class DemoModelSettings(Settings):
    """byeori demo-model: print the folder of the embedded model."""
