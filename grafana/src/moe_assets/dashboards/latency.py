"""4 Latency: how long layers and passes take, whether that has changed, and what imbalance has to do with it."""

from __future__ import annotations

from typing import Any

from moe_assets.frame import dashboard, same_but_layer
from moe_assets.panels import (
    ENGINE,
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
    limit_line,
    lines,
    number,
    padded,
    right_axis,
    rows_over_time,
)

UID = "moe-monitor-latency"
NONE = "no timed steps"
NO_RANKS = "no expert parallelism"
KIND = 'kind="$kind"'

#: vLLM's own metrics come from its servers, which may be another scrape job than that of our exporters.
VLLM = 'model_name=~"$model"'
ITL, TTFT = "inter_token_latency_seconds", "time_to_first_token_seconds"

#: Of the same layers' past; the alert begins at the last.
PAST = [(None, GREEN), (1.2, YELLOW), (1.5, RED)]
PAST_RECORD = "engine_batch:moe_layer_duration_seconds:over_past"
COST = "engine:moe_imbalance_cost:mean"
WAIT = [(None, GREEN), (0.15, YELLOW), (0.3, RED)]


def _step(q: float, kind: str) -> str:
    record = f'model_kind_le:moe_step_duration_seconds:rate5m{{{MODEL},kind=~"{kind}"}}'
    return f"histogram_quantile({q}, sum by (le) ({record}))"


def _mean_step(kind: str) -> str:
    return f'max(model_kind:moe_step_duration_seconds:mean5m{{{MODEL},kind=~"{kind}"}})'


def _mean(name: str) -> str:
    return f"max(model:vllm_{name}:mean5m{{{VLLM}}})"


def _vllm(q: float, name: str) -> str:
    return f"histogram_quantile({q}, sum by (le) (model_le:vllm_{name}:rate5m{{{VLLM}}}))"


def _now() -> Row:
    entries: list[tuple[str, str, str, str, Any, int, str, int]] = [
        (
            "Layer time, of its own past",
            (
                "Slowest MoE layer of the worst engine, in multiples of its median over the last six hours at the same "
                "kind and size of batch. The alert begins at 1.5."
            ),
            f"max({PAST_RECORD}{{{ENGINE}}})",
            TIMES,
            PAST,
            2,
            "no comparable past",
            5,
        ),
        (
            "MoE share of a decode step",
            (
                "Part of the forward pass that is spent in MoE layers; median engine. A slow step with a usual share: "
                "look at attention, communication or the device instead."
            ),
            f'quantile(0.5, engine:moe_step_moe:share5m{{{ENGINE},kind="decode"}})',
            "percentunit",
            None,
            0,
            NONE,
            4,
        ),
        (
            "Decode step",
            "Mean. Forward pass of a step that only decodes, on sampled steps, by the device's clock.",
            _mean_step("decode"),
            "s",
            None,
            1,
            NONE,
            3,
        ),
        (
            "Inter-token latency",
            "Mean, by vLLM, as clients see it.",
            _mean(ITL),
            "s",
            None,
            1,
            "not scraped",
            3,
        ),
        (
            "Time to first token",
            "Mean, by vLLM, queueing included.",
            _mean(TTFT),
            "s",
            None,
            0,
            "not scraped",
            3,
        ),
        (
            "Imbalance costs",
            (
                "Estimated time of the experts beyond that of a balanced load; worst engine, mean over layers. "
                "Below 0: the imbalance saves time, because fewer experts' weights are read."
            ),
            f"max({COST}{{{ENGINE}}}) - 1",
            "percentunit",
            [(None, GREEN), (0.15, YELLOW)],
            0,
            "too few steps",
            3,
        ),
        (
            "Longest wait of a rank",
            "Share of the slowest rank's experts time that another rank spends waiting for it.",
            f"max(moe_ep_straggler_wait_ratio{{{ENGINE}}})",
            "percentunit",
            WAIT,
            0,
            "no ranks",
            3,
        ),
    ]
    panels = [
        (
            number(
                Spec(title, about, [Query(expr)], unit, decimals=decimals, no_value=empty)
                if steps is None
                else Spec(title, about, [Query(expr)], unit, steps, decimals, no_value=empty)
            ),
            width,
        )
        for title, about, expr, unit, steps, decimals, empty, width in entries
    ]
    return Row("Is it slow, and is it the MoE layers?", 4, panels)


