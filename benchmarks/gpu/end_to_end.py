"""End to end on one GPU: ``vllm bench serve`` against servers with and without the monitor, paired and rotating.

end_to_end.py [--arms off,on,all,vllm] [--concurrency 1,32,128] [--rounds 6] [--deadline-s 570]
              [--cpus 0-15] [--awake-file FILE] [--seldom vllm:4] [--prompts 1:64:16,32:256] [--range-ratio 0.5]
end_to_end.py --read FILE...        the summary once more, from the RUN lines of earlier outputs, and of all together
end_to_end.py --startup-pairs 4     seconds from the start to /health, off and on in turn, over one warm compile cache

Arms: off (MOE_MONITOR_ENABLED=0), on (defaults: 10 % of requests traced), all (every request traced), untraced (none),
vllm (no monitor, vLLM's own --enable-return-routed-experts), traced (the server of "on", with requests that ask to be
traced). An arm with a number (off2, on2) is one more server of its kind: equal servers differ by up to some percent,
which no number of rounds tells of a single pair; compared are the means of kinds. Or one server is compared with
itself: arm "out" is the server of "on" with its monitor switched off in place (switching.py), and takes the place of
"off" where there is none.
All servers of a run are up at once; a round measures every arm once at every concurrency, and the arm that begins
rotates. The load comes from ``vllm bench serve``'s own code in this process, since importing it takes seconds.
Short measurements in many rounds tell a small difference sooner than long ones: what a machine does besides changes
over seconds, and a pair of one round has most of it in common.
Prints a JSON line per measurement (RUN) and one per concurrency and arm (E2E) with medians, range, the (trimmed,
geometric) mean of the ratios to "off" of the same round with its standard error (of_off), and processor time a
request; what there is by the deadline is printed, and the servers are stopped in any case.

--prompts and --range-ratio: with many requests of few tokens, and of lengths that differ, the time to first token is
that of requests which come while others are served, one by one. With equal lengths they end and begin all together.

--cpus: API servers run on the first quarter of these, engines on the next half, the client on the rest, so that the
kernel's moving of processes adds no noise. --awake-file: while it exists these CPUs do not sleep (threads of the idle
scheduling class spin on them; needs a C compiler), as with C-states off in a server's firmware; looked at once a round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import models
from servers import Server, die_with_parent, end_on_sigterm, stop_all, total

ARMS: dict[str, tuple[dict[str, str], list[str]]] = {
    "off": ({"MOE_MONITOR_ENABLED": "0"}, []),
    "on": ({}, []),
    "all": ({"MOE_MONITOR_SAMPLE_RATIO": "1"}, []),
    "untraced": ({"MOE_MONITOR_SAMPLE_RATIO": "0"}, []),
    "vllm": ({"MOE_MONITOR_ENABLED": "0"}, ["--enable-return-routed-experts"]),
}
#: Arms that use another arm's server, and what their requests ask for.
SHARED = {"traced": ("on", {"vllm_xargs": {"moe_trace": 1}}), "out": ("on", {})}
METRICS = ("median_itl_ms", "median_tpot_ms", "median_ttft_ms", "output_throughput")
#: Of the API server's event loop, its other threads, and the engine's threads beside its main one.
PROCESSOR_TIME = ("loop_us_per_request", "front_us_per_request", "engine_us_per_request")
PROMPTS = "1:16,32:256,128:640"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="off,on,all,vllm")
    parser.add_argument("--concurrency", default="1,32,128")
    parser.add_argument("--prompts", default=PROMPTS, help="CONCURRENCY:REQUESTS[:OUTPUT_LEN] of one measurement")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--deadline-s", type=float, default=570, help="of the whole script, from its start")
    parser.add_argument("--startup-pairs", type=int, default=0)
    parser.add_argument("--read", type=Path, nargs="+", help="earlier outputs; nothing is run")
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--family", default="olmoe")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--range-ratio", type=float, default=0.0, help="lengths are 1 - R to 1 + R of these")
    parser.add_argument("--kv-bytes", type=int, default=3_500_000_000, help="KV cache of each server, the same for all")
    parser.add_argument("--memory", default="0.2", help="--gpu-memory-utilization: what must be free at the start")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--port", type=int, default=8200)
    parser.add_argument("--ready-file", type=Path, help="made when all servers are ready")
    parser.add_argument("--go-file", type=Path, help="measuring begins when this is there")
    parser.add_argument("--cpus", type=cpu_list, default=[], help="such as 0-15")
    parser.add_argument("--awake-file", type=Path)
    parser.add_argument("--seldom", default="", help="ARM:N, measured in every N-th round only; several by commas")
    parser.add_argument("--server", action="append", default=[], help="one more argument for every server")
    args = parser.parse_args(arguments)
    args.arms = args.arms.split(",")
    if unknown := set(map(kind_of, args.arms)) - set(ARMS) - set(SHARED):
        parser.error(f"no such arms: {sorted(unknown)}; there are {', '.join([*ARMS, *SHARED])}")
    if missing := {SHARED[arm][0] for arm in args.arms if arm in SHARED} - set(args.arms):
        parser.error(f"these arms are needed too: {sorted(missing)}")
    args.seldom = {arm: int(n) for arm, n in (pair.split(":") for pair in filter(None, args.seldom.split(",")))}
    shapes = [[int(n) for n in shape.split(":")] for shape in args.prompts.split(",")]
    args.prompts = {shape[0]: (shape[1], shape[2] if len(shape) > 2 else args.output_len) for shape in shapes}
    args.concurrency = [int(c) for c in args.concurrency.split(",")]
    if missing := set(args.concurrency) - set(args.prompts):
        parser.error(f"--prompts says nothing of concurrency {sorted(missing)}")
    return args


def cpu_list(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def say(tag: str, **values: Any) -> None:
    print(f"{tag} {json.dumps(values)}", flush=True)


def launch(args: argparse.Namespace, arm: str, port: int, folder: Path, scratch: Path) -> Server:
    env, extra = ARMS[kind_of(arm)]
    env = {"CUDA_VISIBLE_DEVICES": args.gpu, "MOE_MONITOR_DIR": str(scratch / "run"), **env}
    options = ["--load-format", "dummy", "--max-model-len", "2048", "--no-enable-prefix-caching"]
    options += ["--gpu-memory-utilization", args.memory, "--kv-cache-memory-bytes", str(args.kv_bytes)]
    options += ["--max-num-seqs", str(args.max_num_seqs), "--max-num-batched-tokens", "2048", *extra, *args.server]
    if "out" in args.arms and arm == "on":
        options += ["--worker-extension-cls", "switching.Switching", "--middleware", "switching.Middleware"]
        env |= {
            "VLLM_SERVER_DEV_MODE": "1",
            "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
        }
    return Server(folder, port, scratch / f"{arm}-{port}.log", options, env)


class Client:
    """``vllm bench serve`` without the start of an interpreter for each measurement."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        serve.get_tokenizer = functools.cache(serve.get_tokenizer)
        self._main = serve.main_async
        self._parser = FlexibleArgumentParser()
        serve.add_cli_args(self._parser)
        self._lengths = ["--random-input-len", str(args.input_len), "--random-range-ratio", str(args.range_ratio)]
        self._folder = folder

    def run(
        self, port: int, concurrency: int, prompts: int, output: int, seed: int, body: dict[str, Any]
    ) -> dict[str, Any]:
        options = ["--model", "m", "--tokenizer", str(self._folder), "--port", str(port), "--dataset-name", "random"]
        options += ["--host", "127.0.0.1", *self._lengths, "--num-prompts", str(prompts), "--temperature", "0"]
        options += ["--max-concurrency", str(concurrency), "--seed", str(seed), "--disable-tqdm", "--ignore-eos"]
        options += ["--random-output-len", str(output)]
        if body:
            options += ["--extra-body", json.dumps(body)]
        options += ["--ready-check-timeout-sec", "0", "--save-detailed"]  # keeps the errors in the result
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            result = asyncio.run(self._main(self._parser.parse_args(options)))
        if result["completed"] != prompts:
            first = next((error for error in result["errors"] if error), "")
            raise RuntimeError(f"{result['completed']} of {prompts} requests succeeded on port {port}: {first[-1500:]}")
        return result


