"""How fast rows are tokenized on one core, by one or several versions of byeori in turn.

    python benchmarks/tokenize_speed.py [SRC ...] [--rounds 3] [--model FOLDER] [--rows FILE]

SRC is the folder src of a checkout; this one by default. Each measurement is a process of its own with an empty cache:
CPU seconds of `tokenized.encode_table`, from rows in memory to the tokenized table, with the template title-ko; and of
the tokenizer alone, one document at a time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURE = """
import sys, time
import datasets
datasets.config.HF_DATASETS_CACHE = sys.argv[3]
from transformers import AutoTokenizer
from byeori.data import row_kinds, sources, template, tokenize, tokenized
rows = sources.load_rows([sys.argv[2]]).rows
encoding = tokenize.make_encoding(
    AutoTokenizer.from_pretrained(sys.argv[1]), template.resolve("title-ko"), cutoff_len=4096, add_eos_token=True,
    train_on_inputs=False,
)
began = time.process_time()
count = sum(len(encoding.tokenizer.backend_tokenizer.encode(row["document"]).ids) for row in rows)
print(count, time.process_time() - began)
began = time.process_time()
table = tokenized.encode_table(rows, encoding, row_kinds.ANSWER, progress=False)
seconds = time.process_time() - began
print(tokenized.lengths(table).sum(), seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=[str(ROOT / "src")])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default=str(Path("~/.cache/byeori/gemma-3-270m").expanduser()))
    parser.add_argument("--rows", default=str(ROOT.parent / "shared" / "data" / "ko_petitions_title.jsonl"))
    args = parser.parse_args()
    for round_number in range(args.rounds):
        for source in args.sources:
            with tempfile.TemporaryDirectory() as cache:
                single = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "PYTHONPATH": source}
                command = [sys.executable, "-c", MEASURE, args.model, args.rows, cache]
                done = subprocess.run(command, env=os.environ | single, stdout=subprocess.PIPE, text=True, check=True)
            lines = [line.split() for line in done.stdout.splitlines()]
            alone, whole = (int(tokens) / float(seconds) / 1e6 for tokens, seconds in lines)
            told = f"{whole:.2f} million tokens/s (the tokenizer alone {alone:.2f})"
            print(f"round {round_number + 1}, {source}: {told}", flush=True)


if __name__ == "__main__":
    main()
