"""Peak memory and seconds of `byeori merge`, with and without its check, for a model and for one ten times as large.

    python benchmarks/merge_memory.py FOLDER

Gemma 3 270M's sizes, and as many more layers and columns as ten times its parameters need; random weights in bfloat16
in shards of 1 GB, an adapter of rank 8 on every linear layer. Every merge is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {
    "270M": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4},
    "2.7B": {"hidden_size": 2048, "intermediate_size": 12288, "num_hidden_layers": 24, "num_attention_heads": 8},
}
MERGE = """
import resource, sys, time
from pathlib import Path
from byeori.export.merge import merge
base, adapter, out, verify = sys.argv[1:]
began = time.perf_counter()
result = merge(adapter=adapter, base=base, output_dir=Path(out), verify=verify == "check")
print(result.verdict, time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def write_base(folder: Path, sizes: dict[str, int]) -> int:
    """Write a base tensor by tensor, so that this process stays small; returns its parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(**sizes, num_key_value_heads=1, vocab_size=262144, head_dim=256)
    config.architectures, config.dtype = ["Gemma3ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    tensors.pop("lm_head.weight")
    shards: list[dict[str, Any]] = [{}]
    for name, tensor in tensors.items():
        if sum(item.numel() * 2 for item in shards[-1].values()) + tensor.numel() * 2 > 1e9 and shards[-1]:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {}
        for name, tensor in shard.items():
            made[name] = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, 0.02)
            weight_map[name] = file
        save_file(made, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(tensor.numel() for tensor in tensors.values())


def write_adapter(folder: Path, base: Path, sizes: dict[str, int]) -> None:
    import torch
    from safetensors.torch import save_file

    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"] * 256
    shapes = {"self_attn.q_proj": (hidden, heads), "self_attn.k_proj": (hidden, 256), "self_attn.v_proj": (hidden, 256)}
    shapes |= {"self_attn.o_proj": (heads, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner)}
    shapes |= {"mlp.down_proj": (inner, hidden)}
    tensors = {}
    for layer in range(sizes["num_hidden_layers"]):
        for module, (wide, tall) in shapes.items():
            stem = f"base_model.model.model.layers.{layer}.{module}.lora_"
            tensors[f"{stem}A.weight"] = torch.randn(8, wide) * 0.02
            tensors[f"{stem}B.weight"] = torch.randn(tall, 8) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def main(folder: Path) -> None:
    for name, sizes in SIZES.items():
        base, adapter = folder / f"base-{name}", folder / f"adapter-{name}"
        base.mkdir(parents=True)
        parameters = write_base(base, sizes)
        write_adapter(adapter, base, sizes)
        for verify in ("no check", "check"):
            out = folder / f"merged-{name}-{verify.replace(' ', '-')}"
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", MERGE, str(base), str(adapter), str(out), verify],
                capture_output=True,
                text=True,
                env=os.environ,
            )
            assert done.returncode == 0, done.stderr
            verdict, seconds, peak = done.stdout.split()[-3:]
            print(
                f"{name} ({parameters / 1e9:.2f}B), {verify}: {verdict}, {float(seconds):.0f} s "
                f"({time.perf_counter() - began:.0f} s with start-up), peak {float(peak):.2f} GiB",
                flush=True,
            )
            subprocess.run(["rm", "-rf", str(out)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
