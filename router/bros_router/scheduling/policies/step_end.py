"""When a step must have ended."""

from __future__ import annotations

from typing import Final

from bros_router.scheduling.step_draft import StepDraft

#: Share of the time to a deadline that a step leaves unused.
GUARD: Final = 0.05
#: The same for best-effort work beside a prompt whose first token is due. A step that is filled up to a deadline misses
#: it one time in twenty, since that is what its predicted end is worth, and when it starts is uncertain too; filling it
#: less costs nothing, for few steps hold such a prompt.
_FIRST_TOKEN_GUARD: Final = 0.3


class StepEnd:
    """For the sake of the decodes in a step, and of the prompts in it or next in line; best-effort work keeps more
    distance from the first tokens of these."""

    def __init__(self, decodes_s: float) -> None:
        """`decodes_s`: when it must have ended for the decodes."""
        self.for_all_s = self.for_best_effort_s = decodes_s

    def note_prompt(self, draft: StepDraft, deadline_s: float) -> None:
        """A prompt is in the step, or next in line: the step must have ended by `deadline_s` for its sake.

        A deadline that cannot be kept would only keep others out, so it does not count.
        """
        left_s = deadline_s - draft.start_s
        if draft.end_s > draft.start_s + (1.0 - GUARD) * left_s:
            return
        self.for_all_s = min(self.for_all_s, draft.start_s + (1.0 - GUARD) * left_s)
        careful_s = max(draft.end_s, draft.start_s + (1.0 - _FIRST_TOKEN_GUARD) * left_s)
        self.for_best_effort_s = min(self.for_best_effort_s, careful_s)
