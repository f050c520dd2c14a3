"""`moe-monitor baseline`: record what routing is normal for a deployment, show it, compare with it."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from moe_monitor import baseline, statistics
from moe_monitor.baseline import BaselineError, Model
from moe_monitor.board import BoardError
from moe_monitor.cli.common import CommandError, add_directory_argument, positive, run_directory
from moe_monitor.snapshot import EngineSnapshot, read_engines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    record = actions.add_parser("record", help="watch the running servers and write a baseline file")
    record.add_argument("file", type=Path, help="file to write")
    record.add_argument("--window", type=positive, default=60, metavar="S", help="seconds of a window (default: 60)")
    record.add_argument("--duration", type=positive, default=600, metavar="S", help="seconds in all (default: 600)")
    record.add_argument("--force", action="store_true", help="overwrite the file if it exists")
    show = actions.add_parser("show", help="print a baseline file")
    show.add_argument("file", type=Path)
    compare = actions.add_parser("compare", help="compare a baseline with the running servers, or with another file")
    compare.add_argument("file", type=Path)
    compare.add_argument("other", type=Path, nargs="?", help="another baseline file, instead of the running servers")
    compare.add_argument("--duration", type=positive, default=60, metavar="S", help="seconds to watch (default: 60)")
    for each in (record, show, compare):
        each.add_argument("--model", help="only models whose name contains this")
        if each is not show:
            add_directory_argument(each)


def run(arguments: argparse.Namespace) -> int:
    """0 when done; from compare, 1 when a layer is above its limit."""
    action = {"record": _record, "show": _show, "compare": _compare}[arguments.action]
    try:
        return action(arguments)
    except (BaselineError, BoardError) as error:
        raise CommandError(str(error)) from None


@dataclass
class _Watched:
    first: EngineSnapshot
    windows: list[NDArray[np.int64]]


def _engines(directory: Path, wanted: str | None) -> dict[tuple[str, str, str], EngineSnapshot]:
    found = read_engines(directory) if directory.exists() else []
    return {e.key: e for e in found if e.layout is not None and e.layers and (wanted or "") in e.model_name}


def watch(directory: Path, model: str | None, window: float, windows: int) -> list[_Watched]:
    """Rows routed by every engine in consecutive windows. An engine that restarts or comes late gives fewer."""
    console = Console(stderr=True)
    before = _engines(directory, model)
    if not before:
        raise CommandError(f"no monitored server is running (boards are looked for in {directory})")
    result: dict[tuple[str, str, str], _Watched] = {}
    due = time.monotonic()
    for number in range(1, windows + 1):
        due += window
        time.sleep(max(0.0, due - time.monotonic()))
        now = _engines(directory, model)
        for key, engine in now.items():
            if key in before and before[key].rows.shape == engine.rows.shape:
                result.setdefault(key, _Watched(engine, [])).windows.append(engine.rows - before[key].rows)
        before = now
        if sys.stderr.isatty():
            tokens = sum(int(w.windows[-1][:, _tokens(w.first)].max()) for w in result.values() if w.windows)
            console.print(f"window {number} of {windows}: {tokens:,} tokens", highlight=False)
    return list(result.values())


def _tokens(engine: EngineSnapshot) -> int:
    assert engine.layout is not None
    return engine.layout.at("tokens")


def _record(arguments: argparse.Namespace) -> int:
    if arguments.file.exists() and not arguments.force:
        raise CommandError(f"{str(arguments.file)!r} is there already; --force overwrites it")
    if not arguments.file.absolute().parent.is_dir():
        raise CommandError(f"the folder {str(arguments.file.absolute().parent)!r} does not exist")
    windows = round(arguments.duration / arguments.window)
    if windows < baseline.MIN_WINDOWS:
        raise CommandError(f"--duration must be at least {baseline.MIN_WINDOWS} times --window")
    models = _models(watch(run_directory(arguments), arguments.model, arguments.window, windows), arguments.window)
    baseline.write(arguments.file.absolute(), models)
    console = Console()
    for model in models:
        _print(console, model)
    console.print(f"written to {arguments.file}; servers and exporters use it with", highlight=False)
    console.print(f"  MOE_MONITOR_BASELINE={arguments.file.absolute()}", highlight=False, soft_wrap=True)
    return 0


def _models(watched: list[_Watched], seconds: float) -> list[Model]:
    """One baseline per model: every window of every replica is a window."""
    groups: dict[str, list[_Watched]] = {}
    for engine in watched:
        groups.setdefault(engine.first.model_name, []).append(engine)
    models = []
    for name, members in groups.items():
        first = members[0].first
        if any((m.first.layers, m.first.rows.shape) != (first.layers, first.rows.shape) for m in members):
            raise CommandError(f"servers of different shape call themselves {name}; choose with --model or --dir")
        windows = [w for m in members for w in m.windows]
        assert first.layout is not None
        models.append(baseline.summarise(windows, name, first.layers, first.layout.experts, first.top_k, seconds))
    return models


def _show(arguments: argparse.Namespace) -> int:
    for model in _chosen(arguments.file, arguments.model).values():
        _print(Console(), model)
    return 0


def _chosen(path: Path, wanted: str | None) -> dict[str, Model]:
    models = {name: m for name, m in baseline.read(path).items() if (wanted or "") in name}
    if not models:
        raise CommandError(f"{str(path)!r} holds no model whose name contains {wanted!r}")
    return models


@dataclass
class _Load:
    """What is compared with a baseline: ``counts`` [layers, experts], ``tokens`` [layers]."""

    title: str
    model_name: str
    shape: tuple[Any, ...]
    counts: Any
    tokens: Any


def _compare(arguments: argparse.Namespace) -> int:
    known = _chosen(arguments.file, arguments.model)
    if arguments.other is not None:
        loads = [
            _Load(m.model_name, m.model_name, _shape(m), m.statistics.counts, m.statistics.tokens)
            for m in _chosen(arguments.other, arguments.model).values()
        ]
        where = repr(str(arguments.other))
    else:
        directory = run_directory(arguments)
        loads = [_routed(w) for w in watch(directory, arguments.model, arguments.duration, 1)]
        where = f"the servers of {directory}"
    loads = [load for load in loads if load.model_name in known]
    if not loads:
        raise CommandError(f"{where} and {str(arguments.file)!r} have no model in common")
    above = [_print_comparison(Console(), load, known[load.model_name]) for load in loads]
    return 1 if any(above) else 0


def _routed(watched: _Watched) -> _Load:
    engine, (window,) = watched.first, watched.windows
    assert engine.layout is not None
    counts, tokens = (engine.layout.column(window, name) for name in ("experts", "tokens"))
    shape = (engine.layers, engine.layout.experts, engine.top_k)
    return _Load(f"{engine.model_name} engine {engine.engine}", engine.model_name, shape, counts, tokens)


def _shape(model: Model) -> tuple[Any, ...]:
    return (model.layers, model.experts, model.top_k)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in headings:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    return table


def _print(console: Console, model: Model) -> None:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(model.recorded))
    facts = f"{model.experts} experts, top-{model.top_k}, {model.windows} windows of {model.window_seconds:g} s, {when}"
    console.print(f"{model.model_name}: {facts}", highlight=False)
    s = model.statistics
    table = _table(
        "layer", "tokens", "imbalance\nhighest", "router\nentropy", "selected\nmass", "drift, bits\nmean", "limit"
    )
    limit = model.drift_limit(s.window_tokens * model.top_k)
    for i, layer in enumerate(model.layers):
        entropy, mass = (f"{getattr(s, n)[i]:.3f} ±{getattr(s, n + '_deviation')[i]:.3f}" for n in ("entropy", "mass"))
        numbers = (f"{s.imbalance[i]:.2f}", entropy, mass, f"{s.drift[i]:.4f}", f"{limit[i]:.4f}")
        table.add_row(str(layer), f"{int(s.tokens[i]):,}", *numbers)
    console.print(table)


def _print_comparison(console: Console, load: _Load, known: Model) -> int:
    """Print layer by layer; returns how many layers are above normal."""
    if load.shape != _shape(known):
        raise CommandError(f"{load.title} has another shape than in the baseline; record it again")
    counts, tokens = np.asarray(load.counts), np.asarray(load.tokens)
    assignments = counts.sum(axis=-1)
    if not assignments.all():
        raise CommandError(f"{load.title} routed no token in that time")
    found, limit, floor = known.drift(counts), known.drift_limit(assignments), known.drift_floor(assignments)
    imbalance, silent = statistics.imbalance(counts), known.silent(counts, tokens)
    table = _table("layer", "tokens", "drift\nbits", "floor", "limit", "imbalance", "baseline", "silent", "")
    above = 0
    for i, layer in enumerate(known.layers):
        verdict = "above" if found[i] > limit[i] else "silent" if silent[i] else ""
        above += bool(verdict)
        drift = (f"{found[i]:.4f}", f"{floor[i]:.4f}", f"{limit[i]:.4f}")
        ratios = (f"{imbalance[i]:.2f}", f"{known.statistics.imbalance[i]:.2f}", str(silent[i]))
        table.add_row(str(layer), f"{int(tokens[i]):,}", *drift, *ratios, verdict)
    console.print(load.title, highlight=False)
    console.print(table)
    console.print(f"{above} of {len(known.layers)} layers are above normal." if above else "Routing is normal.")
    return above
