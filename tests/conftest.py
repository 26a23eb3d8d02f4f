"""Fixtures that many tests share; what they call stands in tests/helpers."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import forks
from tiny_models import byte_level_tokenizer, sample_rows, short_sft, tiny_llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["BYEORI_LANG"] = "en"  # whatever the language of the machine, tests read English
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("BYEORI_TEST_GPUS", ""))

GPU = Path(__file__).parent / "gpu"
_server: list[subprocess.Popen[bytes]] = []


def pytest_configure(config: pytest.Config) -> None:
    """One server of forks for all workers. What is imported until the tests are collected is no garbage."""
    gc.disable()
    if not hasattr(config, "workerinput"):
        _server.append(forks.serve())


def pytest_collection_finish() -> None:
    gc.enable()


def pytest_unconfigure() -> None:
    if _server:
        forks.stop(_server.pop())


@pytest.fixture(scope="module", autouse=True)
def imports_are_not_garbage() -> None:
    """Garbage collections, of which each merge asks for several, leave out the objects that imports made."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tiny models run on one thread: handing their work to more takes ten times as long as doing it. So does the real
    one where another worker has the other core."""
    if torch := sys.modules.get("torch"):
        alone = item.get_closest_marker("real") and "PYTEST_XDIST_WORKER" not in os.environ
        torch.set_num_threads(len(os.sched_getaffinity(0)) if alone else 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests in gpu/ are skipped where there is none: `BYEORI_TEST_GPUS=0 python -m pytest tests/gpu` runs them."""
    for item in (item for item in items if GPU in item.path.parents):
        import torch

        item.add_marker("gpu")
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device (or BYEORI_TEST_GPUS is not set)"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def title_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A jsonl file of 24 short title rows."""
    path = tmp_path_factory.mktemp("rows") / "titles.jsonl"
    rows = sample_rows("titles-ko-train.jsonl")[:24]
    lines = [json.dumps({"document": row["document"][:60], "title": row["title"]}, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter on the tiny model, trained hard enough to change its answers."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    return short_sft(tiny_model, title_rows, folder, max_steps=12, learning_rate=2e-2)


@pytest.fixture(scope="session")
def merged(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same adapter merged into its base."""
    import byeori

    folder = tmp_path_factory.mktemp("trained") / "merged"
    byeori.merge(peft_model_path=trained, output_dir=folder)
    return folder


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The embedded model's folder; tests that use it are marked `real`."""
    from byeori.model.demo_model import embedded_model

    return embedded_model(print)
