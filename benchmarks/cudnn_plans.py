"""Asks cuDNN which plans it proposes for a convolution, as PyTorch asks it, without running one.

cuDNN's graph API by ctypes (the numbers are those of ``cudnn_graph_v9.h``, the order of the questions that of
aten/src/ATen/native/cudnn/Conv_v8.cpp). Needs a CUDA GPU and torch, whose cuDNN it takes.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
from collections.abc import Iterator, Sequence
from ctypes import byref, c_bool, c_char, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

HANDLE, DATA_TYPE, BOOLEAN, INT64, FLOAT, DOUBLE = 0, 1, 2, 3, 4, 5  # cudnnBackendAttributeType_t
CONVOLUTION_MODE, HEUR_MODE, NUMERICAL_NOTE, DESCRIPTOR, CHAR = 7, 8, 11, 15, 24
# cudnnBackendDescriptorType_t
CONVOLUTION, ENGINE, ENGINECFG, ENGINEHEUR, EXECUTION_PLAN, OPERATIONGRAPH, TENSOR = 1, 2, 3, 4, 5, 15, 17
DEVICEPROP = 38
# Of each operation: its descriptor, then the attributes alpha, beta, convolution, weights, input, output.
OPERATIONS = {
    "forward": (10, 700, 701, 702, 703, 704, 705),
    "dgrad": (12, 706, 707, 708, 709, 710, 711),
    "wgrad": (11, 712, 713, 714, 715, 716, 717),
}
DATA_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 9}
ALIGNMENT = 32  # the most that PyTorch states; the allocator's blocks have it
INSTANT, FALLBACK = 0, 2  # heuristic modes, in the order in which PyTorch asks for them
DOWN_CONVERT_INPUTS = 1  # a numerical note: PyTorch leaves out engines that carry it


class CudnnError(Exception):
    """A status other than success."""


class Cudnn:
    """cuDNN as torch has loaded it into this process, with a handle on the current device.

    Or, given a GPU's ``properties`` as cuDNN writes them (JSON), as it is installed, without a GPU. It then leaves out
    the engines of cuBLASLt and of a driver, and kernels whose occupancy it cannot ask for may have other workspaces.
    """

    def __init__(self, properties: str | None = None) -> None:
        self._library: Any
        self._handle = c_void_p()
        self._properties: _Descriptor | None = None
        if properties is not None:
            folder = Path(str(importlib.metadata.distribution("nvidia-cudnn-cu13").locate_file("nvidia")))
            for name in ("cu13/lib/libcublasLt.so.13", "cu13/lib/libcublas.so.13"):
                ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            self._library = ctypes.CDLL(str(folder / "cudnn/lib/libcudnn.so.9"))
            self._library.cudnnGetErrorString.restype = ctypes.c_char_p
            self.version = self._library.cudnnGetVersion()
            self._properties = self._descriptor(DEVICEPROP, (2702, CHAR, list(properties.encode())))
            return
        import torch

        torch.zeros(1, device="cuda")
        self.version = torch.backends.cudnn.version()
        maps = Path("/proc/self/maps").read_text().splitlines()
        self._library = ctypes.CDLL(next(line.split()[-1] for line in maps if "libcudnn.so" in line))
        self._library.cudnnGetErrorString.restype = ctypes.c_char_p
        self._call("cudnnCreate", byref(self._handle))

    def first_plan(
        self,
        direction: str,
        dtype: str,
        channels_last: bool,
        n: int,
        c: int,
        k: int,
        groups: int,
        *sides: Sequence[int],
    ) -> tuple[int, int]:
        """``(engine, bytes of workspace)`` of the first plan that can be built; ``(-1, -1)`` where there is none.

        ``sides``: kernel, stride, padding, dilation and input size, an entry a dimension.
        """
        graph = self._graph(direction, dtype, channels_last, n, c, k, groups, *map(list, sides))
        for mode, most in ((INSTANT, 4), (INSTANT, 100), (FALLBACK, 100)):  # the first few are cheaper to get
            for config in self._configs(graph, mode, most):
                engine, notes = self._engine(config)
                if DOWN_CONVERT_INPUTS in notes:
                    continue
                try:
                    plan = self._descriptor(EXECUTION_PLAN, *self._device(400, 407), (401, DESCRIPTOR, [config]))
                except CudnnError:
                    continue
                return engine, self._number(plan, 402)
        return -1, -1

    def _device(self, handle: int, properties: int) -> tuple[tuple[int, int, list[Any]], ...]:
        """The attribute that says which GPU is meant."""
        if self._properties:
            return ((properties, DESCRIPTOR, [self._properties]),)
        return ((handle, HANDLE, [self._handle.value]),)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise CudnnError(f"{name}: {self._library.cudnnGetErrorString(status).decode()}")

    def _descriptor(self, kind: int, *attributes: tuple[int, int, list[Any]], finalize: bool = True) -> _Descriptor:
        made = _Descriptor(self._library, kind)
        for attribute, of, values in attributes:
            pointers = [value.pointer for value in values] if of == DESCRIPTOR else values
            made.kept += values if of == DESCRIPTOR else []
            array = (_C_TYPES.get(of, c_int) * len(values))(*pointers)
            self._call("cudnnBackendSetAttribute", made.pointer, attribute, of, c_int64(len(values)), array)
        if finalize:
            self._call("cudnnBackendFinalize", made.pointer)
        return made

    def _tensor(self, name: str, sizes: list[int], dtype: str, channels_last: bool) -> _Descriptor:
        strides, step = [0] * len(sizes), 1
        for index in reversed([0, *range(2, len(sizes)), 1] if channels_last else range(len(sizes))):
            strides[index], step = step, step * sizes[index]
        return self._descriptor(
            TENSOR,
            (902, INT64, sizes), (903, INT64, strides), (906, INT64, [ord(name)]), (900, INT64, [ALIGNMENT]),
            (901, DATA_TYPE, [DATA_TYPES[dtype]]), (907, BOOLEAN, [False]),
        )  # fmt: skip

    def _graph(
        self, direction: str, dtype: str, channels_last: bool, n: int, c: int, k: int, groups: int, *sides: list[int]
    ) -> _Descriptor:
        if len(sides[0]) == 1:  # PyTorch runs it as a 2d convolution in NCHW
            sides, channels_last = (
                tuple([value, *side] for side, value in zip(sides, (1, 1, 0, 1, 1), strict=True)),
                False,
            )
        kernel, stride, padding, dilation, size = sides
        out = [(s + 2 * p - d * (r - 1) - 1) // t + 1 for r, t, p, d, s in zip(*sides, strict=True)]
        computed = "float64" if dtype == "float64" else "float32"
        number = DOUBLE if dtype == "float64" else FLOAT
        convolution = self._descriptor(
            CONVOLUTION,
            (100, DATA_TYPE, [DATA_TYPES[computed]]), (101, CONVOLUTION_MODE, [1]), (106, INT64, [len(size)]),
            (102, INT64, dilation), (103, INT64, stride), (104, INT64, padding), (105, INT64, padding),
        )  # fmt: skip
        kind, alpha, beta, described, weights, inputs, outputs = OPERATIONS[direction]
        operation = self._descriptor(
            kind,
            (described, DESCRIPTOR, [convolution]),
            (inputs, DESCRIPTOR, [self._tensor("x", [n, c, *size], dtype, channels_last)]),
            (weights, DESCRIPTOR, [self._tensor("w", [k, c // groups, *kernel], dtype, channels_last)]),
            (outputs, DESCRIPTOR, [self._tensor("y", [n, k, *out], dtype, channels_last)]),
            (alpha, number, [1.0]), (beta, number, [0.0]),
        )  # fmt: skip
        device = () if self._properties else self._device(800, 0)
        return self._descriptor(OPERATIONGRAPH, *device, (801, DESCRIPTOR, [operation]))

    def _configs(self, graph: _Descriptor, mode: int, most: int) -> Iterator[_Descriptor]:
        device = self._device(0, 204) if self._properties else ()
        heuristics = self._descriptor(ENGINEHEUR, (201, DESCRIPTOR, [graph]), (200, HEUR_MODE, [mode]), *device)
        configs = [self._descriptor(ENGINECFG, finalize=False) for _ in range(most)]
        array = (c_void_p * most)(*[config.pointer for config in configs])
        yield from configs[: self._get(heuristics, 202, DESCRIPTOR, array)]

    def _engine(self, config: _Descriptor) -> tuple[int, list[int]]:
        engine = self._descriptor(ENGINE, finalize=False)
        self._get(config, 300, DESCRIPTOR, (c_void_p * 1)(engine.pointer))
        notes = (c_int * 64)()
        count = self._get(engine, 1303, NUMERICAL_NOTE, notes)
        return self._number(engine, 1301), list(notes[:count])

    def _number(self, descriptor: _Descriptor, attribute: int) -> int:
        value = (c_int64 * 1)()
        self._get(descriptor, attribute, INT64, value)
        return value[0]

    def _get(self, descriptor: _Descriptor, attribute: int, of: int, array: Any) -> int:
        """Fills ``array``; how many entries there are."""
        count = c_int64()
        self._call(
            "cudnnBackendGetAttribute", descriptor.pointer, attribute, of, c_int64(len(array)), byref(count), array
        )
        return min(count.value, len(array))


_C_TYPES = {
    CHAR: c_char,
    HANDLE: c_void_p,
    BOOLEAN: c_bool,
    INT64: c_int64,
    FLOAT: c_float,
    DOUBLE: c_double,
    DESCRIPTOR: c_void_p,
}


class _Descriptor:
    """Owns a ``cudnnBackendDescriptor_t``, and keeps alive what it refers to."""

    def __init__(self, library: Any, kind: int) -> None:
        self.pointer = c_void_p()
        self.kept: list[_Descriptor] = []
        self._library = library
        status = library.cudnnBackendCreateDescriptor(kind, byref(self.pointer))
        if status:
            raise CudnnError(f"cudnnBackendCreateDescriptor: {library.cudnnGetErrorString(status).decode()}")

    def __del__(self) -> None:
        if self.pointer:
            self._library.cudnnBackendDestroyDescriptor(self.pointer)
