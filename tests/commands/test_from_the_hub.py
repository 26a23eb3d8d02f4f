"""Models and adapters from a local stand-in for the Hub, through the command line: trained, answered with, merged."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import struct
import termios
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import forks
from hub_server import TOKEN, serve
from tiny_models import sample_rows, tiny_llama

PROGRAM = """
import contextlib, io, json, sys
from byeori.cli import main
for command in json.loads(sys.argv[1]):
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = main(command)
    print("DONE", json.dumps([code, out.getvalue(), said.getvalue()]))
"""
FAST = ("--max_steps=2", "--batch_size=2", "--cutoff_len=512", "--dtype=float32", "--compile=off")


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command left: its exit code, what it answered, what it said."""

    code: int
    out: str
    said: str


def run(url: str, home: Path, commands: dict[str, list[str]], **environment: str) -> dict[str, Done]:
    place = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    place |= {"HF_ENDPOINT": url, "HF_HOME": str(home), "BYEORI_CACHE": str(home / "byeori"), "NO_PROXY": "*"}
    place |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    done = forks.run("-c", PROGRAM, json.dumps(list(commands.values())), env=place, timeout=500)
    assert done.returncode == 0 and TOKEN not in done.stdout + done.stderr, done.stderr
    lines = [json.loads(line.removeprefix("DONE ")) for line in done.stdout.splitlines() if line.startswith("DONE ")]
    return {name: Done(code=line[0], out=line[1], said=line[2]) for name, line in zip(commands, lines, strict=True)}


@dataclass(frozen=True, kw_only=True)
class Story:
    """Everything that ran once: online with the token, and then without the server."""

    done: dict[str, Done]
    offline: dict[str, Done]
    folder: Path
    requests: list[str]


