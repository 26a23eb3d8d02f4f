"""Broken and hostile input to every command: `python tests/fuzz.py [COUNT] [SEED]`; COUNT 0 tries every field.

Each case copies a small world (a model, its adapter, a merged model, rows, a template, settings), damages one file or
some flags of it, and runs a command in a fork. Whatever is wrong must be one sentence and exit code 2. What is counted:

    traceback    an exception that no one turned into a sentence
    hang         no end after LIMIT seconds of computing, or ten times as many in all
    memory       more than ROOM bytes above what the process began with
    control      a control character on the terminal
    long         a sentence of more than LONG characters
    code         another exit code than 0, 2 and 130
    escaped      a file written outside the case's folder, or code that ran
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "src")]

from small_world import build, child, imported  # noqa: E402, I001  (first: it sets the environment)
import mutations  # noqa: E402
from byeori import config  # noqa: E402

COMMANDS = ("preview", "sft", "dpo", "generate", "merge", "compare", "audit", "publish", "plan", "export", "chat")
RESUME = ["--output_dir", "resumed", "--resume_from_checkpoint", "latest"]
LIMIT, ROOM, LONG = 20.0, 1.5e9, 2500
CASES = (  # how often, command, the file that is damaged or "", further flags
    (8, "preview", "rows.jsonl", ["--template", "template.txt"]),
    (4, "preview", "rows.csv", ["--template", "template.txt"]),
    (4, "preview", "rows.json", ["--template", "template.txt"]),
    (3, "preview", "rows.parquet", ["--template", "template.txt"]),
    (8, "preview", "chats.jsonl", []),
    (6, "preview", "template.txt", ["--template", "template.txt"]),
    (4, "preview", "base/chat_template.jinja", []),
    (5, "preview", "base/tokenizer.json", ["--template", "template.txt"]),
    (4, "preview", "base/tokenizer_config.json", ["--template", "template.txt"]),
    (5, "sft", "base/config.json", []),
    (2, "sft", "base/model.safetensors", []),
    (2, "sft", "base/generation_config.json", []),
    (6, "sft", "settings.yaml", ["--config", "settings.yaml"]),
    (4, "dpo", "pairs.jsonl", []),
    (4, "sft", "resumed/checkpoint-1/*", RESUME),
    (3, "sft", "resumed/*", RESUME),
    (6, "generate", "adapter/*", []),
    (3, "generate", "base/generation_config.json", []),
    (4, "merge", "adapter/*", []),
    (3, "merge", "base/model.safetensors", []),
    (4, "compare", "adapter/*", []),
    (3, "publish", "adapter/*", []),
    (3, "publish", "merged/*", ["--folder", "merged"]),
    (4, "plan", "base/config.json", []),
    (2, "plan", "prices.csv", ["--prices", "prices.csv"]),
    (2, "preview", "saved/*", ["--data_path", "saved", "--template", "template.txt"]),
    (2, "audit", "adapter/*", []),
    (2, "publish", "exported/*", ["--folder", "exported"]),
    (3, "preview", "rows.xlsx", ["--template", "template.txt"]),
    (3, "preview", "rows.jsonl.gz", ["--template", "template.txt"]),
    (2, "preview", "rows.jsonl.zst", ["--template", "template.txt"]),
    (3, "export", "merged/*", []),
    (2, "chat", "adapter/*", []),
    (10, "", "", []),  # damaged flags of any command
)  # fmt: skip


FIELDS = (
    ("base/config.json", "sft"),
    ("base/generation_config.json", "generate"),
    ("base/tokenizer_config.json", "sft"),
    ("adapter/adapter_config.json", "generate"),
    ("adapter/adapter_config.json", "publish"),
)


def arguments(command: str) -> list[str]:
    """Flags of a command in the world, as its working folder."""
    train = ["--base_model", "base", "--output_dir", "out", "--max_steps", "1", "--dtype", "float32"]
    short = ["--max_rows", "2", "--max_new_tokens", "2"]
    return {
        "preview": ["--base_model", "base", "--data_path", "rows.jsonl", "--rows", "1"],
        "sft": [*train, "--template", "template.txt", "--data_path", "rows.jsonl", "--cutoff_len", "128"],
        "dpo": [*train, "--data_path", "pairs.jsonl"],
        "generate": ["--model", "adapter", "--max_new_tokens", "2", "--document", "봄"],
        "merge": ["--peft_model_path", "adapter", "--output_dir", "out"],
        "compare": ["--adapter", "adapter", "--data_path", "rows.jsonl", "--output_dir", "out", *short],
        "audit": ["--adapter", "adapter", "--data_path", "rows.jsonl", "--output_dir", "out"],
        "publish": ["--folder", "adapter", "--repo_id", "me/x", "--dry-run"],
        "plan": ["--base_model", "base", "--gpu", "t4"],
        "export": ["--model", "merged", "--output_dir", "out", "--format", "vllm"],
        "chat": ["--model", "adapter"],
    }[command]  # fmt: skip


def damage(dice: random.Random, place: Path) -> tuple[str, list[str]]:
    """Damage the world in `place`; returns what was damaged, and the command line to run."""
    weights = [case[0] for case in CASES]
    _, command, target, more = dice.choices(CASES, weights)[0]
    if not command:
        command = dice.choice(COMMANDS)
        given = arguments(command)
        known = [*config.SftSettings.model_fields, "nope", "help", "config"]
        for _ in range(dice.choice([1, 1, 2])):
            if dice.random() < 0.5:
                at = dice.randrange(len(given))
                given[at] = dice.choice(mutations.WORDS)
            else:
                given += [f"--{dice.choice(known)}", dice.choice(mutations.WORDS)]
        return f"{command} {given!r}", [command, *given]
    paths = sorted(path for path in place.glob(target) if path.is_file() and path.name != "manifest.json")
    path = dice.choice(paths)
    if dice.random() < 0.06:
        mutations.another_kind(dice, path)
    else:
        path.write_bytes(mutations.file(dice, path.name, path.read_bytes()))
    given = [command, *arguments(command), *more]
    if target.startswith(("rows", "chats", "pairs")):
        given += ["--data_path", target]
    return f"{command} {path.relative_to(place)}", given


def every_field(world: Path) -> list[tuple[str, list[str], str, object]]:
    """Return (file, command line, field, wrong value) for every field of the JSON files beside weights."""
    found = []
    for name, command in FIELDS:
        for field in json.loads((world / name).read_text(encoding="utf-8")):
            found += [(name, [command, *arguments(command)], field, value) for value in mutations.WRONG]
    return found


def spoil(place: Path, name: str, given: list[str], field: str, value: object) -> tuple[str, list[str]]:
    """Write one wrong value into a JSON file."""
    path = place / name
    loaded = json.loads(path.read_text(encoding="utf-8"))
    path.write_bytes(mutations.dumped(loaded | {field: value}))
    return f"{given[0]} {name} {field} = {str(value)[:60]!r}", given


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def computed(pid: int) -> float:
    """Return the processor time of a process: beside other work its end comes later."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def run(place: Path, given: list[str]) -> tuple[str, str]:
    """Run one command line; returns the kind of its fault, or "", and what it printed."""
    with tempfile.TemporaryFile() as out:
        pid = os.fork()
        if pid == 0:
            child(place, given, out.fileno())
        began, first, fault, status = time.monotonic(), resident(pid), "", 0
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if computed(pid) > LIMIT or time.monotonic() - began > 10 * LIMIT:
                fault = "hang"
            elif resident(pid) - first > ROOM:
                fault = "memory"
            if fault:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            time.sleep(0.005)
        else:
            status = os.waitstatus_to_exitcode(ended[1])
        out.seek(0)
        printed = out.read(400_000).decode("utf-8", "replace")
    if fault:
        return fault, printed
    if "Traceback (most recent call last)" in printed:
        return "traceback", printed
    if status not in (0, 2, 130):
        return f"code {status}", printed
    if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printed.replace("\r\n", "\n")):
        return "control", printed
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if status == 2 and not errors:
        return "no sentence", printed
    return ("long", printed) if any(len(line) > LONG for line in errors) else ("", printed)


