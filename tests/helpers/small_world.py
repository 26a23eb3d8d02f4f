"""A small world of files for scripts that run commands in forks: a model, adapters, rows. It sets the environment."""

from __future__ import annotations

import gzip
import importlib
import os
import shutil
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

import byeori
import mutations
from byeori import cli
from tiny_models import byte_level_tokenizer, tiny_llama

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(folder: Path) -> None:
    """Make the world once."""
    import datasets
    import pandas
    import zstandard

    base = folder / "base"
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)
    tiny_llama(len(tokenizer)).save_pretrained(base)
    rows = [{"document": f"봄이 왔다 {i}", "title": f"봄소식 {i}", "n": i} for i in range(12)]
    turns = [
        {"messages": [{"role": "user", "content": f"안녕 {i}"}, {"role": "assistant", "content": "반가워요"}]}
        for i in range(6)
    ]
    pairs = [{"prompt": f"질문 {i}", "chosen": "좋은 답", "rejected": "나쁜 답"} for i in range(6)]
    for name, items in (("rows", rows), ("chats", turns), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(map(mutations.dumped, items)) + b"\n")
    (folder / "rows.json").write_bytes(mutations.dumped(rows))
    pandas.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    pandas.DataFrame(rows).to_parquet(folder / "rows.parquet")
    pandas.DataFrame(rows).to_excel(folder / "rows.xlsx", index=False)
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    shutil.copy(Path(byeori.__file__).parent / "plan" / "prices.csv", folder / "prices.csv")
    text = (folder / "rows.jsonl").read_bytes()
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(text))
    (folder / "rows.jsonl.zst").write_bytes(zstandard.compress(text))
    (folder / "template.txt").write_text("### 본문: {document}\n\n### 제목: {title}", encoding="utf-8")
    common = {"base_model": base, "data_path": folder / "rows.jsonl", "template": folder / "template.txt"}
    small = {"cutoff_len": 128, "lora_r": 2, "batch_size": 4, "dtype": "float32"}
    byeori.sft(**common, **small, output_dir=folder / "adapter", max_steps=1)
    byeori.sft(**common, **small, output_dir=folder / "resumed", max_steps=2, save_steps=1)
    byeori.merge(peft_model_path=folder / "adapter", output_dir=folder / "merged")
    byeori.export(model=folder / "merged", output_dir=folder / "exported", format="vllm", check="off")
    (folder / "settings.yaml").write_text(
        (folder / "adapter" / "byeori.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )


def imported(names: Iterable[str]) -> None:
    """Import commands once, for all forks."""
    for name in names:
        importlib.import_module(f"byeori.commands.{name}")


def child(place: Path, given: list[str], out: int) -> None:
    """Run the command in this fork; ends it."""
    code = 99
    try:
        os.chdir(place)
        for stream in (1, 2):
            os.dup2(out, stream)
        sys.stdout, sys.stderr = (
            os.fdopen(1, "w", errors="backslashreplace"),
            os.fdopen(2, "w", errors="backslashreplace"),
        )
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
        code = cli.main(given)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # also where the file for its words is full: the fork must not go on as this program
            os._exit(code)
