"""llama.cpp's server from PyPI (xllamacpp), with the flags of llama-server that byeori uses: a program of its own."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="llama-server (xllamacpp)")
    parser.add_argument("-m", dest="model", required=True)
    parser.add_argument("-c", dest="context", type=int, required=True)
    parser.add_argument("-np", dest="parallel", type=int, default=1)
    parser.add_argument("-t", dest="threads", type=int)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--lora")
    parser.add_argument("--chat-template-file", type=Path)
    parser.add_argument("--cache-ram", type=int, default=0)
    parser.add_argument("--jinja", action="store_true")
    args = parser.parse_args()
    import xllamacpp

    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.n_parallel = args.model, args.context * args.parallel, args.parallel
    given.hostnames, given.port, given.use_jinja = [args.host], args.port, args.jinja
    given.cache_ram_mib, given.fit_params = args.cache_ram, False
    if args.threads:
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = args.threads
    if args.lora:
        given.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(args.lora, 1.0)]
    if args.chat_template_file:
        given.chat_template = args.chat_template_file.read_text(encoding="utf-8")
    server = xllamacpp.Server(given)
    print(f"llama.cpp listens on {server.listening_address}", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    main()
