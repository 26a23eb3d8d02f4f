"""byeori plan, from its settings to its output, files and errors."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from byeori import cli, config
from byeori.commands import plan
from byeori.errors import ByeoriError, ConfigError, ModelError
from byeori.plan import rehearsal

EXAMPLES = Path(__file__).parents[2] / "examples" / "plan"
SHAPE = "hidden_size=256 num_hidden_layers=4 num_attention_heads=4 intermediate_size=512 vocab_size=1000"

GPT2 = "model_type=gpt2 n_embd=64 n_layer=2 n_head=2 vocab_size=1000"


KNOWN: dict[bytes, Any] = {}


@pytest.fixture(autouse=True)
def each_rehearsal_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many plans here are of one run, ordered and shown in several ways: they share its rehearsals."""
    real = rehearsal.rehearse

    def rehearse(architecture: Any, *given: Any, **how: Any) -> Any:
        goal = how["objective"]  # its functions cannot be pickled
        goal = (goal.row_kind, goal.logged, goal.reference)
        key = pickle.dumps((architecture.config.to_dict(), given, how | {"objective": goal}))
        if key not in KNOWN:
            KNOWN[key] = real(architecture, *given, **how)
        return KNOWN[key]

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)


def _plan(capsys: pytest.CaptureFixture[str], **settings: Any) -> dict[str, Any]:
    result = plan.plan(config.check(config.PlanSettings, {"json": True} | settings)).as_json()
    assert json.loads(capsys.readouterr().out) == result
    return result


def test_a_shape_by_hand_on_every_machine(capsys: pytest.CaptureFixture[str]) -> None:
    found = _plan(capsys, shape=SHAPE)
    assert len(found["offers"]) == 26 * 4 + 1
    assert found["objective"] == "sft"
    assert found["best"]["fits"]
    assert all(sum(offer["parts_bytes"].values()) == offer["need_bytes"] for offer in found["offers"])
    assert found["rows"].startswith("assumed: 10,000 rows of 1,024 tokens on average")


