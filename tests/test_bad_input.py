"""Everything a person can get wrong: one sentence saying what to do, exit code 2, nothing lost, nothing half made."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forks
from byeori.cli import main
from tiny_models import byte_level_tokenizer, tiny_llama

SRC = Path(__file__).parents[1] / "src"
GOOD = '{"document": "봄이 왔다", "title": "봄소식"}\n'
Fails = Callable[..., str]


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Fails:
    """Runs a command that must fail as the issue says; returns its sentence."""

    def run(*arguments: object, command: str | None = None) -> str:
        capfd.readouterr()
        before = snapshot(tmp_path)
        code = main([str(item) for item in arguments], command=command)
        return judged(code, capfd.readouterr().err, before, tmp_path)

    return run


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def judged(code: int, stderr: str, before: dict[str, bytes], folder: Path) -> str:
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert code == 2, stderr
    assert "Traceback" not in stderr, stderr
    assert errors == lines[-1:], stderr
    assert len(errors[0]) > 30, "it says what is wrong and what to do"
    assert len(errors[0]) < 700, errors[0]
    assert snapshot(folder) == before, "nothing lost, nothing left half made"
    return errors[0]


@pytest.fixture
def sft(fails: Fails, tiny_model: Path, title_rows: Path, tmp_path: Path) -> Fails:
    """`byeori sft` on good settings, with flags over them."""

    def run(**changes: object) -> str:
        settings: dict[str, object] = {
            "base_model": tiny_model,
            "data_path": title_rows,
            "output_dir": tmp_path / "out",
            "cutoff_len": 512,
            "max_steps": 1,
        }
        return fails("sft", *(f"--{name}={value}" for name, value in {**settings, **changes}.items()))

    return run


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of one step."""
    folder = tmp_path_factory.mktemp("runs") / "adapter"
    common = ["--base_model", str(tiny_model), "--data_path", str(title_rows), "--cutoff_len", "512"]
    common += ["--lora_target_modules", "[gate_proj, down_proj, up_proj]", "--max_steps", "1", "--dtype", "float32"]
    assert main(["sft", *common, "--output_dir", str(folder)]) == 0
    return folder


def rows_file(folder: Path, text: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- rows --------------------------------------------------------------------------------------------------------


def test_missing_file(sft: Fails, tmp_path: Path) -> None:
    rows_file(tmp_path, GOOD, "news.jsonl")
    said = sft(data_path=tmp_path / "newss.jsonl")
    assert "there is no file" in said
    assert "did you mean news.jsonl?" in said


def test_empty_file(sft: Fails, tmp_path: Path) -> None:
    said = sft(data_path=rows_file(tmp_path, ""))
    assert "rows.jsonl is empty" in said


def test_broken_json_line_is_numbered(sft: Fails, tmp_path: Path) -> None:
    said = sft(data_path=rows_file(tmp_path, GOOD + GOOD + '{"document": "봄이\n' + GOOD))
    assert "rows.jsonl line 3 is not valid JSON" in said


def test_a_file_in_two_encodings(sft: Fails, tmp_path: Path) -> None:
    path = rows_file(tmp_path, "document,title\n봄이 왔다,".encode() + "봄소식\n".encode("cp949"), "excel.csv")
    said = sft(data_path=path)
    assert "excel.csv line 2 is not" in said


def test_unknown_column(sft: Fails, tmp_path: Path) -> None:
    said = sft(template="{docment}\n{title}", data_path=rows_file(tmp_path, GOOD))
    assert "'docment', which the data does not have (did you mean document?)" in said
    assert "its columns are document, title" in said


def test_unknown_column_of_an_optional_block(sft: Fails, tmp_path: Path) -> None:
    said = sft(template="[[{docment}\n]]{document}\n{title}", data_path=rows_file(tmp_path, GOOD))
    assert "'docment', which the data does not have (did you mean document?)" in said


def test_no_template_fits_the_columns(sft: Fails, tmp_path: Path) -> None:
    said = sft(data_path=rows_file(tmp_path, '{"frage": "a", "antwort": "b"}\n'))
    assert "no built-in template fits the columns frage, antwort" in said
    assert "--template" in said


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"document": null, "title": "봄"}', "column 'document' holds null, not text"),
        ('{"document": "봄", "title": null}', "column 'title' holds null, not text"),
        ('{"document": "봄", "title": ""}', "the answer, column 'title', is empty"),
        ('{"document": "봄", "title": "  \\n"}', "the answer, column 'title', is empty"),
    ],
)
def test_row_without_text(sft: Fails, tmp_path: Path, row: str, words: str) -> None:
    said = sft(data_path=rows_file(tmp_path, GOOD + row + "\n"))
    assert "rows.jsonl line 2" in said
    assert words in said
    assert "--on_bad_rows drop" in said


