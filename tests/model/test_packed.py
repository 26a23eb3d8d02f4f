"""Quantized checkpoints are opened to the numbers that their writers' own loaders compute, trained and merged.

fixtures/quantized: one layer of a tiny Llama as auto-round writes it in the formats of GPTQ, AWQ and its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors import compressors
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from byeori.distributed.processes import Processes
from byeori.errors import ModelError
from byeori.export.merge import merge
from byeori.model import load, load_streamed, packed
from tiny_models import short_sft

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantized"
SETTINGS = json.loads((FIXTURES / "settings.json").read_text())
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def opened(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> dict[str, Any]:
    """What a folder of these tensors holds."""
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return packed.sources(folder)


@pytest.mark.parametrize("kind", SETTINGS)
def test_layers_of_auto_round(kind: str, tmp_path: Path) -> None:
    """Numbers are half a step of their group from those that were quantized, at the ends of its range one step."""
    stored, plain = load_file(FIXTURES / f"{kind}.safetensors"), load_file(FIXTURES / "plain.safetensors")["weight"]
    found = opened(tmp_path, {f"layer.{name}": value for name, value in stored.items()}, SETTINGS[kind])
    assert set(found) == {"layer.weight"} and found["layer.weight"].shape == plain.shape
    step = stored["scales"].float().repeat_interleave(SETTINGS[kind]["group_size"], 0).t()
    off = (found["layer.weight"].load() - plain).abs() / step
    assert float(off.max()) < 1.01 and float(off.mean()) < 0.3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_with_columns_in_any_order(bits: int, tmp_path: Path) -> None:
    """Packed as one long row of bits for each output, as the format's description says."""
    inputs, outputs, groups = 64, 32, 4
    generator = torch.Generator().manual_seed(bits)

    def draw(most: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, most, shape, generator=generator)

    codes, zeros = draw(2**bits, inputs, outputs), draw(2**bits - 1, groups, outputs)
    scales, group = torch.rand(groups, outputs, generator=generator).half(), draw(groups, inputs)

    def words(numbers: list[int]) -> list[int]:
        whole = sum(number << place * bits for place, number in enumerate(numbers))
        found = [whole >> 32 * word & 0xFFFFFFFF for word in range(len(numbers) * bits // 32)]
        return [word - (1 << 32) if word >> 31 else word for word in found]

    tensors = {
        "layer.qweight": torch.tensor([words(column) for column in codes.t().tolist()], dtype=torch.int32).t(),
        "layer.qzeros": torch.tensor([words(row) for row in zeros.tolist()], dtype=torch.int32),
        "layer.scales": scales,
        "layer.g_idx": group.int(),
    }
    for version, less in (("gptq", 1), ("gptq_v2", 0)):
        found = opened(tmp_path, tensors, {"quant_method": "gptq", "checkpoint_format": version})["layer.weight"].load()
        expected = (codes - zeros[group] - less) * scales.float()[group]
        torch.testing.assert_close(found, expected.t(), rtol=1e-6, atol=0)


INT = [(bits, sym, kind) for bits in (2, 3, 4, 8) for sym in (True, False) for kind in ("group", "channel")]
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("Packed", {"num_bits": b, "symmetric": s, "strategy": k, "type": "int"}) for b, s, k in INT),
    *(("Int", {"num_bits": 8, "symmetric": s, "strategy": "group", "type": "int"}) for s in (True, False)),
    *(("Float", {"num_bits": 8, "strategy": k, "type": "float"}) for k in ("tensor", "channel", "group", "block")),
    ("MXFP4Packed", {"num_bits": 4, "strategy": "group", "type": "float", "scale_dtype": torch.uint8}),
    ("NVFP4Packed", {"num_bits": 4, "strategy": "tensor_group", "type": "float", "scale_dtype": torch.float8_e4m3fn}),
]
_CLASSES = {"Packed": "PackedQuantization", "Int": "IntQuantization", "Float": "FloatQuantization"}


