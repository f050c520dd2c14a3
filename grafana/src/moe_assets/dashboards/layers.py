"""2 Layers and experts: which layer, which expert, since when."""

from __future__ import annotations

from typing import Any

from moe_assets.frame import dashboard, same_but_layer
from moe_assets.panels import (
    BLUE,
    ENGINE,
    EXCESS,
    GREEN,
    MODEL,
    RED,
    TIMES,
    Column,
    Query,
    Row,
    Spec,
    assemble,
    bars,
    joined,
    limit_line,
    lines,
    matrix,
    padded,
    rows_over_time,
)

UID = "moe-monitor-layers"
LOAD = "model_layer_expert:moe_expert_load:ratio5m"
LAYER = 'layer="$layer"'


def _now() -> list[Row]:
    heat = matrix(
        Spec(
            "Load by layer (rows) and expert (columns), all servers, now",
            "Tokens of an expert over the layer's mean, all servers together, last five minutes; 1 is the mean. "
            "Red cells: the experts that a layer leans on. Deep blue: an expert that gets little or nothing.",
            [Query(f"{LOAD}{{{MODEL}}}", instant=True)],
            decimals=1,
            low=0,
            high=4,
        ),
        "layer",
        "expert",
    )

    def worst(record: str, how: str = "max") -> str:
        return f"{how} by (layer) ({record})"

    window = f'window="5m",{ENGINE}'
    columns = [
        Column(worst(f"moe_load_imbalance_ratio{{{window}}}"), "Max/mean", decimals=1),
        Column(worst(f"moe_load_imbalance_floor_ratio{{{window}}}"), "by chance", decimals=2),
        Column(worst(f"moe_load_imbalance_limit_ratio{{{window}}}", "min"), "limit", decimals=1),
        Column(
            worst(f"engine_layer:moe_load_imbalance:excess5m{{{ENGINE}}}"),
            "Imbalance, of limit",
            TIMES,
            EXCESS,
            1,
        ),
        Column(worst(f"moe_routing_drift_bits{{{window}}}"), "Drift, bits", decimals=3),
        Column(worst(f"engine_layer:moe_routing_drift:excess5m{{{ENGINE}}}"), "Drift, of limit", TIMES, EXCESS, 1),
        Column(worst(f"moe_silent_experts{{{window}}}", "sum"), "Silent", "short", [(None, GREEN), (1, RED)], 0),
        Column(worst(f"moe_idle_experts{{{window}}}"), "Idle", decimals=0),
        Column(worst(f"engine_layer:moe_router_entropy:mean5m{{{ENGINE}}}", "min"), "Entropy", "percentunit", (), 0),
        Column(worst(f"engine_layer:moe_router_selected_mass:mean5m{{{ENGINE}}}"), "Chosen mass", "percentunit", (), 0),
        Column(worst(f"engine_layer:moe_router_top1_probability:mean5m{{{ENGINE}}}"), "Top-1", "percentunit", (), 0),
        Column(worst(f"engine_layer:moe_active_experts:mean5m{{{ENGINE}}}", "avg"), "Active", decimals=0),
    ]
    worst_first = joined(
        "Layers, worst drift first",
        "Of the servers and engines chosen above, the worst in each layer. By chance: max/mean that uniform routing of "
        "as many tokens would show. Active: distinct experts of one forward pass.",
        [("layer", "Layer")],
        columns,
        "Drift, of limit",
        [("This layer, below", same_but_layer(UID))],
    )
    return [Row("Now", 13, [(heat, 24)]), Row("", 10, [(worst_first, 24)])]


def _over_time() -> list[Row]:
    def layer_map(
        title: str, about: str, record: str, unit: str, low: float | None, high: float | None, **look: Any
    ) -> Any:
        query = Query(padded(f"model_layer:{record}{{{MODEL}}}", "layer"), "{{row}}")
        return rows_over_time(
            Spec(title, about, [query], unit, low=low, high=high, no_value="no data"), "layer", **look
        )

    return [
        Row(
            "Every layer over time, all servers of the model",
            9,
            [
                (
                    layer_map(
                        "Imbalance (max/mean)",
                        "Worst server. Its largest possible value is experts / top-k.",
                        "moe_load_imbalance:max5m",
                        "short",
                        1,
                        None,
                    ),
                    8,
                ),
                (
                    layer_map(
                        "Router entropy",
                        "Lowest server: 100 % is routing by chance, 0 % always the same experts. Falls in a collapse.",
                        "moe_router_entropy:min5m",
                        "percentunit",
                        0,
                        1,
                        reverse=False,
                    ),
                    8,
                ),
                (
                    layer_map(
                        "Mass on the chosen experts",
                        "Highest server: how much of the router's probability went to the experts used. Rises towards "
                        "100 % in a collapse.",
                        "moe_router_selected_mass:max5m",
                        "percentunit",
                        0,
                        1,
                    ),
                    8,
                ),
            ],
        )
    ]


