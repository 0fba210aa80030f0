"""Everything that crosses the border between the router and the ranks, and the check that it is well formed.

MessagePack over ZeroMQ, one message a frame. Each message is a tagged array `[tag, generation, ...]` whose
fields carry their bounds, so a frame that decodes is a frame that may be used. Nothing here is executable:
no pickle, no class names, no callables. Torch-free: the router imports this module.

The router binds one ROUTER socket; each rank connects DEALER sockets whose identity says who is speaking
(`Identity`). Every message repeats the generation of the tensor-parallel group: a group that was restarted has
a new one, and frames of an older one are dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, Struct, field

PROTOCOL_VERSION: Final = 5
#: No honest frame comes near this: a prompt of a million tokens is 5 MB.
MAX_FRAME_BYTES: Final = 32 * 1024 * 1024
#: Most entries of a list of likely tokens: of a generated token, whatever ties, and of a prompt's. A token of a prompt
#: is told in a frame with all others of the step, so 20 keep steps of 100,000 tokens within a frame.
MAX_TOP_TOKENS: Final = 128
MAX_PROMPT_TOP_TOKENS: Final = 20
#: Most tokens that a rank may guess beyond one token of a sequence: few texts repeat themselves for longer.
MAX_SPECULATIVE_TOKENS: Final = 16
#: Most tokens that one request may bias.
MAX_BIASED_TOKENS: Final = 1024
#: So that a plan that brings every sequence of a step anew, each with a grammar, is an honest frame.
MAX_GRAMMAR_BYTES: Final = 64 * 1024
#: Compiled grammars that a rank keeps: TGI's number. The router remembers the verdicts on as many, so what comes to a
#: rank quickly is compiled there already, and what is not was just compiled to be vetted, which took as long.
NUM_COMPILED_GRAMMARS: Final = 32

Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Counter: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Bytes: TypeAlias = Annotated[int, Meta(ge=0, le=2**53)]
Rank: TypeAlias = Annotated[int, Meta(ge=0, le=1023)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
#: Signed entry of a block table; see `bros_shard.block_layout`.
Entry: TypeAlias = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
#: MessagePack carries infinities; the upper bound keeps them, and NaN, out.
Seconds: TypeAlias = Annotated[float, Meta(ge=0.0, le=1e9)]
Logprob: TypeAlias = Annotated[float, Meta(ge=-1e30, le=1e30)]
#: A token that might have been, and its log-probability.
RankedToken: TypeAlias = tuple[TokenId, Logprob]
Name: TypeAlias = Annotated[str, Meta(max_length=1024)]
Reason: TypeAlias = Annotated[str, Meta(max_length=65536)]


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What every frame begins with, after its tag."""

    generation: Count