def fuzz(count: int, seed: int, report: Callable[[str], None] = print) -> Counter[str]:
    """Run `count` cases, or one for each field and wrong value with 0; returns how many there were of each fault.

    Cases are independent: case n has seed SEED-n.
    """
    faults: Counter[str] = Counter()
    imported(("preview", "train", "generate", "merge", "compare", "audit", "publish", "plan", "export", "chat"))
    with tempfile.TemporaryDirectory(prefix="byeori-fuzz-") as folder:
        os.environ["BYEORI_CACHE"] = os.environ.get("BYEORI_CACHE", str(Path(folder) / "cache"))
        world = Path(folder) / "world"
        world.mkdir()
        build(world)
        fields = [] if count else every_field(world)
        for number in range(count or len(fields)):
            dice = random.Random(f"{seed}-{number}")
            place = Path(folder) / "case"
            shutil.copytree(world, place)
            beside = set(Path(folder).iterdir())
            what, given = damage(dice, place) if count else spoil(place, *fields[number])
            fault, printed = run(place, given)
            if (place / "ran").exists() or set(Path(folder).iterdir()) - beside:
                fault = "escaped"
            if fault:
                faults[fault] += 1
                report(f"--- {seed}-{number} {fault}: {what[:300]!r}\n{printed[-1500:]!s}")
            shutil.rmtree(place)
    return faults


def main() -> int:
    count, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 2000, int(sys.argv[2]) if len(sys.argv) > 2 else 1
    faults = fuzz(count, seed)
    print(f"{count or 'all fields'} cases, seed {seed}: {sum(faults.values())} faults {dict(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
