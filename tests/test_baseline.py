"""The baseline: what it learns of normal traffic, the limits it sets, its file, its command and its gauges."""

import itertools
import json
import time

import numpy as np
import published
import pytest
from boards import FakeWorker

from moe_monitor import baseline, statistics
from moe_monitor.baseline import BaselineError
from moe_monitor.cli.main import main
from moe_monitor.export import drift as drift_module
from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.drift import BaselineFile

SHAPE = (published.LAYERS, published.EXPERTS, published.TOP_K)


def recorded(text, windows=10, tokens=20_000, seed=1, name="olmoe"):
    rng = np.random.default_rng(seed)
    return baseline.summarise([published.window(rng, text, tokens) for _ in range(windows)], name, *SHAPE, 60.0)


@pytest.fixture(scope="module")
def models():
    return {text: recorded(text) for text in published.TEXTS}


def judge(model, rng, p, tokens):
    """Which limits a window of traffic with these probabilities exceeds, in any layer."""
    counts = published.draw(rng, p, tokens)
    found = {
        "drift": (model.drift(counts) > model.drift_limit(counts.sum(axis=1))).any(),
        "imbalance": (
            (statistics.imbalance(counts) > model.imbalance_limit(np.full(3, tokens)))
            | (statistics.cv(counts) > model.cv_limit(np.full(3, tokens)))
        ).any(),
        "silent": model.silent(counts, np.full(3, tokens)).any(),
    }
    return {name for name, above in found.items() if above}


def test_what_is_learnt(models):
    model = models["github"]
    truth = published.probabilities("github")
    s = model.statistics
    assert s.tokens.tolist() == [200_000] * 3
    np.testing.assert_allclose(s.counts / 200_000, truth, atol=0.02)
    np.testing.assert_allclose(s.entropy, 0.8, atol=1e-6)
    np.testing.assert_allclose(s.mass, 0.45, atol=1e-6)
    np.testing.assert_allclose(s.imbalance, truth.max(axis=1) * 8, rtol=0.08)
    # Requests differ, so windows differ by more than sampling explains.
    assert (s.drift > model.drift_floor(np.full(3, 160_000))).all()
    assert (s.drift_excess > 0).all()


@pytest.mark.parametrize("tokens", [2_000, 20_000, 100_000])
@pytest.mark.parametrize("text", published.TEXTS)
def test_the_same_traffic_stays_below_every_limit(models, text, tokens):
    rng = np.random.default_rng(11)
    truth = published.probabilities(text)
    verdicts = [judge(models[text], rng, truth, tokens) for _ in range(40)]
    assert verdicts == [set()] * 40


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(published.TEXTS, 2)))
def test_another_text_is_drift_and_only_drift(models, before, after):
    rng = np.random.default_rng(12)
    for tokens in (10_000, 60_000):
        assert judge(models[before], rng, published.probabilities(after), tokens) == {"drift"}


@pytest.mark.parametrize("text", published.TEXTS)
def test_broken_routers_exceed_the_right_limit(models, text):
    rng = np.random.default_rng(13)
    truth = published.probabilities(text)
    for tokens in (20_000, 60_000):
        assert judge(models[text], rng, published.collapsed(truth), tokens) >= {"drift", "imbalance"}
        assert judge(models[text], rng, published.shifted(truth), tokens) == {"drift"}
        assert "silent" in judge(models[text], rng, published.dead(truth), tokens)
        assert "imbalance" not in judge(models[text], rng, published.dead(truth), tokens)


def test_limits_grow_where_tokens_are_few(models):
    model = models["c4"]
    assert (model.drift_limit(np.full(3, 100)) > model.drift_limit(np.full(3, 100_000))).all()
    assert (model.imbalance_limit(np.full(3, 50)) >= model.imbalance_limit(np.full(3, 50_000))).all()
    assert (model.imbalance_limit(np.full(3, 1)) <= model.worst_imbalance).all()


def test_rank_limits(models):
    even = [list(range(r * 16, r * 16 + 16)) for r in range(4)]
    for before in published.TEXTS:
        limit = models[before].rank_imbalance_limit(even)
        for after in published.TEXTS:
            assert (models[after].rank_imbalance(even) < limit).all()
    assert (models["c4"].rank_imbalance_limit(even) < 4).all()


def test_too_little_traffic_is_refused():
    rng = np.random.default_rng(0)
    empty = np.zeros((3, published.LAYOUT.width), dtype=np.int64)
    with pytest.raises(BaselineError, match=r"olmoe: tokens were routed in 2 of 5 windows, at least 3 are needed"):
        baseline.summarise([published.window(rng, "c4")] * 2 + [empty] * 3, "olmoe", *SHAPE, 60.0)


