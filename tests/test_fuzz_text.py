"""Hostile text: settings from any environment, and label values of any kind in both exposition formats."""

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from moe_monitor import settings as knobs
from moe_monitor.catalog import BY_NAME
from moe_monitor.export.exposition import Exposition
from moe_monitor.export.families import Family

quick = settings(max_examples=200, deadline=20_000, suppress_health_check=[HealthCheck.too_slow])

# What an environment can hold: no NUL, and bytes that are not UTF-8 as lone surrogates
environment_text = st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=60)


@quick
@given(st.dictionaries(st.sampled_from([k.env for k in knobs.KNOBS]), environment_text, max_size=4), environment_text)
@example({"MOE_MONITOR_DIR": "~nobody-of-this-name/run"}, "")
@example({"MOE_MONITOR_BASELINE": "~nobody-of-this-name/baseline.json"}, "")
@example({"MOE_MONITOR_DIR": "/tmp/a\nb"}, "")
@example({"MOE_MONITOR_INTERVAL": "1e9999"}, "")
@example({"MOE_MONITOR_INTERVAL": "infinity"}, "")
@example({"MOE_MONITOR_MAX_SERIES": "9" * 5000}, "")
@example({"MOE_MONITOR_CAPTURE": "{0.__class__} %s"}, "")
@example({"MOE_MONITOR_ENABLED": "\ud800"}, "")
@example({}, "\ud800")
def test_any_environment_is_read_or_refused(environ, runtime):
    try:
        got = knobs.load(environ | {"XDG_RUNTIME_DIR": runtime, "PATH": "/bin"})
    except knobs.SettingsError as refusal:
        got = str(refusal)
    if isinstance(got, str):
        (name,) = [n for n in environ if got.startswith(f"{n}=")]
        assert "is not allowed; it takes " in got
        assert "\n" not in got
        assert environ[name].strip()
        return
    assert 0.05 <= got.interval <= 60
    assert got.log_interval == 0 or 1 <= got.log_interval <= 86400
    assert 0 <= got.max_series <= 1_000_000
    assert 1 <= got.device_memory_mib <= 4096
    assert got.capture in ("auto", "retain", "ingraph")
    assert got.dir.is_absolute()
    assert "\0" not in str(got.dir)
    assert got.baseline is None or got.baseline.is_absolute()


@quick
@given(environment_text)
@example("X" * 100_000)
@example("\n")
def test_an_unknown_name_is_refused_in_one_short_line(suffix):
    name = knobs.PREFIX + suffix
    if name in [k.env for k in knobs.KNOBS]:
        return
    started = time.perf_counter()
    with pytest.raises(knobs.SettingsError) as error:
        knobs.load({name: "1"})
    assert len(str(error.value)) < 4000
    assert "\n" not in str(error.value)
    assert time.perf_counter() - started < 2


# label values


def shown(value, openmetrics):
    """What prometheus_client reads back of a label value, for a gauge, a counter and a histogram."""
    series = [
        Family(BY_NAME["moe_monitor_active"], (value, "0"), [()], [1]),
        Family(BY_NAME["moe_monitor_errors_total"], ("m", "0"), [(value,)], [3]),
        Family(
            BY_NAME["moe_experts_per_token"],
            (value, "0"),
            [("0",)],
            np.ones((1, len(BY_NAME["moe_experts_per_token"].buckets) + 1), dtype=np.int64),
            [4.0],
        ),
    ]
    text = Exposition().render(series, openmetrics=openmetrics).decode("utf-8")  # strictly
    metrics = list((parse_openmetrics if openmetrics else parse_text)(text))
    assert [m.type for m in metrics] == ["gauge", "counter", "histogram"]
    values = {s.value for m in metrics for s in m.samples if m.type == "counter"}
    assert values == {3}
    names = {s.labels["model_name"] for m in metrics for s in m.samples if m.type != "counter"}
    return names | {s.labels["where"] for m in metrics for s in m.samples if m.type == "counter"}


def carried(value):
    """The value as the text format can carry it: carriage returns are spelt out, what is not Unicode is replaced."""
    return "".join("?" if 0xD800 <= ord(c) <= 0xDFFF else r"\r" if c == "\r" else c for c in value)


any_text = st.text(st.characters(exclude_categories=()), max_size=60)


@quick
@given(any_text, st.booleans())
@example('"', False)
@example("\\", True)
@example("\\n", False)
@example('\\"', True)
@example("a\nb", True)
@example("\r\n", False)
@example('x"} 1\nmoe_fake_total{a="b', False)
@example("# EOF\n", True)
@example("\0\x01\x1b[31m\x7f", False)
@example("\x0b\x0c\x1c\x85\u2028\u2029", True)
@example("\ud800", True)
@example("模型-модель-🦙", False)
@example("{}{0}%s%(x)s", False)
@example("", True)
@example("y" * 100_000, False)
@example("\\" * 100_000, True)
def test_a_label_value_comes_back(value, openmetrics):
    assert shown(value, openmetrics) == {carried(value)}


@quick
@given(st.one_of(st.integers(), st.floats()))
@example(10**400)
@example(-(10**400))
@example(2**63 - 1)
@example(float("nan"))
def test_any_number_is_written(value):
    family = Family(BY_NAME["moe_monitor_active"], ("m", "0"), [()], [value])
    (metric,) = parse_text(Exposition().render([family]).decode())
    got = metric.samples[0].value
    if value != value:
        assert got != got
    elif abs(value) > 1e308:
        assert got == (float("inf") if value > 0 else float("-inf")) or abs(got - value) <= abs(value) * 1e-15
    else:
        assert got == float(value)


def test_the_text_of_servers_that_are_gone_is_forgotten():
    exposition = Exposition()
    for number in range(1000):
        family = Family(BY_NAME["moe_monitor_active"], ("m", "0"), [()], [1], server=f"server-{number}")
        exposition.render([family])
    assert len(exposition._templates) <= 200
