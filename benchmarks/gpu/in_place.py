"""What the monitor costs the engine, told by switching it on and off in one process.

in_place.py [--modes on,untraced] [--concurrency 32,128] [--deadline-s 570] [--cpus 0-15] [--awake-file F]
            [--requests 1:24:16,32:160:64,128:384:64] [--range-ratio 0.5] [--segments 32] [--turns FILE]
            [--option NAME=JSON]
in_place.py --read FILE...      the summary once more, of all outputs together

Two equal servers differ by some percent, and so does one from minute to minute; this compares seconds of one engine. As
in a server, the engine's core is a process of its own; this process is its client, without HTTP. A measurement is the
same traffic each time: so many requests at a time, lengths from the same seed, other tokens, no prefix cache. Modes are
those of switching.py.

Each round measures every mode at every concurrency, in an order drawn anew; ratios are to "off" of the same round. A
line per measurement (RUN) and one per concurrency and mode (IN_PLACE): trimmed geometric mean with its standard error.
Times of passes are those between two answers of the engine, and processor time is that of the engine's whole process
and of the thread that runs the model. Since the traffic is the same, so is what each pass does: ``passes`` compares the
sums, over all passes, of the median over the rounds, which leaves out what a machine does besides; its error is that
of 300 bootstrap samples of the rounds. ``quiet`` does so with lower quartiles: some machines are slow for a second, now
and then.

``at_equal_pace`` is the throughput's ratio as it would be had the processor been as fast with the monitor as without:
the regression of the ratios of the rounds on those of the pace (pace.py), where that is 1. It is worth something where
the monitor does not change the pace itself, which ``pace_us`` tells. The mode "again" is off once more: what comes of
comparing equals.

With --turns several of these share a GPU and its host: they start together, and measure in turn, while they hold FILE.
With --segments each round measures every mode once more, at that concurrency and with the marks of segments.py, which
are not in the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to the engine
os.environ.setdefault("MOE_MONITOR_DIR", tempfile.mkdtemp())
sys.path.insert(0, str(Path(__file__).parent))

import llm_options
import models
import numpy as np
import pace
import segments
from end_to_end import Awake, bind, cpu_list, mean_ratio, say
from switching import MODES, switch

#: Of passes, ms.
LENGTHS = (4.0, 5.0, 6.0, 8.0, 12.0, 20.0)
METRICS = ("tokens_per_s", "pace_us", "mean_pass_ms", "median_pass_ms", "process_ms_per_s", "model_thread_us_per_pass")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="on,untraced")
    parser.add_argument("--concurrency", default="32,128")
    parser.add_argument("--requests", default="1:24:16,32:160:64,128:384:64", help="CONCURRENCY:REQUESTS:OUTPUT_LEN")
    parser.add_argument("--range-ratio", type=float, default=0.5)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--family", default="olmoe")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--deadline-s", type=float, default=570)
    parser.add_argument("--cpus", type=cpu_list, default=[])
    parser.add_argument("--awake-file", type=Path)
    llm_options.add_to(parser)
    parser.add_argument("--turns", type=Path)
    parser.add_argument("--segments", type=int, default=0, metavar="CONCURRENCY", help="where in a pass the time goes")
    parser.add_argument("--read", type=Path, nargs="+")
    args = parser.parse_args()
    args.modes = ["off", *args.modes.split(",")]
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"no such modes: {sorted(unknown)}; there are {', '.join(MODES)}")
    args.concurrency = [int(c) for c in args.concurrency.split(",")]
    shapes = [[int(n) for n in shape.split(":")] for shape in args.requests.split(",")]
    args.requests = {shape[0]: (shape[1], shape[2]) for shape in shapes}
    if unknown := {*args.concurrency, *filter(None, [args.segments])} - set(args.requests):
        parser.error(f"--requests says nothing of {sorted(unknown)} at a time")
    return args


class Traffic:
    """The same requests at each measurement, but for their tokens."""

    def __init__(self, args: argparse.Namespace, vocabulary: int) -> None:
        self._args, self._vocabulary = args, vocabulary
        self._draw = random.Random(1)
        self._number = 0

    def _requests(self, concurrency: int) -> list[tuple[list[int], int]]:
        n, output = self._args.requests[concurrency]
        lengths, ratio = random.Random(concurrency), self._args.range_ratio
        near = lambda mean: max(1, round(mean * lengths.uniform(1 - ratio, 1 + ratio)))  # noqa: E731
        shapes = [(near(self._args.input_len), near(output)) for _ in range(n)]
        return [(self._draw.choices(range(100, self._vocabulary), k=prompt), tokens) for prompt, tokens in shapes]

    def run(self, engine: Any, concurrency: int) -> dict[str, float]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        waiting = self._requests(concurrency)
        kind, tokens = RequestOutputKind.FINAL_ONLY, sum(output for _, output in waiting)
        made = [({"prompt_token_ids": prompt}, SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True,
                 detokenize=False, output_kind=kind)) for prompt, output in waiting]  # fmt: skip
        made.reverse()
        at, start = [], time.perf_counter()
        while made or engine.has_unfinished_requests():
            while made and engine.get_num_unfinished_requests() < concurrency:
                self._number += 1
                engine.add_request(f"{self._number}", *made.pop())
            engine.step()
            at.append(time.perf_counter())
        passes = [1e3 * (b - a) for a, b in itertools.pairwise(at)]
        return {
            "s": at[-1] - start,
            "tokens_per_s": tokens / (at[-1] - start),
            "mean_pass_ms": statistics.fmean(passes),
            "median_pass_ms": statistics.median(passes),
            "answers": len(at),
            "passes": [round(ms, 3) for ms in passes],
        }


def by_pass(mine: np.ndarray, off: np.ndarray) -> list[float]:
    """Ratio of the sums over passes of the medians over rounds, and its error; both [rounds, passes]."""
    ratio = lambda rounds: float(np.median(mine[rounds], axis=0).sum() / np.median(off[rounds], axis=0).sum())  # noqa: E731
    draw, n = np.random.default_rng(0), len(mine)
    samples = [ratio(draw.integers(0, n, n)) for _ in range(300)]
    return [round(ratio(np.arange(n)), 4), round(float(np.std(samples)), 4)]


def quiet(mine: np.ndarray, off: np.ndarray) -> dict[str, float]:
    """The same of lower quartiles instead of medians: the machine as it is at its fastest. And us more a pass."""
    fast = [np.percentile(times, 25, axis=0) for times in (mine, off)]
    of_off, more = fast[0].sum() / fast[1].sum(), 1e3 * (fast[0] - fast[1]).mean()
    return {"of_off": round(float(of_off), 4), "us_per_pass": round(float(more), 1)}


def _line(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Intercept and slope by least squares, without what is further off than 3.5 deviations, as the median of all tells
    them.
    """
    kept = np.isfinite(y)
    for _ in range(3):
        line: np.ndarray
        line, *_ = np.linalg.lstsq(np.column_stack([np.ones(kept.sum()), x[kept]]), y[kept], rcond=None)
        off = np.abs(y - line[0] - line[1] * x)
        kept = off <= 3.5 * 1.4826 * np.median(off)
    return line


