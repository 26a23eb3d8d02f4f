"""`import byeori`: one function a command, settings as keywords."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import byeori
from byeori import cli

FUNCTIONS = [
    "audit",
    "chat",
    "compare",
    "demo",
    "doctor",
    "dpo",
    "export",
    "generate",
    "merge",
    "plan",
    "preview",
    "publish",
    "rent",
    "serve",
    "sft",
    "studio",
]


def test_the_public_surface_is_exactly_this() -> None:
    assert byeori.__all__ == [
        "ByeoriError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "GateError",
        "HubError",
        "ModelError",
        "TemplateError",
        "TooLongError",
        "TrainingError",
        "audit",
        "chat",
        "compare",
        "demo",
        "demo_model",
        "doctor",
        "dpo",
        "export",
        "generate",
        "merge",
        "plan",
        "preview",
        "publish",
        "rent",
        "serve",
        "sft",
        "studio",
    ]
    assert all(hasattr(byeori, name) and getattr(byeori, name).__doc__ for name in byeori.__all__)


def test_every_command_has_its_function() -> None:
    names = {name.replace("-", "_") for name in cli.COMMANDS}
    functions = {name for name in byeori.__all__ if not name.endswith("Error")}
    assert names == functions == {*FUNCTIONS, "demo_model"}


def test_no_module_takes_the_name_of_a_function() -> None:
    """Importing byeori.x sets that name in byeori: a function of the same name would be gone after its first call."""
    modules = {module.name for module in pkgutil.iter_modules(byeori.__path__)}
    assert modules & set(byeori.__all__) == {"export", "plan", "studio"}  # which have the next test


def test_export_and_plan_stay_functions_when_their_folders_are_imported() -> None:
    code = (
        "import byeori, importlib, byeori.plan.workload, byeori.export.publish\n"
        "from byeori.plan import machines\n"
        "importlib.import_module('byeori.plan'); importlib.import_module('byeori.export')\n"
        "from byeori import export, plan\n"
        "assert machines.read and all(map(callable, (byeori.plan, plan, byeori.export, export)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_keywords_only(name: str) -> None:
    signature = inspect.signature(getattr(byeori, name))
    assert {parameter.kind for parameter in signature.parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    fields = cli.COMMANDS[name].model_fields
    assert set(signature.parameters) == set(fields)
    for keyword, field in fields.items():
        required = signature.parameters[keyword].default is inspect.Parameter.empty
        assert required == field.is_required() and (required or signature.parameters[keyword].default == field.default)
        assert f"    {keyword}: " in getattr(byeori, name).__doc__


def test_the_stub_for_editors_is_current() -> None:
    spec = importlib.util.spec_from_file_location("api_stub", Path(__file__).parents[1] / "scripts" / "api_stub.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.STUB.read_text(encoding="utf-8") == script.text(), "python scripts/api_stub.py"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_wrong_keyword_is_a_config_error(name: str) -> None:
    with pytest.raises(byeori.ConfigError, match="there is no setting 'no_such_setting'"):
        getattr(byeori, name)(no_such_setting=1)


def test_a_misspelt_keyword_has_a_near_name() -> None:
    with pytest.raises(byeori.ConfigError, match=r"'learning_rat' \(did you mean learning_rate\?\)"):
        byeori.sft(base_model="m", data_path="r", output_dir="o", learning_rat=1)


def test_every_error_is_a_byeori_error() -> None:
    errors = [getattr(byeori, name) for name in byeori.__all__ if name.endswith("Error")]
    assert all(issubclass(error, byeori.ByeoriError) for error in errors)


def test_importing_it_imports_no_torch() -> None:
    code = "import byeori, sys; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_job_from_python(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = byeori.preview(base_model=tiny_model, data_path=title_rows, cutoff_len=512, rows=1)
    assert (found.train_rows, found.template, found.as_json()["train_rows"]) == (24, "title-ko", 24)
    run = byeori.sft(
        base_model=tiny_model,
        data_path=[title_rows],
        output_dir=tmp_path / "adapter",
        cutoff_len=512,
        max_steps=2,
        lora_target_modules=["gate_proj", "up_proj"],
    )
    assert (run.output_dir, run.steps) == (tmp_path / "adapter", 2)
    merged = byeori.merge(peft_model_path=run.output_dir, output_dir=tmp_path / "merged")
    assert merged.verdict == "equal"
    capsys.readouterr()
    answers = byeori.generate(model=tmp_path / "merged", columns={"document": "봄"}, max_new_tokens=4)
    assert [line.strip() for line in capsys.readouterr().out.split("\n", 1)][:1] == [answers[0].split("\n")[0].strip()]
    assert byeori.generate(model=tmp_path / "merged", input_text="봄", max_new_tokens=4) == answers
    result = byeori.compare(
        adapter=run.output_dir,
        data_path=title_rows,
        output_dir=tmp_path / "report",
        max_new_tokens=4,
        max_rows=4,
    )
    assert result.report == tmp_path / "report" / "report.html"
    assert set(result.metrics) >= {"base", "tuned", "difference"}
    assert result.verdict
    listed = byeori.publish(folder=run.output_dir, repo_id="user/title", dry_run=True)
    assert "adapter_model.safetensors" in listed.files
    assert listed.url is None
