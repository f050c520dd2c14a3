"""``--option NAME=JSON`` of scripts that make an engine."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_to(parser: argparse.ArgumentParser) -> None:
    """``args.option`` will be what was given; :func:`parsed` makes keyword arguments of it."""
    parser.add_argument("--option", action="append", default=[], type=_checked, help="name=json value for LLM(...)")


def parsed(given: list[str]) -> dict[str, Any]:
    return {name: json.loads(value) for name, value in (option.split("=", 1) for option in given)}


def _checked(option: str) -> str:
    name, equals, value = option.partition("=")
    try:
        json.loads(value)
    except ValueError:
        equals = ""
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{option!r} is not a name, '=' and a value in JSON, like block_size=16")
    return option