def at_equal_pace(ratios: list[float], paces: list[float]) -> dict[str, Any]:
    """``of_off``: where the line through the logarithms of ``ratios`` meets equal paces, and its error, by 1,000
    bootstrap samples of the rounds; its ``slope``.
    """
    y, x = np.log(ratios), np.log(paces)
    draw, n, line = np.random.default_rng(0), len(y), _line(y, x)
    samples = [_line(y[some], x[some])[0] for some in draw.integers(0, n, (1000, n))]
    ratio = float(np.exp(line[0]))
    return {"of_off": [round(ratio, 4), round(ratio * float(np.std(samples)), 4)], "slope": round(float(line[1]), 2)}


def by_length(mine: np.ndarray, off: np.ndarray) -> list[dict[str, float]]:
    """Passes by how long they take, as the median over the rounds of "off" has it: up to ``ms`` (0: longer), how many,
    their share of the time, and us more a pass by medians and by lower quartiles.
    """
    medians = [np.median(times, axis=0) for times in (mine, off)]
    fast = [np.percentile(times, 25, axis=0) for times in (mine, off)]
    rows = []
    for low, high in itertools.pairwise((0.0, *LENGTHS, np.inf)):
        some = (medians[1] >= low) & (medians[1] < high)
        if some.any():
            more, quiet_more = (1e3 * float((a - b)[some].mean()) for a, b in (medians, fast))
            share = float(medians[1][some].sum() / medians[1].sum())
            row = {"ms": high if high < np.inf else 0, "passes": int(some.sum()), "of_time": round(share, 3)}
            rows.append({**row, "us_more": round(more), "quiet_us_more": round(quiet_more)})
    return rows


