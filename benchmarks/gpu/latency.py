"""Durations on a real GPU: against the profiler, with a planted slowdown, and what timing costs.

latency.py [--profile] [--layers 16] [--deadline-s 300] [--sizes 1,32,256] [--prefill 8192] [--ready-file F --go-file F]
One process, OLMoE-1B-7B shape, V1 or V2 (VLLM_USE_V2_MODEL_RUNNER=1). STAGES only with --profile, since CUPTI must be
there before graphs are made; REPLAY, PREFILL and COST only without, since CUPTI costs time. Prints JSON lines:

TOKENS    greedy tokens with one pass in three timed against none timed
MEMORY    twins: nodes, device memory, seconds to lay aside and to make ready
STAGES    per batch size: median durations by stage, layer by layer and in sum, against CUPTI's (torch.profiler) times
          of the same kernels: "kernels" is their sum, "span" also has the gaps between them
REPLAY    decode steps with no, some and all rows traced, timing at its default; PREFILL likewise (see timing.py)
PLANTED   a busy kernel in one layer: the change of every layer's experts stage
COST      GPU time of a decode step with one pass in 200 timed (and counted) over the plain replay
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("MOE_MONITOR_DIR", "/tmp/moe-monitor-bench")
os.environ.setdefault("MOE_MONITOR_LATENCY_EVERY", "10")
sys.path.insert(0, str(Path(__file__).parent))

import exact
import models
import numpy as np
import torch
import triton
import triton.language as tl
from timing import plain_replay

PLANTED_LAYER = 5


@triton.jit
def busy(count, out):
    n = tl.load(count)
    x = 1.0
    for _ in range(n):
        x = x * 1.0000001 + 1e-9
    tl.store(out, x)


class Plant:
    """A kernel in one layer that is busy for as long as a number on the device says; 0 at first."""

    def __init__(self, runner) -> None:
        self.count = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.out = torch.zeros(1, device="cuda")
        busy[(1,)](self.count, self.out)
        original = runner.routed_experts.forward_modular

        def forward_modular(*args, **kwargs):
            busy[(1,)](self.count, self.out)
            return original(*args, **kwargs)

        runner.routed_experts.forward_modular = forward_modular


def early_cupti() -> None:
    """CUPTI sees the kernels of those graphs only that were made after it was there."""
    os.environ |= {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()


def say(kind: str, line: dict) -> None:
    print(kind, json.dumps(line), flush=True)


def time_passes(timing, hit) -> None:
    """From now on, those for whose number ``hit`` says so."""
    sampler = timing.clock._sampler
    sampler.hit, sampler.next, timing.soonest = hit, 0, 0


def always(timing) -> None:
    time_passes(timing, lambda number: True)


def settle(timing) -> None:
    torch.cuda.synchronize()
    timing.collect()


class Steps:
    """Catches the samples that a clock finds, as it finds them."""

    def __init__(self, timing) -> None:
        self.found = []
        clock = timing.clock
        add = clock.table.add
        clock.table.add = lambda step: (self.found.append(step), add(step))

    def take(self):
        steps, self.found = self.found, []
        return steps


def replay_with_hooks(capture, key, replay, tokens: int) -> None:
    capture.begin_pass(tokens, dict.fromkeys(range(tokens), 1))
    replay()
    capture.replayed = key
    capture.end_pass(tokens)


#: What does not lie between the model's kernels: the monitor's are on a branch beside them.
BESIDE = ("Memcpy", "Memset", "_fetch_kernel", "_meter_kernel")


def launch(twin, capture) -> None:
    """A twin by itself, which counts no tokens."""
    capture.meter.graphs.mailbox.post(0)
    twin.launch(torch.cuda.current_stream().cuda_stream)


def kernels_of(work, repeat: int):
    """(name, start, end) in ns of the kernels of ``repeat`` runs, by CUPTI, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeat):
            work()
        torch.cuda.synchronize()
    events = [
        (e.name(), e.start_ns(), e.end_ns())
        for e in profile.profiler.kineto_results.events()
        if "CUDA" in str(e.device_type()) and not any(part in e.name() for part in BESIDE)
    ]
    return sorted(events, key=lambda e: e[1])


