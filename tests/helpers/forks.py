"""Programs that start in a fork of one process that has imported torch and byeori: a second instead of six.

`start` stands in for subprocess.Popen where a test needs a process of its own, but not a fresh interpreter. The server
is one process for the whole test session; it imports nothing until the first program is asked for.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import logging
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

SERVER = "BYEORI_TEST_FORKS"  # the server's socket
RANKS = "BYEORI_TEST_RANKS"  # a folder in which each process of a group writes its id, in a file of its rank's name

# ---- the tests' side ---------------------------------------------------------------------------------------------


class Forked:
    """A program that runs: what subprocess.Popen has, as far as tests need it."""

    def __init__(self, connection: socket.socket, out: IO[str] | None, err: IO[str] | None, ranks: Path) -> None:
        self._connection, self._ranks = connection, ranks
        self._guard = threading.Lock()
        self.stdout, self.stderr = out, err
        self.pid = self._number()
        self.returncode: int | None = None

    def _number(self) -> int:
        """The server's next line: first the process id, then the exit code."""
        line = b""
        while not line.endswith(b"\n"):
            if not (part := self._connection.recv(1)):
                raise AssertionError(Path(os.environ[SERVER]).with_name("log").read_text())
            line += part
        return int(line)

    def wait(self, timeout: float | None = None) -> int:
        with self._guard:
            if self.returncode is None:
                self._connection.settimeout(timeout)
                try:
                    self.returncode = self._number()
                except TimeoutError:
                    raise subprocess.TimeoutExpired("a forked program", timeout or 0) from None
            return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired, BlockingIOError):
            self.wait(0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Everything that it wrote to the pipes, and wait for its end."""
        texts, streams = ["", ""], (self.stdout, self.stderr)

        def read(at: int) -> None:
            if (stream := streams[at]) is not None:
                texts[at] = stream.read()

        readers = [threading.Thread(target=read, args=[at], daemon=True) for at in range(2)]
        for reader in readers:
            reader.start()
        deadline = None if timeout is None else time.monotonic() + timeout
        for reader in readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired("a forked program", timeout or 0)
        self.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def rank(self, rank: int) -> int:
        """The process id of a process of the group that this program has started."""
        return int((self._ranks / str(rank)).read_text())


def start(
    *program: object,
    processes: int = 0,
    restarts: int = 0,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    stdio: tuple[int | None, int | None, int | None] = (None, None, None),
) -> Forked:
    """Run `python PROGRAM`: -m and a module, -c and code, or a script, with its arguments.

    processes: so many of them, joined and watched by torchrun's agent. restarts: how often it starts them again.
    stdio: file descriptors in the place of no input and two pipes.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[SERVER])
    ranks = Path(tempfile.mkdtemp(dir=Path(os.environ[SERVER]).parent))
    asked = {
        "program": [str(part) for part in program],
        "processes": processes,
        "restarts": restarts,
        "env": dict(os.environ if env is None else env) | {RANKS: str(ranks)},
        "cwd": str(cwd or Path.cwd()),
    }
    message = json.dumps(asked).encode()
    pipes = [os.pipe() if given is None else None for given in stdio]
    theirs = [
        given if given is not None else pipe[at > 0]
        for at, (given, pipe) in enumerate(zip(stdio, pipes, strict=True))
        if given is not None or pipe
    ]
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", theirs))]
    connection.sendmsg([len(message).to_bytes(4, "big")], ancillary)
    connection.sendall(message)
    for at, pipe in enumerate(pipes):
        if pipe:
            os.close(pipe[at > 0])
    if pipes[0]:
        os.close(pipes[0][1])
    out, err = (os.fdopen(pipe[0], encoding="utf-8") if pipe else None for pipe in pipes[1:])
    return Forked(connection, out, err, ranks)


