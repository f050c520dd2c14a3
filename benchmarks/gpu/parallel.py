"""Expert parallelism over N GPUs: exact counts, load by rank, stragglers, and what the monitor costs.

parallel.py --gpus N [--mode tp|dp] [--family olmoe|wide|qwen3_moe] [--routings none,uniform_random,skewed]
parallel.py --gpus N [--mode tp|dp] [--family ...] --overhead     end to end, off and on, see end_to_end.py
Everything after ``--`` goes to every server (for example ``-- --enable-eplb``).

Servers run ``-tp N`` or ``-dp N`` with ``--enable-expert-parallel``, one per routing, all up at once on the same GPUs.
Routings: none (the model's own gates), vLLM's routing simulator (VLLM_MOE_ROUTING_SIMULATION_STRATEGY) with its
uniform_random or normal_routing, and skewed: the simulator's normal distribution with its mean at -1.1, registered by
inject/sitecustomize.py, which sends 86 % of all choices to the lower half of the experts.

Oracles: each worker's in-graph shadow for the counts, by engine (tensor-parallel ranks see the same tokens; the first
counts); vLLM's linear placement, rank r holding experts rE/N to (r+1)E/N, with the shadow's counts for the load
by rank.
Prints a JSON line per routing (RESULT) and a table; ends with 1 when a number differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import end_to_end
import models
import numpy as np
from servers import Server, end_on_sigterm, stop_all

#: By routing, the share of choices that the lower half of the experts gets: N(mean, 1) below 0.
LOWER_HALF = {"uniform_random": 0.5, "normal_routing": 0.5, "skewed": 0.8643}
SKEW = "1.1"
COLUMNS = ("routing", "tokens", "largest difference", "by rank", "imbalance", "expected", "straggler wait", "ready, s")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--mode", choices=("tp", "dp"), default="tp")
    parser.add_argument("--family", default="olmoe")
    parser.add_argument("--routings", default="none,uniform_random,skewed")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--load-s", type=float, default=20, help="of steady load after the exact part, for the gauges")
    parser.add_argument("--port", type=int, default=8300)
    parser.add_argument("--deadline-s", type=float, default=570)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--concurrency", default="1,32,128")
    parser.add_argument("--kv-bytes", type=int, default=3_000_000_000)
    parser.add_argument("--stagger-s", type=float, default=8)
    parser.add_argument("options", nargs="*", help="for every server, after --")
    args = parser.parse_args(arguments)
    args.routings = args.routings.split(",")
    if unknown := set(args.routings) - {"none", *LOWER_HALF}:
        parser.error(f"no such routings: {sorted(unknown)}")
    return args


def parallelism(args: argparse.Namespace) -> list[str]:
    if args.gpus == 1:
        return list(args.options)  # to try the script
    return [f"-{args.mode}", str(args.gpus), "--enable-expert-parallel", *args.options]


def launch(args: argparse.Namespace, routing: str, port: int, folder: Path, scratch: Path) -> Server:
    own = scratch / routing
    (own / "shadow").mkdir(parents=True)
    inject = os.pathsep.join([str(Path(__file__).parent / "inject"), os.environ.get("PYTHONPATH", "")])
    env = {"SHADOW_DIR": str(own / "shadow"), "MOE_MONITOR_DIR": str(own / "run"), "PYTHONPATH": inject}
    if routing != "none":
        env["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = routing
    if routing == "skewed":
        env["SKEW"] = SKEW
    options = ["--load-format", "dummy", "--max-model-len", "2048", "--gpu-memory-utilization", "0.2"]
    options += ["--kv-cache-memory-bytes", str(args.kv_bytes), "--max-num-batched-tokens", "2048"]
    options += ["--cudagraph-capture-sizes", "1", "2", "4", "8", "16", "32", "64", *parallelism(args)]
    return Server(folder, port, scratch / f"{routing}.log", options, env)


def ask(url: str, prompt: list[int], tokens: int) -> None:
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=180) as answer:
        answer.read()


def drive(url: str, requests: int, seconds: float) -> None:
    """Mixed requests, then a steady load for the gauges' windows. Raises what a failed request raises."""
    draw = random.Random(4)
    end = float("inf")

    def mixed(_: int) -> None:
        prompt = [draw.randrange(4000) for _ in range(draw.choice([3, 60, 400, 1300]))]
        ask(url, prompt, draw.choice([1, 20, 60]))

    def steady(_: int) -> None:
        while time.monotonic() < end:
            ask(url, [draw.randrange(4000) for _ in range(32)], 64)

    with ThreadPoolExecutor(48) as pool:
        list(pool.map(mixed, range(requests)))
        end = time.monotonic() + seconds
        list(pool.map(steady, range(32)))


