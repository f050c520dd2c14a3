"""The routing kernel against the torch reference and against an oracle of its own, in float64.

On a machine with an NVIDIA GPU the tests run there. Elsewhere they are skipped one by one, and
:func:`test_in_the_interpreter` runs this file in a second process, in which Triton's interpreter executes the kernel on
the CPU: ``TRITON_INTERPRET`` acts when Triton is imported, and must not reach other tests.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from moe_monitor.capture import kernels  # noqa: E402 - needs torch
from moe_monitor.capture.kernels import NO_ENTROPY, TALLY_COLUMNS, Launcher, Tallies, table_of, tally_reference  # noqa: E402
from moe_monitor.capture.meter import accumulate, row_stats  # noqa: E402
from moe_monitor.layout import FIXED_POINT, RowLayout, edges  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
REAL_GPU = torch.cuda.is_available() and not INTERPRETED
SUMS = {"entropy": "entropy_sum", "top1": "top1_sum", "mass": "mass_sum"}

#: How far a ratio may lie from a bucket's edge and still be counted on the other side of it, and (as two units of the
#: fixed point) how far each token may move a sum. float32 rounds at 6e-8; a sum over 512 experts, and exp and log that
#: differ from torch's in their last bits (ex2.approx on the GPU: 2 ulp, of an argument up to 100), stay under 2e-6.
NEAR = 2 / FIXED_POINT

kernel_test = pytest.mark.skipif(
    kernels.triton is None or not (INTERPRETED or torch.cuda.is_available()),
    reason="no GPU here: test_in_the_interpreter runs this in Triton's interpreter",
)


def kernel(function):
    return pytest.mark.gpu(kernel_test(function))


@pytest.mark.skipif(REAL_GPU or INTERPRETED, reason="the tests of this file run here themselves")
@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
def test_in_the_interpreter():
    root = Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-q", "-W", "ignore", "-p", "no:cacheprovider", "--durations=5"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=280,
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


def test_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from moe_monitor.capture import kernels\n"
        "from moe_monitor.layout import RowLayout\n"
        "rows = torch.zeros(1, RowLayout(4).width, dtype=torch.int64)\n"
        "try: kernels.Launcher(rows, logits_dtype=torch.float32, ids_dtype=torch.int32, experts=4, top_k=1,"
        " scoring='softmax')\n"
        "except RuntimeError as error: print(error)\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "needs Triton" in done.stdout


# What routers can do


def ordinary(layers, rows, experts, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(layers, rows, experts, generator=rng) * torch.rand(layers, rows, 1, generator=rng) * 5


def adversarial(layers, rows, experts, seed):
    """Every kind of row that once broke a softmax, in turn, from a different one in each layer."""
    rng = torch.Generator().manual_seed(seed)
    x = ordinary(layers, rows, experts, seed)
    inf, nan = math.inf, math.nan
    for layer in range(layers):
        for row in range(rows):
            at = int(torch.randint(experts, (), generator=rng))
            line = x[layer, row]
            match (layer * 5 + row) % 14:
                case 1:
                    line[:] = 0.5  # all tied
                case 2:
                    line.round_()  # many tied
                case 3:
                    line[:] = -40
                    line[at] = 40  # one takes all
                case 4:
                    line[at] = nan
                case 5:
                    line[at] = inf
                case 6:
                    line[:] = -inf
                case 7:
                    line[::2] = -inf
                case 8:
                    line[:] = nan
                case 9:
                    line *= 1e4
                case 10:
                    line[:] = -inf
                    line[at] = line[at // 2] = 3.0  # two tied, or one, and nothing else
                case 11:
                    line[:] = -100  # nothing is left of sigmoid scores
                case 12:
                    line[at] = inf
                    line[at // 2] = nan
    return x


def choose(logits, k, ids_dtype, seed, spoil):
    """Top-k ids; ``spoil`` makes some of them duplicates, and some no expert."""
    experts = logits.shape[-1]
    ids = logits.float().nan_to_num(0.0).topk(min(k, experts), dim=-1).indices
    ids = ids.repeat(1, 1, -(-k // ids.shape[-1]))[..., :k].contiguous()
    if spoil:
        rng = torch.Generator().manual_seed(seed)
        draw = torch.randint(8, ids.shape, generator=rng)
        ids = torch.where(draw == 0, -1, ids)
        ids = torch.where(draw == 1, ids[..., :1], ids)
        ids = torch.where(draw == 2, torch.tensor([experts, 2**31 - 1, -(2**31), experts + 1])[ids % 4], ids)
    return ids.to(ids_dtype)


class Bench:
    """A launcher, its rows, and what they must become: launches are remembered and worked off by the reference."""

    def __init__(self, experts, k, dtype=torch.float32, ids_dtype=torch.int32, *, scoring="softmax", layers=2, slots=0):
        self.layout, self.scoring, self.k = RowLayout(experts), scoring, k
        self.dtype, self.ids_dtype = dtype, ids_dtype
        self.rows = torch.zeros(layers, self.layout.width, dtype=torch.int64, device=DEVICE)
        self.tallies = Tallies.empty(slots, layers, experts, DEVICE) if slots else None
        self.launcher = Launcher(
            self.rows,
            logits_dtype=dtype,
            ids_dtype=ids_dtype,
            experts=experts,
            top_k=k,
            scoring=scoring,
            tallies=self.tallies,
        )
        self.passes = []

    def decisions(self, rows, *, layers=None, make=ordinary, seed=0, spoil=False):
        layers = len(self.rows) if layers is None else layers
        logits = make(layers, rows, self.layout.experts, seed).to(self.dtype)
        return logits.to(DEVICE), choose(logits, self.k, self.ids_dtype, seed, spoil).to(DEVICE)

    def launch(self, logits, ids, n, *, start=0, expect=None, **options):
        """``expect``: tokens that must be counted, if not ``n``."""
        table = table_of(zip(logits, ids, strict=True)).to(DEVICE)
        self.launcher.launch(table, n, row_start=start, **options)
        if REAL_GPU:
            torch.cuda.synchronize()
        expect = n if expect is None else expect
        row_of = options.get("row_of")
        places = list(range(len(logits))) if row_of is None else row_of.tolist()
        if expect > 0:
            span = slice(start, start + expect)
            self.passes.append((places, logits[:, span].cpu(), ids[:, span].cpu()))

    def check(self):
        got = self.rows.cpu()
        want = torch.zeros_like(got)
        for places, logits, ids in self.passes:
            want[places] += accumulate(logits, ids, self.scoring, self.layout)
        exact = ("experts", "per_token", "active", "tokens", "passes", "nonfinite", "per_token_sum", "active_sum")
        for name in exact:
            span = self.layout.offsets[name]
            assert torch.equal(got[:, span], want[:, span]), name
        for place in range(len(got)):
            parts = [
                row_stats(logits[[places.index(place)]], ids[[places.index(place)]], self.scoring)
                for places, logits, ids in self.passes
                if place in places
            ]
            for name in SUMS:
                values = [getattr(p, name)[p.finite].numpy() for p in parts]
                self.check_ratio(place, name, np.concatenate(values) if values else np.zeros(0))

    def check_ratio(self, place, name, values):
        """One layer's histogram and sum against the ratios of its finite tokens."""
        row = self.rows[place].cpu().numpy()
        histogram = row[self.layout.offsets[name]]
        assert histogram.sum() == len(values), name
        for position, edge in enumerate(edges(name)):
            above = histogram[position + 1 :].sum()
            surely, perhaps = (values > edge + NEAR).sum(), (values > edge - NEAR).sum()
            assert surely <= above <= perhaps, (name, edge, surely, above, perhaps)
        total = np.floor(values.astype(np.float64) * FIXED_POINT + 0.5).sum()
        assert abs(int(row[self.layout.at(SUMS[name])]) - total) <= 2 * len(values), name


