"""`moe-monitor doctor`: is everything there that monitoring needs, and do the running monitors do well?"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_monitor.cli import checks
from moe_monitor.cli.checks import Check
from moe_monitor.cli.common import CommandError, add_directory_argument, run_directory
from moe_monitor.cli.live import plain

_MARKS = {"ok": ("✓", "green"), "note": ("·", "cyan"), "problem": ("✗", "bold red")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_directory_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def examine(arguments: argparse.Namespace) -> Iterator[Check]:
    """All checks, in the order in which a fault shows: the environment first, what runs last."""
    from moe_monitor import __version__

    yield Check("moe-monitor", "ok", f"{__version__} on Python {platform.python_version()}")
    yield from checks.vllm()
    yield checks.entry_points()
    yield checks.settings()
    try:
        directory = run_directory(arguments)
    except CommandError:
        return  # bad settings: said already, and where the boards are is not known
    found = checks.run_directory(directory)
    yield found
    if found.status != "problem":
        yield from checks.boards(directory)


def run(arguments: argparse.Namespace) -> int:
    """0 when there is no problem, else 1."""
    results = list(examine(arguments))
    problems = sum(check.status == "problem" for check in results)
    if arguments.json:
        report: dict[str, Any] = {"ok": not problems, "checks": [asdict(check) for check in results]}
        print(json.dumps(report, indent=2))
    else:
        _print(results, problems)
    return 1 if problems else 0


def _print(results: list[Check], problems: int) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in results:
        mark, style = _MARKS[check.status]
        text = Text(plain(check.detail))
        if check.advice:
            text.append("\n→ " + plain(check.advice), style="yellow" if check.status == "problem" else "dim")
        table.add_row(Text(mark, style=style), Text(check.name, style="bold"), text)
    console = Console()
    console.print(table)
    console.print()
    if problems:
        console.print(Text(f"{problems} problem{'s' * (problems > 1)} found.", style="bold red"))
    else:
        console.print(Text("No problems found.", style="bold green"))
