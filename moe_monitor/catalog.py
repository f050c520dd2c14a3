"""Every metric once: name, kind, unit, labels, buckets and help.

The exposition, the dashboards, the alert rules and ``docs/metrics.md`` are all made from this table, so a metric
that is not here does not exist. Names follow Prometheus conventions: base units, ``_total``, ``_seconds``, ``_ratio``.
Prefix ``moe_``: vLLM unregisters every collector whose name starts with ``vllm:``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "info"]

#: Labels that every metric carries, with vLLM's own meaning.
IDENTITY = ("model_name", "engine")

#: Upper bounds (inclusive) of histogram buckets; Prometheus adds +Inf.
ENTROPY_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)
PROBABILITY_BUCKETS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MASS_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
ACTIVE_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
PER_TOKEN_BUCKETS = (0, 1, 2, 4, 6, 8, 10, 12, 16)
CONCENTRATION_BUCKETS = (0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8)
DRIFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
PER_OUTPUT_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6)
#: From 5 us, a single decode stage on a fast GPU, to 50 ms, a long prefill.
LAYER_SECONDS_BUCKETS = (5e-6, 1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
STEP_SECONDS_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
STEP_TOKENS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

#: Stages of an MoE layer. router: gate and top-k. experts: dispatch, expert GEMMs (shared experts too), combine.
#: layer: the whole block, router and experts.
STAGES = ("router", "experts", "layer")
#: Kinds of forward passes: no request has more tokens than a decode step gives it; all have; some have.
STEP_KINDS = ("decode", "prefill", "mixed")
#: Layer durations are split in two: a pass with prompt tokens is a prefill, mixed or not.
LAYER_KINDS = ("decode", "prefill")

#: Trailing windows of the imbalance gauges: label value -> seconds.
WINDOWS = {"1m": 60.0, "5m": 300.0}


@dataclass(frozen=True)
class Metric:
    """One metric family. ``name`` is the full exposed name; ``labels`` come after :data:`IDENTITY`."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert self.name.startswith("moe_")
        assert (self.kind == "counter") == self.name.endswith("_total")
        assert (self.kind == "histogram") == bool(self.buckets)


