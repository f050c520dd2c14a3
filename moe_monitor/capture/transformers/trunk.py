"""The trunk: the module whose forward is one pass through all MoE layers and is given the attention mask."""

from __future__ import annotations

from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_monitor.capture.transformers.attach import Owner, Patch, Taps
from moe_monitor.capture.transformers.count import Stream, count_pass
from moe_monitor.capture.transformers.detect import Seam, UnsupportedModelError
from moe_monitor.capture.transformers.mask import MaskError, lengths, positional_names, real_tokens, shape

TRUNK = "_moe_monitor_trunk"


class Group:
    """The layers that live on one device, and their counter rows there (int64 [layers here, width])."""

    def __init__(self, device: torch.device, positions: list[int], rows: Tensor) -> None:
        self.device = device
        self.positions = positions
        self.rows = rows


class PassOwner(Owner, Protocol):
    """What the trunk asks of its session."""

    number: int
    skip: tuple[int, ...]
    groups: list[Group]

    @property
    def off(self) -> bool: ...

    def count(self, rows: Tensor, logits: list[Tensor], ids: list[Tensor], stream: Stream) -> None: ...

    def pass_began(self) -> Any: ...

    def model_ran(self, lengths: int | Tensor, tokens: int) -> None: ...

    def pass_ended(self, began: Any, error: BaseException | None) -> None: ...


def find_trunk(model: nn.Module, seams: list[Seam]) -> nn.Module:
    """The deepest module that holds all routers and takes an attention mask. Raises UnsupportedModelError."""
    paths = [seam.name.split(".") for seam in seams]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    for depth in range(min(len(common), len(paths[0]) - 1), -1, -1):
        module = model.get_submodule(".".join(common[:depth]))
        names = positional_names(module) if not isinstance(module, nn.ModuleList | nn.ModuleDict) else []
        if "attention_mask" in names and {"input_ids", "inputs_embeds"} & set(names):
            return module
    raise UnsupportedModelError("no module that holds all routers takes an attention mask and input ids or embeddings")


class Trunk:
    """Runs passes: clears the taps, lets the model run, hands over what the routers decided."""

    def __init__(self, module: nn.Module, taps: Taps, owner: PassOwner) -> None:
        if getattr(module.__dict__.get(TRUNK), "active", False):
            raise RuntimeError("this model is monitored already; stop that monitor first")
        self.inner = module.forward
        self.names = positional_names(module)
        self.taps = taps
        self.owner = owner
        self.active = True
        self._patches = (Patch(module, "forward", MethodType(_run, module)), Patch(module, TRUNK, self))

    def remove(self) -> None:
        self.active = False
        forward, mark = self._patches
        if forward.undo():
            mark.undo()

    def compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A pass inside torch.compile: nothing here may depend on host state that changes between passes."""
        names, owner = self.names, self.owner
        try:
            real, tokens = real_tokens(names, args, kwargs, owner.skip)
            readable = True
        except MaskError:
            real, tokens, readable = None, None, False
        batch, _ = shape(names, args, kwargs)
        self.taps.clear()
        owner.in_pass = True  # after a graph break some routers may run in eager mode
        out = self.inner(*args, **kwargs)
        owner.in_pass = False
        for group in owner.groups:
            taps = [self.taps.routers[i] for i in group.positions]
            logits = [tap.logits for tap in taps if tap.logits is not None]
            ids = [tap.ids for tap in taps if tap.ids is not None]
            if not readable or len(logits) < len(taps):
                logits, ids = [], []  # says to the session that this pass could not be read
            here = real if real is None else real.to(group.device)
            count_pass(group.rows, logits, ids, here, tokens, batch=batch, session=owner.number)
        self.taps.clear()
        return out

    @torch.compiler.disable(recursive=False)
    def eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner = self.owner
        try:
            real, tokens = real_tokens(self.names, args, kwargs, owner.skip)
            batch, length = shape(self.names, args, kwargs)
            each = lengths(kwargs, length)
        except Exception as error:
            owner.fail("attention mask", error)
            return self.inner(*args, **kwargs)
        self.taps.clear()
        began = owner.pass_began()
        owner.in_pass = True
        failure: BaseException | None = None
        try:
            out = self.inner(*args, **kwargs)
            owner.model_ran(each, batch * length)
            if not owner.off:
                self._hand_over(Stream(real, tokens, batch))
        except BaseException as error:
            failure = error
            raise
        finally:
            owner.in_pass = False
            self.taps.clear()
            owner.pass_ended(began, failure)
        return out

    @torch.compiler.disable
    def _hand_over(self, stream: Stream) -> None:
        missing = [tap.seam.layer for tap in self.taps.routers if tap.logits is None or tap.ids is None]
        if missing:
            self.owner.fail("capture", f"the routers of layers {missing} did not run in this pass")
            return
        try:
            for group in self.owner.groups:
                taps = [self.taps.routers[i] for i in group.positions]
                logits = [tap.logits for tap in taps if tap.logits is not None]
                ids = [tap.ids for tap in taps if tap.ids is not None]
                real = stream.real if stream.real is None else stream.real.to(group.device)
                self.owner.count(group.rows, logits, ids, stream._replace(real=real))
        except Exception as error:
            self.owner.fail("count", error)


def _run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of a tapped trunk."""
    trunk: Trunk = getattr(self, TRUNK)
    if torch.compiler.is_compiling():
        return trunk.compiled(args, kwargs) if trunk.active else trunk.inner(*args, **kwargs)
    if not trunk.active or trunk.owner.off:
        return trunk.inner(*args, **kwargs)
    return trunk.eager(args, kwargs)
