"""Attention of all kernels against attention written out, over regions whose unused slots are NaN."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bros_kernels.attn_meta import AttnMeta
from bros_kernels.cpu_kernels import CpuKernels
from bros_kernels.kernels import Kernels, select_kernels
from bros_kernels.linear import RMSNorm
from bros_kernels.native import INSTRUCTION_SETS
from bros_kernels.paged_attention import AttentionLayer
from bros_kernels.tails import copy_tails

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


def select(name: str, dtype: torch.dtype) -> Kernels:
    return select_kernels(name, CPU, dtype, num_threads=2)


@pytest.fixture(
    params=[("torch", torch.float32), *itertools.product(INSTRUCTION_SETS, (torch.bfloat16, torch.float32))],
    ids=lambda kind: f"{kind[0]}-{kind[1]}",
)
def kind(
    request: pytest.FixtureRequest, make_cpu_kernels: Callable[..., CpuKernels]
) -> tuple[Kernels, torch.dtype, int]:
    """Kernels, and dtype and size of heads that they compute themselves."""
    name, dtype = request.param
    if name == "torch":
        return select("torch", dtype), dtype, 16
    return make_cpu_kernels(name, dtype), dtype, 32 if dtype == torch.bfloat16 else 16


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


def expected_attention(case: Case, scale: float, window: int | None = None, softcap: float | None = None) -> Tensor:
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
            scores = torch.einsum("hd,khd->hk", q, k) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append(torch.einsum("hk,khd->hd", torch.softmax(scores, -1), v))
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


def run(
    kernels: Kernels,
    case: Case,
    directions: str,
    scale: float = 0.3,
    window: int | None = None,
    softcap: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Store all but the step's tokens by hand, let the kernels write those, and attend."""
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
    qkv = torch.cat([case.queries, torch.cat(k_new), torch.cat(v_new)], 1).flatten(1)
    layer = AttentionLayer(
        num_heads=case.queries.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=scale,
        window=window,
        softcap=softcap,
    )
    return kernels.attention(meta).attend(layer, qkv, None, k, v).view(case.queries.shape)


def edge_lengths(block_size: int) -> list[tuple[int, int]]:
    """Lengths around the edges of blocks: as decodes, as whole prompts, and as later chunks."""
    lengths = (1, block_size - 1, block_size, block_size + 1, 3 * block_size + 7)
    return [(n, 1) for n in lengths] + [(n, n) for n in lengths[1:]] + [(n + 5, 5) for n in lengths]


def assert_right(
    found: Tensor, case: Case, scale: float = 0.3, window: int | None = None, softcap: float | None = None
) -> None:
    tolerance = TOLERANCE[case.queries.dtype]
    expected = expected_attention(case, scale, window, softcap)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("directions", ["+", "-", "±", "shared"])
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_edges_of_blocks(kind: tuple[Kernels, torch.dtype, int], block_size: int, directions: str) -> None:
    kernels, dtype, head_dim = kind
    case = make_case(edge_lengths(block_size), block_size, group=3, head_dim=head_dim, dtype=dtype)
    assert_right(run(kernels, case, directions), case)


@pytest.mark.parametrize("head_dim", [5, 18, 48, 64, 96, 128, 256, 258])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 49])
@pytest.mark.parametrize(
    "name_and_dtype",
    [*(("torch", dtype) for dtype in TOLERANCE), ("auto", torch.bfloat16), ("auto", torch.float32)],
    ids=str,
)
def test_dtypes_and_head_shapes(name_and_dtype: tuple[str, torch.dtype], group: int, head_dim: int) -> None:
    name, dtype = name_and_dtype
    lengths = [(1, 1), (33, 1), (55, 1), (40, 40), (29, 6)]
    case = make_case(lengths, group=group, head_dim=head_dim, dtype=dtype)
    scale = head_dim**-0.5
    assert_right(run(select(name, dtype), case, "shared", scale), case, scale)


@pytest.mark.parametrize("window", [1, 2, 16, 17, 54, 55, 64, 65, 130, 1000])
def test_window(kind: tuple[Kernels, torch.dtype, int], window: int) -> None:
    kernels, dtype, head_dim = kind
    lengths = [(1, 1), (16, 1), (55, 1), (200, 1), (20, 20), (54, 17), (150, 90)]
    case = make_case(lengths, group=2, head_dim=head_dim, dtype=dtype)
    assert_right(run(kernels, case, "±", window=window), case, window=window)


