"""Recording rules: everything that a panel shows of more than one series at a time, added up once per interval.

Names are level:metric:operation. ``engine`` rules use ``without``, so that labels which a deployment adds (pod,
namespace, cluster) stay; ``model`` rules add up over the servers of a model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recording:
    name: str
    expr: str


@dataclass(frozen=True)
class Group:
    name: str
    interval: str
    rules: tuple[Recording, ...]


def _mean(record: str, metric: str) -> Recording:
    """Mean of a histogram's observations over five minutes; nothing where there were none."""
    return Recording(record, f"rate({metric}_sum[5m])\n/\n(rate({metric}_count[5m]) > 0)")


_OVER_LIMIT = """\
(
  moe_load_imbalance_ratio{window="5m"} / moe_load_imbalance_limit_ratio{window="5m"}
  >=
  moe_load_cv_ratio{window="5m"} / moe_load_cv_limit_ratio{window="5m"}
)
or
moe_load_cv_ratio{window="5m"} / moe_load_cv_limit_ratio{window="5m"}"""

_COLLAPSED = """\
count without (layer) (
  engine_layer:moe_router_entropy:mean5m < 0.5 * moe_baseline_router_entropy_ratio
  and
  engine_layer:moe_router_selected_mass:mean5m > 0.5 + 0.5 * moe_baseline_selected_mass_ratio
)"""

_LOAD = """\
sum by (job, model_name, layer, expert) (rate(moe_expert_tokens_total[5m]))
/ on (job, model_name, layer) group_left ()
(sum by (job, model_name, layer) (rate(moe_experts_per_token_sum[5m])) > 0)
* on (job, model_name) group_left ()
max by (job, model_name) (moe_model_experts)"""

#: The only rules that read the layer-by-expert matrix. One value per model, layer and expert however many servers
#: there are; the mean comes from the layer's own counter, so it is right too where a server shows only the hottest
#: and coldest experts.
MATRIX = Group(
    "moe-monitor-matrix",
    "1m",
    (
        Recording("model_layer_expert:moe_expert_load:ratio5m", _LOAD),
        Recording(
            "model_layer:moe_expert_load:max5m",
            "max by (job, model_name, layer) (model_layer_expert:moe_expert_load:ratio5m)",
        ),
        Recording(
            "model_layer:moe_expert_load:min5m",
            "min by (job, model_name, layer) (model_layer_expert:moe_expert_load:ratio5m)",
        ),
    ),
)

LAYERS = Group(
    "moe-monitor-layers",
    "30s",
    (
        _mean("engine_layer:moe_router_entropy:mean5m", "moe_router_entropy_ratio"),
        _mean("engine_layer:moe_router_selected_mass:mean5m", "moe_router_selected_mass_ratio"),
        _mean("engine_layer:moe_router_top1_probability:mean5m", "moe_router_top1_probability"),
        _mean("engine_layer:moe_active_experts:mean5m", "moe_active_experts"),
        Recording(
            "engine_layer:moe_routing_drift:excess5m",
            'moe_routing_drift_bits{window="5m"} / moe_routing_drift_limit_bits{window="5m"}',
        ),
        Recording("engine_layer:moe_load_imbalance:excess5m", _OVER_LIMIT),
    ),
)

ENGINES = Group(
    "moe-monitor-engines",
    "30s",
    (
        Recording("engine:moe_routed_tokens:rate5m", "max without (layer) (rate(moe_routed_tokens_total[5m]))"),
        Recording(
            "engine:moe_load_imbalance:max5m", 'max without (layer, window) (moe_load_imbalance_ratio{window="5m"})'
        ),
        Recording(
            "engine:moe_load_imbalance:excess5m",
            "max without (layer, window) (engine_layer:moe_load_imbalance:excess5m)",
        ),
        Recording(
            "engine:moe_routing_drift:excess5m", "max without (layer, window) (engine_layer:moe_routing_drift:excess5m)"
        ),
        Recording("engine:moe_silent_experts:sum5m", 'sum without (layer, window) (moe_silent_experts{window="5m"})'),
        Recording("engine:moe_router_entropy:min5m", "min without (layer) (engine_layer:moe_router_entropy:mean5m)"),
        Recording("engine:moe_router_collapsed_layers:count5m", _COLLAPSED),
        Recording(
            "engine:moe_ep_rank_imbalance:max5m",
            'max without (layer, window) (moe_ep_rank_imbalance_ratio{window="5m"})',
        ),
        Recording(
            "engine:moe_ep_rank_imbalance:excess5m",
            "max without (layer, window) (\n"
            '  moe_ep_rank_imbalance_ratio{window="5m"} / ignoring (window) moe_ep_rank_imbalance_limit_ratio\n'
            ")",
        ),
    ),
)

