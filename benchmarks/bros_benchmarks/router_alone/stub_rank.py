"""A rank without a model: it says a token for whatever wants one, at once. Everything around it is real."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Final

import bros_shard.server
from bros_benchmarks.router_alone.cores import leave_cores_of
from bros_shard.lifeline import die_with_parent
from bros_shard.options import ShardOptions
from bros_shard.protocol import SampledToken, SequenceResult, StepPlan, StepShape
from bros_shard.server import ShardServer
from bros_shard.worker import StepOutput

#: Of the demo model's vocabulary, words and pieces of words.
_FIRST_TOKEN: Final = 300
_NUM_TOKENS: Final = 1500


class StubWorker:
    """What `ShardServer` asks of a worker."""

    can_interrupt = False
    dtype_name = "float32"
    device_name = "cpu"
    vocab_size = 4096
    max_length = 1_000_000
    num_blocks = 100_000
    block_bytes = 1
    cache = SimpleNamespace(num_host_blocks=0)

    def __init__(self, options: ShardOptions, on_progress: Callable[[str, int, int], None]) -> None:
        #: By sequence: tokens that it has.
        self._lengths: dict[int, int] = {}

    def warm_up(self) -> list[tuple[StepShape, float]]:
        """As if it had been measured."""
        shapes = (StepShape(num_decode_sequences=1, decode_context_tokens=64), StepShape().with_sequence(0, 256))
        return [(shape, 0.0002) for shape in shapes]

    def execute(self, plan: StepPlan, between_layers: Callable[[], float]) -> StepOutput:
        """A token for each sequence whose known tokens are all computed."""
        for sequence_id in plan.releases:
            del self._lengths[sequence_id]
        for new in plan.new_sequences:
            self._lengths[new.sequence_id] = len(new.token_ids)
        results = []
        for step in plan.sequences:
            length = self._lengths[step.sequence_id]
            tokens = []
            if step.num_computed_tokens + step.num_tokens == length:
                tokens.append(SampledToken(_FIRST_TOKEN + 7919 * length % _NUM_TOKENS, -1.0))
                self._lengths[step.sequence_id] = length + 1
            results.append(SequenceResult(step.sequence_id, tokens))
        return StepOutput(results)


def main() -> None:
    """Run the rank, beside the router's core."""
    options = ShardOptions.from_argv(sys.argv[1:])
    die_with_parent()
    leave_cores_of(os.getppid())
    setattr(bros_shard.server, "Worker", StubWorker)  # noqa: B010
    sys.exit(ShardServer(options).run())


if __name__ == "__main__":
    main()
