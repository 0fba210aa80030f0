"""The steps of a simulated replica: when they ran, how well they were predicted, and what planning them cost."""

from __future__ import annotations

from array import array
from bisect import bisect_left

import numpy as np


class StepLog:
    """One entry a step, as they were planned: in order, but for those that interrupt others.

    Simulated seconds, `planning_s` apart.
    """

    def __init__(self) -> None:
        self.start_s = array("d")
        self.seconds = array("d")
        #: As the scheduler's model had it before the step.
        self.predicted_s = array("d")
        self.num_sequences = array("l")
        self.num_tokens = array("l")
        #: Share of the KV region that real-time sequences held when the step was planned, 0 to 1.
        self.rt_kv_share = array("d")
        #: *Real* seconds that planning the step and committing it took: what the scheduler costs.
        self.planning_s = array("d")

    def __len__(self) -> int:
        return len(self.start_s)

    def add(
        self,
        start_s: float,
        seconds: float,
        predicted_s: float,
        num_sequences: int,
        num_tokens: int,
        rt_kv_share: float,
        planning_s: float,
    ) -> None:
        """A step was sent. What its commit costs is added later."""
        self.start_s.append(start_s)
        self.seconds.append(seconds)
        self.predicted_s.append(predicted_s)
        self.num_sequences.append(num_sequences)
        self.num_tokens.append(num_tokens)
        self.rt_kv_share.append(rt_kv_share)
        self.planning_s.append(planning_s)

    def busy_share(self, start_s: float, stop_s: float) -> float:
        """Share of [start_s, stop_s) in which the devices computed."""
        window = self._window(start_s, stop_s)
        return sum(self.seconds[window]) / (stop_s - start_s)

    def prediction_error(self, start_s: float, stop_s: float) -> float | None:
        """Mean of |predicted - actual| / actual over the steps of the window; `None`: there are none."""
        window = self._window(start_s, stop_s)
        actual_s, predicted_s = np.asarray(self.seconds[window]), np.asarray(self.predicted_s[window])
        took_time = actual_s > 0
        if not took_time.any():
            return None
        return float(np.mean(np.abs(predicted_s[took_time] / actual_s[took_time] - 1)))

    def mean_rt_kv_share(self, start_s: float, stop_s: float) -> float | None:
        """Mean share of the KV region that real-time sequences held, over the time of the steps."""
        window = self._window(start_s, stop_s)
        seconds = np.asarray(self.seconds[window])
        if not seconds.sum():
            return None
        return float(np.average(np.asarray(self.rt_kv_share[window]), weights=seconds))

    def _window(self, start_s: float, stop_s: float) -> slice:
        """The steps that began in [start_s, stop_s), give or take one at each end."""
        return slice(bisect_left(self.start_s, start_s), bisect_left(self.start_s, stop_s))
