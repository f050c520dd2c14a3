# ruff: noqa: ANN001, ANN202, N803 -- how Triton kernels are written
"""One Triton launch per step that adds all layers' routing decisions to the counter rows, and its host side.

:class:`Launcher` does on CUDA what :func:`moe_monitor.capture.meter.accumulate` does in torch, without copying the
decisions: the kernel reads each layer's logits and ids through a device table of addresses.

The programs of a launch form a grid ``(layers, 1 + parts)`` with two roles that share nothing:

- part 0 of a layer reads all its ids (k integers a token, so one program keeps up even with a long prefill), holds the
  counts of all experts in registers, and so knows how many are distinct without asking anyone;
- the others share out the tokens, and hold histograms and sums of entropy, top-1 and mass in registers.

Each adds what it holds once, at its end, with relaxed atomics. That is all the memory ordering there is to get right:
no program reads what another one wrote, additions commute, and the stream orders a launch against the next one and
against copies. Importing this module needs neither Triton nor CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_monitor.capture.meter import fixed, row_stats
from moe_monitor.layout import FIXED_POINT, NO_ENTROPY, TALLY_COLUMNS, RowLayout, edges

try:
    import triton
    import triton.language as tl
except Exception:  # absent, or broken: either way there is no kernel, and CPU code beside this must still import
    triton = None

#: Widths (powers of two) of the kernel's vectors: columns of per-token histograms, columns that part 0 adds to.
_WIDE, _NARROW = 64, 32
#: Row columns of the sums, in the order of TALLY_COLUMNS ("" for none): the kernel makes one vector for both.
_SUMS = ("tokens", "per_token_sum", "entropy_sum", "", "top1_sum", "mass_sum", "nonfinite", "")
#: Sums of a program are int32: up to FIXED_POINT a token.
_TOKENS_PER_PROGRAM = 1024
#: What a program takes at a time, powers of two: logits (but at most so many tokens), and ids of part 0.
_TILE, _BLOCK, _CHUNK = 1024, 32, 1024
_WARPS = 4
#: No promise about these addresses is compiled in.
_POINTERS = ["rows", "table", "row_of", "bounds", "columns", "n_valid_device", "slot_of_row", "req_counts", "req_stats"]
_POINTED_TO = (torch.int64, torch.int64, torch.int32, torch.float32, *(torch.int32,) * 4, torch.int64)

if triton is not None:

    @triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
        do_not_specialize=["n_valid", "row_start", "logits_stride", "ids_stride", "layers", "slots"],
        do_not_specialize_on_alignment=_POINTERS,
    )
    def _meter_kernel(  # type: ignore[no-untyped-def]
        rows,  # int64 [layers, WIDTH]
        table, row_of,  # of each layer launched: int64 [2] addresses of logits and ids; int32 the row it adds to
        bounds, columns,  # float32 and int32 [4, WIDE], see _plan
        n_valid_device,  # int32 [2]: valid tokens, and (HAS_REQUESTS) whether any request is traced
        slot_of_row, req_counts, req_stats,  # see tally_reference
        n_valid,  # valid tokens; with DEVICE_N the most there can be
        row_start, logits_stride, ids_stride, layers,
        slots,  # 0: no request is traced
        LOGITS: tl.constexpr, IDS: tl.constexpr, ITEM: tl.constexpr,  # types, and bytes of a logit
        WIDTH: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
        EP: tl.constexpr, KP: tl.constexpr,  # E (32 at least) and K rounded up to powers of two
        BT: tl.constexpr, CHUNK: tl.constexpr,  # tokens of a block; ids that part 0 takes at a time
        WIDE: tl.constexpr, NARROW: tl.constexpr, ACTIVE_SUM: tl.constexpr,
        ENTROPY_SCALE: tl.constexpr, FIXED: tl.constexpr, SIGMOID: tl.constexpr,
        DEVICE_N: tl.constexpr, HAS_REQUESTS: tl.constexpr,
    ):  # fmt: skip
        index, part = tl.program_id(0), tl.program_id(1)
        n = tl.minimum(tl.load(n_valid_device), n_valid) if DEVICE_N else n_valid
        attributed = n * tl.minimum(slots, 1)  # tokens that slot_of_row tells of: all or none
        if DEVICE_N and HAS_REQUESTS:
            attributed *= tl.load(n_valid_device + 1)
        row = tl.load(row_of + index).to(tl.int64)
        logits_address = tl.load(table + 2 * index)
        ids_at = tl.load(table + 2 * index + 1).to(tl.pointer_type(IDS))
        out = rows + row * WIDTH
        if part == 0:
            if n > 0:
                lane = tl.arange(0, CHUNK)
                token, choice = lane // KP, lane % KP
                counts = tl.zeros([EP], tl.int32)
                at = (row_start + token).to(tl.int64) * ids_stride + choice
                ahead = tl.load(ids_at + at, mask=(token < n) & (choice < K), other=-1)
                for _ in range(0, n, CHUNK // KP):
                    ids = ahead
                    # the next chunk is on its way while this one is counted
                    token += CHUNK // KP
                    at = (row_start + token).to(tl.int64) * ids_stride + choice
                    ahead = tl.load(ids_at + at, mask=(token < n) & (choice < K), other=-1)
                    counts += tl.histogram(ids.to(tl.int32), EP, mask=(ids >= 0) & (ids < E))
                tl.atomic_add(out + tl.arange(0, EP), counts.to(tl.int64), mask=counts > 0, sem="relaxed")
                active = tl.sum((counts > 0).to(tl.int32), 0)
                c = tl.arange(0, NARROW)
                value = active.to(tl.float32)
                hit = (value > tl.load(bounds + 2 * WIDE + c)) & (value <= tl.load(bounds + 3 * WIDE + c))
                value = tl.where(c == ACTIVE_SUM, active, hit.to(tl.int32)).to(tl.int64)
                tl.atomic_add(out + tl.load(columns + 3 * WIDE + c), value, mask=value != 0, sem="relaxed")
        else:
            block = (part - 1) * BT
            if block < n:
                token = tl.arange(0, BT)
                expert = tl.arange(0, EP)[None, :]
                choice = tl.arange(0, KP)[None, :]
                c = tl.arange(0, WIDE)
                kind = tl.load(columns + c)[None, :]
                lower = tl.load(bounds + c)[None, :]
                upper = tl.load(bounds + WIDE + c)[None, :]
                s = tl.arange(0, 8)[None, :]
                histograms, sums = tl.zeros([BT, WIDE], tl.int32), tl.zeros([BT, 8], tl.int32)
                logits_at = logits_address.to(tl.pointer_type(LOGITS))
                # 16-byte loads where addresses allow them, decided here: a wrong promise of the host would be a fault
                wide = (logits_address % 16 == 0) & ((logits_stride * ITEM) % 16 == 0)
                for start in range(block, n, (tl.num_programs(1) - 1) * BT):
                    live = start + token < n
                    at = (row_start + start + token).to(tl.int64)
                    there = live[:, None] & (choice < K)
                    ids = tl.load(ids_at + at[:, None] * ids_stride + choice, mask=there, other=-1)
                    first_logit = logits_at + at[:, None] * logits_stride
                    inside = live[:, None] & (expert < E)
                    if wide:
                        aligned = tl.multiple_of(logits_address.to(tl.pointer_type(LOGITS)), 16)
                        stride = logits_stride // (16 // ITEM) * (16 // ITEM)
                        raw = tl.load(aligned + at[:, None] * stride + expert, mask=inside, other=float("-inf"))
                    else:
                        raw = tl.load(first_logit + expert, mask=inside, other=float("-inf"))
                    chosen = (ids >= 0) & (ids < E)
                    # again from memory (L1 has it) rather than out of the tile: no trip through shared memory
                    picked = tl.load(first_logit + ids, mask=chosen, other=float("-inf")).to(tl.float32)
                    x = raw.to(tl.float32)
                    top = tl.max(x, 1)
                    if SIGMOID:
                        # exp(-x) overflows below -88.7 and the score is 0, as in torch
                        score = 1.0 / (1.0 + tl.exp(-x))
                        weighted = tl.where(score > 0.0, score * tl.log(score), 0.0)
                        best = 1.0 / (1.0 + tl.exp(-top))
                        picked = 1.0 / (1.0 + tl.exp(-picked))
                    else:
                        z = x - top[:, None]
                        score = tl.exp(z)
                        weighted = tl.where(score > 0.0, score * z, 0.0)
                        best = tl.full([BT], 1.0, tl.float32)
                        picked = tl.exp(picked - top[:, None])
                    whole = tl.sum(score, 1)
                    # false for NaN, for +inf (NaN scores under softmax) and for nothing but -inf
                    finite = live & (whole > 0.0) & (whole < float("inf")) & (top < float("inf"))
                    safe = tl.where(finite, whole, 1.0)
                    entropy = (tl.log(safe) - tl.sum(weighted, 1) / safe) * ENTROPY_SCALE
                    # what is not finite, or not there, lies below every bucket
                    entropy = tl.where(finite, tl.minimum(tl.maximum(entropy, 0.0), 1.0), -2.0)
                    top1 = tl.where(finite, tl.minimum(tl.div_rn(best, safe), 1.0), -2.0)
                    mass = tl.where(finite, tl.minimum(tl.div_rn(tl.sum(picked, 1), safe), 1.0), -2.0)
                    per_token = tl.sum(chosen.to(tl.int32), 1)
                    many = tl.where(live, per_token.to(tl.float32), -2.0)
                    value = tl.where(kind == 2, mass[:, None], many[:, None])
                    value = tl.where(kind == 1, top1[:, None], value)
                    value = tl.where(kind == 0, entropy[:, None], value)
                    histograms += ((value > lower) & (value <= upper)).to(tl.int32)
                    ratio = tl.where(s == 2, entropy[:, None], 0.0)
                    ratio = tl.where(s == 4, top1[:, None], ratio)
                    ratio = tl.where(s == 5, mass[:, None], ratio)
                    own = tl.floor(tl.maximum(ratio, 0.0) * FIXED + 0.5).to(tl.int32)
                    own = tl.where(s == 6, (live & ~finite).to(tl.int32)[:, None], own)
                    sums += tl.where(s == 0, live.to(tl.int32)[:, None], tl.where(s == 1, per_token[:, None], own))
                    if HAS_REQUESTS:
                        code = tl.load(slot_of_row + at, mask=start + token < attributed, other=-1)
                        traced = (code >= 0) & (code < 2 * slots)
                        if tl.max(traced.to(tl.int32), 0) > 0:
                            tally = tl.where(traced, code // 2, 0).to(tl.int64) * layers + row
                            share = (tally * 2 + code % 2)[:, None] * E + ids
                            tl.atomic_add(req_counts + share, 1, mask=traced[:, None] & chosen, sem="relaxed")
                            own = tl.where(s == (code % 2)[:, None], 1, own)
                            lowest = tl.where(finite & traced, tl.floor(entropy * FIXED + 0.5), 1e9).to(tl.int32)
                            first = tl.max(tl.where(live, code, -1), 0)
                            if tl.min(tl.where(live, code, first), 0) == first:
                                # all one request's, as in a long prefill: one add for the block, not one per token
                                stats = req_stats + ((first // 2).to(tl.int64) * layers + row) * 8
                                added = tl.sum(tl.where(traced[:, None], own, 0), 0).to(tl.int64)
                                tl.atomic_add(stats + tl.arange(0, 8), added, mask=added != 0, sem="relaxed")
                                least = tl.min(lowest, 0)
                                tl.atomic_min(stats + 3, least.to(tl.int64), mask=least <= FIXED, sem="relaxed")
                            else:
                                each = req_stats + tally * 8
                                some = traced[:, None] & (own != 0)
                                tl.atomic_add(each[:, None] + s, own.to(tl.int64), mask=some, sem="relaxed")
                                tl.atomic_min(each + 3, lowest.to(tl.int64), mask=lowest <= FIXED, sem="relaxed")
                total = tl.sum(histograms, 0).to(tl.int64)
                tl.atomic_add(out + tl.load(columns + WIDE + c), total, mask=total != 0, sem="relaxed")
                total = tl.sum(sums, 0).to(tl.int64)
                column = tl.load(columns + 2 * WIDE + tl.arange(0, 8))
                tl.atomic_add(out + column, total, mask=total != 0, sem="relaxed")


class Tallies(NamedTuple):
    """Per-request counters: ``counts`` int32 [slots, layers, 2, experts] (phase 0 prefill, 1 decode), ``stats`` int64
    [slots, layers, 8] with columns :data:`TALLY_COLUMNS`. Layers stand in the order of the counter rows.
    """

    counts: Tensor
    stats: Tensor

    @classmethod
    def empty(cls, slots: int, layers: int, experts: int, device: torch.device | str) -> Tallies:
        counts = torch.zeros((slots, layers, 2, experts), dtype=torch.int32, device=device)
        stats = torch.zeros((slots, layers, len(TALLY_COLUMNS)), dtype=torch.int64, device=device)
        stats[..., TALLY_COLUMNS.index("entropy_min")] = NO_ENTROPY
        return cls(counts, stats)


def tally_reference(
    logits: Tensor, ids: Tensor, scoring: str, slot_of_row: Tensor, tallies: Tallies, rows: Sequence[int] | None = None
) -> None:
    """Add one pass to the tallies, in torch: ``logits`` [layers, tokens, experts], ``ids`` [layers, tokens, k],
    ``slot_of_row`` [tokens] slot * 2 + phase, or -1 where not traced, ``rows`` the layers' places in the tallies.
    """
    counts, stats = tallies
    slots, total, _, experts = counts.shape
    traced = ((slot_of_row >= 0) & (slot_of_row < 2 * slots)).nonzero().squeeze(-1)
    logits, ids, code = logits[:, traced], ids[:, traced].long(), slot_of_row[traced].long()
    layer = torch.as_tensor(range(total) if rows is None else list(rows), device=logits.device)[:, None]
    tally = (code // 2) * total + layer
    chosen = (ids >= 0) & (ids < experts)
    share = ((tally * 2 + code % 2) * experts)[..., None] + ids
    counts += torch.bincount(share[chosen], minlength=counts.numel()).view_as(counts)
    seen = row_stats(logits, ids, scoring)
    entropy, top1, mass = (
        torch.where(seen.finite, fixed(torch.where(seen.finite, ratio, 0.0)), 0)
        for ratio in (seen.entropy, seen.top1, seen.mass)
    )
    none = torch.zeros_like(tally)
    added = [none + 1 - code % 2, none + code % 2, entropy, none, top1, mass, (~seen.finite).long(), none]
    flat = stats.view(-1, len(TALLY_COLUMNS))
    flat.index_add_(0, tally.view(-1), torch.stack(added, -1).view(-1, len(TALLY_COLUMNS)))
    least = torch.where(seen.finite, entropy, NO_ENTROPY).view(-1)
    flat[:, 3] = flat[:, 3].scatter_reduce(0, tally.view(-1), least, "amin")


def table_of(decisions: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Addresses of (logits, ids) per layer, int64 [layers, 2], on the host; the tensors must outlive its use."""
    return torch.tensor([(logits.data_ptr(), ids.data_ptr()) for logits, ids in decisions], dtype=torch.int64)


