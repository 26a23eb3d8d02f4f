"""Compare plans to real steps: `python benchmarks/plan_check.py [--only N ...]` prints a Markdown table.

Every combination runs one real optimizer step of a random model in a process of its own. Predicted: the rehearsal on
the meta device. Measured: the peak of the storages that PyTorch made during the same step, and the peak of the process
(VmHWM) less what it held before there was a model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MODELS: dict[str, dict[str, Any]] = {
    "Llama 0.1B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
    },
    "Gemma 3 0.27B": {
        "model_type": "gemma3_text",
        "vocab_size": 262144,
        "hidden_size": 640,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 2048,
        "sliding_window": 512,
    },
    "Qwen 3 0.6B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
    "Llama 1.1B": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
    },
}


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One row of the table. length: tokens of a row; two rows, or one pair, make the micro-batch."""

    model: str
    objective: str
    length: int
    dtype: str = "float32"
    checkpointing: bool = False
    four_bit: bool = False
    targets: str = "all-linear"
    dropout: float = 0.0


COMBINATIONS = [
    Combination(model="Llama 0.1B", objective="sft", length=128),
    Combination(model="Llama 0.1B", objective="sft", length=1024),
    Combination(model="Llama 0.1B", objective="dpo", length=512, checkpointing=True),
    Combination(model="Llama 0.1B", objective="sft", length=512, dropout=0.05, targets="gate_proj,up_proj,down_proj"),
    Combination(model="Llama 0.1B", objective="sft", length=256, four_bit=True),
    Combination(model="Llama 0.1B", objective="dpo", length=512, four_bit=True, checkpointing=True),
    Combination(model="Gemma 3 0.27B", objective="sft", length=128),
    Combination(model="Gemma 3 0.27B", objective="sft", length=768, dtype="bfloat16", checkpointing=True),
    Combination(model="Gemma 3 0.27B", objective="dpo", length=512, dropout=0.05),
    Combination(model="Gemma 3 0.27B", objective="sft", length=256, four_bit=True),
    Combination(model="Qwen 3 0.6B", objective="sft", length=128, dtype="bfloat16"),
    Combination(model="Qwen 3 0.6B", objective="dpo", length=256, dtype="bfloat16", checkpointing=True),
    Combination(
        model="Qwen 3 0.6B", objective="sft", length=256, dtype="bfloat16", four_bit=True, targets="q_proj,v_proj"
    ),
    Combination(model="Llama 1.1B", objective="sft", length=96, dtype="bfloat16"),
    Combination(model="Llama 1.1B", objective="dpo", length=128, dtype="bfloat16", checkpointing=True),
]


def measure(one: Combination) -> dict[str, int]:
    """Rehearse a combination, then run it; bytes."""
    import torch
    from transformers import AutoConfig

    from byeori.batch import loader
    from byeori.data.row_kinds import ROW_KINDS
    from byeori.losses.preference import Preference, preference
    from byeori.losses.sft import SFT
    from byeori.model import forward
    from byeori.plan import machines, measured_step, rehearsal, workload
    from byeori.train import memory

    config = AutoConfig.for_model(**MODELS[one.model])
    adapter = rehearsal.Adapter(r=16, alpha=16, dropout=one.dropout, targets=tuple(one.targets.split(",")))
    objective = SFT if one.objective == "sft" else preference(Preference(loss="sigmoid", beta=0.1))
    work = workload.assumed(
        cutoff_len=one.length,
        mean=one.length,
        rows=8,
        per_row=ROW_KINDS[objective.row_kind].examples,
        schedule=loader.schedule(8, batch_size=8, num_epochs=1, max_steps=None, seed=0),
        size=2 if one.objective == "sft" else 1,
        tokens=4096,
    )
    examples = work.micro_batches[0].largest
    settings: dict[str, Any] = {
        "recompute": "full" if one.checkpointing else "none",
        "bits": 4 if one.four_bit else None,
    }
    step: dict[str, Any] = {"objective": objective, "accumulates": True}
    rehearsed = rehearsal.rehearse(
        rehearsal.architecture(config),
        adapter,
        examples,
        dtype=getattr(torch, one.dtype),
        device="cpu",
        **settings,
        **step,
    )
    if one.four_bit:
        _load_kernels()
    before = memory.resident_bytes()
    model = _model(config, adapter, getattr(torch, one.dtype), settings)
    step["one_sequence"] = not forward.use_forest_attention(model)
    optimizer = measured_step.make_optimizer(model)
    loaded = _peak() - before
    _reset_peak()
    run = measured_step.run(model, optimizer, examples, ends=(1, 1), **step)
    return {
        "tokens": rehearsed.tokens,
        "predicted": rehearsed.peak,
        "holes": int(machines.read().cpu_holes * (rehearsed.peak - rehearsed.parts["weights"])),
        "measured": max(peak.total for peak in run.peaks.values()),
        "process": _peak() - before,
        "loading": loaded,
        "before": before,
    }


