"""When a real-time sequence needs its next token."""

from __future__ import annotations

from typing import Final

from bros_router.scheduling.sequence import Sequence

#: A sequence ahead of its pace may be left alone this long, in times per token: its reader must not see it stall.
_LONGEST_GAP: Final = 4.0
#: One behind its pace wants its tokens this often, in times per token, until it has caught up.
_CATCH_UP_GAP: Final = 0.5


def first_token_deadline_s(sequence: Sequence) -> float:
    """When the first token is due."""
    assert sequence.targets is not None
    return sequence.arrival_s + sequence.targets.ttft_s


def strict_deadline_s(sequence: Sequence, start_s: float) -> float:
    """When the next token is due if every gap counts: a time per token after the last one.

    Args:
        start_s: when the step will start; a token in flight is there by then.
    """
    assert sequence.targets is not None
    return _last_token_s(sequence, start_s) + sequence.targets.tpot_s


def paced_deadline_s(sequence: Sequence, start_s: float) -> float:
    """When the next token is due if the mean gap counts: token n + 1 is n times per token after the first.

    A lead that was earned may be spent, and what was lost is caught up. QoServe and Andes pace likewise; the two
    limits on a gap are our own.
    """
    assert sequence.targets is not None
    tpot_s = sequence.targets.tpot_s
    last_s = _last_token_s(sequence, start_s)
    first_s = start_s if sequence.first_token_s is None else sequence.first_token_s
    num_tokens = len(sequence.output_token_ids) + sequence.num_in_flight_tokens
    pace_s = first_s + num_tokens * tpot_s
    return min(max(pace_s, last_s + _CATCH_UP_GAP * tpot_s), last_s + _LONGEST_GAP * tpot_s)


def met_targets(sequence: Sequence) -> tuple[bool, bool]:
    """Whether the first token came in time, and the mean of the others; a sequence without tokens missed both."""
    targets = sequence.targets
    if targets is None or sequence.first_token_s is None or sequence.last_token_s is None:
        return False, False
    num_gaps = max(1, len(sequence.output_token_ids) - 1)
    mean_gap_s = (sequence.last_token_s - sequence.first_token_s) / num_gaps
    return sequence.first_token_s - sequence.arrival_s <= targets.ttft_s, mean_gap_s <= targets.tpot_s


def _last_token_s(sequence: Sequence, start_s: float) -> float:
    return start_s if sequence.num_in_flight_tokens or sequence.last_token_s is None else sequence.last_token_s
