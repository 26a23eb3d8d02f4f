"""Files and names from others run no code and reach no other folder; a token is written nowhere."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import byeori
import forks
from byeori.cli import main
from byeori.errors import ByeoriError
from byeori.model import load
from byeori.support import atomic_files
from byeori.train import checkpoint

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "scripts").rglob("*.py"))
TOKEN = "hf_" + "SecretTokenOfATest" * 2


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.crater,))


@pytest.fixture
def bomb(tmp_path: Path) -> Any:
    """The bytes of a pickle that must not be read."""
    crater = tmp_path / "crater"
    yield pickle.dumps(Bomb(crater))
    assert not crater.exists(), "code of a file was run"


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished adapter with its checkpoints."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def train(model: Path, rows: Path, output: Path, **changes: Any) -> Any:
    how = {"cutoff_len": 512, "max_steps": 13, "learning_rate": 2e-2, "dtype": "float32"}
    return byeori.sft(base_model=model, data_path=rows, output_dir=output, **how | changes)


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ByeoriError) as caught:
        act()
    return str(caught.value)


# ---- pickles -----------------------------------------------------------------------------------------------------


def test_a_pickled_adapter_is_refused_everywhere(
    bomb: bytes, adapter: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(bomb)
    acts: list[Callable[[], Any]] = [
        lambda: train(tiny_model, title_rows, tmp_path / "out", resume_from_checkpoint=str(adapter)),
        lambda: train(adapter, title_rows, tmp_path / "further"),
        lambda: byeori.generate(model=adapter, columns={"document": "봄"}),
        lambda: byeori.compare(adapter=adapter, data_path=title_rows, output_dir=tmp_path / "cmp"),
        lambda: byeori.merge(peft_model_path=adapter, output_dir=tmp_path / "merged"),
    ]
    for act in acts:
        assert "never loaded" in refusal(act)


def test_a_pickle_beside_the_weights_is_not_read(bomb: bytes, adapter: Path, title_rows: Path) -> None:
    for name in ("adapter_model.bin", "optimizer.pt", "pytorch_model.bin", "training_args.bin", "scheduler.pt"):
        (adapter / name).write_bytes(bomb)
    assert byeori.generate(model=adapter, columns={"document": "봄"}, max_new_tokens=2)


@pytest.mark.parametrize("listed", [False, True])
def test_a_pickled_optimizer_is_refused(
    listed: bool, bomb: bytes, adapter: Path, tiny_model: Path, title_rows: Path
) -> None:
    """In a checkpoint of byeori's, also where the manifest was written for it."""
    folder = checkpoint.newest(adapter)
    assert folder is not None
    (folder / "optimizer.safetensors").unlink()
    (folder / "optimizer.pt").write_bytes(bomb)
    if listed:
        manifest = json.loads((folder / "manifest.json").read_text())["sha256"]
        del manifest["optimizer.safetensors"]
        manifest["optimizer.pt"] = atomic_files.sha256(folder / "optimizer.pt")
        (folder / "manifest.json").write_text(json.dumps({"sha256": manifest}))
    said = refusal(lambda: train(tiny_model, title_rows, adapter, resume_from_checkpoint=str(folder)))
    assert "is not whole" in said and "optimizer.safetensors" in said