def _since() -> Row:
    past = lines(
        Spec(
            "Layer time, of its own past",
            "Same kind and size of batch, so a change of traffic does not move it. Worst and median apart: one server. "
            "Both up: a new version, the model, or routing that wakes more experts. After about three hours what was "
            "slow is the past, and the line comes back to 1.",
            [
                Query(f"max({PAST_RECORD}{{{ENGINE}}})", "worst engine"),
                Query(f"quantile(0.5, {PAST_RECORD}{{{ENGINE}}})", "median engine"),
            ],
            TIMES,
            [(None, GREEN), (1.5, RED)],
            decimals=2,
            low=0,
            no_value="no comparable past",
        )
    )
    tokens = lines(
        Spec(
            "Decode step, and what clients see",
            "Step: the forward pass alone, on sampled steps. Latency far above the step: the time goes elsewhere, to "
            "prefills between decode steps, scheduling or the front end. Of vLLM's latency the mean: its buckets are "
            "too wide for percentiles of a few milliseconds.",
            [
                Query(_mean_step("decode"), "decode step, mean"),
                Query(_step(0.95, "decode"), "decode step, 95th percentile"),
                Query(_mean(ITL), "vLLM inter-token latency, mean"),
            ],
            "s",
            low=0,
            no_value=NONE,
        )
    )
    first = lines(
        Spec(
            "Steps with prompts, and time to first token",
            "Steps of prompts alone, or of prompts and decoding, whichever is slower. Latency far above the step: "
            "requests queue, or their prompts take several steps.",
            [
                Query(_mean_step("prefill|mixed"), "step with prompts, mean"),
                Query(_step(0.95, "prefill|mixed"), "step with prompts, 95th percentile"),
                Query(_mean(TTFT), "vLLM time to first token, mean"),
                Query(_vllm(0.95, TTFT), "vLLM time to first token, 95th percentile"),
            ],
            "s",
            low=0,
            no_value=NONE,
        )
    )
    return Row("Since when?", 9, [(past, 8), (tokens, 8), (first, 8)])


def _imbalance() -> Row:
    skew = Query(f"quantile(0.5, engine:moe_load_imbalance:max5m{{{ENGINE}}})", "imbalance, worst layer")

    def beside(title: str, name: str, what: str) -> Any:
        about = (
            f"Mean {what} by vLLM (left) and max/mean of expert load in the worst layer, median engine (right). Both "
            "rise together: read on at the right. Only the latency rises: imbalance is not the cause."
        )
        queries = [Query(_mean(name), f"{what}, mean"), skew]
        panel = lines(Spec(title, about, queries, "s", low=0, no_value="no data"))
        return right_axis(panel, "imbalance, worst layer", "short", "orange", 1)

    error = f"max(moe_imbalance_cost_error_ratio{{{ENGINE}}})"
    cost = lines(
        Spec(
            "What imbalance costs",
            "Estimated time of the experts over that of a balanced load, mean over layers. Dashed: the worst engine's "
            "estimate with its error, the median error on steps that the model was not fitted to. A band across 0: not "
            "known to cost anything.",
            [
                Query(f"max({COST}{{{ENGINE}}}) - 1", "worst engine"),
                Query(f"quantile(0.5, {COST}{{{ENGINE}}}) - 1", "median engine"),
                Query(f"max({COST}{{{ENGINE}}}) * (1 + {error}) - 1", "with error, high"),
                Query(f"max({COST}{{{ENGINE}}}) * (1 - {error}) - 1", "with error, low"),
            ],
            "percentunit",
            decimals=0,
            no_value="too few timed steps",
        )
    )
    for name in ("with error, high", "with error, low"):
        cost = limit_line(cost, name, "gray")
    panels = [
        (beside("Imbalance and inter-token latency", ITL, "inter-token latency"), 8),
        (beside("Imbalance and time to first token", TTFT, "time to first token"), 8),
        (cost, 8),
    ]
    return Row("Is it imbalance?", 9, panels)


