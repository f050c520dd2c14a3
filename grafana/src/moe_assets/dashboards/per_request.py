"""5 Requests: the traced ones, how concentrated their routing is, and whether that makes them slow."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import dashboard as builders

from moe_assets.frame import dashboard
from moe_assets.panels import ENGINE, MODEL, Query, Row, Spec, assemble, lines, number, rows_over_time, words

UID = "moe-monitor-requests"
NONE = "none traced"

_HELP = """\
The dots on **Concentration, with traces** are exemplars: each is one traced request. Click a dot to open its trace; \
the span `moe.routing` under vLLM's `llm_request` tells its layers and experts.

Without dots: exemplar storage is off in Prometheus (`--enable-feature=exemplar-storage`), or the Prometheus data \
source has no link to the trace store (*Exemplars* in its settings, label `trace_id`). \
[All traced requests](/explore?left=%7B%22datasource%22:%22${traces}%22,%22queries%22:%5B%7B%22queryType%22:\
%22traceql%22,%22query%22:%22%7Bname%3D%5C%22moe.routing%5C%22%7D%22%7D%5D%7D)
"""


def _quantile(q: float, record: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) ({record}:rate5m{{{MODEL}}}))"


def _now() -> Row:
    entries = [
        (
            "Traced requests",
            "Sampled requests per second.",
            f"sum(rate(moe_monitor_sampled_requests_total{{{ENGINE}}}[5m]))",
            "reqps",
            2,
        ),
        (
            "Concentration, median",
            (
                "Busiest expert's load of a request over what chance gives for as many tokens. 1: no more concentrated "
                "than chance."
            ),
            _quantile(0.5, "model_le:moe_request_concentration_ratio"),
            "short",
            2,
        ),
        (
            "Concentration, 99th percentile",
            "The most concentrated requests: long repetitions, or one very narrow subject.",
            _quantile(0.99, "model_le:moe_request_concentration_ratio"),
            "short",
            2,
        ),
        (
            "Router entropy, median",
            "Of a request's tokens.",
            _quantile(0.5, "model_le:moe_request_entropy_ratio"),
            "percentunit",
            0,
        ),
        (
            "Drift from the fleet, median",
            (
                "Jensen-Shannon divergence of a request from the fleet's recent load. Short requests "
                "differ more by chance."
            ),
            _quantile(0.5, "model_le:moe_request_drift_bits"),
            "suffix: bit",
            3,
        ),
    ]
    panels = [
        (number(Spec(title, about, [Query(expr)], unit, decimals=decimals, no_value=NONE)), width)
        for (title, about, expr, unit, decimals), width in zip(entries, (4, 5, 5, 5, 5), strict=True)
    ]
    return Row("Now", 4, panels)


def _distribution() -> Row:
    buckets = Query(f"sum by (le) (model_le:moe_request_concentration_ratio:rate5m{{{MODEL}}})", "{{le}}")
    spread = rows_over_time(
        Spec(
            "Concentration of requests", "Requests per second in each bucket.", [buckets], "short", low=0, no_value=NONE
        ),
        "concentration",
        scheme="Oranges",
        reverse=False,
        buckets=True,
    )
    # Exemplars come with the metric itself only, not with what a rule made of it.
    raw = f"sum by (le) (rate(moe_request_concentration_ratio_bucket{{{ENGINE}}}[5m]))"
    traced = lines(
        Spec(
            "Concentration, with traces",
            "Each dot is a traced request; click it to open the trace.",
            [
                Query(f"histogram_quantile(0.99, {raw})", "99th percentile", exemplars=True),
                Query(f"histogram_quantile(0.5, {raw})", "median"),
            ],
            decimals=2,
            low=0,
            no_value=NONE,
        )
    )
    return Row("How concentrated are requests?", 9, [(spread, 9), (traced, 9), (words("Open a trace", _HELP), 6)])


def _latency() -> Row:
    def by_quartile(title: str, about: str, metric: str, q: float) -> Any:
        expr = _quantile(q, f"model_quartile_le:{metric}", "quartile")
        names = Query(expr, "quartile {{quartile}}")
        return lines(Spec(title, about, [names], "s", low=0, no_value=NONE))

    about = (
        "By quartile of routing concentration: 1 spread over most experts, 4 on fewest. Lines apart: concentrated "
        "requests are served slower. Lines together: routing is not what makes them slow."
    )
    return Row(
        "Are concentrated requests slower? Quartile 1: spread over most experts, 4: on fewest",
        9,
        [
            (by_quartile("Time to first token, 95th percentile", about, "moe_request_ttft_seconds", 0.95), 8),
            (by_quartile("Time per output token, median", about, "moe_request_tpot_seconds", 0.5), 8),
            (by_quartile("Whole request, 95th percentile", about, "moe_request_e2e_seconds", 0.95), 8),
        ],
    )


def build() -> dict[str, Any]:
    about = "Traced requests: how concentrated their routing is, whether that makes them slow, and their traces."
    made = dashboard(UID, about)
    store = builders.DatasourceVariable("traces").label("Trace store").type("tempo")
    return assemble(made.with_variable(store), [_now(), _distribution(), _latency()])
