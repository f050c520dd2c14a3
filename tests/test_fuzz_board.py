"""Hostile boards: a clear refusal in bounded time and memory, never a crash, never a number that was not written."""

import json
import os
import resource
import time
import zlib

import numpy as np
import pytest
from boards import FakeWorker, identity
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_monitor.board import BoardError, BoardReader, BoardWriter
from moe_monitor.board.form import HEADER, MAGIC, PREAMBLE, VERSION
from moe_monitor.export.collector import MoeCollector
from moe_monitor.layout import RowLayout
from moe_monitor.records import INDEX, META_BYTES, Meta, RecordReader, record_segments, short_id
from moe_monitor.snapshot import STATUS_BYTES, STATUS_SEGMENT, Status, read_engines, routing_segment

quick = settings(max_examples=200, deadline=20_000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    path.chmod(0o700)
    return path


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The bytes of a small board, and what it says."""
    directory = tmp_path_factory.mktemp("honest") / "run"
    with FakeWorker(directory, layers=(0, 1), experts=4, top_k=2) as worker:
        worker.publish(passes=1)  # both slots of the counters are the same
        return worker.board.path.read_bytes(), worker.rows.copy(), worker.facts


def reads(path):
    """All that a board says, or the refusal."""
    try:
        with BoardReader(path) as reader:
            names = [
                f"{name}/{i}" if n else name
                for name in reader.segments
                for n in [reader.copies(name)]
                for i in range(min(n, 3) or 1)
            ]
            return {name: reader.read(name).arrays for name in names}
    except BoardError as refusal:
        error = str(refusal)
    assert str(path) in error
    assert "\n" not in error
    return None


def write(folder, content):
    path = folder / "fuzzed.board"
    path.write_bytes(content)
    return path


def preamble(text, length=None):
    return PREAMBLE.pack(MAGIC, VERSION, len(text) if length is None else length, zlib.crc32(text))


def board(description, *segments):
    """A board with any description; segments are given with their headers."""
    text = description if isinstance(description, bytes) else json.dumps(description).encode()
    start = preamble(text) + text
    return start.ljust(-(-len(start) // 64) * 64, b"\0") + b"".join(segments)


def segment(payload):
    """A segment that is whole: with the right CRC."""
    stamp = (1, time.time_ns(), time.monotonic_ns())
    crc = zlib.crc32(HEADER.pack(*stamp, 0) + payload)
    return HEADER.pack(*stamp, crc) + payload


@quick
@given(st.binary(max_size=400))
@example(b"")
@example(MAGIC)
@example(preamble(b""))
@example(preamble(b"", 2**32 - 1))
@example(preamble(b"[" * 5000) + b"[" * 5000)
@example(preamble(b"[]") + b"[]")
@example(preamble(b"\xff\xfe") + b"\xff\xfe")
def test_random_bytes_are_refused(folder, content):
    assert reads(write(folder, content)) is None


@quick
@given(data=st.data())
def test_a_truncated_board_is_refused(folder, honest, data):
    content, _, _ = honest
    # The last segment is padded to a multiple of 64 bytes, which nobody reads
    cut = data.draw(st.integers(0, len(content) - 64))
    assert reads(write(folder, content[:cut])) is None


@quick
@given(data=st.data())
def test_a_flipped_bit_never_changes_a_number(folder, honest, data):
    content, rows, facts = honest
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path = write(folder, flipped)
    found = reads(path)
    if found is not None:  # the flip lay in padding
        assert (found["routing"]["rows"] == rows).all()
        assert int(found["routing"]["passes"][0]) == 1
        with BoardReader(path) as reader:
            assert reader.identity == facts


dtypes = st.one_of(
    st.sampled_from(["<i8", "u1", "S0", "a", "S", "O", "U4", "V8", "i4,,", "(2,3)i4", "m8[s]", "f16", "\ud800", ">i8"]),
    st.text(alphabet="iufSOUVab?<>|=,()[]0123456789 ", max_size=12),
)
sizes = st.one_of(st.integers(-2, 300), st.sampled_from([2**30, 2**31, 2**63, 2**64, 10**30, True, 1.5, None, "8"]))
specs = st.fixed_dictionaries(
    {"at": sizes, "dtype": dtypes, "shape": st.one_of(st.lists(sizes, max_size=10), sizes)}, optional={"more": sizes}
)


@quick
@given(spec=specs, at=sizes, size=sizes)
@example(spec={"at": 0, "dtype": "S0", "shape": [5]}, at=0, size=64)
@example(spec={"at": 0, "dtype": "S0", "shape": [2**30] * 8}, at=0, size=64)
@example(spec={"at": 0, "dtype": "<i8", "shape": [0, 2**30, 2**30]}, at=0, size=64)
@example(spec={"at": 0, "dtype": "i4,,", "shape": [1]}, at=0, size=64)
@example(spec={"at": 2**30, "dtype": "u1", "shape": [0]}, at=0, size=64)
@example(spec={"at": 0, "dtype": "<i8", "shape": [8]}, at=2**30, size=64)
def test_absurd_arrays_are_refused_or_read(folder, spec, at, size):
    description = {"identity": {}, "segments": {"s": {"at": at, "bytes": size, "arrays": {"a": spec}}}}
    payload = bytes(range(64))
    found = reads(write(folder, board(description, segment(payload))))
    if found is not None:
        array = found["s"]["a"]
        assert array.tobytes() in payload
        assert list(array.shape) == spec["shape"]


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda children: st.one_of(
        st.lists(children, max_size=4), st.dictionaries(st.text(max_size=6), children, max_size=4)
    ),
    max_leaves=12,
)


@quick
@given(json_values, json_values)
@example({}, {})
@example([["a", 1]], {"s": {}})
@example({}, {"s": {"at": 0, "bytes": 0, "arrays": None}})
def test_any_description_is_refused_or_read(folder, facts, segments):
    reads(write(folder, board({"identity": facts, "segments": segments}, segment(b"\0" * 64))))


def test_a_shape_without_end_is_refused_at_once(folder):
    shape = [2**30] * 87_000  # just under the largest description
    spec = {"at": 0, "dtype": "<i8", "shape": shape}
    content = board({"identity": {}, "segments": {"s": {"at": 0, "bytes": 64, "arrays": {"a": spec}}}})
    started = time.perf_counter()
    assert reads(write(folder, content)) is None
    assert time.perf_counter() - started < 1


def test_a_sparse_file_of_a_gibibyte_costs_neither_time_nor_memory(tmp_path):
    description = {"identity": {}, "segments": {"s": {"at": 0, "bytes": 1 << 30, "arrays": {}}}}
    path = tmp_path / "sparse.board"
    path.write_bytes(board(description))
    os.truncate(path, (1 << 30) + 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    assert reads(path) is None
    assert time.perf_counter() - started < 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < 400  # MiB


# the status


@quick
@given(st.one_of(st.binary(max_size=200), json_values.map(lambda v: json.dumps(v).encode())))
@example(b"[" * STATUS_BYTES)
@example(b'{"active":1,"reason":"","capture":"","errors":[],"dropped":{},"hook_seconds":0}')
@example(b'{"active":1,"reason":"","capture":"","errors":{"a":Infinity},"dropped":{},"hook_seconds":0}')
@example(b'{"active":1,"reason":"","capture":"","errors":{"a":-1},"dropped":{},"hook_seconds":0}')
@example(b'{"active":1,"reason":"","capture":"","errors":{"a":' + b"9" * 400 + b'},"dropped":{},"hook_seconds":0}')
@example(b'{"active":1,"reason":"","capture":"","errors":{},"dropped":{},"hook_seconds":NaN}')
@example(b'{"active":1,"reason":"","capture":"","errors":{},"dropped":{},"hook_seconds":' + b"1" * 400 + b"}")
def test_a_damaged_status_is_a_value_error(content):
    array = np.frombuffer(content[:STATUS_BYTES].ljust(STATUS_BYTES, b"\0"), dtype=np.uint8)
    try:
        status = Status.from_array(array)
    except ValueError:
        return
    assert all(0 <= n < 2**63 for n in (*status.errors.values(), *status.dropped.values()))
    assert 0 <= status.hook_seconds < float("inf")


@quick
@given(
    st.text(max_size=5000), st.dictionaries(st.text(max_size=10), st.integers(0, 2**62), max_size=5), st.floats(0, 1e9)
)
def test_a_status_comes_back(reason, errors, seconds):
    sent = Status(active=True, reason=reason, capture="op", errors=errors, hook_seconds=seconds)
    got = Status.from_array(sent.to_array())
    assert reason.startswith(got.reason)
    assert (got.errors, got.hook_seconds, got.active) == (errors, seconds, True)


@quick
@given(
    st.text(st.characters(exclude_categories=()), max_size=300),
    st.dictionaries(st.text(st.characters(exclude_categories=()), max_size=30), st.integers(0, 2**50), max_size=300),
)
@example("op", {"x" * 10_000: 3})
@example("\U0001f999" * 9000, {chr(i) * 20: 2**50 for i in range(300)})
@example("op", {"\U0001f999" * 5000 + str(i): 1 for i in range(50)})
def test_a_status_with_absurd_names_is_cut_and_still_adds_up(capture, counts):
    """A status that is cut in the middle of its JSON makes the whole board unreadable."""
    sent = Status(active=True, reason="because", capture=capture, errors=counts, dropped=counts)
    got = Status.from_array(sent.to_array())
    assert sum(got.errors.values()) == sum(got.dropped.values()) == sum(counts.values())
    assert capture.startswith(got.capture)


# traced requests


@quick
@given(st.text(st.characters(exclude_categories=()), max_size=300))
@example("\0" * 100_000)
@example("\U0001f999" * 100_000)
@example("\ud800" * 300)
@example("../../etc/passwd")
@example('"}\n')
def test_any_request_id_fits_its_record(request_id):
    sent = Meta(short_id(request_id), 1, 2, 3, 4.0, 5.0)
    array = sent.to_array(6)
    assert array.shape == (META_BYTES,)
    got = Meta.from_array(array)
    assert (got.serial, got.finished) == (6, 5.0)
    assert got.id == sent.id.encode("utf-8", "replace").decode()


@pytest.mark.parametrize(("serial", "n"), [(2**62, 2**62), (5, 0), (5, -1), (-5, 16), (2**62, 16), (5, 17)])
def test_an_index_without_end_is_refused(tmp_path, serial, n):
    directory = tmp_path / "run"
    segments = {"status": STATUS_SEGMENT} | record_segments(1, 4)
    writer = BoardWriter(directory, "rank-0", identity(layers=(0,), experts=4, top_k=2), segments)
    writer.write(INDEX, {"serial": np.array([serial]), "n": np.array([n])})
    reader = RecordReader(directory)
    started = time.perf_counter()
    assert reader.poll() == []
    assert time.perf_counter() - started < 2
    reader.close()
    writer.close()


# one bad board does not hide the others


BAD_FACTS = [
    {"layers": [float("inf")]},
    {"layers": ["x"]},
    {"layers": 7},
    {"layers": [0, 1]},
    {"experts": float("inf")},
    {"experts": 10**9},
    {"experts": 0},
    {"top_k": "many"},
    {"top_k": 10**400},
    {"hidden_size": 10**400},
    {"hidden_size": -1},
    {"ep": {"rank": 1}},
]


@pytest.mark.parametrize("bad", BAD_FACTS, ids=lambda bad: str(bad)[:40])
@pytest.mark.parametrize("openmetrics", [False, True])
def test_a_bad_identity_leaves_the_others_shown(tmp_path, bad, openmetrics):
    directory = tmp_path / "run"
    facts = identity(layers=(0,), experts=4, top_k=2, server="bad", model_name="bad")
    segments = {"status": STATUS_SEGMENT, "routing": routing_segment(1, RowLayout(4).width)}
    with FakeWorker(directory, "good", layers=(0,), experts=4, top_k=2, tokens=77):
        writer = BoardWriter(directory, "bad", facts | bad, segments)
        writer.write("status", {"json": Status(active=True).to_array()})
        text = MoeCollector(directory).render(openmetrics=openmetrics).decode()
        writer.close()
    assert 'moe_routed_tokens_total{server="server-1",model_name="tiny-olmoe",engine="0",layer="0"} 77' in text


@pytest.mark.parametrize("status", [b"[" * STATUS_BYTES, b"{}", b'{"errors":{"a":' + b"9" * 400 + b"}}"])
def test_a_bad_status_leaves_the_others_shown(tmp_path, status):
    directory = tmp_path / "run"
    with FakeWorker(directory, "good", tokens=77), FakeWorker(directory, "bad", server="bad") as bad:
        bad.board.write("status", {"json": np.frombuffer(status.ljust(STATUS_BYTES, b"\0"), dtype=np.uint8)})
        told = []
        engines = read_engines(directory, on_error=told.append)
    assert [e.server for e in engines] == ["server-1"]
    assert len(told) == 1


def test_counters_of_another_type_are_refused(tmp_path):
    """Floats would be cast to integers, NaN among them to anything."""
    facts, width = identity(layers=(0,), experts=4, top_k=2), RowLayout(4).width
    segments = {"status": STATUS_SEGMENT, "routing": {"rows": ("<f8", (1, width)), "passes": ("<i8", (1,))}}
    writer = BoardWriter(tmp_path / "run", "rank-0", facts, segments)
    writer.write("status", {"json": Status(active=True).to_array()})
    writer.write("routing", {"rows": np.full((1, width), np.nan)})
    assert read_engines(tmp_path / "run") == []
    writer.close()
