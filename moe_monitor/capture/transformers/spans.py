"""OpenTelemetry spans of a transformers process: one per generate call, or per forward pass outside one."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_monitor import __version__, statistics
from moe_monitor.capture.transformers.attach import Patch
from moe_monitor.layout import FIXED_POINT, RowLayout


class Counted(Protocol):
    """What spans ask of a session."""

    model_name: str
    layers: tuple[int, ...]
    layout: RowLayout
    identity: dict[str, Any]

    def rows(self) -> NDArray[np.int64]: ...


class Began(NamedTuple):
    span: Any
    rows: NDArray[np.int64]


def attributes(session: Counted, delta: NDArray[np.int64]) -> dict[str, Any]:
    """What a span says of the routing in ``delta``, counter rows [layers, width]; ratios without unit."""
    layout = session.layout
    tokens = layout.column(delta, "tokens")
    result: dict[str, Any] = {
        "moe.tokens": int(tokens.max()),
        "moe.passes": int(layout.column(delta, "passes").max()),
        "moe.layers": len(session.layers),
        "moe.experts": layout.experts,
        "moe.top_k": session.identity["top_k"],
        "moe.model_name": session.model_name,
    }
    if tokens.max() == 0:
        return result
    imbalance = statistics.imbalance(layout.column(delta, "experts"))
    worst = int(np.nanargmax(imbalance))
    result["moe.imbalance.worst_layer"] = session.layers[worst]
    result["moe.imbalance.max_ratio"] = float(imbalance[worst])
    result["moe.imbalance.floor_ratio"] = statistics.imbalance_floor(
        int(tokens[worst]), layout.experts, session.identity["top_k"]
    )
    finite = int((tokens - layout.column(delta, "nonfinite")).sum())
    if finite:
        for name, column in (("router_entropy", "entropy_sum"), ("top1", "top1_sum"), ("selected_mass", "mass_sum")):
            result[f"moe.{name}.mean_ratio"] = float(layout.column(delta, column).sum() / FIXED_POINT / finite)
    result["moe.active_experts.mean"] = float(
        layout.column(delta, "active_sum").sum() / layout.column(delta, "passes").sum()
    )
    return result


class Spans:
    """Starts and ends spans for one session."""

    def __init__(self, session: Counted, tracer_provider: Any) -> None:
        from opentelemetry import trace

        self._trace = trace
        self._session = session
        self._tracer = trace.get_tracer("moe_monitor", __version__, tracer_provider)
        self._generating = False
        self._patch: Patch | None = None

    def attach(self, model: Any) -> None:
        """Wrap the model's generate, if it has one."""
        inner = getattr(model, "generate", None)
        if inner is None or self._patch is not None:
            return

        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._generating:  # assisted generation calls generate again
                return inner(*args, **kwargs)
            began = self.began(self._session, "moe.generate", {})
            self._generating = True
            failure: BaseException | None = None
            try:
                return inner(*args, **kwargs)
            except BaseException as error:
                failure = error
                raise
            finally:
                self._generating = False
                self.ended(self._session, began, failure)

        self._patch = Patch(model, "generate", generate)

    def detach(self) -> None:
        if self._patch is not None:
            self._patch.undo()
            self._patch = None

    def began(self, session: Counted, name: str, extra: dict[str, Any]) -> Began:
        return Began(self._tracer.start_span(name, attributes=extra), session.rows())

    def pass_began(self, session: Counted) -> Began | None:
        return None if self._generating else self.began(session, "moe.forward", {})

    def ended(self, session: Counted, began: Began, error: BaseException | None) -> None:
        span = began.span
        span.set_attributes(attributes(session, session.rows() - began.rows))
        if error is not None:
            span.record_exception(error)
            span.set_status(self._trace.StatusCode.ERROR, type(error).__name__)
        span.end()