class Results:
    """Measurements by concurrency (and whether CPUs were kept awake), round and arm."""

    def __init__(self, arms: list[str]) -> None:
        self.arms = arms
        self._found: dict[tuple[bool, int], dict[int, dict[str, dict[str, float]]]] = {}

    def add(self, concurrency: int, awake: bool, turn: int, arm: str, values: dict[str, float]) -> None:
        self._found.setdefault((awake, concurrency), {}).setdefault(turn, {})[arm] = values

    def lines(self) -> list[dict[str, Any]]:
        """A row per concurrency and arm, and one for arms with several servers. Ratios pair an arm with "off" of the
        same round: the geometric mean of its servers; one of those with the others.
        """
        rows = []
        together: dict[str, list[str]] = {}
        for arm in self.arms:
            together.setdefault(kind_of(arm), []).append(arm)
        groups = [[arm] for arm in self.arms] + [arms for arms in together.values() if len(arms) > 1]
        for (awake, concurrency), turns in sorted(self._found.items()):
            for arms in groups:
                mine = [found for found in turns.values() if set(arms) <= set(found)]
                if not mine:
                    continue
                row: dict[str, Any] = {"concurrency": concurrency, "awake": awake, "arm": "+".join(arms)}
                row["runs"] = len(mine)
                for metric in METRICS:
                    values = [_mean(found, arms, metric) for found in mine]
                    row[metric] = {"median": round(statistics.median(values), 3)}
                    row[metric]["range"] = [round(min(values), 3), round(max(values), 3)]
                    base = [arm for arm in together.get("off") or together.get("out", []) if arm not in arms]
                    whole = [found for found in mine if base and set(base) <= set(found)]
                    means = [(_mean(found, arms, metric), _mean(found, base, metric)) for found in whole]
                    pairs = [a / b for a, b in means if a > 0 < b]
                    if pairs:
                        row[metric]["of_off"] = mean_ratio(pairs)
                        row[metric]["untrimmed"] = mean_ratio(pairs, trim=0)
                        row[metric]["ratio_median"] = round(statistics.median(pairs), 4)
                        row[metric]["ratio_range"] = [round(min(pairs), 4), round(max(pairs), 4)]
                for key in ("host_us_per_step", *PROCESSOR_TIME):
                    known = [found[arm][key] for found in mine for arm in arms if found[arm].get(key) is not None]
                    if known:
                        row[key] = round(statistics.median(known), 1)
                rows.append(row)
        return rows