B16, F16, F32, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64


@kernel
@pytest.mark.parametrize("make", [ordinary, adversarial])
@pytest.mark.parametrize(
    ("experts", "k", "dtype", "ids_dtype", "scoring", "n"),
    [
        (64, 8, B16, I32, "softmax", 61),
        (64, 8, F32, I64, "sigmoid", 37),
        (1, 1, F32, I64, "softmax", 33),
        (1, 2, F32, I32, "sigmoid", 5),
        (8, 2, F16, I32, "softmax", 64),
        (8, 16, F32, I32, "softmax", 1),  # more choices than experts: all but 8 are duplicates
        (60, 4, B16, I64, "softmax", 40),
        (160, 6, F32, I32, "softmax", 29),
        (256, 8, B16, I32, "sigmoid", 28),
        (512, 16, F32, I64, "softmax", 15),
    ],
)
def test_rows_are_the_references(experts, k, dtype, ids_dtype, scoring, n, make):
    bench = Bench(experts, k, dtype, ids_dtype, scoring=scoring)
    logits, ids = bench.decisions(n + 5, make=make, seed=experts + n, spoil=make is adversarial)
    bench.launch(logits, ids, n, start=3)
    bench.check()


@kernel
@pytest.mark.parametrize(
    ("experts", "k", "dtype", "scoring"), [(64, 8, B16, "softmax"), (60, 6, F32, "sigmoid"), (256, 8, F32, "softmax")]
)
def test_rows_are_an_oracles(experts, k, dtype, scoring):
    """Entropy, top-1 and mass from their definitions, token by token in float64."""
    bench = Bench(experts, k, dtype, scoring=scoring)
    logits, ids = bench.decisions(40, seed=experts)
    logits[0, 3, 1], logits[1, 5, 2], logits[1, 6] = math.nan, math.inf, -math.inf
    bench.launch(logits, ids, 40)
    for layer in range(2):
        entropy, top1, mass, bad = [], [], [], 0
        for x, chosen in zip(logits[layer].double().cpu().numpy(), ids[layer].cpu().numpy(), strict=True):
            if np.isnan(x).any() or np.isposinf(x).any() or np.isneginf(x).all():
                bad += 1
                continue
            score = np.exp(x - x.max()) if scoring == "softmax" else 1 / (1 + np.exp(-x))
            p = score / score.sum()
            entropy.append(-sum(q * math.log(q) for q in p if q > 0) / math.log(experts))
            top1.append(p.max())
            mass.append(sum(p[i] for i in chosen))
        assert bench.rows[layer, bench.layout.at("nonfinite")] == bad
        for name, values in {"entropy": entropy, "top1": top1, "mass": mass}.items():
            bench.check_ratio(layer, name, np.minimum(values, 1.0))


