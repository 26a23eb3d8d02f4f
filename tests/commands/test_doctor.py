"""byeori doctor: what it finds, and what it says about an acceleration that fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

import byeori
from byeori.cli import main
from byeori.commands import doctor
from byeori.kernels import native, patch
from byeori.support import cgroups


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byeori.model.first_use._REPEATS", 1)
    monkeypatch.setattr("byeori.model.trial._LENGTH", 128)


def test_a_sound_machine(capsys: pytest.CaptureFixture[str]) -> None:
    result = byeori.doctor(offline=True)
    text = "\n".join(result.lines)
    assert result.problems == () and result.lines[-1] == "No problem was found."
    assert capsys.readouterr().out.strip() == text.strip()
    for part in (*patch.PARTS, "lora", "quantized"):
        assert f"\n  {part:<12}as the plain form" in text
    assert "torch 2." in text and "memory: " in text and text.count("GiB free for the") == 2


def test_what_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*given: object) -> None:
        raise OSError("undefined symbol: norm_bf16")

    monkeypatch.setattr(native, "call", broken)
    monkeypatch.setattr(cgroups, "quota", lambda: 0.25)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 2)
    assert main(["doctor", "--offline"]) == 0
    told = capsys.readouterr().out
    assert "  kernels     fails " in told and "  norms       as the plain form" in told
    assert "To put right: the fused kernels (kernels) fails here (undefined symbol: norm_bf16); runs do without" in told
    assert "To put right: more threads than the container's 0.25 cores; set OMP_NUM_THREADS=1" in told


def test_a_library_outside_its_range() -> None:
    (sentence,) = doctor._outside({"peft": "0.17.0", "torch": "2.13.0", "transformers": None})
    assert sentence.startswith("peft 0.17.0 is not in the tested range") and "pip install 'peft" in sentence


def test_a_full_disk_and_a_cache_without_write_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    problems: list[str] = []
    assert len(list(doctor._disks(problems))) == 2
    assert any("nearly full" in problem for problem in problems)
    assert any(f"the cache {tmp_path / 'cache'} cannot be written" in problem for problem in problems)
