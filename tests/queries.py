"""Every query of the shipped assets, and which metrics it may name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from moe_monitor.catalog import METRICS

ROOT = Path(__file__).resolve().parent.parent
MATRIX = "moe_expert_tokens_total"

#: Prometheus' own, about its scrapes and alerts.
PROMETHEUS = {"up", "scrape_duration_seconds", "ALERTS"}

#: vLLM's metrics that are used, by kind; tests with a live server check that it has them.
VLLM_GAUGES = {"vllm:num_requests_running"}
VLLM_HISTOGRAMS = {"vllm:inter_token_latency_seconds", "vllm:time_to_first_token_seconds"}
VLLM = VLLM_GAUGES | {name + end for name in VLLM_HISTOGRAMS for end in ("_bucket", "_count", "_sum")}

_WORDS = {
    *("by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "offset", "bool"),
    *("sum", "avg", "min", "max", "count", "quantile", "topk", "bottomk", "count_over_time", "rate", "increase"),
    *("quantile_over_time", "count_values", "log2", "round", "clamp_min"),
    *("histogram_quantile", "label_replace", "scalar", "vector", "time"),
}


def exposed() -> set[str]:
    """Names of all series of the catalogue."""
    names = set()
    for metric in METRICS:
        ends = ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",)
        names |= {metric.name + end for end in ends}
    return names


def rules() -> list[dict[str, Any]]:
    found = []
    for path in sorted((ROOT / "grafana" / "rules").glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            found += group["rules"]
    return found


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def dashboards() -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in sorted((ROOT / "grafana" / "dashboards").glob("*.json"))}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for uid, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            if panel["type"] != "row":
                yield uid, panel


def named(expr: str) -> set[str]:
    """Metrics that an expression names."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", expr)  # strings
    bare = re.sub(r"\{[^}]*\}", "", bare)  # matchers
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)  # labels
    bare = re.sub(r"\[[^\]]*\]|\boffset\s+\w+", "", bare)  # durations
    words = re.findall(r"(?<![\w.:$])[A-Za-z_:][\w:]*", bare)
    return {word for word in words if word not in _WORDS}


def unknown(expr: str) -> set[str]:
    """Metrics that an expression names and that neither the catalogue, a rule, vLLM nor Prometheus has."""
    return named(expr) - exposed() - recorded() - VLLM - PROMETHEUS
