"""The alerts, once: Prometheus rules and Grafana-managed rules are both written from this table.

None compares with a fixed amount of imbalance: what is normal differs from deployment to deployment. The limits are
made by the exporter from the deployment's own baseline and from what sampling explains (``moe_monitor/baseline.py``),
so an ``excess`` of 1 is the limit, whatever the model.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Where runbooks are read: beside the rules, in what `moe-monitor dashboards` writes. Its option --runbook-base puts a
#: URL in the place of this word.
RUNBOOKS = "runbooks/"

#: Stands for the value in summaries and descriptions; each kind of rule writes it in its own way.
VALUE = "%VALUE%"

ENGINE = (
    "{{ $labels.model_name }} engine {{ $labels.engine }} on {{ $labels.instance }}"
    "{{ with $labels.server }} ({{ . }}){{ end }}"
)


@dataclass(frozen=True)
class Alert:
    """``query`` compared with ``threshold`` by ``operator`` for as long as ``hold``.

    ``shape``: how the value is printed. ``details``: a query for the layers concerned (Prometheus only; ``SELF``
    stands for the labels of the engine), printed after ``heading`` as "layer: value" by ``print``, a function of
    Prometheus' templates. ``dashboard``: uid of where to look.
    """

    name: str
    severity: str
    query: str
    operator: str
    threshold: float
    hold: str
    summary: str
    description: str
    dashboard: str
    shape: str = "%.2f"
    details: str = ""
    print: str = 'printf "%.2f"'
    heading: str = "Worst"

    @property
    def runbook(self) -> str:
        return RUNBOOKS + self.name + ".md"


ALERTS = (
    Alert(
        "MoeLoadImbalance",
        "warning",
        "engine:moe_load_imbalance:excess5m",
        ">",
        1,
        "10m",
        f"Expert load of {ENGINE} is less balanced than any of its normal traffic",
        f"The worst layer's imbalance is {VALUE} times the limit made from this deployment's baseline and from "
        "sampling. A few experts take almost all tokens, which a change of traffic alone does not explain.",
        "moe-monitor-layers",
        details="topk(3, engine_layer:moe_load_imbalance:excess5m{SELF})",
    ),
    Alert(
        "MoeExpertSilent",
        "critical",
        "engine:moe_silent_experts:sum5m",
        ">",
        0,
        "5m",
        f"Experts of {ENGINE} receive no tokens",
        f"{VALUE} experts had no token in five minutes in which the baseline expects at least 1,000 for each.",
        "moe-monitor-layers",
        shape="%.0f",
        details='topk(3, moe_silent_experts{window="5m",SELF} > 0)',
    ),
    Alert(
        "MoeRouterCollapse",
        "critical",
        "engine:moe_router_collapsed_layers:count5m",
        ">",
        0,
        "2m",
        f"The router of {ENGINE} has collapsed",
        f"In {VALUE} of its layers the router's entropy is below half of normal while the mass on the "
        f"chosen experts has "
        "risen more than half way to 1: it sends nearly every token to the same few experts.",
        "moe-monitor-layers",
        shape="%.0f",
        details="bottomk(3, engine_layer:moe_router_entropy:mean5m{SELF})",
    ),
    Alert(
        "MoeRouterNonFinite",
        "critical",
        "max without (layer) (increase(moe_nonfinite_tokens_total[5m]))",
        ">",
        0,
        "1m",
        f"Router logits of {ENGINE} are NaN or infinite",
        f"About {VALUE} tokens in five minutes had router logits that are no numbers; what they are answered with is "
        "not to be trusted.",
        "moe-monitor-layers",
        shape="%.0f",
        details="topk(3, increase(moe_nonfinite_tokens_total{SELF}[5m]) > 0)",
    ),
    Alert(
        "MoeRoutingDrift",
        "warning",
        "engine:moe_routing_drift:excess5m",
        ">",
        1,
        "10m",
        f"Routing of {ENGINE} is not what it was when its baseline was recorded",
        f"The worst layer's distribution over experts is {VALUE} times as far from the baseline as the baseline's own "
        "variability and sampling explain. Other traffic, other weights, or a mistake in expert ids.",
        "moe-monitor-overview",
        details="topk(3, engine_layer:moe_routing_drift:excess5m{SELF})",
    ),
    Alert(
        "MoeEpRankStraggling",
        "warning",
        "engine:moe_ep_rank_imbalance:excess5m",
        ">",
        1,
        "15m",
        f"Expert-parallel ranks of {ENGINE} wait for an overloaded one",
        f"The worst layer's load on its busiest rank, over the mean, is {VALUE} times the limit that the baseline "
        "gives for this placement. Every other rank waits for that one.",
        "moe-monitor-ranks",
        details='topk(3, moe_ep_rank_imbalance_ratio{window="5m",SELF})',
    ),
    Alert(
        "MoeEpRankSlow",
        "warning",
        "engine_rank:moe_ep_rank_experts_time:excess5m",
        ">",
        1.2,
        "15m",
        f"Expert-parallel rank {{{{ $labels.ep_rank }}}} of {ENGINE} is slower than its load explains",
        f"Its share of the experts' time is {VALUE} times what its share of the load explains: the device is slow, not "
        "the placement. Every other rank waits for it.",
        "moe-monitor-latency",
        details="topk(3, moe_ep_straggler_wait_ratio{SELF})",
        heading="Longest waits, of the slowest rank's time",
    ),
    Alert(
        "MoeLayerLatencyRegressed",
        "warning",
        "max without (kind, batch) (engine_batch:moe_layer_duration_seconds:over_past)",
        ">",
        1.5,
        "15m",
        f"MoE layers of {ENGINE} take longer than they did",
        f"The slowest MoE layer takes {VALUE} times as long as in the last six hours at the same kind and size of "
        "batch, so traffic does not explain it.",
        "moe-monitor-latency",
        details='topk(3, rate(moe_layer_duration_seconds_sum{stage="layer",SELF}[5m])'
        ' / rate(moe_layer_duration_seconds_count{stage="layer",SELF}[5m]))',
        print="humanizeDuration",
    ),
    Alert(
        "MoeMonitorNotLive",
        "warning",
        "moe_monitor_active unless moe_monitor_snapshot_age_seconds > 60",
        "<",
        1,
        "5m",
        f"Routing of {ENGINE} is not being captured",
        f"moe_monitor_active is {VALUE}: the monitor is off, has failed, or capture is not live. Serving goes on; "
        "no other alert about this engine's routing can fire.",
        "moe-monitor-self",
        shape="%.0f",
    ),
    Alert(
        "MoeMonitorStale",
        "warning",
        "moe_monitor_snapshot_age_seconds",
        ">",
        60,
        "2m",
        f"The worker of {ENGINE} has stopped publishing",
        f"The last numbers are {VALUE} s old. The worker hangs, is stopped, or its publisher has died.",
        "moe-monitor-self",
        shape="%.0f",
    ),
    Alert(
        "MoeMonitorAbsent",
        "warning",
        "(count_over_time(moe_monitor_active[1h]) unless moe_monitor_active)\n"
        "and on (job, instance) vllm:num_requests_running",
        ">",
        0,
        "5m",
        f"The monitor of {ENGINE} has vanished while the server runs",
        f"The server answers, but no longer with moe-monitor's metrics; there were {VALUE} samples in the last hour. "
        "It was probably restarted without the plugin.",
        "moe-monitor-self",
        shape="%.0f",
    ),
    Alert(
        "MoeMonitorDropping",
        "warning",
        # A client that keeps sending a `moe_trace` which is neither 0 nor 1 loses nothing but its own trace.
        "sum without (what) (\n"
        '  increase(moe_monitor_dropped_total{what!="bad_moe_trace"}[10m]) > 0\n'
        '  or (moe_monitor_dropped_total{what!="bad_moe_trace"} unless moe_monitor_dropped_total offset 10m)\n'
        ")",
        ">",
        0,
        "10m",
        f"The monitor of {ENGINE} drops data",
        f"About {VALUE} items were given up in ten minutes to stay within bounds.",
        "moe-monitor-self",
        shape="%.0f",
        details='moe_monitor_dropped_total{what!="bad_moe_trace",SELF} > 0',
        heading="So far",
    ),
    Alert(
        "MoeMonitorErrors",
        "warning",
        "sum without (where) (\n"
        "  increase(moe_monitor_errors_total[10m]) > 0\n"
        "  or (moe_monitor_errors_total unless moe_monitor_errors_total offset 10m)\n"
        ")",
        ">",
        0,
        "0m",
        f"Errors inside the monitor of {ENGINE}",
        f"About {VALUE} failures in ten minutes. The first failure in an engine process switches capture off there.",
        "moe-monitor-self",
        shape="%.0f",
        details="moe_monitor_errors_total{SELF} > 0",
        heading="So far",
    ),
    Alert(
        "MoeBaselineUnusable",
        "info",
        "moe_baseline_usable",
        "<",
        1,
        "15m",
        f"The baseline set for {ENGINE} cannot be used",
        f"moe_baseline_usable is {VALUE}: the file is missing, damaged, or of another model. Drift, imbalance, "
        "collapse and silent experts go unnoticed until it is recorded again.",
        "moe-monitor-self",
        shape="%.0f",
    ),
)

BY_NAME = {alert.name: alert for alert in ALERTS}
