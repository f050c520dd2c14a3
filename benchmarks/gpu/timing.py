"""GPU time with and without the monitor's work, in one process, alternating, by CUDA events.

A graph that counts by itself has the monitor's kernels in it. :func:`keep_plain` keeps a copy of every graph without
them; those are the plain replays.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from moe_monitor.capture import quick
from moe_monitor.capture.replays import Watched
from moe_monitor.capture.vllm import runner_v1

#: The monitor's kernels, on a branch of their own in a graph.
OURS = ("_fetch_kernel", "_meter_kernel")
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

#: Key of the monitor -> copy of the graph without the monitor's nodes; made ready by :func:`plain_replay`.
_PLAIN: dict[Any, int] = {}
_READY: dict[Any, int] = {}


def keep_plain() -> None:
    """To be called before the model is loaded."""
    from moe_monitor.capture.captured import Graphs
    from moe_monitor.capture.driver import Driver

    driver, end_capture = Driver(), Graphs.end_capture

    def ending(self, key):
        state = driver.capture_state(torch.cuda.current_stream().cuda_stream)
        if state is not None and key is not None and key[0] == "FULL":
            _PLAIN[key] = clone = driver.clone(state.graph)
            for node in driver.nodes(clone):
                if driver.is_kernel(node) and driver.kernel_name(node) in OURS:
                    assert ctypes.CDLL("libcuda.so.1").cuGraphDestroyNode(ctypes.c_void_p(node)) == 0
        return end_capture(self, key)

    Graphs.end_capture = ending


def plain_replay(key: Any, otherwise: Callable[[], None]) -> Callable[[], None]:
    """Replays the graph without the monitor's nodes; ``otherwise`` where there is no copy."""
    if key not in _PLAIN:
        return otherwise
    from moe_monitor.capture.driver import Driver

    driver = Driver()
    if key not in _READY:
        _READY[key] = driver.instantiate(_PLAIN[key])
    executable = _READY[key]
    return lambda: driver.launch_graph(executable, torch.cuda.current_stream().cuda_stream)


def _gpu_ms(work: Callable[[], None], repeat: int) -> float:
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


class Decode:
    """Decode steps as the model runner makes them, over a batch of requests that the tracer really knows.

    The scheduler's output and the batch are made here; hooks, tracer, attribution, upload and kernels are real.
    ``wanted``: requests that asked to be traced; those after them asked not to be.
    """

    _serial = 0

    def __init__(self, capture, tokens: int, key, replay: Callable[[], None], wanted: int) -> None:
        self._capture, self._key, self._replay, self._tokens = capture, key, replay, tokens
        Decode._serial += 1
        self._ids = [f"bench{Decode._serial}-{i}" for i in range(tokens)]
        self._scheduled = dict.fromkeys(self._ids, 1)
        self._none: dict[str, Any] = {"preempted_req_ids": None, "finished_req_ids": set(), "scheduled_new_reqs": []}
        self.batch = SimpleNamespace(
            req_ids=self._ids,
            num_tokens=tokens,
            num_computed_tokens_cpu=np.full(tokens, 100, dtype=np.int32),
        )
        new = []
        for i, name in enumerate(self._ids):
            params = SimpleNamespace(extra_args={"moe_trace": int(i < wanted)})
            new.append(
                SimpleNamespace(
                    req_id=name,
                    sampling_params=params,
                    prompt_token_ids=[1] * 100,
                    num_computed_tokens=0,
                    prompt_embeds=None,
                )
            )
        self._output = self._output_with()
        self._runner = SimpleNamespace(
            input_batch=self.batch, execute_model=self._execute, _model_forward=self._forward
        )
        runner_v1._patch_steps(self._runner, capture)
        self._replays: Callable[[], None] = replay
        graph = capture.meter.graphs.found.get(key)
        self._posts = self._posting(graph) if graph is not None and graph.sealed else None
        if capture.tracer is not None:
            capture.begin_step(self._output_with(scheduled_new_reqs=new))
        self.live = 0 if capture.tracer is None else len(capture.tracer.live)

    def _output_with(self, **changes: Any) -> SimpleNamespace:
        """The scheduler's."""
        return SimpleNamespace(
            num_scheduled_tokens=self._scheduled, total_num_scheduled_tokens=self._tokens, **{**self._none, **changes}
        )

    def _posting(self, graph: Any) -> Callable[[], None]:
        """What its replay does but to replay; no launch will fetch it."""
        capture, mailbox = self._capture, graph.mailbox
        before = lambda _: capture.before_replay(graph)  # noqa: E731
        post = quick.replaying(capture.meter, graph, capture.fuse, Watched(), lambda _: None, before)

        def posts() -> None:
            posted = mailbox.posted
            post(None)
            mailbox.posted = posted

        return posts

    # as in a model runner of V1

    def _execute(self, _: Any) -> None:
        self._runner._model_forward()

    def _forward(self) -> None:
        self._replays()
        self._capture.replayed = self._key

    def hooks(self, replay: Callable[[], None] | None) -> None:
        self._replays = replay or self._posts or (lambda: None)
        self._runner.execute_model(self._output)

    def step(self) -> None:
        self.hooks(self._replay)

    def host_us(self, steps: int = 200) -> float:
        """Host time of all hooks of a step, the graph left out."""
        for _ in range(5):
            self.hooks(None)
        torch.cuda.synchronize()
        before = time.perf_counter()
        for _ in range(steps):
            self.hooks(None)
        took = (time.perf_counter() - before) / steps
        torch.cuda.synchronize()
        return 1e6 * took

    def finish(self, seconds: float = 5.0) -> None:
        """Let the tracer end the requests and the publisher take them, so that their slots are free again."""
        tracer = self._capture.tracer
        if tracer is None:
            return
        self._capture.begin_step(self._output_with(finished_req_ids=set(self._ids)))
        end = time.monotonic() + seconds
        while tracer.pending and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.05)


