"""What it takes a launch to read whose rows are whose from the host's memory instead of the device's.

rows_in_place.py [--launches 400]

Kernels read that once for each layer. Bare launches of the kernel that counts, an eighth of the rows traced; CUDA
events around ten launches each, the two ways in turn. Prints microseconds of GPU time a launch: medians, and the
difference's quartiles. Needs an NVIDIA GPU; vLLM is not needed.
"""

from __future__ import annotations

import argparse
import json
import statistics

import numpy as np
import torch

from moe_monitor.capture.kernels import Launcher, Tallies, table_of
from moe_monitor.capture.sending import sender
from moe_monitor.layout import RowLayout

#: (layers, experts, top-k) of OLMoE and of a model of DeepSeek-V3's size.
SHAPES = ((16, 64, 8), (58, 256, 8))
ROWS = (512, 2048, 8192, 16384)
_AT_ONCE, _SLOTS = 10, 64


def measure(layers: int, experts: int, top_k: int, rows: int, launches: int) -> dict[str, object]:
    device = torch.device("cuda", torch.cuda.current_device())
    logits = torch.randn(layers, rows, experts, device=device, dtype=torch.bfloat16)
    ids = logits.float().topk(top_k, dim=-1).indices.to(torch.int32)
    counters = torch.zeros(layers, RowLayout(experts).width, dtype=torch.int64, device=device)
    launcher = Launcher(
        counters, logits_dtype=torch.bfloat16, ids_dtype=torch.int32, experts=experts, top_k=top_k, scoring="softmax",
        tallies=Tallies.empty(_SLOTS, layers, experts, device),
    )  # fmt: skip
    launcher.warm_up()
    table = table_of(list(zip(logits, ids, strict=True))).to(device)
    owners = np.full(rows, -1, np.int32)
    owners[: rows // 8] = np.arange(rows // 8) * _SLOTS // (rows // 8) * 2
    host = torch.from_numpy(owners).pin_memory()
    way = sender(device)
    assert way is not None and way.address_of(host) == host.data_ptr(), (
        "kernels do not find pinned memory by its address"
    )
    places = {"device": host.to(device), "host": host}
    took: dict[str, list[float]] = {name: [] for name in places}
    for turn in range(-3, launches // _AT_ONCE):
        for name in sorted(places, reverse=turn % 2 == 0):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_AT_ONCE):
                launcher.launch(table, rows, slot_of_row=places[name])
            end.record()
            end.synchronize()
            if turn >= 0:
                took[name].append(1e3 * start.elapsed_time(end) / _AT_ONCE)
    more = [a - b for a, b in zip(took["host"], took["device"], strict=True)]
    return {
        "layers": layers, "experts": experts, "rows": rows,
        **{name: round(statistics.median(of), 2) for name, of in took.items()},
        "more": [round(q, 2) for q in statistics.quantiles(more)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=400)
    launches = parser.parse_args().launches
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for shape in SHAPES:
        for rows in ROWS:
            print("ROWS", json.dumps(measure(*shape, rows, launches)), flush=True)


if __name__ == "__main__":
    main()
