"""Cores and memory as control groups of both versions grant them, and threads that sleep while they wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from byeori.support import cgroups
from runs import environment


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group in a group, of the second version."""
    (tmp_path / "own").write_text("0::/job/step\n")
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path / "fs")
    (tmp_path / "fs/job/step").mkdir(parents=True)
    return tmp_path / "fs/job/step"


def test_no_limit(group: Path) -> None:
    assert cgroups.quota() is None and cgroups.memory() is None
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("max\n")
    assert cgroups.quota() is None and cgroups.memory() is None
    assert cgroups.cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("text", "quota", "cores"), [("150000 100000", 1.5, 2), ("25000 100000", 0.25, 1)])
def test_cores_are_the_quota_rounded_up(
    group: Path, monkeypatch: pytest.MonkeyPatch, text: str, quota: float, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (group / "cpu.max").write_text(text)
    assert (cgroups.quota(), cgroups.cores()) == (quota, cores)


def test_the_tightest_group_around_counts(group: Path) -> None:
    (group / "cpu.max").write_text("400000 100000")
    (group.parent / "cpu.max").write_text("200000 100000")
    (group / "memory.max").write_text("5000")
    (group / "memory.current").write_text("1000")
    (group.parent / "memory.max").write_text("4000")
    (group.parent / "memory.current").write_text("3500")
    (group.parent / "memory.stat").write_text("anon 100\ninactive_file 1500\n")
    assert cgroups.quota() == 2
    assert cgroups.memory() == (4000, 2000)


def test_first_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder for each controller; a container's may be mounted without the path that the host knows."""
    (tmp_path / "own").write_text("6:memory:/docker/5a\n4:cpu,cpuacct:/docker/5a\n1:name=systemd:/\n0::/\n")
    monkeypatch.setattr(cgroups, "_OWN", tmp_path / "own")
    monkeypatch.setattr(cgroups, "_ROOT", tmp_path)
    for name, value in {
        "cpu,cpuacct/cpu.cfs_quota_us": "50000",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "3000",
        "memory/memory.usage_in_bytes": "2000",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 100",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(value)
    assert cgroups.quota() == 0.5
    assert cgroups.memory() == (3000, 1100)
    (tmp_path / "memory/memory.limit_in_bytes").write_text("9223372036854771712")
    assert cgroups.memory() is None


PROGRAM = """
import sys
from byeori.support import cgroups
cgroups.quota = lambda: 0.5
from byeori import cli
cli.main()
import os, torch
print(os.environ["GOMP_SPINCOUNT"], torch.get_num_threads())
"""


@pytest.mark.parametrize(("given", "told"), [({}, "1000 1"), ({"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "7"}, "7 2")])
def test_the_command_line_sets_what_the_user_has_not(given: dict[str, str], told: str) -> None:
    clean = {name: value for name, value in environment().items() if name not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--version"], capture_output=True, text=True, env=clean | given, check=True
    )
    assert done.stdout.splitlines()[-1] == told
