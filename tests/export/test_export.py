"""`byeori export` with llama.cpp itself: the same prompts, the same answers, or an error."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import byeori
from byeori.artifacts import saved_model
from byeori.errors import CheckpointError, ConfigError, DataError, ModelError, TemplateError
from byeori.export import gguf_convert
from byeori.export.publish import collect
from tiny_models import byte_level_tokenizer, short_sft, tiny_llama


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a chat model whose turns end with a token that llama.cpp does not know."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[/turn]"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' ~ m.role ~ ']' ~ m.content ~ '[/turn]' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tiny_llama(len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    turns = [[("system", "Be brief."), ("user", f"What is {n}?"), ("assistant", "It is.")] for n in range(6)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    more: dict[str, Any] = {"num_epochs": 100, "max_steps": 100, "batch_size": 6, "val_set_size": 0}
    short_sft(folder / "base", folder / "rows.jsonl", folder / "adapter", learning_rate=2e-2, **more)
    return folder / "adapter"


def export(model: Path, output: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {"format": "gguf", "check_rows": 3, "max_new_tokens": 12}
    return byeori.export(model=model, output_dir=output, **given | changes)


def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "export_report.json").read_text(encoding="utf-8")))


def test_merged_model_answers_in_llama_cpp_as_here(merged: Path, tmp_path: Path) -> None:
    result = export(merged, tmp_path / "out")
    assert result.files == ["merged-F32.gguf"] and result.verdict == "equal" and result.weights == "f32"
    found = report(tmp_path / "out")["checks"]["llama.cpp"]
    assert (found["rows"], found["equal_prompts"], found["equal_answers"]) == (3, 3, 3)
    assert all(item["original"] == item["export"] for item in found["answers"])
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "llama-server -m merged-F32.gguf --jinja" in card and "3 of 3 prompts have the trained token ids" in card


def test_adapter_becomes_a_lora_beside_its_base(trained: Path, tmp_path: Path) -> None:
    result = export(trained, tmp_path / "out", format="ollama")
    assert result.files == ["tiny-llama-F32.gguf", "adapter-lora.gguf", "Modelfile"]
    assert result.verdict == "equal" and result.checks["Ollama's TEMPLATE"]["equal_prompts"] == 3
    modelfile = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert modelfile.startswith('FROM ./tiny-llama-F32.gguf\nADAPTER ./adapter-lora.gguf\nTEMPLATE """')
    assert '### 본문:\n{{ $user }}\n\n### 제목:\n"""\n' in modelfile
    assert 'PARAMETER stop "<|endoftext|>"\n' in modelfile and "PARAMETER repeat_penalty 1\n" in modelfile
    assert set(collect(tmp_path / "out", "me/titles")) >= {*result.files, "README.md", "template.txt"}


