#!/usr/bin/env python3
"""The transformers monitor on one GPU, unattended: is it exact, and what does it cost?

    PYTHONPATH=. python benchmarks/transformers_gpu.py                                      # about two minutes
    PYTHONPATH=. python benchmarks/transformers_gpu.py --device cpu --shape tiny --quick    # the same code, no GPU

One JSON object per line and section, as soon as it is known; a section that fails says so and the next one runs. A
section that would not fit into ``--seconds`` any more is skipped and says so. Exits 1 if anything failed or was not
exact.

- exact: counts of eager passes (padding, generate) against top-k of transformers' own ``output_router_logits`` of the
  same pass, and whether the output is bit for bit that of the bare model.
- eager: time of a pass with the monitor, without its latency, and with plain hooks that copy to the host.
- device_map: layers dispatched over devices, counts against ``output_router_logits``.
- cudagraphs, inductor: torch.compile with ``mode="reduce-overhead"`` and without; time, and that every pass counts.
- compiled_exact: one whole compiled graph that also returns its router logits, counts against top-k of those.
- compiled_hooks: plain hooks compiled along with the model.

Times are by CUDA events around ``passes`` passes (gpu_ms, gaps included) and the host's time to issue them (host_ms),
each per pass and the median over rounds; ratios are medians of paired ratios to the bare model with a 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers_overhead import SHAPES, interval, plain_hooks, processor, variants

from moe_monitor import __version__
from moe_monitor.capture.transformers import monitor

VOCABULARY = 1024

#: section -> seconds that it may need on an H100 host, compilation included.
NEEDS = {
    "exact": 10,
    "eager": 45,
    "device_map": 6,
    "cudagraphs": 32,
    "inductor": 20,
    "compiled_exact": 20,
    "compiled_hooks": 20,
}


def process_age() -> float:
    """Seconds since this process began, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def skipped_graphs() -> int:
    """How often torch.compile said so far that it could not use CUDA graphs."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def say(section: str, **facts: Any) -> None:
    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {k: short(v) for k, v in value.items()}
        return [short(v) for v in value] if isinstance(value, list) else value

    print(json.dumps({"section": section} | short(facts)), flush=True)


def make(device: str, shape: str, layers: int | None = None) -> OlmoeForCausalLM:
    settings = dict(SHAPES[shape])
    if layers is not None:
        settings["num_hidden_layers"] = layers
    torch.manual_seed(0)
    config = OlmoeConfig(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, norm_topk_prob=False, **settings)
    with torch.device(device):
        model = OlmoeForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def tokens_of(device: str, rows: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator).to(device)


def routed(logits: tuple[torch.Tensor, ...], top_k: int, real: torch.Tensor | None = None) -> np.ndarray:
    """Counts [layers, experts] from router logits by the router's own two steps: softmax in float32, top-k."""
    rows = []
    for layer in logits:
        chosen = torch.softmax(layer.reshape(-1, layer.shape[-1]).float(), -1).topk(top_k, dim=-1).indices
        chosen = chosen if real is None else chosen[real.reshape(-1).bool().to(chosen.device)]
        rows.append(torch.bincount(chosen.reshape(-1), minlength=layer.shape[-1]).cpu().numpy())
    return np.stack(rows)