def _plan(layout: RowLayout) -> tuple[Tensor, Tensor, int]:
    """The kernel's ``bounds`` (lower and upper of per-token buckets, then of part 0's), ``columns`` (kind and column of
    per-token buckets, columns of the sums, columns of part 0), and active_sum's place among part 0's.

    A bucket counts values above its lower and up to its upper bound, in float32 as in the reference. Values start at 0;
    the kernel gives -2 to what must not be counted.
    """
    bounds = np.full((4, _WIDE), np.nan, dtype=np.float32)  # NaN: no value is above it
    columns = np.zeros((4, _WIDE), dtype=np.int32)

    def fill(row: int, at: int, name: str) -> int:
        upper = (*edges(name), np.inf)
        stop = at + len(upper)
        bounds[row, at:stop] = (-1.0, *upper[:-1])
        bounds[row + 1, at:stop] = upper
        columns[1 if row == 0 else 3, at:stop] = np.arange(layout.width)[layout.offsets[name]]
        return stop

    at = 0
    for kind, name in enumerate(("entropy", "top1", "mass", "per_token")):
        columns[0, at:] = kind
        at = fill(0, at, name)
    columns[2, : len(_SUMS)] = [layout.at(name) if name else 0 for name in _SUMS]
    at = fill(2, 0, "active")
    bounds[2:, at] = -1.0, np.inf  # always: one pass
    columns[3, at : at + 2] = layout.at("passes"), layout.at("active_sum")
    if at + 2 > _NARROW:
        raise ValueError("the buckets of active experts have outgrown the kernel")
    return torch.from_numpy(bounds), torch.from_numpy(columns), at + 1


