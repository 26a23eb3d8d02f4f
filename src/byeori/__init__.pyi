# Made by scripts/api_stub.py from the settings in byeori.config.
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from byeori import config as config
from byeori.commands.audit import AuditResult
from byeori.commands.compare import CompareResult
from byeori.commands.doctor import DoctorResult
from byeori.commands.preview import PreviewResult
from byeori.commands.train import TrainResult
from byeori.errors import (
    ByeoriError,
    CheckpointError,
    ConfigError,
    DataError,
    GateError,
    HubError,
    ModelError,
    TemplateError,
    TooLongError,
    TrainingError,
)
from byeori.export.export import ExportResult
from byeori.export.merge import MergeResult
from byeori.export.publish import PublishResult
from byeori.plan.report import PlanResult

__version__: str

__all__ = [
    "ByeoriError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GateError",
    "HubError",
    "ModelError",
    "TemplateError",
    "TooLongError",
    "TrainingError",
    "audit",
    "chat",
    "compare",
    "demo",
    "demo_model",
    "doctor",
    "dpo",
    "export",
    "generate",
    "merge",
    "plan",
    "preview",
    "publish",
    "rent",
    "serve",
    "sft",
    "studio",
]

def audit(
    *,
    adapter: str | Path,
    output_dir: str | Path,
    base_model: str | Path | None = None,
    data_path: str | Path | Sequence[str | Path] | None = None,
    test: str | Path | Sequence[str | Path] | None = None,
    template: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    max_rows: int | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    overwrite_output_dir: bool = False,
) -> AuditResult:
    """Find wrong, useless and repeated rows, with what a trained adapter knows of them.

    Args:
        adapter: Adapter whose training rows to audit: a folder or a Hub id.
        base_model: Base model of the adapter.
        data_path: Rows to audit.
        output_dir: Folder for audit.json and rows.jsonl.
        test: Test rows, which must not be near copies of the audited ones.
        template: Prompt template.
        dataset_config: Configuration of a Hub dataset, or sheet of a workbook.
        dataset_split: Split of a Hub dataset or a datasets folder.
        max_rows: Audit only the first N rows.
        dtype: Compute type of the weights.
        overwrite_output_dir: Replace the audit in output_dir.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def chat(
    *,
    model: str | Path,
    base_model: str | Path | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    base: bool = False,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    template: str | None = None,
    system: str | None = None,
    pairs: str | Path = "pairs.jsonl",
) -> None:
    """Talk to a model in the terminal, or to an adapter and its base side by side.

    Args:
        model: Model or adapter: a folder or a Hub id.
        base_model: Base model of the adapter.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature.
        top_p: Nucleus sampling: sample from the smallest set of tokens with this probability.
        top_k: Sample from the k most likely tokens.
        repetition_penalty: Repetition penalty.
        seed: Random seed of sampling.
        base: Let the base model answer as well, with the adapter switched off.
        dtype: Compute type of the weights.
        template: Prompt template.
        system: System message of a chat.
        pairs: File to which /save appends pairs for byeori dpo.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def compare(
    *,
    adapter: str | Path | Sequence[str | Path],
    data_path: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    base_model: str | Path | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    query: str | None = None,
    columns: dict[str, str] = {},
    max_rows: int | None = None,
    template: str | None = None,
    cutoff_len: int = 2048,
    on_bad_rows: Literal["stop", "drop"] = "stop",
    special_tokens_in_text: Literal["keep", "escape"] = "escape",
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    engine: Literal["auto", "transformers", "vllm", "llamacpp"] = "auto",
    generation_batch_size: int = 32,
    generation_batch_tokens: int = 16384,
    combine: Literal["stack", "average"] | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    metric: str | Sequence[str] = [],
    fail_unless: str | Sequence[str] = [],
    retention: str | Path | None = None,
    judge: str | None = None,
    judge_model: str | None = None,
    judge_prompt: str | Path | None = None,
    judge_price: str | None = None,
    few_shots: int = 3,
    overwrite_output_dir: bool = False,
    report_to: str | Sequence[str] = [],
) -> CompareResult:
    """Answer the same rows with base and tuned model, and report the difference.

    Args:
        adapter: Adapter to compare with its base model: a folder or a Hub id.
        base_model: Base model of the adapter.
        data_path: Rows: files, folders, Hub datasets or URLs.
        output_dir: Folder for report.html, rows.jsonl and metrics.json.
        dataset_config: Configuration of a Hub dataset, or sheet of a workbook.
        dataset_split: Split of a Hub dataset or a datasets folder.
        dataset_revision: Branch, tag or commit of a Hub dataset.
        query: SQL query of the rows to read from a database in data_path, such as `postgresql://host/db`.
        columns: Names for columns, such as `prompt=질문 chosen=좋은답`.
        max_rows: Use only the first N rows of each data_path.
        template: Prompt template: a name, a file or the text itself.
        cutoff_len: Maximum length of an example in tokens.
        on_bad_rows: What to do with rows that lack text or an answer.
        special_tokens_in_text: What a row's text becomes where it looks like a control token, such as <|im_end|>.
        train_on_inputs: Train on the prompt as well as the answer.
        add_eos_token: End every answer with the end-of-text token, and train it.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature.
        top_p: Nucleus sampling: sample from the smallest set of tokens with this probability.
        top_k: Sample from the k most likely tokens.
        repetition_penalty: Repetition penalty.
        seed: Random seed of sampling and of the choice of few_shots.
        engine: Program that generates.
        generation_batch_size: Maximum number of prompts per batch.
        generation_batch_tokens: Maximum number of tokens per batch of transformers: prompts and the longest answers
            they may get.
        combine: Compare a combination of the adapters as well, and write it to output_dir.
        dtype: Compute type of the weights.
        metric: Measures of your own beside the built-in ones.
        fail_unless: Condition that the numbers must meet, such as 'chrf.low > 0', or the exit code is 3.
        retention: Table of general rows: the loss of both models there shows what the tuned one forgot.
        judge: Address of an OpenAI-compatible endpoint, http://host/v1, whose model says which answer is better,
            asked in both orders, with the key in BYEORI_JUDGE_KEY or OPENAI_API_KEY.
        judge_model: Model of the judge.
        judge_prompt: File with the question for the judge: {prompt}, {reference}, {first} and {second} are filled
            in.
        judge_price: Price of the judge in dollars per million tokens of prompts and of answers, such as 0.15,0.60.
        few_shots: Training rows in the prompt of a baseline: the base model that is shown examples.
        overwrite_output_dir: Replace the comparison in output_dir.
        report_to: Experiment trackers that get the numbers, in the run of the training where it used them:
            tensorboard, wandb, trackio, mlflow.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def demo(
    *,
    output_dir: str | Path = "demo-output",
) -> CompareResult:
    """Fine-tune, merge, generate and compare with the embedded model and sample rows.

    Args:
        output_dir: Folder for everything that the demo writes.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def demo_model() -> Path:
    """Print the folder of the embedded model.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def doctor(
    *,
    offline: bool = False,
) -> DoctorResult:
    """Check this machine: its versions, memory and disks, and every acceleration.

    Args:
        offline: Do not ask the Hugging Face Hub.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def dpo(
    *,
    base_model: str | Path,
    data_path: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    lora_r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_target_modules: str | Sequence[str] = ["all-linear"],
    lora_target_parameters: str | Sequence[str] = [],
    lora_init: str = "default",
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    rank_pattern: dict[str, int] = {},
    alpha_pattern: dict[str, float] = {},
    layers_to_transform: str | Sequence[int] = [],
    modules_to_save: str | Sequence[str] = [],
    trainable_token_indices: str | Sequence[str] = [],
    loraplus_lr_ratio: float = 1.0,
    embedding_learning_rate: float | None = None,
    neftune_noise_alpha: float = 0.0,
    finetune: Literal["lora", "full"] = "lora",
    train_layers: str | None = None,
    master_weights: Literal["float32", "stochastic"] = "float32",
    num_epochs: float = 3,
    max_steps: int | None = None,
    learning_rate: float = 1e-05,
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "polynomial",
        "constant",
        "inverse_sqrt",
        "cosine_with_restarts",
        "cosine_warmup_with_min_lr",
    ] = "linear",
    min_lr_ratio: float | None = None,
    lr_scheduler_kwargs: dict[str, str] | None = None,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    optim: Literal[
        "adamw",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "muon",
        "adafactor",
        "schedule_free_adamw",
        "schedule_free_sgd",
        "lion",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "sgd",
    ] = "adamw",
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float | None = None,
    adam_epsilon: float = 1e-08,
    momentum: float | None = None,
    max_grad_norm: float = 1.0,
    batch_size: int = 8,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
    val_set_size: float = 0,
    group_by_length: bool = False,
    seed: int = 42,
    sample_rows: int = 0,
    logging_steps: int = 1,
    eval_steps: int | None = None,
    save_steps: int | None = None,
    save_total_limit: int | None = 3,
    mirror_to: str | Path | None = None,
    early_stopping_patience: int | None = None,
    keep: Literal["auto", "best", "last"] = "auto",
    resume_from_checkpoint: str | Path | None = None,
    overwrite_output_dir: bool = False,
    report_to: str | Sequence[str] = [],
    nproc: int | None = None,
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto",
    cpu_offload: bool = False,
    load_in_4bit: Literal["auto"] | bool = "auto",
    load_in_8bit: bool = False,
    share_prefixes: Literal["auto", "on", "off"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    speed: str | Sequence[str] = ["auto"],
    gradient_checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "auto",
    train_turns: Literal["all", "last"] = "all",
    chat_template: str | None = None,
    add_tokens: str | Sequence[str] = [],
    chat_template_kwargs: dict[str, str] | None = None,
    validation_path: str | Path | Sequence[str | Path] | None = None,
    mix_by: Literal["rows", "tokens"] = "rows",
    text_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    query: str | None = None,
    columns: dict[str, str] = {},
    max_rows: int | None = None,
    template: str | None = None,
    cutoff_len: int = 2048,
    on_bad_rows: Literal["stop", "drop"] = "stop",
    special_tokens_in_text: Literal["keep", "escape"] = "escape",
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    revision: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    trust_remote_code: str | None = None,
    rope_scaling: Literal["yarn", "linear", "dynamic", "llama3"] | None = None,
    rope_factor: float | None = None,
    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
) -> TrainResult:
    """Fine-tune a LoRA adapter, or the whole model, to prefer chosen to rejected answers.

    Args:
        base_model: Base model, or adapter to train further: folder or Hub id.
        data_path: Rows: files, folders, Hub datasets or URLs.
        output_dir: Folder for the adapter, its checkpoints and its logs.
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter.
        lora_dropout: Dropout on the adapter's input.
        lora_target_modules: Layers to adapt: endings of their names, or all-linear.
        lora_target_parameters: Bare parameters to adapt as well, by the endings of their names: those of experts,
            such as `experts.gate_up_proj experts.down_proj`.
        lora_init: How the adapter's weights start: default, gaussian, orthogonal, pissa, pissa_niter_16, olora,
            mica, eva, loftq.
        use_rslora: Multiply the adapter's output by lora_alpha / sqrt(lora_r) (rsLoRA, arXiv:2312.03732).
        use_dora: Train the length of every weight row apart (DoRA, arXiv:2402.09353).
        lora_bias: Give B a bias.
        rank_pattern: Other ranks for some layers, such as `q_proj=32 down_proj=8`.
        alpha_pattern: Other values of lora_alpha for some layers, as in rank_pattern.
        layers_to_transform: Numbers of the layers to adapt, such as `0-3 8`.
        modules_to_save: Modules to train whole beside the adapter, such as `embed_tokens lm_head`.
        trainable_token_indices: Tokens whose rows of the embedding and the head are trained, by their text or their
            ids.
        loraplus_lr_ratio: Learning rate of B over that of A (LoRA+, arXiv:2402.12354).
        embedding_learning_rate: Peak learning rate of what is trained of embedding and head.
        neftune_noise_alpha: NEFTune noise on the embeddings (arXiv:2310.05914).
        finetune: What to train.
        train_layers: Layers that finetune full trains, such as last:8, first:4 or 0-3,20-23; everything else stays
            frozen.
        master_weights: How finetune full adds small updates to bfloat16 weights.
        num_epochs: Passes over the training rows.
        max_steps: Stop after this many optimizer steps.
        learning_rate: Peak learning rate.
        lr_scheduler: Learning rate schedule after warmup, by the names of transformers; also wsd for
            warmup_stable_decay.
        min_lr_ratio: Lowest learning rate of a schedule with a floor, as a fraction of the peak.
        lr_scheduler_kwargs: Further arguments of transformers' schedule as JSON, such as '{"num_decay_steps":
            100}'.
        warmup_steps: Steps of linear warmup.
        warmup_ratio: Fraction of all steps used for warmup.
        optim: Optimizer.
        weight_decay: Decoupled weight decay, of matrices only.
        adam_beta1: beta1 of AdamW and Lion.
        adam_beta2: beta2 of AdamW and Lion.
        adam_epsilon: AdamW epsilon.
        momentum: Momentum of muon, sgd and schedule_free_sgd.
        max_grad_norm: Maximum gradient norm.
        batch_size: Examples per optimizer step, over all processes.
        micro_batch_size: Examples per forward pass and process.
        micro_batch_tokens: Maximum tokens per forward pass if micro_batch_size is none.
        val_set_size: Rows held out for evaluation: a count (200) or a fraction (0.05).
        group_by_length: Put rows of similar length into the same step.
        seed: Random seed of row order, split, dropout and adapter initialisation.
        sample_rows: Held-out rows that the model answers at every evaluation, for the log and live.html.
        logging_steps: Log every N steps.
        eval_steps: Evaluate every N steps.
        save_steps: Save a checkpoint every N steps.
        save_total_limit: Number of checkpoints to keep besides the best one.
        mirror_to: Folder or URL that checkpoints are copied to.
        early_stopping_patience: Stop after this many evaluations without improvement.
        keep: The adapter that is saved at the end: of the step with the lowest eval_loss, or of the last step.
        resume_from_checkpoint: Checkpoint folder to resume from, or `latest`.
        overwrite_output_dir: Start over in an output_dir that holds another run.
        report_to: Experiment trackers: tensorboard, wandb, trackio, mlflow.
        nproc: Processes on this machine.
        parallel: How several processes share the weights.
        cpu_offload: Keep sharded weights in CPU memory while they are not in use.
        load_in_4bit: Quantize the frozen weights to 4 bits (NF4 with double quantization).
        load_in_8bit: Quantize the frozen weights to 8 bits.
        share_prefixes: Compute prefixes that examples share only once.
        compile: torch.compile every layer in place of most of speed.
        speed: Which accelerations to use.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        train_turns: Which assistant turns of a conversation to train.
        chat_template: Chat template to use instead of the model's: a Jinja file, or chatml, llama3 or gemma.
        add_tokens: New tokens for the tokenizer, such as `<tool> </tool>`.
        chat_template_kwargs: Values for the chat template as JSON, such as '{"enable_thinking": false}'.
        validation_path: Rows for evaluation, like data_path.
        mix_by: What the weights of data_path are shares of, as in `a.jsonl:0.7 b.jsonl:0.3`.
        text_column: Column of plain text to train on as a whole (continued pretraining).
        dataset_config: Configuration of a Hub dataset, or sheet of a workbook.
        dataset_split: Split of a Hub dataset or a datasets folder.
        dataset_revision: Branch, tag or commit of a Hub dataset.
        query: SQL query of the rows to read from a database in data_path, such as `postgresql://host/db`.
        columns: Names for columns, such as `prompt=질문 chosen=좋은답`.
        max_rows: Use only the first N rows of each data_path.
        template: Prompt template: a name, a file or the text itself.
        cutoff_len: Maximum length of an example in tokens.
        on_bad_rows: What to do with rows that lack text or an answer.
        special_tokens_in_text: What a row's text becomes where it looks like a control token, such as <|im_end|>.
        train_on_inputs: Train on the prompt as well as the answer.
        add_eos_token: End every answer with the end-of-text token, and train it.
        revision: Branch, tag or commit of base_model on the Hub.
        dtype: Compute type of the weights.
        trust_remote_code: Repository whose own Python code may run.
        rope_scaling: Scale rotary positions, for a cutoff_len beyond the model's maximum length.
        rope_factor: Factor of rope_scaling.
        loss: Preference loss.
        beta: How closely the model is held to the reference model.
        label_smoothing: Fraction of pairs assumed to be labelled the wrong way round (sigmoid, simpo).
        simpo_gamma: Target reward margin of SimPO.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def export(
    *,
    model: str | Path,
    format: Literal["gguf", "ollama", "vllm"],
    output_dir: str | Path,
    base_model: str | Path | None = None,
    data_path: str | Path | Sequence[str | Path] | None = None,
    quantize: Literal["auto", "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"] = "auto",
    check: Literal["on", "off"] = "on",
    check_rows: int = 8,
    max_new_tokens: int = 48,
    vllm_python: str | Path | None = None,
    overwrite_output_dir: bool = False,
) -> ExportResult:
    """Write a model or adapter for llama.cpp, Ollama or vLLM, and check it there.

    Args:
        model: Model or adapter to export: a folder or a Hub id.
        format: gguf is a file for llama.cpp, ollama adds a Modelfile, vllm is a folder that vLLM serves as it is.
        base_model: Base model of the adapter.
        data_path: Table of the rows to compare.
        output_dir: Folder for the export.
        quantize: Precision of the weights in a GGUF file.
        check: Compare prompts and greedy answers of the export with those of the original.
        check_rows: Rows to compare.
        max_new_tokens: Maximum length of a compared answer in tokens.
        vllm_python: Python of an environment with vLLM, to check --format vllm.
        overwrite_output_dir: Replace the export in output_dir.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def generate(
    *,
    model: str | Path,
    base_model: str | Path | None = None,
    data_path: str | Path | Sequence[str | Path] | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seed: int = 42,
    engine: Literal["auto", "transformers", "vllm", "llamacpp"] = "auto",
    generation_batch_size: int = 32,
    generation_batch_tokens: int = 16384,
    input_text: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    template: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    max_rows: int | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    raw: str | None = None,
    columns: dict[str, str] = {},
) -> list[str]:
    """Answer a prompt, or every row of a table.

    Args:
        model: Model or adapter: a folder or a Hub id.
        base_model: Base model of the adapter.
        data_path: Answer every row of this table.
        max_new_tokens: Maximum length of an answer in tokens.
        temperature: Sampling temperature.
        top_p: Nucleus sampling: sample from the smallest set of tokens with this probability.
        top_k: Sample from the k most likely tokens.
        repetition_penalty: Repetition penalty.
        seed: Random seed of sampling and of the choice of few_shots.
        engine: Program that generates.
        generation_batch_size: Maximum number of prompts per batch.
        generation_batch_tokens: Maximum number of tokens per batch of transformers: prompts and the longest answers
            they may get.
        input_text: The prompt column that no other flag gives, or the user message of a chat.
        dtype: Compute type of the weights.
        template: Prompt template.
        dataset_config: Configuration of a Hub dataset.
        dataset_split: Split of a Hub dataset or a datasets folder.
        max_rows: Answer only the first N rows.
        output: File for the answers (.jsonl).
        overwrite: Replace the file in output.
        raw: A complete prompt, used without a template.
        columns: Prompt columns by name: --document TEXT, or --document @file to read the value from a file.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def merge(
    *,
    peft_model_path: str | Path,
    output_dir: str | Path,
    base_model_name_or_path: str | Path | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    onto: Literal["auto", "base", "opened"] = "auto",
    verify: bool = True,
    overwrite_output_dir: bool = False,
) -> MergeResult:
    """Write an adapter into its base model.

    Args:
        peft_model_path: Adapter to merge: a folder or a Hub id.
        output_dir: Folder for the merged model.
        base_model_name_or_path: Base model of the adapter.
        dtype: Type of the merged weights.
        onto: Weights that the adapter is added to: those of the base, or those that training in 4 or 8 bit opened.
        verify: Check the merged model: load both models and compare their logits on training prompts.
        overwrite_output_dir: Replace the model in output_dir.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def plan(
    *,
    base_model: str | Path | None = None,
    data_path: str | Path | Sequence[str | Path] | None = None,
    output_dir: str | Path = "adapter",
    lora_r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_target_modules: str | Sequence[str] = ["all-linear"],
    lora_target_parameters: str | Sequence[str] = [],
    lora_init: str = "default",
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    rank_pattern: dict[str, int] = {},
    alpha_pattern: dict[str, float] = {},
    layers_to_transform: str | Sequence[int] = [],
    modules_to_save: str | Sequence[str] = [],
    trainable_token_indices: str | Sequence[str] = [],
    loraplus_lr_ratio: float = 1.0,
    embedding_learning_rate: float | None = None,
    neftune_noise_alpha: float = 0.0,
    finetune: Literal["lora", "full"] = "lora",
    train_layers: str | None = None,
    master_weights: Literal["float32", "stochastic"] = "float32",
    num_epochs: float = 3,
    max_steps: int | None = None,
    learning_rate: float = 1e-05,
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "polynomial",
        "constant",
        "inverse_sqrt",
        "cosine_with_restarts",
        "cosine_warmup_with_min_lr",
    ] = "linear",
    min_lr_ratio: float | None = None,
    lr_scheduler_kwargs: dict[str, str] | None = None,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    optim: Literal[
        "adamw",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "muon",
        "adafactor",
        "schedule_free_adamw",
        "schedule_free_sgd",
        "lion",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "sgd",
    ] = "adamw",
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float | None = None,
    adam_epsilon: float = 1e-08,
    momentum: float | None = None,
    max_grad_norm: float = 1.0,
    batch_size: int = 8,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
    val_set_size: float = 0,
    group_by_length: bool = False,
    seed: int = 42,
    sample_rows: int = 0,
    logging_steps: int = 1,
    eval_steps: int | None = None,
    save_steps: int | None = None,
    save_total_limit: int | None = 3,
    mirror_to: str | Path | None = None,
    early_stopping_patience: int | None = None,
    keep: Literal["auto", "best", "last"] = "auto",
    resume_from_checkpoint: str | Path | None = None,
    overwrite_output_dir: bool = False,
    report_to: str | Sequence[str] = [],
    nproc: int | None = None,
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto",
    cpu_offload: bool = False,
    load_in_4bit: Literal["auto"] | bool = "auto",
    load_in_8bit: bool = False,
    share_prefixes: Literal["auto", "on", "off"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    speed: str | Sequence[str] = ["auto"],
    gradient_checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "auto",
    train_turns: Literal["all", "last"] = "all",
    chat_template: str | None = None,
    add_tokens: str | Sequence[str] = [],
    chat_template_kwargs: dict[str, str] | None = None,
    validation_path: str | Path | Sequence[str | Path] | None = None,
    mix_by: Literal["rows", "tokens"] = "rows",
    text_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    query: str | None = None,
    columns: dict[str, str] = {},
    max_rows: int | None = None,
    template: str | None = None,
    cutoff_len: int = 2048,
    on_bad_rows: Literal["stop", "drop"] = "stop",
    special_tokens_in_text: Literal["keep", "escape"] = "escape",
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    revision: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    trust_remote_code: str | None = None,
    rope_scaling: Literal["yarn", "linear", "dynamic", "llama3"] | None = None,
    rope_factor: float | None = None,
    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    objective: Literal["auto", "sft", "dpo"] = "auto",
    shape: str | Sequence[str] = [],
    gpu: str | Sequence[str] = [],
    assumed_rows: int = 10000,
    assumed_tokens: int | None = None,
    order: Literal["cheapest", "fastest", "smallest"] = "cheapest",
    here: bool = False,
    provider: str | None = None,
    spot: bool = False,
    prices: str | Path | None = None,
    update_prices: bool = False,
    machines: str | Path | None = None,
    table: bool = False,
    explain: bool = False,
    html: str | Path | None = None,
    calibrate: bool = False,
    json_output: bool = False,
    write: str | Path | None = None,
) -> PlanResult:
    """Predict memory, time and price of a run on each GPU; no GPU needed.

    Args:
        base_model: Base model: a folder or a Hub id.
        data_path: Rows, for their real lengths and shared prefixes.
        output_dir: Folder of the adapter in the settings that write saves.
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter.
        lora_dropout: Dropout on the adapter's input.
        lora_target_modules: Layers to adapt: endings of their names, or all-linear.
        lora_target_parameters: Bare parameters to adapt as well, by the endings of their names: those of experts,
            such as `experts.gate_up_proj experts.down_proj`.
        lora_init: How the adapter's weights start: default, gaussian, orthogonal, pissa, pissa_niter_16, olora,
            mica, eva, loftq.
        use_rslora: Multiply the adapter's output by lora_alpha / sqrt(lora_r) (rsLoRA, arXiv:2312.03732).
        use_dora: Train the length of every weight row apart (DoRA, arXiv:2402.09353).
        lora_bias: Give B a bias.
        rank_pattern: Other ranks for some layers, such as `q_proj=32 down_proj=8`.
        alpha_pattern: Other values of lora_alpha for some layers, as in rank_pattern.
        layers_to_transform: Numbers of the layers to adapt, such as `0-3 8`.
        modules_to_save: Modules to train whole beside the adapter, such as `embed_tokens lm_head`.
        trainable_token_indices: Tokens whose rows of the embedding and the head are trained, by their text or their
            ids.
        loraplus_lr_ratio: Learning rate of B over that of A (LoRA+, arXiv:2402.12354).
        embedding_learning_rate: Peak learning rate of what is trained of embedding and head.
        neftune_noise_alpha: NEFTune noise on the embeddings (arXiv:2310.05914).
        finetune: What to train.
        train_layers: Layers that finetune full trains, such as last:8, first:4 or 0-3,20-23; everything else stays
            frozen.
        master_weights: How finetune full adds small updates to bfloat16 weights.
        num_epochs: Passes over the training rows.
        max_steps: Stop after this many optimizer steps.
        learning_rate: Peak learning rate.
        lr_scheduler: Learning rate schedule after warmup, by the names of transformers; also wsd for
            warmup_stable_decay.
        min_lr_ratio: Lowest learning rate of a schedule with a floor, as a fraction of the peak.
        lr_scheduler_kwargs: Further arguments of transformers' schedule as JSON, such as '{"num_decay_steps":
            100}'.
        warmup_steps: Steps of linear warmup.
        warmup_ratio: Fraction of all steps used for warmup.
        optim: Optimizer.
        weight_decay: Decoupled weight decay, of matrices only.
        adam_beta1: beta1 of AdamW and Lion.
        adam_beta2: beta2 of AdamW and Lion.
        adam_epsilon: AdamW epsilon.
        momentum: Momentum of muon, sgd and schedule_free_sgd.
        max_grad_norm: Maximum gradient norm.
        batch_size: Examples per optimizer step, over all processes.
        micro_batch_size: Examples per forward pass and process.
        micro_batch_tokens: Maximum tokens per forward pass if micro_batch_size is none.
        val_set_size: Rows held out for evaluation: a count (200) or a fraction (0.05).
        group_by_length: Put rows of similar length into the same step.
        seed: Random seed of row order, split, dropout and adapter initialisation.
        sample_rows: Held-out rows that the model answers at every evaluation, for the log and live.html.
        logging_steps: Log every N steps.
        eval_steps: Evaluate every N steps.
        save_steps: Save a checkpoint every N steps.
        save_total_limit: Number of checkpoints to keep besides the best one.
        mirror_to: Folder or URL that checkpoints are copied to.
        early_stopping_patience: Stop after this many evaluations without improvement.
        keep: The adapter that is saved at the end: of the step with the lowest eval_loss, or of the last step.
        resume_from_checkpoint: Checkpoint folder to resume from, or `latest`.
        overwrite_output_dir: Start over in an output_dir that holds another run.
        report_to: Experiment trackers: tensorboard, wandb, trackio, mlflow.
        nproc: Processes on this machine.
        parallel: How several processes share the weights.
        cpu_offload: Keep sharded weights in CPU memory while they are not in use.
        load_in_4bit: Quantize the frozen weights to 4 bits (NF4 with double quantization).
        load_in_8bit: Quantize the frozen weights to 8 bits.
        share_prefixes: Compute prefixes that examples share only once.
        compile: torch.compile every layer in place of most of speed.
        speed: Which accelerations to use.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        train_turns: Which assistant turns of a conversation to train.
        chat_template: Chat template to use instead of the model's: a Jinja file, or chatml, llama3 or gemma.
        add_tokens: New tokens for the tokenizer, such as `<tool> </tool>`.
        chat_template_kwargs: Values for the chat template as JSON, such as '{"enable_thinking": false}'.
        validation_path: Rows for evaluation, like data_path.
        mix_by: What the weights of data_path are shares of, as in `a.jsonl:0.7 b.jsonl:0.3`.
        text_column: Column of plain text to train on as a whole (continued pretraining).
        dataset_config: Configuration of a Hub dataset, or sheet of a workbook.
        dataset_split: Split of a Hub dataset or a datasets folder.
        dataset_revision: Branch, tag or commit of a Hub dataset.
        query: SQL query of the rows to read from a database in data_path, such as `postgresql://host/db`.
        columns: Names for columns, such as `prompt=질문 chosen=좋은답`.
        max_rows: Use only the first N rows of each data_path.
        template: Prompt template: a name, a file or the text itself.
        cutoff_len: Maximum length of an example in tokens.
        on_bad_rows: What to do with rows that lack text or an answer.
        special_tokens_in_text: What a row's text becomes where it looks like a control token, such as <|im_end|>.
        train_on_inputs: Train on the prompt as well as the answer.
        add_eos_token: End every answer with the end-of-text token, and train it.
        revision: Branch, tag or commit of base_model on the Hub.
        dtype: Compute type of the weights.
        trust_remote_code: Repository whose own Python code may run.
        rope_scaling: Scale rotary positions, for a cutoff_len beyond the model's maximum length.
        rope_factor: Factor of rope_scaling.
        loss: Preference loss.
        beta: How closely the model is held to the reference model.
        label_smoothing: Fraction of pairs assumed to be labelled the wrong way round (sigmoid, simpo).
        simpo_gamma: Target reward margin of SimPO.
        objective: Kind of training.
        shape: A model by its sizes in place of base_model, named as in config.json: hidden_size=4096
            num_hidden_layers=32.
        gpu: Plan for these GPUs only.
        assumed_rows: Number of rows to assume without data_path.
        assumed_tokens: Mean tokens per row to assume without data_path.
        order: Which machine is best: by cost, time or memory.
        here: Plan for this machine only.
        provider: Count only prices of this provider (runpod, vast, ...).
        spot: Count spot prices: cheaper machines that may be taken away.
        prices: Your own prices: a table like plan/prices.csv, or YAML lines like H100: 2.5.
        update_prices: First read today's prices from gpuhunt, for this and later plans.
        machines: Your own table of GPUs, a copy of plan/machines.yaml.
        table: Print one line for every GPU.
        explain: Show what the peak memory consists of.
        html: Also draw cost against time in this HTML file.
        calibrate: Run one real step with random weights on this machine, show the error of the plan, and keep the
            measured speed for later plans.
        json_output: Print JSON.
        write: Save the best settings to this file, for --config of sft or dpo.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def preview(
    *,
    base_model: str | Path,
    data_path: str | Path | Sequence[str | Path],
    train_turns: Literal["all", "last"] = "all",
    chat_template: str | None = None,
    add_tokens: str | Sequence[str] = [],
    chat_template_kwargs: dict[str, str] | None = None,
    validation_path: str | Path | Sequence[str | Path] | None = None,
    mix_by: Literal["rows", "tokens"] = "rows",
    text_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    query: str | None = None,
    columns: dict[str, str] = {},
    max_rows: int | None = None,
    template: str | None = None,
    cutoff_len: int = 2048,
    on_bad_rows: Literal["stop", "drop"] = "stop",
    special_tokens_in_text: Literal["keep", "escape"] = "escape",
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    revision: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    trust_remote_code: str | None = None,
    rope_scaling: Literal["yarn", "linear", "dynamic", "llama3"] | None = None,
    rope_factor: float | None = None,
    val_set_size: float = 0,
    seed: int = 42,
    rows: int = 3,
    html: str | Path | None = None,
    json_output: bool = False,
    tokens: bool = False,
) -> PreviewResult:
    """Show the tokens that training will see; no weights are loaded.

    Args:
        base_model: Base model, or adapter to train further: folder or Hub id.
        data_path: Rows: files, folders, Hub datasets or URLs.
        train_turns: Which assistant turns of a conversation to train.
        chat_template: Chat template to use instead of the model's: a Jinja file, or chatml, llama3 or gemma.
        add_tokens: New tokens for the tokenizer, such as `<tool> </tool>`.
        chat_template_kwargs: Values for the chat template as JSON, such as '{"enable_thinking": false}'.
        validation_path: Rows for evaluation, like data_path.
        mix_by: What the weights of data_path are shares of, as in `a.jsonl:0.7 b.jsonl:0.3`.
        text_column: Column of plain text to train on as a whole (continued pretraining).
        dataset_config: Configuration of a Hub dataset, or sheet of a workbook.
        dataset_split: Split of a Hub dataset or a datasets folder.
        dataset_revision: Branch, tag or commit of a Hub dataset.
        query: SQL query of the rows to read from a database in data_path, such as `postgresql://host/db`.
        columns: Names for columns, such as `prompt=질문 chosen=좋은답`.
        max_rows: Use only the first N rows of each data_path.
        template: Prompt template: a name, a file or the text itself.
        cutoff_len: Maximum length of an example in tokens.
        on_bad_rows: What to do with rows that lack text or an answer.
        special_tokens_in_text: What a row's text becomes where it looks like a control token, such as <|im_end|>.
        train_on_inputs: Train on the prompt as well as the answer.
        add_eos_token: End every answer with the end-of-text token, and train it.
        revision: Branch, tag or commit of base_model on the Hub.
        dtype: Compute type of the weights.
        trust_remote_code: Repository whose own Python code may run.
        rope_scaling: Scale rotary positions, for a cutoff_len beyond the model's maximum length.
        rope_factor: Factor of rope_scaling.
        val_set_size: Rows held out for evaluation: a count (200) or a fraction (0.05).
        seed: Random seed of the split.
        rows: Number of rows to show in full.
        html: Also write the preview to this HTML file.
        json_output: Print JSON.
        tokens: With --json, print token ids and trained spans of every shown example.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def publish(
    *,
    folder: str | Path,
    repo_id: str,
    private: bool = False,
    fail_unless: str | Sequence[str] = [],
    dry_run: bool = False,
    revision: str = "main",
    commit_message: str = "Upload model with byeori",
) -> PublishResult:
    """Upload a finished adapter or merged model to the Hub.

    Args:
        folder: Folder of a finished adapter or merged model.
        repo_id: Repository to upload to: user/name.
        private: Create the repository as private.
        fail_unless: Condition that the last comparison must meet, such as 'chrf.low > 0'; else nothing is uploaded.
        dry_run: List the files and print the model card without uploading anything.
        revision: Branch to upload to.
        commit_message: Message of the commit on the Hub.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def rent(
    *,
    base_model: str | Path,
    data_path: str | Path | Sequence[str | Path],
    output_dir: str | Path = "adapter",
    lora_r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_target_modules: str | Sequence[str] = ["all-linear"],
    lora_target_parameters: str | Sequence[str] = [],
    lora_init: str = "default",
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    rank_pattern: dict[str, int] = {},
    alpha_pattern: dict[str, float] = {},
    layers_to_transform: str | Sequence[int] = [],
    modules_to_save: str | Sequence[str] = [],
    trainable_token_indices: str | Sequence[str] = [],
    loraplus_lr_ratio: float = 1.0,
    embedding_learning_rate: float | None = None,
    neftune_noise_alpha: float = 0.0,
    finetune: Literal["lora", "full"] = "lora",
    train_layers: str | None = None,
    master_weights: Literal["float32", "stochastic"] = "float32",
    num_epochs: float = 3,
    max_steps: int | None = None,
    learning_rate: float = 1e-05,
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "polynomial",
        "constant",
        "inverse_sqrt",
        "cosine_with_restarts",
        "cosine_warmup_with_min_lr",
    ] = "linear",
    min_lr_ratio: float | None = None,
    lr_scheduler_kwargs: dict[str, str] | None = None,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    optim: Literal[
        "adamw",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "muon",
        "adafactor",
        "schedule_free_adamw",
        "schedule_free_sgd",
        "lion",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "sgd",
    ] = "adamw",
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float | None = None,
    adam_epsilon: float = 1e-08,
    momentum: float | None = None,
    max_grad_norm: float = 1.0,
    batch_size: int = 8,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
    val_set_size: float = 0,
    group_by_length: bool = False,
    seed: int = 42,
    sample_rows: int = 0,
    logging_steps: int = 1,
    eval_steps: int | None = None,
    save_steps: int | None = None,
    save_total_limit: int | None = 3,
    mirror_to: str | Path | None = None,
    early_stopping_patience: int | None = None,
    keep: Literal["auto", "best", "last"] = "auto",
    resume_from_checkpoint: str | Path | None = None,
    overwrite_output_dir: bool = False,
    report_to: str | Sequence[str] = [],
    nproc: int | None = None,
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto",
    cpu_offload: bool = False,
    load_in_4bit: Literal["auto"] | bool = "auto",
    load_in_8bit: bool = False,
    share_prefixes: Literal["auto", "on", "off"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    speed: str | Sequence[str] = ["auto"],
    gradient_checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "auto",
    train_turns: Literal["all", "last"] = "all",
    chat_template: str | None = None,
    add_tokens: str | Sequence[str] = [],
    chat_template_kwargs: dict[str, str] | None = None,
    validation_path: str | Path | Sequence[str | Path] | None = None,
    mix_by: Literal["rows", "tokens"] = "rows",
    text_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    query: str | None = None,
    columns: dict[str, str] = {},
    max_rows: int | None = None,
    template: str | None = None,
    cutoff_len: int = 2048,
    on_bad_rows: Literal["stop", "drop"] = "stop",
    special_tokens_in_text: Literal["keep", "escape"] = "escape",
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    revision: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    trust_remote_code: str | None = None,
    rope_scaling: Literal["yarn", "linear", "dynamic", "llama3"] | None = None,
    rope_factor: float | None = None,
    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    objective: Literal["auto", "sft", "dpo"] = "auto",
    shape: str | Sequence[str] = [],
    gpu: str | Sequence[str] = [],
    assumed_rows: int = 10000,
    assumed_tokens: int | None = None,
    order: Literal["cheapest", "fastest", "smallest"] = "cheapest",
    here: bool = False,
    provider: str | None = None,
    spot: bool = False,
    prices: str | Path | None = None,
    update_prices: bool = False,
    machines: str | Path | None = None,
    table: bool = False,
    explain: bool = False,
    html: str | Path | None = None,
    calibrate: bool = False,
    json_output: bool = False,
    write: str | Path | None = None,
    rent_dir: str | Path = "rent",
) -> PlanResult:
    """Plan, and write the files that rent the best machine (SkyPilot, dstack, RunPod).

    Args:
        base_model: Base model: a folder or a Hub id.
        data_path: Rows: files, folders, Hub datasets or URLs.
        output_dir: Folder of the adapter in the settings that write saves.
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter.
        lora_dropout: Dropout on the adapter's input.
        lora_target_modules: Layers to adapt: endings of their names, or all-linear.
        lora_target_parameters: Bare parameters to adapt as well, by the endings of their names: those of experts,
            such as `experts.gate_up_proj experts.down_proj`.
        lora_init: How the adapter's weights start: default, gaussian, orthogonal, pissa, pissa_niter_16, olora,
            mica, eva, loftq.
        use_rslora: Multiply the adapter's output by lora_alpha / sqrt(lora_r) (rsLoRA, arXiv:2312.03732).
        use_dora: Train the length of every weight row apart (DoRA, arXiv:2402.09353).
        lora_bias: Give B a bias.
        rank_pattern: Other ranks for some layers, such as `q_proj=32 down_proj=8`.
        alpha_pattern: Other values of lora_alpha for some layers, as in rank_pattern.
        layers_to_transform: Numbers of the layers to adapt, such as `0-3 8`.
        modules_to_save: Modules to train whole beside the adapter, such as `embed_tokens lm_head`.
        trainable_token_indices: Tokens whose rows of the embedding and the head are trained, by their text or their
            ids.
        loraplus_lr_ratio: Learning rate of B over that of A (LoRA+, arXiv:2402.12354).
        embedding_learning_rate: Peak learning rate of what is trained of embedding and head.
        neftune_noise_alpha: NEFTune noise on the embeddings (arXiv:2310.05914).
        finetune: What to train.
        train_layers: Layers that finetune full trains, such as last:8, first:4 or 0-3,20-23; everything else stays
            frozen.
        master_weights: How finetune full adds small updates to bfloat16 weights.
        num_epochs: Passes over the training rows.
        max_steps: Stop after this many optimizer steps.
        learning_rate: Peak learning rate.
        lr_scheduler: Learning rate schedule after warmup, by the names of transformers; also wsd for
            warmup_stable_decay.
        min_lr_ratio: Lowest learning rate of a schedule with a floor, as a fraction of the peak.
        lr_scheduler_kwargs: Further arguments of transformers' schedule as JSON, such as '{"num_decay_steps":
            100}'.
        warmup_steps: Steps of linear warmup.
        warmup_ratio: Fraction of all steps used for warmup.
        optim: Optimizer.
        weight_decay: Decoupled weight decay, of matrices only.
        adam_beta1: beta1 of AdamW and Lion.
        adam_beta2: beta2 of AdamW and Lion.
        adam_epsilon: AdamW epsilon.
        momentum: Momentum of muon, sgd and schedule_free_sgd.
        max_grad_norm: Maximum gradient norm.
        batch_size: Examples per optimizer step, over all processes.
        micro_batch_size: Examples per forward pass and process.
        micro_batch_tokens: Maximum tokens per forward pass if micro_batch_size is none.
        val_set_size: Rows held out for evaluation: a count (200) or a fraction (0.05).
        group_by_length: Put rows of similar length into the same step.
        seed: Random seed of row order, split, dropout and adapter initialisation.
        sample_rows: Held-out rows that the model answers at every evaluation, for the log and live.html.
        logging_steps: Log every N steps.
        eval_steps: Evaluate every N steps.
        save_steps: Save a checkpoint every N steps.
        save_total_limit: Number of checkpoints to keep besides the best one.
        mirror_to: Folder or URL that checkpoints are copied to.
        early_stopping_patience: Stop after this many evaluations without improvement.
        keep: The adapter that is saved at the end: of the step with the lowest eval_loss, or of the last step.
        resume_from_checkpoint: Checkpoint folder to resume from, or `latest`.
        overwrite_output_dir: Start over in an output_dir that holds another run.
        report_to: Experiment trackers: tensorboard, wandb, trackio, mlflow.
        nproc: Processes on this machine.
        parallel: How several processes share the weights.
        cpu_offload: Keep sharded weights in CPU memory while they are not in use.
        load_in_4bit: Quantize the frozen weights to 4 bits (NF4 with double quantization).
        load_in_8bit: Quantize the frozen weights to 8 bits.
        share_prefixes: Compute prefixes that examples share only once.
        compile: torch.compile every layer in place of most of speed.
        speed: Which accelerations to use.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        train_turns: Which assistant turns of a conversation to train.
        chat_template: Chat template to use instead of the model's: a Jinja file, or chatml, llama3 or gemma.
        add_tokens: New tokens for the tokenizer, such as `<tool> </tool>`.
        chat_template_kwargs: Values for the chat template as JSON, such as '{"enable_thinking": false}'.
        validation_path: Rows for evaluation, like data_path.
        mix_by: What the weights of data_path are shares of, as in `a.jsonl:0.7 b.jsonl:0.3`.
        text_column: Column of plain text to train on as a whole (continued pretraining).
        dataset_config: Configuration of a Hub dataset, or sheet of a workbook.
        dataset_split: Split of a Hub dataset or a datasets folder.
        dataset_revision: Branch, tag or commit of a Hub dataset.
        query: SQL query of the rows to read from a database in data_path, such as `postgresql://host/db`.
        columns: Names for columns, such as `prompt=질문 chosen=좋은답`.
        max_rows: Use only the first N rows of each data_path.
        template: Prompt template: a name, a file or the text itself.
        cutoff_len: Maximum length of an example in tokens.
        on_bad_rows: What to do with rows that lack text or an answer.
        special_tokens_in_text: What a row's text becomes where it looks like a control token, such as <|im_end|>.
        train_on_inputs: Train on the prompt as well as the answer.
        add_eos_token: End every answer with the end-of-text token, and train it.
        revision: Branch, tag or commit of base_model on the Hub.
        dtype: Compute type of the weights.
        trust_remote_code: Repository whose own Python code may run.
        rope_scaling: Scale rotary positions, for a cutoff_len beyond the model's maximum length.
        rope_factor: Factor of rope_scaling.
        loss: Preference loss.
        beta: How closely the model is held to the reference model.
        label_smoothing: Fraction of pairs assumed to be labelled the wrong way round (sigmoid, simpo).
        simpo_gamma: Target reward margin of SimPO.
        objective: Kind of training.
        shape: A model by its sizes in place of base_model, named as in config.json: hidden_size=4096
            num_hidden_layers=32.
        gpu: Plan for these GPUs only.
        assumed_rows: Number of rows to assume without data_path.
        assumed_tokens: Mean tokens per row to assume without data_path.
        order: Which machine is best: by cost, time or memory.
        here: Plan for this machine only.
        provider: Count only prices of this provider (runpod, vast, ...).
        spot: Count spot prices: cheaper machines that may be taken away.
        prices: Your own prices: a table like plan/prices.csv, or YAML lines like H100: 2.5.
        update_prices: First read today's prices from gpuhunt, for this and later plans.
        machines: Your own table of GPUs, a copy of plan/machines.yaml.
        table: Print one line for every GPU.
        explain: Show what the peak memory consists of.
        html: Also draw cost against time in this HTML file.
        calibrate: Run one real step with random weights on this machine, show the error of the plan, and keep the
            measured speed for later plans.
        json_output: Print JSON.
        write: Save the best settings to this file, for --config of sft or dpo.
        rent_dir: Folder for the files that rent a machine.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def serve(
    *,
    model: str | Path,
    base_model: str | Path | None = None,
    engine: Literal["auto", "vllm", "llamacpp", "transformers"] = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    engine_args: str | None = None,
) -> None:
    """Serve a model or an adapter with vLLM, llama.cpp or transformers.

    Args:
        model: Model or adapter: a folder or a Hub id.
        base_model: Base model of the adapter.
        engine: Server to start.
        host: Address to listen on.
        port: Port to listen on.
        dtype: Compute type of the weights.
        engine_args: More arguments for the server: --engine_args="--max-model-len 4096".

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def sft(
    *,
    base_model: str | Path,
    data_path: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    lora_r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    lora_target_modules: str | Sequence[str] = ["all-linear"],
    lora_target_parameters: str | Sequence[str] = [],
    lora_init: str = "default",
    use_rslora: bool = False,
    use_dora: bool = False,
    lora_bias: bool = False,
    rank_pattern: dict[str, int] = {},
    alpha_pattern: dict[str, float] = {},
    layers_to_transform: str | Sequence[int] = [],
    modules_to_save: str | Sequence[str] = [],
    trainable_token_indices: str | Sequence[str] = [],
    loraplus_lr_ratio: float = 1.0,
    embedding_learning_rate: float | None = None,
    neftune_noise_alpha: float = 0.0,
    finetune: Literal["lora", "full"] = "lora",
    train_layers: str | None = None,
    master_weights: Literal["float32", "stochastic"] = "float32",
    num_epochs: float = 3,
    max_steps: int | None = None,
    learning_rate: float = 0.0002,
    lr_scheduler: Literal[
        "linear",
        "cosine",
        "cosine_with_min_lr",
        "warmup_stable_decay",
        "polynomial",
        "constant",
        "inverse_sqrt",
        "cosine_with_restarts",
        "cosine_warmup_with_min_lr",
    ] = "linear",
    min_lr_ratio: float | None = None,
    lr_scheduler_kwargs: dict[str, str] | None = None,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.0,
    optim: Literal[
        "adamw",
        "adamw_8bit",
        "paged_adamw_32bit",
        "paged_adamw_8bit",
        "muon",
        "adafactor",
        "schedule_free_adamw",
        "schedule_free_sgd",
        "lion",
        "lion_8bit",
        "paged_lion_32bit",
        "paged_lion_8bit",
        "sgd",
    ] = "adamw",
    weight_decay: float = 0.0,
    adam_beta1: float = 0.9,
    adam_beta2: float | None = None,
    adam_epsilon: float = 1e-08,
    momentum: float | None = None,
    max_grad_norm: float = 1.0,
    batch_size: int = 8,
    micro_batch_size: int | None = None,
    micro_batch_tokens: int | None = None,
    val_set_size: float = 0,
    group_by_length: bool = False,
    seed: int = 42,
    sample_rows: int = 0,
    logging_steps: int = 1,
    eval_steps: int | None = None,
    save_steps: int | None = None,
    save_total_limit: int | None = 3,
    mirror_to: str | Path | None = None,
    early_stopping_patience: int | None = None,
    keep: Literal["auto", "best", "last"] = "auto",
    resume_from_checkpoint: str | Path | None = None,
    overwrite_output_dir: bool = False,
    report_to: str | Sequence[str] = [],
    nproc: int | None = None,
    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto",
    cpu_offload: bool = False,
    load_in_4bit: Literal["auto"] | bool = "auto",
    load_in_8bit: bool = False,
    share_prefixes: Literal["auto", "on", "off"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    speed: str | Sequence[str] = ["auto"],
    gradient_checkpointing: Literal["auto", "none", "selective", "full", "offload"] = "auto",
    train_turns: Literal["all", "last"] = "all",
    chat_template: str | None = None,
    add_tokens: str | Sequence[str] = [],
    chat_template_kwargs: dict[str, str] | None = None,
    validation_path: str | Path | Sequence[str | Path] | None = None,
    mix_by: Literal["rows", "tokens"] = "rows",
    text_column: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_revision: str | None = None,
    query: str | None = None,
    columns: dict[str, str] = {},
    max_rows: int | None = None,
    template: str | None = None,
    cutoff_len: int = 2048,
    on_bad_rows: Literal["stop", "drop"] = "stop",
    special_tokens_in_text: Literal["keep", "escape"] = "escape",
    train_on_inputs: bool = False,
    add_eos_token: bool = True,
    revision: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    trust_remote_code: str | None = None,
    rope_scaling: Literal["yarn", "linear", "dynamic", "llama3"] | None = None,
    rope_factor: float | None = None,
) -> TrainResult:
    """Fine-tune a LoRA adapter, or the whole model, on prompts and answers.

    Args:
        base_model: Base model, or adapter to train further: folder or Hub id.
        data_path: Rows: files, folders, Hub datasets or URLs.
        output_dir: Folder for the adapter, its checkpoints and its logs.
        lora_r: Rank of the adapter.
        lora_alpha: Scale of the adapter.
        lora_dropout: Dropout on the adapter's input.
        lora_target_modules: Layers to adapt: endings of their names, or all-linear.
        lora_target_parameters: Bare parameters to adapt as well, by the endings of their names: those of experts,
            such as `experts.gate_up_proj experts.down_proj`.
        lora_init: How the adapter's weights start: default, gaussian, orthogonal, pissa, pissa_niter_16, olora,
            mica, eva, loftq.
        use_rslora: Multiply the adapter's output by lora_alpha / sqrt(lora_r) (rsLoRA, arXiv:2312.03732).
        use_dora: Train the length of every weight row apart (DoRA, arXiv:2402.09353).
        lora_bias: Give B a bias.
        rank_pattern: Other ranks for some layers, such as `q_proj=32 down_proj=8`.
        alpha_pattern: Other values of lora_alpha for some layers, as in rank_pattern.
        layers_to_transform: Numbers of the layers to adapt, such as `0-3 8`.
        modules_to_save: Modules to train whole beside the adapter, such as `embed_tokens lm_head`.
        trainable_token_indices: Tokens whose rows of the embedding and the head are trained, by their text or their
            ids.
        loraplus_lr_ratio: Learning rate of B over that of A (LoRA+, arXiv:2402.12354).
        embedding_learning_rate: Peak learning rate of what is trained of embedding and head.
        neftune_noise_alpha: NEFTune noise on the embeddings (arXiv:2310.05914).
        finetune: What to train.
        train_layers: Layers that finetune full trains, such as last:8, first:4 or 0-3,20-23; everything else stays
            frozen.
        master_weights: How finetune full adds small updates to bfloat16 weights.
        num_epochs: Passes over the training rows.
        max_steps: Stop after this many optimizer steps.
        learning_rate: Peak learning rate.
        lr_scheduler: Learning rate schedule after warmup, by the names of transformers; also wsd for
            warmup_stable_decay.
        min_lr_ratio: Lowest learning rate of a schedule with a floor, as a fraction of the peak.
        lr_scheduler_kwargs: Further arguments of transformers' schedule as JSON, such as '{"num_decay_steps":
            100}'.
        warmup_steps: Steps of linear warmup.
        warmup_ratio: Fraction of all steps used for warmup.
        optim: Optimizer.
        weight_decay: Decoupled weight decay, of matrices only.
        adam_beta1: beta1 of AdamW and Lion.
        adam_beta2: beta2 of AdamW and Lion.
        adam_epsilon: AdamW epsilon.
        momentum: Momentum of muon, sgd and schedule_free_sgd.
        max_grad_norm: Maximum gradient norm.
        batch_size: Examples per optimizer step, over all processes.
        micro_batch_size: Examples per forward pass and process.
        micro_batch_tokens: Maximum tokens per forward pass if micro_batch_size is none.
        val_set_size: Rows held out for evaluation: a count (200) or a fraction (0.05).
        group_by_length: Put rows of similar length into the same step.
        seed: Random seed of row order, split, dropout and adapter initialisation.
        sample_rows: Held-out rows that the model answers at every evaluation, for the log and live.html.
        logging_steps: Log every N steps.
        eval_steps: Evaluate every N steps.
        save_steps: Save a checkpoint every N steps.
        save_total_limit: Number of checkpoints to keep besides the best one.
        mirror_to: Folder or URL that checkpoints are copied to.
        early_stopping_patience: Stop after this many evaluations without improvement.
        keep: The adapter that is saved at the end: of the step with the lowest eval_loss, or of the last step.
        resume_from_checkpoint: Checkpoint folder to resume from, or `latest`.
        overwrite_output_dir: Start over in an output_dir that holds another run.
        report_to: Experiment trackers: tensorboard, wandb, trackio, mlflow.
        nproc: Processes on this machine.
        parallel: How several processes share the weights.
        cpu_offload: Keep sharded weights in CPU memory while they are not in use.
        load_in_4bit: Quantize the frozen weights to 4 bits (NF4 with double quantization).
        load_in_8bit: Quantize the frozen weights to 8 bits.
        share_prefixes: Compute prefixes that examples share only once.
        compile: torch.compile every layer in place of most of speed.
        speed: Which accelerations to use.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        train_turns: Which assistant turns of a conversation to train.
        chat_template: Chat template to use instead of the model's: a Jinja file, or chatml, llama3 or gemma.
        add_tokens: New tokens for the tokenizer, such as `<tool> </tool>`.
        chat_template_kwargs: Values for the chat template as JSON, such as '{"enable_thinking": false}'.
        validation_path: Rows for evaluation, like data_path.
        mix_by: What the weights of data_path are shares of, as in `a.jsonl:0.7 b.jsonl:0.3`.
        text_column: Column of plain text to train on as a whole (continued pretraining).
        dataset_config: Configuration of a Hub dataset, or sheet of a workbook.
        dataset_split: Split of a Hub dataset or a datasets folder.
        dataset_revision: Branch, tag or commit of a Hub dataset.
        query: SQL query of the rows to read from a database in data_path, such as `postgresql://host/db`.
        columns: Names for columns, such as `prompt=질문 chosen=좋은답`.
        max_rows: Use only the first N rows of each data_path.
        template: Prompt template: a name, a file or the text itself.
        cutoff_len: Maximum length of an example in tokens.
        on_bad_rows: What to do with rows that lack text or an answer.
        special_tokens_in_text: What a row's text becomes where it looks like a control token, such as <|im_end|>.
        train_on_inputs: Train on the prompt as well as the answer.
        add_eos_token: End every answer with the end-of-text token, and train it.
        revision: Branch, tag or commit of base_model on the Hub.
        dtype: Compute type of the weights.
        trust_remote_code: Repository whose own Python code may run.
        rope_scaling: Scale rotary positions, for a cutoff_len beyond the model's maximum length.
        rope_factor: Factor of rope_scaling.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """

def studio(
    *,
    folder: str | Path = ".",
    port: int = 8080,
    models: str | Path | Sequence[str | Path] | None = None,
    open_browser: Literal["auto", "on", "off"] = "auto",
    root_path: str = "",
    origin: str | Sequence[str] = [],
) -> None:
    """The whole road on a local web page, from rows to an exported model.

    Args:
        folder: Folder to work in.
        port: Port to listen on.
        models: Further folders whose models may be chosen.
        open_browser: Open the page in a browser.
        root_path: Path under which a proxy passes the page on without removing it, such as /proxy/8080.
        origin: Further addresses of the page behind a proxy, such as https://hub.example.org or
            https://*.colab.dev.

    Raises:
        ByeoriError: if something is wrong that you can fix; the message says how.
    """