class Timer:
    """Seconds on the device and on the host of some passes."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def __call__(self, work: Callable[[], Any], passes: int) -> tuple[float, float]:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(passes):
                work()
            seconds = (time.perf_counter() - start) / passes
            return seconds, seconds
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        start = time.perf_counter()
        for _ in range(passes):
            work()
        host = (time.perf_counter() - start) / passes
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / passes, host


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device: str = arguments.device
        self.shape: str = arguments.shape
        self.quick: bool = arguments.quick
        self.compile_layers: int = arguments.compile_layers
        self.timer = Timer(self.device == "cuda")
        self.ok = True
        self._model: OlmoeForCausalLM | None = None

    def check(self, good: bool) -> bool:
        self.ok = self.ok and bool(good)
        return bool(good)

    @property
    def model(self) -> OlmoeForCausalLM:
        if self._model is None:
            self._model = make(self.device, self.shape)
        return self._model

    def free(self) -> None:
        self._model = None
        torch._dynamo.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def paired(self, works: dict[str, Callable[[], Any]], rounds: int, passes: int) -> dict[str, Any]:
        """Time variants in turns; each value of ``works`` starts a variant and returns (pass, stop)."""
        gpu: dict[str, list[float]] = {name: [] for name in works}
        host: dict[str, list[float]] = {name: [] for name in works}
        order = list(works)
        for turn in range(rounds + 1):
            random.shuffle(order)
            for name in order:
                work, stop = works[name]()
                if turn == 0:
                    self.timer(work, 3)  # compiles, warms up
                on_device, on_host = self.timer(work, passes)
                stop()
                if turn:
                    gpu[name].append(on_device)
                    host[name].append(on_host)
        bare = np.array(gpu["bare"])
        result: dict[str, Any] = {}
        for name in works:
            facts = {"gpu_ms": 1e3 * float(np.median(gpu[name])), "host_ms": 1e3 * float(np.median(host[name]))}
            if name != "bare":
                facts |= interval(np.array(gpu[name]) / bare)
            result[name] = facts
        return result

    # sections

    def exact(self) -> None:
        model, k = self.model, self.model.config.num_experts_per_tok
        rows, length = (2, 16) if self.quick else (8, 512)
        ids = tokens_of(self.device, rows, length)
        mask = torch.ones_like(ids)
        for i in range(rows):
            mask[i, : i * length // (2 * rows)] = 0
        with torch.no_grad():
            first, again = (model(ids, attention_mask=mask).logits for _ in range(2))
            with monitor(model) as m:
                same = torch.equal(model(ids, attention_mask=mask).logits, first)
                m.reset()
                out = model(ids, attention_mask=mask, output_router_logits=True)
                counts, passes = m.snapshot().counts, m.snapshot().passes
                expected = routed(out.router_logits, k, mask)
                p = [torch.softmax(x.double(), -1)[mask.reshape(-1).bool()] for x in out.router_logits]
                entropy = float(torch.stack([torch.special.entr(x).sum(-1).mean() for x in p]).mean())
                mean = m.summary().total["router_entropy_ratio_mean"] * np.log(model.config.num_experts)
                m.reset()
                new = 8 if self.quick else 32
                made = model.generate(
                    ids[:, -64:], attention_mask=mask[:, -64:], max_new_tokens=new, min_new_tokens=new, do_sample=False
                )
                fed = int(mask[:, -64:].sum()) + rows * (new - 1)
                snapshot = m.snapshot()
                latencies = m.summary().rows[0]
        say(
            "exact",
            ok=self.check(not m.off and bool((counts == expected).all()) and passes == 1),
            off=m.reason if m.off else None,
            tokens=int(mask.sum()),
            differing_assignments=int(np.abs(counts - expected).sum()),
            entropy_nats=entropy,
            entropy_error=self.close(abs(mean - entropy), 1e-3),
            bare_repeats_itself=torch.equal(first, again),
            output_unchanged=self.check(same or not torch.equal(first, again)),
            generate_passes=self.check(snapshot.passes == new) and snapshot.passes,
            generate_tokens=int(snapshot.column("tokens")[0]),
            generate_ok=self.check(set(snapshot.column("tokens").tolist()) == {fed} and made.shape[0] == rows),
            layer0_us={s: 1e6 * (latencies[f"{s}_seconds_p50"] or 0) for s in ("router", "experts", "layer")},
        )

    def close(self, error: float, limit: float) -> float:
        self.check(error < limit)
        return error

    def eager(self) -> None:
        model = self.model
        makers = variants(model, model, compiled=False)
        for tokens in [8] if self.quick else [1, 128, 2048]:
            ids = tokens_of(self.device, 1, tokens)

            def starter(name: str, ids: torch.Tensor = ids) -> Callable[[], Any]:
                def start() -> tuple[Callable[[], Any], Callable[[], None]]:
                    context = makers[name]()
                    session = context.__enter__()

                    def stop() -> None:
                        context.__exit__(None, None, None)
                        if getattr(session, "off", False):
                            raise RuntimeError(f"{name}: {session.reason}")
                        if hasattr(session, "reset"):
                            session.reset()

                    return (lambda: model(input_ids=ids, use_cache=False)), stop

                return start

            with torch.inference_mode():
                found = self.paired({name: starter(name) for name in makers}, *((3, 2) if self.quick else (9, 5)))
            say("eager", layers=model.config.num_hidden_layers, tokens=tokens, results=found)

    def device_map(self) -> None:
        self.free()
        model = make(self.device, self.shape, layers=2)
        how = "accelerate, hooks forced"
        try:
            from accelerate import dispatch_model
        except ImportError:
            how = "forward pre-hooks (no accelerate here), last layer on the CPU"
            model = spread(model, self.device)
        else:
            names = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"]
            where = dict.fromkeys([*names, "model.layers.1"], 0 if self.device == "cuda" else "cpu")
            model = dispatch_model(model, where, force_hooks=True)
        ids = tokens_of(self.device, 2, 48)
        with torch.no_grad():
            before = model(ids, use_cache=False).logits
            with monitor(model) as m:
                unchanged = torch.equal(before, model(ids, use_cache=False).logits)
                m.reset()
                out = model(ids, use_cache=False, output_router_logits=True)
        expected = routed(out.router_logits, model.config.num_experts_per_tok)
        counts = m.snapshot().counts
        say(
            "device_map",
            ok=self.check(not m.off and bool((counts == expected).all()) and unchanged),
            how=how,
            off=m.reason if m.off else None,
            devices=[str(seam.device) for seam in m.seams],
            differing_assignments=int(np.abs(counts - expected).sum()),
            output_unchanged=unchanged,
        )

    def _compiled(self, section: str, mode: str | None) -> None:
        self.free()
        model = make(self.device, self.shape, layers=self.compile_layers)
        ids = tokens_of(self.device, 1, 64)
        run = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)
        seconds, passes, skips = {}, {}, {}
        session = monitor(run)

        def work() -> None:
            torch.compiler.cudagraph_mark_step_begin()
            run(input_ids=ids, use_cache=False)
            passes["seen"] = passes.get("seen", 0) + 1

        with torch.no_grad():
            for name in ("bare", "monitor"):
                start, skipped = time.perf_counter(), skipped_graphs()
                if name == "monitor":
                    session.start()
                for _ in range(3):
                    work()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                seconds[name], skips[name] = time.perf_counter() - start, skipped_graphs() - skipped
            session.stop()
            session.reset()
            passes["monitored"] = 0

            def monitored() -> tuple[Callable[[], Any], Callable[[], None]]:
                session.start()
                before = passes["seen"]

                def stop() -> None:
                    session.stop()
                    passes["monitored"] += passes["seen"] - before

                return work, stop

            works = {"bare": lambda: (work, lambda: None), "monitor": monitored}
            found = self.paired(works, *((3, 3) if self.quick else (11, 30)))
        snapshot = session.snapshot()
        expected = passes["monitored"] * ids.numel() * model.config.num_experts_per_tok
        say(
            section,
            ok=self.check(
                not session.off
                and snapshot.passes == passes["monitored"]
                and set(snapshot.counts.sum(axis=1).tolist()) == {expected}
                and skips["monitor"] <= skips["bare"]
            ),
            off=session.reason if session.off else None,
            layers=self.compile_layers,
            tokens=ids.numel(),
            passes=passes["monitored"],
            counted_passes=snapshot.passes,
            compile_seconds=seconds,
            results=found,
            cudagraph_skips=skips,
        )

    def cudagraphs(self) -> None:
        self._compiled("cudagraphs", "reduce-overhead")

    def inductor(self) -> None:
        self._compiled("inductor", None)

    def compiled_exact(self) -> None:
        self.free()
        model = make(self.device, self.shape, layers=2)
        ids = tokens_of(self.device, 2, 96)
        mask = torch.ones_like(ids)
        mask[0, :11] = 0
        kept: list[torch.Tensor] = []
        for layer in model.model.layers:  # before compilation, so that they are traced: the graph returns the logits
            layer.mlp.gate.register_forward_hook(lambda _module, _args, out: kept.append(out[0]))

        def with_logits(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
            kept.clear()
            out = model(ids, attention_mask=mask, use_cache=False).logits
            return [out, *kept]

        run = torch.compile(with_logits, dynamic=False, fullgraph=True)
        with torch.no_grad(), monitor(model) as m:
            _, *logits = run(ids, mask)
        counts = m.snapshot().counts
        expected = routed(tuple(logits), model.config.num_experts_per_tok, mask)
        say(
            "compiled_exact",
            ok=self.check(not m.off and bool((counts == expected).all())),
            off=m.reason if m.off else None,
            tokens=int(mask.sum()),
            differing_assignments=int(np.abs(counts - expected).sum()),
        )

    def compiled_hooks(self) -> None:
        self.free()
        model = make(self.device, self.shape, layers=self.compile_layers)
        ids = tokens_of(self.device, 1, 64)

        def seconds(run: Any) -> float:
            return self.timer(lambda: run(input_ids=ids, use_cache=False), 3 if self.quick else 30)[0]

        with torch.no_grad(), plain_hooks(model, model.config.num_experts):
            run = torch.compile(model, dynamic=False)
            seconds(run)
            hooked = min(seconds(run) for _ in range(5))
        say("compiled_hooks", layers=self.compile_layers, tokens=64, plain_hooks_ms=1e3 * hooked)


def spread(model: OlmoeForCausalLM, device: str) -> OlmoeForCausalLM:
    """The model on ``device`` but for its last layer, inputs brought along by forward pre-hooks."""

    def bring(where: str) -> Callable[..., Any]:
        def move(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(where)
            return tuple(move(v) for v in value) if isinstance(value, tuple) else value

        return lambda _module, args, kwargs: (move(args), {k: move(v) for k, v in kwargs.items()})

    model.to(device)
    model.model.layers[-1].to("cpu")
    model.model.layers[-1].register_forward_pre_hook(bring("cpu"), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(bring(device), with_kwargs=True)
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--shape", default="olmoe", choices=SHAPES)
    parser.add_argument("--compile-layers", type=int, default=4)
    parser.add_argument("--seconds", type=int, default=140, help="begin no section that would end later; stop then")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and rounds")
    parser.add_argument("--only", nargs="*", choices=NEEDS, default=list(NEEDS))
    arguments = parser.parse_args()
    random.seed(0)
    say(
        "machine",
        device=processor(arguments.device),
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        moe_monitor=__version__,
        shape=arguments.shape,
        dtype="bfloat16",
        cpus=os.cpu_count(),
        start_seconds=process_age(),
    )

    def late(*_: object) -> None:
        raise TimeoutError("out of time")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(max(1, int(arguments.seconds - process_age())))
    bench = Bench(arguments)
    for section in arguments.only:
        start = time.monotonic()
        left = arguments.seconds - process_age()
        if left < NEEDS[section]:
            say(section, skipped=f"{left:.0f} s left")
            continue
        try:
            getattr(bench, section)()
        except TimeoutError as error:
            say(section, failed=str(error))
            bench.ok = False
            break
        except Exception as error:
            bench.ok = False
            say(section, failed=f"{type(error).__name__}: {str(error)[:600]}")
        say(f"{section}_took", seconds=time.monotonic() - start)
    signal.alarm(0)
    say("end", ok=bench.ok, seconds=process_age())
    return 0 if bench.ok else 1


if __name__ == "__main__":
    sys.exit(main())
