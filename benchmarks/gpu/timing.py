"""GPU time with and without the monitor's work, in one process, alternating, by CUDA events."""

from __future__ import annotations

import random
import statistics
import time

import torch


def _gpu_ms(work, repeat: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeat


def _graphs(runner):
    """Full decode graphs of the runner: (tokens, key of the monitor, replay function)."""
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is not None and hasattr(manager, "graphs"):
        for desc, graph in manager.graphs.items():
            yield desc.num_tokens, ("FULL", desc), graph.replay
        return
    for descriptor, entry in runner.model.concrete_cudagraph_entries.items():
        yield descriptor.num_tokens, ("FULL", descriptor), entry.cudagraph.replay


SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def replays(runner, capture, rounds: int = 11, repeat: int = 25):
    """One line per batch size: milliseconds per step without and with, and the median of paired ratios.

    Without a ``capture`` only the plain times.
    """
    meter = capture.meter if capture is not None else None
    for tokens, key, replay in sorted(_graphs(runner), key=lambda g: g[0]):
        if tokens not in SIZES:
            continue
        if capture is None:
            _gpu_ms(replay, repeat)
            plain = statistics.median(_gpu_ms(replay, repeat) for _ in range(rounds))
            yield {"batch": tokens, "plain_ms": round(plain, 4)}
            continue

        def with_monitor(key=key, tokens=tokens, replay=replay):
            capture.begin_pass(tokens)
            replay()
            capture.replayed = key
            capture.end_pass(tokens)

        for work in (replay, with_monitor):
            _gpu_ms(work, repeat)
        plain, monitored, ratios = [], [], []
        for i in range(rounds):
            order = (replay, with_monitor) if i % 2 else (with_monitor, replay)
            times = {work: _gpu_ms(work, repeat) for work in order}
            plain.append(times[replay])
            monitored.append(times[with_monitor])
            ratios.append(times[with_monitor] / times[replay])
        before = time.perf_counter()
        for _ in range(200):
            capture.begin_pass(tokens)
            capture.replayed = key
            capture.end_pass(tokens)
        host = (time.perf_counter() - before) / 200
        torch.cuda.synchronize()
        alone = _gpu_ms(lambda key=key, tokens=tokens: meter.end_pass(key, tokens), 200)
        yield {
            "batch": tokens,
            "plain_ms": round(statistics.median(plain), 4),
            "monitored_ms": round(statistics.median(monitored), 4),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_spread": [round(min(ratios), 4), round(max(ratios), 4)],
            "kernel_alone_us": round(1000 * alone, 1),
            "host_us": round(1e6 * host, 1),
            "active": capture.fuse.status.active,
        }


def prefill(llm, runner, capture, vocabulary: int, rounds: int = 14) -> dict:
    """Prompts that fill one step (max_num_batched_tokens), one output token each; hooks in and out, alternating."""
    from vllm import SamplingParams

    draw = random.Random(1)
    length = min(runner.max_num_tokens, runner.max_model_len - 1)
    count = runner.max_num_tokens // length
    parameters = SamplingParams(max_tokens=1, temperature=0)
    times = {True: [], False: []}
    for i in range(rounds + 2):
        for on in (True, False) if i % 2 else (False, True):
            prompts = [{"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(length)]} for _ in range(count)]
            torch.cuda.synchronize()
            capture.fuse.blown = not on
            begin = time.perf_counter()
            llm.generate(prompts, parameters, use_tqdm=False)
            torch.cuda.synchronize()
            if i >= 2:
                times[on].append(time.perf_counter() - begin)
    capture.fuse.blown = False
    ratios = [a / b for a, b in zip(times[True], times[False], strict=True)]
    return {
        "tokens": length * count,
        "plain_ms": round(1000 * statistics.median(times[False]), 3),
        "monitored_ms": round(1000 * statistics.median(times[True]), 3),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_spread": [round(min(ratios), 4), round(max(ratios), 4)],
    }
