"""Compiling the kernels beside vLLM's own start, which takes longer: Triton hardly needs Python's lock."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from moe_monitor.capture.kernels import compile_kernel
from moe_monitor.capture.mailbox import compile_fetch

logger = logging.getLogger("vllm.moe_monitor")

#: So long a start-up waits for it, in seconds, before it compiles for itself.
PATIENCE = 60.0


def compile_beside(device: torch.device, **kernel: Any) -> threading.Thread:
    """Start :func:`compile_kernel` for ``device`` in a thread, and the kernel of mailboxes. What fails there is left to
    whoever launches them first: it compiles what is not there, and says what is wrong.
    """

    def work() -> None:
        try:
            with torch.cuda.device(device):
                compile_kernel(**kernel)
                compile_fetch()
        except Exception as error:
            logger.debug("moe-monitor could not compile its kernels beforehand: %r", error)

    thread = threading.Thread(target=work, name="moe-monitor-compile", daemon=True)
    thread.start()
    return thread
