"""`moe-monitor export`: the stand-alone HTTP exporter."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from pathlib import Path

from moe_monitor.cli.common import CommandError, add_directory_argument, port, run_directory
from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.exporter import Exporter, ExporterError
from moe_monitor.export.webconfig import WebConfig, WebConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_directory_argument(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, default=9101, help="port to listen on (default: 9101)")
    parser.add_argument(
        "--web.config.file",
        dest="web_config",
        type=Path,
        metavar="FILE",
        help="TLS and basic auth, as Prometheus' own exporters have them (needs moe-monitor[web])",
    )
    parser.add_argument("--verbose", action="store_true", help="log every request")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM, then end with 0."""
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    directory = run_directory(arguments)
    try:
        web = None if arguments.web_config is None else WebConfig(arguments.web_config.absolute())
        exporter = Exporter(MoeCollector(directory, max_series=None), arguments.host, arguments.port, web)
    except (ExporterError, WebConfigError) as error:
        raise CommandError(str(error)) from None
    exporter.start()
    print(f"{exporter.url}/metrics  (boards: {directory}; Ctrl-C stops)", flush=True)
    try:
        stop.wait()
    finally:
        exporter.stop()
    return 0
