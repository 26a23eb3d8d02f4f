"""Disks that fill at a random byte: `unshare -mr python tests/full_disk.py [runs] [seed]`.

Half of the runs write to a file system of a random size, half may not make a file longer than a random number of
bytes. Each ends with one sentence and no damaged checkpoint, and goes on to the bits of an undisturbed run once there
is room. One run in four has 2 processes.
"""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "src")]

import killed_runs  # noqa: E402
from killed_runs import LIMIT, Place, damaged, finish, kill, prepare, start, unequal, wait  # noqa: E402
from runs import leftovers  # noqa: E402

VARIANTS = ("short", "sorted")
killed_runs.VARIANTS["short"] = killed_runs.VARIANTS["plain"] | {"num_epochs": 2}
killed_runs.VARIANTS["sorted"] |= {"num_epochs": 2}


def mount(folder: Path, size: str) -> None:
    """Make, or make anew, a file system in memory of so many bytes."""
    folder.mkdir(exist_ok=True)
    how = f"remount,size={size}" if folder.is_mount() else f"size={size}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], check=False).returncode:
        sys.exit(77)


def limit(size: int) -> None:
    """In a process of a run: no file grows longer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill(place: Place, number: int, dice: random.Random) -> tuple[str, list[str]]:
    """One run on a disk that fills, and its end once there is room. (what happened, what is wrong)"""
    world, variant, disk = 2 if number % 4 == 3 else 1, VARIANTS[number // 4 % 2], place.folder / f"disk-{number}"
    output = disk / "out"
    if (variant, world) not in place.lives:
        finish(start(place, place.whole(variant, world), variant, world), place.whole(variant, world))
        place.lives[variant, world] = 0.0
    files = [path.stat().st_size for path in place.whole(variant, world).rglob("*") if path.is_file()]
    told = place.folder / f"run-{number}"
    if number % 2:
        size = dice.randrange(4096, max(files))  # what a run says goes to a file too
        mount(disk, "64m")
        members = start(place, output, variant, world, lambda: limit(size), told=told)
    else:
        size = dice.randrange(4096, sum(-(-size // 4096) * 4096 for size in files))
        mount(disk, str(size))
        members = start(place, output, variant, world, told=told)
    codes = wait(members, LIMIT)
    if codes is None:
        kill(members)
    words = told.with_suffix(".txt").read_text(encoding="utf-8")
    wrong = _judged(codes, words) + damaged(output) + leftovers(output)
    mount(disk, "64m")
    finish(start(place, output, variant, world, told=told), told)
    wrong += unequal(place.whole(variant, world), output)
    subprocess.run(["umount", str(disk)], check=True)
    last = words.strip().splitlines()[-1] if words.strip() else ""
    kind = "file" if number % 2 else "disk"
    return f"{world} process{'es' * (world - 1)}, {variant}, {kind} of {size} bytes: {last[:150]}", wrong


def _judged(codes: list[int] | None, words: str) -> list[str]:
    """What is wrong with the end of a run whose disk filled: one sentence and exit code 2, if it filled at all."""
    if codes is None:
        return ["it hung"]
    errors = [line for line in words.splitlines() if line.startswith("error: ")]
    wrong = [] if max(codes) in (0, 2) else [f"exit codes {codes}"]
    wrong += [] if len(errors) == (max(codes) != 0) else [f"{len(errors)} errors: {errors}"]
    return wrong + (["a traceback: " + words[-1500:]] if "Traceback" in words else [])


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 where nothing was lost, 77 where file systems cannot be mounted."""
    runs = int(arguments[0]) if arguments else 20
    seed = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().randrange(10**6)
    dice, folder = random.Random(seed), Path(tempfile.mkdtemp(prefix="byeori-disks-"))
    place, good = prepare(folder), 0
    print(f"{runs} runs, seed {seed}, in {folder}", flush=True)
    for number in range(runs):
        try:
            what, wrong = fill(place, number, dice)
        except AssertionError as error:
            what, wrong = f"run {number}: it did not go on", [str(error)]
        good += not wrong
        print(f"{number + 1}/{runs}  {what}  {wrong or 'went on to the same bits'}", flush=True)
    print(f"{good} of {runs} full disks: nothing lost")
    if good == runs:
        shutil.rmtree(folder)
    return 0 if good == runs else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
