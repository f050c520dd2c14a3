"""Time stamps in a copy of a captured CUDA graph; the real ones need a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from moe_monitor.capture.driver import Driver, DriverError
from moe_monitor.capture.stamps import Marks, Stamper, Twin

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_a_machine_without_cuda_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(DriverError, match=r"no CUDA driver: libcuda\.so\.1"):
        Driver()


def test_an_old_driver_is_named_with_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with pytest.raises(DriverError, match="has no cuGetErrorName; driver 550 or newer"):
        Driver()


@on_gpu
def test_a_twin_computes_the_same_and_times_what_lies_between_its_marks() -> None:
    driver = Driver()
    slots = torch.zeros(5, dtype=torch.int64, device="cuda")
    stamper = Stamper(driver, slots.data_ptr())
    x = torch.randn(2048, 2048, device="cuda")
    y = x @ x  # cuBLAS is set up outside the capture
    torch.cuda.synchronize()
    graph, marks = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        y = x * 2
        for slot, products in ((1, 1), (2, 40)):
            state = driver.capture_state(stream)
            marks = marks or Marks(state.graph)
            marks.note(driver, slot, state.tail)
            for _ in range(products):
                y = (x @ y).tanh()
        state = driver.capture_state(stream)
        marks.note(driver, 3, state.tail)
        y = y + 1
        twin = Twin(stamper, state.graph, marks.marks)
    twin.prepare((4, 0))
    twin.instantiate()
    graph.replay()
    torch.cuda.synchronize()
    expected = y.clone()
    assert not slots.any(), "the ordinary graph must not have changed"
    y.zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    twin.launch(torch.cuda.current_stream().cuda_stream)
    y.zero_()
    begin.record()
    twin.launch(torch.cuda.current_stream().cuda_stream)
    end.record()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
    start, first, second, last, before = slots.tolist()
    assert before < start < first < second < last
    assert (last - second) > 10 * (second - first)
    whole = begin.elapsed_time(end) * 1e6  # an oracle that is not ours: events around the launch
    assert 0.8 * whole < last - start <= whole + 5_000
    twin.close()
    twin.close()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
