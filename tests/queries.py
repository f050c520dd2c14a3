"""Every query of the shipped assets, and which metrics it may name."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe_monitor.catalog import METRICS

ROOT = Path(__file__).resolve().parent.parent
MATRIX = "moe_expert_tokens_total"

#: Prometheus' own, about its scrapes and alerts.
PROMETHEUS = {"up", "scrape_duration_seconds", "ALERTS", "ALERTS_FOR_STATE"}

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


@dataclass(frozen=True)
class Expression:
    """A query of a panel or of a rule, by where it stands. ``instant``: not asked over time."""

    where: str
    text: str
    instant: bool


def expressions() -> list[Expression]:
    """Every query of every panel, recording rule and alert; of an alert without its comparison."""
    found = [Expression(rule["record"], rule["expr"], True) for rule in rules() if "record" in rule]
    provisioned = yaml.safe_load((ROOT / "grafana" / "provisioning" / "alerting" / "moe-monitor.yaml").read_text())
    alerts = provisioned["groups"][0]["rules"]
    found += [Expression(rule["title"], rule["data"][0]["model"]["expr"], True) for rule in alerts]
    for uid, panel in panels():
        for target in panel.get("targets", []):
            where = f"{uid}: {panel['title']} {target['refId']}"
            found.append(Expression(where, target["expr"], bool(target.get("instant"))))
    return found


def check(server: Any, asked: Iterable[Expression], layer: str = "7") -> tuple[dict[str, float], set[str]]:
    """Ask them all: which took more than 200 ms (the best of five, the machine may be busy), and which had no data.

    Over time they are asked at 240 points, as a panel of a usual width does. Rates over five minutes have data soon:
    two samples are enough for them.
    """
    (instance,) = {s["metric"]["instance"] for s in server.query("moe_monitor_active")}
    fill = {"job": "moe-monitor", "model": ".*", "instance": ".*", "engine": ".*", "layer": layer, "kind": "decode"}
    slow, empty = {}, set()
    for asked_for in asked:
        text = asked_for.text.replace("$server", instance)
        for name, value in fill.items():
            text = text.replace(f"${name}", value)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            found = server.query(text) if asked_for.instant else server.range(text, 60)
            times.append(time.perf_counter() - began)
            if times[-1] < 0.2:
                break
            time.sleep(0.5 * len(times))  # whatever else the machine does may be over by then
        if min(times) > 0.2:
            slow[asked_for.where] = min(times)
        if not found:
            empty.add(asked_for.where)
    return slow, empty
