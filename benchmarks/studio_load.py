"""How byeori studio holds: `python benchmarks/studio_load.py`.

Twenty clients look at the training screen of a run whose log grows from 100,000 lines on, as browsers do: its live
part each second with the version that they have seen, and now and then the whole screen with all runs over each other.
In the folder are ten runs and thousands of other files. Printed: median and 95th percentile of the response times, and
the server's memory at the beginning, in the middle and at the end. `--hours 1` writes as many steps as an hour of
training with one step a second has, within `--seconds`; `--pause 0.02` asks as often as in that hour, a measure of
memory, not of response times.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlsplit


def line(step: int) -> str:
    values = {"step": step, "epoch": step / 50_000, "loss": 2 + 3 / (1 + step / 5000) + random.random() / 10}
    values |= {"learning_rate": 2e-4, "grad_norm": 1.0, "rows": 8, "tokens": 1600, "unique_tokens": 1200}
    return json.dumps(values | {"target_tokens": 160, "seconds": 1.0, "peak_memory_bytes": 2 << 30}) + "\n"


def make_run(folder: Path, lines: int) -> None:
    folder.mkdir()
    with (folder / "train_log.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(line(step) for step in range(1, lines + 1))
    settings = {"base_model": "model", "data_path": ["rows.jsonl"], "output_dir": folder.name, "num_epochs": 3}
    (folder / "byeori.yaml").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")


def memory(process: int) -> float:
    """Return the resident memory of a process in MiB."""
    text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(text.split("VmRSS:")[1].split()[0]) / 1024


class Client(threading.Thread):
    """A browser. times: seconds of each response; sizes: bytes."""

    def __init__(self, address: str, stop: threading.Event, pause: float, whole: str) -> None:
        super().__init__(daemon=True)
        self.place = whole
        self.parts, self.stop, self.pause = urlsplit(address), stop, pause
        self.times: list[float] = []
        self.whole: list[float] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection(self.parts.netloc)
        connection.request("GET", f"/?{self.parts.query}")
        answer = connection.getresponse()
        answer.read()
        headers = {"cookie": (answer.getheader("set-cookie") or "").split(";")[0]}
        seen = ""
        while not self.stop.is_set():
            whole = random.random() < 0.05
            place = self.place if whole else f"/train-live?run=run&seen={quote(seen)}"
            began = time.perf_counter()
            connection.request("GET", place, headers=headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            (self.whole if whole else self.times).append(time.perf_counter() - began)
            assert answer.status in (200, 204), (answer.status, text[:300])
            if found := re.search(r"seen=([^\"&]+)\"", text):
                seen = found[1]
            time.sleep(random.uniform(0.5, 1.5) * self.pause)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two requests of a client")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--files", type=int, default=3000, help="beside the runs")
    parser.add_argument("--hours", type=float, default=1.0, help="of training, whose steps are written in --seconds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        others = [f"run-{number}" for number in range(1, given.runs)]
        for name in ("run", *others):
            make_run(folder / name, given.lines if name == "run" else given.lines // 10)
        log = folder / "run" / "train_log.jsonl"
        for number in range(given.files):
            place = folder / "files" / f"{number // 100}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
        words = [sys.executable, "-m", "byeori", "studio", str(folder), "--port", "0", "--open_browser", "off"]
        server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        address = next(found[0] for text in server.stderr if (found := re.search(r"http://\S+", text)))
        stop = threading.Event()
        whole_screen = "/train?run=run" + "".join(f"&with={name}" for name in others)
        clients = [Client(address, stop, given.pause, whole_screen) for _ in range(given.clients)]
        began = time.perf_counter()
        clients[0].start()
        while not clients[0].times and not clients[0].whole:
            time.sleep(0.01)
        first = time.perf_counter() - began
        for client in clients[1:]:
            client.start()
        time.sleep(5)
        before, samples, step = memory(server.pid), [], given.lines
        until, every = time.monotonic() + given.seconds, given.seconds / 60
        while time.monotonic() < until:
            with log.open("a", encoding="utf-8") as file:
                more = max(1, round(given.hours * 60))
                file.writelines(line(step + at) for at in range(1, more + 1))
            step += more
            samples.append(memory(server.pid))
            time.sleep(every)
        stop.set()
        for client in clients:
            client.join(10)
        server.terminate()
    times = sorted(seconds for client in clients for seconds in client.times)
    whole = sorted(seconds for client in clients for seconds in client.whole)
    print(f"{given.clients} clients, a log of {given.lines:,} to {step:,} lines, {given.seconds:.0f} s")
    print(f"the first request, which reads the log: {first:.2f} s")
    for what, values in (("the live part", times), ("the whole screen", whole)):
        if values:
            median, high = statistics.median(values), values[int(0.95 * len(values))]
            print(
                f"{what}: {len(values)} responses, median {1000 * median:.1f} ms, 95th percentile {1000 * high:.1f} ms"
            )
    middle = samples[len(samples) // 2]
    print(f"memory of the server in MiB: {before:.0f}, then {middle:.0f}, at the end {samples[-1]:.0f}; ", end="")
    print(f"at most {max(samples):.0f}")


if __name__ == "__main__":
    main()
