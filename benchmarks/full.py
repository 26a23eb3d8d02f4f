"""Full fine-tuning of the embedded Gemma 3 270M: byeori's losses beside a plain PyTorch loop over the same batches.

    python benchmarks/full.py --out /tmp/full [--optim muon] [--train_layers last:4] [--steps 10]

The plain loop is transformers and torch.optim alone: one row at a time, no padding, float32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from machine import apart

BATCH, RATE, CLIP, LONGEST = 2, 2e-5, 1.0, 120  # LONGEST: characters of a row


def rows_file(folder: Path, count: int) -> Path:
    """Write the first sample rows, short enough for one token limit."""
    source = Path(__file__).parents[1] / "src/byeori/data/samples/titles-ko-train.jsonl"
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    short = [row for row in rows if len(row["document"]) < LONGEST][:count]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in short), encoding="utf-8")
    return path


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """Return the settings of byeori's run."""
    from byeori.model import demo_model

    more = {"train_layers": args.train_layers} if args.train_layers else {}
    return more | {
        "base_model": str(demo_model.embedded_model(print)),
        "data_path": str(rows_file(args.out, args.steps * BATCH)),
        "output_dir": str(args.out / "byeori"),
        "finetune": "full",
        "dtype": "float32",
        "batch_size": BATCH,
        "num_epochs": 1,
        "learning_rate": RATE,
        "max_grad_norm": CLIP,
        "lr_scheduler": "constant",
        "optim": args.optim,
        "overwrite_output_dir": True,
    }


def byeori_run(args: argparse.Namespace) -> None:
    """Train, and leave the log."""
    import byeori

    byeori.sft(**settings_of(args))


def plain_run(args: argparse.Namespace) -> None:
    """Train the same rows in the same order in plain PyTorch; writes losses and seconds to plain.json."""
    from transformers import AutoModelForCausalLM

    from byeori import config
    from byeori.commands import _rows
    from byeori.data import row_kinds, tokenized
    from byeori.distributed.processes import ALONE

    settings, start = _rows.begin(config.check(config.SftSettings, settings_of(args)))
    table = _rows.prepare(settings, start, row_kind=row_kinds.ANSWER, processes=ALONE)[0].train
    examples = {example.row: example for example in (tokenized.example(table, i) for i in range(len(table)))}
    order = json.loads((args.out / "byeori" / "order.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(settings.base_model, dtype=torch.float32, attn_implementation="eager")
    if args.train_layers:
        model.requires_grad_(False)
        for layer in model.model.layers[-int(args.train_layers.partition(":")[2]) :]:
            layer.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses, seconds = [], []
    for at in range(0, len(order), BATCH):
        began, batch = time.perf_counter(), [examples[row] for row in order[at : at + BATCH]]
        weight, loss = sum(example.target_count for example in batch), 0.0
        for example in batch:
            ids = torch.tensor([list(example.token_ids)])
            labels = torch.full_like(ids, -100)
            for first, last in example.targets:
                labels[:, first:last] = ids[:, first:last]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            part = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / weight
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        seconds.append(time.perf_counter() - began)
    (args.out / "plain.json").write_text(json.dumps({"losses": losses, "seconds": seconds}))


def main() -> None:
    """Run both, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--optim", default="adamw")
    parser.add_argument("--train_layers", default=None)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    apart(byeori_run, args)
    lines = [json.loads(line) for line in (args.out / "byeori" / "train_log.jsonl").read_text().splitlines()]
    if args.optim == "adamw":
        apart(plain_run, args)
        plain = json.loads((args.out / "plain.json").read_text())
        print("| step | byeori | plain PyTorch |\n|---|---|---|")
        for line, loss in zip(lines, plain["losses"], strict=True):
            print(f"| {line['step']} | {line['loss']:.6f} | {loss:.6f} |")
        furthest = max(abs(line["loss"] / loss - 1) for line, loss in zip(lines, plain["losses"], strict=True))
        own, other = (sum(list(seconds)[1:]) for seconds in ((line["seconds"] for line in lines), plain["seconds"]))
        print(f"furthest {furthest:.1e}; seconds without the first step: {own:.1f} and {other:.1f}")
    else:
        print(" ".join(f"{line['loss']:.4f}" for line in lines))


if __name__ == "__main__":
    main()