def test_file_round_trip(models, tmp_path):
    path = tmp_path / "normal.json"
    baseline.write(path, [models["c4"]])
    (found,) = baseline.read(path).values()
    assert (found.model_name, found.experts, found.top_k, found.layers) == ("olmoe", 64, 8, (0, 7, 15))
    for name in baseline._COLUMNS:
        np.testing.assert_array_equal(getattr(found.statistics, name), getattr(models["c4"].statistics, name))
    assert [p.name for p in tmp_path.iterdir()] == ["normal.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: "", "it is not JSON"),
        (lambda d: "[" * 100_000, "it is not JSON"),
        (lambda d: "[]", "it was not written by `moe-monitor baseline record`"),
        (lambda d: json.dumps(d | {"version": 2}), "it has version 2, this moe-monitor reads version 1"),
        (lambda d: json.dumps(d | {"models": []}), "it holds no model"),
        (lambda d: json.dumps(d | {"models": 3}), "its content is damaged"),
        (lambda d: json.dumps(d)[:-100], "it is not JSON"),
        (lambda d: json.dumps(d).replace('"tokens": 200000.0', '"tokens": NaN', 1), "its content is damaged"),
        (lambda d: json.dumps(d).replace('"tokens": 200000.0', '"tokens": -1', 1), "its content is damaged"),
        (lambda d: json.dumps(d).replace('"layer": 7', '"layer": 0', 1), "its content is damaged"),
        (lambda d: json.dumps(d).replace('"top_k": 8', '"top_k": 0', 1), "its content is damaged"),
        (lambda d: json.dumps(d).replace('"experts": 64', '"experts": 60', 1), "its content is damaged"),
        (lambda d: json.dumps(d).replace('"recorded"', '"recorder"', 1), "its content is damaged"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(models, tmp_path, change, words):
    path = tmp_path / "normal.json"
    baseline.write(path, [models["c4"]])
    text = change(json.loads(path.read_text()))
    assert text != path.read_text()
    path.write_text(text)
    with pytest.raises(BaselineError) as refusal:
        baseline.read(path)
    assert str(refusal.value) == f"{str(path)!r} is not a usable baseline: {words}"


def test_missing_file_is_said_plainly(tmp_path):
    with pytest.raises(BaselineError, match=r"cannot read the baseline .*: No such file"):
        baseline.read(tmp_path / "none.json")
    with pytest.raises(BaselineError, match=r"cannot write the baseline .*: No such file"):
        baseline.write(tmp_path / "none" / "none.json", [])


def test_command(tmp_path, capsys):
    run, file, other = tmp_path / "run", tmp_path / "normal.json", tmp_path / "other.json"
    record = ["baseline", "record", "--dir", str(run), "--window", "0.3", "--duration", "2.4"]
    assert main([*record, str(file)]) == 1
    assert "no monitored server is running" in capsys.readouterr().err
    with published.Traffic(run, "c4") as traffic:
        assert main([*record, str(file)]) == 0
        assert f"MOE_MONITOR_BASELINE={file}" in capsys.readouterr().out
        assert main([*record, str(file)]) == 1
        assert "--force overwrites it" in capsys.readouterr().err
        assert main(["baseline", "compare", str(file), "--dir", str(run), "--duration", "0.5"]) == 0
        assert "Routing is normal." in capsys.readouterr().out
        traffic.p = published.probabilities("github")
        time.sleep(0.3)
        assert main(["baseline", "compare", str(file), "--dir", str(run), "--duration", "0.5"]) == 1
        assert "3 of 3 layers are above normal." in capsys.readouterr().out
        assert main([*record, str(other)]) == 0
    capsys.readouterr()
    assert main(["baseline", "show", str(file)]) == 0
    assert "olmoe: 64 experts, top-8, 8 windows of 0.3 s" in capsys.readouterr().out
    assert main(["baseline", "compare", str(file), str(other)]) == 1
    assert "3 of 3 layers are above normal." in capsys.readouterr().out
    assert main(["baseline", "compare", str(file), str(file)]) == 0
    file.write_text("{}")
    assert main(["baseline", "show", str(file)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*record[:-1], "0.3", str(tmp_path / "short.json")]) == 1
    assert "--duration must be at least 3 times --window" in capsys.readouterr().err


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Sets MOE_MONITOR_BASELINE as a process of its own would have it."""
    path = tmp_path / "normal.json"
    monkeypatch.setenv("MOE_MONITOR_BASELINE", str(path))
    drift_module.configured.cache_clear()
    monkeypatch.setattr(drift_module, "RECHECK", 0.0)
    yield path
    drift_module.configured.cache_clear()


def gauges(collector):
    return {
        (s.name, s.labels.get("layer"), s.labels.get("window")): s.value
        for family in collector.collect()
        for s in family.samples
    }


def test_gauges(models, configured, tmp_path):
    baseline.write(configured, [models["c4"]])
    rng = np.random.default_rng(4)
    facts = {"layers": published.LAYERS, "model_name": "olmoe"}
    with FakeWorker(tmp_path / "run", **facts) as worker:
        worker.rows = published.window(rng, "github")
        worker.publish(1)
        found = gauges(MoeCollector(tmp_path / "run", server="server-1"))
    counts = worker.rows[:, :64]
    n = counts.sum(axis=1)
    model = models["c4"]
    for i, layer in enumerate(("0", "7", "15")):
        for window in ("1m", "5m"):
            key = (layer, window)
            assert found[("moe_routing_drift_bits", *key)] == pytest.approx(model.drift(counts)[i])
            assert found[("moe_routing_drift_floor_bits", *key)] == pytest.approx(model.drift_floor(n)[i])
            assert found[("moe_routing_drift_limit_bits", *key)] == pytest.approx(model.drift_limit(n)[i])
            assert found[("moe_silent_experts", *key)] == 0
        assert found["moe_baseline_imbalance_ratio", layer, None] == model.statistics.imbalance[i]
        assert found["moe_baseline_router_entropy_ratio", layer, None] == pytest.approx(0.8, abs=1e-6)
    assert found["moe_baseline_usable", None, None] == 1
    assert found["moe_baseline_timestamp_seconds", None, None] == pytest.approx(time.time(), abs=600)
    assert found["moe_model_experts", None, None] == 64


def test_no_tokens_no_drift(models, configured, tmp_path):
    baseline.write(configured, [models["c4"]])
    with FakeWorker(tmp_path / "run", layers=published.LAYERS, model_name="olmoe", tokens=0):
        names = {name for name, *_ in gauges(MoeCollector(tmp_path / "run", server="server-1"))}
    assert "moe_baseline_usable" in names
    assert not names & {"moe_routing_drift_bits", "moe_routing_drift_limit_bits", "moe_silent_experts"}


def test_a_new_recording_counts_without_restart_and_a_bad_one_is_said_once(models, configured, tmp_path, caplog):
    with FakeWorker(tmp_path / "run", layers=published.LAYERS, model_name="olmoe"):
        collector = MoeCollector(tmp_path / "run", server="server-1")
        assert gauges(collector)["moe_baseline_usable", None, None] == 0
        assert gauges(collector)["moe_baseline_usable", None, None] == 0
        assert [r.message for r in caplog.records] == [
            f"moe-monitor: cannot read the baseline {str(configured)!r}: No such file or directory"
        ]
        baseline.write(configured, [models["c4"]])
        assert gauges(collector)["moe_baseline_usable", None, None] == 1
        configured.write_text("damaged")
        assert gauges(collector)["moe_baseline_usable", None, None] == 1  # the good one still counts
        assert "is not JSON" in caplog.records[-1].message
        baseline.write(configured, [recorded("c4", name="another")])
        assert gauges(collector)["moe_baseline_usable", None, None] == 0


def test_a_baseline_of_another_shape_is_not_used(models, configured, tmp_path, caplog):
    baseline.write(configured, [models["c4"]])
    with FakeWorker(tmp_path / "run", layers=(0, 1), model_name="olmoe"):
        assert gauges(MoeCollector(tmp_path / "run"))["moe_baseline_usable", None, None] == 0
    assert "is of another olmoe: record it again" in caplog.text


def test_without_a_baseline_there_are_no_such_series(tmp_path):
    with FakeWorker(tmp_path / "run"):
        names = {name for name, *_ in gauges(MoeCollector(tmp_path / "run", server="server-1"))}
    assert not {n for n in names if "drift" in n or "baseline" in n or "limit" in n or "silent" in n}
    assert BaselineFile(None).model(None) is None


def test_cost_for_a_large_model():
    """Part of a scrape, which may block a server for 10 ms in all: 58 layers x 256 experts, two windows."""
    rng = np.random.default_rng(2)
    layers, experts = tuple(range(58)), 256
    from moe_monitor.layout import RowLayout

    layout = RowLayout(experts)
    windows = []
    for _ in range(3):
        rows = np.zeros((58, layout.width), dtype=np.int64)
        rows[:, :experts] = rng.poisson(300, size=(58, experts))
        rows[:, layout.at("tokens")] = 300 * experts // 8
        windows.append(rows)
    model = baseline.summarise(windows, "large", layers, experts, 8, 60.0)
    counts, tokens = windows[0][:, :experts], windows[0][:, layout.at("tokens")]
    times = []
    for _ in range(7):
        start = time.perf_counter()
        model.drift(counts)
        model.drift_limit(counts.sum(axis=1))
        model.drift_floor(counts.sum(axis=1))
        model.imbalance_limit(tokens)
        model.cv_limit(tokens)
        model.silent(counts, tokens)
        times.append(time.perf_counter() - start)
    print(f"one window: {sorted(times)[3] * 1e3:.2f} ms")
    assert min(times) < 0.01
