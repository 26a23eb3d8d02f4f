"""One process per GPU: a training command starts itself again under torchrun's agent.

The processes report errors themselves, in one sentence. The agent's own tables and tracebacks are suppressed, and its
exit code is that of the processes. They meet on the loopback address alone, where no other machine can reach them, and
import nothing from the folder that they are started in.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from byeori.errors import AGAIN, SAID, ConfigError

_LOOPBACK = "127.0.0.1"


def start_group(
    wanted: int | None, arguments: Sequence[str], say: Callable[[str], None], *, cores: int | None = None
) -> int | None:
    """Run `byeori ARGUMENTS` in several processes and return their exit code, or None if one process is enough.

    wanted: number of processes; None is one per GPU. say: shows a line to the user. cores: threads of all processes
    together; None if the user has said how many each has.

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
    with tempfile.TemporaryDirectory(prefix="byeori-") as folder, _environment(count, cores, Path(folder)):
        # -P: a yaml.py in the working folder is not Python's yaml
        while (code := _run(count, [sys.executable, "-P", "-m", "byeori", *arguments], Path(folder), say)) == AGAIN:
            say("Out of memory: resuming from the last step with micro-batches split in two")
            arguments = [*arguments, "--resume_from_checkpoint=latest", "--overwrite_output_dir=False"]
        return code


@contextmanager
def _environment(count: int, cores: int | None, folder: Path) -> Iterator[None]:
    """The environment of the group's processes; what the user has set stays."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    wanted = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback) if loopback else {}
    added = {name: value for name, value in wanted.items() if name not in os.environ} | {SAID: str(folder / "said")}
    if cores:
        added["OMP_NUM_THREADS"] = str(max(1, cores // count))
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _run(count: int, command: list[str], folder: Path, say: Callable[[str], None]) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _register_loopback()
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend=_LOOPBACK,
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
        say(f"error: process {rank} of {count} was killed (signal {-code}; out of memory?)")
        return 2
    except SignalException:
        return 130
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
    return 0


@functools.cache
def _register_loopback() -> None:
    """Register a rendezvous of one machine with torchrun's agent: a store that listens on the loopback address alone.

    torchrun's own ones listen on every address of the machine, and whoever reaches a store can write to it.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousParameters,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )

    class Loopback(RendezvousHandler):
        def __init__(self, parameters: RendezvousParameters) -> None:
            self._id = parameters.run_id
            listening = socket.create_server((_LOOPBACK, 0))
            port = listening.getsockname()[1]
            self._store = TCPStore(_LOOPBACK, port, is_master=True, master_listen_fd=listening.detach())

        use_agent_store = True

        def get_backend(self) -> str:
            return _LOOPBACK

        def get_run_id(self) -> str:
            return self._id

        def next_rendezvous(self) -> RendezvousInfo:
            return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(_LOOPBACK, self._store.port))

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None: ...

        def num_nodes_waiting(self) -> int:
            return 0

        def shutdown(self) -> bool:
            return True

    rendezvous_handler_registry.register(_LOOPBACK, Loopback)
