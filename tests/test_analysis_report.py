"""Summary, files and report, from published counts of the real OLMoE and from a made-up record."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from test_analysis_metrics import make_record, published

from moe_monitor.analysis import Record, Summary, compare, compare_choices, summarise
from moe_monitor.layout import FIXED_POINT, RowLayout, edges
from moe_monitor.snapshot import EngineSnapshot, Status

FACTS = {
    "model_name": "OLMoE <&> 1B-7B",
    "producer": "transformers",
    "producer_version": "5",
    "scoring": "softmax",
    "experts": 64,
    "top_k": 8,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "matrices": 3,
}


def engine(counts: np.ndarray, tokens: int, layers: tuple[int, ...], facts: dict = FACTS) -> EngineSnapshot:
    """A snapshot with these loads, 10 passes, and every token's entropy 0.75."""
    layout = RowLayout(counts.shape[1])
    rows = np.zeros((len(layers), layout.width), dtype=np.int64)
    rows[:, layout.offsets["experts"]] = counts
    rows[:, layout.at("tokens")] = tokens
    rows[:, layout.at("passes")] = 10
    rows[:, layout.offsets["entropy"].start + edges("entropy").index(0.8)] = tokens
    rows[:, layout.at("entropy_sum")] = tokens * FIXED_POINT * 3 // 4
    return EngineSnapshot("s", facts["model_name"], "0", layers, layout, rows, 10, 0.0, Status(), [facts])


def olmoe(text: str = "github") -> Summary:
    counts, tokens = published(text)
    return summarise(engine(counts, tokens, (0, 7, 15)))


def test_summary_of_published_counts() -> None:
    counts, tokens = published("github")
    summary = olmoe()
    for row, load in zip(summary.rows, counts.astype(float), strict=True):
        assert row["load_imbalance_ratio"] == pytest.approx(load.max() / load.mean())
        assert row["load_cv_ratio"] == pytest.approx(load.std() / load.mean())
        differences = np.abs(load[:, None] - load[None, :]).mean()
        assert row["load_gini_ratio"] == pytest.approx(differences / (2 * load.mean()))
        p = load / load.sum()
        assert row["load_entropy_ratio"] == pytest.approx(-(p[p > 0] * np.log2(p[p > 0])).sum() / 6)
        assert row["router_entropy_ratio_mean"] == pytest.approx(0.75)
        assert 0.7 < row["router_entropy_ratio_p50"] < 0.8
        assert row["router_entropy_ratio_std"] is None
        assert row["top1_probability_p95"] is None
        # OLMoE: 8 experts of 3 matrices of 2048 x 1024, and a 2048 x 64 gate, 2 FLOPs a multiply-add
        assert row["flops_experts"] == tokens * 8 * 3 * 2048 * 1024 * 2
        assert row["flops_router"] == tokens * 2048 * 64 * 2
    # The README of these counts: one domain alone has max/mean of 3 to 7
    assert 3 < summary.total["load_imbalance_ratio_max"] < 7
    assert summary.total["flops_total"] == sum(r["flops_total"] for r in summary.rows)


def test_exact_quantiles_come_from_the_record() -> None:
    record = make_record(tokens=300)
    facts = {**FACTS, "experts": 8, "top_k": 3}
    summary = summarise(engine(record.counts(), 300, (0, 1), facts), record=record)
    p = record.probabilities[1].astype(float)
    entropy = -(p * np.log(p)).sum(axis=1) / np.log(8)
    row = summary.rows[1]
    assert summary.exact_quantiles
    assert row["router_entropy_ratio_p99"] == pytest.approx(np.quantile(entropy, 0.99))
    assert row["router_entropy_ratio_std"] == pytest.approx(entropy.std())
    assert row["selected_mass_ratio_mean"] == pytest.approx(np.sort(p, axis=1)[:, -3:].sum(axis=1).mean())
    assert row["experts_per_token_mean"] == 3
    distinct = [len(set(record.ids[1, i : i + 10].ravel().tolist())) for i in range(0, 300, 10)]
    assert row["active_experts_mean"] == pytest.approx(np.mean(distinct))


