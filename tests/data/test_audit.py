"""Tokenized tables: cached by content, a problem a row, and the audit's counts derived by hand."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

import kinds
from byeori.data import row_kinds, tokenized
from byeori.data.audit import audit, refuse_bad_rows, sentences
from byeori.data.row_kinds import ANSWER
from byeori.data.sources import load_rows
from byeori.data.template import parse
from byeori.data.tokenize import Encoding, encode_row, make_encoding
from byeori.errors import DataError

SHAPE = "Q: {q}\n[[({note})\n]]A:{a}"
GOOD = {"q": "why", "note": None, "a": "\nbecause"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows_of(tmp_path: Path) -> Callable[..., datasets.Dataset]:
    """Rows by way of a jsonl file, as users have them."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> datasets.Dataset:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
        return load_rows([str(path)]).rows

    return write


def encoding_of(template: str = SHAPE, cutoff: int = 40) -> Encoding:
    return make_encoding(
        kinds.kind("gpt2"), parse(template), cutoff_len=cutoff, add_eos_token=True, train_on_inputs=False
    )


def table_of(rows: datasets.Dataset, encoding: Encoding | None = None) -> datasets.Dataset:
    return tokenized.encode_table(rows, encoding or encoding_of(), ANSWER, progress=False)


def name(row: int) -> str:
    return f"line {row + 1}"


# ---- the table ---------------------------------------------------------------------------------------------------


def test_a_table_holds_the_examples(rows_of: Callable[..., datasets.Dataset]) -> None:
    rows = rows_of([GOOD, GOOD | {"note": "메모"}, GOOD | {"q": "왜 " * 40}])
    table = table_of(rows)
    expected = [encode_row(row, encoding_of()) for row in rows]
    assert [tokenized.example(table, index) for index in range(3)] == expected
    assert [example.row for example in expected] == [0, 1, 2]
    assert tokenized.lengths(table).tolist() == [len(example.token_ids) for example in expected]
    assert tokenized.target_tokens(table) == sum(example.target_count for example in expected)
    assert tokenized.usable(table) is table


def test_lengths_follow_a_selection(rows_of: Callable[..., datasets.Dataset]) -> None:
    table = table_of(rows_of([GOOD | {"q": "why " * count} for count in range(1, 6)]))
    whole = tokenized.lengths(table).tolist()
    assert tokenized.lengths(table.select([3, 0])).tolist() == [whole[3], whole[0]]
    assert tokenized.lengths(table.select([])).tolist() == []