RANKS = Group(
    "moe-monitor-ranks",
    "30s",
    (
        Recording(
            "server_layer_rank:moe_ep_rank_tokens:rate5m",
            "sum without (engine) (rate(moe_ep_rank_tokens_total[5m]))",
        ),
        Recording(
            "server_rank:moe_ep_rank_tokens:rate5m",
            "sum without (layer) (server_layer_rank:moe_ep_rank_tokens:rate5m)",
        ),
        # A layer takes as long as its busiest rank: the time that even load would save, of the layers' time.
        Recording(
            "server:moe_ep_balance_gain:ratio5m",
            "1\n-\nsum without (layer) (avg without (ep_rank) (server_layer_rank:moe_ep_rank_tokens:rate5m))\n/\n"
            "(sum without (layer) (max without (ep_rank) (server_layer_rank:moe_ep_rank_tokens:rate5m)) > 0)",
        ),
    ),
)

MODELS = Group(
    "moe-monitor-models",
    "30s",
    (
        # The worst server, not the mean: among many servers the mean would hide one that has collapsed.
        Recording(
            "model_layer:moe_router_entropy:min5m",
            "min by (job, model_name, layer) (engine_layer:moe_router_entropy:mean5m)",
        ),
        Recording(
            "model_layer:moe_router_selected_mass:max5m",
            "max by (job, model_name, layer) (engine_layer:moe_router_selected_mass:mean5m)",
        ),
        Recording(
            "model_layer:moe_load_imbalance:max5m",
            'max by (job, model_name, layer) (moe_load_imbalance_ratio{window="5m"})',
        ),
        Recording(
            "model_layer:moe_load_imbalance:excess5m",
            "max by (job, model_name, layer) (engine_layer:moe_load_imbalance:excess5m)",
        ),
        Recording(
            "model_layer:moe_routing_drift:excess5m",
            "max by (job, model_name, layer) (engine_layer:moe_routing_drift:excess5m)",
        ),
    ),
)

#: Mean of a stage of each layer; what the sampled steps of five minutes are too few for is left out where it matters.
_LAYER_MEAN = """\
rate(moe_layer_duration_seconds_sum{matchers}[5m])
/
(rate(moe_layer_duration_seconds_count{matchers}[5m]) > {least})"""

#: Batch sizes of the passes that layer durations are of: to those, a pass with any prompt token is a prefill.
_STEP_TOKENS = """\
rate(moe_step_tokens_sum{kind="decode"}[5m])
/
(rate(moe_step_tokens_count{kind="decode"}[5m]) > 0)
or
label_replace(
  sum without (kind) (rate(moe_step_tokens_sum{kind=~"prefill|mixed"}[5m]))
  /
  (sum without (kind) (rate(moe_step_tokens_count{kind=~"prefill|mixed"}[5m])) > 0),
  "kind", "prefill", "", ""
)"""

#: Ten sampled steps in five minutes are the least that a comparison is made with.
_LEAST = f"{10 / 300:.3f}"

#: The slowest layer's mean, under the class of batch sizes that it was measured at: half powers of two, so that
#: the history of a series holds comparable steps only. ``count_values`` is how a value becomes a label.
_SLOWEST = """\
max without (layer, stage) (
  {mean}
)
* ignoring (batch) group_left (batch)
count_values without () ("batch", round(2 ^ (round(2 * log2(engine:moe_step_tokens:mean5m)) / 2)))""".format(
    mean=_LAYER_MEAN.replace("{matchers}", '{stage="layer"}').replace("{least}", _LEAST).replace("\n", "\n  ")
)

_OVER_PAST = """\
engine_batch:moe_layer_duration_seconds:max5m
/
(
  quantile_over_time(0.5, engine_batch:moe_layer_duration_seconds:max5m[6h] offset 30m)
  and
  count_over_time(engine_batch:moe_layer_duration_seconds:max5m[6h] offset 30m) >= 20
)"""

#: A rank's share of the time of the experts, over its share of their load where that is above the mean: time grows at
#: most as load does, so on equal devices this is at most 1. Ranks of one engine only: others sample steps of their own.
_TIME_OVER_LOAD = """\
(
  rate(moe_ep_rank_experts_seconds_total[5m])
  / ignoring (ep_rank) group_left ()
  (avg without (ep_rank) (rate(moe_ep_rank_experts_seconds_total[5m])) > 0)
)
/ ignoring (engine) group_left ()
clamp_min(
  server_rank:moe_ep_rank_tokens:rate5m
  / ignoring (ep_rank) group_left ()
  (avg without (ep_rank) (server_rank:moe_ep_rank_tokens:rate5m) > 0),
  1
)"""