def test_files_hold_the_numbers(tmp_path) -> None:
    summary = olmoe()
    summary.to_csv(tmp_path / "layers.csv")
    summary.to_csv(tmp_path / "experts.csv", table="experts")
    summary.to_json(tmp_path / "s.json")
    layers = list(csv.DictReader((tmp_path / "layers.csv").read_text().splitlines()))
    assert [int(row["layer"]) for row in layers] == [0, 7, 15]
    assert float(layers[1]["load_gini_ratio"]) == pytest.approx(summary.rows[1]["load_gini_ratio"])
    assert layers[0]["router_entropy_ratio_std"] == ""
    experts = list(csv.DictReader((tmp_path / "experts.csv").read_text().splitlines()))
    assert len(experts) == 3 * 64
    assert sum(int(row["tokens"]) for row in experts) == published("github")[0].sum()
    data = json.loads((tmp_path / "s.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert data["experts"] == published("github")[0].tolist()
    buckets = data["router_entropy_buckets"]
    assert {u: n for u, n in zip(buckets["upper"], buckets["tokens"][2], strict=True) if n} == {0.8: 208_896}
    with pytest.raises(ValueError, match="there are 'layers' and 'experts'"):
        summary.to_csv(tmp_path / "x.csv", table="other")


def test_parquet_and_frame(tmp_path) -> None:
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    summary = olmoe()
    summary.to_parquet(tmp_path / "layers.parquet")
    frame = pd.read_parquet(tmp_path / "layers.parquet")
    assert frame["layer"].tolist() == [0, 7, 15]
    assert frame["load_cv_ratio"].tolist() == [row["load_cv_ratio"] for row in summary.rows]
    facts = json.loads(pq.read_schema(tmp_path / "layers.parquet").metadata[b"moe_monitor"])
    assert facts["model_name"] == FACTS["model_name"]
    assert summary.to_frame().set_index("layer").loc[15, "idle_experts"] == summary.rows[2]["idle_experts"]


def test_printing_shows_every_layer(capsys) -> None:
    olmoe().print()
    text = capsys.readouterr().out
    assert re.search(r"^\s+7\s+\d+", text, re.MULTILINE)
    assert "TFLOP" in text


def test_a_run_without_tokens_has_a_summary_and_a_report() -> None:
    summary = summarise(engine(np.zeros((2, 64), dtype=np.int64), 0, (0, 1)))
    assert summary.rows[0]["load_cv_ratio"] is None
    assert summary.rows[0]["router_entropy_ratio_mean"] is None
    json.dumps(summary.to_dict(), allow_nan=False)
    from moe_monitor.analysis.report import render

    assert "no tokens" in render(summary)


class Page(HTMLParser):
    """Checks that tags close in order, and collects them."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in {"src", "href", "srcset", "xlink:href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in {"src", "href"}]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def full_report() -> tuple[str, Record]:
    from moe_monitor.analysis.report import render

    record, other = make_record(tokens=600), make_record(tokens=600, seed=7)
    facts = {**FACTS, "experts": 8, "top_k": 3}
    durations = {stage: [np.full(5, 2e-3), np.full(5, 4e-3)] for stage in ("router", "experts", "layer")}
    totals = {stage: (np.array([5, 5]), np.array([0.01, 0.02])) for stage in durations}
    summary = summarise(engine(record.counts(), 600, (0, 1), facts), record=record, durations=durations, totals=totals)
    comparisons = {"two texts": compare(record, other), "two builds": compare_choices(record, record)}
    return render(summary, title="A <title>", comparisons=comparisons), record


def test_report_is_whole_and_needs_nothing_else() -> None:
    text, record = full_report()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "A <title>" in page.text
    assert "OLMoE <&> 1B-7B" in page.text
    assert page.tags.count("rect") >= 2 * 8  # the heat map
    counts = record.counts()
    assert f"layer 1, expert 3: {counts[1, 3]} tokens, {counts[1, 3] / counts[1].mean():.2f} x mean" in page.text
    assert "no difference beyond sampling noise" in page.text
    assert "The same experts for every token" in page.text
    assert "The model gave every token 3 experts" in page.text
    # 600 tokens of entropy 0.75 in each layer
    assert "layer 1, 0.7 to 0.8: 100.0% of 600 tokens" in page.text
    assert "layer 1, 0.6 to 0.7: 0.0% of 600 tokens" in page.text
    assert "4 ms" in page.text
    assert "30 ms" in page.text  # 10 + 20 ms in MoE blocks


def test_pairs_are_named_beyond_their_loads() -> None:
    from moe_monitor.analysis.report import render

    draw = np.random.default_rng(4)
    record = make_record(tokens=2000, experts=16, k=4, layers=1)
    ids = np.argsort(-draw.random((1, 2000, 16)), axis=2)[..., :4].astype(np.int32)
    busy = draw.random(2000) < 0.9  # expert 0 is in nearly everybody's company
    ids[0, busy, 0] = 0
    mates = draw.random(2000) < 0.1  # 5 and 11 come together
    ids[0, mates, 2:] = (5, 11)
    record = Record(record.layers, record.probabilities, ids, record.token_ids, record.sequence, record.passes)
    facts = {**FACTS, "experts": 16, "top_k": 4}
    text = render(summarise(engine(record.counts(), 2000, (0,), facts), record=record))
    both = (record.chosen()[0][:, [5, 11]]).all(axis=1).sum() / record.counts()[0, 5]
    assert f"Most beyond their loads: 5 with 11: {both:.0%} (loads alone " in text


@pytest.mark.slow
def test_report_renders_in_a_browser(tmp_path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    (tmp_path / "r.html").write_text(full_report()[0])
    picture = tmp_path / "r.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1180,3000", f"--screenshot={picture}"]
    subprocess.run([chromium, *flags, (tmp_path / "r.html").as_uri()], check=True, capture_output=True, timeout=120)
    assert picture.stat().st_size > 50_000  # a blank page of this size has about 10 kB
