"""What is wrong with a path, a template or a column is said before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from byeori.commands import checks
from byeori.config import DpoSettings, SftSettings, check
from byeori.errors import ByeoriError

PROGRAM = """
import json, sys
from byeori.cli import main
for line in json.loads(sys.argv[1]):
    code = main(line)
    print(json.dumps([code, sorted({'torch', 'transformers', 'datasets', 'peft', 'pyarrow'} & set(sys.modules))]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, an adapter, a finished run and tables; none is read beyond its first lines."""
    for name, file in (("model", "config.json"), ("adapter", "adapter_config.json"), ("run", "train_log.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "rows.jsonl").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"document": "a", "title": "b"}\n{"document": "c", "title": "d", "x": 1}\n')
    (tmp_path / "rows.csv").write_text("frage,antwort\na,b\n")
    (tmp_path / "pairs.jsonl").write_text('{"question": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "ask.txt").write_text("{question}\n{answer}")
    return tmp_path


TRAIN = "--base_model={0}/model --data_path={0}/rows.jsonl --output_dir={0}/out"
MISTAKES = {
    f"sft {TRAIN} --data_path={{0}}/row.jsonl": "there is no file {0}/row.jsonl (did you mean rows.jsonl?)",
    f"sft {TRAIN} --data_path={{0}}/*.parquet": "no file matches {0}/*.parquet",
    f"sft {TRAIN} --data_path={{0}}/empty": "the folder {0}/empty has no data file",
    f"sft {TRAIN} --base_model={{0}}/modle": "there is no folder {0}/modle (did you mean model?)",
    f"sft {TRAIN} --base_model={{0}}/empty": "{0}/empty is not a model: it has no config.json",
    f"sft {TRAIN} --template=title-kr": "there is no template or file 'title-kr' (did you mean title-ko?)",
    f"sft {TRAIN} --template={{0}}/ask.tx": "(did you mean ask.txt?)",
    f"sft {TRAIN} --template={{0}}/ask.txt": "'question', which the data does not have",
    f"sft {TRAIN} --template={{{{docment}}}}{{{{title}}}}": "(did you mean document?)",
    f"sft {TRAIN} --data_path={{0}}/rows.csv": "no built-in template fits the columns frage, antwort",
    f"sft {TRAIN} --output_dir={{0}}/run": "{0}/run holds another run",
    f"sft {TRAIN} --output_dir={{0}}/model": "holds the weights that the run starts from",
    f"sft {TRAIN} --output_dir={{0}}/rows.jsonl/out": "cannot write into {0}/rows.jsonl/out",
    f"sft {TRAIN} --resume_from_checkpoint={{0}}/rnu": "there is no checkpoint {0}/rnu (did you mean run?)",
    "sft --config {0}/row.jsonl": "cannot read the settings file {0}/row.jsonl (did you mean rows.jsonl?)",
    f"sft {TRAIN} --learning-rat=1": "there is no flag --learning_rat (did you mean --learning_rate?)",
    f"dpo {TRAIN} --template=question-answer": "the template uses the column 'question', which the data does not have",
    f"dpo {TRAIN} --base_model=./no --data_path={{0}}/pairs.jsonl": "there is no folder ./no",
    "plan --base_model={0}/modle": "there is no folder {0}/modle (did you mean model?)",
    "plan {0}/model {0}/row.jsonl": "there is no file {0}/row.jsonl (did you mean rows.jsonl?)",
    "preview {0}/model {0}/row.jsonl": "there is no file {0}/row.jsonl (did you mean rows.jsonl?)",
    "preview {0}/model {0}/rows.csv": "no built-in template fits the columns frage, antwort",
    "generate {0}/adaptr text": "there is no folder {0}/adaptr (did you mean adapter?)",
    "generate {0}/adapter --data_path {0}/row.jsonl": "there is no file {0}/row.jsonl (did you mean rows.jsonl?)",
    "generate {0}/adapter text --output {0}/no/answers.jsonl": "the folder {0}/no does not exist",
    "compare {0}/adaptr {0}/rows.jsonl --output_dir {0}/new": "there is no folder {0}/adaptr (did you mean adapter?)",
    "compare {0}/adapter {0}/rows.jsonl --output_dir {0}/report": "{0}/report holds results already",
    "compare {0}/adapter {0}/rows.jsonl --output_dir {0}/new --template title-kr": "(did you mean title-ko?)",
    "compare {0}/adapter {0}/rows.jsonl --output_dir {0}/new --metric lable": "no metric 'lable' (did you mean label?)",
    "compare {0}/adapter {0}/rows.jsonl --output_dir {0}/new --fail-unless chrf.lo>0": "(did you mean low?)",
    "merge {0}/adaptr {0}/merged": "there is no folder {0}/adaptr (did you mean adapter?)",
    "merge {0}/adapter {0}/model": "{0}/model is not empty; choose another folder or pass --overwrite_output_dir",
    "merge {0}/adapter {0}/run": "{0}/run holds no model, so it is not overwritten",
    "merge {0}/adapter {0}/run --overwrite_output_dir": "{0}/run holds no model, so it is not overwritten",
    "publish {0}/adaptr user/name": "there is no folder {0}/adaptr",
}


def test_mistakes_are_found_without_torch(folder: Path) -> None:
    lines = [line.format(folder).split() for line in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)], capture_output=True, text=True, check=True
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[2, []]] * len(lines), done.stderr
    for said, words in zip(done.stderr.splitlines(), MISTAKES.values(), strict=True):
        assert words.format(folder) in said
    assert not (folder / "out").exists() and not (folder / "new").exists()


def test_what_cannot_be_known_yet_is_left_to_the_command(folder: Path) -> None:
    """A Hub id, columns of rows further down, a table too large to read, a run that is resumed."""
    good = {
        "base_model": str(folder / "model"),
        "data_path": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "o"),
    }
    (folder / "late.jsonl").write_text('{"title": "b"}\n{"document": "c", "title": "d"}\n')
    (folder / "large.jsonl").write_text('{"x": "' + "x" * checks._SMALL + '"}\n')
    for change in (
        {},
        {"base_model": "user/name", "data_path": "user/rows"},
        {"data_path": str(folder / "late.jsonl"), "template": "title-ko"},
        {"data_path": str(folder / "large.jsonl"), "template": "title-ko"},
        {"output_dir": str(folder / "run"), "resume_from_checkpoint": "latest"},
        {"output_dir": str(folder / "run"), "overwrite_output_dir": True},
    ):
        checks.check(check(SftSettings, good | change))
    with pytest.raises(ByeoriError):
        checks.check(check(SftSettings, good | {"output_dir": str(folder / "run")}))
    checks.check(check(DpoSettings, good | {"data_path": str(folder / "pairs.jsonl"), "template": "question-answer"}))
