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

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "helpers"), str(TESTS.parent / "src")]
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_TELEMETRY": "1"}

import datasets  # noqa: E402
import torch  # noqa: E402

from byeori import cli  # noqa: E402
from byeori.commands import recipes  # noqa: E402, F401  (recipes: imported once, before the forks)
from byeori.support.console import quiet_libraries  # noqa: E402
from byeori.train import checkpoint  # noqa: E402
from conftest import byte_level_tokenizer, sample_rows, tiny_llama  # noqa: E402
from runs import DEFAULTS, checkpoints, flags, leftovers, log, sha  # noqa: E402

# 23 rows make 6 steps an epoch, the last one smaller
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"num_epochs": 5, "save_steps": 1, "save_total_limit": 2},
    "noisy": {
        "num_epochs": 4.5,
        "save_steps": 2,
        "save_total_limit": 1,
        "lora_dropout": 0.2,
        "neftune_noise_alpha": 5.0,
        "val_set_size": 3,
        "eval_steps": 4,
    },
    "sorted": {
        "num_epochs": 5,
        "save_steps": 3,
        "save_total_limit": "none",
        "group_by_length": True,
        "lr_scheduler": "cosine",
        "micro_batch_size": 1,
        "logging_steps": 2,
    },
    "pairs": {"command": "dpo", "num_epochs": 4, "save_steps": 2, "save_total_limit": 2, "lora_dropout": 0.1},
}
MODES = ("any time", "saving", "any time", "at a call")
FILES = ("adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json")
LIMIT = 120.0  # seconds that a run may take before it counts as hung


@dataclass(kw_only=True)
class Place:
    """Where everything of a torture lies, and how long undisturbed runs take."""

    folder: Path
    model: Path
    lives: dict[tuple[str, int], float] = field(default_factory=dict)

    def whole(self, variant: str, world: int) -> Path:
        return self.folder / f"whole-{variant}-{world}"


def prepare(folder: Path) -> Place:
    """A tiny model, 23 rows and 23 pairs."""
    model = folder / "model"
    quiet_libraries()
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    titles = [{**row, "document": row["document"][:60]} for row in sample_rows("titles-ko-train.jsonl")[:23]]
    for command, rows in (("sft", titles), ("dpo", sample_rows("preference-ko.jsonl")[:23])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{command}.jsonl").write_text(text, encoding="utf-8")
    return Place(folder=folder, model=model)


# ---- processes ---------------------------------------------------------------------------------------------------

_store: list[torch.distributed.TCPStore] = []  # of the group that runs


def start(
    place: Place,
    output: Path,
    variant: str,
    world: int,
    before: Callable[[], None] = lambda: None,
    told: Path | None = None,
) -> list[int]:
    """Fork the processes of one run into a group of their own; the first one's id names the group.

    before: called in each of them. told: what they say goes to a file of this name (`output`'s without) and .txt.
    """
    values = DEFAULTS | VARIANTS[variant] | {"base_model": place.model, "output_dir": output}
    command = values.pop("command", "sft")
    values |= {"data_path": place.folder / f"{command}.jsonl", "resume_from_checkpoint": "latest"}
    arguments = [command, *flags(values)]
    # torchrun's agent holds the store, which outlives each of the processes
    _store[:] = [torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)] * (world > 1)
    port = _store[0].port if _store else 0
    told = (told or output).with_suffix(".txt")
    members: list[int] = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _become(arguments, rank, world, port, told, place.folder, members, before)
        os.setpgid(child, members[0] if members else child)
        members.append(child)
    return members


def _become(
    arguments: list[str],
    rank: int,
    world: int,
    port: int,
    told: Path,
    folder: Path,
    members: list[int],
    before: Callable[[], None],
) -> None:
    """In the fork: be one process of a run, and end with it."""
    code = 99
    try:
        os.setpgid(0, members[0] if members else 0)
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        scratch = told.with_suffix(".scratch")
        scratch.mkdir(exist_ok=True)
        tempfile.tempdir = str(scratch)
        os.environ["BYEORI_CACHE"] = str(scratch / "byeori")
        datasets.config.HF_DATASETS_CACHE = folder / "cache" if "whole" in told.name else scratch / "cache"
        descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        before()
        code = cli.main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(members: list[int], seconds: float) -> list[int] | None:
    """The exit codes, or None where a process goes on after so many seconds.

    As torchrun does, it asks the others to stop once one has failed.
    """
    deadline, codes = time.monotonic() + seconds, dict.fromkeys(members, None)
    while None in codes.values():
        for member in (member for member, code in codes.items() if code is None):
            done, status = os.waitpid(member, os.WNOHANG)
            if done:
                codes[member] = os.waitstatus_to_exitcode(status)
                for other in (other for other, code in codes.items() if code is None and codes[member]):
                    os.kill(other, signal.SIGTERM)
        if None in codes.values():
            if time.monotonic() > deadline:
                return None
            time.sleep(0.002)
    return list(codes.values())


def kill(members: list[int]) -> None:
    """SIGKILL to the whole group, where it is not gone already, and wait for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(members[0], signal.SIGKILL)
    for member in members:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(member, 0)


def finish(members: list[int], output: Path) -> None:
    """Let a run end by itself."""
    codes = wait(members, LIMIT)
    if codes is None:
        kill(members)
    if codes != [0] * len(members):
        raise AssertionError(f"the run ended with {codes}:\n{output.with_suffix('.txt').read_text()[-3000:]}")


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


# ---- comparing ---------------------------------------------------------------------------------------------------


def unequal(whole: Path, output: Path) -> list[str]:
    """What differs between an undisturbed run and a resumed one."""
    last = checkpoints(whole)[-1]
    names = [FILES[0], "order.json", *(f"checkpoint-{last}/{name}" for name in FILES)]
    found = [name for name in names if not (output / name).is_file() or sha(whole / name) != sha(output / name)]
    if log(whole, timeless=True) != log(output, timeless=True):
        found.append("train_log.jsonl")
    if checkpoints(whole) != checkpoints(output):
        found.append(f"checkpoints {checkpoints(output)}, not {checkpoints(whole)}")
    return found + damaged(output) + leftovers(output)


def damaged(output: Path) -> list[str]:
    """Checkpoints that are not whole: a kill must leave none under its final name."""
    problems = {folder.name: checkpoint.verify(folder) for _, folder in checkpoint.steps(output)}
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


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
    torch.set_num_threads(1)
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
