"""The torch backend against attention written out, over regions whose unused slots are NaN."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bros_kernels.paged_attention import AttnMeta, UnknownBackendError, copy_tails, select_backend
from bros_kernels.reference import ReferenceAttention

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Case:
    """Sequences of (keys, query tokens), decodes first, with keys, values and queries in logical order."""

    lengths: list[tuple[int, int]]
    block_size: int
    queries: Tensor  # (T, num_heads, head_dim)
    keys: list[Tensor]  # of each sequence, (length, num_kv_heads, head_dim)
    values: list[Tensor]


def make_case(
    lengths: Sequence[tuple[int, int]],
    block_size: int = 16,
    num_kv_heads: int = 2,
    group: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    ordered = sorted(lengths, key=lambda length: length[1] > 1)
    num_tokens = sum(num_queries for _, num_queries in ordered)
    return Case(
        ordered,
        block_size,
        normal(num_tokens, num_kv_heads * group, head_dim),
        [normal(length, num_kv_heads, head_dim) for length, _ in ordered],
        [normal(length, num_kv_heads, head_dim) for length, _ in ordered],
    )


def expected_attention(case: Case, scale: float, window: int | None = None) -> Tensor:
    """Softmax attention in float64, one query of one head at a time."""
    rows, first_token = [], 0
    for (length, num_queries), keys, values in zip(case.lengths, case.keys, case.values, strict=True):
        for index in range(num_queries):
            position = length - num_queries + index
            first_key = 0 if window is None else max(0, position - window + 1)
            q = case.queries[first_token + index].double()
            group = q.shape[0] // keys.shape[1]
            k = keys[first_key : position + 1].double().repeat_interleave(group, 1)
            v = values[first_key : position + 1].double().repeat_interleave(group, 1)
            weights = torch.softmax(torch.einsum("hd,khd->hk", q, k) * scale, -1)
            rows.append(torch.einsum("hk,khd->hd", weights, v))
        first_token += num_queries
    return torch.stack(rows)


def choose_entries(case: Case, directions: str, seed: int = 0) -> tuple[list[list[int]], int]:
    """Block tables in shuffled blocks, and the number of blocks; directions is `+`, `-`, `±` (mixed) or `shared`.

    `shared`: sequences alternate direction, and neighbours share their last blocks where both fit.
    """
    shuffle = random.Random(seed)
    widths = [-(-length // case.block_size) for length, _ in case.lengths]
    free = shuffle.sample(range(sum(widths) + 3), sum(widths) + 3)
    tables: list[list[int]] = []
    for index, width in enumerate(widths):
        is_backward = {"+": False, "-": True, "±": None, "shared": index % 2 == 1}[directions]
        entries = []
        for _ in range(width):
            block = free.pop()
            turn = shuffle.random() < 0.5 if is_backward is None else is_backward
            entries.append(~block if turn else block)
        if directions == "shared" and is_backward:
            tails = [(case.lengths[i][0] - 1) % case.block_size + 1 for i in (index - 1, index)]
            if sum(tails) <= case.block_size:
                entries[-1] = ~tables[index - 1][-1]
        tables.append(entries)
    return tables, sum(widths) + 3


def slot_of(entry: int, offset: int, block_size: int) -> int:
    return entry * block_size + offset if entry >= 0 else (-entry - 1) * block_size + block_size - 1 - offset


def run(case: Case, directions: str, scale: float = 0.3, window: int | None = None, seed: int = 0) -> Tensor:
    """Store all but the step's tokens by hand, let the backend write those, and attend."""
    tables, num_blocks = choose_entries(case, directions, seed)
    _, num_kv_heads, head_dim = case.keys[0].shape
    sizes = (num_blocks, case.block_size, num_kv_heads, head_dim)
    k = torch.full(sizes, math.nan, dtype=case.queries.dtype)
    v = k.clone()
    new_slots, k_new, v_new = [], [], []
    for table, (length, num_queries), keys, values in zip(tables, case.lengths, case.keys, case.values, strict=True):
        slots = [slot_of(table[p // case.block_size], p % case.block_size, case.block_size) for p in range(length)]
        past = length - num_queries
        k.view(-1, num_kv_heads, head_dim)[slots[:past]] = keys[:past]
        v.view(-1, num_kv_heads, head_dim)[slots[:past]] = values[:past]
        new_slots += slots[past:]
        k_new.append(keys[past:])
        v_new.append(values[past:])
    width = max(map(len, tables))
    num_queries = [n for _, n in case.lengths]
    meta = AttnMeta(
        block_table=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32),
        seq_lens=torch.tensor([length for length, _ in case.lengths], dtype=torch.int32),
        cu_q=torch.tensor([0, *itertools.accumulate(num_queries)], dtype=torch.int32),
        slot_mapping=torch.tensor(new_slots),
        max_q=max(num_queries),
        max_k=max(length for length, _ in case.lengths),
        n_decode=num_queries.count(1),
        block_size=case.block_size,
    )
    attention = ReferenceAttention(meta, case.queries.dtype)
    attention.write_kv(k, v, torch.cat(k_new), torch.cat(v_new))
    return attention.attend(case.queries, k, v, scale, window)


def edge_lengths(block_size: int) -> list[tuple[int, int]]:
    """Lengths around the edges of blocks: as decodes, as whole prompts, and as later chunks."""
    lengths = (1, block_size - 1, block_size, block_size + 1, 3 * block_size + 7)
    return [(n, 1) for n in lengths] + [(n, n) for n in lengths[1:]] + [(n + 5, 5) for n in lengths]


@pytest.mark.parametrize("directions", ["+", "-", "±", "shared"])
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_edges_of_blocks(block_size: int, directions: str) -> None:
    case = make_case(edge_lengths(block_size), block_size, group=3)
    torch.testing.assert_close(run(case, directions).double(), expected_attention(case, 0.3), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_dtypes_and_head_shapes(dtype: torch.dtype, group: int, head_dim: int) -> None:
    lengths = [(1, 1), (33, 1), (55, 1), (40, 40), (29, 6)]
    case = make_case(lengths, group=group, head_dim=head_dim, dtype=dtype)
    scale = head_dim**-0.5
    torch.testing.assert_close(
        run(case, "shared", scale).double(),
        expected_attention(case, scale),
        rtol=TOLERANCE[dtype],
        atol=TOLERANCE[dtype],
    )


@pytest.mark.parametrize("window", [1, 2, 16, 17, 54, 55, 1000])
def test_window(window: int) -> None:
    case = make_case([(1, 1), (16, 1), (55, 1), (20, 20), (54, 17)], group=2)
    torch.testing.assert_close(
        run(case, "±", window=window).double(), expected_attention(case, 0.3, window), rtol=2e-5, atol=2e-5
    )


def test_decodes_of_very_different_length() -> None:
    case = make_case([(3, 1), (900, 1), (5, 1), (950, 1), (1, 1), (300, 1)], block_size=64)
    torch.testing.assert_close(run(case, "±").double(), expected_attention(case, 0.3), rtol=2e-5, atol=2e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=6),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([None, 3, 20]),
    st.integers(0, 1000),
)
def test_any_step_is_right_and_bit_equal_in_all_directions(
    past_and_new: list[tuple[int, int]], dtype: torch.dtype, group: int, window: int | None, seed: int
) -> None:
    case = make_case([(past + new, new) for past, new in past_and_new], group=group, dtype=dtype)
    forward = run(case, "+", window=window)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(forward.double(), expected_attention(case, 0.3, window), rtol=tolerance, atol=tolerance)
    for directions in ("-", "±", "shared"):
        assert torch.equal(run(case, directions, window=window, seed=seed), forward)


@settings(deadline=None)
@given(st.data(), st.sampled_from([16, 64]))
def test_copy_tails_keeps_content_in_every_layer(data: st.DataObject, block_size: int) -> None:
    num_moves = data.draw(st.integers(0, 4))
    blocks = data.draw(st.permutations(range(8)))
    is_backward = st.booleans().map(lambda is_backward: -1 if is_backward else 0)
    sources = [block ^ data.draw(is_backward) for block in blocks[:num_moves]]
    destinations = [block ^ data.draw(is_backward) for block in blocks[4 : 4 + num_moves]]
    counts = [data.draw(st.integers(1, block_size)) for _ in range(num_moves)]
    kv = torch.randn(3, 2, 8, block_size, 2, 4)
    expected = kv.clone()
    rows = expected.view(3, 2, -1, 2, 4)
    for source, destination, count in zip(sources, destinations, counts, strict=True):
        for offset in range(count):
            rows[:, :, slot_of(destination, offset, block_size)] = rows[:, :, slot_of(source, offset, block_size)]
    copy_tails(kv, *(torch.tensor(column, dtype=torch.int32) for column in (sources, destinations, counts)))
    assert torch.equal(kv, expected)


def test_select_backend() -> None:
    assert select_backend("auto") is select_backend("torch") is ReferenceAttention
    with pytest.raises(UnknownBackendError, match="no attention backend is called 'tritn'"):
        select_backend("tritn")
