"""The CUDA graphs of a model as they are captured, and the kernel that counts in them.

A graph is *sealed* where the kernel is in it: one launch for all layers, on a branch that begins where the last router
has decided. So it runs beside the experts of the last layer, and the GPU hardly takes longer. Or, where decisions do
not stay where they are, the kernel is in the graph once for each layer. Or it is not, and is launched after replays.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

import torch
from torch import Tensor

from moe_monitor.capture.control import Control
from moe_monitor.capture.kernels import Launcher
from moe_monitor.capture.mailbox import Mailbox
from moe_monitor.capture.retained import Retained, Span, strides_of
from moe_monitor.capture.sending import Sender

logger = logging.getLogger("vllm.moe_monitor")

#: Graphs whose addresses kernels inside of them can look up.
_GRAPHS = 512


class Graphs:
    """The graphs of a model of ``layers`` layers; ``traced``: requests may be."""

    def __init__(self, layers: int, *, traced: bool) -> None:
        self._layers, self._traced = layers, traced
        self._launcher: Launcher | None = None
        self.found: dict[Hashable, Retained] = {}
        #: What the kernels of each layer read; None unless they are in the graphs.
        self.control: Control | None = None
        #: What the kernels of sealed graphs read.
        self.mailbox: Mailbox | None = None
        #: Those of earlier captures, too: a replay that has not ended yet may read and write the host's memory.
        self._mailboxes: list[Mailbox] = []
        #: Whether graphs are sealed in which this rank's rows are not the first that routers see, or not its first.
        #: They are counted after their replays: sealed they were seen to count right in Triton's interpreter only.
        self.seals_shards = False
        #: Whether every graph is sealed, so that nobody needs to know which one is replayed.
        self.all_sealed = False
        #: Whether :meth:`end_capture` is called when a capture ends.
        self.sealing = False
        #: What is sealed in the graph under capture.
        self._open: Retained | None = None
        #: The graph whose decisions are held: the last one that a router was seen in.
        self._held: Retained | None = None

    @torch.inference_mode(False)
    def set_up(self, launcher: Launcher, device: torch.device, sender: Sender | None) -> None:
        self._launcher, self._device, self._sender = launcher, device, sender
        self._row_of = torch.arange(self._layers, dtype=torch.int32, device=device)

    # before a capture, since what kernels read must lie out of the graphs' memory pool

    def forget(self) -> None:
        """Graphs are about to be captured anew. Those before them, should they run, have what they read."""
        self.found.clear()
        self.all_sealed, self.mailbox, self._open, self._held = False, None, None, None

    def count_inside(self) -> None:
        """The kernel is to be in the graphs once for each layer."""
        self.control = Control(self._device, _GRAPHS * self._layers, self._sender)

    def seal(self, rows: int) -> None:
        """Graphs of up to ``rows`` rows (0: there will be none) are to be sealed, where they can be. Waits for the
        device.
        """
        if not rows:
            return
        try:
            self.mailbox = Mailbox(self._device, rows, _GRAPHS * self._layers, self._sender)
            self._mailboxes.append(self.mailbox)
        except Exception as error:  # counting after the replays needs none of it
            logger.warning("moe-monitor counts after the replays of CUDA graphs and not within them: %s", error)

    # under capture

    def note(self, layer: int, logits: Tensor, ids: Tensor, key: Hashable, span: Span) -> None:
        """One layer's decision, into the graph ``key``."""
        graph = self.found.get(key)
        if graph is None or graph is not self._held or layer in graph.seen:  # captured anew: the old graph is gone
            self.let_go()
            graph = self.found[key] = self._held = Retained(span)
            self.all_sealed = False
        graph.seen.add(layer)
        if self.control is not None:
            self._count_layer(self.control, layer, logits, ids, span)
            return
        graph.tensors[layer] = (logits, ids)
        if layer == self._layers - 1 and self._can_seal(graph):
            self._seal(graph)

    def let_go(self) -> None:
        """Of decisions that nothing under capture must leave alone any more. Cannot fail."""
        held, self._held = self._held, None
        if held is not None:
            held.let_go()

    def _count_layer(self, control: Control, layer: int, logits: Tensor, ids: Tensor, span: Span) -> None:
        assert self._launcher is not None
        if not control.has_room(1):
            raise RuntimeError(f"more than {_GRAPHS} graphs were captured")
        if span.skip:
            raise RuntimeError("capture inside the graph does not know sequence-parallel shards")
        self._launcher.launch(
            control.reserve([(logits, ids)]),
            min(logits.shape[0] - span.start, span.rows),
            row_start=span.start,
            row_of=self._row_of[layer : layer + 1],
            strides=strides_of([(logits, ids)]),
            n_valid_device=control.head,
        )

    def _can_seal(self, graph: Retained) -> bool:
        mailbox, span = self.mailbox, graph.span
        if not self.sealing or self._open is not None or mailbox is None or self._launcher is None or graph.sealed:
            return False
        if len(graph.tensors) != self._layers or not mailbox.has_room(self._layers):
            return False
        if (span.start or span.skip) and not self.seals_shards:
            return False
        return span.start + graph.most <= mailbox.rows

    def _seal(self, graph: Retained) -> None:
        mailbox, pairs = self.mailbox, graph.ordered()
        assert mailbox is not None
        assert self._launcher is not None
        self._open = graph
        with mailbox.branch():
            self._launcher.launch(
                mailbox.reserve(pairs),
                graph.most,
                row_start=graph.span.start,
                strides=graph.strides,
                n_valid_device=mailbox.head,
                slot_of_row=mailbox.owners if self._traced else None,
            )
        graph.mailbox, graph.whole = mailbox, not (graph.span.start or graph.span.skip)

    def end_capture(self, key: Hashable | None) -> Retained | None:
        """The capture of the graph ``key``, or of a piece of it, is about to end, which it cannot without this while a
        branch is open. Returns what counts in it: whoever replays it calls ``before_replay`` of the meter with this
        first. None: the capture goes on in another piece, it is another model's, or it could not be sealed, and is
        counted after its replays.
        """
        graph, self._open = self._open, None
        if self.mailbox is not None:
            self.mailbox.join()
        if graph is not None and graph is not self.found.get(key):
            raise RuntimeError(f"routers were seen in another graph than {key!r}, which ends")
        if graph is not None:  # its kernel has read them
            self.let_go()
        return graph

    def after_capture(self) -> None:
        """All graphs are captured."""
        self.let_go()
        self.all_sealed = bool(self.found) and all(graph.sealed for graph in self.found.values())

    # replayed

    def complete(self, key: Hashable) -> Retained | None:
        """The graph ``key``, if every layer was seen in it."""
        graph = self.found.get(key)
        return None if graph is None or len(graph.seen) != self._layers else graph

    def table_of(self, graph: Retained) -> Tensor:
        """Where the decisions of a graph that is not sealed lie: sent at its first replay. Raises RuntimeError where it
        cannot be counted so.
        """
        if graph.table is None:
            if graph.addresses is None:
                raise RuntimeError(graph.unfit or "the capture of a graph that is replayed has not ended")
            graph.table = graph.addresses.to(self._device)
        return graph.table

    @property
    def retained_bytes(self) -> int:
        """Of decisions that were held at a time, at most; so much more the pool of the graphs may take, for each stream
        on which vLLM captures them.
        """
        return max((graph.nbytes for graph in self.found.values()), default=0)