def replays(runner, capture, rounds: int = 11, repeat: int = 25, sizes=SIZES) -> Iterator[dict[str, Any]]:
    """Lines per batch size: milliseconds per step without and with the monitor, and the median of paired ratios.

    With a ``capture`` three lines each: no row traced, a tenth of them (at least one), all of them; plain replays take
    turns with monitored ones. Without a ``capture`` only the plain times.
    """
    for tokens, key, replay in sorted(_graphs(runner), key=lambda g: g[0]):
        if tokens not in sizes:
            continue
        if capture is None:
            _gpu_ms(replay, repeat)
            plain = statistics.median(_gpu_ms(replay, repeat) for _ in range(rounds))
            yield {"batch": tokens, "plain_ms": round(plain, 4)}
            continue
        modes = {"none": 0, "tenth": max(1, round(tokens / 10)), "all": tokens}
        if capture.tracer is None:
            modes = {"none": 0}
        bare = plain_replay(key, replay)
        for mode, wanted in modes.items():
            work = Decode(capture, tokens, key, replay, wanted)
            for warm in (bare, work.step):
                _gpu_ms(warm, repeat)
            plain, monitored, ratios = [], [], []
            for i in range(rounds):
                order = (bare, work.step) if i % 2 else (work.step, bare)
                times = [_gpu_ms(one, repeat) for one in order]
                without, with_monitor = times if i % 2 else reversed(times)
                plain.append(without)
                monitored.append(with_monitor)
                ratios.append(with_monitor / without)
            host = work.host_us()
            alone = _gpu_ms(lambda work=work: work.hooks(None), 200)
            line = {
                "batch": tokens,
                "traced": mode,
                "traced_rows": work.live,
                "plain_ms": round(statistics.median(plain), 4),
                "monitored_ms": round(statistics.median(monitored), 4),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_spread": [round(min(ratios), 4), round(max(ratios), 4)],
                "without_graph_us": round(1000 * alone, 1),  # the larger of host and device time of the hooks
                "host_us": round(host, 1),
                "active": capture.fuse.status.active,
                "capture": capture.fuse.status.capture,
            }
            work.finish()
            yield line


