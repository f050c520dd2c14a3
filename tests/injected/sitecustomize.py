"""Put on PYTHONPATH by tests: runs in every process of a server under test, before anything else.

MOE_TEST_SCHEDULE=FILE  vLLM's scheduler writes there what it schedules, a JSON line a step: what was computed.
MOE_TEST_SLOW=LAYER:MILLISECONDS:FILE  the experts of one layer take so much longer for as long as FILE exists.
MOE_TEST_ROUTER_BIAS=FILE  every OLMoE router is sure of expert 3 for as long as FILE exists.
MOE_TEST_FAULT=WHERE:FILE,...  while FILE exists, the named function of moe-monitor raises, or does what FILE says:
    "hang" waits until FILE is gone, "oom" says that the device's memory is full.
MOE_TEST_CLOCK=FILE  the wall clock is off by as many seconds as FILE says.
MOE_TEST_STARTED=FILE  every interpreter that starts, rather than being forked, adds its pid.
MOE_TEST_MEMORY=FOLDER  every minute a process adds a line to FOLDER/PID: bytes that lines of moe_monitor have allocated
    and that are still held, and those of all of Python.
MOE_TEST_RAY=1  vLLM takes what Ray calls a GPU for a device of its CPU platform, which it does not run under Ray.
MOE_TEST_FRAMES=FILE  engine cores and workers write there, once each, the most slots that a frame below them has.
MOE_TEST_HEARTBEAT=FILE  the API server's event loop wakes every 2 ms and writes how late it was, in seconds.
"""

import collections
import json
import os
import sys
import time

import wrapt

FAULTS = {
    "attach": ("moe_monitor.capture.vllm.attach", "Capture._attach"),
    "meter": ("moe_monitor.capture.meter", "Meter.__init__"),
    "record": ("moe_monitor.capture.meter", "accumulate"),
    "publish": ("moe_monitor.board", "BoardWriter.write"),
    "latency": ("moe_monitor.capture.clock", "HostClock.end"),
    "collect": ("moe_monitor.export.collector", "read_engines"),
    "match": ("moe_monitor.export.frontend", "FrontEnd.match"),
}


def _record_schedule(path):
    def patch(module):
        original = module.Scheduler.schedule

        def schedule(self, *args, **kwargs):
            output = original(self, *args, **kwargs)
            starts = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
            cached = output.scheduled_cached_reqs
            starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            step = [[request, starts[request], n] for request, n in output.num_scheduled_tokens.items()]
            preempted = sorted(output.preempted_req_ids or ())
            with open(path, "a") as file:
                file.write(json.dumps({"step": step, "preempted": preempted}) + "\n")
            return output

        module.Scheduler.schedule = schedule

    wrapt.register_post_import_hook(patch, "vllm.v1.core.sched.scheduler")