def examine(args: argparse.Namespace, routing: str, server: Server, scratch: Path) -> dict[str, Any]:
    """Compare what the boards and /metrics of an idle server say with the shadows of its workers."""
    from moe_monitor.layout import RowLayout
    from moe_monitor.snapshot import read_engines

    own = scratch / routing
    engines = {e.engine: e for e in read_engines(own / "run")}
    shadows = {
        p.name.removesuffix(".npy"): np.load(p) for p in (own / "shadow").glob("dp*.tp*.npy") if ".tmp" not in p.name
    }
    routers = {p.read_text() for p in (own / "shadow").glob("*.router")}
    layout = next(RowLayout(e.layout.experts) for e in engines.values() if e.layout is not None)
    difference: dict[str, int] = {}
    repeats = True
    for name, engine in engines.items():
        theirs = shadows[f"dp{name}.tp0"]
        for column, at in layout.offsets.items():
            difference[column] = max(difference.get(column, 0), int(np.abs(engine.rows - theirs)[:, at].max()))
        counts = layout.column(theirs, "experts")
        same = [layout.column(s, "experts") for n, s in shadows.items() if n.startswith(f"dp{name}.")]
        repeats = repeats and all((counts == other).all() for other in same)
    total = sum(layout.column(shadows[f"dp{name}.tp0"], "experts") for name in engines)
    samples = server.metrics()
    layers = next(iter(engines.values())).layers
    by_rank, expected = _by_rank(args, samples, total, layers)
    wait = {labels["ep_rank"]: v for n, labels, v in samples if n == "moe_ep_straggler_wait_ratio"}
    gauge = [v for n, labels, v in samples if n == "moe_ep_rank_imbalance_ratio" and labels["window"] == "1m"]
    placed = {str(rank): len(experts) for e in engines.values() for rank, experts in e.placement.items()}
    half = total[:, : total.shape[1] // 2].sum() / total.sum()
    return {
        "routing": routing,
        "mode": args.mode,
        "gpus": args.gpus,
        "family": args.family,
        "ready_s": round(server.ready_s or 0, 1),
        "engines": {n: [e.status.active, e.status.capture, e.status.reason, e.passes] for n, e in engines.items()},
        "sealed": {p.name.partition(".npy")[0]: p.read_text() for p in sorted((own / "shadow").glob("*.sealed"))},
        "errors": {n: e.status.errors for n, e in engines.items() if e.status.errors},
        "tokens": int(sum(layout.column(e.rows, "tokens").max() for e in engines.values())),
        "largest_difference": {name: n for name, n in difference.items() if n},
        "router_classes": sorted(routers),
        "lower_half_share": round(float(half), 4),
        "lower_half_expected": LOWER_HALF.get(routing),
        "tensor_parallel_ranks_route_alike": repeats,
        "experts_per_ep_rank": placed,
        "ep_rank_tokens_difference": by_rank,
        "ep_rank_imbalance_1m": [round(min(gauge), 4), round(max(gauge), 4)] if gauge else None,
        "ep_rank_imbalance_since_start": expected,
        "straggler_wait": {rank: round(v, 4) for rank, v in sorted(wait.items())} or None,
        "host_us_per_pass": round(end_to_end_host(samples), 1),
    }


def end_to_end_host(samples: list[tuple[str, dict[str, str], float]]) -> float:
    from servers import total

    return 1e6 * total(samples, "moe_monitor_hook_seconds_total") / max(1.0, total(samples, "moe_forward_passes_total"))


def _by_rank(args: argparse.Namespace, samples: Any, counts: Any, layers: Any) -> tuple[int | None, list[float] | None]:
    """(largest difference of moe_ep_rank_tokens_total to the shadow's counts over vLLM's linear placement, smallest and
    largest imbalance of the ranks over the layers by the same); None without such metrics.
    """
    found = [(labels, v) for n, labels, v in samples if n == "moe_ep_rank_tokens_total"]
    if not found:
        return None, None
    theirs = counts.reshape(len(layers), args.gpus, -1).sum(axis=2)
    mine = np.zeros_like(theirs)
    for labels, value in found:
        mine[layers.index(int(labels["layer"])), int(labels["ep_rank"])] += int(value)
    imbalance = theirs.max(axis=1) / theirs.mean(axis=1)
    return int(np.abs(mine - theirs).max()), [round(float(imbalance.min()), 4), round(float(imbalance.max()), 4)]


#: Columns of the counter rows that must be identical; the others are fixed-point sums and histograms of floats.
EXACT = ("experts", "tokens", "passes", "active", "active_sum", "per_token", "per_token_sum", "nonfinite")


def good(args: argparse.Namespace, result: dict[str, Any]) -> bool:
    wanted = result["lower_half_expected"]
    return (
        all(active for active, *_ in result["engines"].values())
        and not set(result["largest_difference"]) & set(EXACT)
        and result["ep_rank_tokens_difference"] == (None if args.gpus == 1 or "--enable-eplb" in args.options else 0)
        and (wanted is None or abs(result["lower_half_share"] - wanted) < 0.01)
    )


def table(results: list[dict[str, Any]]) -> str:
    rows = [COLUMNS]
    for r in results:
        wait = None if r["straggler_wait"] is None else list(r["straggler_wait"].values())
        rows.append(
            (
                r["routing"],
                f"{r['tokens']:,}",
                ", ".join(f"{k} {v}" for k, v in r["largest_difference"].items()) or "0",
                "no metric"
                if r["ep_rank_tokens_difference"] is None
                else f"differs by {r['ep_rank_tokens_difference']}",
                str(r["ep_rank_imbalance_1m"]),
                str(r["ep_rank_imbalance_since_start"]),
                "not measured" if wait is None else f"{min(wait):.3f} to {max(wait):.3f}",
                str(r["ready_s"]),
            )
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(COLUMNS), *lines[1:]])


