"""Put on PYTHONPATH of a server: host time of the monitor's hooks by kind of pass, a JSON file per worker.

PYTHONPATH=benchmarks/gpu/hook_times HOOK_TIMES_DIR=/tmp/hook_times vllm serve ...   (or benchmarks/gpu/end_to_end.py)
Every assignment of a hook is in it, unlike in ``moe_monitor_hook_seconds_total``, and some of the measuring itself.
Short ways and general hooks are one.
Kinds: "new" (a request's first pass), "next" (the one after it), "steady" (any other), with "bare" where no graph was
replayed, and the number of requests in it. Passes that are timed layer by layer are apart ("timed"). Written after
every 200 passes. Needs wrapt.
"""

import json
import os
import statistics
import time

import wrapt

HOOKS = (
    *("begin_step", "begin_pass", "batch_is", "trace_rows", "note_graph", "observe_cuda", "before_replay", "end_pass"),
)
MOST = 20_000
clock = time.perf_counter
spent = dict.fromkeys(HOOKS, 0.0)
found: dict[str, list[tuple[float, ...]]] = {}
state = {"kind": "steady", "before": "steady", "requests": 0, "bare": False, "timed": False, "passes": 0}


def _kind() -> str:
    n = state["requests"]
    many = "1" if n == 1 else "2-48" if n <= 48 else "49+"
    return f"{state['kind']}{' bare' if state['bare'] else ''}{' timed' if state['timed'] else ''}, {many}"


def _end_of_pass() -> None:
    samples = found.setdefault(_kind(), [])
    if len(samples) < MOST:
        samples.append(tuple(spent.values()))
    state["passes"] += 1
    if state["passes"] % 200 == 0:
        _write()


def _write() -> None:
    folder = os.environ["HOOK_TIMES_DIR"]
    os.makedirs(folder, exist_ok=True)
    us = lambda value: round(1e6 * value, 1)  # noqa: E731
    result = {}
    for kind, samples in sorted(found.items()):
        sums = [sum(sample) for sample in samples]
        by_hook = {name: us(statistics.median(s[i] for s in samples)) for i, name in enumerate(HOOKS)}
        result[kind] = {
            "passes": len(samples),
            "median": us(statistics.median(sums)),
            "mean": us(statistics.fmean(sums)),
        }
        result[kind] |= {name: value for name, value in by_hook.items() if value}
    with open(os.path.join(folder, f"{os.getpid()}.json"), "w") as file:
        json.dump(result, file, indent=0)


def _timed(original, name):
    def timed(*args, **kwargs):
        start = clock()
        try:
            return original(*args, **kwargs)
        finally:
            spent[name] += clock() - start

    return timed


def _patch(module) -> None:
    """The hooks that seams get for steps and replays call the others; of those, the ones that seams call themselves."""
    cls = module.Hooks
    for name in ("batch_is", "trace_rows", "note_graph", "observe_cuda"):
        setattr(cls, name, _timed(getattr(cls, name), name))
    observe, of_steps, of_replays = cls.observe_cuda, cls.of_steps, cls.of_replays

    def observed(self, *args):
        state["bare"] = True
        observe(self, *args)

    def hooks_of_steps(self):
        hooks = of_steps(self)
        begin_step, begin_pass, end_pass = (
            _timed(getattr(hooks, name), name) for name in ("begin_step", "begin_pass", "end_pass")
        )

        def begins(scheduled):
            for name in HOOKS:
                spent[name] = 0.0
            state["before"], state["bare"] = state["kind"], False
            new = bool(scheduled.scheduled_new_reqs)
            state["kind"] = "new" if new else "next" if state["before"] == "new" else "steady"
            state["requests"] = len(scheduled.num_scheduled_tokens)
            begin_step(scheduled)

        def ends(tokens):
            state["timed"] = self.timing is not None and self.timing.sampling
            end_pass(tokens)
            _end_of_pass()

        return hooks._replace(begin_step=begins, begin_pass=begin_pass, end_pass=ends)

    cls.observe_cuda, cls.of_steps = observed, hooks_of_steps
    cls.of_replays = lambda self, graph: _timed(of_replays(self, graph), "before_replay")


if os.environ.get("HOOK_TIMES_DIR"):
    wrapt.register_post_import_hook(_patch, "moe_monitor.capture.vllm.hooks")
