"""What tests/gpu shows on a GPU, on one that is not there: its memory is the host's and its operations are the CPU's.

Numbers of different devices that meet, waits for the device, calls of kernels with what they do not take: all that
needs no GPU to be found.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# Attention in heads of 64, eight over two, stands for all shapes here; the written-out kernel knows no difference.
CHOSEN = "test_cuda.py or not nodes_apart or 64-8-2"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch with CUDA has the device that is pretended")
def test_the_tests_for_gpus_pass() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "-m", "not silicon", "-k", CHOSEN]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE / "pretended"), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(HERE / "gpu")], env=env, cwd=HERE.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed, others = re.search(r"(\d+) passed", done.stdout), re.search(r"(\d+) (skipped|failed)", done.stdout)
    assert passed and int(passed[1]) >= 70 and others is None, done.stdout[-500:]