def test_list_where_text_is_expected(sft: Fails, tmp_path: Path) -> None:
    said = sft(data_path=rows_file(tmp_path, '{"document": [7], "title": "봄"}\n'))
    assert "rows.jsonl line 1: column 'document' holds" in said
    assert "list [7], not text" in said


def test_answers_that_do_not_fit(sft: Fails, tmp_path: Path) -> None:
    said = sft(data_path=rows_file(tmp_path, GOOD), cutoff_len=8)
    assert "no row is left to train" in said
    assert "cutoff_len 8" in said


# ---- templates ---------------------------------------------------------------------------------------------------


def test_template_without_answer(sft: Fails) -> None:
    assert "has no column, so there is no answer to train" in sft(template="본문과 제목을\n쓰세요")
    assert "an inline template needs a {column}" in sft(template="본문과 제목을 쓰세요")


def test_template_with_unclosed_brace(sft: Fails) -> None:
    said = sft(template="본문\\n{document}\\n{title")
    assert "line 3: unmatched '{'" in said
    assert "'{{' for a literal brace" in said


def test_unknown_template_has_a_near_name(sft: Fails) -> None:
    assert "there is no template or file 'title-kr' (did you mean title-ko?)" in sft(template="title-kr")


# ---- settings ----------------------------------------------------------------------------------------------------


def test_unknown_flag_has_a_near_name(fails: Fails) -> None:
    said = fails("sft", "--learning-rat", "1e-5", "--bath_size", "8")
    assert "there is no flag --learning_rat (did you mean --learning_rate?), --bath_size" in said
    assert "(did you mean --batch_size?); see byeori sft --help" in said


def test_unknown_command_has_a_near_name(fails: Fails) -> None:
    assert "there is no command 'stf' (did you mean sft?)" in fails("stf")


def test_a_stray_word_is_named(fails: Fails) -> None:
    assert "'more' belongs to no flag" in fails("publish", "folder", "user/name", "more")


def test_a_flag_without_its_value(fails: Fails) -> None:
    assert "--lora_r needs a value: --lora_r INT; see byeori sft --help" in fails(
        "sft", "--lora_r", "--batch_size", "8"
    )


def test_missing_settings_are_all_named(fails: Fails) -> None:
    said = fails("sft")
    assert all(f"--{name} is missing" in said for name in ("base_model", "data_path", "output_dir"))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("learning_rate", "0", "greater than 0"),
        ("learning_rate", "-1e-5", "greater than 0"),
        ("learning_rate", "1e9", "less than or equal to 10"),
        ("learning_rate", "nan", "finite"),
        ("learning_rate", "inf", "finite"),
        ("learning_rate", "fast", "number"),
        ("batch_size", "0", "greater than or equal to 1"),
        ("batch_size", "-8", "greater than or equal to 1"),
        ("batch_size", "8.5", "integer"),
        ("batch_size", "9" * 30, "less than or equal to"),
        ("batch_size", "9" * 5000, "integer"),
        ("micro_batch_size", "0", "greater than or equal to 1"),
        ("num_epochs", "0", "greater than 0"),
        ("num_epochs", "1e300", "less than or equal to"),
        ("max_steps", "-1", "greater than or equal to 1"),
        ("max_steps", "9" * 30, "less than or equal to"),
        ("cutoff_len", "0", "greater than or equal to 8"),
        ("val_set_size", "-0.1", "greater than or equal to 0"),
        ("val_set_size", "2.5", "give a fraction below 1 or a whole number of rows"),
        ("lora_r", "0", "greater than or equal to 1"),
        ("lora_r", "100000000", "less than or equal to 4096"),
        ("lora_dropout", "1", "less than 1"),
        ("warmup_ratio", "1.5", "less than 1"),
        ("max_rows", "0", "greater than or equal to 1"),
        ("seed", "-1", "greater than or equal to 0"),
        ("train_on_inputs", "maybe", "give True or False"),
        ("lr_scheduler", "greedy", "'polynomial', 'constant', 'inverse_sqrt'"),
        ("lora_target_modules", "[]", "at least 1 item"),
        ("report_to", "weights", "tensorboard"),
    ],
)
def test_settings_out_of_bounds(sft: Fails, name: str, value: str, words: str) -> None:
    said = sft(**{name: value})
    assert name in said
    assert words in said