def test_another_trainers_checkpoint_brings_its_weights_alone(
    bomb: bytes, adapter: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """transformers' Trainer writes optimizer.pt and trainer_state.json beside the adapter, and no manifest."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (adapter / name).write_bytes(bomb)
    (adapter / "trainer_state.json").write_text('{"global_step": 3}')
    assert train(tiny_model, title_rows, tmp_path / "out", resume_from_checkpoint=str(adapter)).steps > 0


def test_a_pickled_base_is_refused(bomb: bytes, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(bomb)
    for act in (
        lambda: train(base, title_rows, tmp_path / "out"),
        lambda: byeori.generate(model=base, template="title-ko", columns={"document": "봄"}),
    ):
        assert "safetensors" in refusal(act)


def test_the_source_calls_nothing_that_runs_code_of_a_file() -> None:
    forbidden = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not names & forbidden, f"{path.name}: {names & forbidden}"
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not imported & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}, path.name
        shells = [keyword for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
        assert not any(k.arg == "shell" for k in shells), path.name


# ---- code of a repository ----------------------------------------------------------------------------------------


def test_code_of_a_repository_runs_for_nobody(
    adapter: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """Not even where the settings that were saved beside an adapter ask for it."""
    evil = Path(shutil.copytree(tiny_model, tmp_path / "evil"))
    config = json.loads((evil / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.Tok", None]}
    (evil / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": names}))
    tokens = json.loads((evil / "tokenizer_config.json").read_text())
    (evil / "tokenizer_config.json").write_text(
        json.dumps(tokens | {"auto_map": names, "tokenizer_class": "EvilTokenizer"})
    )
    (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    text = (adapter / "byeori.yaml").read_text()
    text = text.replace("trust_remote_code: null", f"trust_remote_code: {evil}").replace(str(tiny_model), str(evil))
    (adapter / "byeori.yaml").write_text(text)
    acts: list[Callable[[], Any]] = [
        lambda: train(evil, title_rows, tmp_path / "out"),
        lambda: byeori.preview(base_model=evil, data_path=title_rows),
        lambda: byeori.generate(model=evil, columns={"document": "봄"}),
        lambda: byeori.generate(model=adapter, base_model=evil, columns={"document": "봄"}),
        lambda: byeori.compare(adapter=adapter, base_model=evil, data_path=title_rows, output_dir=tmp_path / "cmp"),
        lambda: byeori.merge(peft_model_path=adapter, base_model_name_or_path=evil, output_dir=tmp_path / "merged"),
    ]
    for act in acts:
        refusal(act)
        assert not (tmp_path / "ran").exists()


def test_an_adapters_config_imports_nothing(
    adapter: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT imports the modules that these fields name: always before 0.20, and in its automatic classes."""
    (tmp_path / "evil_core.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = adapter / "adapter_config.json"
    evil = {"megatron_config": {"x": 1}, "megatron_core": "evil_core", "task_type": None}
    evil |= {"auto_mapping": {"base_model_class": "Model", "parent_library": "evil_core"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | evil))
    acts: list[Callable[[], Any]] = [
        lambda: byeori.generate(model=adapter, columns={"document": "봄"}, max_new_tokens=2),
        lambda: byeori.merge(peft_model_path=adapter, output_dir=tmp_path / "merged"),
        lambda: train(adapter, title_rows, tmp_path / "out", max_steps=1),
    ]
    for act in acts:
        with suppress(ByeoriError):  # the adapter may be refused, or used without them
            act()
        assert "evil_core" not in sys.modules and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "evil/kernel@main:attend", {"": "evil/kernel"}, "byeori", 7])
