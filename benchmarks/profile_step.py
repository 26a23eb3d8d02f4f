"""How fast a training step is with each part of `--speed`, one process, A B A B:

    python benchmarks/profile_step.py                                  # off, then one part more at a time
    python benchmarks/profile_step.py off auto --threads 2 --rounds 5  # final numbers, on a quiet machine
    python benchmarks/profile_step.py auto --profile                   # time by operation, by torch.profiler

A step is a forward and a backward pass over the first rows of a file, packed as training packs them, without the
optimizer. Seconds are those of the process (its CPU time) with one thread, which other work on the machine disturbs
least, and those of the clock with more. The share of the peak counts 4 FLOP for each weight outside the embeddings and
token (a shared prefix counts once) and for each weight of the head and target, against a bf16 product of 2,048 squared
that is measured between the steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byeori.model import adapter, wrap

PARTS = ["off", "attention", "attention,kernels", "attention,kernels,norms", "attention,kernels,norms,mlp"]
PARTS += ["attention,kernels,norms,mlp,heads", "attention,kernels,norms,mlp,heads,last_layer", "auto"]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "ko_petitions_title.jsonl"
    parser.add_argument("speeds", nargs="*", default=PARTS, help="values of --speed; +compile compiles the layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help="micro_batch_tokens")
    parser.add_argument("--cutoff_len", type=int, default=1024)
    parser.add_argument("--targets", default="gate_proj,up_proj,down_proj")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--template", default="title-ko")
    parser.add_argument("--model", help="folder of the base model; else the embedded one")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Measure and print a table."""
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # before torch is imported
    import torch

    torch.set_num_threads(args.threads)
    model, forests = prepared(args)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    plain = {module: module.__dict__.get("forward") for module in model.modules()}
    tokens = sum(forest.unique_tokens for forest in forests)
    seconds: dict[str, list[float]] = {speed: [] for speed in args.speeds}
    peaks = []
    for round_ in range(-1, args.rounds):  # the first one warms up
        for speed in args.speeds:
            choose(model, plain, speed)
            if args.profile and round_ == 0:
                profile(lambda: step(model, forests))
            peaks.append(peak(clock))
            start = clock()
            step(model, forests)
            if round_ >= 0:
                seconds[speed].append(clock() - start)
    print(f"{tokens} tokens in {len(forests)} forests, {args.threads} threads, peak {max(peaks) / 1e9:,.0f} GFLOP/s")
    work = flops(model, forests)
    first = statistics.median(seconds[args.speeds[0]])
    print("| --speed | tokens/s | as often as the first | share of the peak |\n|---|---:|---:|---:|")
    for speed, found in seconds.items():
        median = statistics.median(found)
        share = work / median / max(peaks)
        print(f"| {speed} | {tokens / median:,.0f} | {first / median:.2f} | {share:.0%} |")
    return 0


def prepared(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The model with a new adapter, and the forests of the first rows."""
    import torch

    from byeori.batch import forest, loader, packing
    from byeori.commands._rows import begin, prepare
    from byeori.config import SftSettings, check
    from byeori.data import tokenized
    from byeori.data.row_kinds import ANSWER
    from byeori.distributed.processes import init_processes
    from byeori.kernels import lora_linear
    from byeori.model import demo_model, forward, load

    name = args.model or str(demo_model.embedded_model(print))
    settings = check(
        SftSettings,
        {
            "base_model": name,
            "data_path": str(args.data),
            "template": args.template,
            "cutoff_len": args.cutoff_len,
            "max_rows": 200,
            "output_dir": "none",
        },
    )
    settings, start = begin(settings)
    prepared = prepare(settings, start, row_kind=ANSWER, processes=init_processes())[0]
    rows = tokenized.Rows(table=prepared.train)
    plan = loader.schedule(len(rows), batch_size=args.rows, num_epochs=1, max_steps=None, seed=42)
    examples = [rows.unit(int(index))[0] for index in loader.step_rows(plan, 0, {})]
    tokens = [[forest.needed(example)] for example in examples]
    groups = packing.micro_batches(tokens, size=None, tokens=args.tokens, share=True)
    device = torch.device("cpu")
    base = load.load_model(name, dtype=load.resolve_dtype(args.dtype, device), device=device)
    model = adapter.attach(base, r=16, alpha=16, dropout=0.0, targets=args.targets.split(","), seed=42)
    lora_linear.fuse(model)
    forward.use_forest_attention(model)
    return model.train(), [forest.build([examples[index] for index in group]) for group in groups]


def choose(model: Any, plain: dict[Any, Any], speed: str) -> None:
    """Take every fused function off, and put those of a setting on."""
    import torch

    from byeori.kernels import patch as speeds

    for module, forward in plain.items():
        module.__dict__.pop("forward", None)
        module._compiled_call_impl = None
        if forward is not None:
            module.forward = forward
    for module in model.modules():
        module.__dict__.pop("byeori_attention", None)
    parts = speeds.parts(speed.removesuffix("+compile").split(","), torch.device("cpu"))
    speeds.fuse(model.get_base_model(), parts)
    if speed.endswith("+compile"):
        wrap.compile_layers(model.get_base_model())


def step(model: Any, forests: list[Any]) -> None:
    """A forward and a backward pass, without the optimizer."""
    from byeori.model import forward

    weight = sum(forest.target_count for forest in forests)
    for forest in forests:
        with forward.accelerated(model):
            (-forward.forest_logprobs(model, forest).sum() / weight).backward()
    for parameter in model.parameters():
        parameter.grad = None


def flops(model: Any, forests: list[Any]) -> float:
    """As the head of this file says."""
    import torch

    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    apart = {id(table) for table in tables} | {id(model.get_output_embeddings().weight)}
    body = sum(p.numel() for n, p in model.named_parameters() if id(p) not in apart and "lora_" not in n)
    head = model.get_output_embeddings().weight.numel()
    return 4.0 * sum(body * forest.unique_tokens + head * forest.target_count for forest in forests)


def peak(clock: Callable[[], float], size: int = 2048) -> float:
    """FLOP/s of a bf16 product."""
    import torch

    left, right = torch.randn(2, size, size).to(torch.bfloat16)
    left @ right
    start = clock()
    for _ in range(3):
        left @ right
    return 3 * 2.0 * size**3 / (clock() - start)


def profile(function: Callable[[], None]) -> None:
    """Print the slowest operations."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU]) as found:
        function()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    sys.exit(main())
