"""One engine as a table of layers, for output that stays: `top --once` and the end of the demo."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_monitor import statistics
from moe_monitor.cli.live import number, plain, state, tokens_of
from moe_monitor.layout import FIXED_POINT
from moe_monitor.snapshot import EngineSnapshot


def layer_table(engine: EngineSnapshot) -> Table:
    """All layers since start. The engine must have MoE layers."""
    assert engine.layout is not None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    headings = (
        "layer",
        "tokens",
        "imbalance",
        "floor",
        "load\nentropy",
        "router\nentropy",
        "hottest",
        "coldest",
        "idle",
    )
    for name in headings:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    counts, tokens = engine.counts, engine.column("tokens")
    entropy = engine.column("entropy_sum") / FIXED_POINT
    imbalance, spread = statistics.imbalance(counts), statistics.entropy_ratio(counts)
    idle = statistics.idle(counts)
    for i, layer in enumerate(engine.layers):
        n = int(tokens[i])
        floor = statistics.imbalance_floor(n, engine.layout.experts, engine.top_k)
        assigned = int(counts[i].sum())
        hottest, coldest = int(counts[i].argmax()), int(counts[i].argmin())
        shares = [f"#{e} {counts[i, e] / assigned:.1%}" if assigned else "-" for e in (hottest, coldest)]
        router = number(entropy[i] / n) if n else "-"
        load = number(float(spread[i]))
        ratio = number(float(imbalance[i]))
        table.add_row(str(layer), f"{n:,}", ratio, number(floor), load, router, *shares, str(idle[i]) if n else "-")
    return table


def print_engine(console: Console, engine: EngineSnapshot) -> None:
    """Heading, state and table of an engine."""
    words, style = state(engine)
    experts = f", {engine.layout.experts} experts, top-{engine.top_k}" if engine.layout else ""
    console.print(Text.assemble((plain(engine.model_name), "bold"), f"  engine {plain(engine.engine)}{experts}"))
    console.print(Text(words, style=style))
    if engine.layout is None or not engine.layers:
        console.print("This model has no mixture-of-experts layers to show.")
        return
    console.print(f"{tokens_of(engine.rows, engine):,} tokens in {engine.passes:,} forward passes since start")
    console.print(layer_table(engine))
