"""3 Expert parallelism: load per rank, who waits for whom, and what balance would gain."""

from __future__ import annotations

from typing import Any

from moe_assets.frame import dashboard
from moe_assets.panels import (
    ENGINE,
    EXCESS,
    GREEN,
    MODEL,
    TIMES,
    YELLOW,
    Column,
    Query,
    Row,
    Spec,
    assemble,
    joined,
    limit_line,
    lines,
    matrix,
    number,
    padded,
    rows_over_time,
)

UID = "moe-monitor-ranks"
SERVER = MODEL + ',instance=~"$instance"'
LAYERS = SERVER + ',layer=~"$layer"'
RANK = "server_rank:moe_ep_rank_tokens:rate5m"
LAYER_RANK = "server_layer_rank:moe_ep_rank_tokens:rate5m"
NONE = "no expert parallelism"


def _over_mean(load: str) -> str:
    """Of ranks of one server: among many servers a sum would hide the one whose rank is overloaded."""
    return f"{load} / ignoring (ep_rank) group_left () avg without (ep_rank) ({load})"


def _now() -> Row:
    gain = f"server:moe_ep_balance_gain:ratio5m{{{SERVER}}}"
    return Row(
        "Now",
        4,
        [
            (
                number(
                    Spec(
                        "Ranks",
                        "Expert-parallel ranks of the largest server.",
                        [Query(f"max(count by (instance) ({RANK}{{{SERVER}}}))")],
                        decimals=0,
                        no_value=NONE,
                    ),
                    spark=False,
                ),
                4,
            ),
            (
                number(
                    Spec(
                        "Worst imbalance, of its limit",
                        "Busiest rank over the mean rank in the worst layer, in multiples of the "
                        "limit that the baseline "
                        "gives for this placement. 1 is the limit, where the alert begins.",
                        [Query(f"max(engine:moe_ep_rank_imbalance:excess5m{{{ENGINE}}})")],
                        TIMES,
                        EXCESS,
                        1,
                        no_value="no baseline, or " + NONE,
                    )
                ),
                6,
            ),
            (
                number(
                    Spec(
                        "Busiest rank over the mean",
                        "In the worst layer. 2: the busiest rank has twice the mean, the others wait half of the time.",
                        [Query(f"max(engine:moe_ep_rank_imbalance:max5m{{{ENGINE}}})")],
                        decimals=2,
                        no_value=NONE,
                    )
                ),
                6,
            ),
            (
                number(
                    Spec(
                        "What balance would gain",
                        "Part of the experts' time that even load would save, over all layers, if a layer takes "
                        "as long as its busiest rank. An upper bound: communication is not in it.",
                        [Query(f"max({gain})")],
                        "percentunit",
                        [(None, GREEN), (0.15, YELLOW)],
                        0,
                        no_value=NONE,
                    )
                ),
                8,
            ),
        ],
    )


def _over_time() -> Row:
    share = f"max by (ep_rank) ({_over_mean(f'{RANK}{{{SERVER}}}')})"
    load = rows_over_time(
        Spec(
            "Load of each rank over its server's mean, worst server",
            "All layers together. A red row for long: that rank has the popular experts; placement or EPLB helps.",
            [Query(padded(share, "ep_rank"), "{{row}}")],
            decimals=2,
            low=0.5,
            high=1.5,
            no_value=NONE,
        ),
        "rank",
    )
    imbalance = lines(
        Spec(
            "Busiest rank over the mean, worst layer",
            "Baseline and limit: the baseline's load on the present placement, in its worst layer.",
            [
                Query(f"max(engine:moe_ep_rank_imbalance:max5m{{{ENGINE}}})", "worst server"),
                Query(f"max(moe_baseline_ep_rank_imbalance_ratio{{{ENGINE}}})", "baseline"),
                Query(f"min(moe_ep_rank_imbalance_limit_ratio{{{ENGINE}}})", "limit"),
            ],
            decimals=2,
            low=1,
            no_value=NONE,
        )
    )
    gain = lines(
        Spec(
            "What balance would gain",
            "Part of the experts' time, over all layers; an upper bound.",
            [
                Query(f"max(server:moe_ep_balance_gain:ratio5m{{{SERVER}}})", "worst server"),
                Query(f"quantile(0.5, server:moe_ep_balance_gain:ratio5m{{{SERVER}}})", "median server"),
            ],
            "percentunit",
            low=0,
            no_value=NONE,
        )
    )
    for name, color in {"limit": "red", "baseline": "blue"}.items():
        imbalance = limit_line(imbalance, name, color)
    return Row("Over time", 9, [(load, 10), (imbalance, 7), (gain, 7)])


def _where() -> Row:
    cells = f"max by (layer, ep_rank) ({_over_mean(f'{LAYER_RANK}{{{LAYERS}}}')})"
    heat = matrix(
        Spec(
            "Load by layer (rows) and rank (columns), over the layer's mean, worst server, now",
            "Of the servers chosen above; the table beside names them. One red column: a rank is busy in every layer. "
            "Scattered red: every layer has another busiest rank, which placement cannot mend for all at once.",
            [Query(cells, instant=True)],
            decimals=2,
            low=0,
            high=2,
        ),
        "layer",
        "ep_rank",
    )
    columns = [
        Column(
            f"max by (instance) (engine:moe_ep_rank_imbalance:excess5m{{{ENGINE}}})",
            "Of limit",
            TIMES,
            EXCESS,
            1,
        ),
        Column(f"max by (instance) (engine:moe_ep_rank_imbalance:max5m{{{ENGINE}}})", "Worst layer"),
        Column(f"max by (instance) (server:moe_ep_balance_gain:ratio5m{{{SERVER}}})", "Gain", "percentunit", (), 0),
    ]
    servers = joined(
        "Servers, worst first",
        "Busiest rank over the mean in the worst layer, and what balance would gain.",
        [("instance", "Server")],
        columns,
        "Worst layer",
    )
    return Row("Where?", 12, [(heat, 15), (servers, 9)])


def build() -> dict[str, Any]:
    about = "Load per expert-parallel rank, its imbalance, and what balance would gain."
    return assemble(dashboard(UID, about, one_model=True, layer="several"), [_now(), _over_time(), _where()])