def exact(args: argparse.Namespace, folder: Path, scratch: Path, began: float) -> bool:
    servers: dict[str, Server] = {}
    results: list[dict[str, Any]] = []
    left = lambda: args.deadline_s - (time.monotonic() - began)  # noqa: E731
    bad = False
    try:
        for i, routing in enumerate(args.routings):
            if i:
                time.sleep(args.stagger_s)  # ports are found by trying, and not at the same time
            servers[routing] = launch(args, routing, args.port + 20 * i, folder, scratch)
        for routing, server in servers.items():
            server.wait_ready(max(1.0, left() - 30))
            end_to_end.say("READY", routing=routing, seconds=round(server.ready_s or 0, 1))
        for routing, server in servers.items():
            if left() < 60 + args.load_s:
                end_to_end.say("DEADLINE", before=routing)
                bad = True
                break
            drive(server.url, args.requests, args.load_s)
            time.sleep(2)  # the last steps are published within a second
            results.append(examine(args, routing, server, scratch))
            ok = good(args, results[-1])
            bad = bad or not ok
            end_to_end.say("RESULT", ok=ok, **results[-1])
            if not ok:
                print("\n".join(server.notes()[:6]), flush=True)
    except Exception:
        for server in servers.values():  # their logs are gone when the script has ended
            print(server.trouble(), flush=True)
        raise
    finally:
        if results:
            where = f"-{args.mode} {args.gpus} --enable-expert-parallel, {args.family}"
            engines = statistics.median(len(r["engines"]) for r in results)
            print(f"TABLE {where}, {engines:g} engine(s)\n{table(results)}", flush=True)
        stop_all(list(servers.values()))
    return not bad


def overhead(args: argparse.Namespace, folder: Path, scratch: Path, began: float) -> None:
    options = ["--arms", "off,on", "--gpu", ",".join(map(str, range(args.gpus))), "--rounds", str(args.rounds)]
    options += ["--deadline-s", str(args.deadline_s), "--concurrency", args.concurrency, "--port", str(args.port)]
    options += [f"--server={option}" for option in parallelism(args)]
    end_to_end.compare(end_to_end.parse(options), folder, scratch, began)


def main() -> None:
    began = time.monotonic()
    end_on_sigterm()
    args = parse()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        folder = models.write(scratch / args.family, args.family)
        try:
            ok = bool(overhead(args, folder, scratch, began)) if args.overhead else exact(args, folder, scratch, began)
        except (RuntimeError, OSError) as error:
            end_to_end.say("FAILED", error=str(error)[-3500:])
            raise SystemExit(1) from None
    sys.exit(0 if ok or args.overhead else 1)


if __name__ == "__main__":
    main()
