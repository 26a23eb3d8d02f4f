"""One process per GPU: a training command starts itself again under torchrun's agent.

The processes report errors themselves, in one sentence. The agent's own tables and tracebacks are suppressed, and its
exit code is that of the processes.
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
    """Run `byeori ARGUMENTS` in several processes and return their exit code, or None if one process is enough.

    wanted: number of processes; None is one per GPU.

    Raises:
        ConfigError: if torchrun started another number of processes, or there are fewer GPUs.
    """
    if "LOCAL_WORLD_SIZE" in os.environ:
        started = int(os.environ["LOCAL_WORLD_SIZE"])
        if wanted not in (None, started):
            raise ConfigError(f"--nproc is {wanted}, but torchrun started {started} processes here; leave --nproc out")
        return None
    count = _gpus() if wanted is None else wanted
    if count <= 1:
        return None
    if 0 < _gpus() < count:
        raise ConfigError(f"--nproc is {count}, but this machine has {_gpus()} GPUs; give {_gpus()} or less")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads or str(max(1, len(os.sched_getaffinity(0)) // count))
    with tempfile.TemporaryDirectory(prefix="byeori-") as folder:
        os.environ[SAID] = str(Path(folder) / "said")
        try:
            while (code := _run(count, [sys.executable, "-m", "byeori", *arguments], Path(folder))) == AGAIN:
                print(
                    "Out of memory: resuming from the last step with micro-batches split in two",
                    file=sys.stderr,
                )
                arguments = [*arguments, "--resume_from_checkpoint=latest", "--overwrite_output_dir=False"]
            return code
        finally:
            del os.environ[SAID]
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _run(count: int, command: list[str], folder: Path) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    launch = LaunchConfig(
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
        elastic_launch(launch, command[0])(*command[1:])
    except ChildFailedError as error:
        codes = {failure.local_rank: failure.exitcode for failure in error.failures.values()}
        if AGAIN in codes.values():
            (folder / "said").unlink(missing_ok=True)
            return AGAIN
        if (folder / "said").exists():
            return 130 if 130 in codes.values() else 2
        rank, code = next(((r, c) for r, c in codes.items() if c not in (0, -signal.SIGTERM)), (0, 1))
        if code > 0:  # Python has printed a traceback
            return code
        print(f"error: process {rank} of {count} was killed (signal {-code}; out of memory?)", file=sys.stderr)
        return 2
    except SignalException:
        return 130
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
    return 0
