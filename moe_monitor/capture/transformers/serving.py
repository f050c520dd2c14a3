"""The Prometheus endpoint of a transformers process: the stand-alone exporter, showing this process's board only."""

from __future__ import annotations

from pathlib import Path

from moe_monitor.export.collector import MoeCollector
from moe_monitor.export.exporter import Exporter


def start_exporter(directory: Path, server: str, host: str, port: int) -> Exporter:
    """Serve the board of ``server`` in ``directory``; the caller stops it. Raises ExporterError."""
    exporter = Exporter(MoeCollector(directory, server=server), host, port)
    exporter.start()
    return exporter