def split(kernels, layers: int):
    """The kernels of one twin -> per layer {stage: positions among the kernels that are not stamps}."""
    from moe_monitor.capture.clock import POINTS

    position, stamps = 0, []
    for name, _, _ in kernels:
        if "moe_monitor_stamp" in name:
            stamps.append(position)
        else:
            position += 1
    inner = stamps[-1 - layers * POINTS : -1]  # before them the two at the begin, after them the end
    result = []
    for layer in range(layers):
        g0, g1, enter, r0, r1, leave = inner[layer * POINTS : (layer + 1) * POINTS]
        router = list(range(g0, g1)) + list(range(r0, r1))
        result.append({"router": router, "experts": list(range(enter, r0)) + list(range(r1, leave))})
    return result


def against_profiler(capture, runner, replay, key, tokens: int, repeat: int = 20) -> dict:
    clock, timing = capture.timing.clock, capture.timing
    layers = len(capture.meter.layers)
    steps = Steps(timing)
    always(timing)
    for _ in range(3):
        replay_with_hooks(capture, key, replay, tokens)
        settle(timing)
        time.sleep(0.05)
    steps.take()
    for _ in range(repeat):
        replay_with_hooks(capture, key, replay, tokens)
        settle(timing)
    ours = [s for s in steps.take() if s.stages is not None]
    if not ours:
        return {"batch": tokens, "error": "no twin"}
    stages = np.median(np.stack([s.stages for s in ours]), axis=0) / 1e3
    step_us = statistics.median(s.nanoseconds for s in ours) / 1e3
    # which kernels lie between which marks: from one twin under the profiler
    group = clock._groups[key]
    (twin,) = group.twins
    under = kernels_of(lambda: launch(twin, capture), 1)
    places = split(under, layers)
    plain_names = [k[0] for k in under if "moe_monitor_stamp" not in k[0]]
    # their times: from the ordinary graph, which has no stamps
    runs = kernels_of(replay, repeat)
    n = len(plain_names)
    if len(runs) != n * repeat:
        return {"batch": tokens, "error": f"{len(runs)} kernels in {repeat} replays, the twin has {n}"}
    same = all(runs[i][0] == plain_names[i % n] for i in range(len(runs)))
    busy_us = np.array([(e - b) / 1e3 for _, b, e in runs]).reshape(repeat, n)
    begin = np.array([b for _, b, _ in runs], dtype=np.float64).reshape(repeat, n) / 1e3
    end = np.array([e for _, _, e in runs], dtype=np.float64).reshape(repeat, n) / 1e3
    previous = np.concatenate([begin[:, :1], end[:, :-1]], axis=1)
    span_us = end - previous  # a kernel with the gap before it
    kernels, spans = np.zeros((layers, 2)), np.zeros((layers, 2))
    for i, place in enumerate(places):
        for j, stage in enumerate(("router", "experts")):
            kernels[i, j] = np.median(busy_us[:, place[stage]].sum(axis=1))
            spans[i, j] = np.median(span_us[:, place[stage]].sum(axis=1))
    whole = np.median(end[:, -1] - begin[:, 0])
    layer = stages[:, 2]
    theirs = spans.sum(axis=1)
    return {
        "batch": tokens,
        "samples": len(ours),
        "same_kernels": same,
        "overhead_ns": clock._overhead,
        "step_us": [round(step_us, 1), "profiler", round(float(whole), 1)],
        "sum_us": {
            "router": [round(float(x), 1) for x in (stages[:, 0].sum(), kernels[:, 0].sum(), spans[:, 0].sum())],
            "experts": [round(float(x), 1) for x in (stages[:, 1].sum(), kernels[:, 1].sum(), spans[:, 1].sum())],
            "layer": [round(float(x), 1) for x in (layer.sum(), kernels.sum(), spans.sum())],
            "order": "ours, profiler's kernels, profiler's span",
        },
        "layer_ratio_to_span": [round(float(x), 3) for x in (layer / theirs)],
        "layer_us": [round(float(x), 1) for x in layer],
        "kernels_per_layer": [len(places[1]["router"]), len(places[1]["experts"])],
        "names": [plain_names[i][:40] for i in places[1]["router"] + places[1]["experts"]],
    }


