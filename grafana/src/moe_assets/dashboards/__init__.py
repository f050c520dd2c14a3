"""One module a dashboard; each has ``build()``."""

from __future__ import annotations

from typing import Any

from moe_assets.dashboards import itself, latency, layers, overview, per_request, ranks, runbooks


def build() -> dict[str, dict[str, Any]]:
    """uid -> dashboard JSON."""
    made = [module.build() for module in (overview, layers, ranks, latency, per_request, itself, runbooks)]
    return {str(dashboard["uid"]): dashboard for dashboard in made}
