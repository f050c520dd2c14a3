"""1 Overview: is routing healthy, what changed, in which model and layer."""

from __future__ import annotations

from typing import Any

from moe_assets.dashboards.latency import PAST, PAST_RECORD
from moe_assets.frame import dashboard, link
from moe_assets.panels import (
    ENGINE,
    EXCESS,
    GREEN,
    MODEL,
    RED,
    TIMES,
    YELLOW,
    Column,
    Query,
    Row,
    Spec,
    assemble,
    joined,
    lines,
    number,
    padded,
    rows_over_time,
)

UID = "moe-monitor-overview"
LAYERS = link("moe-monitor-layers")
NO_BASELINE = "no baseline"


def _state() -> Row:
    alerts = 'count(ALERTS{alertstate="firing",component="moe-monitor"}) or vector(0)'
    no_layers = f"0 * sum(moe_baseline_usable{{{ENGINE}}} == 1)"
    return Row(
        "Is routing healthy?",
        4,
        [
            (
                number(
                    Spec(
                        "Alerts firing",
                        "Alerts of moe-monitor that fire now, of all models. Each has a runbook.",
                        [Query(alerts)],
                        steps=[(None, GREEN), (1, RED)],
                        decimals=0,
                        links=[("Alerts", "/alerting/list?search=label:component=moe-monitor")],
                    )
                ),
                3,
            ),
            (
                number(
                    Spec(
                        "Engines not live",
                        "Engines whose routing is not being captured. What is below says nothing about them.",
                        [Query(f"count(moe_monitor_active{{{ENGINE}}} == 0) or vector(0)")],
                        steps=[(None, GREEN), (1, RED)],
                        decimals=0,
                        links=[("The monitor itself", link("moe-monitor-self"))],
                    )
                ),
                3,
            ),
            (
                number(
                    Spec(
                        "Worst drift, of limit",
                        "Distance from the baseline in the worst layer, in multiples of what the deployment's own "
                        "variability and sampling explain. 1 is the limit, where the alert begins.",
                        [Query(f"max(engine:moe_routing_drift:excess5m{{{ENGINE}}})")],
                        unit=TIMES,
                        steps=EXCESS,
                        decimals=1,
                        no_value=NO_BASELINE,
                    )
                ),
                3,
            ),
            (
                number(
                    Spec(
                        "Worst imbalance, of limit",
                        "Imbalance of expert load in the worst layer, in multiples of what no change "
                        "of traffic explains. "
                        "1 is the limit, where the alert begins.",
                        [Query(f"max(engine:moe_load_imbalance:excess5m{{{ENGINE}}})")],
                        unit=TIMES,
                        steps=EXCESS,
                        decimals=1,
                        no_value=NO_BASELINE,
                    )
                ),
                3,
            ),
            (
                number(
                    Spec(
                        "Silent experts",
                        "Experts, over all layers, without a token in five minutes in which the baseline expects at "
                        "least 1,000.",
                        [Query(f"sum(engine:moe_silent_experts:sum5m{{{ENGINE}}})")],
                        steps=[(None, GREEN), (1, RED)],
                        decimals=0,
                        no_value=NO_BASELINE,
                    )
                ),
                3,
            ),
            (
                number(
                    Spec(
                        "Collapsed layers",
                        "Layers in which the router's entropy is below half of normal while the mass on the chosen "
                        "experts has risen more than half way to 1.",
                        [Query(f"sum(engine:moe_router_collapsed_layers:count5m{{{ENGINE}}}) or {no_layers}")],
                        steps=[(None, GREEN), (1, RED)],
                        decimals=0,
                        no_value=NO_BASELINE,
                    )
                ),
                3,
            ),
            (
                number(
                    Spec(
                        "Layer time, of its past",
                        "Slowest MoE layer of the worst engine, in multiples of its median over the last six hours at "
                        "the same kind and size of batch. The alert begins at 1.5.",
                        [Query(f"max({PAST_RECORD}{{{ENGINE}}})")],
                        unit=TIMES,
                        steps=PAST,
                        decimals=1,
                        no_value="no past yet",
                        links=[("Latency", link("moe-monitor-latency"))],
                    )
                ),
                3,
            ),
            (
                number(
                    Spec(
                        "Routed tokens",
                        "Tokens per second that pass each layer's router, prompt and generated.",
                        [Query(f"sum(engine:moe_routed_tokens:rate5m{{{ENGINE}}})")],
                        unit="suffix: tok/s",
                        decimals=0,
                        no_value="no traffic",
                    )
                ),
                3,
            ),
        ],
    )


def _worst_and_median(title: str, description: str, record: str) -> Any:
    queries = [
        Query(f"max(engine:{record}:excess5m{{{ENGINE}}})", "worst engine"),
        Query(f"quantile(0.5, engine:{record}:excess5m{{{ENGINE}}})", "median engine"),
    ]
    steps = [(None, GREEN), (1, RED)]
    return lines(Spec(title, description, queries, TIMES, steps, decimals=1, low=0))


