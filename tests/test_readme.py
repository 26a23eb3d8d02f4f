"""The README and the docs are up to date: their commands, settings, plans and links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import printed_plans
from byeori import cli, config
from byeori.model import demo_model
from tiny_models import byte_level_tokenizer, tiny_llama

ROOT = Path(__file__).parents[1]
LONGEST = 16_000
# What makes a command small enough for a random model of two layers.
SMALL = {
    "sft": ["--max_steps=2"],
    "export": ["--max_new_tokens=4", "--check_rows=2"],
    "dpo": ["--max_steps=1", "--max_rows=16", "--val_set_size=4"],
    "generate": ["--max_new_tokens=4"],
    "compare": ["--max_new_tokens=4", "--max_rows=4"],
}


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_readme_is_short(name: str) -> None:
    assert len(_text(name)) <= LONGEST


def test_both_languages_show_the_same_commands() -> None:
    def commands(name: str) -> list[str]:
        return re.findall(r"^(?:byeori|torchrun|MODEL=|ROWS=|    --|make ).*?(?:  #|$)", _text(name), re.MULTILINE)

    assert commands("README.md") == commands("README.ko.md")


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_functions_named_are_those_of_the_commands(name: str) -> None:
    (listed,) = re.findall(r"\((`sft`[^)]*)\)", _text(name))
    assert set(re.findall(r"`(\w+)`", listed)) == {command.replace("-", "_") for command in cli.COMMANDS}


@pytest.mark.parametrize("name", ["README.md", "README.ko.md"])
def test_the_terms_of_the_embedded_model_are_named_first_and_last(name: str) -> None:
    """Where the demo is offered and under the licence; `byeori demo` says the same on the screen (test_demo.py)."""
    link = "](https://ai.google.dev/gemma/terms)"
    assert link.strip("]()") in demo_model.TERMS
    parts = _text(name).split("\n## ")
    assert link in parts[1] and "make demo" in parts[1]
    assert link in parts[-1] and "Apache-2.0" in parts[-1]


def test_the_settings_file_is_one_that_training_reads() -> None:
    def read(name: str) -> config.SftSettings:
        (text,) = re.findall(r"```yaml\n(.*?)```", _text(name), re.DOTALL)
        return config.check(config.SftSettings, yaml.safe_load(text))

    assert read("README.md") == read("README.ko.md")


def test_the_plans_are_what_the_commands_print() -> None:
    """But for this machine's processor, whose speed is measured; tests/helpers/printed_plans.py writes them anew."""
    expected = printed_plans.expected()
    shown = {page: printed_plans.blocks(page) for page in printed_plans.PAGES}
    assert {name for plans in shown.values() for name in plans} == set(expected)
    for page, plans in shown.items():
        for name, text in plans.items():
            assert text == expected[name], f"{page}: {name}"
        assert printed_plans.commands()[0] in _text(page)


# ---- the commands run as they are printed ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with room for 1,024 tokens and more."""
    folder = tmp_path_factory.mktemp("models") / "roomy"
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _commands(heading: str) -> list[list[str]]:
    """The arguments of every `byeori ...` in a section of the README, without the one that asks for the model."""
    section = _text("README.md").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    blocks = "\n".join(re.findall(r"```\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in blocks.splitlines() if line.startswith("byeori ")]


def _run(arguments: list[str], model: Path) -> None:
    """One printed command with another model, and smaller."""
    small = SMALL.get(arguments[0], [])
    for flag in (item.partition("=")[0] for item in small):
        if flag in arguments:
            place = arguments.index(flag)
            arguments = arguments[:place] + arguments[place + 2 :]
    names = {"$MODEL": str(model), "Qwen/Qwen3-0.6B": str(model), "$ROWS": f"{SAMPLES}/titles-ko-train.jsonl"}
    assert cli.main([names.get(argument, argument) for argument in arguments] + small) == 0, arguments


SAMPLES = "src/byeori/data/samples"


def test_the_steps_run_as_printed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    served = [step for step in _commands("Chat and serve") if step[0] == "export"]  # the others wait for a person
    steps = _commands("Try it") + served + _commands("Preferences (DPO)")
    order = "preview sft preview merge generate generate compare publish export export dpo compare"
    assert [step[0] for step in steps] == order.split()
    for step in steps:
        _run(step, model)
    for name in ("title-generator/adapter_model.safetensors", "merged/model.safetensors", "report/report.html"):
        assert Path(name).is_file(), name
    assert len(Path("answers.jsonl").read_text().splitlines()) == 4
    section = _text("README.md").split("\n## Chat and serve\n")[1].split("\n## ")[0]
    (serve,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    exec(compile(serve.replace("max_new_tokens=48", "max_new_tokens=4"), "README.md", "exec"), {})


def test_a_csv_of_your_own_in_five_commands(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Excel saves it: with a byte order mark and CRLF."""
    monkeypatch.chdir(tmp_path)
    rows = ["question,answer", *(f'"Question {n}, please?",Answer {n}.' for n in range(12))]
    for name, part in (("my.csv", rows[:9]), ("held-out.csv", rows[:1] + rows[9:])):
        Path(name).write_text("\r\n".join(part), encoding="utf-8-sig", newline="")
    steps = _commands("Quick start")
    assert [step[0] for step in steps] == ["preview", "sft", "compare", "generate", "merge"]
    for step in steps:
        _run(step, model)
    assert Path("my-report/report.html").is_file() and Path("my-model/model.safetensors").is_file()
