"""Hybrids: a step over forests against a step over one row at a time, on random weights of a public model's shape.

    python benchmarks/hybrids.py --shape lfm2-350m --kind header --header 640 --rows 8 --answer 32 --trl

Rows have an answer each. header: all share a header, as the workload W5 does. chat: the turns of one conversation, each
with everything before it. pairs: two answers to a prompt of their own, as DPO has them (computed as answers here). The
two ways alternate; the gradients of both are compared. Seconds are processor time of one forward and backward pass over
all rows, on one thread. With --trl a step of TRL's SFTTrainer over the same rows, as one padded batch without gradient
checkpointing, alternates with them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.kernels import forest_attention, lora_linear, patch, state_layers
from byeori.model import adapter, forward, load

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # LiquidAI/LFM2-350M
    "lfm2-350m": (
        "lfm2",
        {
            "vocab_size": 65536,
            "hidden_size": 1024,
            "intermediate_size": 6656,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "layer_types": ["full_attention" if layer in (2, 5, 8, 10, 12, 14) else "conv" for layer in range(16)],
        },
    ),
    # half as wide and as deep
    "lfm2-61m": (
        "lfm2",
        {
            "vocab_size": 65536,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "layer_types": ["full_attention" if layer in (2, 5) else "conv" for layer in range(8)],
        },
    ),
    # ibm-granite/granite-4.0-h-350m
    "granite-4.0-h-350m": (
        "granitemoehybrid",
        {
            "vocab_size": 100352,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "shared_intermediate_size": 2048,
            "num_hidden_layers": 32,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "num_local_experts": 0,
            "mamba_n_heads": 48,
            "mamba_d_head": 32,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "layer_types": ["attention" if layer in (10, 13, 17, 27) else "mamba" for layer in range(32)],
        },
    ),
}


def build(shape: str, dtype: torch.dtype, *, fused: bool = True) -> Any:
    """Return the model with a LoRA adapter on every linear layer, as a run has it, or as PEFT makes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = SHAPES[shape]
    torch.manual_seed(0)
    forest_attention.register()
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=dtype).eval()
    model = adapter.attach(base, r=8, alpha=16, dropout=0.0, targets=["all-linear"], seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    if not fused:
        return model.train()
    lora_linear.fuse(model)
    patch.fuse(base, patch.parts(["auto"], torch.device("cpu")))
    return model


def step(model: Any, rows: list[Example], *, plain: bool) -> tuple[float, torch.Tensor]:
    """Return the seconds of a forward and backward pass over the rows, and all gradients as one vector."""
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    for forest in [forests.build([row]) for row in rows] if plain else [forests.build(rows)]:
        with forward.accelerated(model):
            (-forward.forest_logprobs(model, forest, plain=plain).sum()).backward()
    seconds = time.process_time() - start
    return seconds, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trl_step(model: Any, rows: list[Example]) -> Callable[[], float]:
    """Return what runs one step of TRL's trainer over the rows, and returns its seconds."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    forward.use_plain_attention(model)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    table = [
        {
            "input_ids": list(row.token_ids),
            "completion_mask": [int(at >= row.targets[0][0]) for at in range(len(row.token_ids))],
        }
        for row in rows
    ]
    folder = tempfile.mkdtemp()
    settings = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=len(rows),
        gradient_checkpointing=False,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_list(table), processing_class=words)
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))

    def run() -> float:
        model.zero_grad(set_to_none=True)
        start = time.process_time()
        trainer.training_step(trainer.model, batch)
        return time.process_time() - start

    return run


def rows_of(kind: str, header: int, count: int, answer: int) -> list[Example]:
    """Return rows of random tokens that share what rows of this kind share."""
    generator = torch.Generator().manual_seed(1)

    def words(number: int) -> list[int]:
        return torch.randint(5, 60_000, (number,), generator=generator).tolist()

    rows: list[Example] = []
    prompt = words(header)
    for row in range(count):
        if kind == "chat" and row:
            prompt = [*rows[-1].token_ids, *words(answer)]  # the last answer and a question
        if kind == "pairs" and row and row % 2 == 0:
            prompt = words(header)
        end = len(prompt) + answer
        rows.append(Example(token_ids=prompt + words(answer), targets=((len(prompt), end),)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="lfm2-350m")
    parser.add_argument("--kind", choices=["header", "chat", "pairs"], default="header")
    parser.add_argument("--header", type=int, default=640)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--trl", action="store_true")
    given = parser.parse_args()
    dtype = load.resolve_dtype(given.dtype, torch.device("cpu"))
    torch.set_num_threads(1)
    model = build(given.shape, dtype)
    rows = rows_of(given.kind, given.header, given.rows, given.answer)
    weights = sum(parameter.numel() for parameter in model.get_base_model().parameters())
    print(f"{given.shape}: {weights / 1e6:.0f}M weights, {str(dtype)[6:]}, {len(rows)} rows ({given.kind})")
    forward.use_forest_attention(model)
    print(state_layers.note(model.get_base_model()))
    theirs = trl_step(build(given.shape, dtype, fused=False), rows) if given.trl else None
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(given.rounds):
        gradients = []
        for plain in (True, False):
            if plain:
                forward.use_plain_attention(model)
            else:
                forward.use_forest_attention(model)
            seconds, gradient = step(model, rows, plain=plain)
            times[plain].append(seconds)
            gradients.append(gradient)
        apart, shared = gradients
        off = float((apart - shared).norm() / apart.norm())
        slow, fast = times[True][-1], times[False][-1]
        print(
            f"row by row {slow:.1f} s, shared {fast:.1f} s: {slow / fast:.1f} x; gradients differ by {off:.1e}",
            flush=True,
        )
        if theirs is not None:
            seconds = theirs()
            print(f"TRL {seconds:.1f} s: {seconds / fast:.1f} x")


if __name__ == "__main__":
    main()