@kernel
def test_ties_fall_where_the_reference_puts_them():
    """1/n is exactly an edge in float32 for some n: there top-1 must not move at all."""
    bench = Bench(64, 1, layers=1)
    logits = torch.full((1, 64, 64), -math.inf)
    for row in range(64):
        logits[0, row, : row + 1] = 1.25
    bench.launch(logits.to(DEVICE), torch.zeros(1, 64, 1, dtype=I32, device=DEVICE), 64)
    bench.check()
    want = accumulate(logits, torch.zeros(1, 64, 1, dtype=I32), "softmax", bench.layout)
    for name in ("top1", "mass"):
        span = bench.layout.offsets[name]
        assert torch.equal(bench.rows.cpu()[:, span], want[:, span])


@kernel
def test_no_tokens_change_nothing():
    bench = Bench(8, 2, slots=2)
    bench.launcher.warm_up()
    logits, ids = bench.decisions(6)
    slots = torch.zeros(6, dtype=I32, device=DEVICE)
    for n in (0, -1):
        bench.launch(logits, ids, n, slot_of_row=slots)
        count = torch.tensor([n, 1], dtype=I32, device=DEVICE)
        bench.launch(logits, ids, 6, n_valid_device=count, expect=0, slot_of_row=slots)
    assert not bench.rows.any()
    fresh = Tallies.empty(2, 2, 8, DEVICE)
    assert torch.equal(bench.tallies.counts, fresh.counts)
    assert torch.equal(bench.tallies.stats, fresh.stats)


@kernel
def test_the_device_may_say_how_many():
    bench = Bench(64, 8, B16)
    logits, ids = bench.decisions(50)
    count = torch.zeros(2, dtype=I32, device=DEVICE)
    for n, expect in ((1, 1), (0, 0), (33, 33), (48, 48), (60, 48)):  # no more than there can be
        count[0] = n
        bench.launch(logits, ids, 48, start=2, n_valid_device=count, expect=expect)
    bench.check()


@kernel
def test_launches_add_up_over_subsets_of_layers():
    bench = Bench(60, 4, F32, layers=4)
    for seed, (n, start, places) in enumerate([(7, 0, [2]), (19, 4, [3, 0, 2]), (1, 22, None), (23, 0, [1, 3])]):
        logits, ids = bench.decisions(23, layers=len(places or range(4)), make=adversarial, seed=seed, spoil=True)
        row_of = None if places is None else torch.tensor(places, dtype=I32, device=DEVICE)
        bench.launch(logits, ids, n, start=start, row_of=row_of)
    bench.check()


@kernel
@pytest.mark.parametrize(("offset", "stride"), [(0, 72), (1, 64), (0, 65), (8, 80)])
def test_rows_may_lie_apart_and_anywhere(offset, stride):
    """Addresses that 16-byte loads cannot read, and ones that they can."""
    bench = Bench(64, 6, B16, layers=1)
    logits, ids = bench.decisions(20)
    apart = torch.full((21 * stride,), math.nan, dtype=B16, device=DEVICE)[offset:]
    apart = apart.as_strided((1, 20, 64), (0, stride, 1), offset)
    apart.copy_(logits)
    ids_apart = torch.full((1, 20, 9), 5, dtype=I32, device=DEVICE)
    ids_apart[..., :6] = ids
    bench.launch(apart, ids_apart[..., :6], 20, strides=(stride, 9))
    bench.check()