def _ratio(above: str, below: str, how: str) -> str:
    """``how`` is an aggregation over engines or layers."""
    return f"{how} (rate({above}[5m]))\n/\n({how} (rate({below}[5m])) > 0)"


_TIMED = "moe_layer_duration_seconds"
_OF_LAYER = "sum by (job, model_name, layer, stage, kind)"

LATENCY = Group(
    "moe-monitor-latency",
    "30s",
    (
        Recording("engine:moe_step_tokens:mean5m", _STEP_TOKENS),
        Recording(
            "engine:moe_layer_duration_seconds:mean5m",
            _ratio(f"{_TIMED}_sum", f"{_TIMED}_count", "sum without (layer)"),
        ),
        Recording("engine_batch:moe_layer_duration_seconds:max5m", _SLOWEST),
        Recording(
            "engine:moe_step_moe:share5m",
            "rate(moe_step_moe_seconds_total[5m])\n/\n(rate(moe_step_timed_seconds_total[5m]) > 0)",
        ),
        Recording("engine:moe_imbalance_cost:mean", "avg without (layer) (moe_imbalance_cost_ratio)"),
        Recording("engine_rank:moe_ep_rank_experts_time:excess5m", _TIME_OVER_LOAD),
        Recording(
            "model_layer:moe_layer_duration_seconds:mean5m", _ratio(f"{_TIMED}_sum", f"{_TIMED}_count", _OF_LAYER)
        ),
        Recording(
            "model_layer:moe_layer_duration_seconds:max5m",
            "max by (job, model_name, layer, kind) (\n  "
            + _LAYER_MEAN.replace("{matchers}", '{stage="layer"}').replace("{least}", "0").replace("\n", "\n  ")
            + "\n)",
        ),
        Recording(
            "model_layer:moe_layer_flops:rate5m",
            "sum by (job, model_name, layer, kind) (rate(moe_layer_sampled_flops_total[5m]))\n/\n"
            f'(sum by (job, model_name, layer, kind) (rate({_TIMED}_sum{{stage="experts"}}[5m])) > 0)',
        ),
        Recording("model_layer:moe_imbalance_cost:mean", "avg by (job, model_name, layer) (moe_imbalance_cost_ratio)"),
        Recording(
            "model_kind_le:moe_step_duration_seconds:rate5m",
            "sum by (job, model_name, kind, le) (rate(moe_step_duration_seconds_bucket[5m]))",
        ),
        Recording(
            "model_kind:moe_step_duration_seconds:mean5m",
            _ratio(
                "moe_step_duration_seconds_sum", "moe_step_duration_seconds_count", "sum by (job, model_name, kind)"
            ),
        ),
        # vLLM's own, to stand beside ours. Means, because its first bucket of the inter-token latency ends at 10 ms.
        *(
            recording
            for name in ("inter_token_latency_seconds", "time_to_first_token_seconds")
            for recording in (
                Recording(
                    f"model:vllm_{name}:mean5m",
                    _ratio(f"vllm:{name}_sum", f"vllm:{name}_count", "sum by (job, model_name)"),
                ),
                Recording(
                    f"model_le:vllm_{name}:rate5m", f"sum by (job, model_name, le) (rate(vllm:{name}_bucket[5m]))"
                ),
            )
        ),
    ),
)

#: Reads six hours of one series an engine, kind and batch size.
PAST = Group("moe-monitor-past", "1m", (Recording("engine_batch:moe_layer_duration_seconds:over_past", _OVER_PAST),))

REQUESTS = Group(
    "moe-monitor-requests",
    "30s",
    (
        *(
            Recording(f"model_le:{metric}:rate5m", f"sum by (job, model_name, le) (rate({metric}_bucket[5m]))")
            for metric in ("moe_request_entropy_ratio", "moe_request_concentration_ratio", "moe_request_drift_bits")
        ),
        *(
            Recording(
                f"model_quartile_le:{metric}:rate5m",
                f"sum by (job, model_name, quartile, le) (rate({metric}_bucket[5m]))",
            )
            for metric in ("moe_request_e2e_seconds", "moe_request_ttft_seconds", "moe_request_tpot_seconds")
        ),
    ),
)

GROUPS = (MATRIX, LAYERS, ENGINES, MODELS, RANKS, LATENCY, PAST, REQUESTS)
NAMES = tuple(rule.name for group in GROUPS for rule in group.rules)
