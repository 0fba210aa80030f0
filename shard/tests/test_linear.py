"""Packed weights multiply as plain ones do, and do not keep the plain ones."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.nn import functional as F

from bros_shard.models.linear import make_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 3), (7, 33), (96, 64), (131, 64), (64, 96)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_product_equals_f_linear(dtype: torch.dtype, out_features: int, in_features: int, has_bias: bool) -> None:
    weight = torch.randn(out_features, in_features).to(dtype)
    bias = torch.randn(out_features).to(dtype) if has_bias else None
    linear = make_linear(weight, bias)
    with torch.inference_mode():
        for num_rows in (1, 2, 5, 16, 33):
            x = torch.randn(num_rows, in_features).to(dtype)
            torch.testing.assert_close(linear(x), F.linear(x, weight, bias), rtol=1.6e-2, atol=1e-3)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="weights are not packed here")
def test_packed_weight_is_the_only_copy() -> None:
    weight = torch.randn(64, 64).bfloat16()
    linear = make_linear(weight)
    plain = weakref.ref(weight)
    del weight
    assert linear(torch.ones(1, 64, dtype=torch.bfloat16)).shape == (1, 64)
    assert plain() is None
