"""The dashboards' JSON: stable, complete, and asking only for what exists."""

import itertools
import json
import re

import pytest
import queries

UIDS = {
    "moe-monitor-overview",
    "moe-monitor-layers",
    "moe-monitor-ranks",
    "moe-monitor-latency",
    "moe-monitor-requests",
    "moe-monitor-self",
    "moe-monitor-runbooks",
}
PANELS = list(queries.panels())


def name(value):
    return value["title"] if isinstance(value, dict) else value


def test_uids_are_stable():
    assert set(queries.dashboards()) == UIDS
    assert {d["uid"] for d in queries.dashboards().values()} == UIDS


@pytest.mark.parametrize("uid", sorted(UIDS))
def test_frame(uid):
    dashboard = queries.dashboards()[uid]
    variables = {v["name"]: v for v in dashboard["templating"]["list"]}
    assert set(variables) >= {"datasource", "job", "model", "instance", "engine"}
    assert ("layer" in variables) == (uid in {"moe-monitor-layers", "moe-monitor-ranks", "moe-monitor-latency"})
    assert dashboard["tags"] == ["moe-monitor"]
    (link,) = dashboard["links"]
    assert (link["type"], link["tags"], link["includeVars"], link["keepTime"]) == (
        "dashboards",
        ["moe-monitor"],
        True,
        True,
    )
    (annotation,) = dashboard["annotations"]["list"]
    assert 'alertstate="firing"' in annotation["expr"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    cells = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        mine = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert at["x"] + at["w"] <= 24
        assert not mine & cells, f"{panel['title']} lies on another panel"
        cells |= mine


@pytest.mark.parametrize(("uid", "panel"), PANELS, ids=name)
def test_panel(uid, panel):
    assert panel["title"]
    if panel["type"] == "text":
        return
    assert len(panel["description"]) > 15
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["unit"]
    assert defaults["thresholds"]["steps"][0].get("value") is None
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["targets"]
    references = [target["refId"] for target in panel["targets"]]
    assert len(references) == len(set(references))
    # As many points as the cost was measured with; Grafana would ask for one a pixel.
    assert all(target.get("instant") for target in panel["targets"]) or panel["maxDataPoints"] <= 240
    known = {v["name"] for v in queries.dashboards()[uid]["templating"]["list"]}
    for target in panel["targets"]:
        assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        used = set(re.findall(r"\$\{?(\w+)", re.sub(r'label_replace\(|"\d*\$1"', "", target["expr"])))
        assert used <= known
        assert queries.unknown(target["expr"]) == set()


@pytest.mark.parametrize(("uid", "panel"), PANELS, ids=name)
def test_no_panel_scans_the_matrix(uid, panel):
    """Only one layer of one server may be read from the matrix itself: as many series as a layer has experts."""
    for target in panel.get("targets", []):
        for selector in re.findall(queries.MATRIX + r"\{([^}]*)\}", target["expr"]):
            assert 'instance="$server"' in selector
            assert 'layer="$layer"' in selector
        assert not re.search(queries.MATRIX + r"(?!\{)", target["expr"])


@pytest.mark.parametrize(
    ("uid", "panel"),
    [(u, p) for u, p in PANELS if any(t["id"] == "organize" for t in p.get("transformations", []))],
    ids=name,
)
def test_rows_of_tables_are_merged(uid, panel):
    """Grafana merges rows only where all shared labels are equal, a metric's name too: the keys alone are left."""
    organise = next(t["options"] for t in panel["transformations"] if t["id"] == "organize")
    names = organise["renameByName"]
    keys = [label for label in names if not label.startswith("Value")]
    letters = [target["refId"] for target in panel["targets"]]
    # As Grafana calls the columns of one query, and of several.
    assert set(names) - set(keys) == ({f"Value #{x}" for x in letters} if len(letters) > 1 else {"Value"})
    for target in panel["targets"]:
        kept = re.match(r"\w+ by \(([\w, ]+)\) \(", target["expr"])
        assert kept, target["expr"]
        assert set(kept[1].split(", ")) == set(keys)
    assert panel["options"]["sortBy"][0]["displayName"] in names.values()


RAW = ("moe_layer_duration_seconds_bucket", "moe_layer_duration_seconds_sum", "moe_layer_duration_seconds_count")


@pytest.mark.parametrize(("uid", "panel"), PANELS, ids=name)
def test_no_panel_reads_the_layers_histograms_of_more_than_one_layer(uid, panel):
    """By layer, stage, kind and bucket they are as many series as the matrix."""
    for target in panel.get("targets", []):
        for selector in re.findall("(?:" + "|".join(RAW) + r")(\{[^}]*\})?", target["expr"]):
            assert 'instance="$server"' in selector and 'layer="$layer"' in selector


def test_runbooks_are_all_there_in_full():
    (titles,) = [
        {p["title"]: p["options"]["content"] for p in d["panels"] if p["type"] == "text"}
        for uid, d in queries.dashboards().items()
        if uid == "moe-monitor-runbooks"
    ]
    folder = queries.ROOT / "docs" / "runbooks"
    assert set(titles) == {path.stem for path in folder.glob("*.md")}
    for title, content in titles.items():
        lines = (folder / f"{title}.md").read_text().splitlines()[2:]
        assert [line.lstrip("# ") for line in content.splitlines()] == [line.lstrip("# ") for line in lines]


def test_links_between_dashboards_lead_somewhere():
    text = json.dumps(queries.dashboards())
    linked = set(re.findall(r"/d/([\w-]+)", text))
    assert linked
    assert linked <= UIDS


def test_vllm_has_the_metrics_that_are_used():
    """By the source of the installed vLLM; the tests of a live server see it on the wire."""
    from importlib.util import find_spec
    from pathlib import Path

    found = find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed here")
    sources = (Path(found.origin).parent / "v1" / "metrics").rglob("*.py")
    text = "".join(path.read_text() for path in sources)
    used = queries.VLLM_GAUGES | queries.VLLM_HISTOGRAMS
    assert {metric for metric in used if f'"{metric}"' in text} == used
