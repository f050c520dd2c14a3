"""Host time of a few bytes to the device, in a loop and with the processor's caches full of other things.

driver_calls.py     needs a GPU; prints a line per way and state, medians of 40

Ways: one 32-bit word by cuStreamWriteValue32, 8 and 800 bytes by the driver's copy and by torch's, and what the monitor
does instead, a word in the host's own memory (``post``). States: warm, one after the other; cold, after 100 MB through
the caches and some JSON, as between two passes of a server, only harsher; cold busy, the same with a graph running.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time

import numpy as np
import torch

from moe_monitor.capture.kernels import Launcher, table_of
from moe_monitor.capture.mailbox import Mailbox
from moe_monitor.capture.sending import sender
from moe_monitor.layout import RowLayout

LAYERS, EXPERTS, TOP_K, TOKENS = 16, 64, 8, 32


def main() -> None:
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    x = torch.zeros(1 << 16, device=device)
    way = sender(device)
    assert way is not None
    rows = torch.zeros((LAYERS, RowLayout(EXPERTS).width), dtype=torch.int64, device=device)
    form = {"experts": EXPERTS, "top_k": TOP_K, "scoring": "softmax"}
    launcher = Launcher(rows, logits_dtype=torch.bfloat16, ids_dtype=torch.int32, **form)
    launcher.warm_up()
    logits = [torch.randn(TOKENS, EXPERTS, device=device).bfloat16() for _ in range(LAYERS)]
    ids = [one.float().topk(TOP_K).indices.to(torch.int32).contiguous() for one in logits]
    table = table_of(zip(logits, ids, strict=True)).to(device)
    box = Mailbox(device, 512, LAYERS, way)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(300):
            x.add_(1.0)
        with box.branch():
            launcher.launch(table, TOKENS, n_valid_device=box.head)
        box.join()
    word = ctypes.CDLL("libcuda.so.1").cuStreamWriteValue32_v2
    word.argtypes = (ctypes.c_void_p, ctypes.c_ulonglong, ctypes.c_uint, ctypes.c_uint)
    there = torch.zeros(600, dtype=torch.int32, device=device)
    here = torch.zeros(600, dtype=torch.int32, pin_memory=True)
    stream, target, source = torch.cuda.current_stream().cuda_stream, there.data_ptr(), here.data_ptr()
    ways = {
        "nothing": lambda: None,
        "write32": lambda: word(stream, target, 5, 0),
        "driver copy 8": lambda: way.copy(target, source, 8),
        "driver copy 800": lambda: way.copy(target, source, 800),
        "torch copy 800": lambda: there[:200].copy_(here[:200], non_blocking=True),
        "post": lambda: box.post(TOKENS),
    }
    junk, objects = np.random.default_rng(0).random(12_000_000), {str(i): list(range(20)) for i in range(3000)}
    for state in ("warm", "cold", "cold busy"):
        for name, send in ways.items():
            sent, launched = [], []
            for _ in range(40):
                if state != "warm":
                    junk.sum()
                    json.loads(json.dumps(objects))
                if state == "cold busy":
                    box.post(TOKENS)
                    graph.replay()
                a = time.perf_counter()
                send()
                b = time.perf_counter()
                if name != "post":
                    box.post(TOKENS)
                c = time.perf_counter()
                graph.replay()
                d = time.perf_counter()
                sent.append(b - a)
                launched.append(d - c)
                torch.cuda.synchronize()
            times = [1e6 * statistics.median(values) for values in (sent, launched)]
            print(f"{state:10} {name:18} {times[0]:7.1f} us; graph launch {times[1]:7.1f}", flush=True)


if __name__ == "__main__":
    main()
