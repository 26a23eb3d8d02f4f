"""What fuzzers found, one of each kind: damaged files and odd values are one sentence, or do no harm.

tests/fuzz.py finds more of them; what it finds is fixed by its kind and stands here with its words.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from byeori.cli import main

Edit = Callable[[Path], None]
# a list of nine lists of nine ..., eight deep
ALIASES = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (name, name, b", ".join([b"*%c" % (name - 1)] * 9)) for name in b"bcdefgh"
)


def field(name: str, value: Any) -> Edit:
    """An edit that sets one field of a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {name: value}))


def content(data: bytes) -> Edit:
    return lambda path: path.write_bytes(data)


def cut_workbook(path: Path) -> None:
    """A workbook whose directory names a place before its beginning."""
    with zipfile.ZipFile(path, "w") as parts:
        parts.writestr("xl/workbook.xml", "x" * 500)
    path.write_bytes(path.read_bytes()[300:])


def another(kind: str) -> Edit:
    """An edit that puts something else in a file's place."""

    def edit(path: Path) -> None:
        path.unlink(missing_ok=True)
        if kind == "holes":
            with path.open("wb") as file:
                file.truncate(2**40)
        elif kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(kind)

    return edit


@pytest.fixture(scope="module")
def world(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter, rows.jsonl, template.txt."""
    folder = tmp_path_factory.mktemp("world")
    record = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    shutil.copytree(record["base_model_name_or_path"], folder / "base")
    shutil.copytree(trained, folder / "adapter")
    rows = [{"document": f"봄이 왔다 {i}", "title": f"봄소식 {i}"} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "template.txt").write_text("본문: {document}\n제목: {title}", encoding="utf-8")
    return folder


COMMANDS = {
    "preview": "preview --base_model base --data_path rows.jsonl --template template.txt --rows 1",
    "sft": "sft --base_model base --data_path rows.jsonl --template template.txt --output_dir out --max_steps 1 "
    "--dtype float32 --cutoff_len 128",
    "generate": "generate --model adapter --base_model base --max_new_tokens 2 --document 봄",
    "compare": "compare --adapter adapter --data_path rows.jsonl --output_dir out --max_rows 2 --max_new_tokens 2",
    "merge": "merge --peft_model_path adapter --base_model_name_or_path base --output_dir out",
    "publish": "publish --folder adapter --repo_id me/x --dry-run",
    "studio": "studio nowhere",
    "chat": "chat --model adapter --base_model base",
}


@pytest.fixture
def run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Damages a file of a copy of the world, and runs a command in it; returns its exit code and its words."""

    def run_(command: str, file: str = "", edit: Edit | None = None, *more: str) -> tuple[int, str]:
        place = shutil.copytree(world, tmp_path / "place", symlinks=True)
        monkeypatch.chdir(place)
        if edit:
            edit(place / file)
        capfd.readouterr()
        code = main([*COMMANDS[command].split(), *more])
        out, printed = capfd.readouterr()
        printed += "" if command == "chat" else out  # whose output is the model's, raw where it is no terminal
        assert "Traceback" not in printed, printed
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed), repr(printed)
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code == 2) and all(len(line) < 2500 for line in errors), printed
        return code, printed

    return run_


REFUSED: list[tuple[str, str, Edit | None, tuple[str, ...], str]] = [
    ("sft", "base/config.json", field("architectures", 5), (), "architectures that are no list of names"),
    ("sft", "base/config.json", field("attention_dropout", 7.5), (), "attention_dropout"),
    ("sft", "", None, ("--neftune_noise_alpha", "1e300"), "neftune_noise_alpha"),
    ("preview", "rows.jsonl", content(b'{"": 1, "document": "a", "title": "b"}\n'), (), "column without a name"),
    ("preview", "rows.jsonl.gz", content(gzip.compress(b"{}\n" * 999)[:-9]), ("--data_path", "rows.jsonl.gz"), "gzip"),
    ("preview", "rows.jsonl", another("/dev/zero"), (), "rows.jsonl"),
    ("preview", "rows.jsonl", another("holes"), (), "never written"),
    ("preview", "rows.jsonl", content(b'{"document": "a", "document\\u0000": "b", "title": "c"}\n'), (), "holds a NUL"),
    ("preview", "rows.xlsx", cut_workbook, ("--data_path", "rows.xlsx"), "damaged or not a workbook"),
    ("preview", "template.txt", another("holes"), (), "more than 64 MiB"),
    ("generate", "base/config.json", another("holes"), (), "config.json"),
    ("studio", "", None, ("--origin", "\ud83d"), "no text"),
    ("generate", "adapter/adapter_config.json", field("target_modules", "(([a-z_.0-9])*)*Z"), (), "takes for ever"),
    ("merge", "adapter/adapter_config.json", field("rank_pattern", {"(": 4}), (), "no regular expression"),
    ("sft", "settings.yaml", content(ALIASES), ("--config", "settings.yaml"), "settings.yaml"),
    ("preview", "template.txt", another("pipe"), (), "template.txt"),
    ("preview", "template.txt", another("template.txt"), (), "template.txt"),
    ("generate", "adapter/adapter_config.json", another("folder"), (), "whole model"),
]


@pytest.mark.parametrize(("command", "file", "edit", "more", "words"), REFUSED)
def test_refused(run: Any, command: str, file: str, edit: Edit | None, more: tuple[str, ...], words: str) -> None:
    code, printed = run(command, file, edit, *more)
    assert code == 2 and words in printed, printed


@pytest.mark.parametrize("command", ["generate", "compare", "sft"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("could not create a primitive"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_no_memory_is_a_sentence(error: Exception, command: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it ends, here while weights are read."""

    def fails(*given: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr("byeori.model.load.load_model", fails)
    code, printed = run(command)
    assert code == 2 and "memory" in printed.splitlines()[-1], printed


def test_a_text_too_long_for_a_path_is_a_sentence(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("byeori.model.load.load_model", lambda *_, **__: Path("a" * 300).stat())
    code, printed = run("generate")
    assert code == 2 and "is longer than the name of a file may be" in printed.splitlines()[-1], printed


HARMLESS: list[tuple[str, str, Edit | None, tuple[str, ...]]] = [
    ("publish", "adapter/adapter_config.json", field("target_modules", {"a": 1}), ()),
    ("publish", "adapter/template.txt", another("template.txt"), ()),
    ("chat", "adapter/template.txt", content("제목: {title}".encode()), ()),
]


@pytest.mark.parametrize(("command", "file", "edit", "more"), HARMLESS)
def test_harmless(run: Any, command: str, file: str, edit: Edit | None, more: tuple[str, ...]) -> None:
    assert run(command, file, edit, *more)[0] in (0, 2)
