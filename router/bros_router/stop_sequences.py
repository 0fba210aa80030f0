"""When a reply ends because of its text, and what of its text is shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from bros_router.request import FinishReason


class StopRule(Protocol):
    """Watches one reply, token by token."""

    def take(self, text: str, *, is_special: bool) -> str:
        """Take in a token's text, which may be empty. Returns what the reply that is shown grows by."""
        ...

    def judge(self, reason: FinishReason | None) -> FinishReason | None:
        """Why the reply ends with the token just taken, if it does; `reason` is why it does whatever its text is."""
        ...

    def rest(self) -> str:
        """The reply has ended: what was held back of the text that is shown."""
        ...


class TgiStopRule:
    """TGI's rule: a stop sequence counts where it ends exactly at the end of a token's text, and stays in the reply.

    One newline behind it is allowed (TGI searches for the escaped sequence followed by `$`). The empty sequence
    matches at the first token.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._endings = tuple(ending for sequence in sequences for ending in (sequence, sequence + "\n"))
        self._tail = ""
        self._num_tail_characters = max((len(ending) for ending in self._endings), default=0)
        self._is_reached = False

    def take(self, text: str, *, is_special: bool) -> str:
        """As `StopRule`. Special tokens are not shown; a sequence may consist of them all the same."""
        if self._endings:
            self._tail = (self._tail + text)[-self._num_tail_characters :]
            self._is_reached = self._tail.endswith(self._endings)
        return "" if is_special else text

    def judge(self, reason: FinishReason | None) -> FinishReason | None:
        """As `StopRule`: length and end of sequence go before a stop sequence, as in TGI."""
        return reason or (FinishReason.STOP_SEQUENCE if self._is_reached else None)

    def rest(self) -> str:
        """As `StopRule`: nothing was held back."""
        return ""


class CuttingStopRule:
    """OpenAI's rule: the reply ends where a stop sequence begins, wherever tokens begin and end.

    So text that may be the beginning of one is held back until it is known not to be:

        shown | held: some sequence begins like this |  <- next token

    Sequences are searched for in the text with special tokens, which is shown without them. None may be empty.
    """

    def __init__(self, sequences: Sequence[str]) -> None:
        self._prefixes = [_Prefix(sequence) for sequence in sequences]
        #: What is held, in order: text, and whether it is to be shown.
        self._held: deque[tuple[str, bool]] = deque()
        self._num_held = 0
        self._is_reached = False

    def take(self, text: str, *, is_special: bool) -> str:
        """As `StopRule`. Text behind the end of a stop sequence is dropped with it."""
        if not self._prefixes:
            return "" if is_special else text
        num_taken = 0
        while num_taken < len(text) and not self._is_reached:
            for prefix in self._prefixes:
                prefix.advance(text[num_taken])
            num_taken += 1
            self._is_reached = any(prefix.is_complete for prefix in self._prefixes)
        if num_taken:
            self._held.append((text[:num_taken], not is_special))
            self._num_held += num_taken
        # Of sequences that end together, the longest counts: it began first.
        num_matched = max(p.num_matched for p in self._prefixes if p.is_complete or not self._is_reached)
        shown = self._release(self._num_held - num_matched)
        if self._is_reached:
            self._held.clear()
        return shown

    def judge(self, reason: FinishReason | None) -> FinishReason | None:
        """As `StopRule`: text that was cut is told by the reason, whatever else ends the reply."""
        return FinishReason.STOP_SEQUENCE if self._is_reached else reason

    def rest(self) -> str:
        """As `StopRule`: no sequence followed what begins like one."""
        return "".join(text for text, is_shown in self._held if is_shown)

    def _release(self, num_characters: int) -> str:
        """Take the first `num_characters` of what is held; of these, what is shown."""
        self._num_held -= num_characters
        released = []
        while num_characters > 0:
            text, is_shown = self._held.popleft()
            if len(text) > num_characters:
                self._held.appendleft((text[num_characters:], is_shown))
            if is_shown:
                released.append(text[:num_characters])
            num_characters -= len(text)
        return "".join(released)


class _Prefix:
    """How much of the beginning of one sequence a growing text ends with.

    The algorithm of Knuth, Morris and Pratt. Its table grows with what was matched, so neither a long sequence nor a
    malicious one costs more than the text does.
    """

    def __init__(self, sequence: str) -> None:
        self._sequence = sequence
        #: For each length that was matched so far, less one: the longest shorter one that it ends with.
        self._fallbacks = [0]
        self.num_matched = 0

    @property
    def is_complete(self) -> bool:
        """Whether the text ends with the whole sequence."""
        return self.num_matched == len(self._sequence)

    def advance(self, character: str) -> None:
        """The text grows by a character. Not to be called once the sequence is complete."""
        self.num_matched = self._extended(self.num_matched, character)
        if self.num_matched > len(self._fallbacks):
            self._fallbacks.append(self._extended(self._fallbacks[-1], character))

    def _extended(self, num_matched: int, character: str) -> int:
        """The longest beginning of the sequence that `num_matched` of it and `character` end with."""
        while num_matched and self._sequence[num_matched] != character:
            num_matched = self._fallbacks[num_matched - 1]
        return num_matched + (self._sequence[num_matched] == character)


def stop_rule(sequences: Sequence[str], *, cuts: bool) -> StopRule:
    """The rule of one reply. `cuts`: OpenAI's, else TGI's."""
    return CuttingStopRule(sequences) if cuts else TgiStopRule(sequences)