def _changes() -> Row:
    tokens = Query(f"sum by (model_name) (engine:moe_routed_tokens:rate5m{{{ENGINE}}})", "{{model_name}}")
    return Row(
        "What changed, and when?",
        8,
        [
            (
                _worst_and_median(
                    "Drift, of its limit",
                    "Worst and median far apart: one server. Both up together: traffic or a new version of the model.",
                    "moe_routing_drift",
                ),
                8,
            ),
            (
                _worst_and_median(
                    "Imbalance, of its limit",
                    "Above the line a few experts take almost all tokens, more than any change of traffic explains.",
                    "moe_load_imbalance",
                ),
                8,
            ),
            (
                lines(
                    Spec(
                        "Routed tokens per second",
                        "By model. With few tokens, windows vary more by chance; the limits take that into account.",
                        [tokens],
                        "suffix: tok/s",
                        low=0,
                    ),
                    stacked=True,
                ),
                8,
            ),
        ],
    )


def _layer_map(title: str, description: str, record: str) -> Any:
    expr = padded(f"model_layer:{record}:excess5m{{{MODEL}}}", "layer")
    spec = Spec(title, description, [Query(expr, "{{row}}")], TIMES, low=0, high=2, no_value=NO_BASELINE)
    return rows_over_time(spec, "layer")


def _where() -> list[Row]:
    maps = [
        (
            _layer_map(
                "Drift by layer, of its limit",
                "Worst server in each layer; 1 is the limit. One row: a layer. All rows at once: the traffic or "
                "the model.",
                "moe_routing_drift",
            ),
            12,
        ),
        (
            _layer_map(
                "Imbalance by layer, of its limit",
                "Worst server in each layer; 1 is the limit.",
                "moe_load_imbalance",
            ),
            12,
        ),
    ]
    yes_no = {"0": ("not live", RED), "1": ("live", GREEN)}
    columns = [
        Column(f"moe_monitor_active{{{ENGINE}}}", "Monitor", decimals=0, mappings=yes_no),
        Column(f"engine:moe_routing_drift:excess5m{{{ENGINE}}}", "Drift", TIMES, EXCESS, 1),
        Column(f"engine:moe_load_imbalance:excess5m{{{ENGINE}}}", "Imbalance", TIMES, EXCESS, 1),
        Column(f"engine:moe_silent_experts:sum5m{{{ENGINE}}}", "Silent", "short", [(None, GREEN), (1, RED)], 0),
        Column(
            # Nothing is counted where none has collapsed: 0 where a baseline is there to tell.
            f"engine:moe_router_collapsed_layers:count5m{{{ENGINE}}} or 0 * (moe_baseline_usable{{{ENGINE}}} == 1)",
            "Collapsed",
            "short",
            [(None, GREEN), (1, RED)],
            0,
        ),
        Column(f"engine:moe_ep_rank_imbalance:excess5m{{{ENGINE}}}", "EP ranks", TIMES, EXCESS, 1),
        Column(f"max without (kind, batch) ({PAST_RECORD}{{{ENGINE}}})", "Layer time", TIMES, PAST, 1),
        Column(f"engine:moe_load_imbalance:max5m{{{ENGINE}}}", "Max/mean", "short", (), 1),
        Column(f"engine:moe_routed_tokens:rate5m{{{ENGINE}}}", "Tokens/s", "short", (), 0),
        Column(
            f"time() - moe_baseline_timestamp_seconds{{{ENGINE}}}",
            "Baseline age",
            "s",
            [(None, GREEN), (7.8e6, YELLOW)],
            0,
        ),
    ]
    keys = [("model_name", "Model"), ("instance", "Server"), ("server", "Id on its node"), ("engine", "Engine")]
    per_server = link(
        "moe-monitor-layers",
        model="${__data.fields.Model}",
        instance="${__data.fields.Server}",
        server="${__data.fields.Server}",
        engine="${__data.fields.Engine}",
    )
    servers = joined(
        "Engines, worst drift first",
        "One row an engine. Drift, imbalance and EP ranks: multiples of their limits; layer time: of its own past. "
        "Empty: no baseline, no traffic.",
        keys,
        columns,
        "Drift",
        [("Layers of this engine", per_server)],
    )
    ours = 'component="moe-monitor"'
    since = f'(time() - ALERTS_FOR_STATE{{{ours}}}) and ignoring (alertstate) ALERTS{{alertstate="firing",{ours}}}'
    firing = joined(
        "Alerts firing",
        "Of all models, critical first. Since: how long the cause has been there. A click opens the runbooks.",
        [("severity", "Severity"), ("alertname", "Alert"), ("instance", "Server"), ("engine", "Engine")],
        [Column(since, "Since", "s", decimals=0)],
        "Severity",
        [("Runbooks", "/d/moe-monitor-runbooks")],
        ascending=True,
    )
    return [Row("Where?", 9, maps), Row("", 9, [(servers, 16), (firing, 8)])]


def build() -> dict[str, Any]:
    about = "Is routing healthy, what changed, in which model, server and layer."
    return assemble(dashboard(UID, about), [_state(), _changes(), *_where()])