def test_preview_refuses_what_training_refuses(fails: Fails, tiny_model: Path, title_rows: Path) -> None:
    said = fails("preview", f"--base_model={tiny_model}", f"--data_path={title_rows}", "--val_set_size=2.5")
    assert "--val_set_size '2.5': give a fraction below 1 or a whole number of rows" in said


def test_validation_rows_leave_none_to_train(sft: Fails) -> None:
    assert "val_set_size 1000 leaves none of the 24 rows" in sft(val_set_size=1000)


def test_batch_sizes_that_do_not_divide(sft: Fails) -> None:
    said = sft(batch_size=8, micro_batch_size=3)
    assert "batch_size 8 is not a multiple of micro_batch_size 3" in said


def test_cutoff_beyond_the_positions(sft: Fails) -> None:
    assert "--cutoff_len 2048 is beyond the maximum length" in sft(cutoff_len=2048)


def test_unknown_target_module_lists_the_layers(sft: Fails) -> None:
    said = sft(lora_target_modules="[gate_prj]")
    assert "no layer is called 'gate_prj' (did you mean gate_proj?)" in said
    assert "q_proj" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"learning_rate: [1e-5\nbatch_size: 8\n", "is not valid YAML at line 2"),
        (
            b"\xbb\xf3\xc5\xc2: 1\n",
            "run.yaml line 1 is not UTF-8, it looks like cp949; convert the file: iconv -f cp949",
        ),
        (b"- base_model\n", "holds no settings"),
        (b"", "holds no settings"),
        (b"learning_rte: 1e-5\n", "'learning_rte' (did you mean learning_rate?)"),
        (b"batch_size: many\n", "--batch_size 'many'"),
    ],
)
def test_broken_settings_file(fails: Fails, tmp_path: Path, text: bytes, words: str) -> None:
    path = rows_file(tmp_path, text, "run.yaml")
    assert words in fails("sft", "--config", path)


def test_missing_settings_file(fails: Fails, tmp_path: Path) -> None:
    assert "cannot read the settings file" in fails("sft", "--config", tmp_path / "run.yml")


# ---- folders -----------------------------------------------------------------------------------------------------


def test_another_run_is_not_touched(sft: Fails, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "out")
    said = sft()
    assert "holds another run" in said
    assert "--resume_from_checkpoint latest" in said
    assert "--overwrite_output_dir" in said


def test_overwriting_deletes_nothing_before_the_new_run_starts(sft: Fails, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "out")
    sft(overwrite_output_dir=True, data_path=tmp_path / "none.jsonl")
    sft(overwrite_output_dir=True, lora_target_modules="nothing")


def test_unwritable_output_folder(sft: Fails, tmp_path: Path) -> None:
    rows_file(tmp_path, "x", "file")
    assert "cannot write into" in sft(output_dir=tmp_path / "file" / "out")


def test_no_checkpoint_to_resume(sft: Fails, tmp_path: Path) -> None:
    assert "there is no checkpoint" in sft(resume_from_checkpoint=tmp_path / "checkpoint-7")


# ---- base models -------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def test_base_model_that_does_not_exist(sft: Fails, broken: Path) -> None:
    said = sft(base_model=broken.with_name("brken"))
    assert "there is no folder" in said
    assert "did you mean" in said


def test_base_model_that_is_neither_here_nor_on_the_hub(sft: Fails) -> None:
    said = sft(base_model="nobody/no-such-model")
    assert "nobody/no-such-model is neither a local folder nor in the cache" in said


