"""Attaching to a loaded model: which layers route, what they look like, and whose rank counts them."""

from __future__ import annotations

import logging
from typing import Any

import torch

import moe_monitor
from moe_monitor.capture.cuda import CudaMeter
from moe_monitor.capture.device_clock import TWINS_MIB
from moe_monitor.capture.fuse import Fuse
from moe_monitor.capture.meter import Meter
from moe_monitor.capture.publisher import Publisher, Reading
from moe_monitor.capture.requests import Tracer
from moe_monitor.capture.tallies import DeviceTallies, HostTallies, slot_bytes
from moe_monitor.capture.vllm import op
from moe_monitor.capture.vllm.context import parallel_of
from moe_monitor.capture.vllm.hooks import Hooks
from moe_monitor.capture.vllm.identity import board_name, process_identity
from moe_monitor.capture.vllm.latency import Timing, work_of
from moe_monitor.capture.vllm.layers import (
    NothingToMonitor,
    RouterFacts,
    facts_of,
    moe_layers,
    parents_of,
    placement_of,
)
from moe_monitor.capture.vllm.versions import SUPPORTED, supported
from moe_monitor.capture.vllm.wrapping import Wrapping, opaque_routing, traced_routing
from moe_monitor.settings import Settings

logger = logging.getLogger("vllm.moe_monitor")


