"""The command line: flags in every form, help without torch, completion."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import forks
from byeori import __version__, cli, config
from byeori.config import GenerateSettings, SftSettings, flags, help
from byeori.errors import ConfigError

NEEDED = ["--base_model", "m", "--data_path", "rows.jsonl", "--output_dir", "out"]


def parse(command: str, *arguments: str) -> Any:
    """The settings that a command line stands for."""
    return flags.settings_from(cli.COMMANDS[command], arguments, see=f"byeori {command} --help")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=60)


# ---- flags -------------------------------------------------------------------------------------------------------


def test_dash_and_underscore_are_the_same() -> None:
    assert parse("sft", "--base-model", "m", "--data-path", "rows.jsonl", "--output-dir=out") == parse("sft", *NEEDED)


def test_values_keep_their_dashes() -> None:
    made = parse("sft", "--base-model=my-model", "--data_path", "a-b.jsonl", "--output_dir", "my-out")
    assert (made.base_model, made.data_path, made.output_dir) == ("my-model", ["a-b.jsonl"], "my-out")


def test_the_tutorials_sft_line() -> None:
    line = [
        *("--base_model", "beomi/llama-2-ko-7b", "--data-path", "daekeun-ml/naver-news-summarization-ko"),
        *("--output_dir", "./title-generator", "--batch_size", "8", "--micro_batch_size", "1", "--num_epochs", "3"),
        *("--learning_rate", "1e-5", "--cutoff_len", "2048", "--val_set_size", "0", "--lora_r", "16"),
        *("--lora_alpha", "16", "--lora_dropout", "0.05", "--lora_target_modules", "[gate_proj, down_proj, up_proj]"),
        *("--train_on_inputs", "False", "--add_eos_token", "True", "--group_by_length", "False"),
        *("--lr_scheduler", "linear", "--warmup_steps", "100"),
    ]
    made = parse("sft", *line)
    assert made.data_path == ["daekeun-ml/naver-news-summarization-ko"]
    assert made.lora_target_modules == ["gate_proj", "down_proj", "up_proj"]
    assert (made.batch_size, made.micro_batch_size, made.num_epochs, made.warmup_steps) == (8, 1, 3, 100)
    assert (made.train_on_inputs, made.add_eos_token, made.group_by_length) == (False, True, False)
    assert (made.learning_rate, made.lora_dropout, made.val_set_size) == (1e-5, 0.05, 0)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["[gate_proj, down_proj, up_proj]"], ["gate_proj", "down_proj", "up_proj"]),
        (["[q_proj,", "k_proj,", "v_proj]"], ["q_proj", "k_proj", "v_proj"]),  # ["q_proj", "k_proj", ...] as the
        (["[q_proj", "k_proj]"], ["q_proj", "k_proj"]),  # shell hands it over
        (["q_proj", "k_proj"], ["q_proj", "k_proj"]),
        (["q_proj,k_proj"], ["q_proj", "k_proj"]),
        (['["embed_tokens", "lm_head"]'], ["embed_tokens", "lm_head"]),
    ],
)
def test_lists_in_every_form(arguments: list[str], names: list[str]) -> None:
    made = parse("sft", "--lora_target_modules", *arguments, "--lr_scheduler", "linear", *NEEDED)
    assert made.lora_target_modules == names
    assert parse("sft", *NEEDED, f"--lora_target_modules={','.join(arguments)}").lora_target_modules == names


def test_the_shell_hands_the_list_over_so() -> None:
    line = 'printf "%s\\n" ["q_proj", "k_proj", "lm_head"]'
    words = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.splitlines()
    assert parse("sft", *NEEDED, "--lora_target_modules", *words).lora_target_modules == ["q_proj", "k_proj", "lm_head"]


@pytest.mark.parametrize(
    ("given", "value"),
    [(["True"], True), (["False"], False), (["false"], False), (["yes"], True), (["0"], False), ([], True)],
)
def test_booleans_true_false_and_bare(given: list[str], value: bool) -> None:
    assert parse("sft", *NEEDED, "--train_on_inputs", *given).train_on_inputs is value
    assert parse("sft", "--train-on-inputs", *given, *NEEDED).train_on_inputs is value


def test_a_bare_boolean_does_not_swallow_what_follows() -> None:
    made = parse("publish", "--private", "./merged", "user/name")
    assert (made.private, made.folder, made.repo_id) == (True, "./merged", "user/name")


@pytest.mark.parametrize(
    "arguments",
    [
        ["./merged", "user/name", "--dry-run"],
        ["--dry-run", "./merged", "user/name"],
        ["./merged", "--dry_run", "user/name"],
        ["./merged", "--dry-run", "True", "user/name"],
        ["--folder", "./merged", "--repo-id", "user/name", "--dry_run"],
        ["--repo-id=user/name", "./merged", "--dry_run=true"],
    ],
)
def test_positionals_stand_anywhere(arguments: list[str]) -> None:
    made = parse("publish", *arguments)
    assert (made.folder, made.repo_id, made.dry_run) == ("./merged", "user/name", True)


def test_an_input_swallowed_by_a_list_is_asked_for_before_it() -> None:
    with pytest.raises(ConfigError, match="adapter is missing: give it before --data_path, which accepts all words"):
        parse("compare", "--data_path", "rows.jsonl", "./adapter", "--output_dir", "out")
    with pytest.raises(ConfigError, match="--adapter is missing: Adapter to compare"):
        parse("compare", "--data_path", "rows.jsonl", "--output_dir", "out")


def test_negative_values_reach_their_check() -> None:
    with pytest.raises(ConfigError, match=r"--learning_rate '-1e-5': input should be greater than 0"):
        parse("sft", *NEEDED, "--learning_rate", "-1e-5")


def test_several_tables() -> None:
    assert parse("sft", *NEEDED, "--data-path", "a.jsonl", "b.csv").data_path == ["a.jsonl", "b.csv"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["./adapter", "--document", "본문 -- 글", "--max-new-tokens", "8"],
        ["--document", "본문 -- 글", "./adapter", "--max-new-tokens", "8"],
        ["--max_new_tokens=8", "--document=본문 -- 글", "./adapter"],
    ],
)
def test_columns_are_flags_of_generate(arguments: list[str]) -> None:
    made = parse("generate", *arguments)
    assert isinstance(made, GenerateSettings)
    assert (made.model, made.columns, made.max_new_tokens) == ("./adapter", {"document": "본문 -- 글"}, 8)


def test_column_values_may_begin_with_a_dash() -> None:
    assert parse("generate", "m", "--document", "- 첫째").columns == {"document": "- 첫째"}
    assert parse("generate", "m", "--document=--x").columns == {"document": "--x"}
    assert parse("generate", "m", "--raw", "-x").raw == "-x"


def test_flags_win_over_the_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base_model: m\ndata-path: rows.jsonl\noutput_dir: out\nbatch_size: 4\nlora_r: 8\n")
    made = parse("sft", "--config", str(path), "--batch-size", "2")
    assert (made.base_model, made.batch_size, made.lora_r) == ("m", 2, 8)
    assert parse("sft", "--batch-size", "2", f"--config={path}") == made


def test_columns_stand_in_the_settings_file_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ncolumns: {document: 글}\n", encoding="utf-8")
    assert parse("generate", "--config", str(path)).columns == {"document": "글"}


def test_saved_settings_run_again_through_config(tmp_path: Path) -> None:
    made = parse(
        "sft", *NEEDED, "--lora_target_modules", "[gate_proj]", "--template", "{a}\n{b}", "--val_set_size", "5"
    )
    config.write_yaml(made, tmp_path / "byeori.yaml")
    assert parse("sft", "--config", str(tmp_path / "byeori.yaml")) == made


def test_every_setting_has_a_flag_and_a_group() -> None:
    for command, kind in cli.COMMANDS.items():
        wanted = {field.alias or name for name, field in kind.model_fields.items()} - {kind.own_flags}
        assert wanted == set(flags.flags(kind)), command
        grouped = [name for members in help.groups(kind).values() for name in members]
        assert sorted(grouped) == sorted(wanted), command


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("sft m a.jsonl b.csv --output_dir out", {"base_model": "m", "data_path": ["a.jsonl", "b.csv"]}),
        ("dpo m --output_dir out pairs.jsonl", {"base_model": "m", "data_path": ["pairs.jsonl"]}),
        ("plan m rows.jsonl", {"base_model": "m", "data_path": ["rows.jsonl"]}),
        ("preview m rows.jsonl --json", {"base_model": "m", "data_path": ["rows.jsonl"], "json_output": True}),
        ("preview rows.jsonl --base_model m", {"base_model": "m", "data_path": ["rows.jsonl"]}),
        ("merge adapter merged", {"peft_model_path": "adapter", "output_dir": "merged"}),
        ("merge adapter --output_dir merged", {"peft_model_path": "adapter", "output_dir": "merged"}),
        ("generate adapter text", {"model": "adapter", "input_text": "text", "columns": {}}),
        ("generate adapter text --tone dry", {"model": "adapter", "input_text": "text", "columns": {"tone": "dry"}}),
        ("compare adapter rows.jsonl --output_dir out", {"adapter": ["adapter"], "data_path": ["rows.jsonl"]}),
        ("compare a b --output_dir out --data_path r.jsonl", {"adapter": ["a", "b"], "data_path": ["r.jsonl"]}),
        ("publish folder user/name", {"folder": "folder", "repo_id": "user/name"}),
    ],
)
def test_inputs_need_no_flags(line: str, values: dict[str, Any]) -> None:
    """First the model, adapter or folder, then what the command works on."""
    made = parse(*line.split())
    assert {name: getattr(made, name) for name in values} == values


def test_a_word_too_many_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'more' belongs to no flag"):
        parse("generate", "adapter", "text", "more")


# ---- help, version, completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["sft", "--help"], ["generate", "--help-all"], []])
def test_help_is_quick_and_imports_no_torch(arguments: Sequence[str]) -> None:
    code = (
        f"import sys; from byeori.cli import main\n"
        f"assert main({list(arguments)!r}) == 0\n"
        f"heavy = {{'torch', 'transformers', 'datasets', 'peft', 'numpy'}} & set(sys.modules)\n"
        f"print('HEAVY', heavy)"
    )
    seconds = []  # of processor time, so that other processes do not count
    for _ in range(3):
        before = sum(os.times()[2:4])
        done = run("-c", code)
        seconds.append(sum(os.times()[2:4]) - before)
        assert done.returncode == 0, done.stderr
        assert "usage: byeori" in done.stdout
        assert done.stdout.rstrip().endswith("HEAVY set()")
    assert min(seconds) < 0.5, seconds


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a command line prints on a terminal of 100 columns."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> str:
        assert cli.main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


def test_help_shows_every_command(shown: Callable[..., str]) -> None:
    text = shown("--help")
    assert all(f"  {name}" in text and config.about(kind) in text for name, kind in cli.COMMANDS.items())
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_fits_a_screen_and_names_every_setting(command: str, shown: Callable[..., str]) -> None:
    text = shown(command, "--help")
    assert len(text.splitlines()) <= (60 if command in ("plan", "rent") else 40 if command in ("sft", "dpo") else 50)
    assert max(map(len, text.splitlines())) <= 100
    for arguments in (["--help"], ["--help-all"], ["--flag", "x", "-h"]):
        text = shown(command, *arguments)
        assert all(name in text for name in flags.flags(cli.COMMANDS[command])), arguments


def test_help_all_describes_every_setting_under_its_group(shown: Callable[..., str]) -> None:
    text = shown("sft", "--help-all")
    order = [
        "essentials:",
        "LoRA:",
        "data:",
        "optimisation:",
        "memory:",
        "evaluation and saving:",
        "logging:",
        "expert:",
    ]
    places = [text.index(f"\n{group}\n") for group in order]
    assert places == sorted(places)
    words = " ".join(text.split())
    for name, field in flags.flags(SftSettings).items():
        assert f"  --{name} {help.value_type(field)}" in text
        assert str(field.description) in words


def test_help_shows_types_values_and_defaults(shown: Callable[..., str]) -> None:
    text = " ".join(shown("dpo", "--help-all").split())
    for words in (
        "--lr_scheduler {linear,cosine,cosine_with_min_lr,",
        "--loss {sigmoid,ipo,hinge,simpo,orpo} Preference loss.",
        "--load_in_4bit [{auto,True,False}]",
        "--load_in_8bit [BOOL] Quantize the frozen weights to 8 bits.",
        "--compile {auto,on,off}",
        "--lora_r INT Rank of the adapter. (default 16)",
        "--learning_rate FLOAT Peak learning rate. With finetune full the default is 5e-7. (default 1e-05)",
        "--output_dir PATH Folder for the adapter, its checkpoints and its logs. (required)",
        "--data_path PATH ... Rows",
        "--lora_target_modules NAME ...",
        "--template TEXT",
    ):
        assert words in text


def test_help_begins_with_what_every_run_needs(shown: Callable[..., str]) -> None:
    for command, first in (("sft", ""), ("plan", ""), ("compare", "--adapter")):
        text = shown(command, "--help")
        names = [flag for flag in (first, "--base_model", "--data_path", "--output_dir", "--batch_size") if flag]
        places = [place for flag in names if (place := text.find(f"  {flag} ")) >= 0]
        assert places == sorted(places) and len(places) >= 3, command


def test_help_shows_inputs_and_columns(shown: Callable[..., str]) -> None:
    assert "usage: byeori compare ADAPTER DATA_PATH [--FLAG VALUE ...]" in shown("compare", "--help")
    text = " ".join(shown("generate", "--help").split())
    assert "usage: byeori generate MODEL [INPUT_TEXT] [--COLUMN TEXT ...] [--FLAG VALUE ...]" in text
    assert "--document @file to read the value from a file" in text


def test_colour_on_request_only(shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b" not in shown("sft", "--help")  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = shown("sft", "--help")
    assert "\x1b[1;36m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = shown("sft", "--help")
    assert plain == re.sub("\x1b\\[[0-9;]*m", "", coloured)


@pytest.mark.parametrize(
    ("flag", "values"),
    [("--train-on-inputs", "True, False"), ("--gradient_checkpointing", "auto, none, selective, full, offload")],
)
def test_a_wrong_value_of_a_bare_flag_names_the_flag(flag: str, values: str) -> None:
    name = flag.replace("-", "_").replace("__", "--")
    with pytest.raises(ConfigError, match=f"{name} 'maybe': give one of {values}; see byeori sft --help"):
        parse("sft", *NEEDED, flag, "maybe")
    with pytest.raises(ConfigError, match="'maybe' belongs to no flag"):
        parse("sft", "maybe", *NEEDED)


def test_version(shown: Callable[..., str]) -> None:
    assert shown("--version") == f"byeori {__version__}\n"


def test_bash_completion_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "byeori.bash").write_text(script, encoding="utf-8")
    checked = subprocess.run(["bash", "-n", str(tmp_path / "byeori.bash")], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert all(f"--{name}" in script for name in SftSettings.model_fields)
    assert all(name in script for name in cli.COMMANDS)
    for words, place, found in (("ge", 1, "generate"), ("demo", 1, "demo demo-model"), ("sft --lora_r", 2, "--lora_r")):
        asked = f"source {tmp_path}/byeori.bash; COMP_WORDS=(byeori {words}); COMP_CWORD={place}; _shtab_byeori"
        command = ["bash", "-c", asked + "; echo ${COMPREPLY[@]}"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert told.split() == found.split()


@pytest.mark.parametrize(("shell", "first"), [("zsh", "#compdef byeori\n"), ("tcsh", "# ")])
def test_zsh_and_tcsh_have_completion(
    shell: str, first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read by the shell where it is installed. By hand: zsh 5.9 and tcsh 6.24 read them, and zsh completed with it."""
    assert cli.main(["--print-completion", shell]) == 0
    script = capsys.readouterr().out
    assert script.startswith(first)
    assert set(SftSettings.model_fields) <= set(re.findall(r"\w+", script))
    assert all(name in script for name in cli.COMMANDS)
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script, encoding="utf-8")
        how = [program, "-n"] if shell == "zsh" else [program, "-f"]
        read = subprocess.run([*how, str(tmp_path / "script")], capture_output=True, text=True, check=False)
        assert (read.returncode, read.stderr) == (0, "")


