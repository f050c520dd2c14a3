"""Put on PYTHONPATH by tests: runs in every process of a server under test, before anything else.

MOE_TEST_SCHEDULE=FILE  vLLM's scheduler writes there what it schedules, a JSON line a step: what was computed.
MOE_TEST_SLOW=LAYER:MILLISECONDS:FILE  the experts of one layer take so much longer for as long as FILE exists.
MOE_TEST_FAULT=WHERE:FILE  the named function of moe-monitor raises for as long as FILE exists.
MOE_TEST_ROUTER_BIAS=FILE  every OLMoE router is sure of expert 3 for as long as FILE exists.
"""

import json
import os
import time

import wrapt

FAULTS = {
    "attach": ("moe_monitor.capture.vllm.attach", "Capture._attach"),
    "record": ("moe_monitor.capture.meter", "accumulate"),
    "publish": ("moe_monitor.board", "BoardWriter.write"),
    "latency": ("moe_monitor.capture.clock", "HostClock.end"),
    "collect": ("moe_monitor.export.collector", "read_engines"),
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


def _raise_in(where, path):
    module, name = FAULTS[where]

    def patch(imported):
        def wrapper(wrapped, instance, args, kwargs):
            if os.path.exists(path):
                raise RuntimeError(f"planted in {where}")
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


if os.environ.get("MOE_TEST_ROUTER_BIAS"):
    _bias_routers(os.environ["MOE_TEST_ROUTER_BIAS"])
if os.environ.get("MOE_TEST_SLOW"):
    _slow_down(*os.environ["MOE_TEST_SLOW"].split(":", 2))
if os.environ.get("MOE_TEST_SCHEDULE"):
    _record_schedule(os.environ["MOE_TEST_SCHEDULE"])
for _fault in filter(None, os.environ.get("MOE_TEST_FAULT", "").split(",")):
    _raise_in(*_fault.split(":", 1))
