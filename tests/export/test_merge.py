"""Merged logits against PEFT's own model, memory against the size of the model, and every error."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import forks
from byeori.artifacts import saved_model
from byeori.artifacts.saved_model import check_base_name
from byeori.errors import ByeoriError, CheckpointError, ModelError
from byeori.export import merge_check, merged_tensors
from byeori.export.merge import MergeResult, merge
from byeori.export.safetensors_folder import SafetensorsFolder
from byeori.model import opened
from byeori.model.fingerprint import base_fingerprint, read_header, weights_sha256

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35]])
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "initializer_range": 0.2, **changes}))


def gemma(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**SMALL, "head_dim": 8, "initializer_range": 0.2, **changes}))


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def moe() -> torch.nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    return Qwen3MoeForCausalLM(config)


def saved(model: torch.nn.Module, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def adapted(base: Path, folder: Path, embeddings: bool = False, **lora: Any) -> Path:
    """An adapter with weights that are not zero, saved as byeori's trainer saves it."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **lora}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS).logits.float()


def tuned(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


def run(tmp_path: Path, base: Path, adapter: Path, **options: Any) -> MergeResult:
    return merge(adapter=adapter, base=str(base), output_dir=tmp_path / "merged", **options)


def check(tmp_path: Path, base: Path, adapter: Path, unload: bool = True, **options: Any) -> MergeResult:
    """Merge, and compare with PEFT's model, unmerged and merged by PEFT itself."""
    result = run(tmp_path, base, adapter, **options)
    merged = AutoModelForCausalLM.from_pretrained(result.output_dir)
    wanted = tuned(base, adapter)
    expected = logits(wanted)
    assert (
        expected - logits(AutoModelForCausalLM.from_pretrained(base))
    ).abs().max() > 0.05  # the adapter does something
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    if unload:
        torch.testing.assert_close(logits(merged), logits(wanted.merge_and_unload()), rtol=1e-5, atol=1e-5)
    assert result.verdict == "equal"
    return result


# ---- equal to PEFT ---------------------------------------------------------------------------------------------


def test_llama(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    seen: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def phase(name: str) -> Iterator[Any]:
        seen[name] = []
        yield lambda *step: seen[name].append(step)

    adapter = adapted(base, tmp_path / "adapter")
    result = check(tmp_path, base, adapter, phase=phase)
    # 7 linear layers in each of 2 blocks; the head is not among `all-linear`
    assert (result.merged_modules, result.tensors, result.untied) == (14, 2 * 9 + 3, False)
    assert seen["Merging"] == [(n, 21) for n in range(1, 22)]
    assert seen["Checking logits"] == [(n, 16) for n in range(1, 17)]  # 4 models of 2 layers on 2 prompts
    with safe_open(result.output_dir / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    report = json.loads((result.output_dir / "merge_report.json").read_text())
    assert report["verdict"] == "equal" and report["dtype"] == "float32"
    assert report["max_abs_difference"] < 1e-4 < report["adapter_effect"]
    assert report["base"] == str(base) and report["prompts"] == 2
    assert not [item for item in tmp_path.iterdir() if item.name.startswith(".")]


def test_ranks_scales_and_rslora(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    ranks, alphas = {"q_proj": 2, "layers.1.mlp.up_proj": 8}, {"down_proj": 5}
    adapter = adapted(base, tmp_path / "adapter", use_rslora=True, rank_pattern=ranks, alpha_pattern=alphas)
    check(tmp_path, base, adapter)


def test_biases_and_a_whole_layer(tmp_path: Path) -> None:
    base = saved(llama(attention_bias=True), tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter", bias="lora_only", modules_to_save=["lm_head"])
    assert "base_model.model.lm_head.weight" in load_file(adapter / "adapter_model.safetensors")
    check(tmp_path, base, adapter)


def test_gpt2_conv1d_embedding_and_head(tmp_path: Path) -> None:
    base = saved(gpt2(), tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc", "wpe"]
    result = check(tmp_path, base, adapted(base, tmp_path / "adapter", target_modules=targets))
    assert result.merged_modules == 2 * 4 + 1
    # the Hub's GPT-2 was saved without `transformer.`; names in the merged files stay the base's
    short = shutil.copytree(base, tmp_path / "short")
    tensors = load_file(base / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in tensors.items()}, short / "model.safetensors", {"format": "pt"}
    )
    shutil.rmtree(tmp_path / "merged")
    check(tmp_path, short, tmp_path / "adapter")
    assert "h.0.attn.c_attn.weight" in read_header(tmp_path / "merged" / "model.safetensors")


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head", "q_proj"], ["embed_tokens", "lm_head"]])
def test_tied_weights_are_untied_as_peft_computes_them(tmp_path: Path, make: Any, targets: list[str]) -> None:
    base = saved(make(tie_word_embeddings=True), tmp_path / "base")
    assert "lm_head.weight" not in read_header(base / "model.safetensors")
    adapter = adapted(base, tmp_path / "adapter", target_modules=targets)
    # PEFT's own merge adds the delta to the weight that both share, so only its unmerged model is a reference
    result = check(tmp_path, base, adapter, unload=False)
    assert result.untied and not json.loads((result.output_dir / "config.json").read_text())["tie_word_embeddings"]


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    base = saved(gemma(tie_word_embeddings=True), tmp_path / "base")
    plain = check(tmp_path, base, adapted(base, tmp_path / "plain"))
    assert not plain.untied
    shutil.rmtree(tmp_path / "merged")
    adapter = adapted(base, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True)
    result = check(tmp_path, base, adapter, unload=False)
    assert not result.untied
    assert "lm_head.weight" not in read_header(result.output_dir / "model.safetensors")


def test_tied_head_replaced_whole(tmp_path: Path) -> None:
    base = saved(gemma(tie_word_embeddings=True), tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    assert check(tmp_path, base, adapter, unload=False).untied


def test_untied_embedding_and_head_with_saved_embeddings(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    targets = ["embed_tokens", "lm_head", "v_proj"]
    check(tmp_path, base, adapted(base, tmp_path / "adapter", embeddings=True, target_modules=targets))


def test_experts_are_copied_and_attention_is_merged(tmp_path: Path) -> None:
    base = saved(moe(), tmp_path / "base")
    check(tmp_path, base, adapted(base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"]))


def test_shards_in_and_out(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base", max_shard_size="20KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    result = check(
        tmp_path, base, adapted(base, tmp_path / "adapter"), output_format=SafetensorsFolder(max_shard_bytes=16_000)
    )
    index = json.loads((result.output_dir / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in result.output_dir.glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 3
    assert (
        index["metadata"]["total_size"]
        == result.total_bytes
        == sum(tensor.nbytes for name in files for tensor in load_file(result.output_dir / name).values())
    )


def test_small_blocks_of_rows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(llama(), tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter", target_modules=["embed_tokens", "up_proj"])
    whole = load_file(run(tmp_path, base, adapter).output_dir / "model.safetensors")
    monkeypatch.setattr(opened, "_BLOCK_BYTES", 700)
    blocks = run(tmp_path, base, adapter, overwrite=True).output_dir / "model.safetensors"
    torch.testing.assert_close(load_file(blocks), whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(tmp_path: Path, dtype: str) -> None:
    base = saved(llama(), tmp_path / "base")
    result = run(tmp_path, base, adapted(base, tmp_path / "adapter"), dtype=dtype)
    assert result.dtype == dtype and result.verdict == "equal"
    assert {str(t.dtype) for t in load_file(result.output_dir / "model.safetensors").values()} == {f"torch.{dtype}"}
    assert json.loads((result.output_dir / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(result.output_dir).dtype == getattr(torch, dtype)


def test_auto_keeps_the_type_and_rounds_once(tmp_path: Path) -> None:
    base = saved(llama().to(torch.bfloat16), tmp_path / "base")
    adapter = adapted(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged = load_file(run(tmp_path, base, adapter).output_dir / "model.safetensors")
    before, parts = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    stem = "model.layers.1.self_attn.q_proj"
    a, b = (parts[f"base_model.model.{stem}.lora_{x}.weight"] for x in "AB")
    exact = before[f"{stem}.weight"].float() + 3.0 * (b.float() @ a.float())  # alpha / r = 12 / 4
    torch.testing.assert_close(merged[f"{stem}.weight"], exact.to(torch.bfloat16), rtol=2**-8, atol=0)
    assert torch.equal(merged["lm_head.weight"], before["lm_head.weight"])


def test_rounding_alone_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge equals the adapter merged by PEFT and rounded the same way, as closely as in float32."""
    monkeypatch.setitem(merge_check.TOLERANCE, "bfloat16", merge_check.TOLERANCE["float32"])
    base = saved(llama().to(torch.bfloat16), tmp_path / "base")
    output = run(tmp_path, base, adapted(base, tmp_path / "adapter")).output_dir
    report = json.loads((output / "merge_report.json").read_text())
    assert report["max_abs_difference"] > report["tolerance"] > report["beyond_rounding"]


def test_side_files(tmp_path: Path) -> None:
    base, name = saved(llama(), tmp_path / "base"), "tokenizer_config.json"
    adapter = adapted(base, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    for folder, files in (
        (base, {"special_tokens_map.json": "{}", "chat_template.jinja": "base"}),
        (adapter, {"chat_template.jinja": "tuned", "template.txt": "{a}\n{b}", "byeori.yaml": "seed: 1\n", name: "{}"}),
    ):
        for file, text in files.items():
            (folder / file).write_text(text)
    (adapter / "optimizer.safetensors").write_bytes(b"x")
    merged = run(tmp_path, base, adapter, verify=False).output_dir
    assert {path.name for path in merged.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "merge_report.json"),
        *("chat_template.jinja", "template.txt", "byeori.yaml", name),
    }
    assert (merged / "chat_template.jinja").read_text() == "tuned"
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert json.loads((merged / "merge_report.json").read_text())["verdict"] == "not checked"


# ---- memory ----------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from pathlib import Path
from byeori.export.merge import merge
from byeori.export.safetensors_folder import SafetensorsFolder
base, adapter, out, verify = sys.argv[1:]
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shards = SafetensorsFolder(max_shard_bytes=8 << 20)
done = merge(adapter=Path(adapter), base=base, output_dir=Path(out), verify=verify == "True", output_format=shards)
assert done.verdict == ("equal" if verify == "True" else "not checked"), done
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""


@pytest.mark.parametrize("verify", [pytest.param(False, marks=pytest.mark.slow), True])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, verify: bool) -> None:
    sizes, peaks = [], []
    for layers in (3, 30):
        changes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": layers}
        base = saved(llama(**changes), tmp_path / f"base{layers}")
        adapter = adapted(base, tmp_path / f"adapter{layers}")
        sizes.append((base / "model.safetensors").stat().st_size / 2**20)
        done = forks.run("-c", PEAK, base, adapter, tmp_path / f"out{layers}", verify)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout.split()[-1]))
    assert sizes[0] < 35 and sizes[1] > 260  # MiB
    assert peaks[1] < peaks[0] + 40


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = saved(llama(), folder / "base")
    return base, adapted(base, folder / "adapter")


@pytest.fixture
def base(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[0], tmp_path / "base"))


@pytest.fixture
def adapter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "adapter"))


def rejects(tmp_path: Path, base: Path | None, adapter: Path, *words: str, **options: Any) -> None:
    """Assert one sentence with these words, no output and nothing temporary."""
    before = set(tmp_path.iterdir())
    with pytest.raises(ModelError) as caught:
        merge(adapter=adapter, base=str(base) if base else None, output_dir=tmp_path / "merged", **options)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    assert set(tmp_path.iterdir()) == before


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_not_an_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    rejects(tmp_path, base, base, "is a whole model already; generate, export, serve and publish take it as it is")
    rejects(tmp_path, base, tmp_path / "nothing", "there is no folder")
    (adapter / "adapter_config.json").write_text("{")
    rejects(tmp_path, base, adapter, "adapter_config.json is damaged")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"use_dora": True}, "only half of the adapter"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"sparsity": 0.5}, "has the setting sparsity, which byeori does not know"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 8}, "not of rank 8"),
        ({"base_model_name_or_path": None}, "--base_model_name_or_path"),
    ],
)
def test_kinds_of_adapter(tmp_path: Path, adapter: Path, changes: dict[str, Any], word: str) -> None:
    rewrite(adapter / "adapter_config.json", **changes)
    rejects(tmp_path, None, adapter, word)


def test_pickles_are_never_loaded(tmp_path: Path, base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    rejects(tmp_path, base, adapter, "adapter_model.bin", "never loaded")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    rejects(tmp_path, base, adapter, "pickle", "never loaded")


def test_damaged_files(tmp_path: Path, base: Path, adapter: Path) -> None:
    weights, whole = base / "model.safetensors", (base / "model.safetensors").read_bytes()
    weights.write_bytes(whole[:-100])
    rejects(tmp_path, base, adapter, str(weights), "damaged or cut short")
    weights.write_bytes(b"\xff" * 64)
    rejects(tmp_path, base, adapter, str(weights), "damaged or cut short")
    weights.write_bytes(whole)
    factors = adapter / "adapter_model.safetensors"
    factors.write_bytes(factors.read_bytes()[:-3])
    rejects(tmp_path, base, adapter, str(factors), "damaged or cut short")


def test_missing_shard(tmp_path: Path, adapter: Path) -> None:
    base = saved(llama(), tmp_path / "shards", max_shard_size="20KB")
    next(iter(sorted(base.glob("*-of-*")))).unlink()
    rejects(tmp_path, base, adapter, "lacks model-00001-of-")
    (base / "model.safetensors.index.json").write_text("[]")
    rejects(tmp_path, base, adapter, "index.json is damaged")


def test_another_base(tmp_path: Path, base: Path, adapter: Path) -> None:
    wide = saved(llama(intermediate_size=64), tmp_path / "wide")
    rejects(tmp_path, wide, adapter, "mlp.down_proj", "[32, 64]", "[32, 48]", "trained on")
    short = saved(llama(num_hidden_layers=1), tmp_path / "short")
    rejects(tmp_path, short, adapter, "7 modules left over", "model.layers.1.")
    record = {"base_model": "us/right", "sha256": base_fingerprint(base)}
    (adapter / "byeori_base.json").write_text(json.dumps(record))
    other = saved(llama(), tmp_path / "other")
    edit(other / "model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(1e-3))
    rejects(tmp_path, other, adapter, "was trained on us/right", str(other))
    rejects(tmp_path, adapter, adapter, "is not a model: it has an adapter")
    assert run(tmp_path, base, adapter, verify=False).verdict == "not checked"


def test_another_model_on_the_hub(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Its shapes may be the same, and nothing else distinguishes it; a folder is accepted as it is."""
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="google/gemma-3-270m")

    def given(name: str, *words: str) -> None:
        with pytest.raises(ByeoriError) as caught:
            merge(adapter=adapter, base=name, output_dir=tmp_path / "merged", verify=False)
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value

    words = ("was trained on google/gemma-3-270m", "another model on the Hub", "give its folder")
    for name in ("google/gemma-3-270m-it", "somebody/gemma-3-270m", "270m"):
        given(name, f"{name} is another", *words)
        with pytest.raises(ModelError, match=f"{name} is another model on the Hub; leave --base_model out"):
            saved_model.find(str(adapter), name)  # before generate or compare asks the Hub
    for name in ("google/gemma-3-270m", "Google/Gemma-3-270M", "gemma-3-270m"):  # on to the Hub, which is out of reach
        given(name, f"{name} is neither a local folder nor in the cache")
    assert run(tmp_path, base, adapter, verify=False).verdict == "not checked"


def test_names_that_are_not_compared(tmp_path: Path, base: Path, adapter: Path) -> None:
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="folder")
    for recorded in ("folder", "/models/gemma"):  # the first is what is published of one trained from a folder
        check_base_name(adapter, recorded, "google/gemma-3-270m", option="--base_model")
    with pytest.raises(ModelError, match="another model on the Hub"):
        check_base_name(adapter, "us/right", "us/copy", option="--base_model")
    record = {"base_model": "us/right", "sha256": base_fingerprint(base)}
    (adapter / "byeori_base.json").write_text(json.dumps(record))
    check_base_name(adapter, "us/right", "us/copy", option="--base_model")
    (adapter / "byeori_base.json").write_text(json.dumps(record | {"sha256": ""}))
    with pytest.raises(ModelError, match="another model on the Hub"):
        check_base_name(adapter, "us/right", "us/copy", option="--base_model")


def test_fingerprint_does_not_depend_on_shards(tmp_path: Path, base: Path) -> None:
    shards = saved(llama(), tmp_path / "shards", max_shard_size="20KB")
    assert base_fingerprint(shards) == base_fingerprint(base) and weights_sha256(shards) == weights_sha256(base)


def test_fused_experts(tmp_path: Path, adapter: Path) -> None:
    base = saved(moe(), tmp_path / "moe")
    tensors = load_file(adapter / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0"
    pair = {
        f"{stem}.mlp.experts.gate_up_proj.lora_{x}.weight": tensors[f"{stem}.self_attn.q_proj.lora_{x}.weight"]
        for x in "AB"
    }
    save_file(pair, adapter / "adapter_model.safetensors")
    rejects(tmp_path, base, adapter, "gate_up_proj", "1 modules left over")


def test_numbers_that_are_not_finite(tmp_path: Path, base: Path, adapter: Path) -> None:
    factors, key = adapter / "adapter_model.safetensors", "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    whole = factors.read_bytes()
    edit(factors, lambda tensors: tensors[key].view(-1)[5].fill_(float("nan")))
    rejects(tmp_path, base, adapter, "lora_B of model.layers.0.mlp.up_proj", "not finite")
    factors.write_bytes(whole)
    edit(factors, lambda tensors: tensors[key].mul_(1e6))
    rejects(tmp_path, base, adapter, "model.layers.0.mlp.up_proj.weight", "not finite as F16", dtype="float16")
    factors.write_bytes(whole)
    edit(base / "model.safetensors", lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    rejects(tmp_path, base, adapter, "model.norm.weight", "base's weights")


def test_parts_of_the_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    factors, key = adapter / "adapter_model.safetensors", "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    whole = factors.read_bytes()
    edit(factors, lambda tensors: tensors.pop(key))
    rejects(tmp_path, base, adapter, "half of the adapter of model.layers.0.mlp.up_proj")
    factors.write_bytes(whole)
    edit(factors, lambda tensors: tensors.update({key.replace("B.weight", "C.weight"): torch.ones(48)}))
    rejects(tmp_path, base, adapter, "plain LoRA does not have")
    save_file({}, factors)
    rejects(tmp_path, base, adapter, "is empty")


def test_a_merge_that_is_wrong_is_set_aside(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = merged_tensors._numbers
    monkeypatch.setattr(merged_tensors, "_numbers", lambda *given: 0.9 * real(*given))
    with pytest.raises(ModelError, match="logits differ by up to"):
        run(tmp_path, base, adapter, dtype="bfloat16")
    assert not (tmp_path / "merged").exists()
    report = json.loads((tmp_path / "merged.failed" / "merge_report.json").read_text())
    assert report["verdict"] == "different" and report["max_abs_difference"] > report["tolerance"]


# ---- the output folder -----------------------------------------------------------------------------------------


def test_output_folder_that_is_not_empty(tmp_path: Path, base: Path, adapter: Path) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not empty"):
        run(tmp_path, base, adapter)
    run(tmp_path, base, adapter, verify=False, overwrite=True)
    assert (output / "model.safetensors").is_file()
    shutil.rmtree(output)
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no model"):
        run(tmp_path, base, adapter, overwrite=True)
    for folder in (base, adapter, tmp_path):
        with pytest.raises(CheckpointError, match="holds the adapter or its base"):
            merge(adapter=adapter, base=str(base), output_dir=folder, overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        merge(adapter=adapter, base=str(base), output_dir=output / "thesis.txt")


@pytest.mark.parametrize("place", ["fsync", "write"])
def test_full_disk(tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = tmp_path / "merged"
    output.mkdir()
    (output / "config.json").write_text("before")
    if place == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(merged_tensors, "blocks", full)
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        run(tmp_path, base, adapter, verify=False, overwrite=True)
    assert "\n" not in str(caught.value) and "GiB" in str(caught.value)
    assert set(tmp_path.iterdir()) == before and (output / "config.json").read_text() == "before"


def test_too_little_space_is_reported_before_writing(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match="the disk is full"):
        run(tmp_path, base, adapter, verify=False)


def test_output_that_cannot_be_written(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        merge(adapter=adapter, base=str(base), output_dir=tmp_path / "file" / "merged")