def test_a_folder_without_a_model(sft: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is not a model: it has no config.json" in sft(base_model=tmp_path / "empty")


def test_an_adapter_whose_base_is_gone(sft: Fails, adapter: Path, tmp_path: Path) -> None:
    lone = Path(shutil.copytree(adapter, tmp_path / "lone"))
    config = json.loads((lone / "adapter_config.json").read_text())
    (lone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    assert "was trained on it: give --base_model where it is now" in sft(base_model=lone)


@pytest.mark.parametrize("keep", [0.5, 0.0001, 0])
def test_truncated_weights(sft: Fails, broken: Path, keep: float) -> None:
    path = broken / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "damaged or cut short" in sft(base_model=broken)


def test_corrupt_weights(sft: Fails, broken: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])
    assert "damaged or cut short" in sft(base_model=broken)


def test_weights_that_lack_a_tensor(sft: Fails, broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = broken / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert "lack model.layers.1.mlp.up_proj.weight" in sft(base_model=broken)


def test_pickled_base_is_not_loaded(sft: Fails, broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    said = sft(base_model=broken)
    assert "safetensors" in said
    assert "never loaded" in said


def test_remote_code_is_not_run(sft: Fails, broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "evil.py").write_text(f"open({str(broken / 'ran')!r}, 'w')\n")
    said = sft(base_model=broken)
    assert "needs its own Python code" in said
    assert f"--trust_remote_code {broken}" in said


def test_remote_code_is_trusted_by_name_only(sft: Fails) -> None:
    assert "remote code runs only if both name the same repository" in sft(trust_remote_code="another/model")


def test_broken_tokenizer(sft: Fails, broken: Path) -> None:
    (broken / "tokenizer.json").write_text("{")
    assert "tokenizer" in sft(base_model=broken)


def test_hub_out_of_reach(tiny_model: Path, title_rows: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    commands = [
        ["sft", "--base_model=nobody/nothing", f"--data_path={title_rows}", f"--output_dir={out}"],
        ["sft", f"--base_model={tiny_model}", "--data_path=nobody/rows", f"--output_dir={out}", "--cutoff_len=512"],
        ["generate", "nobody/nothing", "--document=x"],
        ["merge", f"--peft_model_path={adapter}", "--base_model_name_or_path=nobody/base", f"--output_dir={out}"],
    ]
    place = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    place |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(SRC)}
    for command in commands:
        done = forks.run("-m", "byeori", *command, env=place, timeout=60)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        said = judged(done.returncode, done.stderr, {}, tmp_path)
        assert "out of reach" in said or "cannot be reached" in said


# ---- tokenizers that lack tokens: they work, and it is said what is used ------------------------------------------


def bare_tokenizer(folder: Path, **special: Any) -> None:
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None, "pad_token": None, **special}))


def run_with(base: Path, rows: Path, output: Path) -> int:
    common = ["--base_model", str(base), "--data_path", str(rows), "--output_dir", str(output)]
    return main(["sft", *common, "--cutoff_len", "512", "--max_steps", "1", "--max_rows", "8"])


