"""Hashes of a base: they see every byte that computes, and nothing of how it is stored."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from byeori.model import fingerprint


@pytest.fixture
def base(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def test_every_byte_of_a_tensor_counts(base: Path) -> None:
    """Also where the file keeps its size and its times: then its inode or its time of change differs."""
    before = fingerprint.weights_sha256(base)
    path = base / "model.safetensors"
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint.weights_sha256(base) != before
    data[-3] ^= 1
    path.write_bytes(data)
    assert fingerprint.weights_sha256(base) == before


def test_it_is_kept_and_a_damaged_note_is_not_believed(base: Path, tmp_path: Path) -> None:
    before = fingerprint.weights_sha256(base)
    (kept,) = (tmp_path / "cache" / "fingerprints").iterdir()
    assert kept.read_text(encoding="ascii") == before
    kept.write_text("0" * 64, encoding="ascii")
    assert fingerprint.weights_sha256(base) == "0" * 64  # so it was read
    for text in ("", "half", "0" * 63 + "\u00e9"):
        kept.write_bytes(text.encode())
        assert fingerprint.weights_sha256(base) == before


def test_shards_types_and_names(base: Path) -> None:
    before = fingerprint.weights_sha256(base)
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "more": torch.zeros(0)}, base / "model.safetensors")
    assert fingerprint.weights_sha256(base) != before
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, base / "model.safetensors")
    assert fingerprint.weights_sha256(base) != before


def test_a_config_counts_where_it_computes(base: Path) -> None:
    before = fingerprint.config_sha256(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    saved = config | {"transformers_version": "4.57.1", "torch_dtype": "float16", "_name_or_path": "/home/me"}
    (base / "config.json").write_text(json.dumps(dict(reversed(saved.items()))), encoding="utf-8")
    assert fingerprint.config_sha256(base) == before
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}), encoding="utf-8")
    assert fingerprint.config_sha256(base) != before
