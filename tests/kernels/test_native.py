"""The compiled kernels in the cache: only this user's own, whole library is loaded."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from byeori.kernels import native

COMPILER = shutil.which("gcc") or shutil.which("cc") or ""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    # a small library in the place of the real one, which takes 20 seconds to compile
    source = tmp_path / "small.c"
    source.write_text("int tiles(void) { return 7; }\n", encoding="ascii")
    monkeypatch.setattr(native, "_SOURCE", source)
    return tmp_path / "cache" / "kernels"


def planted(target: Path, tmp_path: Path) -> Path:
    """Compile a library that leaves a file when it is loaded; returns that file."""
    ran = tmp_path / "ran"
    code = f'#include <stdio.h>\n__attribute__((constructor)) void f(void) {{ fclose(fopen("{ran}", "w")); }}\n'
    (tmp_path / "evil.c").write_text(code, encoding="ascii")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", target, tmp_path / "evil.c"], check=True)
    return ran


def test_compiled_once(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert native._load(COMPILER, "a.so").tiles() == 7
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in cache.iterdir()} == {"a.so", "a.so.sha256"}
    before = (cache / "a.so").stat().st_mtime_ns
    assert native._load(COMPILER, "a.so").tiles() == 7
    assert (cache / "a.so").stat().st_mtime_ns == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("how", ["truncated", "another", "link", "writable"])
def test_a_library_that_is_not_ours_is_compiled_anew(
    how: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native._load(COMPILER, "a.so")
    library, ran = cache / "a.so", tmp_path / "ran"
    if how == "truncated":  # in a file of its own: this process has the other one mapped
        half = library.read_bytes()[:5000]
        library.unlink()
        library.write_bytes(half)
    elif how == "writable":
        library.chmod(0o666)
    else:
        other = tmp_path / "evil.so" if how == "link" else library
        library.unlink()
        ran = planted(other, tmp_path)
        if how == "link":
            library.symlink_to(other)
    assert native._load(COMPILER, "a.so").tiles() == 7
    assert not ran.exists()
    assert "a.so is damaged or not this user's alone; compiling it anew" in capsys.readouterr().err
    assert not library.is_symlink() and native.atomic_files.is_as_noted(library)


def test_a_folder_that_others_can_write_is_not_used(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    ran = planted(cache / "a.so", tmp_path)
    (cache / "a.so.sha256").write_text(native.atomic_files.sha256(cache / "a.so"), encoding="ascii")
    assert native._load(COMPILER, "a.so").tiles() == 7
    assert not ran.exists()
    assert "can be written by others" in capsys.readouterr().err