def test_the_adapter_is_what_changes_the_answers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check fails if the LoRA is left out, and shows both answers."""
    from byeori.export import llama_cpp

    class WithoutAdapter(llama_cpp.LlamaCpp):
        def __init__(self, model: Path, adapter: Path | None = None, **settings: Any) -> None:
            super().__init__(model, None, **settings)

    monkeypatch.setattr(llama_cpp, "LlamaCpp", WithoutAdapter)
    with pytest.raises(
        ModelError, match=r"llama.cpp answers '.*' where the original answers '.*', and .* nats likelier"
    ):
        export(trained, tmp_path / "out")
    assert report(tmp_path / "out.failed")["verdict"] == "different" and not (tmp_path / "out").exists()


def test_another_prompt_is_an_error_that_shows_both(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("본문:", "본문 :"), encoding="utf-8")
    with pytest.raises(ModelError, match=r"sends another prompt than was trained in 3 rows.*'.*본문 :.*' .*'.*본문:"):
        export(tmp_path / "model", tmp_path / "out")


def test_a_chat_with_an_unusual_end_of_turn(chatty: Path, tmp_path: Path) -> None:
    result = export(chatty, tmp_path / "out", format="ollama")
    assert result.verdict == "equal" and result.checks["Ollama's TEMPLATE"] == {"rows": 3, "equal_prompts": 3}
    assert {item["export"] for item in result.checks["llama.cpp"]["answers"]} == {"It is."}  # and no more
    modelfile = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert 'SYSTEM """Be brief."""\n' in modelfile and 'PARAMETER stop "[/turn]"\n' in modelfile


def test_fewer_bits(merged: Path, tmp_path: Path) -> None:
    import gguf

    for weights in ("q8_0", "q4_k_m"):
        result = export(merged, tmp_path / weights, quantize=weights, check="off")
        assert result.files == [f"merged-{weights.upper()}.gguf"] and result.verdict == "not checked"
    sizes = [(tmp_path / name / f"merged-{name.upper()}.gguf").stat().st_size for name in ("q8_0", "q4_k_m")]
    assert sizes[1] < sizes[0]
    fields = gguf.GGUFReader(tmp_path / "q4_k_m" / "merged-Q4_K_M.gguf").fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert "본문" in str(fields["tokenizer.chat_template"].contents())


def test_vllm_folder(merged: Path, trained: Path, chatty: Path, tmp_path: Path) -> None:
    result = export(merged, tmp_path / "whole", format="vllm")
    assert (
        "model.safetensors" in result.files and result.verdict == "not checked" and "--vllm_python" in result.notes[0]
    )
    for path in (tmp_path / "whole").iterdir():  # vLLM reads what transformers reads
        if path.name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
            assert path.read_bytes() == (merged / path.name).read_bytes()
    assert export(trained, tmp_path / "lora", format="vllm").files == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    export(chatty, tmp_path / "chat", format="vllm")
    saved = saved_model.find(str(chatty))
    ends = json.loads((tmp_path / "chat" / "generation_config.json").read_text())["eos_token_id"]
    assert saved.tokenizer.convert_tokens_to_ids("[/turn]") in ends
    with pytest.raises(ModelError, match=r"vLLM cannot answer with this export: .*No module named 'vllm'"):
        export(merged, tmp_path / "other", format="vllm", vllm_python=sys.executable)


def changed(adapter: Path, folder: Path, **settings: Any) -> Path:
    shutil.copytree(adapter, folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_what_cannot_be_exported(trained: Path, merged: Path, tmp_path: Path) -> None:
    dora = changed(trained, tmp_path / "dora", use_dora=True)
    with pytest.raises(ModelError, match=r"vLLM does not serve .*dora as an adapter: it is a DoRA.*byeori merge"):
        export(dora, tmp_path / "out", format="vllm")
    with pytest.raises(ConfigError, match="--quantize q8_0 is for gguf and ollama"):
        export(merged, tmp_path / "out", format="vllm", quantize="q8_0")
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        export(merged, tmp_path / "out", data_path="nowhere.jsonl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"full (is not empty|holds no model)"):
            export(merged, tmp_path / "full", overwrite_output_dir=overwrite)
    bare = tmp_path / "bare"
    shutil.copytree(merged, bare)
    for name in ("template.txt", "chat_template.jinja"):
        (bare / name).unlink()
    with pytest.raises(TemplateError, match="neither a saved"):
        export(bare, tmp_path / "out")
    unknown = tmp_path / "unknown"
    shutil.copytree(merged, unknown)
    config = json.loads((unknown / "config.json").read_text()) | {"architectures": ["NobodysForCausalLM"]}
    (unknown / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"llama.cpp does not know the architecture NobodysForCausalLM"):
        export(unknown, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "conversion", None)
    with pytest.raises(ConfigError, match=r"pip install 'byeori\[gguf\]'"):
        export(merged, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ConfigError, match="--check off"):
        export(merged, tmp_path / "out")
    with pytest.raises(ModelError, match=r"llama-quantize merged-F32.gguf merged-Q6_K.gguf Q6_K"):
        export(merged, tmp_path / "out", quantize="q6_k", check="off")


def test_converter_errors_are_sentences(merged: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(merged, odd)
    tokenizer = json.loads((odd / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (odd / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ModelError, match=r"does not know how the tokenizer of .* splits text"):
        gguf_convert.write_model(odd, tmp_path / "x.gguf", "auto")


def _peft_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """A random adapter of PEFT's own on the tiny model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(init_lora_weights=False, **settings))
    model.save_pretrained(folder)
    return folder


def test_a_lora_in_gguf_has_pefts_scale_for_every_module(tiny_model: Path, tmp_path: Path) -> None:
    """B A alpha / rank, as llama.cpp computes it, is the change that PEFT merges."""
    import gguf
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 5, "0.mlp.up_proj": 3}}
    more: dict[str, Any] = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["up_proj", "down_proj"]}
    adapter = _peft_adapter(tiny_model, tmp_path / "adapter", **patterns, **more)
    config = json.loads((adapter / "adapter_config.json").read_text())
    gguf_convert.write_adapter(tiny_model, adapter, config, tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    after = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    assert len(found) == 2 * 2 * 2
    for layer in range(2):
        for own, theirs in (("ffn_up", "up_proj"), ("ffn_down", "down_proj")):
            a, b = (found[f"blk.{layer}.{own}.weight.lora_{side}"] for side in "ab")
            name = f"model.layers.{layer}.mlp.{theirs}.weight"
            torch.testing.assert_close(alpha / len(a) * b @ a, after[name] - before[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "target_modules": ["up_proj"]},
        {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=["dora", "whole layer", "embedding"],
)
def test_adapters_that_no_lora_in_gguf_holds(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = _peft_adapter(tiny_model, tmp_path / "adapter", r=4, **settings)
    config = json.loads((adapter / "adapter_config.json").read_text())
    with pytest.raises(ModelError, match=r"a LoRA of llama.cpp cannot hold; merge it with `byeori merge`"):
        gguf_convert.write_adapter(tiny_model, adapter, config, tmp_path / "x.gguf")