def test_another_shell_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--print-completion", "fish"]) == 2
    assert "--print-completion 'fish': give one of bash, zsh, tcsh; see byeori --help" in capsys.readouterr().err


def test_unknown_option_before_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--verison"]) == 2
    assert capsys.readouterr().err == "error: there is no flag --verison (did you mean --version?); see byeori --help\n"


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", stopped)
    assert cli.main(["sft"]) == 130
    kept = "checkpoints that were finished are kept: go on with --resume_from_checkpoint latest"
    assert capsys.readouterr().err == f"stopped; {kept}\n"


def test_a_sentence_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise ConfigError("first\nsecond")

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main(["sft"]) == 2
    assert capsys.readouterr().err == "error: first second\n"


def test_a_closed_pipe_is_no_error() -> None:
    line = f"{sys.executable} -m byeori sft --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stderr == ""


# ---- what a real run says ----------------------------------------------------------------------------------------


def test_a_run_without_a_terminal_says_nothing_but_its_own_lines(
    tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    common = ["--base_model", str(tiny_model), "--data_path", str(title_rows), "--cutoff_len", "512"]
    out = str(tmp_path / "out")
    done = run("-m", "byeori", "sft", *common, "--output_dir", out, "--max_steps", "2", "--val_set_size", "4")
    assert done.returncode == 0, done.stderr
    known = (
        "the tokenizer has no padding token",
        "Template title-ko",
        "20 rows to train, 4 held out",
        "step ",
        "Loading ",
        "Done: 2 steps",
    )
    for line in done.stderr.splitlines():
        assert line.startswith(known) or "of the tokens are in prefixes that rows share" in line, line
    assert done.stdout == ""
    done = forks.run("-m", "byeori", "generate", out, "--document", "봄", "--max_new_tokens", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
