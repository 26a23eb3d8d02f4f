"""Datasets downloaded from a local stand-in for the Hub: values as written, the right split, and again without it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forks
from hub_server import TOKEN, Hub, serve

# values that datasets' own loaders change: a date, a number in quotes, null beside text, a nested column of two kinds
LINES: list[dict[str, Any]] = [
    {"day": "2024-01-02", "code": "007", "note": None, "turns": [{"role": "user", "content": "1.0"}]},
    {"day": "2024-02-03", "code": "8", "note": "2024-01-02T00:00:00", "turns": []},
    {"day": "2024-03-04", "code": "9", "note": "", "turns": [{"role": "user", "content": "2024-01-02"}]},
]
TABLES = {
    (config, split): [{"text": f"{config} {split} {number}"} for number in range(count)]
    for config in ("ko", "en")
    for split, count in (("train", 4), ("held", 2))
}
CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {config}\n  data_files:\n"
    + "".join(f"  - split: {split}\n    path: {config}/{split}-*.parquet\n" for split in ("train", "held"))
    for config in ("ko", "en")
)
ASKED: dict[str, dict[str, Any]] = {
    "lines": {"paths": ["me/lines"]},
    "first rows": {"paths": ["me/lines"], "split": "train[:2]+test"},
    "ko": {"paths": ["me/tables"], "config": "ko"},
    "en held": {"paths": ["me/tables"], "config": "en", "split": "held"},
    "no split": {"paths": ["me/tables"], "config": "en", "split": "dev"},
    "no configuration": {"paths": ["me/tables"]},
    "new": {"paths": ["me/versions"]},
    "old": {"paths": ["me/versions"], "revision": "v1"},
    "semicolons": {"paths": ["me/semicolons"]},
    "text": {"paths": ["me/text"]},
    "private": {"paths": ["me/private"]},
    "damaged": {"paths": ["me/damaged"]},
}
PROGRAM = """
import json, sys
from byeori.data.sources import load_rows
from byeori.errors import ByeoriError
loaded = {}
for name, asked in json.loads(sys.argv[1]).items():
    try:
        loaded[name] = list(load_rows(**asked).rows.remove_columns("__row__"))
    except ByeoriError as error:
        loaded[name] = f"{type(error).__name__}: {error}"
print(json.dumps(loaded, default=str))
"""


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), written)
    return written.getvalue()


def fill(hub: Hub) -> None:
    hub.put("datasets/me/lines", {"README.md": b"# Lines\n", "train.jsonl": jsonl(LINES), "test.jsonl": jsonl(LINES)})
    tables = {
        f"{config}/{split}-{part}.parquet": parquet(rows[part::2] or rows)
        for (config, split), rows in TABLES.items()
        for part in (0, 1)
    }
    hub.put("datasets/me/tables", {"README.md": f"{CARD}---\n".encode(), **tables})
    hub.put("datasets/me/versions", {"data/train.jsonl": jsonl([{"text": "old"}])}, branch="v1")
    hub.put("datasets/me/versions", {"data/train.jsonl": jsonl([{"text": "new"}])})
    semicolons = b"---\nconfigs:\n- config_name: default\n  data_files: train.csv\n  sep: ';'\n---\n"
    hub.put("datasets/me/semicolons", {"README.md": semicolons, "train.csv": "본문;제목\n하나;둘\n".encode()})
    hub.put("datasets/me/text", {"train.txt": b"one\ntwo\n"})
    hub.put("datasets/me/private", {"train.jsonl": jsonl([{"text": "mine"}])}, private=True)
    hub.put("datasets/me/damaged", {"train.jsonl": b'{"text": "a"}\n{"text": \n'})


def load(hub: Hub, home: Path, asked: dict[str, Any], **environment: str) -> tuple[dict[str, Any], str]:
    """What a process of its own finds, since the client reads its endpoint once; and what it says."""
    place = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    place |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    place |= {"HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    done = forks.run("-c", PROGRAM, json.dumps(asked), env=place)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path, str]:
    """(what was loaded, standard error, the cache, the address of a server that is gone)."""
    home = tmp_path_factory.mktemp("hf")
    with serve() as hub:
        fill(hub)
        loaded, stderr = load(hub, home, ASKED, HF_TOKEN=TOKEN)
        again, nothing_new = load(hub, home, {"lines": ASKED["lines"], "private": ASKED["private"]})
    assert again["lines"] == loaded["lines"] and "Downloading" not in nothing_new
    return loaded, stderr, home, again["private"]


def test_values_are_those_of_the_file(online: Any) -> None:
    loaded, _, _, _ = online
    assert loaded["lines"] == LINES
    assert loaded["first rows"] == LINES[:2] + LINES


def test_configurations_and_splits(online: Any) -> None:
    loaded, _, _, _ = online
    both = [row for part in (0, 1) for row in TABLES["ko", "train"][part::2]]
    assert loaded["ko"] == both and loaded["en held"] == TABLES["en", "held"]
    assert loaded["no split"].startswith("HubError: the dataset me/tables has no split 'dev'")
    assert "train, held" in loaded["no split"]
    assert "needs a configuration; set dataset_config to one of: ko, en" in loaded["no configuration"]


def test_revision(online: Any) -> None:
    loaded, _, _, _ = online
    assert loaded["new"] == [{"text": "new"}] and loaded["old"] == [{"text": "old"}]


def test_other_kinds_are_read_by_datasets(online: Any) -> None:
    loaded, _, _, _ = online
    assert loaded["semicolons"] == [{"본문": "하나", "제목": "둘"}]
    assert loaded["text"] == [{"text": "one"}, {"text": "two"}]


def test_private_with_the_token_only(online: Any) -> None:
    loaded, stderr, home, without = online
    assert loaded["private"] == [{"text": "mine"}]
    assert "was not found" in without and "hf auth login" in without
    assert TOKEN not in stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in home.rglob("*") if path.is_file())


def test_damaged_file_is_named_as_on_the_hub(online: Any) -> None:
    loaded, _, home, _ = online
    assert loaded["damaged"].startswith("DataError: me/damaged/train.jsonl (on the Hub) line 2 is not valid JSON")
    assert str(home) not in loaded["damaged"]


def test_download_is_announced_with_its_size(online: Any) -> None:
    _, stderr, _, _ = online
    assert f"Downloading me/lines from the Hugging Face Hub: train.jsonl, {len(jsonl(LINES))} B\n" in stderr
    sizes = sum(len(parquet(TABLES["ko", "train"][part::2])) for part in (0, 1))
    assert f"Downloading me/tables from the Hugging Face Hub: 2 files, {sizes} B\n" in stderr


def test_again_without_a_network(online: Any) -> None:
    loaded, _, home, _ = online
    again, stderr = load(Hub(url="http://127.0.0.1:9"), home, ASKED, HF_HUB_OFFLINE="1")
    for name in ("lines", "first rows", "ko", "en held", "new", "old", "semicolons", "text", "private"):
        assert again[name] == loaded[name], name
    assert "Downloading" not in stderr