def kind_of(arm: str) -> str:
    """What an arm with a number is another server of."""
    return arm.rstrip("0123456789")


def _mean(found: dict[str, dict[str, float]], arms: list[str], metric: str) -> float:
    """Geometric, over some arms of one round."""
    return float(math.prod(found[arm][metric] for arm in arms) ** (1 / len(arms)))


def mean_ratio(pairs: list[float], trim: float = 0.2) -> list[float]:
    """Geometric mean of the middle three fifths, and its standard error: now and then a machine stands still for a
    moment, which says nothing of an arm. Error of a trimmed mean after Yuen (Biometrika 61, 1974): from the deviation
    of the values with what is trimmed replaced by the last that is not. NaN for a single pair.
    """
    logs = sorted(math.log(ratio) for ratio in pairs)
    cut = int(len(logs) * trim)
    kept = logs[cut : len(logs) - cut]
    replaced = [kept[0]] * cut + kept + [kept[-1]] * cut
    error = statistics.stdev(replaced) / (len(kept) / len(logs) * len(logs) ** 0.5) if len(logs) > 1 else math.nan
    ratio = math.exp(statistics.fmean(kept))
    return [round(ratio, 4), round(ratio * error, 4)]


def read_again(paths: list[Path]) -> None:
    """Print the summaries of earlier outputs, and (TOGETHER) the means of all, weighted by the inverse square of their
    errors.
    """
    found: dict[tuple[Any, ...], list[list[float]]] = {}
    for path in paths:
        runs = [json.loads(line[4:]) for line in path.read_text().splitlines() if line.startswith("RUN {")]
        results = Results(list(dict.fromkeys(run["arm"] for run in runs)))
        for run in runs:
            results.add(run["concurrency"], run.get("awake", False), run["round"], run["arm"], run)
        for row in results.lines():
            say("E2E", file=path.name, **row)
            for metric in METRICS:
                if "of_off" in row[metric] and row["runs"] > 1:
                    key = (row["awake"], row["concurrency"], row["arm"], metric)
                    found.setdefault(key, []).append(row[metric]["of_off"])
    for (awake, concurrency, arm, metric), means in found.items():
        weights = [1 / error**2 for _, error in means]
        logs = [math.log(mean) for mean, _ in means]
        mean = math.exp(sum(w * x for w, x in zip(weights, logs, strict=True)) / sum(weights))
        together = [round(mean, 4), round(sum(weights) ** -0.5, 4)]
        say("TOGETHER", awake=awake, concurrency=concurrency, arm=arm, metric=metric, of_off=together, files=len(means))


