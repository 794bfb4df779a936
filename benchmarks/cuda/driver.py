"""As much of the CUDA driver API as running kernels takes, by ctypes: only the driver need be installed."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_ulonglong, c_void_p
from pathlib import Path

import torch

from hikui.backends.kernels.cuda.launch import Launch
from hikui.lowering.errors import HikuiError

_L2_CACHE_SIZE = 38
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
# Such a stream waits for copies from host memory, which may still be under way when their call returns.
_ORDERED_WITH_COPIES = 0
_CAPTURE_THREAD_LOCAL = 1


class Memory:
    """Bytes on the device, with the shape of the tensor that they came from."""

    def __init__(self, address: int, tensor: torch.Tensor) -> None:
        self.address, self.tensor = address, tensor

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


class Device:
    """The first GPU, with a module of kernels and one stream.

    Args:
        library: the driver's library.

    Raises:
        HikuiError: there is no driver or no GPU.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise HikuiError(f"No CUDA driver is here ({library} cannot be loaded).") from error
        self._modules: list[c_void_p] = []
        self._functions: dict[str, c_void_p] = {}
        count = c_int()
        if self._cuda.cuInit(c_uint(0)) or self._cuda.cuDeviceGetCount(byref(count)) or not count.value:
            raise HikuiError("The CUDA driver finds no GPU.")
        self._device, context, self.stream = c_int(), c_void_p(), c_void_p()
        self._call("cuDeviceGet", byref(self._device), c_int(0))
        self._call("cuDevicePrimaryCtxRetain", byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", byref(self.stream), c_uint(_ORDERED_WITH_COPIES))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            text = c_char_p()
            self._cuda.cuGetErrorString(c_int(status), byref(text))
            raise HikuiError(f"{name} fails: {(text.value or b'unknown error').decode()}.")

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), c_int(number), self._device)
        return value.value

    @property
    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, c_int(256), self._device)
        return text.value.decode()

    @property
    def capability(self) -> str:
        """For example `90`."""
        return f"{self._attribute(_CAPABILITY_MAJOR)}{self._attribute(_CAPABILITY_MINOR)}"

    @property
    def cache_size(self) -> int:
        """Bytes of the L2 cache."""
        return self._attribute(_L2_CACHE_SIZE)

    def load(self, fatbin: Path) -> None:
        """Loads a fatbin's kernels for this GPU."""
        module = c_void_p()
        self._call("cuModuleLoadData", byref(module), c_char_p(fatbin.read_bytes()))
        self._modules.append(module)

    def upload(self, tensor: torch.Tensor) -> Memory:
        """A copy of a tensor on the device."""
        tensor = tensor.contiguous()
        address = c_uint64()
        memory = Memory(0, tensor)
        self._call("cuMemAlloc_v2", byref(address), c_size_t(max(memory.nbytes, 1)))
        memory.address = address.value
        if memory.nbytes:
            self._call("cuMemcpyHtoD_v2", address, c_void_p(tensor.data_ptr()), c_size_t(memory.nbytes))
        return memory

    def download(self, memory: Memory) -> torch.Tensor:
        """What is in memory now; waits for everything before it."""
        self.synchronize()
        out = torch.empty_like(memory.tensor)
        if memory.nbytes:
            self._call("cuMemcpyDtoH_v2", c_void_p(out.data_ptr()), c_uint64(memory.address), c_size_t(memory.nbytes))
        return out

    def free(self, *memories: Memory) -> None:
        self.synchronize()
        for memory in memories:
            self._call("cuMemFree_v2", c_uint64(memory.address))

    def copy(self, target: Memory, source: Memory) -> None:
        """Copies within the device, on the stream."""
        addresses = c_uint64(target.address), c_uint64(source.address)
        self._call("cuMemcpyDtoDAsync_v2", *addresses, c_size_t(source.nbytes), self.stream)

    def start(self, launch: Launch, memories: list[Memory]) -> None:
        """Starts a kernel on the stream; `memories` stand for its tensors, in order."""
        addresses = iter(memories)
        values = [
            c_uint64(next(addresses).address) if isinstance(argument, torch.Tensor) else c_int(argument)
            for argument in launch.arguments
        ]
        pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = [c_uint(size) for size in (*launch.grid, 1, *launch.threads, 1)]
        self._call("cuLaunchKernel", self._function(launch.symbol), *sizes, c_uint(0), self.stream, pointers, None)

    def _function(self, symbol: str) -> c_void_p:
        if symbol not in self._functions:
            function = c_void_p()
            self._call("cuModuleGetFunction", byref(function), self._modules[-1], c_char_p(symbol.encode()))
            self._functions[symbol] = function
        return self._functions[symbol]

    def synchronize(self) -> None:
        self._call("cuStreamSynchronize", self.stream)

    @contextmanager
    def graph(self, work: Callable[[], None]) -> Iterator[Callable[[], float]]:
        """Records what `work` puts on the stream; gives a function that runs it once and returns its seconds."""
        graph, runnable, start, stop = c_void_p(), c_void_p(), c_void_p(), c_void_p()
        self.synchronize()
        self._call("cuStreamBeginCapture_v2", self.stream, c_int(_CAPTURE_THREAD_LOCAL))
        try:
            work()
        finally:
            self._call("cuStreamEndCapture", self.stream, byref(graph))
        self._call("cuGraphInstantiateWithFlags", byref(runnable), graph, c_ulonglong(0))
        for event in (start, stop):
            self._call("cuEventCreate", byref(event), c_uint(0))

        def seconds() -> float:
            milliseconds = c_float()
            self._call("cuEventRecord", start, self.stream)
            self._call("cuGraphLaunch", runnable, self.stream)
            self._call("cuEventRecord", stop, self.stream)
            self._call("cuEventSynchronize", stop)
            self._call("cuEventElapsedTime", byref(milliseconds), start, stop)
            return milliseconds.value / 1000

        try:
            yield seconds
        finally:
            for event in (start, stop):
                self._call("cuEventDestroy_v2", event)
            self._call("cuGraphExecDestroy", runnable)
            self._call("cuGraphDestroy", graph)