@pytest.mark.parametrize(("kind", "how"), CASES, ids=map(str, range(len(CASES))))
def test_what_compressed_tensors_packs(kind: str, how: dict[str, Any], tmp_path: Path) -> None:
    """Its own decompressor gives the same numbers."""
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    size = {"tensor_group": 16, "group": 32}.get(how["strategy"])
    block = [32, 40] if how["strategy"] == "block" else None
    args = QuantizationArgs(**how, group_size=size, block_structure=block)
    if block:
        tiles = [list(rows.split(block[1], 1)) for rows in weight.split(block[0], 0)]
        low, high = (torch.tensor([[float(pick(t)) for t in row] for row in tiles]) for pick in (torch.min, torch.max))
    else:
        grouped = weight.view(1, -1) if how["strategy"] == "tensor" else weight.view(48, -1, size or 96)
        low, high = grouped.amin(-1), grouped.amax(-1)
    own: dict[str, torch.Tensor] = {"weight": weight}
    if how["strategy"] == "tensor_group":
        own["weight_global_scale"] = (448 * 6 / weight.abs().max()).view(1)
    own["weight_scale"], zeros = calculate_qparams(low, high, args, global_scale=own.get("weight_global_scale"))
    if not how.get("symmetric", True):
        own["weight_zero_point"] = zeros.to(torch.int8)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = getattr(compressors, f"{_CLASSES.get(kind, kind)}Compressor")
    stored = compressor.compress(own, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"block_structure": block}}},
    }
    found = opened(tmp_path, {f"layer.{name}": value for name, value in stored.items()}, settings)
    assert set(found) == {"layer.weight"} and found["layer.weight"].shape == weight.shape
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[expected.dtype]
    torch.testing.assert_close(found["layer.weight"].load(), expected.float(), rtol=rounding, atol=1e-6)


def test_gpt_oss(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 132, (2, 6, 3), dtype=torch.uint8, generator=generator)
    tensors = {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}
    found = opened(tmp_path, tensors, {"quant_method": "mxfp4"})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert set(found) == {"mlp.experts.down_proj"} and found["mlp.experts.down_proj"].shape == expected.shape
    assert torch.equal(found["mlp.experts.down_proj"].load(), expected)


# ---- from the command line ---------------------------------------------------------------------------------------


def int4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="channel")
    scale, _ = calculate_qparams(weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return dict(compressors.PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme))


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as llm-compressor stores it in 4 bit."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("packed") / "base"))
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(tiny_model / "model.safetensors").items():
        stem = name.removesuffix("weight")
        linear = name.split(".")[-2] in LINEAR
        tensors |= {stem + key: part for key, part in int4(value).items()} if linear else {name: value}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    facts = json.loads((folder / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel", "type": "int"}}
    facts["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(facts))
    return folder


def test_the_model_is_the_one_with_opened_weights(base: Path, tiny_model: Path) -> None:
    """Also as transformers' own quantizer computes it, and streamed."""
    model = load.load_model(str(base), dtype=torch.float32, device=torch.device("cpu"))
    assert model.name_or_path == str(base) and not hasattr(model.config, "quantization_config")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found = model(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)
    assert float((found - plain).norm() / plain.norm()) > 0.02
    alone = Processes(rank=0, world=1, device=torch.device("cpu"))
    streamed = load_streamed.load_streamed(str(base), dtype=torch.float32, processes=alone)
    with torch.no_grad():
        assert torch.equal(streamed(ids).logits, found)


@pytest.mark.parametrize("four_bit", [False, True])
def test_trained_and_merged(
    four_bit: bool, base: Path, tiny_model: Path, title_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter = short_sft(base, title_rows, tmp_path / "run", load_in_4bit=four_bit, learning_rate=1e-2)
    told = "and held in 4 bit" if four_bit else "--load_in_4bit makes them smaller"
    assert "stored quantized (compressed-tensors): they are opened to float32" in (err := capfd.readouterr().err)
    assert told in err
    result = merge(adapter=adapter, base=None, output_dir=tmp_path / "merged")
    assert (result.verdict, result.onto) == ("equal", "opened")
    assert (result.distance is not None) == four_bit
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    result = merge(adapter=adapter, base=str(tiny_model), output_dir=tmp_path / "full")
    assert result.verdict == "equal" and "which rounding explains" in result.notes[0]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("hqq", r"is stored quantized \(hqq\): pip install hqq, which opens it, or give the full-precision model"),
        ("new", r"is stored quantized \(new\) in a way that byeori does not open \(model.layers.0.mlp.down_proj.W_q\)"),
    ],
)
def test_what_is_not_opened(method: str, sentence: str, base: Path, title_rows: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    other = {name.replace("weight_packed", "W_q"): value for name, value in tensors.items()}
    save_file(other, folder / "model.safetensors", {"format": "pt"})
    facts = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(facts))
    for how in ({}, {"load_in_4bit": True}):
        with pytest.raises(ModelError, match=sentence):
            short_sft(folder, title_rows, tmp_path / "run", **how)