def _printed(capsys: pytest.CaptureFixture[str], **settings: Any) -> list[str]:
    plan.plan(config.check(config.PlanSettings, settings))
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "how",
    [
        {"shape": SHAPE, "beta": 0.1},
        {"base_model": str(EXAMPLES / "llama-2-ko-7b"), "cpu_offload": True, "nproc": 2, "micro_batch_size": 1},
        pytest.param(
            {"base_model": str(EXAMPLES / "Qwen1.5-72B"), "beta": 0.1, "batch_size": 8, "cutoff_len": 512},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shape", "7B", "72B"],
)
def test_the_output_in_at_most_twelve_lines(how: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    lines = _printed(capsys, **how)
    assert 7 <= len(lines) <= 12
    assert lines[-1].startswith("Next: byeori rent or byeori plan --write run.yaml")
    assert any(line.startswith("Cheapest") and " h " in line + " h " and "$" in line for line in lines)
    assert any(line.startswith("Prices: ") for line in lines)
    assert not [line for line in lines if " x 2 " in line and line.startswith(("Cheapest", "Smallest"))]


def test_the_output_for_the_tutorials_7b_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A 4090 for about a third of what an H100 costs, not an H100."""
    how = {"base_model": str(EXAMPLES / "llama-2-ko-7b"), "batch_size": 8, "micro_batch_size": 1, "lora_dropout": 0.05}
    lines = _printed(capsys, **how, lora_target_modules="gate_proj,down_proj,up_proj", table=True)
    assert next(line for line in lines if line.startswith("Cheapest")).split()[1:5] == ["RTX", "4090", "x", "1"]
    costs = {line[:22].strip(): line.split("$")[1].split()[0] for line in lines if line.startswith(("RTX", "H100"))}
    assert float(costs["RTX 4090 x 1"]) < 0.4 * float(costs["H100 x 1"])


def test_more_output_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    lines = _printed(capsys, shape=SHAPE, gpu="4090,H100", explain=True, table=True, html=str(page))
    out = "\n".join(lines)
    assert "batch_size 8, 3 epochs, cutoff_len 2,048" in out
    assert (
        sum(line.startswith("RTX 4090 x") for line in lines) == 3
    )  # in the table, x 1 and the fastest, and above its parts
    assert "RTX 4090 50% to 98% (public)" in out
    assert "PyTorch allocates" in out and "nvidia-smi shows" in out
    assert "embed_tokens.weight" in out
    text = page.read_text(encoding="utf-8")
    assert "RTX 4090 x 1" in text and "<circle" in text and "<script" not in text


def test_another_order_and_another_provider(capsys: pytest.CaptureFixture[str]) -> None:
    how = {"base_model": str(EXAMPLES / "llama-2-ko-7b"), "batch_size": 8, "micro_batch_size": 1}
    assert _plan(capsys, **how)["best"]["machine"] == "RTX 4090"
    fastest, smallest = (_plan(capsys, **how, **{"for": order})["best"] for order in ("fastest", "smallest"))
    assert (fastest["count"], smallest["count"]) == (8, 1)
    assert smallest["memory_bytes"] < 16 * 2**30
    found = _plan(capsys, **how, provider="runpod")
    assert {offer["provider"] for offer in found["offers"]} == {"RunPod", None}


def test_spot_prices_come_with_their_risk(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    how: dict[str, Any] = {"base_model": str(EXAMPLES / "llama-2-ko-7b"), "gpu": "H100", "micro_batch_size": 1}
    plan.plan(config.check(config.PlanSettings, how | {"spot": True, "write": str(run)}))
    out = capsys.readouterr().out
    assert "Spot: H100 x 8 at $2.46 an hour each (CoreWeave) may be taken away at any time; --save_steps " in out
    every = yaml.safe_load(run.read_text())["save_steps"]
    assert 100 < every < 10_000


def test_free_notebooks_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    """7B on a T4 takes longer than a session of Colab may."""
    how = {"base_model": str(EXAMPLES / "llama-2-ko-7b"), "batch_size": 8, "micro_batch_size": 1}
    free = next(line for line in _printed(capsys, **how) if line.startswith("Free: "))
    assert re.search(r"Colab \(T4 x 1\) fits with .+ h, may be longer than a session \(12 h\), use \w+; Kaggle", free)
    assert "Kaggle (T4 x 2) fits with" in free
    assert [offer["count"] for offer in _plan(capsys, **how, gpu="Kaggle")["offers"]] == [1, 2]


def test_what_pcie_does_to_several_cards(capsys: pytest.CaptureFixture[str]) -> None:
    how = {"base_model": str(EXAMPLES / "Qwen1.5-72B"), "beta": 0.1, "batch_size": 16, "gpu": "4090", "cutoff_len": 512}
    lines = _printed(capsys, **how)
    assert [line for line in lines if line.startswith("PCIe: RTX 4090 x 8 spends ")]


def test_here_is_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    lines = _printed(capsys, shape=SHAPE, here=True)
    assert [line.split()[:4] for line in lines if line.startswith("Best")] == [["Best", "CPU", "x", "1"]]
    assert lines[-1].startswith("Next: byeori sft with the same settings")
    assert not [line for line in lines if line.startswith("Prices") or "32,768 tokens" in line]


def test_notes_on_what_is_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = _plan(capsys, shape=SHAPE, gpu="L4", cpu_offload=True, nproc=2, num_epochs=1)
    notes = " ".join(found["notes"])
    assert "batch_size 8, 1 epoch, cutoff_len" in found["about"]
    assert "nproc 2 is not counted" in notes


def test_the_tutorials_preference_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = _plan(
        capsys,
        base_model=str(EXAMPLES / "Qwen1.5-72B"),
        beta=0.1,
        batch_size=16,
        micro_batch_size=1,
        cutoff_len=512,
        gpu="H100",
    )
    assert found["objective"] == "dpo"
    assert found["weights"] == 72_287_920_128
    assert found["offers"][0]["settings"]["load_in_4bit"]


def test_real_rows(tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.yaml"
    found = _plan(
        capsys,
        base_model=tiny_model,
        data_path=str(title_rows),
        cutoff_len=256,
        batch_size=4,
        gpu="T4",
        write=str(run),
    )
    assert found["rows"].startswith("24 rows of ")
    assert found["steps"] == 18
    settings = config.check(config.SftSettings, config.read_yaml(str(run), config.SftSettings))
    assert (settings.batch_size, settings.cutoff_len) == (4, 256)


def test_dropped_rows_are_named(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    first = json.loads(title_rows.read_text(encoding="utf-8").splitlines()[0])
    lines = [json.dumps(first | {"title": ""}, ensure_ascii=False), title_rows.read_text(encoding="utf-8")]
    rows.write_text("\n".join(lines), encoding="utf-8")
    how = {"base_model": str(tiny_model), "data_path": str(rows), "cutoff_len": 256, "gpu": "T4"}
    plan.plan(config.check(config.PlanSettings, how | {"on_bad_rows": "drop"}))
    out = capsys.readouterr().out
    assert "1 row (1 with an empty answer) dropped: rows.jsonl line 1: the answer, column 'title', is empty" in out
    with pytest.raises(ByeoriError, match="or drop such rows with --on_bad_rows drop"):
        plan.plan(config.check(config.PlanSettings, how))


def _written(path: Path, **settings: Any) -> config.SftSettings:
    """What --write writes, as `byeori sft --config` reads it."""
    plan.plan(config.check(config.PlanSettings, {"write": str(path)} | settings))
    read = config.read_yaml(str(path), config.SftSettings)
    return config.check(config.SftSettings, {"base_model": "m", "data_path": "rows"} | read)


def test_settings_of_8_bit_are_written_without_4_bit(tmp_path: Path) -> None:
    """In 16 bit, as the plan counts them, the weights do not fit."""
    tall = "hidden_size=2560 num_hidden_layers=140 num_attention_heads=4 intermediate_size=14336 vocab_size=1000"
    how = {"shape": tall, "gpu": "RTX 5090", "batch_size": 2, "micro_batch_size": 1, "cutoff_len": 64}
    written = _written(tmp_path / "run.yaml", **how, load_in_8bit=True)
    assert (written.load_in_8bit, written.load_in_4bit) == (True, False)


def test_given_settings_are_written_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = {"shape": SHAPE, "gpu": "L4", "gradient_checkpointing": "offload", "parallel": "hsdp"}
    written = _written(tmp_path / "run.yaml", **how, micro_batch_tokens=2048)
    assert (written.gradient_checkpointing, written.parallel) == ("offload", "hsdp")
    assert written.micro_batch_tokens == 2048
    assert capsys.readouterr().err.rstrip().endswith("; add --base_model and --data_path")


def test_calibration(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    found = _plan(capsys, base_model=tiny_model, cutoff_len=128, gpu="CPU", calibrate=True, dtype="float32")
    assert abs(found["calibration"]["error"]) < 0.03
    assert found["calibration"]["seconds"] > 0
    assert (tmp_path / "cache" / "measured_speed.json").is_file()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no model is given; give --base_model, or --shape"),
        ({"shape": SHAPE, "base_model": "m"}, "base_model and shape exclude each other"),
        ({"base_model": "/no/such/folder", "gpu": "H1000"}, "there is no GPU 'H1000' (did you mean H100?)"),
        ({"base_model": "/no/such/folder", "gpu": "cpu"}, "there is no folder /no/such/folder"),
        ({"shape": SHAPE, "gpu": "H1000"}, "there is no GPU 'H1000' (did you mean H100?)"),
        ({"shape": "hidden_size"}, "write name=number"),
        ({"shape": "hidden_size=-4"}, "write name=number"),
        ({"shape": "model_type=lama hidden_size=4"}, "has no model_type lama (did you mean llama?)"),
        ({"shape": "hidden_size=250 num_attention_heads=4 num_hidden_layers=1"}, "250"),
        ({"shape": "hidden_size=256 num_attention_heads=6 num_key_value_heads=4"}, "6"),
        ({"shape": SHAPE, "cutoff_len": 10**6}, "is beyond the maximum length of this shape; give 2048 or less"),
        ({"shape": SHAPE, "batch_size": 6, "micro_batch_size": 4}, "batch_size 6 is not a multiple of"),
        ({"shape": SHAPE, "objective": "dpo", "train_on_inputs": True}, "train_on_inputs does not apply to pairs"),
        ({"shape": SHAPE, "assumed_tokens": 4000}, "beyond cutoff_len 2048"),
        ({"shape": SHAPE, "lora_target_modules": "no_such"}, "no_such"),
        ({"shape": GPT2, "load_in_4bit": True}, "GPT2LMHeadModel has no plain linear layers to quantize"),
        ({"shape": GPT2, "load_in_8bit": True}, "GPT2LMHeadModel has no plain linear layers to quantize"),
        ({"shape": SHAPE, "prices": "/no/such/file"}, "cannot read the prices file /no/such/file"),
        ({"shape": SHAPE, "provider": "nobody"}, "no prices of 'nobody' are known"),
        ({"shape": SHAPE, "gpu": "T4", "here": True}, "here and gpu exclude each other"),
        ({"base_model": "/no/such/folder"}, "there is no folder /no/such/folder"),
    ],
)
def test_bad_input(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ByeoriError) as error:
        plan.plan(config.check(config.PlanSettings, settings))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model: it has no config\.json"):
        plan.plan(config.check(config.PlanSettings, {"base_model": str(tmp_path)}))


def test_a_model_that_4_bit_cannot_hold_is_planned_in_16(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "model_type=gpt2 n_embd=8192 n_layer=40 n_head=64 vocab_size=1000"
    found = _plan(capsys, shape=wide, gpu="T4", cutoff_len=64, batch_size=8)
    assert not found["offers"][0]["fits"]
    assert all(offer["settings"]["load_in_4bit"] is False for offer in found["offers"])


def test_nothing_is_enough(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = {"base_model": str(EXAMPLES / "Qwen1.5-72B"), "gpu": "T4", "batch_size": 1, "cutoff_len": 64}
    with pytest.raises(ConfigError, match="no machine is enough"):
        plan.plan(config.check(config.PlanSettings, settings | {"write": str(tmp_path / "run.yaml")}))
    assert "Nothing here is enough: T4 x 1 lacks" in capsys.readouterr().out


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--shape", *SHAPE.split(), "--gpu", "L4", "--gradient_checkpointing", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["offers"][0]["settings"]["gradient_checkpointing"] == "full"


def test_a_plan_is_the_same_every_time(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"shape": SHAPE, "gpu": "L4", "beta": 0.1, "assumed_tokens": 256, "cutoff_len": 512}
    first = _plan(capsys, **settings)
    KNOWN.clear()
    assert _plan(capsys, **settings) == first


def test_scaled_positions_without_rows(capsys: pytest.CaptureFixture[str]) -> None:
    shape = f"{SHAPE} max_position_embeddings=2048"
    how: dict[str, Any] = {"shape": shape, "gpu": "L4", "cutoff_len": 8192, "micro_batch_size": 1}
    with pytest.raises(ConfigError, match="beyond the maximum length of this shape"):
        _plan(capsys, **how)
    assert "the longest 8,192" in _plan(capsys, **how, rope_scaling="yarn")["rows"]
    with pytest.raises(ConfigError, match="has 2048 positions and cutoff_len is 2048; leave it out"):
        _plan(capsys, **how | {"cutoff_len": 2048}, rope_scaling="yarn")


def test_an_adapter_without_rows_is_planned_with_its_own_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(EXAMPLES / "llama-2-ko-7b"), "r": 64}
    adapter |= {"lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    how: dict[str, Any] = {"base_model": str(tmp_path), "gpu": "A100 80GB", "micro_batch_size": 1}
    assert "LoRA of rank 64 on q_proj, v_proj" in _plan(capsys, **how)["about"]
    with pytest.raises(ConfigError, match="--lora_r 8 is not that of the adapter"):
        _plan(capsys, **how, lora_r=8)
    with pytest.raises(ConfigError, match="is an adapter, which keeps the positions"):
        _plan(capsys, **how, rope_scaling="yarn")