def test_no_end_of_text_token_is_found_by_its_name(
    title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare_tokenizer(tmp_path / "base")
    assert run_with(tmp_path / "base", title_rows, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "the tokenizer does not define an end-of-text token; '<|endoftext|>' is used" in said
    assert "the tokenizer has no padding token; '<|endoftext|>' is used" in said


def test_no_end_of_text_token_at_all(title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare_tokenizer(tmp_path / "base")
    path = tmp_path / "base" / "tokenizer.json"
    renamed = path.read_text(encoding="utf-8").replace("<|endoftext|>", "<|x|>").replace("<|im_end|>", "<|y|>")
    path.write_text(renamed, encoding="utf-8")
    assert run_with(tmp_path / "base", title_rows, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "no end-of-text token, so add_eos_token is off and answers have no end" in said
    assert "the tokenizer has no padding token" in said
    assert main(["generate", str(tmp_path / "out"), "--document", "봄", "--max_new_tokens", "3"]) == 0


# ---- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to be damaged."""
    return Path(shutil.copytree(adapter, tmp_path / "damaged"))


def each_reader(fails: Fails, folder: Path, rows: Path, out: Path, *words: str, base: Path | None = None) -> None:
    """Generate, compare and merge refuse an adapter in the same words."""
    flag = [f"--base_model={base}"] if base else []
    merge = ["merge", f"--peft_model_path={folder}", f"--output_dir={out}"]
    for command in (
        ["generate", folder, "--document=x", *flag],
        ["compare", folder, f"--data_path={rows}", f"--output_dir={out}", *flag],
        [*merge, *([f"--base_model_name_or_path={base}"] if base else [])],
    ):
        said = fails(*command)
        assert any(word in said for word in words), said


@pytest.mark.parametrize("keep", [0.6, 0.001])
def test_truncated_adapter(fails: Fails, damaged: Path, title_rows: Path, tmp_path: Path, keep: float) -> None:
    path = damaged / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    each_reader(fails, damaged, title_rows, tmp_path / "o", "damaged")


def test_pickled_adapter_is_refused(fails: Fails, damaged: Path, title_rows: Path, tmp_path: Path) -> None:
    (damaged / "adapter_model.safetensors").rename(damaged / "adapter_model.bin")
    each_reader(fails, damaged, title_rows, tmp_path / "o", "never loaded")


def test_broken_adapter_config(fails: Fails, damaged: Path, title_rows: Path, tmp_path: Path) -> None:
    (damaged / "adapter_config.json").write_text("{")
    each_reader(fails, damaged, title_rows, tmp_path / "o", "damaged")


@pytest.mark.parametrize("record", ["with its record", "without"])
@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 64, "intermediate_size": 128}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}],
    ids=["wider", "fewer layers", "more layers"],
)
def test_adapter_of_another_base(
    fails: Fails,
    damaged: Path,
    title_rows: Path,
    tmp_path: Path,
    tiny_model: Path,
    changes: dict[str, Any],
    record: str,
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tiny_llama(len(byte_level_tokenizer()), **changes).save_pretrained(other)
    if record == "without":
        (damaged / "byeori_base.json").unlink()
        if changes == {"num_hidden_layers": 3}:  # merging needs no more than the adapter's own layers
            said = fails("generate", damaged, "--document=x", f"--base_model={other}")
            assert "does not fit" in said
            return
    each_reader(fails, damaged, title_rows, tmp_path / "o", "fit", "trained on", base=other)


def test_adapter_of_the_same_shape_but_other_weights(
    fails: Fails, adapter: Path, title_rows: Path, tmp_path: Path, tiny_model: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    shutil.copytree(tiny_model, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    each_reader(fails, adapter, title_rows, tmp_path / "o", "trained on", base=tmp_path / "other")


def test_base_that_has_gone(fails: Fails, damaged: Path, title_rows: Path, tmp_path: Path) -> None:
    path = damaged / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "gone")}))
    said = fails("generate", damaged, "--document=x")
    assert "there is no folder" in said
    assert "give --base_model" in said


