"""Guided decoding on rank 0: which tokens the grammar of a sequence allows next.

Two threads work beside the steps: one compiles grammars, one computes masks while the forward pass runs. A mask of a
sequence needs the tokens before it, all of which this rank has chosen, or was told of with the sequence: the router
need not know them, so that it may plan ahead.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import structlog
import torch
from llguidance import LLMatcher
from torch import Tensor

from bros_shard.grammar_compiler import GrammarCompiler, GrammarError, is_broken
from bros_shard.protocol import NUM_COMPILED_GRAMMARS, StepPlan

log = structlog.get_logger()


class GuidedSequences:
    """The live sequences that have a grammar, by id.

    All methods belong to the thread that runs steps; none of them waits.
    """

    def __init__(self, make_compiler: Callable[[], GrammarCompiler] | None) -> None:
        """`make_compiler` runs in a thread, at once; `None`: grammars are for another rank to follow."""
        self._guides: dict[int, _Guide] = {}
        self._grammars = None if make_compiler is None else _CompiledGrammars(make_compiler)
        self._mask_thread = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def apply(self, plan: StepPlan) -> None:
        """Take up the plan's releases and new sequences; compiling begins."""
        if self._grammars is None:
            return
        for sequence_id in plan.releases:
            self._guides.pop(sequence_id, None)
        for new in plan.new_sequences:
            if new.grammar is not None:
                generated = new.token_ids[len(new.token_ids) - new.num_generated_tokens :]
                self._guides[new.sequence_id] = _Guide(new.sequence_id, self._grammars.begin(new.grammar), generated)

    def begin_masks(self, sequence_ids: Sequence[int]) -> TokenMasks | None:
        """Begin to compute which tokens may come next; `None` where no grammar limits them.

        Args:
            sequence_ids: of the rows of the step's logits.
        """
        rows = [row for row, sequence_id in enumerate(sequence_ids) if sequence_id in self._guides]
        if not rows or self._grammars is None:
            return None
        guides = [self._guides[sequence_ids[row]] for row in rows]
        return TokenMasks(rows, self._mask_thread.submit(_masks, guides))

    def advance(self, sequence_id: int, token_id: int) -> None:
        """A token of the sequence was chosen, if it has a grammar: its next mask will follow it."""
        guide = self._guides.get(sequence_id)
        if guide is not None:
            guide.advance(token_id)


class TokenMasks:
    """The masks of one step's logits, while they are computed."""

    def __init__(self, rows: list[int], masks: Future[list[bytes | None]]) -> None:
        """`masks` are those of `rows`, in the form of `_Guide.mask`."""
        self._rows = rows
        self._masks = masks

    def apply(self, logits: Tensor) -> None:
        """Wait for the masks, and make tokens that are not allowed impossible, in place.

        Args:
            logits: (num_rows, vocab_size), any float type. A row whose grammar has failed becomes -inf everywhere.
        """
        num_tokens = logits.shape[-1]
        num_bytes = -(-num_tokens // 8)
        masks = b"".join(bytes(num_bytes) if mask is None else mask[:num_bytes] for mask in self._masks.result())
        bits = np.frombuffer(masks, dtype=np.uint8).reshape(-1, num_bytes)
        allowed = np.unpackbits(bits, axis=1, count=num_tokens, bitorder="little")
        forbidden = torch.from_numpy(allowed).to(logits.device) == 0
        index = torch.tensor(self._rows, device=logits.device)
        logits[index] = logits.index_select(0, index).masked_fill_(forbidden, -torch.inf)


class _Guide:
    """One sequence's place in its grammar. Read by the thread of the masks alone, but for `advance`."""

    def __init__(self, sequence_id: int, matcher: Future[LLMatcher], token_ids: list[int]) -> None:
        """`token_ids` were generated already."""
        self._sequence_id = sequence_id
        self._matcher = matcher
        #: Chosen since the matcher was last asked.
        self._new_token_ids = token_ids
        self._has_failed = False

    def advance(self, token_id: int) -> None:
        """The mask that was last begun was applied, and this token chosen."""
        self._new_token_ids.append(token_id)

    def mask(self) -> bytes | None:
        """A bit a token, the lowest bit first; `None` where the grammar has failed."""
        if self._has_failed:
            return None
        try:
            matcher = self._matcher.result()
            # Where it has stopped, only an end-of-sequence token can follow: what steps in flight choose is dropped.
            if self._new_token_ids and not matcher.is_stopped():
                matcher.consume_tokens(self._new_token_ids)
            self._new_token_ids = []
            mask = matcher.compute_bitmask()
            if not is_broken(matcher):
                return mask
            reason = matcher.get_error() or matcher.stop_reason()
        except GrammarError as error:
            reason = str(error)
        self._has_failed = True
        log.warning("grammar failed", sequence_id=self._sequence_id, reason=reason)
        return None


class _CompiledGrammars:
    """Compiles grammars, one after another, in a thread of its own; keeps those that were used last."""

    def __init__(self, make_compiler: Callable[[], GrammarCompiler]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiler = self._thread.submit(make_compiler)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def begin(self, grammar: str) -> Future[LLMatcher]:
        """A matcher of its own, at the beginning of the text. The future raises `GrammarError`."""
        return self._thread.submit(self._matcher, grammar)

    def _matcher(self, grammar: str) -> LLMatcher:
        matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            matcher = self._compiler.result().compile(grammar)
        self._compiled[grammar] = matcher
        if len(self._compiled) > NUM_COMPILED_GRAMMARS:
            self._compiled.popitem(last=False)
        return matcher.deep_copy()


def _masks(guides: list[_Guide]) -> list[bytes | None]:
    return [guide.mask() for guide in guides]
