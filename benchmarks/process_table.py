"""The same run on 1, 2 and 4 processes, whole and sharded weights, micro-batches of 1, 2 and 4: a table of losses.

    python benchmarks/process_table.py            a small random Llama, float32, gloo
    python benchmarks/process_table.py --model FOLDER --data ROWS.jsonl

Prints Markdown; exits with 1 where a loss or an adapter is further from one process's than the tolerance.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import byeori
from byeori.commands import train
from byeori.distributed.processes import shutdown

ROWS = Path(byeori.__file__).parent / "data" / "samples" / "titles-ko-train.jsonl"
STEPS = 20
TOLERANCE = 1e-5
RUNS = [(world, way, size) for world in (1, 2, 4) for way in ("ddp", "fsdp") for size in (1, 2, 4)]


def small_model(folder: Path, rows: Path) -> Path:
    """A random Llama of 4 layers, 64 wide, with a tokenizer of 2,000 words made from the rows."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["<eos>"], initial_alphabet=alphabet)
    core.train_from_iterator(rows.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def work(plan: Path) -> None:
    """The runs of one number of processes, one after the other in one group."""
    train.shutdown = lambda: None
    for settings in json.loads(plan.read_text(encoding="utf-8")):
        byeori.sft(**settings)
    shutdown()


def measure(model: Path, rows: Path, folder: Path) -> dict[tuple[int, str, int], Path]:
    """Run everything; the output folder of each run."""
    found = {run: folder / "-".join(map(str, run)) for run in RUNS if run[0] > 1 or run[1] == "ddp"}
    for world in (1, 2, 4):
        plan = folder / f"{world}.json"
        jobs: list[dict[str, Any]] = [
            {
                "base_model": str(model),
                "data_path": str(rows),
                "output_dir": str(output),
                "parallel": way,
                "micro_batch_size": size,
                "batch_size": 16,
                "max_steps": STEPS,
                "cutoff_len": 256,
                "dtype": "float32",
                "save_steps": STEPS,
            }
            for (count, way, size), output in found.items()
            if count == world
        ]
        plan.write_text(json.dumps(jobs), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, *launcher, __file__, "--worker", str(plan)]
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return found


def losses(output: Path) -> list[float]:
    lines = (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def apart(one: Path, other: Path) -> float:
    """Distance of two adapters, relative to their size."""
    mine, theirs = (load_file(output / "adapter_model.safetensors") for output in (one, other))
    square = sum(float((mine[name] - theirs[name]).square().sum()) for name in theirs)
    return float((square / sum(float(tensor.square().sum()) for tensor in theirs.values())) ** 0.5)


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, default=ROWS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return 0
    with tempfile.TemporaryDirectory(prefix="byeori-table-") as temporary:
        folder = Path(temporary)
        found = measure(given.model or small_model(folder / "model", given.data), given.data, folder)
        first = losses(found[1, "ddp", 1])
        lines = [
            f"| processes | weights | micro-batch | loss at 1 | loss at {STEPS} | largest difference | adapter |",
            "|---:|---|---:|---:|---:|---:|---:|",
        ]
        worst = 0.0
        for (world, way, size), output in found.items():
            mine = losses(output)
            loss = max(abs(a - b) / abs(b) for a, b in zip(mine, first, strict=True))
            adapter = apart(output, found[1, "ddp", 1])
            worst = max(worst, loss, adapter)
            held = "alone" if world == 1 else {"ddp": "whole (DDP)", "fsdp": "sharded (FSDP2)"}[way]
            lines.append(f"| {world} | {held} | {size} | {mine[0]:.6f} | {mine[-1]:.6f} | {loss:.1e} | {adapter:.1e} |")
    print("\n".join(lines))
    print(f"\nRelative to one process with micro-batches of 1; the tolerance is {TOLERANCE:g}.")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
