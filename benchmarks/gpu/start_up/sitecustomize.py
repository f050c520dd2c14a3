"""Put on PYTHONPATH of a server: what of its start the monitor's parts take, a JSON file per worker.

PYTHONPATH=benchmarks/gpu/start_up START_UP_DIR=/tmp/start_up vllm serve ...   (or benchmarks/gpu/end_to_end.py)
Calls and seconds of each part up to the first real pass, when the file is written. Parts contain each other:
``Capture.__init__`` has what attaching does, ``CudaMeter._set_up`` the launcher. ``thread ...`` runs beside.
Needs wrapt.
"""

import json
import os
import time

import wrapt

PARTS = {
    "moe_monitor.capture.kernels": {"Launcher": ("warm_up", "__init__")},
    "moe_monitor.capture.ahead": {"": ("compile_kernel", "compile_fetch")},
    "moe_monitor.capture.tallies": {"DeviceTallies": ("set_up",)},
    "moe_monitor.capture.cuda": {"CudaMeter": ("_set_up", "before_capture")},
    "moe_monitor.capture.captured": {"Graphs": ("note", "end_capture")},
    "moe_monitor.capture.mailbox": {"Mailbox": ("__init__",)},
    "moe_monitor.capture.retained": {"Suspects": ("note", "look", "found")},
    "moe_monitor.capture.vllm.latency": {
        "Timing": ("attach_cuda", "lay_twin_aside", "before_graphs", "after_graphs", "note_end")
    },
    "moe_monitor.capture.vllm.attach": {"Capture": ("__init__",)},
}
spent: dict[str, tuple[int, float]] = {}


def _timed(owner, name: str, label: str) -> None:
    original = getattr(owner, name)

    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            calls, seconds = spent.get(label, (0, 0.0))
            spent[label] = (calls + 1, seconds + time.perf_counter() - start)

    setattr(owner, name, timed)


def _patch(module) -> None:
    for owner, names in PARTS[module.__name__].items():
        for name in names:
            label = f"{owner}.{name}" if owner else f"thread {name}"
            _timed(getattr(module, owner) if owner else module, name, label)
    if module.__name__ == "moe_monitor.capture.cuda":
        begin_pass = module.CudaMeter.begin_pass

        def first(self, tokens: int) -> None:
            module.CudaMeter.begin_pass = begin_pass
            folder = os.environ["START_UP_DIR"]
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, f"{os.getpid()}.json"), "w") as file:
                json.dump({label: [calls, round(seconds, 4)] for label, (calls, seconds) in spent.items()}, file)
            begin_pass(self, tokens)

        module.CudaMeter.begin_pass = first


if os.environ.get("START_UP_DIR"):
    for module_name in PARTS:
        wrapt.register_post_import_hook(_patch, module_name)
