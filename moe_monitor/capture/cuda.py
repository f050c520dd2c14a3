"""The meter for CUDA: exact under CUDA graphs, with one kernel per step.

Python inside the model runs while a graph is captured and never when it is replayed. So every captured router's
logits and ids are *retained*: references keep their memory from being handed out again within that graph, and one
kernel reads all layers through a table of addresses. It is in the graph (:mod:`moe_monitor.capture.captured`), and
a replay costs the host nothing but to write down how many tokens are real (:mod:`moe_monitor.capture.mailbox`). A graph
that cannot have it has the same kernel launched after its replay. Passes without a graph hand their tensors over
directly and take the same kernel.

Retaining is unsafe where compiled code reuses the memory of logits inside the graph (Inductor's buffer reuse happens
below the allocator, references do not prevent it). That is a property of the compiled code, so it is looked for in the
warm-up passes before the capture: a checksum taken when the router has read the logits must still hold when the pass is
over. Where it does not, or where retaining would take too much memory, the kernel goes into the graph, once per layer,
and the number of valid tokens is read on the device.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_monitor.capture.ahead import PATIENCE, compile_beside
from moe_monitor.capture.captured import Graphs
from moe_monitor.capture.kernels import Launcher
from moe_monitor.capture.quick import WHOLE
from moe_monitor.capture.retained import Retained, Span, Suspects, strides_of
from moe_monitor.capture.sending import Ring, sender, wait_for
from moe_monitor.capture.tallies import DeviceTallies
from moe_monitor.layout import RowLayout

#: So many passes without a graph may be queued on the device, which reads where their decisions lie; a pass has up to a
#: launch a layer.
_PASSES = 4


def _form(logits: Tensor, ids: Tensor) -> tuple[torch.dtype, int, torch.dtype, int]:
    """Types and widths, for which the kernel is compiled."""
    return logits.dtype, logits.shape[1], ids.dtype, ids.shape[1]


class CudaMeter:
    """Counter rows of one model on one CUDA device; the same interface as :class:`~moe_monitor.capture.meter.Meter`.

    ``pending_limit``: bytes of decisions that a pass without a graph may hold. ``memory_limit``: bytes of the graphs'
    memory that decisions may take. ``forced``: "auto", "retain" or "ingraph". ``tallies``: where traced requests are
    tallied, unless capture is ingraph: a kernel inside the graph would pay for tracing in every step, traced requests
    or none.
    """

    def __init__(
        self,
        layers: Sequence[int],
        experts: int,
        top_k: int,
        scoring: str,
        *,
        memory_limit: int,
        tallies: DeviceTallies | None = None,
        forced: str = "auto",
        pending_limit: int = 32 << 20,
        is_capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
    ) -> None:
        self.layers = tuple(layers)
        self.layout = RowLayout(experts)
        self.scoring = scoring
        self.top_k = top_k
        self.passes = 0
        self.valid = 0
        self.capture = "retain" if forced != "ingraph" else "ingraph"
        #: Why the kernel goes into the graph; empty while it does not.
        self.fallback = "MOE_MONITOR_CAPTURE=ingraph" if forced == "ingraph" else ""
        self._forced = forced
        self.tallies = tallies
        self._stream: torch.cuda.Stream | None = None
        self._memory_limit = memory_limit - (0 if tallies is None else tallies.bytes)
        self._pending_limit = pending_limit
        self._launcher: Launcher | None = None
        self._compiling: threading.Thread | None = None
        self._order = list(range(len(layers)))
        #: Decisions of the pass in progress that are not counted yet, by layer: logits, ids, where its tokens lie.
        #: While there are some the pass has no graph.
        self.pending: dict[int, tuple[Tensor, Tensor, Span]] = {}
        self._pending_bytes = 0
        #: Whether all layers' decisions have been seen to be as wide and of the same types, as the model has it.
        self._same_forms = False
        #: Of this rank's tokens in the largest warm-up pass, and of all that its routers saw.
        self._own = self._gathered = 1
        #: The layer whose decision comes next in a pass that is not timed and keeps them all until its end; -1 in any
        #: other. 0: which of these it is, the first decision tells.
        self.turn = -1
        #: Where the decisions lie that came in their turn: of each layer logits, ids.
        self.addresses = array("q", bytes(16 * len(layers)))
        #: So many tokens may have a pass without a graph that keeps all decisions until its end; 0 until it is known.
        self.few = 0
        self._done: set[int] = set()
        self.graphs = Graphs(len(self.layers), traced=tallies is not None)
        self._suspects = Suspects(pending_limit)
        self._is_capturing = is_capturing
        #: The sealed graph that was replayed in this pass.
        self.counted: Retained | None = None
        #: Nothing is left of the pass before and nothing but a sealed graph was seen in this one, so the short ways of
        #: :mod:`moe_monitor.capture.quick` will do.
        self.clean = False

    def compile_beside(self, device: torch.device, logits_dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
        """Begin to compile the kernel. Where the first router says otherwise than these types, it is done again."""
        self._compiling = compile_beside(
            device,
            logits_dtype=logits_dtype,
            ids_dtype=ids_dtype,
            experts=self.layout.experts,
            top_k=self.top_k,
            scoring=self.scoring,
            traced=self.tallies is not None,
        )

    def close(self) -> None:
        """Wait for the compiler, briefly: the process may be about to end, and not in the middle of it."""
        if self._compiling is not None:
            self._compiling.join(2.0)

    # set-up: on the first router of the first (warm-up) pass, outside vLLM's weight memory pool

    # (out of inference mode, in which vLLM runs: tensors made in it could not be written to by other threads)

    @torch.inference_mode(False)
    def _set_up(self, logits: Tensor, ids: Tensor) -> Launcher:
        device, layers = logits.device, len(self.layers)
        self._device = device
        self._logit_bytes, self._id_bytes = logits.element_size(), ids.element_size()
        self._form = _form(logits, ids)
        per_token = self.layout.experts * self._logit_bytes + self.top_k * self._id_bytes
        self.few = self._pending_limit // (layers * per_token)
        short_way = sender(device)
        self._rows = torch.zeros((layers, self.layout.width), dtype=torch.int64, device=device)
        self._launcher = launcher = Launcher(
            self._rows,
            logits_dtype=logits.dtype,
            ids_dtype=ids.dtype,
            experts=self.layout.experts,
            top_k=self.top_k,
            scoring=self.scoring,
            tallies=None if self.tallies is None else self.tallies.set_up(device, short_way),
        )
        if self._compiling is not None:
            self._compiling.join(PATIENCE)
        launcher.warm_up()
        # Triton's interpreter runs all this on a CPU, for tests
        self._pinned = device.type == "cuda"
        self._host_rows = torch.empty_like(self._rows, device="cpu", pin_memory=self._pinned)
        self._ring = Ring(device, max(16, _PASSES * layers), (layers, 2), torch.int64, short_way)
        self.graphs.set_up(launcher, device, short_way)
        if self.capture == "ingraph":
            self.graphs.count_inside()
        return launcher

    # what the routers say

    @property
    def capturing(self) -> bool:
        """Whether the current stream is being captured into a graph."""
        return self._is_capturing()

    def observe(self, layer: int, logits: Tensor, ids: Tensor, key: Hashable, span: Span) -> None:
        """One layer's decision. ``key`` names the graph being captured; it is not looked at otherwise."""
        if self._is_capturing():
            self.graphs.note(layer, logits, ids, key, span)
        elif self.valid:
            self.collect(layer, logits, ids, span)
        else:
            self.clean = False
            if self._launcher is None:
                self._set_up(logits, ids)
            own = min(span.rows, logits.shape[0])
            if own >= self._own:
                self._own, self._gathered = own, logits.shape[0]
            self._suspects.note(layer, logits, ids)

    def collect(self, layer: int, logits: Tensor, ids: Tensor, span: Span) -> None:
        """One layer's decision in a real pass, in which no graph is captured."""
        self.clean = False
        if self._launcher is None:
            self._set_up(logits, ids)
        if layer in self.pending or layer in self._done:
            raise RuntimeError(f"layer {self.layers[layer]} was routed twice in one pass")
        if self.fallback:
            logits, ids = logits.clone(), ids.clone()
        small = len(self.layers) * (logits.nbytes + ids.nbytes) <= self._pending_limit
        alike = small and span == WHOLE and not self.fallback and logits.is_contiguous() and ids.is_contiguous()
        if self.turn == layer == 0 and alike:
            self.addresses[0], self.addresses[1] = logits.data_ptr(), ids.data_ptr()
            self.turn = 1
        else:
            self.turn = -1
        self.pending[layer] = (logits, ids, span)
        self._pending_bytes += logits.nbytes + ids.nbytes
        if self._pending_bytes > self._pending_limit:
            self._work_off(self.valid)

    def before_replay(self, graph: Retained) -> None:
        """A sealed graph is about to be replayed, in a pass that counts or in one that does not."""
        mailbox, span = graph.mailbox, graph.span
        assert mailbox is not None
        if not self.valid:
            mailbox.post(0)
            return
        if self.counted is not None or self.pending:
            raise RuntimeError("a pass was counted twice")
        tokens = span.valid(self.valid)
        owners = None if self.tallies is None or not tokens else self.tallies.owners
        mailbox.post(tokens, owners, span.start, span.skip)
        self.counted = graph

    # before the capture of graphs

    def before_capture(self, rows: int, streams: int = 1) -> None:
        """Decide how to capture; the largest graphs to come have ``rows`` tokens of this rank, and are captured on so
        many ``streams``, whose graphs share no memory. Waits for the device.
        """
        self.graphs.forget()
        self.clean = False
        if self._launcher is None or self.capture == "ingraph":
            return
        reasons = []
        if self._suspects.found():
            reasons.append("compiled code reuses the memory of router logits")
        per_token = len(self.layers) * (self.layout.experts * self._logit_bytes + self.top_k * self._id_bytes)
        needed = streams * -(-rows * self._gathered // self._own) * per_token
        if needed > self._memory_limit:
            allowed = f"MOE_MONITOR_DEVICE_MEMORY_MIB leaves {self._memory_limit:,}"
            reasons.append(f"retaining would take {needed:,} bytes, and {allowed}")
        if reasons:
            self.fallback = "; ".join(reasons)
            if self._forced == "retain":
                raise RuntimeError(f"MOE_MONITOR_CAPTURE=retain is not possible: {self.fallback}")
            self.capture = "ingraph"
            self.graphs.count_inside()
        else:
            self.graphs.seal(rows)

    # the step

    def begin_pass(self, tokens: int) -> None:
        """A real pass of ``tokens`` tokens is about to run."""
        self._suspects.look()
        self._forget_pass()
        self.valid = tokens
        self.clean = self.capture == "retain" and self._stream is not None
        self.turn = 0 if self.clean else -1
        if self.graphs.control is not None:
            self.graphs.control.tell(tokens)

    def set_valid(self, tokens: int) -> None:
        """The pass that has begun has so many tokens, fewer than were scheduled; before its first router."""
        self.valid = tokens
        if self.graphs.control is not None:
            self.graphs.control.tell(tokens)

    def begin_dummy(self) -> None:
        """A pass that must not be counted is about to run."""
        self.valid, self.turn = 0, -1
        if self.graphs.control is not None:
            self.graphs.control.tell(0)

    def end_pass(self, key: Hashable | None, tokens: int) -> bool:
        """The pass has run, replaying the graph ``key`` (None: without a graph), and had ``tokens`` real tokens.

        Returns whether every layer was seen: False means that capture is not live. ``key`` is not looked at after the
        replay of a sealed graph.
        """
        told, self.valid = self.valid, 0
        if self._launcher is None:
            return False
        if self._stream is None and self._pinned:
            self._stream = torch.cuda.current_stream(self._device)
            if self.tallies is not None:
                self.tallies.launched_on(self._stream)
        if self.counted is not None:
            if tokens != told or self.pending:
                raise RuntimeError(f"{told} tokens were counted in a graph, the pass had {tokens}")
        elif key is not None and not self.pending:
            graph = self.graphs.complete(key)
            if graph is None:
                return False
            if graph.sealed:
                raise RuntimeError("a sealed graph was replayed by other means than its own")
            if self.capture == "retain":
                self._after_replay(graph, tokens)
        else:
            self._work_off(tokens)
            if len(self._done) != len(self.layers):
                return False
            self._forget_pass()
            self.clean = self.capture == "retain" and self._stream is not None
        self.passes += 1
        return True

    def _after_replay(self, graph: Retained, tokens: int) -> None:
        assert self._launcher is not None
        table, span, n = self.graphs.table_of(graph), graph.span, graph.span.valid(tokens)
        owners = self._owners(span, n)
        self._launcher.launch(table, n, row_start=span.start, strides=graph.strides, slot_of_row=owners)

    def _owners(self, span: Span, n: int) -> Tensor | None:
        """Whose the rows are that a launch counts, where requests are traced."""
        if self.tallies is None or self.capture == "ingraph":
            return None
        return self.tallies.rows(span.start, span.skip, n)

    def _work_off(self, tokens: int) -> None:
        """Count the decisions at hand of a pass without a graph."""
        if not self.pending:
            return
        assert self._launcher is not None
        if self.turn == len(self._order) and self._same_forms:  # all came in their turn, and lie side by side
            self._ring.place()[:] = self.addresses
            table = self._ring.send(0, len(self.addresses))
            self._launcher.launch(table, tokens, slot_of_row=self._owners(WHOLE, tokens))
            self._done.update(self._order)
            self._let_go()
            return
        layers = list(self.pending)
        first_logits, first_ids, span = self.pending[layers[0]]
        addresses, contiguous = array("q"), True
        for logits, ids, at in self.pending.values():
            contiguous = contiguous and logits.is_contiguous() and ids.is_contiguous()
            if at is not span and at != span:
                raise RuntimeError("the layers see different tokens within one pass")
            addresses.append(logits.data_ptr())
            addresses.append(ids.data_ptr())
        if not (contiguous and self._same_forms):  # rows of contiguous tensors of one width are alike, however many
            strides_of([(logits, ids) for logits, ids, _ in self.pending.values()])
            if _form(first_logits, first_ids) != self._form:
                raise RuntimeError(f"routers decide {_form(first_logits, first_ids)}, at the start {self._form}")
            self._same_forms = contiguous and len(layers) == len(self.layers)
        whole = layers == self._order
        self._ring.place()[: len(addresses)] = addresses
        table = self._ring.send(0, len(addresses))
        self._launcher.launch(
            table if whole else table[: len(layers)],
            span.valid(tokens),
            row_start=span.start,
            row_of=None if whole else torch.tensor(layers, dtype=torch.int32).to(self._device, non_blocking=True),
            strides=(first_logits.stride(0), first_ids.stride(0)),
            slot_of_row=self._owners(span, span.valid(tokens)),
        )
        self._done.update(layers)
        # The stream's order protects the memory: whoever gets it next writes after our kernel has read.
        self._let_go()

    def give_up(self) -> None:
        """The monitor is off: no decision is kept any more, and none is still held. Cannot fail."""
        self.turn = -1
        self.pending.clear()
        self.graphs.let_go()

    def _let_go(self) -> None:
        self.pending.clear()
        self._pending_bytes = 0

    def _forget_pass(self) -> None:
        self._let_go()
        self._done.clear()
        self.counted = None

    @property
    def rows_now(self) -> Tensor | None:
        """The rows on the device, which the kernels of every pass add to; None before the first router was seen."""
        return None if self._launcher is None else self._rows

    # what the publisher asks for, from its own thread

    def read_rows(self) -> NDArray[np.int64]:
        """The rows as they stand between two steps: the copy is queued on the model's own stream.

        Waits, without holding the interpreter, until the device has worked off what was queued before.
        """
        if self._launcher is None:
            return np.zeros((len(self.layers), self.layout.width), dtype=np.int64)
        if self._stream is None:
            return self._rows.cpu().numpy().copy()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._host_rows.copy_(self._rows, non_blocking=True)
            copied = self._stream.record_event()
        wait_for(copied)
        return self._host_rows.numpy().copy()
