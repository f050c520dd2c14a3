"""Tables to files and to the terminal."""

from __future__ import annotations

import csv
import json
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_monitor.analysis.summary import Summary

Rows = list[dict[str, Any]]

#: What stands for a number that is not known, and the prefix of a millionth.
DASH, MICRO = "\u2013", "\u00b5"


def frame(rows: Rows) -> Any:
    """A pandas DataFrame, one row per dictionary. Raises ImportError without pandas."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("a DataFrame needs pandas: pip install pandas") from error
    return pd.DataFrame(rows)


def write_csv(path: str | PathLike[str], rows: Rows) -> None:
    """A header and one line per dictionary; what is not known is empty."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: str | PathLike[str], rows: Rows, facts: dict[str, Any]) -> None:
    """A Parquet file with ``facts`` as JSON under the metadata key moe_monitor. Raises ImportError without pyarrow."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install pyarrow") from error
    table = pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({b"moe_monitor": json.dumps(facts).encode()})
    pq.write_table(table, path)


def write_json(path: str | PathLike[str], data: dict[str, Any]) -> None:
    """Strict JSON. Raises ValueError for NaN or infinity."""
    text = json.dumps(data, indent=1, allow_nan=False)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def number(value: Any, digits: int = 3) -> str:
    """A number for people: a dash where it is not known."""
    if value is None:
        return DASH
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def si(value: float | None, unit: str = "") -> str:
    """A number with an SI prefix: 1.23 GFLOP, 45.6 us."""
    if value is None:
        return DASH
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}".rstrip()
    return f"{value / 1e-6:.3g} {MICRO}{unit}" if value else f"0 {unit}".rstrip()


def print_summary(summary: Summary) -> None:
    """The columns an operator looks at first, with a total line above them."""
    from rich.console import Console
    from rich.table import Table

    facts, total = summary.facts, summary.total
    console = Console()
    console.width = max(console.width, 116)  # wrapped numbers cannot be read
    console.print(
        f"[bold]{facts['model_name']}[/]: {facts['layers']} MoE layers, {facts['experts']} experts, "
        f"top-{facts['top_k']}, {facts['scoring']}; {total['tokens']} tokens in {total['passes']} passes, "
        f"{si(total['flops_total'], 'FLOP')} (router {si(total['flops_router'], 'FLOP')})",
        highlight=False,
    )
    timed = bool(summary.rows) and "layer_seconds_p50" in summary.rows[0]
    table = Table(box=None, header_style="bold")
    names = ["layer", "tokens", "max/mean", "chance", "CV", "Gini", "entropy", "idle", "router H", "top-1 p", "active"]
    for name in names + (["layer p50", "p95"] if timed else []):
        table.add_column(name, justify="right")
    for row in summary.rows:
        cells = [
            str(row["layer"]),
            str(row["tokens"]),
            *(number(row[f"load_{key}_ratio"], 2) for key in ("imbalance", "imbalance_floor", "cv", "gini", "entropy")),
            number(row["idle_experts"]),
            number(row["router_entropy_ratio_mean"]),
            number(row["top1_probability_mean"]),
            number(row["active_experts_mean"], 1),
        ]
        if timed:
            cells += [si(row["layer_seconds_p50"], "s"), si(row["layer_seconds_p95"], "s")]
        table.add_row(*cells)
    console.print(table)
