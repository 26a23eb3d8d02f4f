"""One process for each GPU, without ceremony: a training command starts itself again under torchrun's agent.

The processes say what there is to say, in one sentence; the agent's own tables and tracebacks stay silent, and its
exit code is theirs.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

from byeori.errors import AGAIN, SAID, ConfigError


def start_group(wanted: int | None, arguments: Sequence[str]) -> int | None:
    """Run `byeori ARGUMENTS` on several processes; their exit code, or None where this process is to do the work.

    wanted: processes; None is one for each GPU.

    Raises:
        ConfigError: this process is one of a group of another size, which torchrun has started.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        there = int(os.environ["LOCAL_WORLD_SIZE"])
        if wanted not in (None, there):
            raise ConfigError(f"--nproc {wanted}, but torchrun started {there} processes here; leave one of them out")
        return None
    count = _gpus() if wanted is None else wanted
    if count <= 1:
        return None
    if 0 < _gpus() < count:
        raise ConfigError(f"--nproc {count}, but there are {_gpus()} GPUs here; give {_gpus()} or less")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    with tempfile.TemporaryDirectory(prefix="byeori-") as folder:
        os.environ[SAID] = str(Path(folder) / "said")
        try:
            while (code := _run(count, [sys.executable, "-m", "byeori", *arguments], Path(folder))) == AGAIN:
                print(
                    "Rows do not fit in memory together: going on from the last step, micro-batches split in two",
                    file=sys.stderr,
                )
                arguments = [*arguments, "--resume_from_checkpoint=latest", "--overwrite_output_dir=False"]
            return code
        finally:
            del os.environ[SAID]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _run(count: int, command: list[str], folder: Path) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    how = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
    )
    try:
        elastic_launch(how, command[0])(*command[1:])
    except ChildFailedError as error:
        codes = {failure.local_rank: failure.exitcode for failure in error.failures.values()}
        if AGAIN in codes.values():
            (folder / "said").unlink(missing_ok=True)
            return AGAIN
        if (folder / "said").exists():
            return 130 if 130 in codes.values() else 2
        rank, code = next(((r, c) for r, c in codes.items() if c not in (0, -signal.SIGTERM)), (0, 1))
        if code > 0:  # Python has shown where it failed
            return code
        print(f"error: process {rank} of {count} was killed (signal {-code}; out of memory?)", file=sys.stderr)
        return 2
    except SignalException:
        return 130
    return 0