def longest_fifth(runs: list[list[float]]) -> dict[str, float]:
    """Of the passes of runs of the same traffic: their median, ms, and their share of the time."""
    passes = np.sort(np.median(np.array(runs), axis=0))
    longest = passes[-(len(passes) // 5) :]
    return {"median_ms": round(float(np.median(longest)), 2), "of_time": round(float(longest.sum() / passes.sum()), 3)}


def slow(runs: list[dict[str, Any]], mode: str) -> dict[str, float]:
    """Share of the rounds of ``mode`` whose median pass took more than 1.15 times the lower quartile of "off"; and of
    those that came after a measurement of which this was not so. ``runs``: of one concurrency, in order.
    """
    limit = 1.15 * float(np.percentile([run["median_pass_ms"] for run in runs if run["mode"] == "off"], 25))
    pairs = [(a["median_pass_ms"] > limit, b) for a, b in itertools.pairwise(runs) if a["file"] == b["file"]]
    after = [b["median_pass_ms"] > limit for was, b in pairs if b["mode"] == mode and not was]
    every = [run["median_pass_ms"] > limit for run in runs if run["mode"] == mode]
    return {"share": round(float(np.mean(every)), 3), "after_fast": round(float(np.mean(after)), 3) if after else 0.0}


def summarise(runs: list[dict[str, Any]]) -> None:
    """Print a line per concurrency and mode."""
    keys = sorted({(run["concurrency"], run["mode"]) for run in runs})
    for concurrency, mode in keys:
        of: dict[str, dict[Any, dict[str, Any]]] = {
            m: {(r["file"], r["round"]): r for r in runs if (r["concurrency"], r["mode"]) == (concurrency, m)}
            for m in ("off", mode)
        }
        both = sorted(of["off"].keys() & of[mode].keys())
        row: dict[str, Any] = {"rounds": len(both)}
        known = [metric for metric in METRICS if all(metric in of[m][key] for m in of for key in both)]
        for metric in known:
            row[metric] = {"median": round(statistics.median(of[mode][key][metric] for key in both), 3)}
            if mode != "off":
                row[metric]["of_off"] = mean_ratio([of[mode][key][metric] / of["off"][key][metric] for key in both])
        if mode != "off" and "pace_us" in known and len(both) > 3:
            ratios = [[of[mode][key][m] / of["off"][key][m] for key in both] for m in ("tokens_per_s", "pace_us")]
            row["at_equal_pace"] = at_equal_pace(*ratios)
        # requests that come late make a pass more, now and then
        answers = [of[m][key]["answers"] for m in of for key in both if of[m][key].get("passes")]
        usual = statistics.mode(answers) if answers else 0
        alike = [key for key in both if all(of[m][key]["answers"] == usual for m in of)]
        if mode != "off" and alike:
            times = [np.array([of[m][key]["passes"] for key in alike]) for m in (mode, "off")]
            row["passes"] = {"of_off": by_pass(*times), "rounds": len(alike)}
            row["quiet"] = quiet(*times)
            row["by_length"] = by_length(*times)
        if alike:
            row["longest_fifth"] = longest_fifth([of[mode][key]["passes"] for key in alike])
        row["slow"] = slow([run for run in runs if run["concurrency"] == concurrency], mode)
        row["hooks_us_per_pass"] = round(statistics.median(of[mode][key]["hooks_us_per_pass"] for key in both), 1)
        say("IN_PLACE", concurrency=concurrency, mode=mode, **row)


def spent(before: dict[str, Any], after: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """What the engine's process, its thread and the hooks took between two answers of switching.switch."""
    passes, hooks = after["passes"] - before["passes"], 1e6 * (after["hooks"] - before["hooks"])
    return {
        "process_ms_per_s": 1e3 * (after["process"] - before["process"]) / found["s"],
        "model_thread_us_per_pass": 1e6 * (after["thread"] - before["thread"]) / found["answers"],
        "hooks_us_per_pass": hooks / passes if passes else 0.0,
        "dropped": after["dropped"],
    }


@contextlib.contextmanager
def turn_of(file: Path | None) -> Iterator[None]:
    """While this is held no other measures."""
    if file is None:
        yield
        return
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    time.sleep(0.02)  # for whoever waits


def measure(args: argparse.Namespace, began: float) -> list[dict[str, Any]]:
    from vllm import LLM

    options: dict[str, Any] = {"max_model_len": 2048, "max_num_batched_tokens": 2048, "max_num_seqs": 128}
    options |= {"enable_prefix_caching": False, "gpu_memory_utilization": 0.6, "disable_log_stats": True}
    options |= llm_options.parsed(args.option)
    folder = models.write(Path("/tmp/bench-models") / args.family, args.family)
    llm = LLM(str(folder), load_format="dummy", **options)
    rpc = lambda mode: llm.collective_rpc(switch, args=(mode,))[0]  # noqa: E731
    facts = rpc("on")
    if args.cpus:
        half = len(args.cpus) // 2
        bind(os.getpid(), args.cpus[:half])
        bind(facts["pid"], args.cpus[half:])
    awake = Awake(args.cpus, args.awake_file)
    awake.look()
    config = llm.llm_engine.vllm_config
    methods, routers, graphs = facts["unhooked"]
    if not methods or not routers or (facts["sealed"][0] and not graphs):
        raise RuntimeError(f"off would not be off: (methods, routers, graphs) unhooked would be {facts['unhooked']}")
    say("ENGINE", ready_s=round(time.monotonic() - began, 1), awake=awake.now, options=args.option, **{
        key: facts[key] for key in ("capture", "sealed", "runner", "unhooked")
    }, async_scheduling=config.scheduler_config.async_scheduling)  # fmt: skip
    traffic = Traffic(args, models.FAMILIES[args.family]["vocab_size"] - 100)
    runs: list[dict[str, Any]] = []
    longest: dict[int, float] = {}
    within: dict[str, list[dict[str, Any]]] = {}
    order = random.Random(0)
    try:
        for concurrency in args.concurrency:  # warms up
            traffic.run(llm.llm_engine, concurrency)
        for turn in range(args.rounds):
            marked = [(args.segments, True)] if args.segments else []
            for concurrency, marking in [*((each, False) for each in args.concurrency), *marked]:
                with turn_of(args.turns):
                    for mode in order.sample(args.modes, len(args.modes)):
                        if time.monotonic() - began + 1.5 * longest.get(concurrency, 0) > args.deadline_s:
                            return runs
                        before, since = rpc(mode), time.monotonic()
                        llm.collective_rpc(segments.mark if marking else pace.put)
                        found = traffic.run(llm.llm_engine, concurrency)
                        (told,) = llm.collective_rpc(segments.unmark if marking else pace.take)
                        after = rpc(mode)
                        longest[concurrency] = max(longest.get(concurrency, 0), time.monotonic() - since)
                        if after["errors"] or after["reason"]:
                            raise RuntimeError(f"the monitor reported {after['errors']}: {after['reason']}")
                        if marking:
                            within.setdefault(mode, []).append(told)
                            continue
                        run = {"concurrency": concurrency, "mode": mode, "round": turn, **found, "pace_us": told}
                        run |= spent(before, after, found)
                        run = {k: round(v, 4) if isinstance(v, float) else v for k, v in run.items()}
                        say("RUN", **run)
                        runs.append({**run, "file": ""})
    finally:
        awake.stop()
        llm.llm_engine.engine_core.shutdown()
        if within:
            segments.summarise(within, args.segments)
    return runs


def main() -> None:
    began = time.monotonic()
    args = parse()
    if args.read:
        runs = []
        for path in args.read:
            lines = [line[4:] for line in path.read_text().splitlines() if line.startswith("RUN {")]
            runs += [{**json.loads(line), "file": path.name} for line in lines]
    else:
        runs = measure(args, began)
    summarise(runs)


if __name__ == "__main__":
    main()
