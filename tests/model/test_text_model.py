"""The language model inside a checkpoint: what is adapted, what the head is, and what comes out at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import byeori
import runs
import zoo
from byeori.data.tokenize import Example
from byeori.errors import ConfigError, ModelError
from byeori.kernels import forest_attention
from byeori.model import adapter, forward, load, quantize, skeleton, text_model
from tiny_models import byte_level_tokenizer

_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.4,
    "max_position_embeddings": 512,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def gemma3(words: int) -> Any:
    text = _TEXT | {"vocab_size": words, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(text_config=text, vision_config=_VISION, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_5(words: int) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    delta = {name: value for name, value in zoo.DELTA.items() if name != "head_dim"}
    vision = {"hidden_size": 16, "intermediate_size": 24, "depth": 1, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3_5Config(
        text_config=_TEXT | delta | {"vocab_size": words, "rope_parameters": rope}, vision_config=vision
    )
    return transformers.Qwen3_5ForConditionalGeneration(config)


def llava(words: int) -> Any:
    text = {"model_type": "llama", "vocab_size": words} | _TEXT
    vision = {"model_type": "clip_vision_model", "projection_dim": 16} | _VISION
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    return transformers.LlavaForConditionalGeneration(config)


MODELS = {"gemma3": gemma3, "qwen3_5": qwen3_5, "llava": llava}


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    MODELS[request.param](len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_language_model_alone_gets_adapters(checkpoint: Path) -> None:
    model = load.load_model(str(checkpoint), dtype=torch.float32, device=torch.device("cpu"))
    assert type(model).__name__ == json.loads((checkpoint / "config.json").read_text())["architectures"][0]
    for targets in (["all-linear"], ["q_proj", "o_proj"]):
        tuned = adapter.attach(model, r=2, alpha=4, dropout=0.0, targets=targets, seed=0)
        names = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
        assert names
        assert all(".language_model." in name for name in names)
        tuned.unload()
    with pytest.raises(ConfigError, match="no layer is called 'fc3'"):
        adapter.attach(model, r=2, alpha=4, dropout=0.0, targets=["fc3"], seed=0)


def test_forests_equal_its_own_forward_pass(checkpoint: Path) -> None:
    model = load.load_model(str(checkpoint), dtype=torch.float32, device=torch.device("cpu"))
    rows = [Example(token_ids=[*range(10, 40), at, at + 1], targets=((29, 32),)) for at in (50, 60, 70)]
    assert forward.choose(model, rows) is None
    model.train()  # Gemma 3 asks for the kind of every token while it trains
    assert torch.isfinite(forward.forest_logprobs(model, forward.forests.build(rows))).all()


def test_trained_planned_merged_and_loaded_as_the_class_it_was(
    checkpoint: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.sft(checkpoint, title_rows, tmp_path / "adapter", max_rows=8, max_steps=2, learning_rate=0.01)
    assert "one at a time" not in capsys.readouterr().err
    byeori.merge(peft_model_path=str(tmp_path / "adapter"), output_dir=str(tmp_path / "merged"))
    merged, base = (AutoModelForImageTextToText.from_pretrained(at) for at in (tmp_path / "merged", checkpoint))
    assert type(merged) is type(base)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, base.state_dict()[name])}
    assert changed
    assert all("language_model" in name for name in changed)
    assert (
        load_file(tmp_path / "merged" / "model.safetensors").keys()
        == load_file(checkpoint / "model.safetensors").keys()
    )


def test_what_is_no_language_model() -> None:
    with pytest.raises(ModelError, match="clip is no language model that continues a text"):
        text_model.auto_class(transformers.CLIPConfig())
    with pytest.raises(ModelError, match="t5 is no language model"):
        skeleton.frozen_model(transformers.T5Config(), torch.float32, "meta")


def test_an_encoder_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=zoo.WORDS, **sizes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    forest_attention.register()
    with pytest.raises(ModelError, match="this model's attention sees later tokens"):
        forward.choose(model, zoo.tree()[:2])


def test_what_all_linear_leaves_out() -> None:
    jamba = zoo.ALL["jamba"]()
    jamba.config.num_experts = 4
    jamba.model.layers[0].feed_forward.router = torch.nn.Linear(16, 4, bias=False)
    names = text_model.linear_targets(jamba)
    assert names is not None
    assert "router" not in names
    assert {"q_proj", "in_proj", "gate_proj"} <= set(names)
    mamba = text_model.linear_targets(zoo.ALL["mamba2"]())
    assert mamba == ["in_proj"]
    assert text_model.linear_targets(zoo.ALL["llama"]()) is None
    # Mamba computes with the weights of the others, past an adapter on these layers
    assert text_model.linear_targets(zoo.ALL["mamba"]()) == ["in_proj"]
    assert [name for _, name, _ in quantize.plain_layers(zoo.ALL["mamba"]())] == ["in_proj"] * 2


@pytest.mark.parametrize("wrong", [{"final_logit_softcapping": 3.0}, {"logit_scale": 0.5}])
def test_a_setting_that_the_models_code_does_not_read_is_no_part_of_the_head(wrong: dict[str, float]) -> None:
    model = zoo.ALL["llama"]()
    model.config.update(wrong)
    found = text_model.head(model)
    assert (found.scale, found.softcap) == (1.0, None)
    assert text_model.head(zoo.ALL["cohere"]()).scale == 0.25
    assert text_model.head(zoo.ALL["gemma2"]()).softcap == 3.0


def test_names_that_are_numbers_stand_with_the_one_before() -> None:
    """`0` would be the first decoder layer as well (Gemma 3n)."""
    assert text_model.ending("model.altup_projections.0") == "altup_projections.0"
    assert text_model.ending("model.layers.0.q_proj") == "q_proj"


class _Indexer(torch.nn.Module):
    """As DeepSeek V3.2 scores keys."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.score = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scored: torch.Tensor = self.score(self.up(x).to(self.score.weight.dtype))
        return scored


def test_a_layer_whose_type_is_read_is_not_quantized() -> None:
    """Its weight would be bytes then, and so its input; an adapter on it is fine."""
    indexer = _Indexer()
    assert not quantize.reads_weight(indexer, "score")
    assert quantize.reads_weight(indexer, "score", "device|shape")
    assert not quantize.reads_weight(indexer, "up", "device|shape")
