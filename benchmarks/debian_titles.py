"""What 300 rows teach: Debian package descriptions and their Korean titles, `python benchmarks/debian_titles.py`.

The first 300 rows are trained; the first 40 behind them whose title and text stand nowhere among these are answered by
base and tuned (`byeori compare`). Prints the commands and a table for RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from machine import BIN, ROOT, demo_model

TRAINED, HELD_OUT = 300, 40
TRAINING = "--num_epochs 2 --learning_rate 3e-4 --lr_scheduler cosine --warmup_ratio 0.05"
TRAINING += " --lora_target_modules gate_proj,up_proj,down_proj --cutoff_len 1024 --overwrite_output_dir True"
COLUMNS = ("document", "title")


def main() -> int:
    """Cut, train, compare, print."""
    parser = argparse.ArgumentParser(description="what 300 rows of Debian titles teach")
    parser.add_argument("--rows", type=Path, default=ROOT.parent / "shared" / "data" / "ko_debian_title.jsonl")
    parser.add_argument("--out", type=Path, default=Path("bench-output") / "debian")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, held_out = cut(args.rows, args.out)
    model = args.out / "adapter"
    run(f"sft --base_model {demo_model()} --data-path {train} --output_dir {model} {TRAINING}")
    run(f"compare {model} --data-path {held_out} --output_dir {args.out / 'report'} --max_new_tokens 48")
    print(table(json.loads((args.out / "report" / "metrics.json").read_text(encoding="utf-8"))))
    return 0


def cut(rows: Path, out: Path) -> tuple[Path, Path]:
    """The rows to train and those to compare, as files."""
    lines = rows.read_text(encoding="utf-8").splitlines()
    known = {json.loads(line)[column] for line in lines[:TRAINED] for column in COLUMNS}
    others = [line for line in lines[TRAINED:] if known.isdisjoint(json.loads(line)[column] for column in COLUMNS)]
    train, held_out = out / "train.jsonl", out / "held-out.jsonl"
    train.write_text("\n".join(lines[:TRAINED]) + "\n", encoding="utf-8")
    held_out.write_text("\n".join(others[:HELD_OUT]) + "\n", encoding="utf-8")
    return train, held_out


def run(command: str) -> None:
    """A command of byeori, shown."""
    print(f"byeori {command}", flush=True)
    subprocess.run([str(BIN / "byeori"), *command.split()], check=True)


def table(metrics: dict[str, dict[str, object]]) -> str:
    """Base, tuned and difference with its interval, by measure."""
    lines = ["| | base | tuned | difference (95% interval) |", "|---|---:|---:|---:|"]
    for name, found in metrics["difference"].items():
        base, tuned = metrics["base"][name], metrics["tuned"][name]
        lines.append(
            f"| {name} | {base:.2f} | {tuned:.2f} | {found['mean']:+.2f} ({found['low']:.2f} to {found['high']:.2f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
