"""The engines of generate and compare beside each other, and servers that `byeori serve` starts.

    python benchmarks/engines.py ADAPTER ROWS.jsonl [--rows 24] [--vllm_python VENV/bin/python] [--serve vllm,llamacpp]

Each engine runs `byeori compare` on the same rows in float32, in a process of its own; answers and losses are compared
with those of transformers. vLLM runs in an environment that has it beside byeori's dependencies. A server is asked with
the curl line that it prints, and its answer is compared with that of `byeori generate`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Run the engines, then the servers; print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--vllm_python", default="")
    parser.add_argument("--vllm_path", default="", help="more folders of modules for it")
    parser.add_argument("--serve", default="llamacpp,transformers")
    args = parser.parse_args()
    print(", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "xllamacpp")))
    pythons = {"transformers": sys.executable, "llamacpp": sys.executable, "vllm": args.vllm_python}
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for engine in (name for name, python in pythons.items() if python):
            began = time.monotonic()
            found[engine] = _compare(engine, pythons[engine], args, Path(scratch) / engine)
            print(
                _report(engine, found["transformers"], found[engine]), f"{time.monotonic() - began:.0f} s", flush=True
            )
        for engine in filter(None, args.serve.split(",")):
            print(_serve(engine, pythons[engine], args, Path(scratch)), flush=True)


def _environment(args: argparse.Namespace, python: str) -> dict[str, str]:
    more = [args.vllm_path] if python == args.vllm_python and args.vllm_path else []
    path = os.pathsep.join([str(ROOT / "src"), *more])
    folder = str(Path(python).parent)
    found = os.environ | {"PYTHONPATH": path, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return found | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def _compare(engine: str, python: str, args: argparse.Namespace, output: Path) -> list[dict[str, Any]]:
    command = [
        python,
        "-P",
        "-m",
        "byeori",
        "compare",
        args.adapter,
        args.data,
        "--engine",
        engine,
        "--dtype",
        "float32",
    ]
    command += ["--max_rows", str(args.rows), "--max_new_tokens", str(args.max_new_tokens), "--output_dir", str(output)]
    done = subprocess.run(command, env=_environment(args, python), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{engine}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in (output / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def _report(engine: str, expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    sides = []
    for side in ("base", "tuned"):
        pairs = list(zip(expected, found, strict=True))
        same = sum(one[f"{side}_output"] == other[f"{side}_output"] for one, other in pairs)
        loss = max(abs(one[side]["loss"] - other[side]["loss"]) for one, other in pairs)
        stops = sum(one[side]["stopped"] == other[side]["stopped"] for one, other in pairs)
        sides.append(f"{side}: {same} of {len(pairs)} answers equal, {stops} ends, losses within {loss:.1e}")
    return f"{engine}: {'; '.join(sides)};"


def _serve(engine: str, python: str, args: argparse.Namespace, scratch: Path) -> str:
    log = scratch / f"{engine}.log"
    flags = ["--engine", engine, "--port", "8139", "--dtype", "float32"]
    flags += ["--engine_args=--max-model-len 2048 --enforce-eager"] if engine == "vllm" else []
    with log.open("w") as file:
        command = [python, "-P", "-m", "byeori", "serve", args.adapter, *flags]
        process = subprocess.Popen(command, env=_environment(args, python), stdout=file, stderr=file)
    try:
        while not (asked := re.search(r"^curl .*?\n\n", log.read_text(), re.DOTALL | re.MULTILINE)):
            if process.poll() is not None:
                raise SystemExit(f"{engine}: {log.read_text()[-3000:]}")
            time.sleep(0.3)
        reply = subprocess.run(["bash", "-c", asked.group()], capture_output=True, text=True, check=True).stdout
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    answer = json.loads(reply)["choices"][0]["message"]["content"].strip()
    words = re.search(r'"content": "(.*?)"', asked.group())
    assert words is not None
    command = [sys.executable, "-P", "-m", "byeori", "generate", args.adapter, words.group(1), "--dtype", "float32"]
    here = subprocess.run(command, env=_environment(args, sys.executable), capture_output=True, text=True, check=True)
    same = "the answer of byeori generate" if answer == here.stdout.strip() else f"{answer!r}, not {here.stdout!r}"
    return f"serve {engine}: {same}; ended with exit code {code}"


if __name__ == "__main__":
    main()
