"""The C libraries of this package, one for each set of instructions: which of them runs here, and its functions.

`kernels/build_native.py` builds them when the package is installed, all of the same sources. They have a plain C ABI
and are called by `ctypes`, which lets go of the interpreter's lock meanwhile, so any PyTorch will do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Final

#: Where the libraries are, unless there was no compiler.
FOLDER: Final = Path(__file__).parent
#: The fastest first: AVX-512 with products of bfloat16 and int8, and AVX2 with fused multiply-add.
INSTRUCTION_SETS: Final = ("avx512", "avx2")

_FUNCTIONS: Final = {
    "bros_set_num_threads": (c_int,),
    "bros_pack_weight": (c_void_p, c_int64, c_int64, c_void_p),
    "bros_multiply": (
        c_void_p,
        c_void_p,
        c_int64,
        c_int64,
        c_void_p,
        c_void_p,
    ),  # linear, x, x_stride, m, residual, out
    "bros_rms_norm": (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32, c_void_p),
    "bros_most_likely": (c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p, c_void_p),
    "bros_attend": (
        *(c_void_p,) * 5,
        c_int64,
        *(c_void_p,) * 3,
    ),  # step, attention, qkv, cos, sin, rotary_dim, k, v, out
    "bros_add_low_ranks": (
        c_void_p,
        c_int64,
        c_void_p,
        c_int64,
        c_int64,
        *(c_void_p,) * 2,
    ),  # parts, num_parts, x, x_stride, m, residual, out
    "bros_run_layer": (
        *(c_void_p,) * 5,
        c_int64,
        *(c_void_p,) * 2,
    ),  # layer, step, hidden, cos, sin, rotary_dim, k, v
}


class NativeLibraryError(Exception):
    """The C library was not built, or does not run on this processor."""


class CNorm(ctypes.Structure):
    """`struct bros_norm` of `native/norm.h`."""

    _fields_ = (("weight", c_void_p), ("eps", c_float), ("offset", c_float))


class CLinear(ctypes.Structure):
    """`struct bros_linear` of `native/gemm.h`."""

    _fields_ = (
        ("packed", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("norm", CNorm),
        ("dtype", c_int32),
        ("epilogue", c_int32),
    )


class CLowRank(ctypes.Structure):
    """`struct bros_low_rank` of `native/low_rank.h`."""

    _fields_ = (("down", c_void_p), ("up", c_void_p), ("rows", c_void_p), ("num_rows", c_int64))


class CStep(ctypes.Structure):
    """`struct bros_step` of `native/attention.h`."""

    _fields_ = (
        ("num_tokens", c_int64),
        ("slots", c_void_p),
        ("queries", c_void_p),
        ("num_queries", c_int64),
        ("splits", c_void_p),
        ("num_splits", c_int64),
        ("num_part_rows", c_int64),
        ("block_table", c_void_p),
        ("table_width", c_int64),
        ("block_size", c_int64),
    )


class CAttention(ctypes.Structure):
    """`struct bros_attention` of `native/attention.h`."""

    _fields_ = (
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("q_norm", CNorm),
        ("k_norm", CNorm),
        ("scale", c_float),
        ("softcap", c_float),
        ("dtype", c_int32),
    )


class CLayer(ctypes.Structure):
    """`struct bros_layer` of `native/layer.h`."""

    _fields_ = (
        ("attention", c_void_p),
        ("qkv", c_void_p),
        ("output", c_void_p),
        ("gated", c_void_p),
        ("down", c_void_p),
    )


def _path(instruction_set: str) -> Path:
    return FOLDER / f"libbros-{instruction_set}.so"


@cache
def _library(instruction_set: str) -> ctypes.CDLL | None:
    """The library; `None` where it does not run on this processor."""
    library = ctypes.CDLL(str(_path(instruction_set)))
    library.bros_is_supported.restype = c_int
    if not library.bros_is_supported():
        return None
    for name, argument_types in _FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = argument_types
        function.restype = c_int if name == "bros_set_num_threads" else None
    return library


def load_library(num_threads: int, instruction_sets: Sequence[str] = INSTRUCTION_SETS) -> ctypes.CDLL:
    """The first library that runs here, which computes with `num_threads` threads from now on.

    It must be called by one thread at a time.

    Raises:
        NativeLibraryError: none does.
    """
    # An old compiler may know some of the instructions alone.
    built = [name for name in instruction_sets if _path(name).exists()]
    if not built:
        raise NativeLibraryError("the C kernels were not built: no C compiler was found at installation")
    library = next((found for name in built if (found := _library(name)) is not None), None)
    if library is None:
        needed = ", ".join(built)
        raise NativeLibraryError(f"this processor lacks the instructions that they are made of ({needed})")
    error = library.bros_set_num_threads(num_threads)
    if error:
        raise NativeLibraryError(f"{num_threads} threads cannot be started: error {error}")
    return library
