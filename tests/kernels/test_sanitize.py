"""scripts/sanitize.sh passes over kernels that are right, and finds what is wrong in a planted one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLANTED = {
    "heap-buffer-overflow": "long f(float *x, long n) { float s = 0; while (n >= 0) s += x[n--]; return s; }",
    "is outside the range of representable values": "long f(float *x, long n) { return x[0] / (x[1] - x[1]) * 0; }",
}
CALL = """
import ctypes
from pathlib import Path
import torch
from byeori.kernels import native

def test_planted(tmp_path):
    native._SOURCE = Path({source!r})
    native._compile(__import__("os").environ["CC"], tmp_path / "planted.so")
    numbers = torch.zeros(1000)
    ctypes.CDLL(str(tmp_path / "planted.so")).f(ctypes.c_void_p(numbers.data_ptr()), ctypes.c_long(1000))
"""


def sanitize(*tests: Path) -> subprocess.CompletedProcess[str]:
    program = [ROOT / "scripts" / "sanitize.sh", *tests]
    return subprocess.run(program, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and its sanitizers")
def test_the_kernels_are_clean() -> None:
    done = sanitize(ROOT / "tests" / "kernels" / "test_rms_norm.py")
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and its sanitizers")
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    (tmp_path / "planted.c").write_text(PLANTED[fault], encoding="ascii")
    test = tmp_path / "test_planted.py"
    test.write_text(CALL.format(source=str(tmp_path / "planted.c")), encoding="ascii")
    done = sanitize(test)
    assert done.returncode != 0 and fault in done.stdout + done.stderr, done.stdout[-3000:] + done.stderr[-3000:]
