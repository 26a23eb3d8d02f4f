"""A tokenizer, a random model of two layers and an adapter, made in the process: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).parents[2] / "src" / "byeori" / "data" / "samples"


def sample_rows(name: str) -> list[dict[str, Any]]:
    """Rows of one of the project's own sample files."""
    return [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]


def byte_level_tokenizer(**special: str) -> Any:
    """A byte-level BPE tokenizer of the GPT-2 kind (Qwen's, Llama 3's), trained on the sample titles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([row["title"] for row in sample_rows("titles-ko-train.jsonl")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "<|endoftext|>"} | special)


def tiny_llama(vocabulary: int, **changes: Any) -> Any:
    """A random Llama of 2 layers, 32 wide, grouped-query heads, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


def short_sft(model: Path, rows: Path, output: Path, **changes: Any) -> Path:
    """The folder of an adapter that one step has trained, if nothing else is asked for."""
    import byeori

    given = {"base_model": model, "data_path": rows, "output_dir": output, "cutoff_len": 512, "dtype": "float32"}
    byeori.sft(**given | {"max_steps": 1} | changes)
    return output
