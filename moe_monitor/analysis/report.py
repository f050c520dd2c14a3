"""The report: one HTML file that needs nothing else, neither scripts nor network."""

from __future__ import annotations

import datetime as dt
import html
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_monitor import __version__
from moe_monitor.analysis import charts, dynamic_k
from moe_monitor.analysis.compare import DIFFERENT, Agreement, Comparison
from moe_monitor.analysis.records import Record
from moe_monitor.analysis.specialisation import Floats, co_activation
from moe_monitor.analysis.summary import Summary
from moe_monitor.analysis.tables import DASH, number, si
from moe_monitor.layout import edges

#: Tokens that an expert needs before its company is named.
LEAST_TOKENS = 50

_STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:#1c2430;background:#fff;
 max-width:1120px;margin:28px auto;padding:0 22px}
h1{font-size:25px;margin:0 0 2px}h2{font-size:18px;margin:34px 0 6px;border-bottom:1px solid #d9dee5;padding-bottom:4px}
h3{font-size:14px;margin:4px 0}p{margin:4px 0 10px;max-width:900px}.quiet{color:#5b6470}
.cards{display:flex;flex-wrap:wrap;gap:10px;margin:16px 0}.card{border:1px solid #d9dee5;border-radius:6px;
 padding:9px 14px;min-width:128px}.card b{display:block;font-size:20px}.card span{color:#5b6470;font-size:13px}
.row{display:flex;flex-wrap:wrap;gap:22px;align-items:flex-start}.third{width:306px}svg{max-width:100%;height:auto}
svg text{font:11.5px system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:#3c4653}.grid{stroke:#e3e7ec}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}th,td{padding:3px 6px;text-align:right;border-bottom:1px solid #e8ebef;white-space:nowrap}
th{color:#5b6470;font-weight:600;vertical-align:bottom;white-space:normal}td.l,th.l{text-align:left}
.verdict{border-left:4px solid #2e5896;background:#f3f6fa;padding:8px 14px;margin:10px 0;max-width:none}
.verdict.different{border-color:#c0622b;background:#fbf3ed}
@media print{body{margin:0}h2{break-after:avoid}.row,table{break-inside:avoid}}
"""


def _card(value: str, label: str) -> str:
    return f"<div class=card><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """``words``: columns that hold words, to be set from the left."""
    side = [" class=l" if i in words else "" for i in range(len(head))]
    cells = "".join(f"<th{c}>{html.escape(h)}</th>" for c, h in zip(side, head, strict=True))
    body = [[f"<td{c}>{html.escape(x)}</td>" for c, x in zip(side, row, strict=True)] for row in rows]
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in body)
    return f"<div class=wide><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>"


def _header(summary: Summary, title: str | None) -> str:
    facts, total = summary.facts, summary.total
    producer = f"{facts.get('producer') or ''} {facts.get('producer_version') or ''}".strip()
    now = dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    worst = total.get("load_imbalance_ratio_max")
    cards = [
        _card(f"{total['tokens']:,}", f"tokens in {total['passes']:,} passes"),
        _card(f"{facts['layers']} x {facts['experts']}", f"MoE layers x experts, top-{facts['top_k']}"),
        _card(si(total["flops_total"], "FLOP"), f"in MoE blocks, {si(total['flops_router'], 'FLOP')} of it routers"),
        _card(number(total["router_entropy_ratio_mean"]), "mean router entropy / ln(experts)"),
        _card(number(total["top1_probability_mean"]), "mean probability of the likeliest expert"),
        _card(f"{total['idle_experts']}", f"of {facts['layers'] * facts['experts']} experts idle"),
    ]
    if worst is not None:
        chance = number(total["load_imbalance_floor_ratio"], 2)
        said = f"largest max/mean load, layer {total['most_imbalanced_layer']} (chance alone: {chance})"
        cards.insert(3, _card(f"{worst:.2f}", said))
    if "layer_seconds_sum" in total:
        cards.append(_card(si(total["layer_seconds_sum"], "s"), "spent in MoE blocks"))
    name = html.escape(title or f"Expert routing of {facts['model_name']}")
    return (
        f"<h1>{name}</h1><p class=quiet>{html.escape(str(facts['model_name']))} &middot; {html.escape(producer)} "
        f"&middot; {html.escape(str(facts['scoring']))} router &middot; moe-monitor {__version__} &middot; {now}</p>"
        f"<div class=cards>{''.join(cards)}</div>"
    )


def _load(summary: Summary) -> str:
    ticks = ((0, "1/4"), (0.25, "1/2"), (0.5, "1"), (0.75, "2"), (1, "4+"))
    return (
        "<h2>Load: layers x experts</h2><p>Tokens of an expert over the mean of its layer. Black: not one token. "
        "Point at a cell for its numbers.</p>"
        + charts.legend(charts.DIVERGING, ticks, "tokens / mean tokens of the layer")
        + "<br>"
        + charts.load_map(summary.counts, summary.layers)
    )


def _by_layer(summary: Summary) -> str:
    rows, labels = summary.rows, [str(layer) for layer in summary.layers]

    def column(name: str) -> list[float | None]:
        return [row.get(name) for row in rows]

    entropy = charts.lines(
        {
            "router, mean of tokens": column("router_entropy_ratio_mean"),
            "load over experts": column("load_entropy_ratio"),
        },
        labels,
        y_title="entropy / ln(experts)",
        high=1.0,
    )
    balance = charts.lines(
        {"max/mean load": column("load_imbalance_ratio"), "chance alone": column("load_imbalance_floor_ratio")},
        labels,
        y_title="max / mean load",
    )
    confidence = charts.lines(
        {
            "likeliest expert": column("top1_probability_mean"),
            "chosen experts together": column("selected_mass_ratio_mean"),
        },
        labels,
        y_title="probability, mean",
        high=1.0,
    )
    active = charts.lines(
        {"active per pass, mean": column("active_experts_mean"), "idle overall": column("idle_experts")},
        labels,
        y_title="experts",
        high=float(summary.facts["experts"]),
        form=lambda v: f"{v:.0f}",
    )
    parts = [entropy, balance, confidence, active]
    if rows and "layer_seconds_p50" in rows[0]:
        parts.append(
            charts.lines(
                {stage: column(f"{stage}_seconds_p50") for stage in ("layer", "experts", "router")},
                labels,
                y_title="time per pass, p50",
                form=lambda v: si(v, "s"),
            )
        )
    figures = "".join(f"<div>{part}</div>" for part in parts)
    return f"<h2>By layer</h2><div class=row>{figures}</div>"


def _entropy(summary: Summary) -> str:
    if not summary.entropy.any():
        return ""
    share = summary.entropy / np.maximum(summary.entropy.sum(axis=1, keepdims=True), 1)
    return (
        "<h2>Router entropy of single tokens</h2><p>Share of a layer's tokens by the entropy of their routing "
        "probabilities over ln(experts): 0 is a router that is certain, 1 one that does not care.</p>"
        + charts.legend(charts.SEQUENTIAL, ((0, "0 %"), (1, f"{share.max():.0%}")), "share of the layer's tokens")
        + "<br>"
        + charts.spread_map(summary.entropy, edges("entropy"), summary.layers, "entropy / ln(experts)")
    )


def _pairs(matrix: Floats, load: NDArray[np.int64], tokens: int) -> str:
    """The three pairs that meet most beyond what their loads make them meet; busy experts meet everybody."""
    p = load / tokens
    k = p.sum()
    alone = (k - 1) * p[None, :] / (k - p[:, None])  # the other k-1 choices of i's tokens, shared out by load
    enough = load >= LEAST_TOKENS
    known = np.triu(enough[:, None] & enough[None, :], 1)
    lift = np.where(known & (alone > 0), matrix / np.where(alone > 0, alone, 1), -1.0)
    best = np.argsort(-lift, axis=None, kind="stable")[:3]
    named = [(i, j) for i, j in zip(*np.unravel_index(best, matrix.shape), strict=True) if lift[i, j] > 1]
    if not named:
        return "No pair meets more often than loads alone explain."
    said = "; ".join(f"{i} with {j}: {matrix[i, j]:.0%} (loads alone {alone[i, j]:.0%})" for i, j in named)
    return f"Most beyond their loads: {said}"


def _co_activation(record: Record, shown: Sequence[int] | None) -> str:
    if shown is None:
        places = sorted({0, len(record.layers) // 2, len(record.layers) - 1})
    else:
        places = [record.layers.index(layer) for layer in shown]
    few = Record(
        layers=tuple(record.layers[i] for i in places),
        probabilities=record.probabilities[places],
        ids=record.ids[places],
        token_ids=record.token_ids,
        sequence=record.sequence,
        passes=record.passes,
    )
    together = co_activation(few)
    off = together.copy()
    off[:, np.arange(record.experts), np.arange(record.experts)] = np.nan
    # A pair of hardly used experts may show 100 %: it must not take the colours from all others.
    highest = float(np.nanquantile(off, 0.995)) if np.isfinite(off).any() else 1.0
    figures = []
    for layer, matrix, load in zip(few.layers, off, few.counts(), strict=True):
        figures.append(
            f"<div class=third><h3>Layer {layer}</h3>{charts.matrix_image(matrix, highest)}"
            f"<p class=quiet>{_pairs(matrix, load, record.tokens)}</p></div>"
        )
    uniform = (record.ids.shape[2] - 1) / max(1, record.experts - 1)
    return (
        "<h2>Co-activation</h2><p>How often expert j (column) is active when expert i (row) is: N<sub>ij</sub>/"
        f"N<sub>i</sub>. Uniform routing shows {uniform:.1%} everywhere. The diagonal is left out; a dark "
        "column is an expert that is busy in any company, so pairs are named by what they have beyond their loads "
        f"(experts with at least {LEAST_TOKENS} tokens).</p>"
        + charts.legend(
            charts.SEQUENTIAL, ((0, "0 %"), (1, f"{highest:.0%} and more")), "share of the row expert's tokens"
        )
        + f"<div class=row>{''.join(figures)}</div>"
    )


def _dynamic(record: Record, top_k: int) -> str:
    rules = {
        "probability at least 1/experts": dynamic_k.by_threshold(record.probabilities, 1 / record.experts),
        "half of the probability mass": dynamic_k.by_mass(record.probabilities, 0.5),
        "80 % of the probability mass": dynamic_k.by_mass(record.probabilities, 0.8),
        "before the largest gap": dynamic_k.by_gap(record.probabilities),
    }
    rows = []
    for name, k in rules.items():
        effect = dynamic_k.effect(record.probabilities, k, top_k)
        whole = k.reshape(-1)
        rows.append(
            [
                name,
                f"{whole.mean():.2f}",
                *(f"{np.quantile(whole, q):.0f}" for q in (0.5, 0.95, 0.99)),
                f"{np.mean([e['mass_ratio_mean'] for e in effect]):.1%}",
                f"{np.mean([e['expert_flops_ratio'] for e in effect]):.0%}",
            ]
        )
    per_token = record.chosen().sum(axis=2).reshape(-1)
    seen = np.bincount(per_token)
    used = np.flatnonzero(seen)
    if len(used) == 1:
        figure, left = "", f"The model gave every token {used[0]} experts in every layer. The table says"
    else:
        figure = charts.bars(
            seen[used].tolist(), [str(k) for k in used], x_title="experts of a token (k)", y_title="tokens, all layers"
        )
        left = "Left: what the model did. Right:"
    head = ["rule", "k, mean", "p50", "p95", "p99", "mass covered", "expert FLOPs vs now"]
    return (
        f"<h2>Experts per token</h2><p>{left} what other rules would have chosen from the same probabilities; "
        "the model was not changed, and later layers would have seen other inputs.</p>"
        f"<div class=row>{figure}{_table(head, rows, words=[0])}</div>"
    )


def _comparison(name: str, found: Comparison | Agreement) -> str:
    kind = " different" if isinstance(found, Comparison) and found.verdict == DIFFERENT else ""
    verdict = str(found)
    verdict = html.escape(verdict[0].upper() + verdict[1:])
    said = f"<h2>Comparison: {html.escape(name)}</h2><p class='verdict{kind}'>{verdict}</p>"
    if isinstance(found, Comparison):
        head = ["layer", "divergence, bits", "noise alone, bits", "p-value", "verdict", "experts that changed most"]
        rows = [
            [
                str(x.layer),
                f"{x.js_bits:.4g}",
                f"{x.floor_bits:.2g}",
                DASH if x.p_value != x.p_value else f"{x.p_value:.2g}",
                x.verdict,
                ", ".join(f"{e}: {a:.1%} to {b:.1%}" for e, a, b in x.changed[:3]),
            ]
            for x in found.layers
        ]
        return said + _table(head, rows, words=[4, 5])
    chart = charts.lines(
        {"same experts": found.overlap.tolist(), "same likeliest": found.first.tolist()},
        [str(layer) for layer in found.layers],
        y_title="share",
        high=1.0,
        form=lambda v: f"{v:.0%}",
    )
    return said + chart


def _layers_table(summary: Summary) -> str:
    columns: list[tuple[str, str, Any]] = [
        ("layer", "layer", str),
        ("tokens", "tokens", lambda v: f"{v:,}"),
        ("FLOPs", "flops_total", lambda v: si(v, "FLOP")),
        ("max/ mean", "load_imbalance_ratio", lambda v: number(v, 2)),
        ("chance", "load_imbalance_floor_ratio", lambda v: number(v, 2)),
        ("CV", "load_cv_ratio", lambda v: number(v, 2)),
        ("Gini", "load_gini_ratio", lambda v: number(v, 2)),
        ("load entropy", "load_entropy_ratio", number),
        ("idle", "idle_experts", number),
        ("router entropy", "router_entropy_ratio_mean", number),
        ("p50", "router_entropy_ratio_p50", number),
        ("p95", "router_entropy_ratio_p95", number),
        ("best p", "top1_probability_mean", number),
        ("p95", "top1_probability_p95", number),
        ("mass", "selected_mass_ratio_mean", number),
        ("active", "active_experts_mean", lambda v: number(v, 1)),
    ]
    if summary.rows and "layer_seconds_p50" in summary.rows[0]:
        columns += [("time p50", "layer_seconds_p50", lambda v: si(v, "s"))]
        columns += [
            ("p95", "layer_seconds_p95", lambda v: si(v, "s")),
            ("p99", "layer_seconds_p99", lambda v: si(v, "s")),
        ]
    head = [title for title, _, _ in columns]
    rows = [[form(row.get(key)) for _, key, form in columns] for row in summary.rows]
    exact = "of recorded tokens" if summary.exact_quantiles else "from histogram buckets, linear inside a bucket"
    return (
        f"<h2>All layers</h2>{_table(head, rows)}<p class=quiet>Entropies over ln(experts). Chance: max/mean "
        f"of uniform routing with as many tokens. Quantiles of entropy and probability: {exact}. "
        "A multiply-add counts 2 FLOPs.</p>"
    )


def render(
    summary: Summary,
    *,
    title: str | None = None,
    record: Record | None = None,
    co_activation_layers: Sequence[int] | None = None,
    comparisons: dict[str, Comparison | Agreement] | None = None,
) -> str:
    """The report as HTML text.

    record: default the summary's own; without one, co-activation and other rules for k are left out.
    co_activation_layers: which layers to draw, default first, middle and last. comparisons: name -> result.
    """
    record = summary.record if record is None else record
    parts = [_header(summary, title), *(_comparison(name, c) for name, c in (comparisons or {}).items())]
    parts += [_load(summary), _by_layer(summary), _entropy(summary)]
    if record is not None:
        parts += [_co_activation(record, co_activation_layers), _dynamic(record, int(summary.facts["top_k"]))]
    parts.append(_layers_table(summary))
    name = html.escape(title or f"Expert routing of {summary.facts['model_name']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