def geometric_means(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the batch sizes, by mode, with the largest ratio."""
    found: dict[str, list[float]] = {}
    for line in lines:
        if "ratio" in line:
            found.setdefault(line["traced"], []).append(line["ratio"])
    return {
        mode: {"geometric_mean": round(statistics.geometric_mean(ratios), 4), "largest": max(ratios)}
        for mode, ratios in found.items()
    }


class Passes:
    """CUDA events around the forward pass and around what the monitor does after it, for passes of ``tokens`` tokens.

    The monitor's launches before the end of the pass (where decisions pile up) are told apart by events of their own.
    """

    def __init__(self, capture, tokens: int) -> None:
        self._capture, self._tokens = capture, tokens
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]] = []
        self._start: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[Passes]:
        capture = self._capture
        begin, end = capture.begin_pass, capture.end_pass

        def begin_pass(tokens: int, scheduled: Any) -> None:
            self._start = torch.cuda.Event(enable_timing=True)
            self._start.record()
            begin(tokens, scheduled)

        def end_pass(tokens: int) -> None:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            end(tokens)
            after.record()
            if tokens == self._tokens and self._start is not None:
                self.events.append((self._start, before, after))

        capture.begin_pass, capture.end_pass = begin_pass, end_pass
        meter, cls = capture.meter, type(capture.meter)
        # no pass is short, so these are called
        meter.__class__ = type("Long", (cls,), {"clean": property(lambda _: False, lambda _, value: None)})
        try:
            yield self
        finally:
            meter.__class__ = cls
            del capture.begin_pass, capture.end_pass  # the class's own again

    def take(self) -> list[tuple[float, float]]:
        """(milliseconds of the pass until the monitor's work at its end, milliseconds of that work), and forget."""
        torch.cuda.synchronize()
        found = [(a.elapsed_time(b), b.elapsed_time(c)) for a, b, c in self.events]
        self.events.clear()
        return found


def prefill(llm, runner, capture, vocabulary: int, rounds: int = 14) -> Iterator[dict[str, Any]]:
    """Prompts that fill one step (max_num_batched_tokens), one output token each: GPU time of the pass.

    A line for untraced and one for traced requests. The monitor is switched off and on by turns (``ratio``: paired,
    whole passes); ``work_us`` is the GPU time between the model's last kernel and the monitor's, measured in the same
    pass, and ``ratio_of_work`` what it adds to the pass.
    """
    from vllm import SamplingParams

    draw = random.Random(1)
    tokens = runner.max_num_tokens
    count = -(-tokens // (runner.max_model_len - 1))
    lengths = [tokens // count + (i < tokens % count) for i in range(count)]
    for traced in (0, 1):
        parameters = SamplingParams(max_tokens=1, temperature=0, extra_args={"moe_trace": traced})
        times: dict[bool, list[float]] = {True: [], False: []}
        work: list[float] = []
        bare: list[float] = []
        with Passes(capture, tokens).watched() as passes:
            for i in range(rounds + 2):
                for on in (True, False) if i % 2 else (False, True):
                    prompts = [{"prompt_token_ids": [draw.randrange(vocabulary) for _ in range(n)]} for n in lengths]
                    capture.fuse.blown = not on
                    llm.generate(prompts, parameters, use_tqdm=False)
                    for _ in range(3):  # a step without tokens tells the monitor which requests have ended
                        llm.llm_engine.engine_core.get_output()
                    found = passes.take()
                    if i < 2 or len(found) != 1:
                        continue  # warm-up, or the scheduler split the prompts differently
                    ((before, after),) = found
                    times[on].append(before + after)
                    if on:
                        work.append(after)
                        bare.append(before)
        capture.fuse.blown = False
        ratios = [a / b for a, b in zip(times[True], times[False], strict=False)]
        if not ratios:
            why = "V2 ends no pass while off" if times[True] else "no pass had exactly so many tokens"
            yield {"tokens": tokens, "traced": bool(traced), "failed": why}
            continue
        yield {
            "tokens": tokens,
            "prompts": count,
            "traced": bool(traced),
            "passes": len(ratios),
            "plain_ms": round(statistics.median(times[False]), 3),
            "plain_range_ms": [round(min(times[False]), 3), round(max(times[False]), 3)],
            "monitored_ms": round(statistics.median(times[True]), 3),
            "ratio": round(statistics.median(ratios), 4),
            "ratio_spread": [round(min(ratios), 4), round(max(ratios), 4)],
            "work_us": round(1000 * statistics.median(work), 1),
            "work_range_us": [round(1000 * min(work), 1), round(1000 * max(work), 1)],
            "ratio_of_work": round(1 + statistics.median(a / b for a, b in zip(work, bare, strict=True)), 4),
            "active": capture.fuse.status.active,
            "retained_mib": round(capture.meter.graphs.retained_bytes / 2**20, 1),
        }