def hooks(server: Server) -> tuple[float, float]:
    """(seconds in the monitor's hooks, passes) since the start; NaN without the monitor."""
    samples = server.metrics()
    return total(samples, "moe_monitor_hook_seconds_total"), total(samples, "moe_forward_passes_total")


def switch(server: Server, mode: str) -> None:
    """Switch its monitor off or on. Raises RuntimeError with what the monitor says if it is not well."""
    server.post(f"/moe_monitor/{mode}")
    (found,) = server.post("/collective_rpc", method="switch_moe_monitor", args=[mode])["results"]
    if found["errors"] or found["reason"]:
        raise RuntimeError(f"the monitor on port {server.port} reported {found['errors']}: {found['reason']}")


def place(cpus: list[int], servers: list[Server]) -> None:
    """Give API servers, engines and this client CPUs of their own; servers take turns, so they share them."""
    quarter = max(1, len(cpus) // 4)
    front, engines, client = cpus[:quarter], cpus[quarter:-quarter], cpus[-quarter:]
    for server in servers:
        for pid in server.processes():
            bind(pid, front if pid == server.process.pid else engines)
    bind(os.getpid(), client)


def bind(pid: int, cpus: list[int]) -> None:
    """Keep the threads of a process, as they are now, on these CPUs."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            os.sched_setaffinity(int(task.name), cpus)


class Awake:
    """Keeps CPUs from sleeping while a file exists. ``now``: whether they are kept."""

    SPIN = "int main(void) { for (;;) __builtin_ia32_pause(); }"

    def __init__(self, cpus: list[int], file: Path | None) -> None:
        self._cpus, self._file = cpus, file
        self._spinning: list[subprocess.Popen[bytes]] = []

    @property
    def now(self) -> bool:
        return bool(self._spinning)

    def look(self) -> None:
        wanted = self._file is not None and self._file.exists()
        if wanted and not self.now:
            self._start()
        elif self.now and not wanted:
            self.stop()

    def _start(self) -> None:
        program = Path(tempfile.mkdtemp()) / "spin"
        try:
            subprocess.run(["cc", "-O1", "-x", "c", "-o", str(program), "-"], input=self.SPIN.encode(), check=True)
        except (OSError, subprocess.SubprocessError) as error:
            say("ASLEEP", why=str(error))
            self._file = None
            return
        for cpu in self._cpus:
            spin = subprocess.Popen([str(program)], preexec_fn=die_with_parent)  # noqa: PLW1509 - no threads are needed
            os.sched_setscheduler(spin.pid, os.SCHED_IDLE, os.sched_param(0))
            os.sched_setaffinity(spin.pid, {cpu})
            self._spinning.append(spin)

    def stop(self) -> None:
        for spin in self._spinning:
            spin.kill()
            spin.wait()
        self._spinning = []


def compare(args: argparse.Namespace, folder: Path, scratch: Path, began: float) -> None:
    servers: dict[str, Server] = {}
    left = lambda: args.deadline_s - (time.monotonic() - began)  # noqa: E731
    results = Results(args.arms)
    awake = Awake(args.cpus, args.awake_file)
    own = [arm for arm in args.arms if arm not in SHARED]
    try:
        for i, arm in enumerate(own):
            servers[arm] = launch(args, arm, args.port + i, folder, scratch)
            if i == 0:  # the first fills the compile cache
                client = Client(args, folder)  # imports while the server starts
                servers[arm].wait_ready(min(300, left()))
                say("READY", arm=arm, seconds=round(servers[arm].ready_s, 1), cache="as found")
        for arm in own[1:]:
            servers[arm].wait_ready(min(300, left()))
            say("READY", arm=arm, seconds=round(servers[arm].ready_s, 1), cache="warm", beside=len(own) - 2)
        for arm in args.arms:
            if arm in SHARED:
                servers[arm] = servers[SHARED[arm][0]]
        if args.ready_file:
            args.ready_file.touch()
        while args.go_file and not args.go_file.exists() and left() > 20:
            time.sleep(0.2)
        if args.cpus:
            place(args.cpus, list(dict.fromkeys(servers.values())))
        longest = dict.fromkeys(args.concurrency, 0.0)
        for turn in range(args.rounds + 1):  # turn 0 warms up
            awake.look()
            host_time = turn % 4 == 1  # reading it takes a second, which is better spent
            for concurrency in args.concurrency:
                begin = (turn + turn // len(args.arms)) % len(args.arms)  # an arm that is seldom measured rotates, too
                order = args.arms[begin:] + args.arms[:begin]
                if left() < 15 + len(order) * longest[concurrency]:
                    say("DEADLINE", rounds_done=turn - 1, before_concurrency=concurrency)
                    return
                for arm in order:
                    if turn % args.seldom.get(arm, 1):
                        continue
                    start = time.monotonic()
                    if "out" in args.arms and servers[arm] is servers["out"]:
                        switch(servers[arm], "off" if arm == "out" else "on")
                    before = hooks(servers[arm]) if host_time else (0.0, 0.0)
                    prompts, output = args.prompts[concurrency]
                    if turn == 0:
                        prompts = max(concurrency, prompts // 4)
                    body = SHARED.get(arm, ("", {}))[1]
                    used = servers[arm].processor_time()
                    values = client.run(servers[arm].port, concurrency, prompts, output, turn, body)
                    used = {k: t - used[k] for k, t in servers[arm].processor_time().items()}
                    if host_time:
                        time.sleep(0.6)  # the counters are published twice a second
                    after = hooks(servers[arm]) if host_time else (0.0, 0.0)
                    steps = after[1] - before[1]
                    host = 1e6 * (after[0] - before[0]) / steps if steps > 0 else None
                    if turn == 0:
                        continue
                    longest[concurrency] = max(longest[concurrency], time.monotonic() - start)
                    kept = {metric: values[metric] for metric in METRICS} | {"host_us_per_step": host}
                    kept |= {f"{k}_us_per_request": 1e6 * t / prompts for k, t in used.items()}
                    results.add(concurrency, awake.now, turn, arm, kept)
                    shown = {k: None if v is None else round(v, 3) for k, v in kept.items()}
                    say(
                        "RUN",
                        round=turn,
                        concurrency=concurrency,
                        arm=arm,
                        awake=awake.now,
                        **shown,
                        s=round(time.monotonic() - start, 1),
                    )
    finally:
        for row in results.lines():
            say("E2E", **row)
        with contextlib.suppress(Exception):
            for arm in args.arms:
                samples = servers[arm].metrics()
                names = ("moe_monitor_active", "moe_monitor_sampled_requests_total")
                seen: dict[str, Any] = {name: total(samples, name) for name in names}
                seen["dropped"] = {
                    labels["what"]: n for name, labels, n in samples if name == "moe_monitor_dropped_total" and n
                }
                info = [labels.get("capture") for name, labels, _ in samples if name == "moe_monitor_info"]
                say("STATE", arm=arm, capture=info, **{k: None if v != v else v for k, v in seen.items()})
        stop_all(list(dict.fromkeys(servers.values())))
        awake.stop()


def startup(args: argparse.Namespace, folder: Path, scratch: Path, began: float) -> None:
    """Start-up times, one server at a time; the first start of all fills the caches and is not counted."""
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    slowest = 0.0
    try:
        for turn in range(2 * args.startup_pairs + 2):
            pair = ("off", "on") if (turn // 2) % 2 else ("on", "off")
            arm = pair[turn % 2]
            if turn > 1 and time.monotonic() - began + slowest + 20 > args.deadline_s:
                say("DEADLINE", starts_done=turn)
                break
            server = launch(args, arm, args.port + turn, folder, scratch)
            try:
                ready = server.wait_ready(min(300, args.deadline_s - (time.monotonic() - began)))
            finally:
                server.stop()
            say("START", turn=turn, arm=arm, seconds=round(ready, 2), counted=turn > 1)
            if turn > 1:
                seconds[arm].append(ready)
                slowest = max(slowest, time.monotonic() - server.started)
    finally:
        pairs = list(zip(seconds["on"], seconds["off"], strict=False))
        if pairs:
            medians = {f"{arm}_median_s": round(statistics.median(found), 2) for arm, found in seconds.items()}
            ranges = {f"{arm}_range_s": [round(min(found), 2), round(max(found), 2)] for arm, found in seconds.items()}
            more = round(statistics.median(a - b for a, b in pairs), 2)
            say("STARTUP", pairs=len(pairs), **medians, **ranges, on_minus_off_median_s=more)


def main() -> None:
    began = time.monotonic()
    end_on_sigterm()
    args = parse()
    if args.read:
        read_again(args.read)
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        folder = models.write(scratch / args.family, args.family)
        try:
            (startup if args.startup_pairs else compare)(args, folder, scratch, began)
        except RuntimeError as error:
            say("FAILED", error=str(error)[-3500:])
            raise SystemExit(1) from None


if __name__ == "__main__":
    main()
