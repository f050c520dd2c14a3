"""Taps: how the monitor gets to see what routers do, and how it lets go again.

A tap replaces the ``forward`` of one module instance. Forward hooks would be the obvious way, but torch.compile does
not notice hooks that come after it compiled (``torch._dynamo.config.skip_nnmodule_hook_guards``), so a monitor started
on a compiled model would see nothing. A ``forward`` in the instance's dictionary is guarded: starting or stopping
the monitor recompiles, the model without the monitor runs the code it would always have run.

Undo restores what was there. Where somebody has wrapped the tap meanwhile, the tap stays and only passes on.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_monitor.capture.transformers.detect import Seam, read
from moe_monitor.capture.transformers.latency import Clock
from moe_monitor.catalog import STAGES

#: Attribute of tapped modules; also the sign that a module is tapped.
TAP = "_moe_monitor_tap"
ROUTER, EXPERTS, LAYER = (STAGES.index(stage) for stage in ("router", "experts", "layer"))

_ABSENT = object()


class Owner(Protocol):
    """What a tap asks of its session."""

    #: True while the trunk's forward runs in eager mode; a router called outside it is not counted.
    in_pass: bool

    def fail(self, where: str, error: BaseException | str) -> None: ...


class Tap:
    """State of one tapped module. ``logits`` and ``ids`` are the last decision, for routers."""

    def __init__(self, module: nn.Module, stage: int, position: int, seam: Seam, owner: Owner) -> None:
        self.inner = module.forward
        self.stage = stage
        self.position = position
        self.seam = seam
        self.owner = owner
        self.active = True
        self.clock: Clock | None = None
        self.now: Callable[[], Any] = float
        self.logits: Tensor | None = None
        self.ids: Tensor | None = None
        #: When the router was done, for blocks that call each expert by themselves.
        self.mark: Any = None
        self.router: Tap | None = None

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.logits, self.ids = read(self.seam, args, kwargs, out)

    @torch.compiler.disable
    def decided(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Eager: keep the router's decision; whatever goes wrong switches the monitor off, not the model."""
        try:
            if self.logits is not None:
                raise RuntimeError("called twice in one pass")
            if self.seam.samples_in_training and self.seam.block.training:
                raise RuntimeError("the block samples experts in training and does not tell which")
            self.take(args, kwargs, out)
        except Exception as error:
            self.owner.fail(f"router of layer {self.seam.layer}", error)


def _tapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a tapped module."""
    tap: Tap = getattr(self, TAP)
    if torch.compiler.is_compiling():
        out = tap.inner(*args, **kwargs)
        if tap.active and tap.stage == ROUTER:
            tap.take(args, kwargs, out)
        return out
    if not (tap.active and tap.owner.in_pass):
        return tap.inner(*args, **kwargs)
    clock = tap.clock
    if clock is None:
        out = tap.inner(*args, **kwargs)
    else:
        start = tap.now()
        out = tap.inner(*args, **kwargs)
        tap.mark = end = tap.now()
        timed = clock.current
        if timed is not None and start is not None and end is not None:
            timed.stages.append((tap.stage, tap.position, start, end))
            if tap.router is not None and tap.router.mark is not None:
                timed.stages.append((EXPERTS, tap.position, tap.router.mark, end))
    if tap.stage == ROUTER:
        tap.decided(args, kwargs, out)
    return out


class Patch:
    """One instance attribute replaced, and put back by :meth:`undo`."""

    def __init__(self, module: nn.Module, name: str, value: Any) -> None:
        self._module, self._name, self._value = module, name, value
        self._before = module.__dict__.get(name, _ABSENT)
        module.__dict__[name] = value

    def undo(self) -> bool:
        """Whether the attribute is as it was: not so if somebody else replaced it meanwhile."""
        if self._module.__dict__.get(self._name) is not self._value:
            return False
        if self._before is _ABSENT:
            del self._module.__dict__[self._name]
        else:
            self._module.__dict__[self._name] = self._before
        return True


class Taps:
    """All taps of a session: one per router, and for latency one per block and experts module."""

    def __init__(self, seams: list[Seam], owner: Owner, clock: Clock | None) -> None:
        self._owner, self._clock = owner, clock
        self._patches: list[tuple[Patch, Patch]] = []
        self._all: list[Tap] = []
        self.routers: list[Tap] = []
        try:
            for position, seam in enumerate(seams):
                router = self._add(seam.router, ROUTER, position, seam)
                self.routers.append(router)
                if clock is None:
                    continue
                block = self._add(seam.block, LAYER, position, seam)
                if seam.experts is None:
                    block.router = router
                else:
                    self._add(seam.experts, EXPERTS, position, seam)
        except BaseException:
            self.remove()
            raise

    def _add(self, module: nn.Module, stage: int, position: int, seam: Seam) -> Tap:
        if getattr(module.__dict__.get(TAP), "active", False):
            raise RuntimeError(f"{seam.name} is monitored already; stop that monitor first")
        tap = Tap(module, stage, position, seam, self._owner)
        if self._clock is not None:
            tap.clock, tap.now = self._clock, self._clock.marker(seam.device)
        self._patches.append((Patch(module, "forward", MethodType(_tapped, module)), Patch(module, TAP, tap)))
        self._all.append(tap)
        return tap

    def clear(self) -> None:
        """Forget the decisions of the last pass."""
        for tap in self.routers:
            tap.logits = None
            tap.ids = None

    def remove(self) -> None:
        for tap in self._all:
            tap.active = False
        for forward, mark in reversed(self._patches):
            if forward.undo():
                mark.undo()
        self._patches.clear()
        self.clear()
