"""Nothing that byeori changes in its process is left behind: a notebook goes on with its own settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runs import environment

PROGRAM = """
import gc, json, logging, os, signal, sys, warnings
from pathlib import Path
import torch, transformers, peft, datasets, huggingface_hub
from huggingface_hub import utils as hub_utils
import byeori

LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub", "tokenizers")


def state():
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    return {
        "warnings": [str(item) for item in warnings.filters],
        # oneDNN reads the sizes of its caches at the first product of the process, so they are set for good
        "environment": {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")},
        "logging": [logging.root.level, *[(logger.name, logger.level, logger.disabled) for logger in loggers]],
        "gc": [gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()],
        "modules": [name for name, module in sys.modules.items() if module is None],
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
        "bars": [hub_utils.are_progress_bars_disabled(), datasets.utils.are_progress_bars_disabled()],
        "torch": [
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.get_default_device(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32,
        ],
        "operators": {
            name: torch._C._dispatch_dump(name)
            for name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::_grouped_mm")
        },
        "classes": [
            torch.nn.Linear.forward is LINEAR,
            torch.nn.Embedding.forward is EMBEDDING,
            # an attention function is registered under a name of its own; the others' entries stay
            sorted(name for name in ATTENTION._global_mapping if not name.startswith("byeori")),
        ],
    }


ATTENTION = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
LINEAR, EMBEDDING = torch.nn.Linear.forward, torch.nn.Embedding.forward
model, rows, output, parts = sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4].split(",")
before = state()
common = {"base_model": model, "data_path": rows, "cutoff_len": 256, "dtype": "float32"}
byeori.preview(base_model=model, data_path=rows, cutoff_len=256)
byeori.plan(**common, gpu=["RTX 4090"])
byeori.sft(**common, output_dir=output / "sft", batch_size=4, max_steps=1)
byeori.generate(model=output / "sft", columns={"document": "x"}, max_new_tokens=2)
byeori.merge(peft_model_path=output / "sft", output_dir=output / "merged")
byeori.compare(adapter=output / "sft", data_path=rows, output_dir=output / "report", max_rows=2, max_new_tokens=2)
after = state()
wrong = [f"{part}:\\n  {before[part]}\\n  {after[part]}" for part in parts if before[part] != after[part]]
print("\\n".join(wrong), file=sys.stderr)
sys.exit(len(wrong))
"""

PARTS = ["warnings", "environment", "logging", "gc", "modules", "signals", "bars", "torch", "operators", "classes"]


def test_the_state_of_the_process_is_as_before(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    arguments = [str(tiny_model), str(title_rows), str(tmp_path), ",".join(PARTS)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_import_changes_nothing() -> None:
    program = """
import gc, importlib, logging, os, signal, sys, warnings
import torch, transformers, peft
state = lambda: (list(warnings.filters), dict(os.environ), gc.isenabled(), gc.get_freeze_count(), gc.get_threshold(),
    [name for name, found in sys.modules.items() if found is None], signal.getsignal(signal.SIGINT),
    [logging.getLogger(name).level for name in ("torch", "transformers", "peft")])
for module in ("byeori", "byeori.cli", "byeori.commands.train", "byeori.commands.generate"):
    before = state()
    importlib.import_module(module)
    assert state() == before, (module, before, state())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr


def test_datasets_shows_its_bars_again_if_it_was_imported_meanwhile() -> None:
    program = """
import os, warnings
from byeori.support import console
assert not console.moving()
with console.quiet_libraries():
    import datasets
    assert datasets.utils.are_progress_bars_disabled()
assert not datasets.utils.are_progress_bars_disabled()
assert "HF_DATASETS_DISABLE_PROGRESS_BARS" not in os.environ
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    datasets.enable_progress_bars()
assert not caught, caught
"""
    arguments = [sys.executable, "-c", program]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
