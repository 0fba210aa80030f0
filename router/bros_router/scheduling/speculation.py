"""For which sequences of a step the ranks guess tokens, and how many: as far as that is predicted to pay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bros_router.scheduling.sequence import Sequence
    from bros_router.scheduling.step_draft import StepDraft

#: The share of guesses that are taken to be right before any was made. Optimistic, or none would be made.
_FIRST_SHARE: Final = 0.7
#: How much the latest guesses count.
_GAIN: Final = 0.2
#: How much is forgotten with each step without a guess: a text may begin to repeat itself at any time.
_FORGETTING: Final = 0.005


@dataclass(slots=True)
class GuessRecord:
    """How good the guesses were that the ranks made for one sequence."""

    #: How likely a guess is right whose predecessors were.
    share: float = _FIRST_SHARE
    #: So many were made the last time that some were allowed; `None`: there was no such time.
    num_last: int | None = None

    def note(self, num_guesses: int, num_confirmed: int) -> None:
        """A step for which guesses were allowed has run, and so many were made and right."""
        self.num_last = num_guesses
        if num_guesses:
            num_judged = min(num_guesses, num_confirmed + 1)
            self.share += _GAIN * (num_confirmed / num_judged - self.share)
        else:
            self.pass_by()

    def pass_by(self) -> None:
        """A step without a guess has run."""
        self.share += _FORGETTING * (_FIRST_SHARE - self.share)

    def num_expected(self, num_allowed: int) -> int:
        """How many guesses are to be expected where so many are allowed: as many as the last time."""
        return num_allowed if self.num_last is None else min(self.num_last, num_allowed)


class Speculation:
    """Allows guesses as long as each is expected to bring more tokens a second than the step does without it.

    A step that waits for memory computes a few more tokens for next to nothing, one that holds many sequences does not:
    guesses that are right half the time then cost more than they bring. The latency model knows which is which.
    """

    def __init__(self, max_tokens: int) -> None:
        """`max_tokens`: most guesses for a sequence in a step."""
        self._max_tokens = max_tokens

    def extend(self, draft: StepDraft) -> None:
        """Allow guesses in a step that is composed but for them."""
        decoding = [sequence for sequence, num_tokens in draft.chunks if _may_guess(sequence, num_tokens)]
        if not decoding:
            return
        decoding.sort(key=lambda sequence: sequence.guesses.share, reverse=True)
        outlook = _Outlook(draft, float(len(decoding)))
        for sequence in decoding:
            num_guesses = outlook.count(sequence, draft.most_guesses(sequence, self._max_tokens))
            if num_guesses:
                draft.speculate(sequence, num_guesses)


class _Outlook:
    """What a step is expected to bring, and how long it takes then, as more and more is guessed."""

    def __init__(self, draft: StepDraft, num_tokens: float) -> None:
        """`num_tokens`: what it brings for sure."""
        self._model = draft.latency_model
        self._left_s = draft.latest_end_s - draft.start_s
        self._shape = draft.shape
        self._num_tokens = num_tokens
        self._seconds = self._model.predict_s(self._shape)

    def count(self, sequence: Sequence, most: int) -> int:
        """How many guesses, `most` at most, are worth it for one more sequence; they count from now on."""
        without = self._shape.without_decode(sequence.num_computed_tokens)
        chance = 1.0
        for number in range(1, most + 1):
            chance *= sequence.guesses.share
            shape = without.with_sequence(sequence.num_computed_tokens, 1 + number)
            seconds = self._model.predict_s(shape)
            num_tokens = self._num_tokens + chance
            if num_tokens * self._seconds <= self._num_tokens * seconds or self._model.bound_s(shape) > self._left_s:
                return number - 1
            self._shape, self._num_tokens, self._seconds = shape, num_tokens, seconds
        return most


def _may_guess(sequence: Sequence, num_tokens: int) -> bool:
    """Whether the step chooses a token for a sequence of which it computes `num_tokens`, and may choose more.

    Guesses would have to be held against the grammar of a guided one before they are known to be right.
    """
    return num_tokens == 1 and sequence.is_decoding and sequence.grammar is None