def run(*program: object, timeout: float = 300, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as subprocess.run does with captured output."""
    process = start(*program, **how)
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(program, process.wait(), out, err)


def python(folder: Path) -> str:
    """A program that starts a fork, for code that starts sys.executable with -m or -c."""
    path = folder / "forked-python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} as-python "$@"\n')
    path.chmod(0o755)
    return str(path)


# ---- the server's side -------------------------------------------------------------------------------------------


def serve() -> subprocess.Popen[bytes]:
    """Start the server; it ends with the process that has started it."""
    path = str(Path(tempfile.mkdtemp(prefix="byeori-forks-")) / "socket")
    os.environ[SERVER] = path
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with Path(path).with_name("log").open("w") as log:
        pipe = subprocess.PIPE
        server = subprocess.Popen([sys.executable, __file__, path], stdin=pipe, stdout=pipe, stderr=log, env=env)
    assert server.stdout is not None
    server.stdout.read(1)
    return server


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server, and every program that still runs."""
    assert server.stdin is not None
    server.stdin.close()
    server.wait(30)
    shutil.rmtree(Path(os.environ.pop(SERVER)).parent, ignore_errors=True)


def _import_everything() -> None:
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch.distributed.run
    import transformers.models.llama.modeling_llama  # noqa: F401

    import byeori.commands

    for module in pkgutil.iter_modules(byeori.commands.__path__):
        importlib.import_module(f"byeori.commands.{module.name}")
    torch.set_num_threads(1)
    gc.freeze()  # a collection in a fork would copy every page of what is imported


def _serve(path: str) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(64)
    print(end=".", flush=True)
    woken, wake = socket.socketpair()
    for end in (woken, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listening, woken, sys.stdin], [], [])
        if sys.stdin in ready:
            for pid in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        if woken in ready:
            woken.recv(4096)
            for pid, status in _ended(running):
                with running.pop(pid) as connection, contextlib.suppress(OSError):
                    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        if listening in ready:
            connection, _ = listening.accept()
            head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4))
            descriptors = array.array("i", ancillary[0][2])
            asked = json.loads(connection.makefile("rb").read(int.from_bytes(head, "big")))
            if "torch" not in sys.modules:
                _import_everything()
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                for other in (listening, woken, wake, connection, *running.values()):
                    other.close()
                _become(asked, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            running[pid] = connection
            connection.sendall(f"{pid}\n".encode())


def _ended(running: Iterable[int]) -> list[tuple[int, int]]:
    ended = []
    for pid in list(running):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            ended.append((pid, status))
    return ended


def _become(asked: dict[str, Any], descriptors: array.array[int]) -> None:
    """In the fork: be the program, and end with its exit code."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.setpgid(0, 0)
    hub = _hub_environment()
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    if _hub_environment() != hub:
        _read_hub_environment()
    _standard_streams()
    _fork_groups()
    program = asked["program"]
    _exit_as(lambda: _group(program, asked) if asked["processes"] else _program(program))


def _hub_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("HF_")}


def _read_hub_environment() -> None:
    """Read again what is read at import: where the Hub is, and where its files lie."""
    import datasets
    import huggingface_hub

    importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT


def _standard_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        buffering = 1 if number == 2 or os.isatty(number) else -1
        setattr(sys, name, open(number, "w" if number else "r", buffering, encoding="utf-8", closefd=False))  # noqa: SIM115


def _exit_as(call: Callable[[], None]) -> None:
    """Call, and end this process with its exit code."""
    code = _exit_code(call)
    os._exit(code)


def _exit_code(call: Callable[[], None]) -> int:
    """Call; the exit code that Python would end with."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code: Any = 0
    try:
        call()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    return code


def _program(program: list[str]) -> None:
    kind, *rest = program[1:] if program[0] == "-P" else program  # a fork imports nothing anew
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = program, str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


def _member(program: list[str]) -> None:
    """One process of a group, in its fork."""
    folder, rank = Path(os.environ[RANKS]), os.environ["RANK"]
    (folder / f".{rank}").write_text(str(os.getpid()))
    (folder / f".{rank}").replace(folder / rank)
    _standard_streams()
    if code := _exit_code(lambda: _program(program)):
        os._exit(code)


def _fork_groups() -> None:
    """From now on torchrun's agent, when it is to start Python, forks."""
    from torch.distributed.launcher import api

    launch = api.elastic_launch

    def forking(settings: api.LaunchConfig, program: str) -> Callable[..., Any]:
        assert program == sys.executable
        settings.start_method = "fork"
        return lambda *arguments: launch(settings, _member)(list(arguments))

    api.elastic_launch = forking


def _group(program: list[str], asked: dict[str, Any]) -> None:
    """What `torchrun --standalone` does."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # a fork that ends with an error gets a traceback, which a process started anew does not
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=asked["processes"],
        run_id=f"forks-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=asked["restarts"],
        monitor_interval=0.1,
    )
    elastic_launch(settings, sys.executable)(*program)


def _in_its_place(program: list[str]) -> None:
    """Be a fork, for whoever started this process as Python: its streams, its signals, its exit code."""
    process = start(*program, stdio=(0, 1, 2))

    def hand_on(number: int, _: object) -> None:  # not send_signal, which waits for the lock that `wait` holds
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, hand_on)
    code = process.wait()
    sys.exit(128 - code if code < 0 else code)


if __name__ == "__main__":
    _in_its_place(sys.argv[2:]) if sys.argv[1] == "as-python" else _serve(sys.argv[1])
