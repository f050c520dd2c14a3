"""moe-monitor: runtime monitor for mixture-of-experts routing."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # every process of a server imports this package, and must not pay for typing
    from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """The monitor for transformers models, imported when first asked for: it needs torch."""
    if name in {"Monitor", "UnsupportedModelError", "expert_counts", "monitor"}:
        import importlib

        # By name: this package is imported by all others, which must not be bound to torch.
        return getattr(importlib.import_module("moe_monitor.capture.transformers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
