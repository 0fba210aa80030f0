"""Vets grammars: the router's side of the grammar helper."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from bros_router.grammars.protocol import MAX_REPLY_BYTES, GrammarSource, Refused, VetReply
from bros_router.helper.frame import to_frame
from bros_router.helper.process import HelperError, HelperProcess
from bros_shard.protocol import NUM_COMPILED_GRAMMARS

_HELPER: Final = "bros_router.grammars.helper"

_reply_decoder: msgspec.json.Decoder[VetReply] = msgspec.json.Decoder(VetReply)


@dataclass(frozen=True, slots=True)
class GuidedVocabulary:
    """What grammars are compiled for: the arguments of `bros_shard.grammar_compiler.GrammarCompiler`."""

    #: A `tokenizer.json`.
    tokenizer: Path
    vocab_size: int
    #: Not empty: without them no grammar could end a reply.
    eos_token_ids: Collection[int]

    def arguments(self) -> tuple[str, str, str]:
        """As command-line arguments of the helper."""
        return str(self.tokenizer), str(self.vocab_size), ",".join(map(str, sorted(self.eos_token_ids)))


class GrammarVetter:
    """Vets grammars in a helper process, which is started by the first one: one grammar after another.

    All methods belong to the event loop's thread (`HelperProcess`).
    """

    def __init__(self) -> None:
        self._helper: HelperProcess[VetReply] | None = None
        self._remembered: OrderedDict[bytes, VetReply] = OrderedDict()

    async def vet(self, source: GrammarSource, vocabulary: GuidedVocabulary) -> VetReply:
        """The grammar as ranks take it, or why there is none. Always for the same vocabulary.

        Raises:
            OverloadedError: too many grammars wait for the helper.
        """
        try:
            frame = to_frame(source)
        except UnicodeEncodeError:
            return Refused("invalid", "it is not Unicode")
        key = hashlib.sha256(frame).digest()
        reply = self._remembered.pop(key, None)
        if reply is None:
            try:
                reply = await self._running_helper(vocabulary).ask(frame)
            except HelperError as error:
                if not error.took_too_long:  # the next attempt may succeed
                    return Refused("uncompilable", "it takes too much memory")
                reply = Refused("uncompilable", "it takes too long")
        self._remembered[key] = reply
        if len(self._remembered) > NUM_COMPILED_GRAMMARS:
            self._remembered.popitem(last=False)
        return reply

    async def close(self) -> None:
        """End the helper. Grammars that wait for it are given up."""
        if self._helper is not None:
            await self._helper.close()

    def _running_helper(self, vocabulary: GuidedVocabulary) -> HelperProcess[VetReply]:
        if self._helper is None:
            self._helper = HelperProcess(
                _HELPER, vocabulary.arguments(), decoder=_reply_decoder, max_reply_bytes=MAX_REPLY_BYTES
            )
        return self._helper
