"""Products, norms and rotations of all kernels, and which kernels are chosen."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bros_kernels import native
from bros_kernels.cpu_kernels import CpuKernels
from bros_kernels.kernels import Kernels, UnknownKernelsError, select_kernels
from bros_kernels.linear import Activation, RMSNorm
from bros_kernels.torch_kernels import TorchKernels

CPU = torch.device("cpu")


def expected_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: RMSNorm | None, residual: Tensor | None = None
) -> Tensor:
    """In float64, of the inputs rounded to their dtype where they are normalised."""
    if norm is not None:
        x = exact_norm(x, norm).to(x.dtype)
    product = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return product if residual is None else product + residual.double()


def exact_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    """In float64."""
    return F.rms_norm(x.double(), norm.weight.shape, norm.offset + norm.weight.double(), norm.eps)


def assert_close(found: Tensor, expected: Tensor) -> None:
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}[found.dtype]
    # Of numbers of order 1: where they cancel out, what is left may be all rounding.
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("out_features", "in_features"), [(1, 3), (7, 33), (96, 64), (131, 64), (64, 96), (40, 2), (2048, 130)]
)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("norm_offset", [None, 0.0, 1.0])
def test_product(
    kind: tuple[Kernels, torch.dtype], out_features: int, in_features: int, has_bias: bool, norm_offset: float | None
) -> None:
    kernels, dtype = kind
    weight = torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    norm = None
    if norm_offset is not None:
        norm = RMSNorm(torch.rand(in_features).add(0.5).to(dtype), 1e-5, norm_offset)
    linear = kernels.linear(weight, bias, norm)
    with torch.inference_mode():
        for num_rows in (1, 2, 5, 12, 13, 16, 33, 97, 200):
            x = torch.randn(num_rows, 2 * in_features).to(dtype)[:, :in_features]  # rows that lie apart
            residual = torch.randn(num_rows, out_features).to(dtype)
            before = x.clone(), residual.clone()
            assert_close(linear(x), expected_product(x, weight, bias, norm))
            assert_close(linear(x, residual), expected_product(x, weight, bias, norm, residual))
            assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("activation", [F.silu, F.gelu])
@pytest.mark.parametrize(("out_features", "in_features"), [(64, 96), (1536, 64), (24, 33)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("norm_offset", [None, 0.0, 1.0])
def test_gated_product(
    kind: tuple[Kernels, torch.dtype],
    activation: Activation,
    out_features: int,
    in_features: int,
    has_bias: bool,
    norm_offset: float | None,
) -> None:
    kernels, dtype = kind
    weight = torch.randn(2 * out_features, in_features).to(dtype)
    bias = torch.randn(2 * out_features).to(dtype) if has_bias else None
    norm = None
    if norm_offset is not None:
        norm = RMSNorm(torch.rand(in_features).add(0.5).to(dtype), 1e-5, norm_offset)
    gated = kernels.gated_linear(weight, bias, activation, norm)
    with torch.inference_mode():
        for num_rows in (1, 12, 33):
            x = torch.randn(num_rows, in_features).to(dtype)
            residual = torch.randn(num_rows, 2 * out_features).to(dtype)
            before = residual.clone()
            for added in (None, residual):
                gate, up = expected_product(x, weight, bias, norm, added).chunk(2, -1)
                assert_close(gated(x, added), activation(gate) * up)
            assert torch.equal(residual, before)


@pytest.mark.parametrize("has_int8_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_rows=st.integers(1, 250),
    out_features=st.integers(1, 120),
    half_in_features=st.integers(1, 40),
    data=st.data(),
)
def test_row_of_a_product_is_bit_equal_in_any_batch(
    cpu_kernels: Callable[..., CpuKernels],
    dtype: torch.dtype,
    has_int8_weights: bool,
    num_rows: int,
    out_features: int,
    half_in_features: int,
    data: st.DataObject,
) -> None:
    linear = cpu_kernels(dtype, has_int8_weights).linear(torch.randn(out_features, 2 * half_in_features).to(dtype))
    x = torch.randn(num_rows, 2 * half_in_features).to(dtype)
    start = data.draw(st.integers(0, num_rows - 1))
    stop = data.draw(st.integers(start + 1, num_rows))
    assert torch.equal(linear(x)[start:stop], linear(x[start:stop]))


@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_any_number_of_threads_computes_the_same(cpu_kernels: Callable[..., CpuKernels], num_threads: int) -> None:
    """More threads than cores, and jobs so short that threads come too late for many of them."""
    weight, x = torch.randn(300, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    expected = cpu_kernels(torch.bfloat16, num_threads=1).linear(weight)(x)
    linear = cpu_kernels(torch.bfloat16, num_threads=num_threads).linear(weight)
    for _ in range(3000):
        assert torch.equal(linear(x), expected)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [16, 64, 576, 70])
def test_rms_norm(kind: tuple[Kernels, torch.dtype], size: int, offset: float) -> None:
    kernels, dtype = kind
    norm = RMSNorm(torch.randn(size).to(dtype), 1e-5, offset)
    for num_rows in (1, 8, 33):
        x = (3 * torch.randn(num_rows, 2 * size)).to(dtype)[:, :size]
        assert_close(kernels.rms_norm(x, norm), exact_norm(x, norm))


@pytest.mark.parametrize("vocab_size", [1, 5, 16, 131, 49_152])
def test_most_likely(kind: tuple[Kernels, torch.dtype], vocab_size: int) -> None:
    kernels, dtype = kind
    logits = (4 * torch.randn(9, vocab_size + 7)).to(dtype)[
        :, :vocab_size
    ]  # rows that lie apart, with ties in bfloat16
    logits[1] = -3.0
    logits[2, vocab_size // 2 :] = -torch.inf
    logits[2, 0] = 1.0
    token_ids, logprobs = kernels.most_likely(logits)
    expected = logits.double().log_softmax(-1)
    first_best = [row.tolist().index(max(row.tolist())) for row in logits]
    assert token_ids.tolist() == first_best
    best = expected.gather(1, token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), best, rtol=2e-5, atol=2e-5)


def test_logprob_of_a_useless_row_is_not_finite(kind: tuple[Kernels, torch.dtype]) -> None:
    kernels, dtype = kind
    logits = torch.randn(5, 70).to(dtype)
    logits[0, 69] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3] = torch.nan
    token_ids, logprobs = kernels.most_likely(logits)
    assert logprobs.isfinite().tolist() == [False, False, False, False, True]
    assert all(0 <= token_id < 70 for token_id in token_ids.tolist())


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="weights are not packed here")
@pytest.mark.parametrize("name", ["torch", "auto"])
def test_packed_weight_is_the_only_copy(name: str) -> None:
    weight = torch.randn(64, 64).bfloat16()
    linear = select_kernels(name, CPU, torch.bfloat16, num_threads=2).linear(weight)
    plain = weakref.ref(weight)
    del weight
    assert linear(torch.ones(1, 64, dtype=torch.bfloat16)).shape == (1, 64)
    assert plain() is None


def test_torch_computes_what_nothing_else_can() -> None:
    assert isinstance(select_kernels("auto", CPU, torch.float16, 1), TorchKernels)
    assert isinstance(select_kernels("torch", CPU, torch.bfloat16, 1), TorchKernels)
    with pytest.raises(UnknownKernelsError, match="no kernels are called 'tritn': there are auto, cpu, torch"):
        select_kernels("tritn", CPU, torch.bfloat16, 1)
    with pytest.raises(UnknownKernelsError, match=r"compute in bfloat16 and float32 on the CPU, not in torch\.float16"):
        select_kernels("cpu", CPU, torch.float16, 1)
    with pytest.raises(UnknownKernelsError, match="int8 weights are for the CPU, not for cuda"):
        select_kernels("auto", torch.device("cuda"), torch.bfloat16, 1, has_int8_weights=True)


@pytest.mark.usefixtures("cpu_kernels")
def test_kernels_with_threads_of_their_own_leave_torch_one() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        assert isinstance(select_kernels("auto", CPU, dtype, 2), CpuKernels)
    assert torch.get_num_threads() == 1
    select_kernels("torch", CPU, torch.bfloat16, 2)
    assert torch.get_num_threads() == 2


@pytest.fixture
def forget_library():
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.usefixtures("forget_library")
def test_library_that_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert isinstance(select_kernels("auto", CPU, torch.bfloat16, 1), TorchKernels)
    with pytest.raises(UnknownKernelsError, match="do not run here: the C kernels were not built"):
        select_kernels("cpu", CPU, torch.bfloat16, 1)


@pytest.mark.usefixtures("cpu_kernels", "forget_library")
def test_processor_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    class OlderProcessor:
        """The library as such a processor answers."""

        def __init__(self, path: str) -> None:
            self.bros_is_supported = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)

    monkeypatch.setattr(ctypes, "CDLL", OlderProcessor)
    assert isinstance(select_kernels("auto", CPU, torch.bfloat16, 1), TorchKernels)
