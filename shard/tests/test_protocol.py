"""The wire: plain MessagePack, bounded in every field, closed to everything else."""

import contextlib
import math

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bros_shard.protocol import (
    MAX_FRAME_BYTES,
    Drain,
    Fault,
    FrameError,
    FromRank,
    FromRouter,
    Heartbeat,
    Hello,
    HostCopy,
    Identity,
    NewSequence,
    Profile,
    Progress,
    PromptLogprobs,
    SampledToken,
    SamplingParams,
    SequenceResult,
    SequenceStep,
    Shutdown,
    StepPlan,
    StepResult,
    StepShape,
    TailMove,
    Watermark,
    decode_from_rank,
    decode_from_router,
    encode,
)

HELLO = Hello(3, 1, 0, 2, "demo", "abc", "bfloat16", "cpu", 4096, 2048, 100, 64, 0, 65536, True)
RESULT = StepResult(
    3,
    9,
    [
        SequenceResult(1, [SampledToken(17, -0.25, [(17, -0.25), (4, -3.0)]), SampledToken(4)], None, 3),
        SequenceResult(2, fault="nan"),
    ],
    0.01,
    0.002,
    0.013,
    0.0,
    [PromptLogprobs(1, 64, [-1.5, None], [[(8, -0.5)], []])],
)

#: Every message, and the plain values that any MessagePack reader must see in its frame.
MESSAGES: list[tuple[FromRouter | FromRank, list]] = [
    (
        StepPlan(
            3,
            9,
            [SequenceStep(1, 64, 1, 1, [-3], 3, 5)],
            [
                NewSequence(2, [5, 6], 40, SamplingParams(True, 0.7, 50, 0.9, 1.0, 1.1, 0.5, 2**64 - 1)),
                NewSequence(
                    3,
                    [5, 6],
                    40,
                    SamplingParams(
                        watermark=Watermark(0.5, 2.0), presence_penalty=1.0, logit_bias=[(7, -100.0)], num_top_tokens=5
                    ),
                    num_generated_tokens=1,
                    num_prompt_top_tokens=0,
                    grammar="{}",
                    adapter=1,
                ),
            ],
            [7],
            [HostCopy(-2, 4, 16)],
            [TailMove(-5, -6, 3)],
            [HostCopy(1, 4, 16)],
            True,
        ),
        [
            "plan",
            3,
            9,
            [[1, 64, 1, 1, [-3], 3, 5]],
            [
                [2, [5, 6], 40, [True, 0.7, 50, 0.9, 1.0, 1.1, 0.5, 2**64 - 1, None, 0.0, [], 0], 0, None, None, None],
                [
                    3,
                    [5, 6],
                    40,
                    [False, 1.0, 0, 1.0, 1.0, 1.0, 0.0, 0, [0.5, 2.0], 1.0, [[7, -100.0]], 5],
                    1,
                    0,
                    "{}",
                    1,
                ],
            ],
            [7],
            [[-2, 4, 16]],
            [[-5, -6, 3]],
            [[1, 4, 16]],
            True,
        ],
    ),
    (Shutdown(3), ["shutdown", 3]),
    (HELLO, ["hello", 3, 1, 0, 2, "demo", "abc", "bfloat16", "cpu", 4096, 2048, 100, 64, 0, 65536, True]),
    (
        Profile(3, [(StepShape(512, 1, 4, 131072.0, 900, 64), 0.25)]),
        ["profile", 3, [[[512, 1, 4, 131072.0, 900, 64], 0.25]]],
    ),
    (
        RESULT,
        [
            "result",
            3,
            9,
            [[1, [[17, -0.25, [[17, -0.25], [4, -3.0]]], [4, None, []]], None, 3], [2, [], "nan", 0]],
            0.01,
            0.002,
            0.013,
            0.0,
            [[1, 64, [-1.5, None], [[[8, -0.5]], []]]],
        ],
    ),
    (Heartbeat(3, 10, 0.5, True, 1 << 30), ["heartbeat", 3, 10, 0.5, True, 1073741824]),
    (Progress(3, "loading", 5, 10), ["progress", 3, "loading", 5, 10]),
    (Drain(3), ["drain", 3]),
    (Fault(3, "OutOfMemoryError"), ["fault", 3, "OutOfMemoryError"]),
]


def decode(message: FromRouter | FromRank, frame: bytes) -> FromRouter | FromRank:
    return (decode_from_router if isinstance(message, StepPlan | Shutdown) else decode_from_rank)(frame)


@pytest.mark.parametrize(("message", "plain"), MESSAGES, ids=lambda value: type(value).__name__)
def test_message_is_plain_messagepack_and_round_trips(message, plain):
    frame = encode(message)
    assert msgpack.unpackb(frame, strict_map_key=True) == plain
    assert decode(message, frame) == message
    assert decode(message, msgpack.packb(plain)) == message


def test_table_covers_every_message():
    tagged = {type(message) for message, _ in MESSAGES}
    assert tagged == set(FromRouter.__args__) | set(FromRank.__args__)


@pytest.mark.parametrize(("message", "plain"), MESSAGES, ids=lambda value: type(value).__name__)
def test_truncated_frame_is_refused(message, plain):
    frame = encode(message)
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode(message, frame[:length])
    with pytest.raises(FrameError):
        decode(message, frame + b"\0")


