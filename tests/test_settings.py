"""Settings: every refusal names the variable, the value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_monitor.settings import SettingsError, load


def test_defaults() -> None:
    settings = load({})
    assert settings.enabled
    assert settings.interval == 0.5
    assert settings.dir.is_absolute()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("MOE_MONITOR_INTERVAL", "abc", "0.05 to 60 seconds"),
        ("MOE_MONITOR_INTERVAL", "-1", "0.05 to 60 seconds"),
        ("MOE_MONITOR_INTERVAL", "nan", "0.05 to 60 seconds"),
        ("MOE_MONITOR_INTERVAL", "1e999", "0.05 to 60 seconds"),
        ("MOE_MONITOR_ENABLED", "maybe", "0 or 1"),
        ("MOE_MONITOR_DIR", "relative/path", "an absolute path"),
        ("MOE_MONITOR_MAX_SERIES", "1.5", "0 to 1000000"),
        ("MOE_MONITOR_LOG_INTERVAL", "0.5", "0 (off), or 1 to 86400 seconds"),
        ("MOE_MONITOR_CAPTURE", "fast", "auto, retain or ingraph"),
    ],
)
def test_a_bad_value_is_named_with_its_range(name: str, value: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as error:
        load({name: value})
    assert str(error.value) == f"{name}={value!r} is not allowed; it takes {allowed}"


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "+1", "1.0", "http", "\N{FULLWIDTH DIGIT NINE}"])
def test_a_bad_port_is_refused(port: str) -> None:
    with pytest.raises(
        SettingsError, match=r"MOE_MONITOR_LISTEN='localhost:.*' is not allowed; it takes HOST:PORT, such"
    ):
        load({"MOE_MONITOR_LISTEN": f"localhost:{port}"})


@pytest.mark.parametrize("host", ["", "::1:", "[localhost]:", "[::1:", "::1]:", "[]:", "a b:", "http://localhost:"])
def test_a_bad_host_is_refused(host: str) -> None:
    with pytest.raises(SettingsError, match=r"MOE_MONITOR_LISTEN='.*' is not allowed; it takes HOST:PORT, such"):
        load({"MOE_MONITOR_LISTEN": f"{host}9101"})


@pytest.mark.parametrize(
    ("value", "address"),
    [
        ("", None),
        (" ", None),
        ("127.0.0.1:9101", ("127.0.0.1", 9101)),
        (" node-7.cluster:1 ", ("node-7.cluster", 1)),
        (":65535", ("", 65535)),
        ("[::1]:9101", ("::1", 9101)),
    ],
)
def test_an_address_is_read(value: str, address: tuple[str, int] | None) -> None:
    assert load({"MOE_MONITOR_LISTEN": value}).listen == address


def test_an_unknown_name_is_refused_with_the_likeliest_meant() -> None:
    with pytest.raises(SettingsError, match=r"'MOE_MONITOR_INTERVALL' is not .* did you mean MOE_MONITOR_INTERVAL"):
        load({"MOE_MONITOR_INTERVALL": "1"})


def test_values_are_read(tmp_path: Path) -> None:
    settings = load({"MOE_MONITOR_DIR": str(tmp_path), "MOE_MONITOR_LOG_INTERVAL": "0", "MOE_MONITOR_ENABLED": "off"})
    assert (settings.dir, settings.log_interval, settings.enabled) == (tmp_path, 0.0, False)


def test_the_run_directory_is_private_to_the_user(tmp_path: Path) -> None:
    assert load({"XDG_RUNTIME_DIR": str(tmp_path)}).dir == tmp_path / "moe-monitor"
    assert load({"XDG_RUNTIME_DIR": str(tmp_path / "absent")}).dir.name.startswith("moe-monitor-")
