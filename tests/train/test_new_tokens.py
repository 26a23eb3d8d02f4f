"""New tokens, trained rows and whole modules in runs: resumed, merged as PEFT does, trained further, generated with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import byeori
from byeori.errors import ConfigError
from byeori.train import state
from runs import same, stop_after
from tiny_models import byte_level_tokenizer, tiny_llama

IDS = torch.tensor([[5, 6, 9, 8, 15]])


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), tie_word_embeddings=request.param == "tied").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"prompt": f"<tool> {n} [end]", "completion": f"<tool>answer {n}[end]"} for n in range(16)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def settings(base: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    given = {"base_model": str(base), "data_path": str(rows), "output_dir": str(output), "dtype": "float32"}
    shape = {"template": "{prompt}{completion}", "cutoff_len": 128, "max_steps": 4, "save_steps": 2, "batch_size": 4}
    return given | shape | {"learning_rate": 1e-2} | changes


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(ids).logits.float()


@pytest.mark.parametrize("how", [{"add_tokens": "<tool> [end]"}, {"modules_to_save": "embed_tokens lm_head"}], ids=str)
def test_resumed_merged_and_trained_further(
    how: dict[str, Any], base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = byeori.sft(**settings(base, rows, tmp_path / "whole", **how))
    assert result.last_loss < result.first_loss
    stop_after(3, monkeypatch)
    with pytest.raises(state.Interrupted):
        byeori.sft(**settings(base, rows, tmp_path / "cut", **how))
    monkeypatch.undo()
    byeori.sft(**settings(base, rows, tmp_path / "cut", **how, resume_from_checkpoint="latest"))
    same(tmp_path / "whole", tmp_path / "cut", 4)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    new = "add_tokens" in how
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a<tool>b[end]").input_ids)
    assert (pieces == ["a", "<tool>", "b", "[end]"]) == new
    ids = torch.cat([IDS, torch.arange(len(tokenizer) - 3, len(tokenizer))[None]], dim=1)
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = plain.config.vocab_size
    plain.resize_token_embeddings(len(tokenizer))
    expected = logits(PeftModel.from_pretrained(plain, tmp_path / "whole"), ids)
    merged = byeori.merge(peft_model_path=tmp_path / "whole", output_dir=tmp_path / "merged", dtype="float32")
    assert merged.verdict == "equal"
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids), expected, rtol=1e-5, atol=1e-5
    )
    assert (expected.shape[-1] - before) == 2 * new
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == len(tokenizer)

    further = settings(tmp_path / "whole", rows, tmp_path / "two", max_steps=1, learning_rate=1e-9)
    again = byeori.sft(**further)
    assert again.first_loss < result.first_loss
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
    texts = [
        byeori.generate(model=tmp_path / name, raw="<tool> 1", max_new_tokens=5, dtype="float32")
        for name in ("whole", "merged")
    ]
    assert texts[0] == texts[1]


def test_rows_of_tokens_that_are_there(base: Path, rows: Path, tmp_path: Path) -> None:
    byeori.sft(**settings(base, rows, tmp_path / "run", max_steps=1, trainable_token_indices="<|im_start|> 7"))
    recorded = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert recorded["model.embed_tokens"] == [1, 7]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"add_tokens": "<|im_start|>"}, "is a token of .* already; give it to --trainable_token_indices"),
        ({"trainable_token_indices": "<none>"}, "has no token '<none>'; see --add_tokens"),
        ({"trainable_token_indices": "99999"}, "has no token '99999'"),
    ],
    ids=str,
)
def test_tokens_that_do_not_fit(
    given: dict[str, Any], sentence: str, tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        byeori.sft(**settings(tiny_model, rows, tmp_path / "run", **given))


@pytest.mark.parametrize(("rows_of", "tied"), [(+3, True), (-9, False)])
def test_a_vocabulary_that_was_resized_elsewhere(rows_of: int, tied: bool, rows: Path, tmp_path: Path) -> None:
    """PEFT saves the whole embedding then; sft, dpo, merge and generate accept it, and a run keeps it."""
    base, tokenizer = tmp_path / "base", byte_level_tokenizer()
    tiny_llama(len(tokenizer) + 20, tie_word_embeddings=tied).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + rows_of)
    torch.manual_seed(2)
    tuned = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    tuned.save_pretrained(tmp_path / "elsewhere")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "elsewhere")
    expected = logits(tuned, IDS)
    byeori.merge(peft_model_path=tmp_path / "elsewhere", output_dir=tmp_path / "merged", dtype="float32")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    how = settings(tmp_path / "elsewhere", rows, tmp_path / "two", max_steps=1, learning_rate=1e-9)
    byeori.sft(**how)
    byeori.merge(peft_model_path=tmp_path / "two", output_dir=tmp_path / "merged2", dtype="float32")
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged2"), IDS)
    torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-5)
    pairs = tmp_path / "pairs.jsonl"
    pair = {"prompt": "a", "chosen": "bc", "rejected": "cd"}
    pairs.write_text("".join(json.dumps(pair | {"prompt": f"{n}"}) + "\n" for n in range(4)), encoding="utf-8")
    changes = {"max_steps": 1, "template": "prompt-completion"}
    byeori.dpo(**settings(tmp_path / "elsewhere", pairs, tmp_path / "dpo", **changes))
    assert byeori.generate(model=tmp_path / "elsewhere", raw="12", max_new_tokens=3)