def _experts(load: str, where: str, title: str) -> Row:
    """The experts of one layer: over time, and both ends now."""
    heat = rows_over_time(
        Spec(
            f"Experts of layer $layer over time (load over mean), {where}",
            "A row that turns deep blue has gone silent; one that turns red has become hot.",
            [Query(padded(load, "expert", 3), "{{row}}")],
            low=0,
            high=4,
            points=120,  # as many rows as experts: 256 at 240 points would take 180 ms of Prometheus' CPU time
        ),
        "expert",
    )
    about = f"Load over the layer's mean, {where}."
    ends = [
        bars(
            Spec(
                f"{name} experts, {where}",
                about,
                [Query(f"{pick}(8, {load})", "{{expert}}", instant=True)],
                steps=steps,
                decimals=3,
                low=0,
            )
        )
        for name, pick, steps in (
            ("Hottest", "topk", [(None, BLUE)]),
            ("Coldest", "bottomk", [(None, RED), (0.001, BLUE)]),
        )
    ]
    return Row(title, 11, [(heat, 14), (ends[0], 5), (ends[1], 5)])


def _one_layer() -> list[Row]:
    fleet = f"{LOAD}{{{MODEL},{LAYER}}}"
    # One layer of one server: as many series as the layer has experts, so no rule is needed.
    server = f'{MODEL},instance="$server",{LAYER}'
    own = (
        f"sum by (expert) (rate(moe_expert_tokens_total{{{server}}}[5m]))"
        f" / scalar(sum(rate(moe_experts_per_token_sum{{{server}}}[5m])))"
        f' * scalar(max(moe_model_experts{{{MODEL},instance="$server"}}))'
    )
    window = f'window="5m",{LAYER},{ENGINE}'
    imbalance = lines(
        Spec(
            "Imbalance of layer $layer (max/mean)",
            "Of the servers chosen above. Limit: from the baseline. By chance: what uniform routing of as many tokens "
            "would show.",
            [
                Query(f"max(moe_load_imbalance_ratio{{{window}}})", "worst engine"),
                Query(f"quantile(0.5, moe_load_imbalance_ratio{{{window}}})", "median engine"),
                Query(f"max(moe_baseline_imbalance_ratio{{{LAYER},{ENGINE}}})", "baseline"),
                Query(f"min(moe_load_imbalance_limit_ratio{{{window}}})", "limit"),
                Query(f"max(moe_load_imbalance_floor_ratio{{{window}}})", "by chance"),
            ],
            low=1,
        )
    )
    drift = lines(
        Spec(
            "Drift of layer $layer",
            "Jensen-Shannon divergence from the baseline: 0 the same, 1 nothing in common. Sampling: "
            "what as many tokens "
            "of the baseline's own traffic would show.",
            [
                Query(f"max(moe_routing_drift_bits{{{window}}})", "worst engine"),
                Query(f"quantile(0.5, moe_routing_drift_bits{{{window}}})", "median engine"),
                Query(f"max(moe_routing_drift_limit_bits{{{window}}})", "limit"),
                Query(f"max(moe_routing_drift_floor_bits{{{window}}})", "sampling"),
            ],
            "suffix: bit",
            decimals=3,
            low=0,
            no_value="no baseline",
        )
    )
    mean = "engine_layer:moe_router_{}:mean5m{{" + LAYER + "," + ENGINE + "}}"
    router = lines(
        Spec(
            "Router of layer $layer",
            "Mean over the tokens of the servers chosen above. In a collapse entropy falls and the chosen mass rises. "
            "Dashed: the baseline.",
            [
                Query(f"avg({mean.format('entropy')})", "entropy"),
                Query(f"avg({mean.format('selected_mass')})", "mass on chosen experts"),
                Query(f"avg({mean.format('top1_probability')})", "top-1 probability"),
                Query(f"avg(moe_baseline_router_entropy_ratio{{{LAYER},{ENGINE}}})", "baseline entropy"),
                Query(f"avg(moe_baseline_selected_mass_ratio{{{LAYER},{ENGINE}}})", "baseline mass"),
            ],
            "percentunit",
            low=0,
            high=1,
        )
    )
    active = lines(
        Spec(
            "Active experts per pass, layer $layer",
            "Distinct experts that one forward pass used: how much expert weight it had to read.",
            [
                Query(f"avg(engine_layer:moe_active_experts:mean5m{{{LAYER},{ENGINE}}})", "active"),
                Query(f"max(moe_model_experts{{{ENGINE}}})", "all experts"),
            ],
            decimals=0,
            low=0,
        )
    )
    for name, color in {"limit": "red", "by chance": "gray", "baseline": "blue"}.items():
        imbalance = limit_line(imbalance, name, color)
    for name, color in {"limit": "red", "sampling": "gray"}.items():
        drift = limit_line(drift, name, color)
    for name, color in {"baseline entropy": "green", "baseline mass": "yellow"}.items():
        router = limit_line(router, name, color)
    active = limit_line(active, "all experts", "gray")
    return [
        Row(
            "Layer $layer, of the servers and engines chosen above",
            8,
            [(p, 6) for p in (imbalance, drift, router, active)],
        ),
        _experts(own, "server $server", "Experts of layer $layer on server $server"),
        _experts(fleet, "all servers", "Experts of layer $layer on all servers of the model"),
    ]


def build() -> dict[str, Any]:
    about = "Which layer and which expert, since when: load, router entropy and confidence, drift."
    made = dashboard(UID, about, one_model=True, layer="one", server=True)
    return assemble(made, [*_now(), *_over_time(), *_one_layer()])
