"""Multi-turn rows: an example for each turn against one row per conversation, `python benchmarks/turns.py`.

200 conversations of three exchanges (a short description of a Debian package and its Korean title), and 24 more that
are held out. The embedded model is trained for an epoch in each way, in processes of their own that alternate: `turns`
(as byeori does), `row` (the whole conversation as one example, its answers masked in, as other tools do) and `apart`
(turns without shared prefixes).

`keeps` is the shipped chat template gemma; `rewrites` writes an empty reasoning block before the last answer and leaves
it out of history, as Qwen3's does. The loss is that of the held-out answers after the prompts that a server sends.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import ROOT, demo_model

TRAINED, HELD_OUT, EXCHANGES = 200, 24, 3
LONGEST = 200  # characters of a description
WAYS = {"turns": {}, "row": {"kind": "row"}, "apart": {"share_prefixes": "off"}}
OPEN, CLOSE = "<start_of_turn>model\n", "<end_of_turn>"
BLOCK = "{%- if message.role == 'assistant' and loop.last -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"


def main() -> int:
    """Make the rows, train and measure each way, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROOT.parent / "shared" / "data" / "ko_debian_title.jsonl")
    parser.add_argument("--out", type=Path, default=Path("bench-output") / "turns")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("TEMPLATE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        print(json.dumps(measured(args.out, *args.one)))
        return 0
    conversations(args.rows, args.out)
    templates(args.out)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for round_number in range(args.rounds):
        for template, ways in (("keeps", WAYS), ("rewrites", ("turns", "row"))):
            for way in ways if round_number == 0 else ("turns", "row") if template == "keeps" else ():
                command = [sys.executable, __file__, "--out", str(args.out), "--one", template, way]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found.setdefault((template, way), []).append(json.loads(done.stdout.splitlines()[-1]))
                print(template, way, found[template, way][-1], flush=True)
    print(table(found))
    return 0


def conversations(rows: Path, out: Path) -> None:
    """Write the conversations to train and those that are held out."""
    read = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    read = [row for row in read if len(row["document"]) <= LONGEST]
    assert len(read) >= (TRAINED + HELD_OUT) * EXCHANGES
    talks = []
    for start in range(0, (TRAINED + HELD_OUT) * EXCHANGES, EXCHANGES):
        messages = []
        for row in read[start : start + EXCHANGES]:
            messages.append({"role": "user", "content": row["document"]})
            messages.append({"role": "assistant", "content": row["title"]})
        talks.append(json.dumps({"messages": messages}, ensure_ascii=False))
    (out / "train.jsonl").write_text("\n".join(talks[:TRAINED]) + "\n", encoding="utf-8")
    (out / "held-out.jsonl").write_text("\n".join(talks[TRAINED:]) + "\n", encoding="utf-8")


def templates(out: Path) -> None:
    """Write the two chat templates."""
    text = (ROOT / "src" / "byeori" / "data" / "chat_templates" / "gemma.jinja").read_text(encoding="utf-8")
    line = "{{- (system if loop.first"
    assert line in text
    (out / "keeps.jinja").write_text(text, encoding="utf-8")
    (out / "rewrites.jinja").write_text(text.replace(line, f"{BLOCK}\n{line}"), encoding="utf-8")


def measured(out: Path, template: str, way: str) -> dict[str, float]:
    """Train in one way, and return its tokens, its speed and the loss on held-out turns before and after."""
    from byeori.commands.train import train
    from byeori.config import SftSettings, check
    from byeori.data.row_kinds import ANSWER

    more = dict(WAYS[way])
    kind = replace(ANSWER, name="row", encode=whole_row) if more.pop("kind", None) else ANSWER
    settings = {
        "base_model": str(demo_model()),
        "data_path": str(out / "train.jsonl"),
        "output_dir": str(out / f"{template}-{way}"),
        "chat_template": str(out / f"{template}.jinja"),
        "overwrite_output_dir": True,
        "num_epochs": 1,
        "learning_rate": 3e-4,
        "cutoff_len": 2048,
        **more,
    }
    result = train(check(SftSettings, settings), row_kind=kind)
    steps = [json.loads(line) for line in (result.output_dir / "train_log.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "unique_tokens" in step]
    seconds = sum(step["seconds"] for step in steps[1:])
    return {
        "tokens": sum(step["tokens"] for step in steps),
        "unique_tokens": sum(step["unique_tokens"] for step in steps),
        "target_tokens": sum(step["target_tokens"] for step in steps),
        "seconds": seconds,
        "targets_per_second": sum(step["target_tokens"] for step in steps[1:]) / seconds,
        **held_out_loss(result.output_dir, out / "held-out.jsonl"),
    }


def whole_row(row: dict[str, Any], encoding: Any) -> list[Any]:
    """One example of the whole conversation, by one rendering; all answers and the ends of their turns are trained."""
    from byeori.data.tokenize import Example

    text = encoding.tokenizer.apply_chat_template(row["messages"], tokenize=False)
    encoded = encoding.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    answers = [(found.end(1), found.end()) for found in re.finditer(f"({OPEN}).*?{CLOSE}", text, re.DOTALL)]
    trained = [any(low <= start < high for low, high in answers) for start, _ in encoded["offset_mapping"]]
    edges = [at for at in range(1, len(trained) + 1) if (at < len(trained) and trained[at]) != trained[at - 1]]
    spans = tuple(zip(edges[::2], edges[1::2], strict=True))
    assert len(spans) == EXCHANGES
    return [Example(token_ids=encoded["input_ids"], targets=spans, row=int(row["__row__"]))]


def held_out_loss(adapter: Path, rows: Path) -> dict[str, float]:
    """The mean loss of the held-out answers, tokens and the end of the turn, without and with the adapter."""
    import torch

    from byeori.artifacts import saved_model
    from byeori.batch import forest
    from byeori.data.tokenize import encode_turns
    from byeori.model import forward

    saved = saved_model.find(str(adapter))
    encoding = saved_model.encoding(saved, None)
    model = saved_model.load_weights(saved, "float32", torch.device("cpu"))
    forward.use_forest_attention(model)
    sums = {"before": 0.0, "after": 0.0}
    count = 0
    with torch.no_grad():
        for line in rows.read_text(encoding="utf-8").splitlines():
            built = forest.build(encode_turns(json.loads(line), encoding))
            count += built.target_count
            sums["after"] -= float(forward.forest_logprobs(model, built).sum())
            with model.disable_adapter():
                sums["before"] -= float(forward.forest_logprobs(model, built).sum())
    return {f"loss_{name}": value / count for name, value in sums.items()}


def table(found: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """What was measured, as Markdown."""
    lines = ["| history | examples | tokens | computed | targets | targets/s | held-out loss before | after |"]
    lines.append("|---|---|" + "---:|" * 6)
    for (template, way), runs in found.items():
        first = runs[0]
        counts = [f"{first[name]:,.0f}" for name in ("tokens", "unique_tokens", "target_tokens")]
        speed = ", ".join(f"{run['targets_per_second']:.0f}" for run in runs)
        losses = [f"{first[name]:.4f}" for name in ("loss_before", "loss_after")]
        lines.append(f"| {template} | {way} | " + " | ".join([*counts, speed, *losses]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