def test_messages_of_the_other_direction_are_refused():
    with pytest.raises(FrameError):
        decode_from_router(encode(RESULT))
    with pytest.raises(FrameError):
        decode_from_rank(encode(Shutdown(3)))


@pytest.mark.parametrize(
    "message",
    [
        Shutdown(-1),
        StepPlan(0, -1),
        StepPlan(0, 0, [SequenceStep(0, 0, 0, 0, [])]),
        StepPlan(0, 0, [SequenceStep(0, 0, 1, 0, [2**31])]),
        StepPlan(0, 0, [SequenceStep(0, 0, 1, 0, [], 17)]),
        StepPlan(0, 0, [], [NewSequence(0, [], 1, SamplingParams())]),
        StepPlan(0, 0, [], [NewSequence(0, [-1], 1, SamplingParams())]),
        *(
            StepPlan(0, 0, [], [NewSequence(0, [1], 1, SamplingParams(temperature=value))])
            for value in (0.0, -1.0, math.nan, math.inf, 1e308)
        ),
        StepPlan(0, 0, [], [NewSequence(0, [1], 1, SamplingParams(), grammar="x" * 65537)]),
        StepPlan(0, 0, [], [NewSequence(0, [1], 1, SamplingParams(), -1)]),
        *(StepPlan(0, 0, [], [NewSequence(0, [1], 1, SamplingParams(top_p=value))]) for value in (0.0, 1.5, math.nan)),
        StepPlan(0, 0, [], [NewSequence(0, [1], 1, SamplingParams(frequency_penalty=math.nan))]),
        StepPlan(0, 0, [], [NewSequence(0, [1], 1, SamplingParams(logit_bias=[(1, math.inf)]))]),
        StepPlan(0, 0, [], [NewSequence(0, [1], 1, SamplingParams(watermark=Watermark(0.0, 1.0)))]),
        StepPlan(0, 0, [], [NewSequence(0, [1], 1, SamplingParams(num_top_tokens=129))]),
    ],
)
def test_value_out_of_bounds_from_the_router_is_refused(message):
    with pytest.raises(FrameError):
        decode_from_router(encode(message))


@pytest.mark.parametrize(
    "message",
    [
        StepResult(0, 0, [SequenceResult(0, [SampledToken(2**31)])], 0.0, 0.0, 0.0, 0.0),
        StepResult(0, 0, [SequenceResult(0, [SampledToken(1, math.nan)])], 0.0, 0.0, 0.0, 0.0),
        StepResult(0, 0, [SequenceResult(0, [SampledToken(1, -1.0, [(1, -math.inf)])])], 0.0, 0.0, 0.0, 0.0),
        StepResult(0, 0, [SequenceResult(0, [SampledToken(1, -1.0, [(1, -1.0)] * 129)])], 0.0, 0.0, 0.0, 0.0),
        StepResult(0, 0, [SequenceResult(0, [SampledToken(1)] * 18)], 0.0, 0.0, 0.0, 0.0),
        StepResult(0, 0, [SequenceResult(0, num_speculative_tokens=17)], 0.0, 0.0, 0.0, 0.0),
        StepResult(0, 0, [], 0.0, 0.0, 0.0, 0.0, [PromptLogprobs(0, 0, [-1.0])]),
        StepResult(0, 0, [], math.inf, 0.0, 0.0, 0.0),
        StepResult(0, 0, [], 0.0, 0.0, -1.0, 0.0),
        Progress(0, "exploding", 0, 1),
        Fault(0, "x" * 65537),
        Heartbeat(0, 0, 0.0, True, 2**60),
    ],
)
def test_value_out_of_bounds_from_a_rank_is_refused(message):
    with pytest.raises(FrameError):
        decode_from_rank(encode(message))


def test_oversized_frame_is_refused_before_it_is_read():
    with pytest.raises(FrameError, match="bytes"):
        decode_from_rank(bytes(MAX_FRAME_BYTES + 1))


def test_deep_nesting_is_refused():
    with pytest.raises(FrameError):
        decode_from_rank(b"\x91" * 100_000)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(frame):
    for decoder in (decode_from_rank, decode_from_router):
        with contextlib.suppress(FrameError):
            assert isinstance(decoder(frame), msgspec.Struct)


@given(st.integers(0, len(MESSAGES) - 1), st.data())
def test_flipped_bytes_decode_or_are_refused(index, data):
    message = MESSAGES[index][0]
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FrameError):
        decode(message, bytes(frame))


@given(
    st.from_regex(r"[a-z0-9-]{1,32}", fullmatch=True),
    st.integers(0, 9999),
    st.integers(0, 999_999_999),
    st.sampled_from(["steps", "heartbeat"]),
)
def test_identity_round_trips(group, rank, generation, channel):
    identity = Identity(group, rank, generation, channel)
    assert Identity.decode(identity.encode()) == identity


@pytest.mark.parametrize("identity", [b"", b"g0", b"g0/1/2", b"g0/x/2/steps", b"g0/1/2/other", b"\0\0\0\0\1"])
def test_foreign_identity_is_refused(identity):
    with pytest.raises(FrameError):
        Identity.decode(identity)
