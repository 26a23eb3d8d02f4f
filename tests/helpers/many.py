"""Several runs, one after the other, in a group of forked processes: `python many.py runs.json PROCESSES`.

runs.json holds [command, settings] pairs; starting Python and its libraries anew for each run, and in each process of
it, would take longer than the runs.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch

import byeori
from byeori.commands import train  # imported once, before the forks
from byeori.distributed import processes


def be(rank: int, world: int, port: int, runs: list) -> None:
    """One process of the group, as torchrun would start it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    train.shutdown = lambda: None
    for command, settings in runs:
        getattr(byeori, command)(**settings)
    processes.shutdown()


def main() -> int:
    """Returns the exit code."""
    runs, world = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    members = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            code = 1
            try:
                be(rank, world, port, runs)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        members.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(member, 0)[1]) for member in members)


if __name__ == "__main__":
    sys.exit(main())
