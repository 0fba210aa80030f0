"""Predicts how long a step takes, from its shape; learns from the steps that were run.

    seconds = speed * (c0 + f(rows) + c1 * decode sequences + c2 * prefill sequences
                       + c3 * prefill attention + c4 * decode context + c5 * copied tokens)

`rows` are the tokens of the step, which all go through the same linear layers; f is piecewise linear. No coefficient is
negative, so no prediction falls where a feature grows. They are fitted by least squares of the relative error, to what
was measured at the start and to what was observed since, which is forgotten exponentially: constrained recursive least
squares. `speed` follows the last few steps: machines are shared, and slow down as a whole.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from operator import mul, sub
from typing import Final

from bros_shard.protocol import StepShape

#: Where the time of the linear layers bends: where they become bound by arithmetic, and tiles fill.
_KNOTS: Final = (0, 8, 64, 256)
_WIDTHS: Final = tuple(map(sub, _KNOTS[1:], _KNOTS))
#: Seconds by feature of a 135M model on two CPU cores: what is not known yet is taken to be in proportion to it.
_GUESS: Final = (10e-3, 0.5e-3, 0.5e-3, 0.5e-3, 0.5e-3, 0.1e-3, 1e-3, 0.5e-6, 5e-6, 0.5e-6)
_NUM_FEATURES: Final = len(_GUESS)
#: Weight of the guess, of a point measured at the start, and of the latest step.
_GUESS_WEIGHT: Final = 1e-3
_POINT_WEIGHT: Final = 0.1
#: Weight of a step when one more of its kind was observed.
_FORGETTING: Final = 0.995
#: Share of the latest step's deviation that `speed` takes over, and that what was measured at the start is changed by.
_SPEED_GAIN: Final = 0.25
_PACE_GAIN: Final = 0.02
#: The factor beyond which a deviation counts no more.
_LARGEST_DEVIATION: Final = 1.5
#: A step that took this many times as long as predicted says nothing about its shape.
_OUTLIER_RATIO: Final = 5.0
#: But where they come one after the other, it is the model that is wrong: so many of them are disbelieved.
_NUM_DISBELIEVED: Final = 3
#: Steps that margin and error look back on.
_WINDOW: Final = 512
#: Steps between two fits, once there were that many.
_FIT_PERIOD: Final = 32


class LatencyModel:
    """Seconds of a step as a function of its `StepShape`, never falling where a feature grows."""

    def __init__(self, points: Iterable[tuple[StepShape, float]] = (), copies_overlap: bool = False) -> None:
        """Fit the model to measured (shape, seconds) pairs; without any, it guesses until steps were observed.

        Args:
            copies_overlap: host copies run beside the forward pass, so the longer of the two counts; else both.
        """
        self._copies_overlap = copies_overlap
        self._points = _Sums()
        # Apart, so that a long run of decode steps does not forget what chunks cost.
        self._decode_steps, self._mixed_steps = _Sums(_FORGETTING), _Sums(_FORGETTING)
        self._recent = _Window()
        #: 95th percentile of actual / predicted over the latest 512 steps, outliers left out; at least 1.
        self.margin = 1.0
        #: Outliers: steps that took more than 5 times as long as predicted.
        self.num_outliers = 0
        self._num_observed = 0
        self._num_outliers_in_a_row = 0
        self._speed = 1.0
        self._guess: Sequence[float] = _GUESS
        self._fitted = _Coefficients(_GUESS, copies_overlap)
        #: How many times as long as at the start steps take by now; 0: nothing was measured yet.
        self._pace = 0.0
        measured = [(shape, seconds) for shape, seconds in points if seconds > 0.0]
        if measured:
            self._fit_points(measured)
        self._start = self._fitted

    @property
    def error(self) -> float:
        """Mean of |predicted - actual| / actual over the latest 512 steps; 0 before the first."""
        return self._recent.error()

    def predict_s(self, shape: StepShape) -> float:
        """Expected seconds of a step."""
        return self._speed * self._fitted.seconds(shape)

    def bound_s(self, shape: StepShape) -> float:
        """Seconds that 95 % of such steps stay below: what deadlines are judged by."""
        return self.margin * self.predict_s(shape)

    def prefill_s(self, num_tokens: int, num_computed_tokens: int, max_batch_tokens: int) -> float:
        """Expected seconds to compute the next `num_tokens` of a prompt alone, in chunks of `max_batch_tokens`.

        Time grows linearly with the context before a chunk, so full chunks take the mean of the first and the last.
        """
        num_chunks, num_rest = divmod(num_tokens, max_batch_tokens)
        rest_start = num_computed_tokens + num_chunks * max_batch_tokens
        seconds = 0.0
        if num_chunks:
            first = StepShape().with_sequence(num_computed_tokens, max_batch_tokens)
            last = StepShape().with_sequence(rest_start - max_batch_tokens, max_batch_tokens)
            seconds += num_chunks * (self.predict_s(first) + self.predict_s(last)) / 2
        if num_rest:
            seconds += self.predict_s(StepShape().with_sequence(rest_start, num_rest))
        return seconds

    def largest_chunk(self, shape: StepShape, num_computed_tokens: int, limit: int, budget_s: float) -> int:
        """The most tokens n <= `limit` of one more sequence that keep the step within `budget_s`; 0: not even one."""

        def is_within_budget(num_tokens: int) -> bool:
            return self.bound_s(shape.with_sequence(num_computed_tokens, num_tokens)) <= budget_s

        # From two tokens on, time rises with them. One token decodes, and may take longer than a chunk of two.
        low, high = 1, limit + 1
        while high - low > 1:
            middle = (low + high) // 2
            if is_within_budget(middle):
                low = middle
            else:
                high = middle
        return low if low > 1 or (limit > 0 and is_within_budget(1)) else 0

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step of this shape took this long."""
        if seconds <= 0.0:
            return
        pace = seconds / self._start.seconds(shape)
        if self._pace == 0.0:  # all is in proportion to the first step
            self._pace = self._speed = pace
        ratio = seconds / self.predict_s(shape)
        self.margin = max(1.0, self._recent.add(ratio))
        if self._is_outlier(ratio):
            return
        sums = self._mixed_steps if shape.num_prefill_tokens else self._decode_steps
        sums.add(self._fitted.features(shape), seconds)
        self._pace = _drawn_to(pace, self._pace, _PACE_GAIN)
        self._speed = _drawn_to(ratio * self._speed, self._speed, _SPEED_GAIN)
        self._num_observed += 1
        # The first fits come after 1, 2, 4, ... steps.
        period = min(_FIT_PERIOD, 1 << (self._num_observed.bit_length() - 1))
        if self._num_observed % period == 0:
            before_s = self.predict_s(shape)
            self._fit(num_sweeps=10)
            self._speed *= before_s / self.predict_s(shape)  # what the last steps said of the present still holds

    def _is_outlier(self, ratio: float) -> bool:
        """Whether a step says nothing: it was far too slow, and the steps before it were not."""
        if ratio <= _OUTLIER_RATIO:
            self._num_outliers_in_a_row = 0
            return False
        self.num_outliers += 1
        self._num_outliers_in_a_row += 1
        return self._num_outliers_in_a_row <= _NUM_DISBELIEVED

    def _fit_points(self, points: Sequence[tuple[StepShape, float]]) -> None:
        """Begin with what was measured at the start, and the guess in proportion where that says nothing."""
        ratios = sorted(seconds / self._fitted.seconds(shape) for shape, seconds in points)
        median = ratios[len(ratios) // 2]
        self._guess = [median * guess for guess in _GUESS]
        self._fitted = _Coefficients(self._guess, self._copies_overlap)
        self._pace = 1.0
        for shape, seconds in points:
            self._points.add(self._fitted.features(shape), seconds, _POINT_WEIGHT)
        self._fit(num_sweeps=200)

    def _fit(self, num_sweeps: int) -> None:
        """Least squares of all that is known, by projected coordinate descent from the present coefficients."""
        matrix = [[0.0] * _NUM_FEATURES for _ in range(_NUM_FEATURES)]
        vector = [0.0] * _NUM_FEATURES
        self._points.add_to(matrix, vector, self._pace)
        self._decode_steps.add_to(matrix, vector)
        self._mixed_steps.add_to(matrix, vector)
        for index, guess in enumerate(self._guess):  # as if each coefficient had been seen alone
            matrix[index][index] += _GUESS_WEIGHT / (guess * self._pace) ** 2
            vector[index] += _GUESS_WEIGHT / (guess * self._pace)
        values = list(self._fitted.values)
        for _ in range(num_sweeps):
            for index, row in enumerate(matrix):
                gradient = vector[index] - sum(map(mul, row, values))
                values[index] = max(0.0, values[index] + gradient / row[index])
        self._fitted = _Coefficients(values, self._copies_overlap)


class _Coefficients:
    """Seconds by feature, in the order of `features`."""

    def __init__(self, values: Sequence[float], copies_overlap: bool) -> None:
        self.values = values
        self._copies_overlap = copies_overlap
        self._slopes = values[1 : 1 + len(_KNOTS)]
        #: What a step takes at each knot, before what its sequences add. Never nothing: ratios are taken to it.
        self._starts = list(accumulate(map(mul, self._slopes, _WIDTHS), initial=max(values[0], 1e-9)))
        self._rates = values[1 + len(_KNOTS) :]

    def seconds(self, shape: StepShape) -> float:
        """What a step takes."""
        rows = shape.num_prefill_tokens + shape.num_decode_sequences
        segment = bisect_right(_KNOTS, rows) - 1
        decode_s, prefill_s, attention_s, context_s, copy_s = self._rates
        forward_s: float = (
            self._starts[segment]
            + self._slopes[segment] * (rows - _KNOTS[segment])
            + decode_s * shape.num_decode_sequences
            + prefill_s * shape.num_prefill_sequences
            + attention_s * shape.prefill_attention
            + context_s * shape.decode_context_tokens
        )
        copies_s: float = copy_s * shape.num_copied_tokens
        return max(forward_s, copies_s) if self._copies_overlap else forward_s + copies_s

    def features(self, shape: StepShape) -> list[float]:
        """What the values are multiplied by: the sum is what a step takes."""
        rows = shape.num_prefill_tokens + shape.num_decode_sequences
        num_copied_tokens: float = shape.num_copied_tokens
        if self._copies_overlap and num_copied_tokens:  # the step is a sample of the longer part
            if self.values[-1] * num_copied_tokens >= self.seconds(shape):
                return [*(0.0,) * (_NUM_FEATURES - 1), num_copied_tokens]
            num_copied_tokens = 0.0
        segment = bisect_right(_KNOTS, rows) - 1
        return [
            1.0,
            *_WIDTHS[:segment],
            rows - _KNOTS[segment],
            *(0.0,) * (len(_WIDTHS) - segment),
            shape.num_decode_sequences,
            shape.num_prefill_sequences,
            shape.prefill_attention,
            shape.decode_context_tokens,
            num_copied_tokens,
        ]


def _drawn_to(target: float, value: float, gain: float) -> float:
    """The value, a share `gain` of the way to the target, which counts for no more than `_LARGEST_DEVIATION` times."""
    deviation = min(max(target / value, 1.0 / _LARGEST_DEVIATION), _LARGEST_DEVIATION)
    return value * (1.0 + gain * (deviation - 1.0))


class _Sums:
    """Normal equations of weighted least squares: sums over steps of w f f' and of w f t, where w = weight / t^2."""

    def __init__(self, forgetting: float = 1.0) -> None:
        """Whenever a step is added, the weight of all before it is multiplied by `forgetting`."""
        self._growth = 1.0 / forgetting
        self._matrix = [[0.0] * _NUM_FEATURES for _ in range(_NUM_FEATURES)]
        self._vector = [0.0] * _NUM_FEATURES
        self._unit = 1.0  # what weight 1 is by now: growing it is less work than shrinking the sums

    def add(self, features: list[float], seconds: float, weight: float = 1.0) -> None:
        """One more step."""
        self._unit *= self._growth
        scale = self._unit * weight / seconds**2
        for index, feature in enumerate(features):
            if feature:
                scaled = scale * feature
                self._matrix[index] = [
                    old + scaled * new for old, new in zip(self._matrix[index], features, strict=True)
                ]
                self._vector[index] += scaled * seconds
        if self._unit > 1e9:
            self._matrix = [[value / self._unit for value in row] for row in self._matrix]
            self._vector = [value / self._unit for value in self._vector]
            self._unit = 1.0

    def add_to(self, matrix: list[list[float]], vector: list[float], pace: float = 1.0) -> None:
        """Add these sums to others, as if each step had taken `pace` times as long."""
        matrix_scale = 1.0 / (self._unit * pace**2)
        for index, row in enumerate(self._matrix):
            matrix[index] = [total + matrix_scale * value for total, value in zip(matrix[index], row, strict=True)]
            vector[index] += self._vector[index] / (self._unit * pace)


class _Window:
    """The latest ratios of actual to predicted time."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque()
        self._sorted = [1.0]  # those that are no outliers, and one that is always there

    def add(self, ratio: float) -> float:
        """Take one more. Returns the 95th percentile, outliers left out: no plan allows for them."""
        if len(self._ratios) == _WINDOW:
            oldest = self._ratios.popleft()
            if oldest <= _OUTLIER_RATIO:
                del self._sorted[bisect_left(self._sorted, oldest)]
        self._ratios.append(ratio)
        if ratio <= _OUTLIER_RATIO:
            insort(self._sorted, ratio)
        return self._sorted[len(self._sorted) * 95 // 100]

    def error(self) -> float:
        """Mean of |predicted - actual| / actual; 0 where there is none."""
        return sum(abs(1.0 / ratio - 1.0) for ratio in self._ratios) / max(1, len(self._ratios))