def _layers() -> list[Row]:
    slow = padded(f"model_layer:moe_layer_duration_seconds:max5m{{{MODEL},{KIND}}}", "layer")
    heat = rows_over_time(
        Spec(
            "Time of each layer in $kind steps",
            "Mean over five minutes, worst server. One row: a layer. All rows: device, batch size, version.",
            [Query(slow, "{{row}}")],
            "s",
            no_value=NONE,
        ),
        "layer",
        scheme="Oranges",
        reverse=False,
    )
    mean = f"engine:moe_layer_duration_seconds:mean5m{{{ENGINE},{KIND}"
    stages = lines(
        Spec(
            "Stages of a layer in $kind steps",
            "Mean over all layers, median engine. Router: gate and top-k. Experts: dispatch, GEMMs, combine.",
            [
                Query(f'quantile(0.5, {mean},stage="router"}})', "router"),
                Query(f'quantile(0.5, {mean},stage="experts"}})', "experts"),
            ],
            "s",
            low=0,
            no_value="stages not shown; see `moe-monitor export`",
        ),
        stacked=True,
    )
    one = f'{MODEL},instance="$server",layer="$layer",stage="layer",{KIND}'
    spread = rows_over_time(
        Spec(
            "Layer $layer on $server in $kind steps",
            "Sampled steps per second in each bucket of duration. Two bands: two kinds of steps. A tail: something "
            "interrupts the layer.",
            [Query(f"sum by (le) (rate(moe_layer_duration_seconds_bucket{{{one}}}[5m]))", "{{le}}")],
            "s",
            low=0,
            no_value=NONE,
        ),
        "duration",
        scheme="Oranges",
        reverse=False,
        buckets=True,
    )

    def by_layer(record: str, matchers: str, how: str = "max") -> str:
        return f"{how} by (layer) (model_layer:{record}{{{MODEL}{matchers}}})"

    layer_mean = "moe_layer_duration_seconds:mean5m"
    columns = [
        Column(by_layer("moe_layer_duration_seconds:max5m", ',kind="decode"'), "Worst server", "s", decimals=0),
        Column(by_layer(layer_mean, ',stage="layer",kind="decode"'), "Decode", "s", decimals=0),
        Column(by_layer(layer_mean, ',stage="router",kind="decode"'), "Router", "s", decimals=0),
        Column(by_layer(layer_mean, ',stage="experts",kind="decode"'), "Experts", "s", decimals=0),
        Column(by_layer(layer_mean, ',stage="layer",kind="prefill"'), "Prefill", "s", decimals=0),
        Column(by_layer("moe_layer_flops:rate5m", ',kind="prefill"'), "FLOP/s, prefill", "flops", decimals=1),
        Column(by_layer("moe_imbalance_cost:mean", "") + " - 1", "Imbalance costs", "percentunit", decimals=0),
        Column(by_layer("moe_load_imbalance:max5m", ""), "Max/mean", decimals=1),
    ]
    table = joined(
        "Layers, slowest first",
        "Mean time in decode steps on the worst server, and on all; the stages of the latter; time in steps with "
        "prompts; rate of the expert GEMMs; what imbalance costs.",
        [("layer", "Layer")],
        columns,
        "Worst server",
        [("This layer, above", same_but_layer(UID, "kind"))],
    )
    rate = padded(f"model_layer:moe_layer_flops:rate5m{{{MODEL},{KIND}}}", "layer")
    flops = rows_over_time(
        Spec(
            "Achieved FLOP/s of each layer's experts in $kind steps",
            "FLOPs of the expert GEMMs over their time, mean of all servers. Decode is bound by reading weights, so it "
            "rises with the batch; in prefill, far below what the device can: tokens too few for each expert.",
            [Query(rate, "{{row}}")],
            "flops",
            no_value="stages not shown; see `moe-monitor export`",
        ),
        "layer",
        scheme="Oranges",
        reverse=False,
    )
    return [
        Row("Which layer, which stage?", 10, [(heat, 9), (stages, 7), (spread, 8)]),
        Row("", 10, [(table, 14), (flops, 10)]),
    ]


def _where() -> Row:
    def vllm_mean(name: str) -> str:
        rates = [f"sum by (instance, engine) (rate(vllm:{name}_{end}{{{VLLM}}}[5m]))" for end in ("sum", "count")]
        return f"{rates[0]} / ({rates[1]} > 0)"

    def worst(expr: str) -> str:
        return f"max by (instance, engine) ({expr})"

    layer = f'engine:moe_layer_duration_seconds:mean5m{{{ENGINE},stage="layer",kind='
    columns = [
        Column(worst(f"{PAST_RECORD}{{{ENGINE}}}"), "Of its past", TIMES, PAST, 2),
        Column(worst(f'{layer}"decode"}}'), "Layer, decode", "s", decimals=0),
        Column(worst(f'{layer}"prefill"}}'), "Layer, prefill", "s", decimals=0),
        Column(worst(f'engine:moe_step_tokens:mean5m{{{ENGINE},kind="decode"}}'), "Batch", decimals=0),
        Column(worst(f'engine:moe_step_moe:share5m{{{ENGINE},kind="decode"}}'), "MoE share", "percentunit", decimals=0),
        Column(worst(f"{COST}{{{ENGINE}}} - 1"), "Imbalance costs", "percentunit", decimals=0),
        Column(worst(f"engine:moe_load_imbalance:max5m{{{ENGINE}}}"), "Max/mean", decimals=1),
        Column(vllm_mean(ITL), "ITL, mean", "s", decimals=1),
        Column(vllm_mean(TTFT), "TTFT, mean", "s", decimals=0),
    ]
    engines = joined(
        "Engines, slowest of their past first",
        "MoE layer times beside what vLLM measures; batch: tokens of a decode step, which times depend on. Empty: too "
        "few timed steps, or vLLM is scraped under another address.",
        [("instance", "Server"), ("engine", "Engine")],
        columns,
        "Of its past",
    )
    waits = rows_over_time(
        Spec(
            "Wait of each expert-parallel rank for the slowest",
            "Share of the slowest rank's time, longest of the chosen engines. A row that never waits while the others "
            "do: the straggler; compare with its load on Expert parallelism.",
            [Query(padded(f"max by (ep_rank) (moe_ep_straggler_wait_ratio{{{ENGINE}}})", "ep_rank"), "{{row}}")],
            "percentunit",
            low=0,
            high=0.5,
            no_value=NO_RANKS,
        ),
        "rank",
    )
    return Row("Which server, which rank?", 9, [(engines, 15), (waits, 9)])


def build() -> dict[str, Any]:
    about = (
        "Times of MoE layers and forward passes on sampled steps, beside what vLLM measures, and what imbalance costs."
    )
    made = dashboard(UID, about, layer="one", server=True, kind=True)
    return assemble(made, [_now(), _since(), _imbalance(), *_layers(), _where()])
