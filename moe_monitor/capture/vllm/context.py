"""What vLLM's forward context says about the pass in progress: which graph, and whose tokens a router sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from moe_monitor.capture.retained import Span


class NotLive(RuntimeError):
    """vLLM runs the model in a way in which routing is not captured."""


@functools.cache
def _seam() -> tuple[Callable[[], Any], Callable[[], bool]]:
    from vllm.forward_context import get_forward_context, is_forward_context_available

    return get_forward_context, is_forward_context_available


def _context() -> Any:
    get, available = _seam()
    return get() if available() else None


def graph_key() -> Hashable | None:
    """Name of the graph that the pass replays or captures, None without one. Raises NotLive for micro-batches."""
    context = _context()
    if context is None:
        return None
    if context.ubatch_slices is not None:
        raise NotLive("capture is not live: dual-batch overlap splits the batch behind the routers' backs")
    mode = context.cudagraph_runtime_mode
    if mode.value == 0 or context.batch_descriptor is None:
        return None
    return (mode.name, context.batch_descriptor)


def splits() -> Callable[[], bool]:
    """What tells whether the pass in progress is one that :func:`graph_key` refuses."""
    get, available = _seam()

    def split() -> bool:
        return available() and get().ubatch_slices is not None

    return split


#: Where all that a router sees is this rank's.
_ALL = Span()


@dataclass(frozen=True)
class Parallel:
    """This rank's place among those that may see each other's tokens."""

    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int

    @property
    def alone(self) -> bool:
        """Whether routers see no other rank's tokens, and all of this one's."""
        return self.dp_size == 1

    def span(self, rows: int) -> Span:
        """Where this rank's tokens lie in the ``rows`` that a router sees.

        Without data parallelism: at the head. With it, by the layouts that vLLM's RoutedExpertsCapturer.capture
        distinguishes: this rank's tokens alone, all ranks' one after the other, or a sequence-parallel shard.
        """
        if self.alone:
            return _ALL
        context = _context()
        metadata = None if context is None else context.dp_metadata
        if metadata is None:
            return Span()
        sizes = [int(n) for n in metadata.num_tokens_across_dp_cpu]
        own, total = sizes[self.dp_rank], sum(sizes)
        if rows == total and total != own:
            return Span(start=sum(sizes[: self.dp_rank]), rows=own)
        if rows == own:
            return Span(rows=own)
        shards = getattr(metadata, "local_sizes", None)
        if shards is not None and rows == sum(shards):
            # gathered sequence-parallel shards of all ranks, padded, in data-then-tensor-parallel order
            per_rank = len(shards) // len(sizes)
            return Span(start=sum(shards[: self.dp_rank * per_rank]), rows=own)
        shard = -(-own // self.tp_size)
        if self.tp_size > 1 and rows == shard:
            return Span(rows=shard, skip=self.tp_rank * shard)
        raise NotLive(f"capture is not live: a router saw {rows} rows, data-parallel ranks have {sizes} tokens")


def parallel_of(config: Any) -> Parallel:
    """Of this process, by vLLM's configuration."""
    from vllm.distributed import get_tensor_model_parallel_rank

    parallel = config.parallel_config
    return Parallel(
        dp_rank=int(parallel.data_parallel_rank),
        dp_size=int(parallel.data_parallel_size),
        tp_rank=int(get_tensor_model_parallel_rank()),
        tp_size=int(parallel.tensor_parallel_size),
    )
