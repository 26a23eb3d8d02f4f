"""Adapters and merged models are read by transformers 4.57 and 5 as they are here: ids, chat prompts, greedy answers.

    python benchmarks/readers.py FOLDER [TOKENIZER ...]

Makes an environment for each version (pip; PyTorch is that of this environment), trains and merges an adapter on the
embedded model, and on a tiny random Llama with each TOKENIZER (folders with tokenizer.json and tokenizer_config.json),
and compares what every environment reads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import byeori
from byeori.model.demo_model import embedded_model

VERSIONS = ("4.57.6", "5.0.0", "")
ROWS = [
    {
        "document": f"마을 도서관 앞 건널목에 신호등이 없습니다. {n}번째, don't wait.",
        "title": f"건널목 신호등 {n}",
    }
    for n in range(8)
]
READ = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
read = {"transformers": transformers.__version__}
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "도서관 앞, don't wait 3.14\\n\\n  <|im_end|><eos> 끝"
    turns = [{"role": "user", "content": "마을 도서관"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    found = {"ids": tokenizer(text)["input_ids"], "prompt": prompt, "prompt_ids": ids, "eos": tokenizer.eos_token_id}
    if folder.endswith("merged"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        found["answer"] = model.generate(**given, max_new_tokens=12, do_sample=False)[0, len(ids):].tolist()
        found["stops"] = model.generation_config.eos_token_id
    read[folder] = found
json.dump(read, open(sys.argv[1], "w"))
"""


def environment(folder: Path, version: str) -> Path:
    """Make an environment with this version of transformers; returns its python."""
    if not folder.is_dir():
        venv.create(folder, with_pip=True)
        wanted = f"transformers=={version}" if version else "transformers"
        subprocess.run([folder / "bin" / "pip", "install", "-q", wanted], check=True)
        site = next(folder.glob("lib/python3*/site-packages"))
        (site / "torch-of-byeori.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after its own packages
    return folder / "bin" / "python"


def models(folder: Path, tokenizers: list[Path]) -> list[Path]:
    """Train and merge; returns the folders of adapters and merged models."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    bases = {"demo": embedded_model(print)}
    for tokenizer in tokenizers:
        base = folder / f"base-{tokenizer.name}"
        shutil.copytree(tokenizer, base)
        torch.manual_seed(0)
        words = (len(AutoTokenizer.from_pretrained(tokenizer)) + 127) // 64 * 64
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        config = LlamaConfig(vocab_size=words, num_attention_heads=4, num_key_value_heads=2, **sizes)
        LlamaForCausalLM(config).save_pretrained(base)
        bases[tokenizer.name] = base
    made = []
    for name, base in bases.items():
        adapter, merged = folder / f"{name}-adapter", folder / f"{name}-merged"
        byeori.sft(base_model=base, data_path=rows, output_dir=adapter, max_steps=2, cutoff_len=256)
        byeori.merge(peft_model_path=adapter, output_dir=merged)
        assert (base / "tokenizer.json").read_bytes() == (merged / "tokenizer.json").read_bytes(), name
        made += [adapter, merged]
    return made


def main(folder: Path, tokenizers: list[Path]) -> None:
    folder.mkdir(parents=True)
    made = models(folder, tokenizers)
    pythons = [Path(sys.executable), *(environment(folder / f"env-{v or 'newest'}", v) for v in VERSIONS)]
    reads = []
    for number, python in enumerate(pythons):
        out = folder / f"read-{number}.json"
        subprocess.run([python, "-c", READ, out, *map(str, made)], check=True)
        reads.append(json.loads(out.read_text()))
    ours = reads[0]
    for read in reads[1:]:
        for name in made:
            one, other = ours[str(name)], read[str(name)]
            different = [key for key in one if one[key] != other[key]]
            print(f"transformers {read['transformers']}: {name.name}: {different or 'equal'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(item) for item in sys.argv[2:]])