def _load_kernels() -> None:
    """Quantize once: bitsandbytes loads its kernels with the first weight, which is not part of the model's memory."""
    import torch
    from bitsandbytes import functional

    from byeori.train import memory

    packed, state = functional.quantize_4bit(torch.ones(4096), compress_statistics=True, quant_type="nf4")
    functional.dequantize_4bit(packed, state)
    memory.keep_large_blocks_apart()


def _model(config: Any, adapter: Any, dtype: Any, settings: dict[str, Any]) -> Any:
    """The adapted model with random weights."""
    import torch

    from byeori.kernels import patch
    from byeori.plan import rehearsal
    from byeori.train import memory

    cpu = torch.device("cpu")
    fast_paths = patch.parts(["auto"], cpu)
    model = rehearsal.build(
        config, adapter, dtype, fast_paths=fast_paths, device="cpu", quantize_layers=_quantize, **settings
    )
    memory.give_back(cpu)
    return model


def _peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _quantize(causal: Any, bits: int) -> None:
    """Put real 4-bit layers of bitsandbytes where the plan counts sizes only."""
    import torch
    from bitsandbytes import functional

    from byeori.plan.meta_quantized import MetaQuantizedLinear, quantize_layers

    class Real(MetaQuantizedLinear):
        """Holds bitsandbytes' own packed weight and scales."""

        def __init__(self, linear: torch.nn.Linear, bits: int) -> None:
            super().__init__(linear, bits)
            weight, state = functional.quantize_4bit(
                linear.weight.detach().reshape(-1), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            self.weight = torch.nn.Parameter(weight, requires_grad=False)
            self.scales, self.scale_scales, self.code, self.state = (
                state.absmax,
                state.state2.absmax,
                state.code,
                state,
            )
            self.offset, self.scale_code = state.offset, state.state2.code

        def dequantize(self, quantized: torch.Tensor) -> torch.Tensor:
            return functional.dequantize_4bit(quantized, self.state).view(self.out_features, self.in_features)

    quantize_layers(causal, bits, Real)


def row(one: Combination, result: dict[str, int]) -> str:
    """A line of the table."""
    rows = 2 if one.objective == "sft" else 1
    more = ["checkpointing"] * one.checkpointing + ["4-bit"] * one.four_bit + ["dropout"] * bool(one.dropout)
    cells = [one.model, one.objective.upper(), f"{one.length} x {rows}", one.dtype, one.targets, ", ".join(more)]
    predicted, measured = result["predicted"], result["measured"]
    cells += [f"{predicted / 2**20:,.1f}", f"{measured / 2**20:,.1f}", f"{predicted / measured - 1:+.2%}"]
    predicted, measured = predicted + result["holes"] + result["before"], result["process"] + result["before"]
    cells += [f"{predicted / 2**20:,.0f}", f"{measured / 2**20:,.0f}", f"{predicted / measured - 1:+.1%}"]
    return "| " + " | ".join(cells) + " |"


def in_type(combination: Combination, dtype: str | None) -> Combination:
    """Return it in another type, for a processor without units for its own."""
    return replace(combination, dtype=dtype or combination.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="for all; else the combinations' own")
    parser.add_argument("--one", type=int, help="measure this one here and print JSON")
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(in_type(COMBINATIONS[given.one], given.dtype))))
        return
    heads = ["predicted MiB", "storages MiB", "error", "predicted MiB", "process MiB", "error"]
    print("| model | objective | tokens | type | adapters on | with | " + " | ".join(heads) + " |")
    print("|---" * 6 + "|---:" * 6 + "|")
    for index, combination in enumerate(in_type(each, given.dtype) for each in COMBINATIONS):
        if given.only and index not in given.only:
            continue
        command = [sys.executable, __file__, "--one", str(index), "--dtype", combination.dtype]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{asdict(combination)}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        print(row(combination, json.loads(done.stdout.strip().splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
