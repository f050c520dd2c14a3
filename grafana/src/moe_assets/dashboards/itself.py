"""6 The monitor itself: alive, what it costs, what it dropped, what went wrong."""

from __future__ import annotations

from typing import Any

from moe_assets.frame import dashboard
from moe_assets.panels import (
    BLUE,
    ENGINE,
    GREEN,
    ORANGE,
    RED,
    YELLOW,
    Column,
    Query,
    Row,
    Spec,
    assemble,
    joined,
    lines,
    number,
)

UID = "moe-monitor-self"
COST = f"rate(moe_monitor_hook_seconds_total{{{ENGINE}}}[5m]) / (rate(moe_forward_passes_total{{{ENGINE}}}[5m]) > 0)"
#: Budget of host time per step, seconds; red at five times that.
BUDGET = [(None, GREEN), (40e-6, YELLOW), (200e-6, RED)]


def _now() -> Row:
    bad = [(None, GREEN), (1, RED)]
    entries: list[tuple[str, str, str, str, Any, int | None, str]] = [
        (
            "Engines live",
            "Engines whose routing is captured and fresh.",
            f"sum(moe_monitor_active{{{ENGINE}}})",
            "short",
            [(None, BLUE)],
            0,
            "none",
        ),
        (
            "Engines not live",
            "Off, failed, or capture not live. Serving goes on.",
            f"count(moe_monitor_active{{{ENGINE}}} == 0) or vector(0)",
            "short",
            bad,
            0,
            "",
        ),
        (
            "Oldest numbers",
            "Time since the slowest worker published.",
            f"max(moe_monitor_snapshot_age_seconds{{{ENGINE}}})",
            "s",
            [(None, GREEN), (15, ORANGE), (60, RED)],
            1,
            "none",
        ),
        (
            "Errors since start",
            "Failures inside the monitor.",
            f"sum(moe_monitor_errors_total{{{ENGINE}}}) or vector(0)",
            "short",
            bad,
            0,
            "",
        ),
        (
            "Dropped since start",
            "Items given up to stay within bounds.",
            f"sum(moe_monitor_dropped_total{{{ENGINE}}}) or vector(0)",
            "short",
            [(None, GREEN), (1, YELLOW)],
            0,
            "",
        ),
        (
            "Host time per step",
            "In the monitor's hooks, on the serving path; worst engine. The budget is 40 µs.",
            f"max({COST})",
            "s",
            BUDGET,
            0,
            "no traffic",
        ),
        (
            "Baselines unusable",
            "Engines for which a baseline is set and cannot be used.",
            f"count(moe_baseline_usable{{{ENGINE}}} == 0) or vector(0)",
            "short",
            bad,
            0,
            "",
        ),
        (
            "Without a baseline",
            "Live engines with none set: alerts on drift, imbalance, collapse and silent experts cannot fire there.",
            f"count(moe_monitor_active{{{ENGINE}}} unless moe_baseline_usable{{{ENGINE}}}) or vector(0)",
            "short",
            [(None, GREEN), (1, YELLOW)],
            0,
            "",
        ),
    ]
    panels = [
        (number(Spec(title, about, [Query(expr)], unit, steps, decimals, no_value=empty)), 3)
        for title, about, expr, unit, steps, decimals, empty in entries
    ]
    return Row("Is the monitor well?", 4, panels)


