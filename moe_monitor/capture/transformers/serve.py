"""``transformers serve`` with the monitor: every mixture-of-experts model it loads is counted and published.

    python -m moe_monitor.capture.transformers.serve [--metrics-port PORT] MODEL [options of transformers serve]

Needs transformers 5.x with its serving extra. ``moe-monitor top`` and ``moe-monitor export`` see the boards; with
``--metrics-port`` the process serves Prometheus metrics itself. Models that cannot be monitored are served as ever.
"""

from __future__ import annotations

import logging
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from moe_monitor import settings
from moe_monitor.capture.transformers.entry import monitor
from moe_monitor.capture.transformers.session import Monitor

logger = logging.getLogger(__name__)

#: Running monitors by the id of their model.
_RUNNING: dict[int, Monitor] = {}


def watch(model: Any, name: str, server: str) -> Monitor | None:
    """Monitor and publish a model that was just loaded; None, and a line in the log, where that is not possible."""
    try:
        session = monitor(model, model_name=name)
        session.identity["server"] = server
        session.start()
        session.publish()
    except Exception as error:
        logger.warning("moe-monitor does not watch %s: %s", name, error)
        return None
    _RUNNING[id(model)] = session
    return session


def unwatch(model: Any) -> None:
    """Let go of a model that is about to be unloaded."""
    session = _RUNNING.pop(id(model), None)
    if session is not None:
        session.stop()


def patch(server: str) -> None:
    """Make the model manager of ``transformers serve`` tell :func:`watch` what it loads and unloads.

    Raises RuntimeError where this version of transformers has no such manager.
    """
    try:
        from transformers.cli.serving.model_manager import ModelManager, TimedModel
    except ImportError as error:
        raise RuntimeError(f"this needs transformers 5.x with its serving extra: {error}") from error
    load, delete = ModelManager._load_model, TimedModel.delete_model

    def load_model(self: Any, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        model = load(self, model_id_and_revision, *args, **kwargs)
        watch(model, model_id_and_revision.split("@", 1)[0], server)
        return model

    def delete_model(self: Any) -> Any:
        unwatch(getattr(self, "model", None))
        return delete(self)

    ModelManager._load_model = load_model
    TimedModel.delete_model = delete_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Take our own option, leave the rest to ``transformers serve``."""
    rest = list(sys.argv[1:] if arguments is None else arguments)
    port: int | None = None
    if rest[:1] == ["--metrics-port"]:
        if len(rest) < 2 or not rest[1].isdigit():
            raise SystemExit("--metrics-port needs a number")
        port, rest = int(rest[1]), rest[2:]
    server = uuid.uuid4().hex
    try:
        knobs = settings.load()
        if knobs.enabled:
            patch(server)
            if port is not None:
                from moe_monitor.capture.transformers.serving import start_exporter

                url = start_exporter(knobs.dir, server, "127.0.0.1", port).url
                logger.warning("moe-monitor: metrics at %s/metrics", url)
    except (RuntimeError, settings.SettingsError) as error:
        raise SystemExit(f"moe-monitor: {error}") from error
    from transformers.cli.transformers import app

    sys.argv = ["transformers", "serve", *rest]
    app()


if __name__ == "__main__":
    main()
