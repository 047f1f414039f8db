"""A stand-in for what clocks use of ``torch.cuda``: so their lines run without a GPU.

Tensors that would lie on "cuda" lie on the CPU. A graph remembers how many calls it holds by what
its test tells it, and its replay makes the clock of events jump. Waiting for the device raises
where torch was told so, and while a graph is captured, as on a GPU.
"""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

REPLAY = 1e-3  # seconds of a replay
CACHE = 50 * 2**20


class Device:
    """The state of the card."""

    def __init__(self) -> None:
        self.shift, self.mode, self.capturing, self.replays = 0.0, 0, False, 0
        self.broken = ""  # raised by the next capture
        self.stream = self.first = Stream(self)

    def now(self) -> float:
        return time.perf_counter() + self.shift

    def wait(self, *_) -> None:
        if self.mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")


class Stream:
    def __init__(self, device: Device) -> None:
        self.device = device

    def wait_stream(self, other) -> None:
        assert isinstance(other, Stream)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self, stream=None) -> None:
        self.at = self.device.now()

    def synchronize(self) -> None:
        self.device.wait()

    def elapsed_time(self, other) -> float:
        return 1e3 * (other.at - self.at)


class Graph:
    def __init__(self, device: Device) -> None:
        self.device, self.captured = device, False

    def replay(self) -> None:
        assert self.captured, "replayed before it was captured"
        self.device.replays += 1
        self.device.shift += REPLAY


class Capture:
    """As torch's: where the capture fails, so does its end, and the stream stays the capture's."""

    def __init__(self, device: Device, graph: Graph, stream: Stream) -> None:
        self.device, self.graph, self.stream = device, graph, stream

    def __enter__(self) -> None:
        self.device.wait()
        self.before, self.device.stream = self.device.stream, self.stream
        self.device.capturing = True

    def __exit__(self, kind, error, trace) -> None:
        self.device.capturing = False
        if error is not None or self.device.broken:
            text, self.device.broken = self.device.broken, ""
            raise RuntimeError(f"CUDA error: the capture is invalid{text}") from None
        self.graph.captured = True
        self.device.stream = self.before


class OnCpu(TorchFunctionMode):
    """Tensors of "cuda" on the CPU; what reads the contents of one waits for the device."""

    READS = (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "nonzero",
        "cpu",
        "masked_select",
    )

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        lengths = name == "repeat_interleave" and "output_size" not in kwargs
        if name in self.READS or (lengths and any(map(torch.is_tensor, args[1:]))):
            self.device.wait()
        if "device" in kwargs:
            kwargs = kwargs | {"device": _host(kwargs["device"])}
        if name == "to":
            args = tuple(map(_host, args))
        return function(*args, **kwargs)


def _host(x):
    cuda = isinstance(x, (str, torch.device)) and str(x).startswith("cuda")
    return torch.device("cpu") if cuda else x


@contextlib.contextmanager
def installed(monkeypatch):
    device, generator = Device(), torch.Generator

    @contextlib.contextmanager
    def on(stream):
        before, device.stream = device.stream, stream
        yield
        device.stream = before

    fakes = {
        "Stream": lambda: Stream(device),
        "Event": lambda enable_timing=False: Event(device),
        "CUDAGraph": lambda: Graph(device),
        "graph": lambda graph, stream=None: Capture(device, graph, stream),
        "stream": on,
        "current_stream": lambda *_: device.stream,
        "set_stream": lambda stream: setattr(device, "stream", stream),
        "synchronize": device.wait,
        "get_sync_debug_mode": lambda: device.mode,
        "set_sync_debug_mode": lambda mode: setattr(
            device, "mode", {"error": 2, "warn": 1, "default": 0}.get(mode, mode)
        ),
        "current_device": lambda: 0,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=CACHE),
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "fake",
        "mem_get_info": lambda *_: (70 * 2**30, 80 * 2**30),
        "empty_cache": lambda: None,
        "is_available": lambda: True,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 5000,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator(_host(device)))
    with OnCpu(device):
        yield device
