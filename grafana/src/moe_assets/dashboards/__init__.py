"""One module a dashboard; each has ``build()``."""

from __future__ import annotations

from typing import Any

from moe_assets.dashboards import itself, layers, overview, per_request, ranks


def build() -> dict[str, dict[str, Any]]:
    """uid -> dashboard JSON."""
    made = [module.build() for module in (overview, layers, ranks, per_request, itself)]
    return {str(dashboard["uid"]): dashboard for dashboard in made}