def _over_time() -> list[Row]:
    cost = lines(
        Spec(
            "Host time per step",
            "In the monitor's hooks, on the serving path. Dashed: the budget of 40 µs, and five times that.",
            [Query(f"max({COST})", "worst engine"), Query(f"quantile(0.5, {COST})", "median engine")],
            "s",
            BUDGET,
            low=0,
        )
    )
    share = lines(
        Spec(
            "Host time, part of a core",
            "Seconds in the hooks per second.",
            [Query(f"max(rate(moe_monitor_hook_seconds_total{{{ENGINE}}}[5m]))", "worst engine")],
            "percentunit",
            decimals=3,
            low=0,
        )
    )
    age = lines(
        Spec(
            "Age of the numbers",
            "Time since the slowest worker published. Above 15 s an engine counts as not live, above "
            "60 s an alert follows.",
            [Query(f"max(moe_monitor_snapshot_age_seconds{{{ENGINE}}})", "oldest")],
            "s",
            [(None, GREEN), (15, ORANGE), (60, RED)],
            low=0,
        )
    )
    errors = lines(
        Spec(
            "Errors since start, by place",
            "The first failure in an engine process switches capture off there.",
            [Query(f"sum by (where) (moe_monitor_errors_total{{{ENGINE}}})", "{{where}}")],
            low=0,
            decimals=0,
            no_value="none",
        )
    )
    dropped = lines(
        Spec(
            "Dropped since start, by kind",
            "What was given up to stay within bounds.",
            [Query(f"sum by (what) (moe_monitor_dropped_total{{{ENGINE}}})", "{{what}}")],
            low=0,
            decimals=0,
            no_value="none",
        )
    )
    scrape = lines(
        Spec(
            "Scrape time",
            "As Prometheus sees it: the whole answer of a server, vLLM's own metrics included.",
            [
                Query('max(scrape_duration_seconds{job="$job",instance=~"$instance"})', "slowest"),
                Query('quantile(0.5, scrape_duration_seconds{job="$job",instance=~"$instance"})', "median"),
            ],
            "s",
            low=0,
        )
    )
    return [
        Row("What does it cost?", 8, [(cost, 8), (share, 8), (scrape, 8)]),
        Row("What went wrong?", 8, [(age, 8), (errors, 8), (dropped, 8)]),
    ]


def _engines() -> Row:
    yes_no = {"0": ("not live", RED), "1": ("live", GREEN)}
    usable = {"0": ("unusable", RED), "1": ("in use", GREEN)}
    keys = [
        ("model_name", "Model"),
        ("instance", "Server"),
        ("server", "Id on its node"),
        ("engine", "Engine"),
        ("capture", "Capture"),
        ("version", "Version"),
        ("producer", "Serving"),
    ]
    # The join by info's labels gives every row the versions.
    info = "moe_monitor_info{" + ENGINE + "}"
    on = "* on (job, instance, server, model_name, engine) group_left (capture, version, producer)"

    def total(name: str) -> str:
        """Of an engine over all places or kinds; 0 where none has been counted yet."""
        added = f"sum by (job, instance, server, model_name, engine) ({name}{{{ENGINE}}})"
        return f"({added} or 0 * moe_monitor_active{{{ENGINE}}}) {on} {info}"

    columns = [
        Column(f"moe_monitor_active{{{ENGINE}}} {on} {info}", "Monitor", decimals=0, mappings=yes_no),
        Column(
            f"moe_monitor_snapshot_age_seconds{{{ENGINE}}} {on} {info}",
            "Age",
            "s",
            [(None, GREEN), (15, ORANGE), (60, RED)],
            1,
        ),
        Column(total("moe_monitor_errors_total"), "Errors", "short", [(None, GREEN), (1, RED)], 0),
        Column(total("moe_monitor_dropped_total"), "Dropped", "short", [(None, GREEN), (1, YELLOW)], 0),
        Column(f"{COST} {on} {info}", "Host time/step", "s", BUDGET, 0),
        Column(f"moe_baseline_usable{{{ENGINE}}} {on} {info}", "Baseline", decimals=0, mappings=usable),
    ]
    table = joined(
        "Engines, oldest numbers first",
        "Versions, how routing is captured, errors and drops since start.",
        keys,
        columns,
        "Age",
    )
    return Row("Which engine?", 9, [(table, 24)])


def build() -> dict[str, Any]:
    about = "Is the monitor alive, what does it cost, what did it drop, what went wrong."
    return assemble(dashboard(UID, about), [_now(), *_over_time(), _engines()])
