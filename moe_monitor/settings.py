"""Every knob once: environment name, type, default, range and meaning.

Settings come from the environment because they must not change what vLLM compiles or caches: everything
passed through ``--additional-config`` enters vLLM's compile-cache key, environment variables do not.

``load()`` raises :class:`SettingsError`, whose message names the variable, the value and the allowed range.
Callers in a serving process catch it, log it once and leave the monitor off.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PREFIX = "MOE_MONITOR_"


class SettingsError(ValueError):
    """A ``MOE_MONITOR_*`` variable has a bad value or an unknown name."""


@dataclass(frozen=True)
class Knob:
    """One environment variable: how to read it and what to tell the reader of an error message or the docs."""

    name: str
    default: str
    allowed: str
    meaning: str
    parse: Callable[[str], Any]

    @property
    def env(self) -> str:
        return PREFIX + self.name


def _boolean(text: str) -> bool:
    value = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return value[text.strip().lower()]
    except KeyError:
        raise ValueError(text) from None


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # also refuses NaN
            raise ValueError(text)
        return value

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    return parse


def _interval_or_off(low: float, high: float) -> Callable[[str], float]:
    inside = _number(low, high)

    def parse(text: str) -> float:
        return 0.0 if float(text) == 0 else inside(text)

    return parse


def _count_or_off(low: int, high: int) -> Callable[[str], int]:
    inside = _integer(low, high)

    def parse(text: str) -> int:
        return 0 if int(text) == 0 else inside(text)

    return parse


def _choice(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        value = text.strip().lower()
        if value not in names:
            raise ValueError(text)
        return value

    return parse


def _directory(text: str) -> Path:
    path = Path(text).expanduser()
    if "\0" in text or not path.is_absolute():
        raise ValueError(text)
    return path


def _file_or_none(text: str) -> Path | None:
    return _directory(text) if text else None


def _address_or_none(text: str) -> tuple[str, int] | None:
    """``host:port``, ``[IPv6]:port`` or ``:port`` for all addresses."""
    if not text:
        return None
    host, colon, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise ValueError(text)
    if bracketed:
        host = host[1:-1]
    if (":" in host) != bracketed or any(c.isspace() or c in "[]/@" for c in host):
        raise ValueError(text)
    return host, int(port)


def default_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Where boards live unless told otherwise: private to the user, cleared at reboot."""
    env = os.environ if environ is None else environ
    runtime = env.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and os.path.isdir(runtime):
        return Path(runtime) / "moe-monitor"
    return Path("/tmp") / f"moe-monitor-{os.getuid()}"


