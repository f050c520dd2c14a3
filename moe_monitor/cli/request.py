"""`moe-monitor request`: the traced requests that the servers on this machine still know, or one of them in full."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_monitor.cli.common import CommandError, add_directory_argument, run_directory
from moe_monitor.cli.live import plain
from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.requests import FleetLoad, as_json, recent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_directory_argument(parser)
    parser.add_argument(
        "id", nargs="?", default="", help="a request's id or any part of it; without it, all are listed"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """0; CommandError when no request, or more than one exactly, is meant."""
    found = _read(run_directory(arguments))
    if not arguments.id:
        if arguments.json:
            print(json.dumps(found, indent=2))
        else:
            _list(found)
        return 0
    meant = [r for r in found if r["id"] == arguments.id] or [r for r in found if arguments.id in r["id"]]
    if not meant:
        raise CommandError(
            f"no traced request has {arguments.id!r} in its id; servers keep the last few dozen, and trace a part of "
            "all requests (MOE_MONITOR_SAMPLE_RATIO)"
        )
    if arguments.json:
        print(json.dumps(meant, indent=2))
        return 0
    for request in meant:
        _show(request)
    return 0


def _read(directory: Path) -> list[dict[str, Any]]:
    """Newest first."""
    # A server's boards hold all that was routed since it started; a new reader knows no shorter window.
    collector = MoeCollector(directory, from_start=True)
    return [as_json(summary) for summary in recent(directory, FleetLoad(collector))]


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _when(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))


def _list(requests: list[dict[str, Any]]) -> None:
    console = Console()
    if not requests:
        console.print("No traced requests.")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in ("finished", "tokens", "entropy", "concentration", "drift"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("request", overflow="fold")
    for r in requests:
        tokens = f"{r['prefill_tokens']}+{r['decode_tokens']}"
        ratios = (_text(r["entropy"]), _text(r["concentration"]), _text(r["drift_bits"], 3))
        table.add_row(_when(r["finished"]), tokens, *ratios, Text(plain(r["id"])))
    console.print(table)


def _show(request: dict[str, Any]) -> None:
    console = Console()
    took = request["finished"] - request["started"]
    console.print(Text.assemble((plain(request["id"]), "bold")))
    console.print(
        Text(
            f"{plain(request['model_name'])} engine {plain(request['engine'])}, finished {_when(request['finished'])} "
            f"after {took:.1f} s; {request['experts']} experts, top-{request['top_k']}"
        )
    )
    console.print(
        f"{request['prefill_tokens']} prompt tokens computed, {request['cached_tokens']} from the prefix cache, "
        f"{request['decode_tokens']} decoded, {request['preemptions']} preemptions"
    )
    console.print(
        f"concentration {_text(request['concentration'])} (1: as by chance), drift from the recent load "
        f"{_text(request['drift_bits'], 3)} bits (chance {_text(request['drift_floor_bits'], 3)})"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in ("layer", "entropy", "lowest", "top-1", "mass", "imbalance", "by chance", "drift"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most used experts")
    for layer in request["layers"]:
        keys = ("entropy", "entropy_min", "top1", "selected_mass", "imbalance", "imbalance_by_chance")
        used = "  ".join(f"#{e['expert']} {e['share']:.1%}" for e in layer["experts"])
        table.add_row(str(layer["layer"]), *(_text(layer[k]) for k in keys), _text(layer["drift_bits"], 3), used)
    console.print(table)
