"""llama.cpp as an engine (xllamacpp, in this process): the answers and scores of transformers, base and adapter."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import byeori
from byeori.artifacts import saved_model
from byeori.evaluate import generate
from byeori.evaluate.engines.base import Answer, Ending, Sampling
from byeori.evaluate.engines.llamacpp import LlamaCpp
from byeori.evaluate.engines.plain import Plain
from byeori.export import llama_cpp
from byeori.support.cache_folder import cache_folder

COMMON: dict[str, Any] = {"dtype": "float32", "max_new_tokens": 12, "max_rows": 6}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path_factory.getbasetemp() / "gguf-cache"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_generate_gives_the_same_answers(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    given = {"model": trained, "data_path": title_rows, **COMMON}
    byeori.generate(**given, output=tmp_path / "a.jsonl")
    byeori.generate(**given, output=tmp_path / "b.jsonl", engine="llamacpp")
    assert lines(tmp_path / "a.jsonl") == lines(tmp_path / "b.jsonl")


def test_compare_scores_the_same(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    given = {"adapter": trained, "data_path": title_rows, **COMMON}
    one = byeori.compare(**given, output_dir=tmp_path / "a")
    other = byeori.compare(**given, output_dir=tmp_path / "b", engine="llamacpp")
    assert [row["tuned"] for row in lines(one.rows)] == [row["tuned"] for row in lines(other.rows)]
    losses = [[row["base"]["loss"] for row in lines(result.rows)] for result in (one, other)]
    assert losses[0] == losses[1]


class _Ids:
    """Answers as their token ids."""

    suffix = ""

    def __init__(self, ending: Ending) -> None:
        self.stop_ids, self.tokenizer = ending.stop_ids, ending.tokenizer

    def answer(self, ids: Any, *, stopped: bool = False) -> Answer:
        end = next((at for at, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return Answer(text=json.dumps(list(ids[:end])), stopped=stopped, tokens=end)


def test_base_and_adapter_alternate_in_one_server(trained: Path, title_rows: Path) -> None:
    """Where a token is another one, both are equally likely: no key or value of the other side has been used."""
    byeori.generate(model=trained, data_path=title_rows, engine="llamacpp", **COMMON)  # makes the files
    saved = saved_model.find(str(trained))
    encoding = saved_model.encoding(saved, saved_model.template_of(saved, None))
    prompts = dict(enumerate(generate.encode_prompts(lines(title_rows)[:6], encoding, str)))
    plain = Plain(saved_model.load_weights(saved, "float32", torch.device("cpu")), saved.tokenizer)
    ending: Any = _Ids(plain.ending)
    plain.ending = ending
    files = sorted(cache_folder().rglob("*.gguf"), key=lambda path: path.name.endswith("-lora.gguf"))
    server = llama_cpp.LlamaCpp(*files, context=200, threads=1, parallel=4, wide_cache=True)
    engine = LlamaCpp(server, ending, has_adapter=True, losses=lambda: plain)
    for side in ("base", "tuned", "base", "tuned"):
        found: list[dict[int, list[int]]] = [{}, {}]
        for answers, used in zip(found, (plain, engine), strict=True):
            used.answers(
                prompts,
                Sampling(max_new_tokens=12),
                side,
                lambda row, answer, answers=answers: answers.update({row: json.loads(answer.text)}),
            )
        for row in prompts:
            one, other = found[0][row], found[1][row]
            at = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
            if at is not None:
                with plain.model.disable_adapter() if side == "base" else nullcontext(), torch.no_grad():
                    logits = plain.model(torch.tensor([[*prompts[row], *one[:at]]])).logits[0, -1].double()
                assert abs(float(logits[one[at]] - logits[other[at]])) < 0.005, (side, row, at)


def test_one_prompt_and_its_suffix(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"model": trained, "columns": {"document": "봄이 왔다."}, "dtype": "float32", "max_new_tokens": 12}
    expected = byeori.generate(**given)
    capsys.readouterr()
    assert byeori.generate(**given, engine="llamacpp") == expected
    assert capsys.readouterr().out == f"{expected[0]}\n"


def test_sampling_is_reproducible(trained: Path, title_rows: Path) -> None:
    given = {"model": trained, "data_path": title_rows, "engine": "llamacpp", "temperature": 1.2, "top_k": 20, **COMMON}
    first = byeori.generate(**given)
    assert byeori.generate(**given) == first != byeori.generate(**given, seed=7)


def test_what_has_no_effect_is_refused(trained: Path, title_rows: Path) -> None:
    with pytest.raises(byeori.ConfigError, match="generation_batch_tokens has no effect on --engine llamacpp"):
        byeori.generate(model=trained, data_path=title_rows, engine="llamacpp", generation_batch_tokens=100)