KNOBS: tuple[Knob, ...] = (
    Knob("ENABLED", "1", "0 or 1", "0 leaves vLLM untouched: nothing patched, nothing allocated.", _boolean),
    Knob(
        "INTERVAL",
        "0.5",
        "0.05 to 60 seconds",
        "How often a worker publishes its counters. A burst is visible at most this long after its last step.",
        _number(0.05, 60),
    ),
    Knob(
        "DIR",
        "",
        "an absolute path",
        "Directory of the boards, the files through which workers hand their numbers to readers. Default: "
        "$XDG_RUNTIME_DIR/moe-monitor, else /tmp/moe-monitor-UID. Created with mode 0700.",
        _directory,
    ),
    Knob(
        "LISTEN",
        "",
        "HOST:PORT, such as 127.0.0.1:9101, or :9101 for all addresses",
        "Where an exporter listens in the process that starts a server whose own /metrics cannot carry the monitor's: "
        "behind vLLM's Rust front end, where servers of --data-parallel-multi-port-external-lb add their data-parallel "
        "rank to the port, and on headless nodes. Default: nowhere, and the log says so. Without effect on others.",
        _address_or_none,
    ),
    Knob(
        "LOG_INTERVAL",
        "10",
        "0 (off), or 1 to 86400 seconds",
        "How often a summary line goes to vLLM's log while tokens are being routed.",
        _interval_or_off(1, 86400),
    ),
    Knob(
        "MAX_SERIES",
        "2048",
        "0 to 1000000",
        "Largest layer-by-expert matrix that a vLLM server's own /metrics carries whole; above it only the hottest "
        "and coldest experts of each layer. `moe-monitor export` always carries the whole matrix.",
        _integer(0, 1_000_000),
    ),
    Knob(
        "CAPTURE",
        "auto",
        "auto, retain or ingraph",
        "How routing is read under CUDA graphs: retain (one kernel in each graph) or ingraph (a kernel per "
        "layer inside the graph). auto retains where that is safe.",
        _choice("auto", "retain", "ingraph"),
    ),
    Knob(
        "DEVICE_MEMORY_MIB",
        "64",
        "1 to 4096 MiB",
        "Most device memory that the monitor may keep. Where retaining would need more, capture is ingraph.",
        _integer(1, 4096),
    ),
    Knob(
        "BASELINE",
        "",
        "an absolute path",
        "Baseline file (`moe-monitor baseline record`) that drift and the limits of imbalance are measured against. "
        "Default: none. Read by servers and by `moe-monitor export`, again whenever it changes.",
        _file_or_none,
    ),
    Knob(
        "SAMPLE_RATIO",
        "0.1",
        "0 to 1",
        "Share of requests whose routing is traced one by one. `moe_trace` in a request's `vllm_xargs` (1 or 0), or "
        "else the sampled flag of its `traceparent` where vLLM's tracing is on, decides before this does.",
        _number(0, 1),
    ),
    Knob(
        "MAX_TRACED",
        "256",
        "0 (off) to 4096",
        "Most requests that are traced at a time; fewer where their tallies would take more than a quarter of "
        "MOE_MONITOR_DEVICE_MEMORY_MIB. What is over it is served untraced and counted as dropped.",
        _integer(0, 4096),
    ),
    Knob(
        "LATENCY_EVERY",
        "200",
        "0 (off), or 10 to 1000000 steps",
        "One forward pass in so many is timed, layer by layer. Decode and prefill passes count together.",
        _count_or_off(10, 1_000_000),
    ),
    Knob(
        "SPAN_EVENTS",
        "0",
        "0 or 1",
        "1 adds an event for each layer to the spans of traced requests.",
        _boolean,
    ),
)


@dataclass(frozen=True)
class Settings:
    """The parsed knobs; see :data:`KNOBS` for their meaning and range. Times in seconds."""

    enabled: bool
    interval: float
    dir: Path
    listen: tuple[str, int] | None
    log_interval: float
    max_series: int
    capture: str
    device_memory_mib: int
    baseline: Path | None
    sample_ratio: float
    max_traced: int
    latency_every: int
    span_events: bool


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read every ``MOE_MONITOR_*`` variable of ``environ`` (default: the process environment).

    Raises SettingsError naming the variable, its value and what is allowed; an unknown name is refused too,
    because a misspelt knob would otherwise be silently without effect.
    """
    env = os.environ if environ is None else environ
    known = {knob.env for knob in KNOBS}
    for name in sorted(env):
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name[:100], known, n=1)
            hint = f"did you mean {close[0]}?" if close else "known: " + ", ".join(sorted(known))
            raise SettingsError(f"{name[:100]!r} is not a moe-monitor setting; {hint}")
    values: dict[str, Any] = {}
    for knob in KNOBS:
        text = env.get(knob.env, "").strip() or knob.default
        if knob.name == "DIR" and not text:
            values["dir"] = default_directory(env)
            continue
        try:
            values[knob.name.lower()] = knob.parse(text)
        except (ValueError, OverflowError, RuntimeError):  # expanduser knows no such user
            raise SettingsError(f"{knob.env}={text[:200]!r} is not allowed; it takes {knob.allowed}") from None
    assert set(values) == {f.name for f in fields(Settings)}
    return Settings(**values)