@pytest.mark.parametrize("window", [None, 17])
@pytest.mark.parametrize("scale", [0.1, 0.3, 40.0])
def test_capped_scores(kind: tuple[Kernels, torch.dtype, int], scale: float, window: int | None) -> None:
    """From scores that the cap hardly changes to scores that are all at it."""
    kernels, dtype, head_dim = kind
    lengths = [(1, 1), (16, 1), (55, 1), (200, 1), (20, 20), (54, 17), (150, 90)]
    case = make_case(lengths, group=3, head_dim=head_dim, dtype=dtype)
    found = run(kernels, case, "±", scale, window, softcap=1.5)
    assert_right(found, case, scale, window, softcap=1.5)


def test_decodes_of_very_different_length(kind: tuple[Kernels, torch.dtype, int]) -> None:
    kernels, dtype, head_dim = kind
    lengths = [(3, 1), (900, 1), (5, 1), (950, 1), (1, 1), (300, 1)]
    case = make_case(lengths, block_size=64, head_dim=head_dim, dtype=dtype)
    assert_right(run(kernels, case, "±"), case)


@pytest.mark.parametrize("window", [None, 100, 700])
def test_contexts_of_several_spans(kind: tuple[Kernels, torch.dtype, int], window: int | None) -> None:
    """Decodes and short chunks, whose keys are shared out, beside a chunk that one thread takes from end to end."""
    kernels, dtype, head_dim = kind
    lengths = [(511, 1), (512, 1), (513, 1), (1024, 1), (1500, 1), (1100, 7), (1300, 200), (514, 3)]
    case = make_case(lengths, block_size=64, group=3, head_dim=head_dim, dtype=dtype)
    assert_right(run(kernels, case, "±", window=window), case, window=window)


def test_scores_that_differ_by_orders_of_magnitude(kind: tuple[Kernels, torch.dtype, int]) -> None:
    kernels, dtype, head_dim = kind
    case = make_case([(200, 1), (90, 90)], head_dim=head_dim, dtype=dtype)
    assert_right(run(kernels, case, "±", scale=40.0), case, scale=40.0)


