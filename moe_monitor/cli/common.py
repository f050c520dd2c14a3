"""What the subcommands share: arguments, and the error that is a message for the user."""

from __future__ import annotations

import argparse
from pathlib import Path


class CommandError(Exception):
    """A command cannot do what was asked; the message is for the user and says what to do."""


def positive(text: str) -> float:
    """A positive finite number of seconds, as an argparse type."""
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def port(text: str) -> int:
    """A TCP port, as an argparse type."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; a port is a number from 0 to 65535")
    return int(text)


def run_directory(arguments: argparse.Namespace) -> Path:
    """The directory of the boards: --dir, else what the environment says. Raises CommandError."""
    if arguments.dir is not None:
        return Path(arguments.dir).absolute()
    from moe_monitor.settings import SettingsError, load

    try:
        return load().dir
    except SettingsError as error:
        raise CommandError(str(error)) from None


def add_directory_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", metavar="DIR", help="directory of the boards, if not the one that MOE_MONITOR_DIR or the default names"
    )
