"""Uploads to a local stand-in for the Hub, byte by byte; what is not uploaded; the model card."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import byeori
import forks
from byeori.artifacts.model_card import fenced, is_hub_id, is_local_path, last_name, model_card, public_name
from byeori.errors import HubError, ModelError
from byeori.export.publish import collect, publish
from hub_server import TOKEN, Fault, Hub, serve

HOME = "/home/minji/secret"
SETTINGS = {
    "base_model": "google/gemma-3-270m",
    "data_path": [f"{HOME}/petitions.jsonl", "korea/petitions"],
    "output_dir": f"{HOME}/runs/7",
    "template": f"{HOME}/my-template.txt",
    "resume_from_checkpoint": "~/runs/6",
    "learning_rate": 2e-4,
    "lora_r": 12,
    "lora_target_modules": ["q_proj", "v_proj"],
}
METRICS = {
    "base": {"chrf": 20.125, "loss": 3.5, "exact": None},
    "tuned": {"chrf": 31.5, "loss": 2.25, "exact": None},
    "difference": {
        "chrf": {"mean": 11.375, "low": 8.0, "high": 14.75},
        "loss": {"mean": -1.25, "low": -1.5, "high": -1.0},
        "exact": {"mean": None, "low": None, "high": None},
    },
    "rows": 1200,
}
TEMPLATE = "본문:\n```\n{document}\n```\n---\n제목:\n{title}"


def write(folder: Path, name: str, value: Any) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A finished run: the adapter, the files published with it, and files that must not leave."""
    folder = tmp_path / "adapter"
    write(
        folder, "adapter_config.json", {"peft_type": "LORA", "r": 12, "base_model_name_or_path": "google/gemma-3-270m"}
    )
    save_file({"a": torch.arange(5000.0)}, folder / "adapter_model.safetensors")
    write(folder, "tokenizer.json", {"model": {"vocab": {"/home": 1}}})
    write(folder, "tokenizer_config.json", {"eos_token": "/s", "name_or_path": f"{HOME}/gemma"})
    write(folder, "chat_template.jinja", "{{ messages }}")
    write(folder, "template.txt", TEMPLATE)
    write(folder, "byeori.yaml", yaml.safe_dump(SETTINGS, allow_unicode=True))
    write(folder, "metrics.json", METRICS)
    # none of these may leave
    write(folder, "audit.json", {"rows": 4200, "duplicates": 3, "first": "text of a private row"})
    write(
        folder,
        "train_log.jsonl",
        '{"step": 1, "loss": 3.0}\n{"step": 9, "loss": 1.5}\n{"step": 9, "eval_loss": 1.75}\n{"st',
    )
    write(folder, "byeori_base.json", {"base_model": HOME, "sha256": "0"})
    save_file({"a": torch.zeros(3)}, folder / "optimizer.safetensors")
    for name in ("adapter_model.bin", "training_args.bin", "rng.pt", "rows.jsonl", ".env", "secret.json", "order.json"):
        write(folder, name, "secret")
    write(folder / "checkpoint-10", "adapter_model.safetensors", "secret")
    return folder