def _plan(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return None


def _fail(where, path):
    plan = _plan(path)
    if plan == "hang":
        while os.path.exists(path):
            time.sleep(0.01)
    elif plan == "oom":
        import torch

        raise torch.OutOfMemoryError(f"planted in {where}: device out of memory")
    elif plan is not None:
        raise RuntimeError(f"planted in {where}")


def _fail_in(where, path):
    module, name = FAULTS[where]

    def patch(imported):
        def wrapper(wrapped, instance, args, kwargs):
            _fail(where, path)
            return wrapped(*args, **kwargs)

        wrapt.wrap_function_wrapper(imported, name, wrapper)

    wrapt.register_post_import_hook(patch, module)


def _bias_routers(path):
    def patch(imported):
        def biased(gate, inputs, output):
            if not os.path.exists(path):
                return output
            logits, *rest = output
            logits = logits.clone()
            logits[..., 3] += 1000.0
            return (logits, *rest)

        def wrapper(wrapped, instance, args, kwargs):
            wrapped(*args, **kwargs)
            instance.gate.register_forward_hook(biased)

        wrapt.wrap_function_wrapper(imported, "OlmoeMoE.__init__", wrapper)

    wrapt.register_post_import_hook(patch, "vllm.model_executor.models.olmoe")


def _slow_down(layer, milliseconds, path):
    def patch(module):
        def wrapper(wrapped, instance, args, kwargs):
            if f".{layer}." in instance.layer_name and os.path.exists(path):
                end = time.perf_counter() + float(milliseconds) / 1000
                while time.perf_counter() < end:
                    pass
            return wrapped(*args, **kwargs)

        wrapt.wrap_function_wrapper(module, "RoutedExperts.forward_modular", wrapper)

    wrapt.register_post_import_hook(patch, "vllm.model_executor.layers.fused_moe.routed_experts")


def _shift_clock(path):
    real, real_ns = time.time, time.time_ns
    offset, read = 0.0, -1.0

    def current():
        nonlocal offset, read
        if time.monotonic() - read > 0.02:
            offset, read = float(_plan(path) or 0), time.monotonic()
        return offset

    time.time = lambda: real() + current()
    time.time_ns = lambda: real_ns() + int(current() * 1e9)


def _account(folder):
    import threading
    import tracemalloc

    tracemalloc.start()
    ours = [tracemalloc.Filter(True, "*/moe_monitor/*")]

    def write():
        while True:
            time.sleep(60)
            snapshot = tracemalloc.take_snapshot()
            held = sum(trace.size for trace in snapshot.filter_traces(ours).traces)
            with open(os.path.join(folder, str(os.getpid())), "a") as file:
                file.write(f"{held} {tracemalloc.get_traced_memory()[0]}\n")

    threading.Thread(target=write, daemon=True).start()


def _beat(path):
    """Whatever blocks the event loop makes its next wake-up late. Written by a thread, not to block it ourselves."""
    late = collections.deque()

    def write():
        with open(path, "a") as file:
            while True:
                time.sleep(0.2)
                while late:
                    file.write("{:.6f} {:.6f}\n".format(*late.popleft()))
                file.flush()

    async def beat():
        import asyncio
        import threading

        threading.Thread(target=write, daemon=True).start()
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.002)
            after = time.monotonic()
            late.append((after, after - before - 0.002))

    def patch(module):
        async def serve(wrapped, instance, args, kwargs):
            import asyncio

            task = asyncio.create_task(beat())
            try:
                return await wrapped(*args, **kwargs)
            finally:
                task.cancel()

        wrapt.wrap_function_wrapper(module, "Server.serve", serve)

    wrapt.register_post_import_hook(patch, "uvicorn.server")


def _look_at_frames(path):
    told = set()

    def wrapper(wrapped, instance, args, kwargs):
        name = wrapped.__name__
        if name not in told:
            told.add(name)
            frame, most = sys._getframe(), 0
            while frame is not None:
                frame, most = frame.f_back, max(most, frame.f_code.co_stacksize)
            with open(path, "a") as file:
                file.write(f"{name} {most}\n")
        return wrapped(*args, **kwargs)

    for module, name in (
        ("core.sched.scheduler", "Scheduler.schedule"),
        ("worker.cpu_worker", "CPUWorker.execute_model"),
    ):
        wrapt.register_post_import_hook(
            lambda imported, name=name: wrapt.wrap_function_wrapper(imported, name, wrapper), f"vllm.v1.{module}"
        )


def _let_ray_schedule():
    def patch(module):
        module.CpuPlatform.ray_device_key = "GPU"

    wrapt.register_post_import_hook(patch, "vllm.platforms.cpu")


if os.environ.get("MOE_TEST_RAY"):
    _let_ray_schedule()
if os.environ.get("MOE_TEST_ROUTER_BIAS"):
    _bias_routers(os.environ["MOE_TEST_ROUTER_BIAS"])
if os.environ.get("MOE_TEST_SLOW"):
    _slow_down(*os.environ["MOE_TEST_SLOW"].split(":", 2))
if os.environ.get("MOE_TEST_SCHEDULE"):
    _record_schedule(os.environ["MOE_TEST_SCHEDULE"])
for _fault in filter(None, os.environ.get("MOE_TEST_FAULT", "").split(",")):
    _fail_in(*_fault.split(":", 1))
if os.environ.get("MOE_TEST_CLOCK"):
    _shift_clock(os.environ["MOE_TEST_CLOCK"])
if os.environ.get("MOE_TEST_MEMORY"):
    _account(os.environ["MOE_TEST_MEMORY"])
if os.environ.get("MOE_TEST_FRAMES"):
    _look_at_frames(os.environ["MOE_TEST_FRAMES"])
if os.environ.get("MOE_TEST_HEARTBEAT"):
    _beat(os.environ["MOE_TEST_HEARTBEAT"])
if os.environ.get("MOE_TEST_STARTED"):
    with open(os.environ["MOE_TEST_STARTED"], "a") as _file:
        _file.write(f"{os.getpid()}\n")