@pytest.mark.parametrize("norm_offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("rotary_share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("head_dim", [16, 32, 96])
@pytest.mark.parametrize(
    "name_and_dtype", [("torch", torch.float32), ("auto", torch.float32), ("auto", torch.bfloat16)], ids=str
)
def test_queries_and_keys_are_normalised_then_rotated(
    name_and_dtype: tuple[str, torch.dtype], head_dim: int, rotary_share: float, norm_offset: float | None
) -> None:
    """One sequence of 21 tokens, 3 query heads and 1 key head, of which the first part is rotated."""
    name, dtype = name_and_dtype
    num_tokens, num_heads = 21, 3
    heads = torch.randn(num_tokens, num_heads + 2, head_dim).to(dtype)
    norms: list[RMSNorm | None] = [None, None]
    if norm_offset is not None:
        # Whatever the offset, what is multiplied with lies between 0.5 and 1.5.
        norms = [RMSNorm(torch.rand(head_dim).add(0.5 - norm_offset).to(dtype), 1e-5, norm_offset) for _ in range(2)]
    rotary_dim = int(head_dim * rotary_share)
    turns = torch.rand(num_tokens, 1, rotary_dim // 2) * 6
    cos = torch.cat([turns.cos(), turns.cos()], -1).to(dtype)
    sin = torch.cat([-turns.sin(), turns.sin()], -1).to(dtype)
    layer = AttentionLayer(
        num_heads=num_heads,
        num_kv_heads=1,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        q_norm=norms[0],
        k_norm=norms[1],
    )
    meta = AttnMeta(
        block_table=torch.tensor([[1, ~0]], dtype=torch.int32),
        seq_lens=torch.tensor([num_tokens], dtype=torch.int32),
        cu_q=torch.tensor([0, num_tokens], dtype=torch.int32),
        slot_mapping=torch.tensor([*range(16, 32), *range(15, 10, -1)]),
        max_q=num_tokens,
        max_k=num_tokens,
        n_decode=0,
        block_size=16,
    )
    k, v = torch.zeros(2, 16, 1, head_dim, dtype=dtype), torch.zeros(2, 16, 1, head_dim, dtype=dtype)
    angles = (cos, sin) if rotary_dim else None
    found = select(name, dtype).attention(meta).attend(layer, heads.flatten(1).clone(), angles, k, v)

    q, keys, values = heads.double().split([num_heads, 1, 1], 1)
    q, keys = (
        x if norm is None else F.rms_norm(x, (head_dim,), norm.offset + norm.weight.double(), norm.eps)
        for x, norm in zip((q, keys), norms, strict=True)
    )
    first, second = cos.double()[..., : rotary_dim // 2], sin.double()[..., rotary_dim // 2 :]
    sizes = [rotary_dim // 2, rotary_dim // 2, head_dim - rotary_dim]
    q, keys = (
        torch.cat([low * first - high * second, high * first + low * second, rest], -1)
        for low, high, rest in (q.split(sizes, -1), keys.split(sizes, -1))
    )
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(k[1, :, 0].double(), keys[:16, 0], rtol=tolerance, atol=tolerance)
    assert torch.equal(v[0].flip(0)[:5, 0].double(), values[16:, 0])
    case = Case([(num_tokens, num_tokens)], 16, q, [keys], [values])
    expected = expected_attention(case, layer.scale).flatten(1)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_nan_of_a_key_or_value_reaches_those_who_see_it_and_nobody_else(
    kind: tuple[Kernels, torch.dtype, int], softcap: float | None
) -> None:
    kernels, dtype, head_dim = kind
    case = make_case([(100, 1), (80, 1)], head_dim=head_dim, dtype=dtype)
    for part in (case.keys, case.values):
        part[1][70, 0, 3] = math.nan
        found = run(kernels, case, "±", softcap=softcap)
        assert not found[0].isnan().any()
        assert found[1, 0].isnan().any()  # the head that reads it
        assert not found[1, 1].isnan().any()
        part[1][70, 0, 3] = 0.0


steps_of_sequences = st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    past_and_new=steps_of_sequences,
    group=st.sampled_from([1, 2, 3]),
    window=st.sampled_from([None, 3, 20]),
    softcap=st.sampled_from([None, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_step_is_right_and_bit_equal_in_all_directions(
    kind: tuple[Kernels, torch.dtype, int],
    past_and_new: list[tuple[int, int]],
    group: int,
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    kernels, dtype, _ = kind
    case = make_case([(past + new, new) for past, new in past_and_new], group=group, head_dim=32, dtype=dtype)
    forward = run(kernels, case, "+", window=window, softcap=softcap)
    assert_right(forward, case, window=window, softcap=softcap)
    for directions in ("-", "±", "shared"):
        assert torch.equal(run(kernels, case, directions, window=window, softcap=softcap, seed=seed), forward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    past_and_new=st.lists(
        st.tuples(st.one_of(st.integers(0, 150), st.integers(450, 1100)), st.integers(1, 40)), min_size=1, max_size=6
    ),
    window=st.sampled_from([None, 3, 70, 600]),
    softcap=st.sampled_from([None, 1.0]),
    chosen=st.integers(0, 5),
    part=st.integers(1, 40),
)
def test_tokens_are_bit_equal_alone_in_any_batch_and_in_any_chunk(
    cpu_kernels: Callable[..., CpuKernels],
    dtype: torch.dtype,
    past_and_new: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    chosen: int,
    part: int,
) -> None:
    kernels = cpu_kernels(dtype)
    together = make_case([(past + new, new) for past, new in past_and_new], group=3, head_dim=32, dtype=dtype)
    chosen %= len(together.lengths)
    length, num_new = together.lengths[chosen]
    first = sum(n for _, n in together.lengths[:chosen])
    expected = run(kernels, together, "+", window=window, softcap=softcap)[first : first + num_new]
    keys, values = together.keys[chosen], together.values[chosen]
    for start in range(0, num_new, part):
        stop = min(start + part, num_new)
        end = length - num_new + stop
        queries = together.queries[first + start : first + stop]
        alone = Case([(end, stop - start)], together.block_size, queries, [keys[:end]], [values[:end]])
        assert torch.equal(run(kernels, alone, "-", window=window, softcap=softcap), expected[start:stop])


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
