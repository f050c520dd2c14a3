"""`moe-monitor top`: live view of the servers running on this machine."""

from __future__ import annotations

import argparse

from rich.console import Console, RenderableType

from moe_monitor.cli.common import CommandError, add_directory_argument, positive, run_directory
from moe_monitor.cli.live import REFRESH_SECONDS, Tracker, plain, read, screen, watch
from moe_monitor.cli.table import print_engine
from moe_monitor.snapshot import EngineSnapshot


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_directory_argument(parser)
    parser.add_argument("--model", help="only models whose name contains this")
    parser.add_argument("--engine", help="only this engine (data-parallel replica), as vLLM numbers them")
    parser.add_argument("--once", action="store_true", help="print a table for each engine and exit")
    parser.add_argument(
        "--interval", type=positive, default=REFRESH_SECONDS, metavar="S", help="seconds between refreshes"
    )


def matching(engines: list[EngineSnapshot], model: str | None, engine: str | None) -> list[EngineSnapshot]:
    return [e for e in engines if (model is None or model in e.model_name) and (engine is None or engine == e.engine)]


def run(arguments: argparse.Namespace) -> int:
    """0 after showing something; 1 from --once when no server matches. Without a terminal it prints once."""
    directory = run_directory(arguments)
    console = Console()

    def chosen() -> list[EngineSnapshot]:
        return matching(read(directory), arguments.model, arguments.engine)

    if arguments.once or not console.is_terminal:
        engines = chosen()
        if not engines:
            raise CommandError(_nothing(read(directory), str(directory)))
        for engine in engines:
            print_engine(console, engine)
        return 0

    tracker = Tracker()

    def draw() -> RenderableType:
        views = tracker.update(chosen())
        if not views:
            return screen(None, [f"Boards: {directory}", "`moe-monitor doctor` says what is missing. Ctrl-C stops."])
        return screen(views[0], ["Ctrl-C stops"], others=len(views) - 1)

    try:
        watch(console, draw, lambda: True, arguments.interval)
    except KeyboardInterrupt:
        return 0
    return 0


def _nothing(others: list[EngineSnapshot], directory: str) -> str:
    if others:
        names = ", ".join(f"{plain(e.model_name)} engine {plain(e.engine)}" for e in others)
        return f"no running server matches; there are: {names}"
    return f"no monitored server is running (boards are looked for in {directory}); `moe-monitor doctor` says why"
