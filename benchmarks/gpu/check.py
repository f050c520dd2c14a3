"""All that must be exact, on a real GPU: several engines at once on one of them, each compared with its oracle.

check.py [--only NAME,...] [--more] [--gpu 0] [--limit-s 560] [--keep FOLDER]

For after a change of what runs on GPUs, or of vLLM. Needs an NVIDIA GPU with about 80 GB, vLLM, pytest, and moe-monitor
installed. Prints a line for each run, with what is wrong with it, and ends with 1 if anything is. Their whole output
lies in FOLDER. Two and a half minutes on an H100 with 16 cores, most of it the engines' start; ``--more``: other
families, ways to capture, speculation, LoRA and sleep mode as well (four of them at once took up to five minutes, all
at once was not tried).

Oracles: ``exact.py`` has an in-graph shadow of every router's decisions, made of torch's own operations;
``requests_exact.py`` that, attributed to requests by the batch of vLLM's model runner, and vLLM's own
``routed_experts``; the tests have the torch reference.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

#: By how much columns may differ from the shadow's, which rounds in another order: (values, in so many tokens). The
#: others not at all: every token went to the same experts.
TOLERATED = {"entropy": (1, 20_000), "top1": (1, 20_000), "mass": (1, 20_000)}
#: Sums are in units of 2^-20.
TOLERATED |= dict.fromkeys(("entropy_sum", "top1_sum", "mass_sum"), (1, 32))

V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}


def of_counts(told: Mapping[str, Any], capture: str = "retain") -> list[str]:
    """What is wrong with what ``exact.py`` told. ``capture``: the way that it must have counted."""
    wrong = _state(told)
    if told["capture"] != capture:
        wrong.append(f"captured by {told['capture']}, not by {capture}")
    if told["capture"] == "retain" and not told["sealed"] == told["graphs"] > 0:
        wrong.append(f"{told['sealed']} of {told['graphs']} graphs count by themselves")
    posted, begun = told.get("posted"), told.get("begun")
    if posted != begun or (told["capture"] == "retain" and not posted):
        wrong.append(f"{posted} launches were posted, {begun} have begun")
    if told["tokens"] != told["shadow_tokens"] or not told["tokens"]:
        wrong.append(f"{told['tokens']} tokens, the shadow has {told['shadow_tokens']}")
    for column, difference in told["largest_difference"].items():
        values, tokens = TOLERATED.get(column, (0, 1))
        if difference > max(values, values * told["tokens"] // tokens):
            wrong.append(f"{column} differs by {difference}")
    return wrong


def of_requests(told: Mapping[str, Any]) -> list[str]:
    """What is wrong with what ``requests_exact.py`` told."""
    wrong = _state(told)
    sealed, graphs = told["sealed"]
    if not sealed == graphs > 0:
        wrong.append(f"{sealed} of {graphs} graphs count by themselves")
    if not told["records"] == told["sequences"] > 0:
        wrong.append(f"{told['records']} records of {told['sequences']} sequences")
    return wrong if told["ok"] or wrong else ["not ok: see its line"]


def of_tests(told: str) -> list[str]:
    """What is wrong with pytest's closing line."""
    numbers = {what: int(n) for n, what in re.findall(r"(\d+) (\w+)", told.partition(" in ")[0])}
    passed, others = numbers.pop("passed", 0), set(numbers) - {"skipped", "warning", "warnings", "deselected"}
    return [told] if others or passed <= numbers.get("skipped", 0) else []


def _state(told: Mapping[str, Any]) -> list[str]:
    wrong = [] if told["active"] else [f"switched off: {told['reason']}"]
    return wrong + [f"errors: {told['errors']}"] * bool(told["errors"])


@dataclass
class Run:
    """``command`` follows the Python interpreter; ``tag`` begins the line that tells, which ``judge`` is given."""

    command: list[str]
    judge: Callable[[Any], list[str]]
    tag: str
    env: dict[str, str] = field(default_factory=dict)
    more: bool = False

    def verdict(self, output: str, returncode: int | None) -> tuple[str, list[str]]:
        """(what it told, what is wrong)."""
        lines = output.splitlines()
        if not self.tag:
            told = next((line.strip("= ") for line in reversed(lines) if re.search(r"\d (passed|failed)", line)), "")
            return told, self.judge(told) if told else [_end(returncode, lines)]
        told = next((line for line in lines if line.startswith(self.tag + " ")), "")
        if not told:
            return "", [_end(returncode, lines)]
        found = json.loads(told.removeprefix(self.tag))
        return f"{found['tokens']:,} tokens on {found['runner']}, {found['capture']}", self.judge(found)


def _end(returncode: int | None, lines: list[str]) -> str:
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"{'was ended' if returncode is None else f'ended with {returncode}'}, told nothing; at last: {last[:200]}"


