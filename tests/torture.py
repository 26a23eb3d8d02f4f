"""Runs killed at random instants, resumed, and compared bit by bit with runs that were not: `make torture`.

    python tests/torture.py [runs] [seed]        100 runs without a number; RUNS in the environment does the same

Every run trains a tiny random model; half of them in 2 processes, joined as torchrun joins them. Each is killed with
SIGKILL (the whole group), a quarter of them a second time while they resume, then resumed to the end. The kill comes

    any time     at an instant drawn evenly from the life of an undisturbed run, start and end included
    saving       a moment after a checkpoint's temporary folder is seen
    at a call    at the n-th file operation of a saving: between two renames, say

Adapter, optimizer, counters, order and log (without times and memory) must be those of the undisturbed run.
Importing torch and transformers takes longer than such a run: they are imported once, and every process is a fork.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "src")]

# first: it sets the environment that torch reads
from killed_runs import LIMIT, VARIANTS, Place, damaged, finish, kill, prepare, start, unequal, wait  # noqa: E402, I001
from byeori.train import checkpoint  # noqa: E402
from runs import checkpoints, leftovers  # noqa: E402

MODES = ("any time", "saving", "any time", "at a call")


# ---- kills -------------------------------------------------------------------------------------------------------


def killed_any_time(place: Place, output: Path, variant: str, world: int, dice: random.Random) -> None:
    members = start(place, output, variant, world)
    time.sleep(dice.uniform(0, place.lives[variant, world]))
    kill(members)


def killed_saving(place: Place, output: Path, variant: str, world: int, dice: random.Random) -> None:
    """Wait until the n-th temporary folder is seen, and a moment more."""
    members = start(place, output, variant, world)
    wanted, seen, deadline = dice.randint(1, 10), set(), time.monotonic() + place.lives[variant, world]
    while time.monotonic() < deadline and len(seen) < wanted:
        seen |= set(output.glob(".*.tmp"))
    time.sleep(dice.choice([0.0, dice.uniform(0, 0.003), dice.uniform(0, 0.02)]))
    kill(members)


def killed_at_a_call(place: Place, output: Path, variant: str, world: int, dice: random.Random) -> None:
    """The main process kills the group itself, before or after the n-th file operation of its savings."""
    left, after = [dice.randint(1, 250)], dice.random() < 0.5

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not after:
                os.killpg(0, signal.SIGKILL)
            result = real(*arguments, **named)
            if left[0] == 0:
                os.killpg(0, signal.SIGKILL)
            return result

        return call

    def before() -> None:
        if os.environ.get("RANK", "0") == "0":
            for owner, name in ((checkpoint, "flush"), (checkpoint, "save_file"), (shutil, "rmtree")):
                setattr(owner, name, counted(getattr(owner, name)))
            for name in ("rename", "replace", "mkdir", "write_text", "unlink"):
                setattr(Path, name, counted(getattr(Path, name)))

    members = start(place, output, variant, world, before)
    wait(members, LIMIT)
    kill(members)


KILLS = {"any time": killed_any_time, "saving": killed_saving, "at a call": killed_at_a_call}


def instant(output: Path) -> str:
    """What a killed run was doing, by what it left."""
    if (output / "adapter_model.safetensors").is_file() and not leftovers(output):
        return "at the end"
    if any(name.startswith((".checkpoint", ".final")) for name in leftovers(output)):
        return "while saving"
    if checkpoints(output):
        return "between checkpoints"
    return "before the first checkpoint"


def torture(place: Place, number: int, dice: random.Random) -> tuple[str, list[str]]:
    """One run: killed, perhaps killed again, resumed, compared. (when it was killed, what is wrong)"""
    world, mode = 1 + number % 2, MODES[number // 2 % len(MODES)]
    variant = list(VARIANTS)[number // 2 % len(VARIANTS)]
    if (variant, world) not in place.lives:
        began = time.monotonic()
        finish(start(place, place.whole(variant, world), variant, world), place.whole(variant, world))
        place.lives[variant, world] = time.monotonic() - began
    output = place.folder / f"run-{number}"
    when, wrong = "", []
    for kills in range(2):
        if kills and dice.random() > 0.25:
            break
        KILLS[mode if not kills else "any time"](place, output, variant, world, dice)
        when += (", again " if kills else "") + instant(output)
        wrong += damaged(output)
    finish(start(place, output, variant, world), output)
    wrong += unequal(place.whole(variant, world), output)
    for path in (output, output.with_suffix(".scratch")) if not wrong else ():
        shutil.rmtree(path)
    return f"{world} process{'es' * (world - 1)}, {variant}, {mode}: killed {when}", wrong


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 where every run ended with the bits of an undisturbed one."""
    runs = int(arguments[0] if arguments else os.environ.get("RUNS") or 100)
    seed = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().randrange(10**6)
    dice, began = random.Random(seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="byeori-torture-"))
    place, good, instants = prepare(folder), 0, Counter[str]()
    print(f"{runs} runs, seed {seed}, in {folder}", flush=True)
    for number in range(runs):
        try:
            when, wrong = torture(place, number, dice)
        except AssertionError as error:
            when, wrong = f"run {number}: it did not end well", [str(error)]
        good += not wrong
        instants[when.partition(": killed ")[2].partition(",")[0]] += 1
        print(f"{number + 1}/{runs}  {when}  {wrong or 'equal'}", flush=True)
    print(f"{good} of {runs} ended with the bits of an undisturbed run; {time.monotonic() - began:.0f} s; killed")
    for name, count in instants.most_common():
        print(f"    {count:4d}  {name}")
    if good == runs:
        shutil.rmtree(folder)
    return 0 if good == runs else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