def prefill_against_profiler(llm, capture, runner, vocabulary: int, tokens: int) -> dict:
    """One long prompt a pass, without a graph: stamps between the kernels, under the profiler at the same time."""
    import random

    from vllm import SamplingParams

    draw = random.Random(3)
    timing = capture.timing
    steps = Steps(timing)
    length = min(tokens, runner.max_num_tokens, runner.max_model_len - 1)
    count = max(1, tokens // length)

    def run() -> None:
        prompts = [{"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(length)]} for _ in range(count)]
        llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)

    always(timing)
    run()
    settle(timing)
    steps.take()
    for _ in range(3):
        run()
        settle(timing)
    alone = [s for s in steps.take() if s.tokens >= 0.9 * tokens]
    found = kernels_of(run, 1)
    settle(timing)
    (same,) = [s for s in steps.take() if s.tokens >= 0.9 * tokens]  # the very pass that the profiler saw
    layers = len(capture.meter.layers)
    marks = [i for i, k in enumerate(found) if "moe_monitor_stamp" in k[0]]
    inner = marks[1:-1][: layers * 6]
    kernels, spans = np.zeros((layers, 2)), np.zeros((layers, 2))
    for i in range(layers):
        g0, g1, enter, r0, r1, leave = inner[6 * i : 6 * i + 6]
        for j, ranges in enumerate((((g0, g1), (r0, r1)), ((enter, r0), (r1, leave)))):
            for a, b in ranges:
                kernels[i, j] += sum(e - s for _, s, e in found[a + 1 : b]) / 1e3
                spans[i, j] += (found[b][1] - found[a][2]) / 1e3
    stages = same.stages / 1e3
    before = np.median(np.stack([s.stages for s in alone]), axis=0) / 1e3
    rows = {}
    for j, stage in enumerate(("router", "experts")):
        four = (stages[:, j], kernels[:, j], spans[:, j], before[:, j])
        rows[stage] = [round(float(x.sum()), 1) for x in four]
    return {
        "prefill": length * count,
        "step_us": round(same.nanoseconds / 1e3, 1),
        "sum_us": rows | {"order": "ours, profiler's kernels, profiler's span in the same pass; ours without profiler"},
        "experts_ratio_to_kernels": [round(float(x), 3) for x in stages[:, 1] / kernels[:, 1]],
        "experts_ratio_to_span": [round(float(x), 3) for x in stages[:, 1] / spans[:, 1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="1,32,256")
    parser.add_argument("--prefill", type=int, default=8192)
    parser.add_argument("--deadline-s", type=float, default=300)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--ready-file", type=Path, help="made when the model is loaded and its tokens are compared")
    parser.add_argument("--go-file", type=Path, help="measuring begins when this is there")
    parser.add_argument("--memory", type=float, default=0.45)
    args = parser.parse_args()
    start = time.time()
    left = lambda: args.deadline_s - (time.time() - start)  # noqa: E731
    if args.profile:
        early_cupti()
    import timing as replays
    from vllm import LLM, SamplingParams

    from moe_monitor.capture import device_clock
    from moe_monitor.capture.clock import Sampler
    from moe_monitor.capture.vllm import layers as vllm_layers
    from moe_monitor.capture.vllm import runners

    if not args.profile:
        replays.keep_plain()
    device_clock._MOST_NODES = 50_000  # all of them, here
    planted = min(PLANTED_LAYER, args.layers - 1)
    attached, plants = [], []
    patch_dummies = runners.patch_dummies

    def attach(runner, capture):
        attached.append(runner)
        plants.append(Plant(vllm_layers.moe_layers(runner.model)[planted][1]))
        patch_dummies(runner, capture)

    runners.patch_dummies = attach
    gates = {}
    first_of_gate = device_clock.DeviceClock._first_of_gate

    def noted(clock, tail, address):
        first = first_of_gate(clock, tail, address)
        names = [clock._driver.kernel_name(n)[:60] for n in tail if clock._driver.is_kernel(n)]
        name = f"{'found' if first else 'not found'}: {', '.join(names)}"
        gates[name] = gates.get(name, 0) + 1
        return first

    device_clock.DeviceClock._first_of_gate = noted
    family = f"olmoe{args.layers}"
    models.FAMILIES[family] = models.OLMOE | {"num_hidden_layers": args.layers}
    folder = models.write(Path("/tmp/bench-models") / family, family)
    llm = LLM(
        str(folder),
        load_format="dummy",
        max_num_batched_tokens=8192,
        max_model_len=4096,
        max_num_seqs=256,
        gpu_memory_utilization=args.memory,
        kv_cache_memory_bytes=2_500_000_000,  # nothing is profiled, so others may come and go on this GPU
        enable_prefix_caching=False,
        cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32, 64, 128, 256],
    )
    (runner,), (plant,) = attached, plants
    capture = runner._moe_monitor
    timing = capture.timing
    exact.routers_that_choose(runner.model)
    ready = time.time() - start
    clock = timing.clock
    if clock is None:
        say("ERROR", {"errors": capture.fuse.status.errors})
        os._exit(1)
    groups = clock._groups
    say(
        "MEMORY",
        {
            "ready_s": round(ready, 1),
            "hooks_at_start_s": round(capture.fuse.startup_seconds, 3),
            "groups": len(groups),
            "pieces": sum(len(g.twins) for g in groups.values()),
        },
    )

    # 1. the same tokens
    vocabulary = 50_000
    rng = np.random.default_rng(3)
    prompts = [{"prompt_token_ids": rng.integers(3, vocabulary, n).tolist()} for n in rng.choice([5, 60, 700], 64)]
    sampling = SamplingParams(max_tokens=48, temperature=0, ignore_eos=True)

    def tokens():
        return [o.outputs[0].token_ids for o in llm.generate(prompts, sampling, use_tqdm=False)]

    launched = [0]
    launch = clock._launch
    clock._launch = lambda *twin: bool(launched.__setitem__(0, launched[0] + 1)) or launch(*twin)
    time_passes(timing, lambda number: False)
    plain = tokens()
    again = tokens()
    time_passes(timing, lambda number: number % 3 == 0)
    tokens()  # its twins are ready afterwards
    time.sleep(1)
    launched[0] = 0
    timed = tokens()
    time.sleep(1)
    a = timing.table.arrays
    say(
        "TOKENS",
        {
            "tokens": sum(map(len, plain)),
            "equal": timed == plain,
            "plain_twice_equal": again == plain,
            "twins_launched": launched[0],
            "gates": gates,
            "steps_by_kind": a["step"].sum(axis=1).tolist(),
            "layer_samples_decode_prefill": a["layer"][0, 2].sum(axis=1).tolist(),
            "active": capture.fuse.status.active,
            "reason": capture.fuse.status.reason,
            "errors": capture.fuse.status.errors,
            "ready_groups": sum(g.ready for g in clock._groups.values()),
            "cost_error": float(a["cost_error"][0]),
        },
    )

    if args.ready_file:
        args.ready_file.touch()
    while args.go_file and not args.go_file.exists() and left() > 60:
        time.sleep(0.1)
    if not args.profile:  # at the default sampling, with the publisher as it is
        clock._sampler = Sampler(200)
        lines = []
        for line in replays.replays(runner, capture, rounds=5):
            lines.append(line)
            say("REPLAY", line)
        say("REPLAY_MEANS", replays.geometric_means(lines))
    capture.publisher.close()  # from here on samples are collected below
    settle(timing)

    waiting = [g for g in clock._groups.values() if g.whole and not g.asked]
    free, began, nodes = torch.cuda.mem_get_info()[0], time.time(), clock._nodes
    for group in waiting:
        group.asked = True
    clock._wanted.extend(waiting)
    clock._make_ready()
    torch.cuda.synchronize()
    say(
        "MEMORY",
        {
            "made_ready": len(waiting),
            "nodes": clock._nodes - nodes,
            "device_kib": (free - torch.cuda.mem_get_info()[0]) >> 10,
            "seconds": round(time.time() - began, 3),
        },
    )

    # 2. against the profiler
    graphs = {size: (key, replay) for size, key, replay in replays._graphs(runner)}
    for size in map(int, args.sizes.split(",")):
        if args.profile and size in graphs and left() > 10:
            key, replay = graphs[size]
            try:
                say("STAGES", against_profiler(capture, runner, replay, key, size))
            except Exception as error:
                say("STAGES", {"batch": size, "error": repr(error)})

    # 3. planted
    key, replay = graphs[32]
    before = None
    for count in (0, 60_000):
        plant.count.fill_(count)
        steps = Steps(timing)
        always(timing)
        for _ in range(12):
            replay_with_hooks(capture, key, replay, 32)
            settle(timing)
        found = [s.stages for s in steps.take() if s.stages is not None]
        stages = np.median(np.stack(found), axis=0) / 1e3
        if before is None:
            before = stages
    plant.count.fill_(0)
    say("PLANTED", {"layer": planted, "change_us": [round(float(x), 1) for x in (stages - before)[:, 1]]})
    routers = {"before": before[:, 0], "after": stages[:, 0]}
    say("PLANTED", {f"router_us_{k}": [round(float(x), 1) for x in v] for k, v in routers.items()})

    # 4. what it costs; long prompts last, because graphs that are replayed by hand keep the lengths of the pass before
    for size in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        if args.profile or left() < 20:
            break
        key, replay = graphs[size]
        say("COST", cost(capture, key, replay, size))
    if not args.profile:
        clock._sampler = Sampler(200)
        for line in replays.prefill(llm, runner, capture, vocabulary, rounds=8):
            say("PREFILL", line)
    elif args.prefill:
        try:
            say("STAGES", prefill_against_profiler(llm, capture, runner, vocabulary, args.prefill))
        except Exception as error:
            say("STAGES", {"prefill": args.prefill, "error": repr(error)})
    say("END", {"seconds": round(time.time() - start, 1), "errors": capture.fuse.status.errors})
    capture.close()
    os._exit(0)


def cost(capture, key, replay, size: int, rounds: int = 3, repeat: int = 200) -> dict:
    """Replays with all hooks and one timed pass, against plain ones; and a twin against a plain one."""
    clock, timing = capture.timing.clock, capture.timing
    at = [0]

    def once(number):
        at[0] += 1
        return at[0] % 200 == 100

    def gpu_ms(work, n):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(n):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / n

    always(timing)
    for _ in range(2):
        replay_with_hooks(capture, key, replay, size)
        settle(timing)
    time_passes(timing, once)
    with_all = lambda: replay_with_hooks(capture, key, replay, size)  # noqa: E731
    bare = plain_replay(key, replay)
    gpu_ms(bare, 20), gpu_ms(with_all, 20)
    plain, ratios = [], []
    for i in range(rounds):
        order = (bare, with_all) if i % 2 else (with_all, bare)
        times = {work: gpu_ms(work, repeat) for work in order}
        plain.append(times[bare])
        ratios.append(times[with_all] / times[bare])
        settle(timing)
    (twin,) = clock._groups[key].twins
    twins = statistics.median(gpu_ms(lambda: launch(twin, capture), 20) for _ in range(5))
    return {
        "batch": size,
        "plain_ms": round(statistics.median(plain), 4),
        "ratio": round(statistics.median(ratios), 4),
        "spread": [round(min(ratios), 4), round(max(ratios), 4)],
        "twin_ms": round(twins, 4),
    }


if __name__ == "__main__":
    main()