def counts(*arguments: str, env: Mapping[str, str] | None = None, more: bool = False, capture: str = "retain") -> Run:
    room = ["kv_cache_memory_bytes=1200000000", "gpu_memory_utilization=0.2"]
    command = [str(HERE / "exact.py"), "--rounds", "1", *arguments]
    return Run(
        [*command, *(f"--option={o}" for o in room)],
        functools.partial(of_counts, capture=capture),
        "RESULT",
        dict(env or {}),
        more,
    )


def requests(*arguments: str, env: Mapping[str, str] | None = None, more: bool = False) -> Run:
    command = [str(HERE / "requests_exact.py"), "--family", "qwen3_moe", "--option=gpu_memory_utilization=0.15"]
    return Run([*command, *arguments], of_requests, "REQUESTS", dict(env or {}), more)


RUNS = {
    "counts-v1": counts(),
    "counts-v2": counts(env=V2),
    "requests-v1": requests(),
    "requests-v2": requests(env=V2),
    "tests": Run(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + [f"{ROOT}/tests/test_{name}.py" for name in ("kernels", "sealed_graphs", "stamps")],
        of_tests,
        "",
    ),
    "ingraph": counts(env={"MOE_MONITOR_CAPTURE": "ingraph"}, more=True, capture="ingraph"),
    "beside-vllms-own": counts("--option=enable_return_routed_experts=true", more=True),
    "mixtral-v2": counts("--family", "mixtral", env=V2, more=True),
    "deepseek-v2": counts("--family", "deepseek", env=V2, more=True),
    "gpt-oss-v1": counts("--family", "gpt_oss", more=True),
    "deep-v1": counts("--family", "deep", "--option=cudagraph_capture_sizes=null", more=True),
    "deep-v2": counts("--family", "deep", "--option=cudagraph_capture_sizes=null", env=V2, more=True),
    "speculation": requests("--speculate", more=True),
    "adapters-v1": counts("--adapters", "2", more=True),
    "adapters-v2": counts("--adapters", "2", env=V2, more=True),
    "sleep-v1": counts("--sleep", "--rounds", "3", more=True),
    "sleep-v2": counts("--sleep", "--rounds", "3", env=V2, more=True),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(RUNS)}")
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--gpu", default="0", help="as in CUDA_VISIBLE_DEVICES")
    parser.add_argument("--limit-s", type=float, default=560, help="what has not ended by then is ended, and is wrong")
    parser.add_argument("--keep", type=Path, help="default: a new folder under /tmp")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else [n for n, run in RUNS.items() if args.more or not run.more]
    if unknown := set(names) - set(RUNS):
        parser.error(f"no such runs: {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    args.names = names
    return args


def start(name: str, run: Run, args: argparse.Namespace, folder: Path) -> subprocess.Popen[bytes]:
    board = folder / f"{name}.run"
    board.mkdir(mode=0o700, exist_ok=True)
    own = {"MOE_MONITOR_DIR": str(board), "CUDA_VISIBLE_DEVICES": args.gpu, "PYTHONUNBUFFERED": "1"}
    with (folder / f"{name}.txt").open("w") as file:
        return subprocess.Popen(
            [sys.executable, *run.command],
            cwd=ROOT,
            env={**os.environ, **own, **run.env},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """It and what it has started, which may outlive it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def main() -> int:
    args = parse()
    import torch

    if not torch.cuda.is_available():
        print("there is no NVIDIA GPU here, or torch does not find it", file=sys.stderr)
        return 2
    began = time.monotonic()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="moe-monitor-check-"))
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    print(f"{len(args.names)} runs on {torch.cuda.get_device_name(0)}, their output in {folder}", flush=True)
    bad = 0
    waiting: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in args.names:
            waiting[name] = start(name, RUNS[name], args, folder)
        while waiting:
            late = time.monotonic() - began >= args.limit_s
            for name, process in list(waiting.items()):
                if process.poll() is None and not late:
                    continue
                returncode = process.poll()
                end(process)
                del waiting[name]
                told, wrong = RUNS[name].verdict((folder / f"{name}.txt").read_text(errors="replace"), returncode)
                if returncode and not wrong:
                    wrong = [f"ended with {returncode}"]
                bad += bool(wrong)
                print(
                    f"{time.monotonic() - began:5.0f} s  {name:18}{'WRONG' if wrong else 'right':7}{told}", flush=True
                )
                for line in wrong:
                    print(f"         {line}", flush=True)
            time.sleep(0.5)
    finally:
        for process in waiting.values():
            end(process)
    print(f"{bad} of {len(args.names)} wrong" if bad else f"all {len(args.names)} right", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
