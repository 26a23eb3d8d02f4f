"""Short runs in forked processes that can be killed, and what makes two of them unequal.

Only scripts import this: it sets the environment of the whole process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_TELEMETRY": "1"}

import datasets
import torch

from byeori import cli
from byeori.commands import train  # noqa: F401  (imported once, before the forks)
from byeori.support.console import quiet_libraries
from byeori.train import checkpoint
from runs import DEFAULTS, checkpoints, flags, leftovers, log, sha
from tiny_models import byte_level_tokenizer, sample_rows, tiny_llama

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


@quiet_libraries()
def prepare(folder: Path) -> Place:
    """A tiny model, 23 rows and 23 pairs."""
    model = folder / "model"
    torch.set_num_threads(1)
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    titles = [{**row, "document": row["document"][:60]} for row in sample_rows("titles-ko-train.jsonl")[:23]]
    for command, rows in (("sft", titles), ("dpo", sample_rows("preference-ko.jsonl")[:23])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{command}.jsonl").write_text(text, encoding="utf-8")
    return Place(folder=folder, model=model)


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