def test_the_content_is_one_hash_however_it_is_read(
    rows_of: Callable[..., datasets.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = table_of(rows_of([GOOD | {"q": f"why {index}"} for index in range(7)]))
    by_hand = hashlib.sha256("".join(table["digest"][:]).encode()).hexdigest()
    halves = datasets.concatenate_datasets([table.select(range(3)), table.select(range(3, 7))])
    mixed = table.select([6, 5, 4, 3, 2, 1, 0])
    for size in (1, 2, 3, 7, 100):
        monkeypatch.setattr(tokenized, "_ROWS_AT_ONCE", size)
        same = [table, halves, mixed.select([6, 5, 4, 3, 2, 1, 0])]
        assert [tokenized.content(each) for each in same] == [by_hand] * 3
        assert tokenized.content(mixed) != by_hand
        assert tokenized.lengths(mixed).tolist() == tokenized.lengths(table).tolist()[::-1]


def test_hashing_the_content_holds_few_rows_at_once() -> None:
    """200,000 digests of 16 letters are 13 MB of Python strings; a tenth of them are there at once."""
    digests = [f"{index:016x}" for index in range(200_000)]
    table = datasets.Dataset.from_dict({"digest": digests})
    tracemalloc.start()
    try:
        found = tokenized.content(table)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert peak < 4_000_000


def test_the_second_time_nothing_is_tokenized(
    rows_of: Callable[..., datasets.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []

    def counted(row: Any, encoding: Encoding) -> Any:
        calls.append(row)
        return encode_row(row, encoding)

    monkeypatch.setattr(row_kinds, "encode_row", counted)
    rows = rows_of([GOOD, GOOD | {"q": "when"}])
    first = table_of(rows)
    assert len(calls) == 2
    again = table_of(rows_of([GOOD, GOOD | {"q": "when"}]), encoding_of())
    assert len(calls) == 2
    assert again[:] == first[:]
    changed = [
        encoding_of(SHAPE.replace("Q", "X")),
        encoding_of(cutoff=39),
        replace(encoding_of(), eos=None),
        replace(encoding_of(), train_on_inputs=True),
    ]
    for count, encoding in enumerate(changed, start=2):
        table_of(rows, encoding)
        assert len(calls) == 2 * count
    table_of(rows_of([GOOD, GOOD | {"q": "where"}]))
    assert len(calls) == 2 * 6


def test_a_changed_chat_template_or_tokenizer_is_another_table(rows_of: Callable[..., datasets.Dataset]) -> None:
    rows = rows_of([{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])

    def name_of(chat: str, **special: str) -> str:
        tokenizer = kinds.byte_level(chat=chat)
        tokenizer.add_special_tokens(special)
        encoding = make_encoding(tokenizer, None, cutoff_len=40, add_eos_token=True, train_on_inputs=False)
        return tokenized.fingerprint(rows, encoding, ANSWER)

    names = [name_of("x"), name_of("y"), name_of("x", eos_token="<|im_end|>")]
    assert len(set(names)) == 3
    assert names[0] == name_of("x")


def test_bad_rows_keep_their_line_and_reason(rows_of: Callable[..., datasets.Dataset]) -> None:
    table = table_of(rows_of([GOOD | {"a": " "}, GOOD, GOOD | {"q": None}, GOOD | {"a": "so " * 60}]))
    assert table["row"][:] == [0, 1, 2, 3]
    assert table["problem"][:3] == [
        "the answer, column 'a', is empty",
        "",
        "column 'q' holds null, not text",
    ]
    assert "are more than cutoff_len 40" in table["problem"][3]
    assert table["too_long"][:] == [False, False, False, True]
    assert table["token_ids"][0] == table["targets"][0] == []
    assert tokenized.usable(table)["row"][:] == [1]


def test_batches_without_a_usable_row_leave_no_type_open(rows_of: Callable[..., datasets.Dataset]) -> None:
    table = table_of(rows_of([GOOD | {"a": ""}] * 300 + [GOOD]))
    assert tokenized.usable(table)["row"][:] == [300]
    assert (
        table.features
        == tokenized.encode_table(rows_of([GOOD], "one.jsonl"), encoding_of(), ANSWER, progress=False).features
    )


def test_an_empty_table_has_the_same_columns(rows_of: Callable[..., datasets.Dataset]) -> None:
    rows = rows_of([GOOD])
    empty = table_of(rows.select([]))
    assert empty.features == table_of(rows).features
    assert audit(empty, None, name)["rows"] == 0


def test_several_processes_make_the_same_table(
    rows_of: Callable[..., datasets.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of([GOOD | {"q": f"why {index}", "a": "" if index < 6 else f" {index}"} for index in range(12)])
    one = table_of(rows)[:]
    monkeypatch.setattr(tokenized, "_ROWS_PER_PROCESS", 4)
    monkeypatch.setattr(tokenized.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(tokenized, "_FORMAT", "another")
    environment, values = os.environ, dict(os.environ)
    two = table_of(rows)
    assert os.environ is environment and dict(environment) == values
    assert two[:] == one
    assert len(two.cache_files) == 2


# ---- the audit ---------------------------------------------------------------------------------------------------


def test_every_count(rows_of: Callable[..., datasets.Dataset]) -> None:
    # One token a character: the tokenizer below has no merges for these words. BOS none, EOS one.
    encoding = make_encoding(_letters(), parse("{q}>{a}"), cutoff_len=10, add_eos_token=True, train_on_inputs=False)
    train = [
        {"q": "abcd", "a": "xyz"},  # 0: 4 + 1 + 3 + 1 = 9 tokens, 4 trained
        {"q": "abcd", "a": "xyz"},  # 1: the same
        {"q": "abcd", "a": "xyz"},  # 2: the same
        {"q": "abcd", "a": " "},  # 3: empty answer
        {"q": None, "a": "xyz"},  # 4: null
        {"q": "abcdefgh", "a": "xyz"},  # 5: 13 tokens, cut by 3 to 10, 4 trained
        {"q": "abcd", "a": "0123456789"},  # 6: 16, and 12 without its prompt: too long
        {"q": "ab", "a": ">x"},  # 7: `>>` would be one token over the boundary: a b > > x eos = 6, 3 trained
        {"q": " ", "a": "xy"},  # 8: an empty prompt: 5 tokens, 3 trained
        {"q": "", "a": " "},  # 9: an empty prompt and answer: not to be trained
    ]
    held_out = [
        {"q": "abcd", "a": "xyz"},  # 0: also in training
        {"q": "abcd", "a": "xyz"},  # 1: again
        {"q": "b", "a": "y"},  # 2: 4 tokens, 2 trained
        {"q": "b", "a": ""},  # 3: empty answer
    ]
    tables = [table_of(rows_of(train, "train.jsonl"), encoding), table_of(rows_of(held_out, "held.jsonl"), encoding)]
    found = audit(*tables, name)
    assert found.pop("dropped")[:3] == [
        {"row": "line 4", "reason": "the answer, column 'a', is empty", "too_long": False},
        {"row": "line 5", "reason": "column 'q' holds null, not text", "too_long": False},
        {"row": "line 10", "reason": "the answer, column 'a', is empty", "too_long": False},
    ]
    assert audit(*tables, name)["dropped"][4]["too_long"]
    assert audit(*tables, name)["dropped"][4]["reason"].startswith("16 tokens are more")
    assert found == {
        "rows": 14,
        "train_rows": 6,
        "validation_rows": 3,
        "tokens": 3 * 9 + 10 + 6 + 5 + 2 * 9 + 4,
        "target_tokens": 3 * 4 + 4 + 3 + 3 + 2 * 4 + 2,
        "longest": [
            {"row": "line 6", "tokens": 10},
            {"row": "line 3", "tokens": 9},
            {"row": "line 2", "tokens": 9},
        ],
        "mean_tokens": 7.8,
        "shortened_rows": 1,
        "tokens_cut": 3,
        "dropped_rows": 5,
        "too_long_rows": 1,
        "empty_prompts": 1,
        "first_empty_prompt": "line 9",
        "empty_answers": 3,
        "duplicate_rows": 2 + 1,
        "rows_in_both_parts": 2,
        "turns_left_out": 0,
        "joined_rows": 1,
        "special_rows": 0,
        "special": [],
        "composed_rows": 0,
    }


def _letters() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*alphabet, ">>", "<eos>"])}
    core = Tokenizer(models.BPE(vocabulary, [(">", ">")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_a_list_where_text_is_expected(rows_of: Callable[..., datasets.Dataset]) -> None:
    found = audit(table_of(rows_of([{"q": ["x"], "note": None, "a": "x"}])), None, name)
    assert found["dropped"][0]["reason"] == "column 'q' holds list ['x'], not text"
    assert (found["train_rows"], found["mean_tokens"], found["longest"]) == (0, 0.0, [])


def test_the_audit_is_plain_json(rows_of: Callable[..., datasets.Dataset]) -> None:
    found = audit(table_of(rows_of([GOOD, GOOD | {"a": ""}])), None, name)
    assert json.loads(json.dumps(found)) == found


def test_rows_without_an_answer_stop_the_run_unless_dropped(rows_of: Callable[..., datasets.Dataset]) -> None:
    found = audit(table_of(rows_of([GOOD] + [GOOD | {"a": ""}] * 5)), None, name)
    with pytest.raises(DataError) as caught:
        refuse_bad_rows(found, "stop")
    empty = "the answer, column 'a', is empty"
    assert str(caught.value) == (
        f"line 2: {empty}; line 3: {empty}; line 4: {empty} (and 2 more); "
        "fix the data, or drop such rows with --on_bad_rows drop"
    )
    refuse_bad_rows(found, "drop")


def test_rows_that_are_too_long_stop_nothing(rows_of: Callable[..., datasets.Dataset]) -> None:
    refuse_bad_rows(audit(table_of(rows_of([GOOD, GOOD | {"a": "so " * 60}])), None, name), "stop")


def test_a_bad_row_behind_many_long_ones_is_named(rows_of: Callable[..., datasets.Dataset]) -> None:
    rows = [GOOD] + [GOOD | {"a": "so " * 60}] * 25 + [GOOD | {"a": ""}]
    found = audit(table_of(rows_of(rows)), None, name)
    assert [problem["row"] for problem in found["dropped"]] == ["line 27", *(f"line {n}" for n in range(2, 27))]
    with pytest.raises(DataError, match=r"^line 27: the answer, column 'a', is empty; fix the data"):
        refuse_bad_rows(found, "stop")


def test_no_row_left(rows_of: Callable[..., datasets.Dataset]) -> None:
    found = audit(table_of(rows_of([GOOD | {"a": ""}])), None, name)
    with pytest.raises(DataError, match=r"^no row is left to train: line 1: the answer, column 'a', is empty$"):
        refuse_bad_rows(found, "drop")


def test_the_audit_in_words() -> None:
    nothing = {
        "train_rows": 1, "validation_rows": 0, "tokens": 10, "target_tokens": 4,
        "longest": [{"row": "line 1", "tokens": 10}], "shortened_rows": 0, "tokens_cut": 0, "dropped_rows": 0,
        "too_long_rows": 0, "dropped": [], "empty_answers": 0, "empty_prompts": 0, "duplicate_rows": 0,
        "rows_in_both_parts": 0, "joined_rows": 0, "turns_left_out": 0, "special_rows": 0, "special": [],
        "composed_rows": 0, "special_tokens_in_text": "escape",
    }  # fmt: skip
    assert sentences(nothing, cutoff_len=64, policy="drop") == [
        "1 row to train; 10 tokens, 4 of them trained (40%); longest 10"
    ]
    dropped = [
        {"row": "line 2", "reason": "the answer, column 'a', is empty", "too_long": False},
        {"row": "line 5", "reason": "column 'q' holds null, not text", "too_long": False},
        *({"row": f"line {row}", "reason": "too long", "too_long": True} for row in range(10, 1210)),
    ]
    every: dict[str, Any] = nothing | {
        "train_rows": 1200, "validation_rows": 30, "tokens": 100_000, "target_tokens": 5_000, "shortened_rows": 1,
        "tokens_cut": 1, "dropped_rows": 1202, "too_long_rows": 1200, "dropped": dropped, "duplicate_rows": 3,
        "rows_in_both_parts": 2, "empty_answers": 1, "empty_prompts": 2, "first_empty_prompt": "line 9",
        "joined_rows": 4, "special_rows": 2, "composed_rows": 3, "turns_left_out": 2,
        "shared_prefix": 0.251, "shared_prefix_rows": 1000,
        "special": [{"row": "line 3", "token": "</s>"}, {"row": "line 7", "token": "<|im_end|>"}],
    }  # fmt: skip
    assert sentences(every, cutoff_len=64, policy="drop") == [
        "1,200 rows to train, 30 held out; 100,000 tokens, 5,000 of them trained (5%); longest 10",
        "1 prompt shortened to cutoff_len 64 (1 token cut; answers are never cut)",
        "2 turns longer than cutoff_len 64 left out; the other turns of their rows are trained",
        "2 rows (1 with an empty answer) dropped: line 2: the answer, column 'a', is empty; line 5: column 'q' holds "
        "null, not text",
        "1,200 rows dropped: line 10: too long; line 11: too long; line 12: too long (and 1,197 more)",
        "2 rows have an empty prompt; first line 9",
        "3 rows are copies of another row",
        "2 held-out rows have the same tokens as a training row",
        "4 prompts would end with other tokens if prompt and answer were tokenized as one text; the prompt is "
        "tokenized alone, as it is served",
        "2 rows hold the text of a control token (</s> in line 3, <|im_end|> in line 7): it stays text, though most "
        "servers make the token of it, as --special_tokens_in_text keep does",
        "3 rows hold Hangul in letters (NFD), which was composed to syllables (NFC)",
        "25% of the tokens of the first 1,000 rows are in prefixes that rows share",
    ]
    whole = sentences(every | {"shared_prefix_rows": 1200}, cutoff_len=64, policy="drop")
    assert whole[-1] == "25% of the tokens are in prefixes that rows share"
    one = sentences(
        every | {"empty_prompts": 1, "duplicate_rows": 1, "rows_in_both_parts": 1, "joined_rows": 1},
        cutoff_len=64,
        policy="drop",
    )
    assert one[5] == "1 row has an empty prompt; first line 9"
    assert one[6:8] == ["1 row is a copy of another row", "1 held-out row has the same tokens as a training row"]
    assert one[8].startswith("1 prompt would end with other tokens")
    keep = sentences(every | {"special_tokens_in_text": "keep"}, cutoff_len=64, policy="drop")
    assert keep[9].endswith("in line 7): it becomes the token, because special_tokens_in_text is keep")
    assert not any("\n" in line for line in one)
    stop = sentences(every, cutoff_len=64, policy="stop")
    assert stop[3] == (
        "2 rows (1 with an empty answer) cannot be trained, and training will stop unless --on_bad_rows drop is "
        "given: line 2: the answer, column 'a', is empty; line 5: column 'q' holds null, not text"
    )
    assert sentences(nothing | {"train_rows": 0, "longest": []}, cutoff_len=64, policy="drop") == ["no row to train"]