@kernel
@pytest.mark.parametrize(("experts", "k", "programs"), [(8, 2, 4), (64, 8, 1)])
def test_long_steps_share_out_their_tokens(monkeypatch, experts, k, programs):
    """More blocks than programs, and more ids than part 0 takes at a time."""
    monkeypatch.setattr(Launcher, "programs", programs)
    monkeypatch.setattr(kernels, "_CHUNK", 256)
    bench = Bench(experts, k, F32)
    logits, ids = bench.decisions(333, make=adversarial, spoil=True)
    assert bench.launcher.parts(2, 333) == 1 + max(1, programs // 2)
    bench.launch(logits, ids, 333)
    bench.launch(logits, ids, 65, start=200)
    bench.check()


def test_a_program_takes_no_more_tokens_than_its_sums_hold():
    if kernels.triton is None:
        pytest.skip("Triton is not installed")
    rows = torch.zeros(64, RowLayout(512).width, dtype=torch.int64)
    launcher = Launcher(rows, logits_dtype=F32, ids_dtype=I32, experts=512, top_k=8, scoring="softmax")
    for tokens in (1, 2, 255, 8192, 100_000, 1_000_000):
        parts = launcher.parts(64, tokens) - 1
        block = launcher._block
        assert 1 <= parts <= -(-tokens // block)
        assert -(-tokens // (parts * block)) * block * FIXED_POINT < 2**31


@kernel
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_requests_are_tallied(scoring):
    bench = Bench(64, 4, B16, scoring=scoring, layers=3, slots=5)
    want = Tallies.empty(5, 3, 64, "cpu")
    # a long prefill of slot 3 over whole blocks, decodes of several slots, untraced tokens, slots that are not there
    code = torch.cat([torch.full((36,), 6), torch.tensor([1, 3, -1, 9, 1, 2, -1, 10, 99]), torch.full((20,), -1)]).int()
    for seed, places in enumerate([None, [2, 0]]):
        logits, ids = bench.decisions(65, layers=len(places or range(3)), make=adversarial, seed=seed, spoil=True)
        row_of = None if places is None else torch.tensor(places, dtype=I32, device=DEVICE)
        for start, n in ((0, 65), (34, 9)):
            bench.launch(logits, ids, n, start=start, row_of=row_of, slot_of_row=code.to(DEVICE))
            span = slice(start, start + n)
            tally_reference(logits[:, span].cpu(), ids[:, span].cpu(), scoring, code[span], want, places)
    bench.check()  # tracing leaves the rows alone
    got = Tallies(*(t.cpu() for t in bench.tallies))
    assert torch.equal(got.counts, want.counts)
    tokens = want.stats[..., :2].sum(-1)
    assert tokens.sum() > 0
    for at, name in enumerate(TALLY_COLUMNS):
        off = (got.stats[..., at] - want.stats[..., at]).abs()
        if name in SUMS.values():
            assert (off <= 2 * tokens).all(), name
        else:
            assert (off <= (2 if name == "entropy_min" else 0)).all(), name


def test_tally_reference_counts_token_by_token():
    logits = adversarial(2, 30, 8, 1)
    ids = choose(logits, 2, I64, 1, spoil=True)
    code = torch.randint(-1, 8, (30,), generator=torch.Generator().manual_seed(2), dtype=I32)
    got = Tallies.empty(3, 4, 8, "cpu")  # codes 6 and 7 have no slot
    tally_reference(logits, ids, "softmax", code, got, [3, 1])
    counts, stats = np.zeros((3, 4, 2, 8), int), np.zeros((3, 4, 8), int)
    stats[..., 3] = NO_ENTROPY
    for layer, place in enumerate([3, 1]):
        for token, which in enumerate(code.tolist()):
            if not 0 <= which < 6:
                continue
            slot, phase = divmod(which, 2)
            for expert in ids[layer, token].tolist():
                if 0 <= expert < 8:
                    counts[slot, place, phase, expert] += 1
            row = stats[slot, place]
            row[phase] += 1
            seen = row_stats(
                logits[layer : layer + 1, token : token + 1], ids[layer : layer + 1, token : token + 1], "softmax"
            )
            if not seen.finite.item():
                row[6] += 1
                continue
            entropy, top1, mass = (
                math.floor(v.item() * FIXED_POINT + 0.5) for v in (seen.entropy, seen.top1, seen.mass)
            )
            row[[2, 4, 5]] += entropy, top1, mass
            row[3] = min(row[3], entropy)
    assert np.array_equal(got.counts.numpy(), counts)
    assert np.array_equal(got.stats.numpy(), stats)


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.zeros(2, 5, dtype=torch.int64)}, "expected contiguous"),
        ({"logits_dtype": torch.float64}, "cannot meter"),
        ({"logits_dtype": I32}, "cannot meter"),
        ({"ids_dtype": torch.int16}, "cannot meter"),
        ({"top_k": 17}, "cannot meter"),
        ({"experts": 513}, "cannot meter"),
        ({"scoring": "tanh"}, "cannot meter"),
        ({"tallies": Tallies.empty(1, 3, 8, "cpu")}, "expected contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    rows = torch.zeros(2, RowLayout(8).width, dtype=torch.int64)
    given = {
        "rows": rows,
        "logits_dtype": F32,
        "ids_dtype": I32,
        "experts": 8,
        "top_k": 2,
        "scoring": "softmax",
    } | change
    with pytest.raises(ValueError, match=message):
        Launcher(given.pop("rows"), **given)


@pytest.mark.parametrize(("scoring", "ids_dtype", "traced"), [("softmax", I32, True), ("sigmoid", I64, False)])
def test_what_is_compiled_beforehand_is_what_is_launched(monkeypatch, scoring, ids_dtype, traced):
    """Triton finds it again by the arguments' types and the constants."""

    class Recorder:
        def __init__(self):
            self.compiled, self.launched = [], []

        def warmup(self, *arguments, grid, **options):
            self.compiled.append((arguments, options))

        def __getitem__(self, grid):
            return lambda *arguments, **options: self.launched.append((arguments, options))

    monkeypatch.setattr(kernels, "_meter_kernel", recorder := Recorder())
    shape = {"logits_dtype": B16, "ids_dtype": ids_dtype, "experts": 60, "top_k": 6, "scoring": scoring}
    rows = torch.zeros(5, RowLayout(60).width, dtype=torch.int64)
    tallies = Tallies.empty(3, 5, 60, "cpu") if traced else None
    Launcher(rows, tallies=tallies, **shape).warm_up()
    kernels.compile_kernel(traced=traced, **shape)
    assert len(recorder.compiled) == len(recorder.launched) == 2

    def kind(argument):  # of tensors their type, of numbers that are not compiled in nothing but that
        return argument.dtype if isinstance(argument, torch.Tensor) else argument

    pointers, numbers = 9, 6
    for (ahead, with_options), (later, options) in zip(recorder.compiled, recorder.launched, strict=True):
        assert list(ahead[:pointers]) == [kind(argument) for argument in later[:pointers]]
        assert {type(n) for n in ahead[pointers : pointers + numbers] + later[pointers : pointers + numbers]} == {int}
        assert ahead[pointers + numbers :] == later[pointers + numbers :]
        assert with_options == options


@kernel
@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
def test_inside_a_cuda_graph():
    bench = Bench(64, 8, B16, layers=16, slots=4)
    bench.launcher.warm_up()
    logits, ids = bench.decisions(256)
    table = table_of(zip(logits, ids, strict=True)).to(DEVICE)
    count = torch.zeros(2, dtype=I32, device=DEVICE)
    slots = torch.full((256,), -1, dtype=I32, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bench.launcher.launch(table, 256, n_valid_device=count, slot_of_row=slots)
    assert not bench.rows.any()
    for n in (256, 0, 1, 100):
        count[0] = n
        graph.replay()
        if n:
            bench.passes.append((list(range(16)), logits[:, :n].cpu(), ids[:, :n].cpu()))
    torch.cuda.synchronize()
    bench.check()


@kernel
@pytest.mark.skipif(INTERPRETED, reason="takes minutes in the interpreter")
@pytest.mark.parametrize(("experts", "layers", "tokens"), [(64, 16, 8192), (64, 16, 20_001), (256, 58, 4096)])
def test_prefills(experts, layers, tokens):
    bench = Bench(experts, 8, B16, layers=layers, slots=2)
    logits, ids = bench.decisions(tokens)
    slots = torch.zeros(tokens, dtype=I32, device=DEVICE)
    bench.launch(logits, ids, tokens, slot_of_row=slots)
    bench.check()
    assert (bench.tallies.stats[0, :, 0] == tokens).all()