PUBLISHED = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "template.txt",
    "byeori.yaml",
    "metrics.json",
    "README.md",
}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    write(folder, "config.json", {"model_type": "gemma3_text", "_name_or_path": f"{HOME}/gemma"})
    write(folder, "generation_config.json", {"eos_token_id": 1})
    write(folder, "LICENSE", "terms of the base")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.full((300,), float(number))}, folder / name)
    write(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": {"t0": names[0], "t1": names[1]}})
    save_file({"old": torch.zeros(2)}, folder / "model-00003-of-00003.safetensors")
    report = {"base": HOME, "adapter": f"{HOME}/run", "verdict": "equal", "dtype": "bfloat16"}
    write(folder, "merge_report.json", {**report, "max_abs_difference": 0.0123, "max_logit": 30.0})
    write(folder, "tokenizer.json", {})
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


RUN = """
import json, sys
from pathlib import Path
from byeori.errors import ByeoriError
from byeori.export.publish import publish
options = json.loads(sys.argv[1])
try:
    result = publish(folder=Path(options.pop("folder")), commit_message="First", **options)
    print("RESULT", json.dumps([result.url, result.commit, result.files]))
except ByeoriError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(2)
"""


def upload(hub: Hub | str, folder: Path, token: str | None = TOKEN, **options: Any) -> tuple[int, str]:
    """Publish in a process of its own, since the client reads its endpoint once."""
    options = {"repo_id": "me/titles", "private": False, "dry_run": False, "folder": str(folder), **options}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(folder.parent / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*"}
    if token:
        environment["HF_TOKEN"] = token
    done = forks.run("-c", RUN, json.dumps(options), env=environment)
    output = done.stdout + done.stderr
    assert TOKEN not in output and "Traceback" not in output, output
    return done.returncode, output


def arrived(hub: Hub, name: str = "me/titles", branch: str = "main") -> dict[str, bytes]:
    return {file: data for (at, file), data in hub.repositories[name].files.items() if at == branch}


# ---- uploads ---------------------------------------------------------------------------------------------------


def test_adapter_arrives_and_nothing_else(hub: Hub, adapter: Path) -> None:
    status, output = upload(hub, adapter, private=True)
    assert status == 0, output
    files = arrived(hub)
    assert set(files) == PUBLISHED
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "template.txt", "metrics.json"):
        assert files[name] == (adapter / name).read_bytes()
    assert hub.repositories["me/titles"].private
    assert hub.repositories["me/titles"].messages == ["First"]
    assert not any(HOME.encode() in data or b"secret" in data for data in files.values())
    assert json.loads(files["tokenizer_config.json"]) == {"eos_token": "/s", "name_or_path": "gemma"}
    settings = yaml.safe_load(files["byeori.yaml"])
    assert settings["data_path"] == ["petitions.jsonl", "korea/petitions"]
    assert settings["output_dir"] == "7" and settings["resume_from_checkpoint"] == "6"
    assert settings["template"] == "my-template.txt"
    assert settings["base_model"] == "google/gemma-3-270m" and settings["learning_rate"] == 2e-4
    url, commit, sizes = json.loads(output.partition("RESULT ")[2].splitlines()[0])
    assert (url, commit) == (f"{hub.url}/me/titles", "c0ffee")
    assert sizes == {name: len(data) for name, data in files.items()}


def test_merged_model_on_a_branch_and_once_more(hub: Hub, merged: Path) -> None:
    for _ in range(2):  # the second time the repository is there
        status, output = upload(hub, merged, revision="v2")
        assert status == 0, output
    files = arrived(hub, branch="v2")
    assert set(files) == {
        *("config.json", "generation_config.json", "model.safetensors.index.json", "merge_report.json", "LICENSE"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json", "README.md"),
    }
    assert files["model-00002-of-00002.safetensors"] == (merged / "model-00002-of-00002.safetensors").read_bytes()
    assert not arrived(hub) and not hub.repositories["me/titles"].private
    assert not any(HOME.encode() in data for data in files.values())
    assert json.loads(files["merge_report.json"])["base"] == "secret"


@pytest.fixture
def compared(trained: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter, merged under a relative path and then compared with its base."""
    shutil.copytree(trained, tmp_path / "runs" / "titles", ignore=shutil.ignore_patterns("metrics.json"))
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "runs")
        byeori.merge(peft_model_path="titles", output_dir="whole")
    how = {"dtype": "float32", "max_new_tokens": 8, "max_rows": 3}
    byeori.compare(adapter=tmp_path / "runs" / "titles", data_path=title_rows, output_dir=tmp_path / "report", **how)
    return tmp_path / "runs" / "whole"


def test_a_merged_model_has_the_numbers_of_its_adapter(hub: Hub, compared: Path) -> None:
    adapter = compared.with_name("titles")
    assert not (compared / "metrics.json").exists()
    status, output = upload(hub, compared)
    assert status == 0 and "Note: the card" not in output, output
    files, metrics = arrived(hub), json.loads((adapter / "metrics.json").read_text(encoding="utf-8"))
    assert json.loads(files["metrics.json"]) == metrics
    card = files["README.md"].decode()
    assert "## Result" in card and "on the same prompts over 3 rows" in card
    assert f"| chrf | {metrics['base']['chrf']:.4g} | {metrics['tuned']['chrf']:.4g} |" in card
    audit = json.loads((adapter / "audit.json").read_text(encoding="utf-8"))
    assert f"| rows | {audit['rows']} |" in card and "| last training loss |" in card
    assert json.loads(files["merge_report.json"])["adapter"] == "titles"
    assert not any(str(compared.parent).encode() in data for data in files.values())


def test_metrics_of_another_adapter_are_not_used(compared: Path) -> None:
    """The run was restarted in the same folder, was never compared, or is gone; a note says so."""
    adapter = compared.with_name("titles")

    def said() -> str:
        lines: list[str] = []
        options = {"repo_id": "me/t", "private": False, "dry_run": True, "commit_message": "x"}
        publish(folder=compared, on_line=lines.append, **options)
        assert "metrics.json" not in "".join(lines) and "## Result" not in "".join(lines)
        return next(line for line in lines if line.startswith("Note:"))

    (adapter / "metrics.json").rename(adapter / "kept.json")
    assert "because `byeori compare titles` was not run" in said()
    (adapter / "kept.json").rename(adapter / "metrics.json")
    save_file({"a": torch.zeros(3)}, adapter / "adapter_model.safetensors")
    assert "of the adapter titles, because it is no longer here as it was merged" in said()
    shutil.rmtree(adapter)
    assert "because it is no longer here as it was merged" in said()


def test_own_readme_is_kept_and_blank_ones_are_not(adapter: Path) -> None:
    write(adapter, "README.md", "---\nlicense: mit\n---\nMine.")
    assert collect(adapter, "me/titles")["README.md"] == adapter / "README.md"
    for text in ("# Model Card for Model ID\n[More Information Needed]", model_card(adapter)):
        write(adapter, "README.md", text)
        assert b"me/titles" in collect(adapter, "me/titles")["README.md"]  # type: ignore[operator]


@pytest.mark.parametrize("name", ["a" * 300, "x/" + "a" * 5000, "a\0b", "/dev/null", "."])
def test_a_report_of_an_adapter_that_cannot_be(merged: Path, name: str) -> None:
    report = json.loads((merged / "merge_report.json").read_text(encoding="utf-8"))
    write(merged, "merge_report.json", report | {"adapter": name})
    status, output = upload("http://127.0.0.1:9", merged, token=None, dry_run=True)
    assert status == 0 and "Nothing was uploaded" in output


def test_dry_run_has_no_network(adapter: Path) -> None:
    status, output = upload("http://127.0.0.1:9", adapter, token=None, dry_run=True)
    assert status == 0
    for name in PUBLISHED:
        assert name in output
    assert "20.1 KB" in output and "## Prompt template" in output and "Nothing was uploaded" in output
    for name in ("optimizer", "checkpoint", "train_log.jsonl", "audit.json", HOME):
        assert name not in output


def test_dry_run_result(adapter: Path) -> None:
    lines: list[str] = []
    result = publish(
        folder=adapter, repo_id="me/titles", private=True, dry_run=True, commit_message="x", on_line=lines.append
    )
    assert set(result.files) == PUBLISHED and result.url is None and result.commit is None and result.dry_run
    assert not any("Note:" in line for line in lines)
    write(adapter, "adapter_config.json", {"r": 4, "base_model_name_or_path": f"{HOME}/gemma"})
    publish(folder=adapter, repo_id="me/t", private=True, dry_run=True, commit_message="x", on_line=lines.append)
    assert any("'gemma'" in line for line in lines) and HOME not in "".join(lines)


# ---- errors ----------------------------------------------------------------------------------------------------


def test_no_token(hub: Hub, adapter: Path) -> None:
    status, output = upload(hub, adapter, token=None)
    assert status == 2 and "HubError: no token for the Hub" in output
    assert "hf auth login" in output and "HF_TOKEN" in output and not hub.requests


def test_the_token_of_the_login(hub: Hub, adapter: Path) -> None:
    """`hf auth login` writes it to a file; HF_TOKEN takes precedence."""
    write(adapter.parent / "hf", "token", f"{TOKEN}\n")
    status, output = upload(hub, adapter, token=None)
    assert status == 0 and set(arrived(hub)) == PUBLISHED, output
    status, output = upload(hub, adapter, token="hf_wrongTokenOfMine")
    assert status == 2 and "does not accept the token" in output
    write(adapter.parent / "hf", "token", "hf_wrongTokenOfMine")
    assert upload(hub, adapter)[0] == 0
    status, output = upload(hub, adapter, token=None)
    assert status == 2 and "does not accept the token" in output and "hf_wrong" not in output


def test_wrong_token(hub: Hub, adapter: Path) -> None:
    status, output = upload(hub, adapter, token="hf_wrongTokenOfMine")
    assert status == 2 and "does not accept the token" in output and "hf_wrong" not in output


def test_no_right_to_write(hub: Hub, adapter: Path) -> None:
    status, output = upload(hub, adapter, repo_id="others/titles")
    assert status == 2 and "the token may not write to others/titles" in output


@pytest.mark.parametrize(
    ("path", "code", "words"),
    [
        ("/commit/", 403, "may not write"),
        ("/preupload/", 404, "has no me/titles that this token may see"),
        ("/repos/create", 500, "the Hub failed (HTTP 500)"),
        ("/lfs/", 400, "the Hub rejected me/titles (HTTP 400)"),
        ("/validate-yaml", 400, "me/titles"),
    ],
)
def test_errors_during_an_upload(hub: Hub, adapter: Path, path: str, code: int, words: str) -> None:
    hub.fault = {path: code}  # the answer repeats the token, as a careless server might
    status, output = upload(hub, adapter)
    assert status == 2 and words in output, output
    assert len([line for line in output.splitlines() if "HubError" in line]) == 1
    assert "me/titles" not in hub.repositories or not arrived(hub)


def test_closed_port(adapter: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    status, output = upload(f"http://127.0.0.1:{port}", adapter)
    assert status == 2 and "cannot reach the Hugging Face Hub" in output and "Connection refused" in output


def test_public_repository_with_private_set(hub: Hub, adapter: Path) -> None:
    assert upload(hub, adapter)[0] == 0
    hub.repositories["me/titles"].files.clear()
    status, output = upload(hub, adapter, private=True)
    assert status == 2 and "exists and is public" in output and not arrived(hub)


def test_weights_of_another_upload(hub: Hub, adapter: Path, merged: Path) -> None:
    assert upload(hub, adapter)[0] == 0
    status, output = upload(hub, merged)
    assert status == 2 and "adapter_config.json, adapter_model.safetensors of another upload" in output
    assert set(arrived(hub)) == PUBLISHED


@pytest.mark.parametrize("name", ["titles", "a/b/c", "me/ti tles", "me/--", "me/x..y", ""])
def test_names(adapter: Path, name: str) -> None:
    with pytest.raises(HubError, match="is not a repository name"):
        publish(folder=adapter, repo_id=name, private=False, dry_run=True, commit_message="x")


def test_unfinished_and_damaged_folders(adapter: Path, merged: Path) -> None:
    def refused(folder: Path, words: str) -> None:
        with pytest.raises(ModelError, match=words) as caught:
            publish(folder=folder, repo_id="me/t", private=False, dry_run=True, commit_message="x")
        assert "\n" not in str(caught.value)

    refused(adapter / "nothing", "there is no folder")
    refused(adapter / "checkpoint-10", "is not a model")
    write(adapter, "adapter_model.safetensors", "short")
    refused(adapter, "damaged or cut short")
    (adapter / "adapter_model.safetensors").unlink()
    refused(adapter, "not a finished adapter")
    write(merged, "merge_report.json", {"verdict": "different"})
    refused(merged, "failed the check")
    write(merged, "merge_report.json", "{")
    refused(merged, "merge_report.json is damaged")
    (merged / "model-00001-of-00002.safetensors").unlink()
    refused(merged, "lacks model-00001-of-00002.safetensors")
    write(merged, "model.safetensors.index.json", {"weight_map": {"t": "../adapter/optimizer.safetensors"}})
    refused(merged, "is in another folder")


# ---- the card --------------------------------------------------------------------------------------------------


def test_card_of_an_adapter(adapter: Path) -> None:
    card = model_card(adapter, name="me/titles")
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "base_model": "google/gemma-3-270m",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["byeori", "lora", "sft"],
        "datasets": ["korea/petitions"],
    }
    assert f"````\n{TEMPLATE}\n````" in text  # the fence is longer than the one inside
    assert (
        "| chrf | 20.12 | 31.5 | 11.38 (8 to 14.75) |" in text and "over 1,200 rows" in text and "| exact" not in text
    )
    assert "| rows | 4,200 |" in text and "private row" not in text
    assert (
        "| steps | 9 |" in text and "| last training loss | 1.5 |" in text and "| last evaluation loss | 1.75 |" in text
    )
    assert "| learning_rate | 0.0002 |" in text and "| lora_target_modules | q_proj, v_proj |" in text
    assert 'PeftModel.from_pretrained(model, "me/titles")' in text
    serve = "vllm serve google/gemma-3-270m --tokenizer me/titles --enable-lora --max-lora-rank 16 --lora-modules tuned"
    assert f"{serve}=me/titles\n" in text and "--format ollama" in text
    assert "`petitions.jsonl`" in text and HOME not in card


def test_card_of_a_merged_model(merged: Path) -> None:
    card = model_card(merged, name="me/titles")
    header = yaml.safe_load(card.split("---\n", 2)[1])
    assert header["library_name"] == "transformers" and "base_model" not in header
    assert "vllm serve me/titles\n" in card and "peft" not in card and "largest difference 0.012" in card
    assert HOME not in card


def test_card_of_an_empty_folder(tmp_path: Path) -> None:
    card = model_card(tmp_path)
    assert card.startswith("---\n") and "## How to use" in card and "## Data" not in card and "## Result" not in card


def test_texts_cannot_break_out(tmp_path: Path) -> None:
    hostile = "x\n---\nlicense: mit | `a` <script>alert(1)</script> [b](c)"
    write(tmp_path, "byeori.yaml", yaml.safe_dump({"base_model": hostile, "data_path": hostile, "dtype": hostile}))
    write(tmp_path, "adapter_config.json", {"r": hostile, "base_model_name_or_path": hostile})
    write(tmp_path, "metrics.json", {"base": {hostile: 1}, "tuned": {hostile: hostile}, "difference": {hostile: 3}})
    write(tmp_path, "audit.json", {hostile: 1})
    card = model_card(tmp_path)
    assert yaml.safe_load(card.split("---\n", 2)[1])["library_name"] == "peft"
    assert "\n---\nlicense" not in card and "<script>" not in card.split("## How to use")[0]
    row = next(line for line in card.splitlines() if line.startswith("| dtype"))
    assert row.replace("\\|", "").count("|") == 3


def test_adapter_that_vllm_does_not_serve(adapter: Path) -> None:
    write(adapter, "adapter_config.json", {"r": 4, "modules_to_save": ["lm_head"]})
    assert "merge it first" in model_card(adapter)


def test_names_of_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("/a/b.jsonl", "~/b.jsonl", "../b.jsonl", "C:\\a\\b.jsonl", "\\\\host\\b.jsonl", "file:///b.jsonl"):
        assert is_local_path(text) and last_name(text) == "b.jsonl" and public_name(text) == "b.jsonl"
    for text in ("user/name", "b.jsonl", "### a/b", "{a}\n/b"):
        assert not is_local_path(text)
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("user/name") and is_hub_id("gpt2") and not is_hub_id("data/rows.jsonl") and not is_hub_id("a/b/c")
    (tmp_path / "user" / "name").mkdir(parents=True)
    assert not is_hub_id("user/name") and public_name("user/name") == "name"
    assert last_name("/") == "local"
    assert fenced("a\n``````\nb").startswith("```````\n")


# ---- large files, links, and what passes by itself --------------------------------------------------------------


def test_an_upload_goes_on_after_the_files_that_are_there(hub: Hub, merged: Path) -> None:
    """The second shard fails for good; the next attempt uploads only that one."""
    shards = sorted(merged.glob("model-*-of-00002.safetensors"))
    second = hashlib.sha256(shards[1].read_bytes()).hexdigest()
    hub.fault = {second: 400}
    status, output = upload(hub, merged)
    assert status == 2 and "HTTP 400" in output and not arrived(hub)
    assert set(hub.blobs) == {hashlib.sha256(shards[0].read_bytes()).hexdigest()}
    hub.fault, hub.requests = {}, []
    status, output = upload(hub, merged)
    assert status == 0, output
    assert [line for line in hub.requests if line.startswith("PUT")] == [f"PUT /lfs/{second}"]
    assert arrived(hub)[shards[0].name] == shards[0].read_bytes()


@pytest.mark.parametrize("path", ["/repos/create", "/api/models/me/titles$", "/preupload/", "/commit/", "/lfs/"])
def test_what_is_temporary_is_tried_again(hub: Hub, adapter: Path, path: str) -> None:
    hub.fault = {path: Fault(503, times=1)}
    status, output = upload(hub, adapter)
    assert status == 0 and "trying again in" in output, output
    assert set(arrived(hub)) == PUBLISHED


def test_a_page_of_a_proxy(hub: Hub, adapter: Path) -> None:
    hub.fault = {"/api/": Fault(200, page="<html>Please log in</html>")}
    status, output = upload(hub, adapter)
    assert status == 2 and "something else answered in place of the Hub" in output


def test_links_out_of_the_folder_are_not_followed(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("private")
    for name in ("template.txt", "README.md", "tokenizer.json", "adapter_model.safetensors"):
        kept = (adapter / name).read_bytes() if (adapter / name).exists() else None
        (adapter / name).unlink(missing_ok=True)
        (adapter / name).symlink_to(tmp_path / "secret.txt")
        with pytest.raises(ModelError, match=r"is a link out of its folder|damaged"):
            collect(adapter, "me/titles")
        (adapter / name).unlink()
        if kept is not None:
            (adapter / name).write_bytes(kept)
    (adapter / "vocab.json").symlink_to("tokenizer.json")  # inside
    assert set(collect(adapter, "me/titles")) == PUBLISHED | {"vocab.json"}


def test_a_finished_export(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "gguf"
    write(folder, "model-q8_0.gguf", "GGUF weights")
    write(folder, "Modelfile", "FROM ./model-q8_0.gguf")
    for name in ("notes.txt", "rows.jsonl", ".env", "train_log.jsonl", "optimizer.safetensors"):
        write(folder, name, "secret")
    status, output = upload(hub, folder)
    assert status == 0, output
    assert set(arrived(hub)) == {"model-q8_0.gguf", "Modelfile", "README.md"}