METRICS: tuple[Metric, ...] = (
    # load
    Metric(
        "moe_expert_tokens_total",
        "counter",
        "tokens",
        "Tokens routed to an expert, by layer and logical expert.",
        ("layer", "expert"),
    ),
    Metric("moe_routed_tokens_total", "counter", "tokens", "Tokens that passed a layer's router.", ("layer",)),
    Metric(
        "moe_nonfinite_tokens_total",
        "counter",
        "tokens",
        "Tokens whose router logits held NaN or +infinity; counted as routed, left out of the router histograms.",
        ("layer",),
    ),
    Metric(
        "moe_forward_passes_total",
        "counter",
        "passes",
        "Forward passes of the model with at least one real token (no warm-up, capture or dummy pass).",
    ),
    Metric(
        "moe_flops_total",
        "counter",
        "FLOPs",
        "Floating-point operations of the MoE blocks for the routed tokens, by component; a multiply-add counts 2.",
        ("component",),
    ),
    # router
    Metric(
        "moe_router_entropy_ratio",
        "histogram",
        "ratio",
        "Entropy of a token's routing distribution over ln(experts): 0 one expert certain, 1 uniform.",
        ("layer",),
        ENTROPY_BUCKETS,
    ),
    Metric(
        "moe_router_top1_probability",
        "histogram",
        "probability",
        "Probability of a token's likeliest expert.",
        ("layer",),
        PROBABILITY_BUCKETS,
    ),
    Metric(
        "moe_router_selected_mass_ratio",
        "histogram",
        "ratio",
        "Probability mass of the experts that a token was routed to.",
        ("layer",),
        MASS_BUCKETS,
    ),
    Metric(
        "moe_experts_per_token",
        "histogram",
        "experts",
        "Experts that a token was routed to.",
        ("layer",),
        PER_TOKEN_BUCKETS,
    ),
    Metric(
        "moe_active_experts",
        "histogram",
        "experts",
        "Distinct experts that one forward pass used.",
        ("layer",),
        ACTIVE_BUCKETS,
    ),
    # expert parallelism
    Metric(
        "moe_ep_rank_tokens_total",
        "counter",
        "tokens",
        "Tokens of this engine routed to the experts of an expert-parallel rank, by vLLM's own placement.",
        ("layer", "ep_rank"),
    ),
    Metric(
        "moe_ep_rank_imbalance_ratio",
        "gauge",
        "ratio",
        "Load of the busiest expert-parallel rank over the mean rank, in the window, over all engines of the server "
        "on this node. The same value stands under each of its engines.",
        ("layer", "window"),
    ),
    Metric(
        "moe_ep_rank_experts_seconds_total",
        "counter",
        "seconds",
        "Time of the experts stage on an expert-parallel rank, all layers, over the sampled steps.",
        ("ep_rank",),
    ),
    Metric(
        "moe_ep_straggler_wait_ratio",
        "gauge",
        "ratio",
        "Share of the slowest rank's experts time that this rank spends waiting for it, over the last sampled steps.",
        ("ep_rank",),
    ),
    # time, by the device's own clock, on sampled steps
    Metric(
        "moe_layer_duration_seconds",
        "histogram",
        "seconds",
        "Time of an MoE layer on sampled steps, by stage: router (gate and top-k), experts (dispatch, expert GEMMs, "
        "combine), layer (both).",
        ("layer", "stage", "kind"),
        LAYER_SECONDS_BUCKETS,
    ),
    Metric(
        "moe_step_duration_seconds",
        "histogram",
        "seconds",
        "Time of the model's forward pass on sampled steps, by kind: decode, prefill, or mixed.",
        ("kind",),
        STEP_SECONDS_BUCKETS,
    ),
    Metric(
        "moe_step_tokens",
        "histogram",
        "tokens",
        "Tokens of the sampled steps: the batch sizes that the durations belong to.",
        ("kind",),
        STEP_TOKENS_BUCKETS,
    ),
    Metric(
        "moe_step_moe_seconds_total",
        "counter",
        "seconds",
        "Time in MoE layers within the sampled steps whose layers were timed.",
        ("kind",),
    ),
    Metric(
        "moe_step_timed_seconds_total",
        "counter",
        "seconds",
        "Time of the sampled steps whose layers were timed; moe_step_moe_seconds_total over this is the MoE share.",
        ("kind",),
    ),
    Metric(
        "moe_layer_sampled_flops_total",
        "counter",
        "FLOPs",
        "FLOPs of the expert GEMMs in the sampled steps; over the experts seconds of moe_layer_duration_seconds this "
        "is the achieved rate.",
        ("layer", "kind"),
    ),
    Metric(
        "moe_imbalance_cost_ratio",
        "gauge",
        "ratio",
        "Estimated experts time of the observed load over that of a perfectly balanced one, over recent sampled "
        "steps; below 1 the imbalance saves time, as when fewer experts' weights are read.",
        ("layer",),
    ),
    Metric(
        "moe_imbalance_cost_error_ratio",
        "gauge",
        "ratio",
        "Median relative error of the model behind moe_imbalance_cost_ratio, on sampled steps that it was not fitted "
        "to.",
    ),
    # balance over a trailing window
    Metric(
        "moe_load_imbalance_ratio",
        "gauge",
        "ratio",
        "Load of the busiest expert over the mean load, in the window. 1 is balanced.",
        ("layer", "window"),
    ),
    Metric(
        "moe_load_imbalance_floor_ratio",
        "gauge",
        "ratio",
        "moe_load_imbalance_ratio that uniform routing of as many tokens would show by chance.",
        ("layer", "window"),
    ),
    Metric(
        "moe_load_cv_ratio",
        "gauge",
        "ratio",
        "Coefficient of variation of expert load in the window: standard deviation over mean.",
        ("layer", "window"),
    ),
    Metric(
        "moe_load_gini_ratio",
        "gauge",
        "ratio",
        "Gini coefficient of expert load in the window: 0 balanced, towards 1 all on one expert.",
        ("layer", "window"),
    ),
    Metric(
        "moe_load_entropy_ratio",
        "gauge",
        "ratio",
        "Entropy of expert load in the window over ln(experts): 1 balanced.",
        ("layer", "window"),
    ),
    Metric("moe_idle_experts", "gauge", "experts", "Experts without a token in the window.", ("layer", "window")),
    Metric("moe_window_tokens", "gauge", "tokens", "Tokens routed in the window.", ("layer", "window")),
    # against the deployment's own baseline; only where MOE_MONITOR_BASELINE names one
    Metric(
        "moe_routing_drift_bits",
        "gauge",
        "bits",
        "Jensen-Shannon divergence of the load in the window from the baseline: 0 the same, 1 nothing in common.",
        ("layer", "window"),
    ),
    Metric(
        "moe_routing_drift_floor_bits",
        "gauge",
        "bits",
        "moe_routing_drift_bits that sampling alone explains for as many tokens.",
        ("layer", "window"),
    ),
    Metric(
        "moe_routing_drift_limit_bits",
        "gauge",
        "bits",
        "Highest normal moe_routing_drift_bits: what the baseline's own variability and sampling explain, with margin.",
        ("layer", "window"),
    ),
    Metric(
        "moe_load_imbalance_limit_ratio",
        "gauge",
        "ratio",
        "moe_load_imbalance_ratio that no change of traffic explains, by the baseline.",
        ("layer", "window"),
    ),
    Metric(
        "moe_load_cv_limit_ratio",
        "gauge",
        "ratio",
        "moe_load_cv_ratio that no change of traffic explains, by the baseline.",
        ("layer", "window"),
    ),
    Metric(
        "moe_silent_experts",
        "gauge",
        "experts",
        "Experts without a token in the window for which the baseline expects at least 1,000.",
        ("layer", "window"),
    ),
    Metric(
        "moe_ep_rank_imbalance_limit_ratio",
        "gauge",
        "ratio",
        "Highest normal moe_ep_rank_imbalance_ratio: the baseline's load on the present placement, with margin.",
        ("layer",),
    ),
    Metric(
        "moe_baseline_usable",
        "gauge",
        "boolean",
        "1 when the baseline fits this engine, 0 when it is unreadable or of another model; absent when none is set.",
    ),
    Metric("moe_baseline_timestamp_seconds", "gauge", "seconds", "When the baseline was recorded, Unix time."),
    Metric(
        "moe_baseline_drift_bits",
        "gauge",
        "bits",
        "Mean divergence of the baseline's windows from each other: the deployment's own variability.",
        ("layer",),
    ),
    Metric(
        "moe_baseline_imbalance_ratio",
        "gauge",
        "ratio",
        "Largest moe_load_imbalance_ratio of the baseline's windows.",
        ("layer",),
    ),
    Metric("moe_baseline_router_entropy_ratio", "gauge", "ratio", "Mean router entropy in the baseline.", ("layer",)),
    Metric("moe_baseline_selected_mass_ratio", "gauge", "ratio", "Mean selected mass in the baseline.", ("layer",)),
    Metric(
        "moe_baseline_ep_rank_imbalance_ratio",
        "gauge",
        "ratio",
        "Expert-parallel rank imbalance of the baseline's load on the present placement.",
        ("layer",),
    ),
    # traced requests; each is counted once, by the API server that answered it
    Metric(
        "moe_request_entropy_ratio",
        "histogram",
        "ratio",
        "Mean router entropy over ln(experts) of a traced request's tokens, over all layers.",
        (),
        ENTROPY_BUCKETS,
    ),
    Metric(
        "moe_request_concentration_ratio",
        "histogram",
        "ratio",
        "Busiest expert's load of a traced request over what uniform routing of as many tokens would show by chance, "
        "mean over layers: 1 is no more concentrated than chance.",
        (),
        CONCENTRATION_BUCKETS,
    ),
    Metric(
        "moe_request_drift_bits",
        "histogram",
        "bits",
        "Jensen-Shannon divergence of a traced request's expert load from the engine's load of the last five minutes, "
        "mean over layers. Short requests differ more by chance.",
        (),
        DRIFT_BUCKETS,
    ),
    Metric(
        "moe_request_e2e_seconds",
        "histogram",
        "seconds",
        "Latency of traced requests, from arrival to the last token, by quartile of concentration among recent traced "
        "requests: 1 the least concentrated.",
        ("quartile",),
        LATENCY_BUCKETS,
    ),
    Metric(
        "moe_request_ttft_seconds",
        "histogram",
        "seconds",
        "Time to first token of traced requests, by quartile of concentration.",
        ("quartile",),
        LATENCY_BUCKETS,
    ),
    Metric(
        "moe_request_tpot_seconds",
        "histogram",
        "seconds",
        "Time per output token after the first of traced requests, by quartile of concentration.",
        ("quartile",),
        PER_OUTPUT_TOKEN_BUCKETS,
    ),
    # the model
    Metric("moe_model_experts", "gauge", "experts", "Logical experts of each MoE layer."),
    Metric("moe_model_top_k", "gauge", "experts", "Experts that the model routes each token to."),
    # the monitor itself
    Metric(
        "moe_monitor_info",
        "info",
        "",
        "Versions and the way routing is captured.",
        ("version", "producer", "capture", "scoring", "experts", "top_k", "layers"),
    ),
    Metric(
        "moe_monitor_active",
        "gauge",
        "boolean",
        "1 while routing is captured and published; 0 when the monitor is off, has failed, or capture is not live.",
    ),
    Metric(
        "moe_monitor_errors_total",
        "counter",
        "errors",
        "Failures inside the monitor. The first failure in the engine process switches capture off.",
        ("where",),
    ),
    Metric("moe_monitor_sampled_requests_total", "counter", "requests", "Requests whose tracing began."),
    Metric("moe_monitor_dropped_total", "counter", "items", "What was given up to stay within bounds.", ("what",)),
    Metric(
        "moe_monitor_snapshot_age_seconds",
        "gauge",
        "seconds",
        "Time since the slowest worker of the engine last published.",
    ),
    Metric(
        "moe_monitor_hook_seconds_total",
        "counter",
        "seconds",
        "Host time in the monitor's hooks on the serving path, but for a few instructions in each pass and router.",
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}
