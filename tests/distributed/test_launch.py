"""`--nproc`: a training command starts itself on several processes; what it says and its exit code stay the same."""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import byeori
import forks
import runs
from byeori import config
from byeori.config import flags
from byeori.distributed import launch
from byeori.errors import AGAIN, ConfigError
from forks import Forked

SCRIPT = Path(__file__).parents[2] / "scripts" / "sft-trainer.py"


def values(model: Path, rows: Path, output: Path, **changes: Any) -> list[str]:
    common = {"base_model": model, "data_path": rows, "output_dir": output, "cutoff_len": 256, "dtype": "float32"}
    return runs.flags(common | {"nproc": 2} | changes)


def command(model: Path, rows: Path, output: Path, **changes: Any) -> Forked:
    return forks.start("-m", "byeori", "sft", *values(model, rows, output, **changes))


def listening(pid: int) -> list[str]:
    """The addresses at which a process waits for connections; ones of IPv6 in hexadecimal."""
    sockets = {link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                number = local.partition(":")[0]
                found.append(str(ipaddress.IPv4Address(bytes.fromhex(number)[::-1])) if table == "tcp" else number)
    return found


def test_two_processes(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """From interpreters of their own; the other tests here fork. What lies in the working folder is not imported."""
    ran = tmp_path / "ran"
    for name in ("yaml.py", "torch.py", "numpy.py"):
        (tmp_path / name).write_text(f"open({str(ran)!r}, 'w').write(__file__)\n", encoding="utf-8")
    words = values(tiny_model, title_rows, tmp_path / "out", max_steps=2, parallel="fsdp")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *words], stderr=subprocess.PIPE, text=True, env=env, timeout=300, cwd=tmp_path
    )
    told = done.stderr
    assert done.returncode == 0, told
    assert not ran.exists(), ran.read_text(encoding="utf-8")
    assert told.count("2 processes, frozen weights sharded over 2 of them") == 1
    assert told.count("Done: 2 steps") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_an_error_is_one_sentence_and_two(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    process = command(tiny_model, title_rows, tmp_path / "out", lora_target_modules="nope")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 2, told
    said = re.findall("^error: --lora_target_modules: no layer is called 'nope'", told, flags=re.MULTILINE)
    assert len(said) == 1, told
    assert told.count("error") == 1 and "Traceback" not in told


def test_ctrl_c_and_a_lost_process(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the command alone, which hands it on; a killed process ends the other, with one message."""
    ends = {signal.SIGINT: (130, r"^stopped at step \d+;"), signal.SIGKILL: (2, r"^error: another process of this run")}
    for number, (code, sentence) in ends.items():
        output = tmp_path / number.name
        process = command(tiny_model, title_rows, output, num_epochs=200, batch_size=4)
        deadline = time.monotonic() + 200
        log = output / "train_log.jsonl"
        while not (log.is_file() and log.read_text(encoding="utf-8")):  # a step is done, so signals are handled
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        addresses = [address for pid in (process.pid, process.rank(0), process.rank(1)) for address in listening(pid)]
        assert addresses and all(address.startswith("127.") for address in addresses), addresses
        os.kill(process.pid if number == signal.SIGINT else process.rank(1), number)
        _, told = process.communicate(timeout=60)
        assert process.returncode == code, told
        assert len(re.findall(sentence, told, flags=re.MULTILINE)) == 1, told
        assert "Traceback" not in told


def test_when_there_is_nothing_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_gpus", lambda: 0)
    monkeypatch.setattr(launch, "_run", lambda count, command, folder, say: 100 + count)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launch.start_group(None, ["sft"], print) is None
    assert launch.start_group(1, ["sft"], print) is None
    assert launch.start_group(2, ["sft"], print) == 102
    monkeypatch.setattr(launch, "_gpus", lambda: 4)
    assert launch.start_group(None, ["sft"], print) == 104
    assert launch.start_group(1, ["sft"], print) is None
    with pytest.raises(ConfigError, match="--nproc is 5, but this machine has 4 GPUs; give 4 or less"):
        launch.start_group(5, ["sft"], print)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launch.start_group(None, ["sft"], print) is None
    assert launch.start_group(2, ["sft"], print) is None
    with pytest.raises(ConfigError, match="--nproc is 4, but torchrun started 2 processes here"):
        launch.start_group(4, ["sft"], print)


def test_goes_on_where_rows_did_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, asked, said = [AGAIN, AGAIN, 0], [], list[str]()
    monkeypatch.setattr(launch, "_gpus", lambda: 0)
    monkeypatch.setattr(launch, "_run", lambda count, command, *_: (asked.append(command[4:]), codes.pop(0))[1])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert launch.start_group(2, ["sft", "--overwrite_output_dir", "True"], said.append) == 0
    assert [len(command) for command in asked] == [3, 5, 7]
    settings = flags.settings_from(
        config.SftSettings, ["--base_model=m", "--data_path=d", "--output_dir=o", *asked[-1][1:]]
    )
    assert (settings.resume_from_checkpoint, settings.overwrite_output_dir) == ("latest", False)
    assert ["resuming from the last step with micro-batches split in two" in line for line in said] == [True, True]


def test_python_starts_no_processes(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nproc starts processes from the command line only"):
        byeori.sft(base_model=tiny_model, data_path=title_rows, output_dir=tmp_path / "out", cutoff_len=256, nproc=2)
