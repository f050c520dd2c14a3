"""The `moe-monitor` command. Each subcommand's module is imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from moe_monitor import __version__
from moe_monitor.cli.common import CommandError


class Command(NamedTuple):
    """``module`` has ``add_arguments(parser)`` and ``run(arguments) -> exit code``."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command("moe_monitor.cli.demo", "serve a tiny MoE model with vLLM and watch its routing live"),
    "top": Command("moe_monitor.cli.top", "live view of the servers running on this machine"),
    "request": Command("moe_monitor.cli.request", "show the last traced requests, or one of them layer by layer"),
    "export": Command("moe_monitor.cli.export", "stand-alone Prometheus exporter for the servers on this machine"),
    "baseline": Command("moe_monitor.cli.baseline", "record what routing is normal, show it, compare with it"),
    "dashboards": Command("moe_monitor.cli.dashboards", "write the dashboards and alert rules to a folder"),
    "doctor": Command("moe_monitor.cli.doctor", "check the installation and the running monitors"),
}


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moe-monitor", description="Runtime monitor for mixture-of-experts routing.")
    parser.add_argument("--version", action="version", version=f"moe-monitor {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=f"{command.summary.capitalize()}.")
        if name == chosen:
            importlib.import_module(command.module).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. 2: bad arguments, 130: interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    parsed = _parser(chosen).parse_args(arguments)
    try:
        code: int = importlib.import_module(COMMANDS[parsed.command].module).run(parsed)
        sys.stdout.flush()
    except CommandError as error:
        print(f"moe-monitor {parsed.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


if __name__ == "__main__":
    sys.exit(main())