def test_a_config_does_not_choose_what_computes(name: str, value: Any, tiny_model: Path, tmp_path: Path) -> None:
    """transformers loads an attention kernel from the Hub, compiled code, if config.json names one."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    model = load.load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    plain = load.load_model(str(tiny_model), dtype=torch.float32, device=torch.device("cpu"))
    assert model.config._attn_implementation == plain.config._attn_implementation
    assert model.config._experts_implementation == plain.config._experts_implementation
    skeleton = load.load_config(str(folder))
    assert skeleton._attn_implementation is None and skeleton._experts_implementation is None


def test_yaml_is_loaded_safely(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"base_model: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n"
    (tmp_path / "run.yaml").write_text(text)
    assert main(["sft", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "is not valid YAML" in capsys.readouterr().err
    (adapter / "byeori.yaml").write_text(text)
    assert "is not valid YAML" in refusal(lambda: byeori.generate(model=adapter, columns={"document": "봄"}))
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_cannot_reach_the_system(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    evil = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "ran") + "') }}"
    (base / "chat_template.jinja").write_text(evil + "{{ messages[0]['content'] }}")
    rows = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "봄"}, {"role": "assistant", "content": "봄소식"}]}
    rows.write_text(json.dumps(row) + "\n")
    refusal(lambda: train(base, rows, tmp_path / "out"))
    assert not (tmp_path / "ran").exists()


# ---- folders -----------------------------------------------------------------------------------------------------


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/b", "..", ".", ""])
def test_a_chat_templates_name_leaves_no_folder(name: str, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """The names of several chat templates become file names."""
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "evil"}]
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates}))
    before = tree(tmp_path)
    assert "which is not a valid file name" in refusal(lambda: train(base, title_rows, tmp_path / "out", max_steps=1))
    assert tree(tmp_path) == before


def test_text_of_a_row_is_no_path(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Neither a file's name nor the name of a row reads or writes anything."""
    secret = tmp_path / "secret.txt"
    secret.write_text("the secret words")
    texts = [f"@{secret}", "../../../escaped", "{document}{secret}", "\0", "$(touch ran)", "[[x]]", "%s" * 9]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"document": text, "title": text, "id": text}) + "\n" for text in texts))
    train(tiny_model, rows, tmp_path / "out", max_steps=1)
    byeori.generate(model=adapter, data_path=rows, output=tmp_path / "answers.jsonl", max_new_tokens=2)
    byeori.compare(adapter=adapter, data_path=rows, output_dir=tmp_path / "cmp", max_new_tokens=2)
    for path in [*(tmp_path / "out").rglob("*"), *(tmp_path / "cmp").rglob("*"), tmp_path / "answers.jsonl"]:
        assert not path.is_file() or b"the secret words" not in path.read_bytes(), path
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter", "answers.jsonl", "cmp", "out", "rows.jsonl", "secret.txt",
    }  # fmt: skip
    assert not Path("escaped").exists() and not Path("ran").exists()


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname"])
def test_a_manifest_names_nothing_elsewhere(name: str, adapter: Path) -> None:
    folder = checkpoint.newest(adapter)
    assert folder is not None
    manifest = json.loads((folder / "manifest.json").read_text())["sha256"]
    (folder / "manifest.json").write_text(json.dumps({"sha256": manifest | {name: "0" * 64}}))
    assert checkpoint.verify(folder) == f"its manifest names {name}, which is outside of it"


# ---- tokens ------------------------------------------------------------------------------------------------------


def test_a_token_is_written_nowhere(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    """Training with a tracker, comparing, merging, a dry run of publishing, and errors of the Hub."""
    place = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    place |= {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    place |= {"HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    common = ["--data_path", str(title_rows), "--output_dir"]
    out, cmp = str(tmp_path / "out"), str(tmp_path / "cmp")
    script = [
        ["sft", "--base_model", str(tiny_model), *common, out, "--cutoff_len=512", "--max_steps=2",
         "--report_to=tensorboard"],
        ["compare", out, *common, cmp, "--max_rows=2", "--max_new_tokens=2"],
        ["publish", out, "me/titles", "--dry_run", "True"],
        ["publish", out, "me/titles"],
        ["sft", "--base_model", "nobody/nothing", *common, out + "2"],
        ["sft", "--base_model", str(tiny_model), "--data_path", "nobody/rows", "--output_dir", out + "3"],
        ["sft", "--base_model", str(tiny_model), *common, out],
    ]  # fmt: skip
    code = (
        "import sys, json\nfrom byeori.cli import main\nfor line in json.loads(sys.argv[1]):\n    print(main(line))\n"
    )
    done = forks.run("-c", code, json.dumps(script), env=place)
    codes = [line for line in done.stdout.splitlines() if line in ("0", "2")]
    assert codes == ["0", "0", "0", "2", "2", "2", "2"], done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and any("tfevents" in path.name for path in written)
    for path in written:
        assert TOKEN.encode() not in path.read_bytes(), path


def test_no_setting_takes_a_token() -> None:
    from byeori import config

    kinds = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, config.Settings)]
    names = {name for kind in kinds for name in kind.model_fields}
    assert len(names) > 50
    assert not {name for name in names if "secret" in name or "password" in name or name.endswith("token")} - {
        "add_eos_token"
    }