class Capture(Hooks):
    """The monitor of one worker: fuse, meter, timing and publisher, and the hooks that feed them."""

    def __init__(self, model_runner: Any, settings: Settings) -> None:
        super().__init__(Fuse(logger))
        self.publisher: Publisher | None = None
        #: Whether this rank publishes counts: of ranks that route the same tokens alike only the first does.
        self.counts = False
        self._wrapping = Wrapping()
        self._settings = settings
        try:
            identity = self._attach(model_runner)
        except NothingToMonitor as nothing:
            identity = {"layers": [], "experts": 0, "top_k": 0, "scoring": ""}
            self.detach()
            self.fuse.off(str(nothing))
        except Exception as error:
            identity = {"layers": [], "experts": 0, "top_k": 0, "scoring": ""}
            self.detach()
            self.fuse.blow("attach", error)
        self._publish(model_runner.vllm_config, identity, settings)

    def _attach(self, model_runner: Any) -> dict[str, Any]:
        import vllm

        if not supported(vllm.__version__):
            raise NothingToMonitor(
                f"vLLM {vllm.__version__} is outside the supported range {SUPPORTED[0]} to below {SUPPORTED[1]}; "
                "install a moe-monitor release that supports it"
            )
        layers = moe_layers(model_runner.model)
        if not layers:
            raise NothingToMonitor("the model has no mixture-of-experts layers on this rank")
        facts = {facts_of(runner) for _, runner in layers}
        if len(facts) > 1:
            raise NothingToMonitor(f"its MoE layers differ from each other: {sorted(map(str, facts))}")
        (common,) = facts
        indices = [index for index, _ in layers]
        self.parallel = parallel_of(model_runner.vllm_config)
        self.fuse.status.active = True
        self.fuse.status.reason = ""
        identity = {"layers": indices, **common.__dict__}
        placement = placement_of(layers[0][1])
        if placement is not None:
            identity["ep"] = placement
        self.counts = not self.parallel.tp_rank or bool(layers[0][1].moe_config.is_sequence_parallel)
        if self._settings.latency_every:
            work = work_of(layers[0][1], common, placement)
            self.timing = Timing(self, layers, self._settings.latency_every, work, common.experts)
            speculative = model_runner.vllm_config.speculative_config
            self.timing.decode_tokens += int(getattr(speculative, "num_speculative_tokens", None) or 0)
            identity["latency_every"] = self._settings.latency_every
        # Without expert parallelism another rank's load is this one's: there is nothing to be learnt from counting it.
        metered = self.counts or (self.timing is not None and placement is not None)
        if not metered and self.timing is None:
            return identity
        (self._attach_cuda if model_runner.device.type == "cuda" else self._attach_cpu)(
            model_runner, layers, common, metered
        )
        (logger.info if self.counts else logger.debug)(
            "moe-monitor %s counts the routing of %d layers, %d experts, top-%d",
            moe_monitor.__version__,
            len(layers),
            common.experts,
            common.top_k,
        )
        return identity

    def _slots(self, layers: int, experts: int) -> int:
        """How many requests may be traced at a time."""
        room = (self._settings.device_memory_mib << 20) // 4 // slot_bytes(layers, experts)
        return min(self._settings.max_traced, room) if self.counts else 0

    def _attach_cuda(self, model_runner: Any, layers: list[tuple[int, Any]], facts: RouterFacts, metered: bool) -> None:
        slots, settings = self._slots(len(layers), facts.experts), self._settings
        if metered:
            tallies = DeviceTallies(slots, len(layers), facts.experts) if slots else None
            self.meter = meter = CudaMeter(
                [index for index, _ in layers],
                facts.experts,
                facts.top_k,
                facts.scoring,
                memory_limit=(settings.device_memory_mib - (0 if self.timing is None else TWINS_MIB)) << 20,
                tallies=tallies,
                forced=settings.capture,
            )
            try:  # a guess, which saves time where it is right
                logits = getattr(layers[0][1].moe_config, "router_logits_dtype", None)
                meter.compile_beside(model_runner.device, logits or model_runner.model_config.dtype, torch.int32)
            except Exception as error:
                logger.debug("moe-monitor does not compile beforehand: %r", error)
            self.fuse.status.capture = meter.capture
            if tallies is not None:
                possible = lambda: meter.capture != "ingraph"  # noqa: E731
                self.tracer = Tracer(tallies, settings.sample_ratio, self.fuse.status, possible=possible)
        for position, (_, runner) in enumerate(layers):
            self._wrapping.put(runner.router, "_compute_routing", opaque_routing(runner.router, position, self))
        if self.timing is not None:
            width = 0 if self.meter is None else self.meter.layout.width
            parents = parents_of(model_runner.model, layers)
            self.timing.attach_cuda(layers, parents, model_runner.device, width)

    def _attach_cpu(self, model_runner: Any, layers: list[tuple[int, Any]], facts: RouterFacts, metered: bool) -> None:
        slots = self._slots(len(layers), facts.experts)
        if metered:
            self.meter = meter = Meter([index for index, _ in layers], facts.experts, facts.scoring)
            self.fuse.status.capture = "op"
            if slots:
                meter.tallies = HostTallies(slots, len(layers), facts.experts)
                self.tracer = Tracer(meter.tallies, self._settings.sample_ratio, self.fuse.status)
        op.set_observer(self.observe)
        timed = self.timing is not None
        for position, (_, runner) in enumerate(layers):
            routing = traced_routing(runner.router, position, timed=timed)
            self._wrapping.put(runner.router, "_compute_routing", routing)
        if self.timing is not None:
            self.timing.attach_cpu(layers, parents_of(model_runner.model, layers), self._wrapping.put)
        timed = self.timing is not None and self.timing.clock is not None
        op.mark_compile_cache(model_runner.vllm_config, op.GRAPH_VERSION + ("t" if timed else ""))

    def detach(self) -> None:
        """Undo the wrapping of the live model."""
        op.set_observer(None)
        op.set_clock(None)
        if self.timing is not None:
            self.timing.arm(False)
        self._wrapping.undo()

    def _publish(self, config: Any, identity: dict[str, Any], settings: Settings) -> None:
        identity |= process_identity(config)
        try:
            self.publisher = Publisher(
                settings.dir,
                board_name(identity),
                identity,
                self.fuse,
                self if self.counts and self.meter is not None and not self.fuse.blown else None,
                interval=settings.interval,
                log_interval=settings.log_interval,
                logger=logger,
                requests=self.tracer,
                timings=self.timing,
            )
        except Exception as error:
            self.detach()
            self.fuse.blow("board", error)

    # what the publisher asks for

    @property
    def passes(self) -> int:
        return self.meter.passes if self.meter is not None else 0

    def read(self) -> Reading:
        assert self.meter is not None
        rows = self.meter.read_rows()
        return Reading(rows, int(self.meter.layout.column(rows, "passes").max()))

    def close(self) -> None:
        self.detach()
        if isinstance(self.meter, CudaMeter):
            self.meter.close()
        if self.publisher is not None:
            self.publisher.close()
