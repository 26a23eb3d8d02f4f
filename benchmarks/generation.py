"""Generation on the CPU: byeori's engine, transformers' own generate and llama.cpp on the same prompts, alternating.

    python benchmarks/generation.py MODEL ROWS.jsonl [--rows 100] [--max_new_tokens 48] [--rounds 2]

MODEL: a merged model's folder with its template. Greedy decoding with the same stop tokens; loading is not counted.
Tokens are those up to the end of each answer. Seconds are processor time of all threads, which other work on the
machine disturbs least; ratios come from the best round of each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import saved_model
from byeori.evaluate import generate
from byeori.evaluate.engines.base import Answer, Sampling
from byeori.evaluate.engines.llamacpp import LlamaCpp
from byeori.evaluate.engines.plain import Plain
from byeori.export import gguf_convert, llama_cpp
from byeori.support.console import quiet_libraries


@quiet_libraries()
def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    saved = saved_model.find(args.model)
    encoding = saved_model.encoding(saved, saved_model.template_of(saved, None))
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()[: args.rows]]
    prompts = generate.encode_prompts(rows, encoding, str)
    model = saved_model.load_weights(saved, args.dtype, torch.device("cpu"))
    plain, sampling = Plain(model, saved.tokenizer, batch_size=32), Sampling(max_new_tokens=args.max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        gguf = Path(folder) / "model.gguf"
        gguf_convert.write_model(saved.folder, gguf, "auto")
        context = max(map(len, prompts)) + args.max_new_tokens + 1
        server = llama_cpp.LlamaCpp(gguf, context=context, threads=torch.get_num_threads(), parallel=8)
        llama = LlamaCpp(server, plain.ending, has_adapter=False, losses=lambda: plain)
        contestants: dict[str, Callable[[], list[Answer]]] = {
            "byeori": lambda: _engine(plain, prompts, sampling),
            "transformers, one row at a time": lambda: _own(plain, prompts, sampling, 1),
            "transformers, batches of 8": lambda: _own(plain, prompts, sampling, 8),
            "llama.cpp, 8 at once": lambda: _engine(llama, prompts, sampling),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        answers: dict[str, list[Answer]] = {}
        for _ in range(args.rounds):
            for name, run in contestants.items():
                began, wall = time.process_time(), time.perf_counter()
                answers[name] = run()
                seconds[name].append(time.process_time() - began)
                print(f"{name}: {seconds[name][-1]:.1f} s, {time.perf_counter() - wall:.1f} s on the clock", flush=True)
    _table(prompts, answers, seconds)


def _engine(engine: Any, prompts: list[list[int]], sampling: Sampling) -> list[Answer]:
    found: dict[int, Answer] = {}
    engine.answers(dict(enumerate(prompts)), sampling, "tuned", lambda row, answer: found.update({row: answer}))
    return [found[row] for row in range(len(prompts))]


def _own(plain: Plain, prompts: list[list[int]], sampling: Sampling, size: int) -> list[Answer]:
    """transformers' generate on batches in the order of the file, padded on the left."""
    found = []
    pad = plain.ending.tokenizer.pad_token_id
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        width = max(map(len, batch))
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        with torch.no_grad():
            output = plain.model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=plain.ending.stop_ids,
                pad_token_id=pad,
            )
        found += [plain.ending.answer(row[width:].tolist()) for row in output]
    return found


def _table(prompts: list[list[int]], answers: dict[str, list[Answer]], seconds: dict[str, list[float]]) -> None:
    best = {name: min(times) for name, times in seconds.items()}
    first = answers["byeori"]
    read = sum(map(len, prompts))
    print(f"\n{len(prompts)} rows, {read:,} prompt tokens; {torch.get_num_threads()} threads\n")
    print("| engine | seconds, each round | answer tokens/s | byeori is | same answers |\n|---|---|---:|---:|---:|")
    for name, found in answers.items():
        tokens = sum(answer.tokens for answer in found)
        same = sum(one.text == other.text for one, other in zip(first, found, strict=True))
        times = ", ".join(f"{value:.1f}" for value in seconds[name])
        ratio = best[name] / best["byeori"]
        print(f"| {name} | {times} | {tokens / best[name]:.1f} | {ratio:.2f} x | {same} of {len(found)} |")


if __name__ == "__main__":
    main()