def test_compare_needs_an_adapter(fails: Fails, tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    said = fails("compare", tiny_model, f"--data_path={title_rows}", f"--output_dir={tmp_path / 'o'}")
    assert "is a whole model that does not record what it began from; name that with --base_model" in said


def test_base_for_a_whole_model(fails: Fails, tiny_model: Path) -> None:
    said = fails("generate", tiny_model, "--template=title-ko", "--document=x", f"--base_model={tiny_model}")
    assert "has no use" in said


# ---- generate ----------------------------------------------------------------------------------------------------


def test_generate_without_a_template(fails: Fails, tiny_model: Path) -> None:
    said = fails("generate", tiny_model, "--document=x")
    assert "has neither a saved template.txt nor a chat template; give --template" in said


def test_generate_misspelt_flag(fails: Fails, adapter: Path) -> None:
    said = fails("generate", adapter, "--document=x", "--max_new_token", "5")
    assert "--max_new_token is neither a flag nor a column of the template (did you mean max_new_tokens?)" in said
    assert "its prompt has the columns document" in said


def test_generate_misspelt_flag_with_rows(fails: Fails, adapter: Path, title_rows: Path) -> None:
    said = fails("generate", adapter, f"--data_path={title_rows}", "--max_new_token", "5")
    assert "there is no flag --max_new_token (did you mean --max_new_tokens?)" in said


def test_generate_column_without_a_value(fails: Fails, adapter: Path) -> None:
    assert "--document needs a value" in fails("generate", adapter, "--document")


def test_generate_missing_column_file(fails: Fails, adapter: Path, tmp_path: Path) -> None:
    assert "cannot read" in fails("generate", adapter, f"--document=@{tmp_path / 'none.txt'}")


@pytest.mark.parametrize("encoding", ["cp949", "utf-16"])
def test_files_of_text_in_other_encodings(
    fails: Fails, sft: Fails, adapter: Path, tmp_path: Path, encoding: str
) -> None:
    """As Korean Windows saves them: a prompt, a column's value, a template, the settings."""

    def said(name: str, text: str, run: Callable[[Path], str], line: int = 1) -> None:
        path = rows_file(tmp_path, text.encode(encoding), name)
        assert f"{path} line {line} is not UTF-8, it looks like {encoding}; convert the file: iconv" in run(path)

    for flag in ("--document", "--raw"):
        said("news.txt", "봄이 왔다", lambda path, flag=flag: fails("generate", adapter, f"{flag}=@{path}"))
    said("title.txt", "본문: {document}\n제목: {title}", lambda path: sft(template=path))
    line = 2 if encoding == "cp949" else 1
    said("run.yaml", "seed: 1\ntemplate: '제목 {title}'\n", lambda path: sft(config=path), line)


def test_generate_row_without_text(fails: Fails, adapter: Path, tmp_path: Path) -> None:
    path = rows_file(tmp_path, '{"document": "봄"}\n{"document": null}\n')
    said = fails("generate", adapter, f"--data_path={path}", f"--output={tmp_path / 'a.jsonl'}")
    assert "rows.jsonl line 2: column 'document' holds null" in said


def test_generate_over_its_own_input(fails: Fails, adapter: Path, tmp_path: Path) -> None:
    path = rows_file(tmp_path, GOOD)
    assert "is the input; give another file" in fails("generate", adapter, f"--data_path={path}", f"--output={path}")


def test_generate_into_a_missing_folder(fails: Fails, adapter: Path, title_rows: Path, tmp_path: Path) -> None:
    said = fails("generate", adapter, f"--data_path={title_rows}", f"--output={tmp_path / 'no' / 'a.jsonl'}")
    assert "does not exist; create it" in said


def test_generate_empty_prompt(fails: Fails, tiny_model: Path, tmp_path: Path) -> None:
    assert "the prompt is empty" in fails("generate", tiny_model, f"--raw=@{rows_file(tmp_path, '', 'prompt.txt')}")


def test_generate_too_long_a_prompt(fails: Fails, tiny_model: Path) -> None:
    assert "leaves no room for an answer within the model's maximum length of 512" in fails(
        "generate", tiny_model, "--raw", "봄 " * 600
    )


# ---- compare -----------------------------------------------------------------------------------------------------


def test_compare_row_without_an_answer(fails: Fails, adapter: Path, tmp_path: Path) -> None:
    path = rows_file(tmp_path, GOOD + '{"document": "봄", "title": ""}\n')
    said = fails("compare", adapter, f"--data_path={path}", f"--output_dir={tmp_path / 'o'}")
    assert "rows.jsonl line 2: the answer, column 'title', is empty" in said
    assert "--on_bad_rows drop" in said


def test_compare_over_results(fails: Fails, adapter: Path, title_rows: Path, tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    rows_file(tmp_path / "o", "{}\n")
    said = fails("compare", adapter, f"--data_path={title_rows}", f"--output_dir={tmp_path / 'o'}")
    assert "holds results already" in said


def test_compare_into_a_file(fails: Fails, adapter: Path, title_rows: Path, tmp_path: Path) -> None:
    path = rows_file(tmp_path, "x", "file")
    assert "cannot write into" in fails("compare", adapter, f"--data_path={title_rows}", f"--output_dir={path}")


def test_compare_cutoff_beyond_the_positions(fails: Fails, adapter: Path, title_rows: Path, tmp_path: Path) -> None:
    common = [f"--data_path={title_rows}", f"--output_dir={tmp_path / 'o'}"]
    assert "--cutoff_len 4096 is beyond the maximum length" in fails("compare", adapter, *common, "--cutoff_len=4096")