@pytest.fixture(scope="module")
def story(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder, home = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("hf")
    other = tmp_path_factory.mktemp("models") / "other"  # what the branch v2 holds: another shape of weights
    words = config(tiny_model, "config.json")["vocab_size"]
    tiny_llama(words, intermediate_size=48).save_pretrained(other)
    pairs = folder / "pairs.jsonl"
    samples = sample_rows("titles-ko-train.jsonl")[:8]
    rows = [{"document": row["document"][:60], "chosen": row["title"], "rejected": "제목"} for row in samples]
    pairs.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    titles, text = f"--data_path={title_rows}", "--document=마을 도서관 앞 건널목에 신호등이 없습니다."
    answer = [text, "--max_new_tokens=8", "--dtype=float32"]
    online = {
        "sft": ["sft", "--base_model=me/tiny", titles, f"--output_dir={folder / 'sft'}", *FAST],
        "publish": ["publish", str(folder / "sft"), "me/adapter", "--private"],
        "dpo": ["dpo", "--base_model=me/adapter", f"--data_path={pairs}", f"--output_dir={folder / 'dpo'}", *FAST],
        "generate": ["generate", "me/adapter", *answer],
        "generate here": ["generate", str(folder / "sft"), *answer],
        "merge": ["merge", "--peft_model_path=me/adapter", f"--output_dir={folder / 'merged'}"],
        "v2": ["sft", "--base_model=me/tiny", "--revision=v2", titles, f"--output_dir={folder / 'v2'}", *FAST],
        "merge v2": ["merge", f"--peft_model_path={folder / 'v2'}", f"--output_dir={folder / 'merged-v2'}"],
        "v3": ["sft", "--base_model=me/tiny", "--revision=v3", titles, f"--output_dir={folder / 'v3'}", *FAST],
        "whole": ["generate", "me/tiny", "--raw=abc", "--max_new_tokens=4"],
    }
    with serve() as hub:
        hub.put("me/tiny", tiny_model)
        hub.put("me/tiny", tiny_model, branch="v2")
        hub.put("me/tiny", other, branch="v2")
        done = run(hub.url, home, online, HF_TOKEN=TOKEN)
        done |= run(hub.url, folder / "empty", {"no token": ["generate", "me/adapter", *answer]})
        requests = hub.requests
    again = {name: online[name] for name in ("generate", "whole")}
    again["dpo"] = [*online["dpo"], "--overwrite_output_dir"]
    offline = run("http://127.0.0.1:9", home, again, HF_HUB_OFFLINE="1")
    return Story(done=done, offline=offline, folder=folder, requests=requests)


def config(folder: Path, name: str = "adapter_config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_all_commands_work(story: Story) -> None:
    failed = {name: done.said for name, done in story.done.items() if done.code}
    assert set(failed) == {"v3", "no token"}, failed
    assert not any(done.code for done in story.offline.values()), story.offline


def test_trained_from_a_model(story: Story, tiny_model: Path) -> None:
    adapter = config(story.folder / "sft")
    assert adapter["base_model_name_or_path"] == "me/tiny" and adapter["revision"] is None
    size = (tiny_model / "model.safetensors").stat().st_size / 1000
    words = f"Downloading me/tiny from the Hugging Face Hub: model.safetensors, {size:.1f} KB\n"
    assert words in story.done["sft"].said


def test_adapter_is_found_and_trained_further(story: Story) -> None:
    """The adapter that DPO ends with is the published one, moved a little; a new one would begin with B = 0."""
    before = load_file(story.folder / "sft" / "adapter_model.safetensors")
    after = load_file(story.folder / "dpo" / "adapter_model.safetensors")
    assert set(before) == set(after) and config(story.folder / "dpo")["base_model_name_or_path"] == "me/tiny"
    moved = max(float((before[name] - after[name]).abs().max()) for name in before)
    learned = max(float(values.abs().max()) for name, values in before.items() if "lora_B" in name)
    assert 0 < moved < learned  # two steps of 1e-5 after two of 2e-4


def test_answers_are_those_of_the_files_at_home(story: Story) -> None:
    assert story.done["generate"].out == story.done["generate here"].out != ""
    assert story.offline["generate"].out == story.done["generate"].out
    assert story.offline["whole"].out == story.done["whole"].out
    assert "Downloading" not in story.offline["generate"].said + story.done["generate here"].said


def test_merged(story: Story, tiny_model: Path) -> None:
    report = config(story.folder / "merged", "merge_report.json")
    assert (report["adapter"], report["base"], report["verdict"]) == ("me/adapter", "me/tiny", "equal")
    adapter = load_file(story.folder / "sft" / "adapter_model.safetensors")
    base, merged = (load_file(folder / "model.safetensors") for folder in (tiny_model, story.folder / "merged"))
    name, facts = "model.layers.0.mlp.up_proj", config(story.folder / "sft")
    a, b = (adapter[f"base_model.model.{name}.lora_{letter}.weight"].double() for letter in "AB")
    wanted = base[f"{name}.weight"].double() + facts["lora_alpha"] / facts["r"] * b @ a
    assert torch.allclose(merged[f"{name}.weight"].double(), wanted, rtol=0, atol=1e-6)


def test_revision_goes_with_the_adapter(story: Story) -> None:
    """v2 has narrower layers than main, so an adapter on the wrong one could not be merged."""
    assert config(story.folder / "v2")["revision"] == "v2"
    assert config(story.folder / "merged-v2", "config.json")["intermediate_size"] == 48
    assert config(story.folder / "merged-v2", "merge_report.json")["revision"] == "v2"
    assert "does not have this revision" in story.done["v3"].said and "--revision" in story.done["v3"].said


def test_private_repository_and_the_token(story: Story) -> None:
    said = story.done["no token"].said
    assert "the Hub has no model me/adapter, or it is private" in said and "hf auth login" in said
    files = [path for path in story.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_weights_come_once_and_never_as_pickles(story: Story) -> None:
    fetched = [line for line in story.requests if line.startswith("GET") and line.endswith("model.safetensors")]
    assert len(fetched) == len(set(fetched)) == 3, fetched  # main, v2, the adapter
    assert not any(line.startswith("GET") and line.endswith(".bin") for line in story.requests)


def test_bars_of_a_download_are_shown_on_a_terminal(tmp_path: Path) -> None:
    """Loading a model silences transformers' bars, which would take those of downloads with them."""
    program = (
        "from byeori.model import load; from byeori.support import console, hub\n"
        "with console.quiet_libraries(), load.quiet(): hub.fetch('me/large', hub.WEIGHTS)"
    )
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    with serve() as hub:
        hub.put("me/large", {"config.json": b"{}", "model.safetensors": bytes(25_000_000)})
        place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        process = forks.start("-c", program, env=os.environ | place, stdio=(None, None, terminal))
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # the way in which a terminal says that the program has ended
            while part := os.read(screen, 1 << 16):
                shown += part
        os.close(screen)
    assert process.wait(timeout=60) == 0
    assert "Downloading me/large from the Hugging Face Hub: 2 files, 25.0 MB" in shown.decode()
    assert b"%|" in shown and b"/ 25.0MB" in shown