class Part(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A value inside a message."""


# --- router -> ranks ---------------------------------------------------------------------------------------


class Watermark(Part, frozen=True):
    """How generated text is marked: see `bros_shard.sampling.watermark`."""

    #: Share of the vocabulary that is green behind each token.
    gamma: Annotated[float, Meta(gt=0.0, le=1.0)]
    #: What is added to the logits of green tokens.
    delta: Annotated[float, Meta(ge=-100.0, le=100.0)]


class SamplingParams(Part, frozen=True):
    """How the next token of one sequence is chosen. The defaults are neutral: greedy, nothing applied.

    The stages run in TGI's order: watermark, repetition penalty, frequency penalty, temperature, top-k, top-p,
    typical-p. OpenAI's stand among them: the bias before the rest, its own penalty after TGI's.
    """

    do_sample: bool = False
    temperature: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0
    top_k: Count = 0  # 0: off
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0  # 1.0: off
    typical_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0  # 1.0: off
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=1e6)] = 1.0  # 1.0: off
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0  # 0.0: off
    #: Key of the counter-based generator; any unsigned 64-bit value. Unused when greedy.
    seed: Annotated[int, Meta(ge=0)] = 0
    #: Mark the text.
    watermark: Watermark | None = None
    #: OpenAI's: what is taken from the logits of tokens that were generated before. 0.0: off
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    #: OpenAI's: what is added to the logits of some tokens, each at most once.
    logit_bias: Annotated[
        list[tuple[TokenId, Annotated[float, Meta(ge=-100.0, le=100.0)]]], Meta(max_length=MAX_BIASED_TOKENS)
    ] = field(default_factory=list)
    #: With each token, tell so many of the likeliest ones, and those that tie with the last of them. 0: none
    num_top_tokens: Annotated[int, Meta(ge=0, le=MAX_TOP_TOKENS)] = 0


class NewSequence(Part, frozen=True):
    """A sequence the ranks have not seen: every token known so far, and how to choose the next."""

    sequence_id: Counter
    #: Prompt, then (after a restart) what was generated before. Never empty.
    token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=2**22)]
    #: How many tokens the sequence may ever hold, `token_ids` included.
    max_total_tokens: Positive
    sampling: SamplingParams
    #: How many of the last of `token_ids` were generated: the others are the prompt.
    num_generated_tokens: Count = 0
    #: Tell the log-probabilities of the prompt's tokens, with so many of the likeliest ones; `None`: do not.
    num_prompt_top_tokens: Annotated[int, Meta(ge=0, le=MAX_PROMPT_TOP_TOKENS)] | None = None
    #: What the generated text must match (`bros_shard.grammar_compiler`); `None`: anything.
    grammar: Annotated[str, Meta(max_length=MAX_GRAMMAR_BYTES)] | None = None
    #: Which of the model's adapters its tokens go through, counted from 0; `None`: none.
    adapter: Count | None = None


class SequenceStep(Part, frozen=True):
    """One sequence's share of a step: run tokens [num_computed_tokens, num_computed_tokens + num_tokens).

    The block table travels as a difference: entries from `first_changed_index` on are replaced by `entries`.
    The rank samples a next token if and only if the run ends at the last token that the rank knows.

    Beyond that token it may guess some, run them too, and keep those that sampling confirms (`bros_shard.speculation`).
    A router that plans the next step before it has heard how many these are, gives the least: what the rank kept, the
    next run begins later by.
    """

    sequence_id: Counter
    num_computed_tokens: Count
    num_tokens: Positive
    first_changed_index: Count
    entries: Annotated[list[Entry], Meta(max_length=2**20)]
    #: Most tokens to guess.
    max_speculative_tokens: Annotated[int, Meta(ge=0, le=MAX_SPECULATIVE_TOKENS)] = 0
    #: By so many tokens at most the run begins later than `num_computed_tokens` says.
    num_uncertain_tokens: Count = 0


class TailMove(Part, frozen=True):
    """Copy the first `num_tokens` logical tokens of one block-table entry's block to another's, in every layer."""

    source_entry: Entry
    destination_entry: Entry
    num_tokens: Positive


class HostCopy(Part, frozen=True):
    """Copy the first `num_tokens` logical tokens between an entry's block and a block of the host pool.

    Host blocks hold tokens in logical order, so what left a reversed block may return to a forward one.
    """

    entry: Entry
    host_block: Count
    num_tokens: Positive


class StepPlan(Message, frozen=True, tag="plan"):
    """One step, as the scheduler planned it. Every rank of a group receives the same plans in the same order.

    Executed in this order: releases, new sequences, host copies out, tail moves, host copies in, forward pass.
    """

    step_id: Counter
    sequences: Annotated[list[SequenceStep], Meta(max_length=65536)] = field(default_factory=list)
    new_sequences: Annotated[list[NewSequence], Meta(max_length=65536)] = field(default_factory=list)
    #: Sequences that ended: their tokens and penalty state may be forgotten.
    releases: Annotated[list[Counter], Meta(max_length=2**20)] = field(default_factory=list)
    copies_out: Annotated[list[HostCopy], Meta(max_length=2**20)] = field(default_factory=list)
    tail_moves: Annotated[list[TailMove], Meta(max_length=2**20)] = field(default_factory=list)
    copies_in: Annotated[list[HostCopy], Meta(max_length=2**20)] = field(default_factory=list)
    #: Run it between two layers of the step that runs when it comes, if one does. It has new sequences only, and
    #: touches nothing that that step reads or writes.
    is_interruption: bool = False


class Shutdown(Message, frozen=True, tag="shutdown"):
    """Router to ranks: end now, with exit status 0."""


# --- ranks -> router ---------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """A rank has loaded its slice, owns its KV region and is ready for step 0."""

    protocol_version: Count
    rank: Rank
    world_size: Annotated[int, Meta(ge=1, le=1024)]
    model_id: Name
    model_sha: Name | None
    dtype: Name
    #: Name of the device, as TGI's `x-compute-type` shows it.
    device: Name
    vocab_size: Positive
    #: Most tokens a sequence of this model may hold.
    max_length: Positive
    num_blocks: Positive
    block_size: Positive
    num_host_blocks: Count
    #: Bytes of one block, all layers, keys and values, on this rank.
    block_bytes: Bytes
    #: Whether the rank runs interruptions (`StepPlan.is_interruption`) while another step runs.
    can_interrupt: bool


class StepShape(Part, frozen=True):
    """The features of a step that its time depends on. A sequence that brings one token decodes, whatever it is."""

    num_prefill_tokens: Count = 0
    num_prefill_sequences: Count = 0
    num_decode_sequences: Count = 0
    #: Sum over prefill chunks of chunk * (past + chunk / 2): the attention work of prefill.
    prefill_attention: Annotated[float, Meta(ge=0.0, le=1e18)] = 0.0
    #: Sum of the decode sequences' context lengths, the step's own tokens included.
    decode_context_tokens: Count = 0
    #: Tokens whose keys and values are copied from or to the host pool.
    num_copied_tokens: Count = 0

    def with_sequence(self, num_computed_tokens: int, num_tokens: int) -> StepShape:
        """The shape with one more sequence in the step."""
        if num_tokens == 1:
            return StepShape(
                self.num_prefill_tokens,
                self.num_prefill_sequences,
                self.num_decode_sequences + 1,
                self.prefill_attention,
                self.decode_context_tokens + num_computed_tokens + 1,
                self.num_copied_tokens,
            )
        return StepShape(
            self.num_prefill_tokens + num_tokens,
            self.num_prefill_sequences + 1,
            self.num_decode_sequences,
            self.prefill_attention + num_tokens * (num_computed_tokens + num_tokens / 2),
            self.decode_context_tokens,
            self.num_copied_tokens,
        )

    def without_decode(self, num_computed_tokens: int) -> StepShape:
        """The shape without a sequence of so many computed tokens that decodes."""
        return StepShape(
            self.num_prefill_tokens,
            self.num_prefill_sequences,
            self.num_decode_sequences - 1,
            self.prefill_attention,
            self.decode_context_tokens - num_computed_tokens - 1,
            self.num_copied_tokens,
        )

    def with_copies(self, num_tokens: int) -> StepShape:
        """The shape with `num_tokens` more tokens copied from or to the host pool."""
        return StepShape(
            self.num_prefill_tokens,
            self.num_prefill_sequences,
            self.num_decode_sequences,
            self.prefill_attention,
            self.decode_context_tokens,
            self.num_copied_tokens + num_tokens,
        )


def shape_of(plan: StepPlan) -> StepShape:
    """The features of a whole plan."""
    shape = StepShape(num_copied_tokens=sum(copy.num_tokens for copy in (*plan.copies_out, *plan.copies_in)))
    for step in plan.sequences:
        shape = shape.with_sequence(step.num_computed_tokens, step.num_tokens)
    return shape


class Profile(Message, frozen=True, tag="profile"):
    """Rank 0 measured these steps while warming up: (shape, seconds) pairs."""

    points: Annotated[list[tuple[StepShape, Seconds]], Meta(max_length=4096)]


class SampledToken(Part, frozen=True):
    """A token that was chosen."""

    token_id: TokenId
    #: log-softmax of the processed logits at `token_id`; `None` where that is not finite.
    logprob: Logprob | None = None
    #: The likeliest tokens in descending order, those without a finite log-probability left out. Empty: not asked for.
    top_tokens: Annotated[list[RankedToken], Meta(max_length=MAX_TOP_TOKENS)] = field(default_factory=list)


class SequenceResult(Part, frozen=True):
    """What a step gave one sequence: tokens, or a fault, or neither (a chunk that did not end the prompt)."""

    sequence_id: Counter
    #: One, and one more for each guess that was confirmed.
    tokens: Annotated[list[SampledToken], Meta(max_length=1 + MAX_SPECULATIVE_TOKENS)] = field(default_factory=list)
    fault: Reason | None = None
    #: How many tokens were guessed.
    num_speculative_tokens: Annotated[int, Meta(ge=0, le=MAX_SPECULATIVE_TOKENS)] = 0


class PromptLogprobs(Part, frozen=True):
    """What a step gave of a prompt whose log-probabilities are asked for. What is computed anew is told anew."""

    sequence_id: Counter
    #: Position in the prompt of the first token that this tells of. The prompt's first one follows nothing.
    first_position: Positive
    #: log-softmax of the model's logits at each token; `None` where that is not finite.
    logprobs: Annotated[list[Logprob | None], Meta(max_length=2**22)]
    #: For each of them, the likeliest tokens in descending order. Empty: none were asked for.
    top_tokens: Annotated[
        list[Annotated[list[RankedToken], Meta(max_length=MAX_PROMPT_TOP_TOKENS)]], Meta(max_length=2**22)
    ] = field(default_factory=list)


class StepResult(Message, frozen=True, tag="result"):
    """Rank 0 finished the step."""

    step_id: Counter
    sequences: Annotated[list[SequenceResult], Meta(max_length=65536)]
    forward_s: Seconds
    sampling_s: Seconds
    #: What the step's shape tells: from the plan's arrival on the rank to this result, but for interruptions and the
    #: log-probabilities of prompts.
    step_s: Seconds
    #: From the end of the previous step to this plan's arrival: the rank had nothing to do.
    idle_s: Seconds
    prompts: Annotated[list[PromptLogprobs], Meta(max_length=65536)] = field(default_factory=list)


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """The rank's process lives, and this is how far its steps have come."""

    #: Steps finished so far.
    num_finished_steps: Counter
    #: Time since the last step finished (or since the rank became ready).
    last_finished_age_s: Seconds
    is_step_running: bool
    resident_bytes: Bytes


class Progress(Message, frozen=True, tag="progress"):
    """How far start-up has come."""

    phase: Annotated[str, Meta(pattern="^(loading|warming)$")]
    num_done: Bytes
    num_total: Bytes


class Drain(Message, frozen=True, tag="drain"):
    """The rank was asked to end (SIGTERM from outside): finish what runs, then send `Shutdown`."""


class Fault(Message, frozen=True, tag="fault"):
    """The rank cannot go on: bad frame, gap in the steps, error in a step. The whole group is restarted."""

    reason: Reason


FromRouter: TypeAlias = StepPlan | Shutdown
FromRank: TypeAlias = Hello | Profile | StepResult | Heartbeat | Progress | Drain | Fault

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_from_router_decoder: msgspec.msgpack.Decoder[FromRouter] = msgspec.msgpack.Decoder(FromRouter)
_from_rank_decoder: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


class FrameError(Exception):
    """A frame is not a message of this protocol."""


def encode(message: Message) -> bytes:
    """One frame. Bounds are checked by the receiver."""
    return _encoder.encode(message)


def decode_from_router(frame: bytes | memoryview) -> FromRouter:
    """What the router said.

    Raises:
        FrameError: the frame is too large, not MessagePack, or not a message that a router sends.
    """
    return _decode(_from_router_decoder, frame)


def decode_from_rank(frame: bytes | memoryview) -> FromRank:
    """What a rank said.

    Raises:
        FrameError: the frame is too large, not MessagePack, or not a message that a rank sends.
    """
    return _decode(_from_rank_decoder, frame)


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes | memoryview) -> T:
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameError(f"frame of {len(frame)} bytes")
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrameError(str(error)) from None


_IDENTITY = re.compile(rb"([a-z0-9-]{1,32})/([0-9]{1,4})/([0-9]{1,9})/(steps|heartbeat)")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who is at the other end of a DEALER socket: `group/rank/generation/channel`.

    A rank speaks on two sockets, since a socket belongs to one thread: `steps` for the thread that runs them,
    `heartbeat` for the thread that no forward pass can hold up.
    """

    group: str
    rank: int
    generation: int
    channel: str = "steps"

    def encode(self) -> bytes:
        """The identity as ZeroMQ carries it."""
        return f"{self.group}/{self.rank}/{self.generation}/{self.channel}".encode()

    @classmethod
    def decode(cls, identity: bytes) -> Identity:
        """Raises `FrameError` where the bytes are not an identity."""
        match = _IDENTITY.fullmatch(identity)
        if match is None:
            raise FrameError("unknown identity")
        group, rank, generation, channel = match.groups()
        return cls(group.decode(), int(rank), int(generation), channel.decode())