def tokens_at_a_time(experts: int) -> int:
    """Tokens that a program of the kernel takes at a time."""
    return min(_BLOCK, max(1, _TILE // max(32, triton.next_power_of_2(experts))))


def _constants(
    logits_dtype: torch.dtype, ids_dtype: torch.dtype, experts: int, top_k: int, scoring: str
) -> tuple[Any, ...]:
    """What is compiled into the kernel, LOGITS to SIGMOID. Raises RuntimeError without Triton, ValueError for what the
    kernel cannot do.
    """
    if triton is None:
        raise RuntimeError("the routing kernel needs Triton, which could not be imported")
    types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    types |= {torch.int32: tl.int32, torch.int64: tl.int64}
    if not (logits_dtype.is_floating_point and {logits_dtype, ids_dtype} < types.keys()):
        raise ValueError(f"cannot meter {logits_dtype} logits with {ids_dtype} ids")
    if scoring not in ("softmax", "sigmoid") or not 1 <= experts <= 512 or not 1 <= top_k <= 16:
        raise ValueError(f"cannot meter {scoring} scoring, {experts} experts, top {top_k}")
    layout = RowLayout(experts)
    padded = max(32, triton.next_power_of_2(experts))
    return (
        *(types[logits_dtype], types[ids_dtype], logits_dtype.itemsize, layout.width, experts, top_k),
        *(padded, triton.next_power_of_2(top_k), tokens_at_a_time(experts), _CHUNK, _WIDE, _NARROW, _plan(layout)[2]),
        *(1 / math.log(experts) if experts > 1 else 0.0, float(FIXED_POINT), scoring == "sigmoid"),
    )


def compile_kernel(
    *, logits_dtype: torch.dtype, ids_dtype: torch.dtype, experts: int, top_k: int, scoring: str, traced: bool
) -> None:
    """Compile what a :class:`Launcher` of the same arguments will launch, for the current CUDA device. ``traced``: it
    is given tallies. Takes no device memory and launches nothing; Triton remembers what it has compiled.
    """
    constants = _constants(logits_dtype, ids_dtype, experts, top_k, scoring)
    for variant in (False, True):
        _meter_kernel.warmup(*_POINTED_TO, *(0,) * 6, *constants, variant, traced, grid=(1, 2), num_warps=_WARPS)


class Launcher:
    """Launches the kernel for one model on one device; not for several threads at a time.

    ``rows`` int64 [layers, RowLayout(experts).width] and ``tallies`` (to trace requests) are kept, and written to. All
    layers share ``logits_dtype`` (bfloat16, float16, float32), ``ids_dtype`` (int32, int64), ``experts`` and ``top_k``.
    """

    programs = 1056  # that a launch over many tokens aims at: a few per multiprocessor

    def __init__(
        self,
        rows: Tensor,
        *,
        logits_dtype: torch.dtype,
        ids_dtype: torch.dtype,
        experts: int,
        top_k: int,
        scoring: str,
        tallies: Tallies | None = None,
    ) -> None:
        self._constants = _constants(logits_dtype, ids_dtype, experts, top_k, scoring)
        layout = RowLayout(experts)
        layers = rows.shape[0]
        _check(rows, torch.int64, (layers, layout.width))
        slots = 0 if tallies is None else tallies.counts.shape[0]
        if tallies is not None:
            _check(tallies.counts, torch.int32, (slots, layers, 2, experts))
            _check(tallies.stats, torch.int64, (slots, layers, len(TALLY_COLUMNS)))
        device = rows.device
        bounds, columns, _ = _plan(layout)
        spare = torch.arange(layers, dtype=torch.int32, device=device)  # row_of by default, and for what is not read
        self._tensors = (rows, spare, bounds.to(device), columns.to(device), *(tallies or (spare, rows)))
        # on CUDA launches pass addresses: cheaper than having every tensor asked for its own each time
        self._direct = device.type == "cuda"
        self._at: Callable[[Tensor], Any] = Tensor.data_ptr if self._direct else lambda tensor: tensor
        self._handles: tuple[Any, ...] = tuple(map(self._at, self._tensors))
        self._index: Any = device.index  # a tensor on CUDA has one
        self._block = tokens_at_a_time(experts)
        self._strides = (experts, top_k)
        #: The arguments that only depend on whether requests are traced, and on who says how many tokens are real.
        self._tails = {
            (traced, device_n): (layers, slots if traced else 0, *self._constants, device_n, slots > 0)
            for traced in (False, True)
            for device_n in (False, True)
        }
        self._compiled: dict[bool, Any] = {}

    def warm_up(self, device_n: Iterable[bool] = (False, True)) -> None:
        """Compile and load variants, so that no real step does: number of valid tokens on the device or not. Small and
        large steps differ only in their grid. Each runs once, on no tokens: nothing changes.
        """
        self._nothing = torch.zeros((1, 2), dtype=torch.int64, device=self._tensors[0].device)
        spare = self._tensors[1]
        given = (self._nothing, spare, spare, spare)
        for variant in device_n:
            arguments = self._arguments(self._tensors, given, (0, 0, 0, 0), traced=False, device_n=variant)
            kernel = _meter_kernel[(1, 2)](*arguments, num_warps=_WARPS)
            self._compiled[variant] = kernel and (kernel.run, kernel.function, kernel.packed_metadata)

    def _arguments(
        self, own: tuple[Any, ...], given: tuple[Any, ...], numbers: Sequence[int], *, traced: bool, device_n: bool
    ) -> tuple[Any, ...]:
        rows, _, bounds, columns, counts, stats = own
        table, row_of, n_valid, slot_of_row = given
        head = (rows, table, row_of, bounds, columns, n_valid, slot_of_row, counts, stats)
        return (*head, *numbers, *self._tails[traced, device_n])

    def parts(self, layers: int, tokens: int) -> int:
        """Programs per layer of a launch over so many layers and (at most) so many tokens."""
        wanted = max(self.programs // layers, -(-tokens // _TOKENS_PER_PROGRAM))
        return 1 + min(-(-tokens // self._block), wanted)

    def launch(
        self,
        table: Tensor,
        n_valid: int,
        *,
        row_start: int = 0,
        row_of: Tensor | None = None,
        strides: tuple[int, int] | None = None,
        slot_of_row: Tensor | None = None,
        n_valid_device: Tensor | None = None,
        stream: int | None = None,
    ) -> None:
        """Count one pass of the layers in ``table`` (int64 [launched, 2] as :func:`table_of` makes it, where the
        device can read it).

        Rows ``row_start .. row_start + n_valid`` of each layer's logits and ids are the real tokens. ``row_of`` (int32
        [launched]): the counter row that each entry of the table adds to, default 0, 1, 2... ``strides``: elements from
        one token to the next in logits and ids, default (experts, top_k). ``slot_of_row`` (int32, indexed by row as the
        logits) traces requests. With ``n_valid_device`` (int32 [2]) the device says how many tokens are real and
        whether requests are traced (0 or 1), and ``n_valid`` how many there can be: more are cut off. ``stream``: a
        raw CUDA stream, default torch's current one; the launcher's device must be the current one.

        Checks nothing: tensors must be what is said here, contiguous, and alive until the launch has run.
        """
        if n_valid <= 0:
            return
        layers, own, at, variant = table.shape[0], self._handles, self._at, n_valid_device is not None
        grid = (layers, self.parts(layers, n_valid), 1)
        given = (
            at(table),
            own[1] if row_of is None else at(row_of),
            own[1] if n_valid_device is None else at(n_valid_device),
            own[1] if slot_of_row is None else at(slot_of_row),
        )
        numbers = (n_valid, row_start, *(strides or self._strides))
        arguments = self._arguments(own, given, numbers, traced=slot_of_row is not None, device_n=variant)
        if not self._direct:
            _meter_kernel[grid](*arguments, num_warps=_WARPS)
            return
        if variant not in self._compiled:
            self.warm_up((variant,))
        stream = torch._C._cuda_getCurrentRawStream(self._index) if stream is None else stream
        run, function, metadata = self._compiled[variant]
        run(*grid, stream, function, metadata, None, None, None, *arguments)  # as Triton does, without its look-ups


def _check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise ValueError(f"expected contiguous {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
