"""Draft length of speculative decoding, chosen from measured times; 0 pauses it.

A round verifies k draft tokens in one forward pass of k + 1. If each is accepted with
probability a, the round yields 1 + a + ... + a^k tokens; a plain step yields one.
Drafting pays while that exceeds the duration of a round, in plain steps.
"""

import statistics
import time
from collections import deque

MEMORY = 10  # draft tokens: time constant of the acceptance rate's moving average
PAUSE = 8  # plain steps before the first retry; each failed retry doubles it
LOSS = 0.03  # share of the time that failed retries may take
MARGIN = 1.03  # smallest predicted speedup of a round, above the timing noise


class Pace:
    """Measured durations of plain steps and rounds, and the acceptance rate.

    Times are taken from one yielded token to the next, so the consumer's work between
    them counts for both kinds of steps.
    """

    def __init__(self, length: int) -> None:
        """Start without measurements; a draft has up to `length` tokens."""
        self._length = length
        self._plain: deque[float] = deque(maxlen=9)  # seconds
        self._rounds: deque[tuple[int, float]] = deque(maxlen=24)  # length, seconds
        self.begin()

    def begin(self) -> None:
        """Reset the acceptance rate for a new text; keep the durations."""
        self._hits, self._drafted = 1.0, 2.0
        self._waited, self._pause = 0, 0.0
        self._last: float | None = None

    def record_step(self, queued: bool) -> None:
        """Record a plain step; `queued`: it was queued while the one before ran."""
        elapsed = self._lap()
        if queued and elapsed is not None:
            self._plain.append(elapsed)
        self._waited += 1

    def record_round(self, drafted: int, accepted: int) -> None:
        """Record a round and how many of its draft tokens were accepted."""
        elapsed = self._lap()
        if elapsed is not None:
            self._rounds.append((drafted, elapsed))
        loss = self._cost(drafted) - 1 - accepted  # plain steps
        retried = self._waited >= self._pause > 0
        if loss > 0:
            self._pause = max(PAUSE, loss / LOSS, 2 * self._pause if retried else 0)
            self._waited = 0
        elif retried:  # the rate from before the pause is outdated
            self._hits, self._drafted, self._pause = 1.0, 2.0, 0.0
        for place in range(min(accepted + 1, drafted)):
            self.record_draft(place < accepted)

    def record_draft(self, right: bool) -> None:
        """Update the acceptance rate by one draft token, in a round or not."""
        fade = 1 - 1 / MEMORY
        self._hits = fade * self._hits + right
        self._drafted = fade * self._drafted + 1

    def choose(self, most: int) -> int:
        """Return the draft length of the next round, up to `most`; 0: no round."""
        most = min(most, self._length)
        if most < 1 or len(self._plain) < 2:
            return 0
        if not self._rounds:
            return 1
        rate = self._hits / self._drafted
        best, expected, power = 0, 1.0, 1.0
        fastest = MARGIN
        for count in range(1, most + 1):
            power *= rate
            expected += power
            speed = expected / self._cost(count)
            if speed > fastest:
                best, fastest = count, speed
        if not best and self._waited >= self._pause:
            return 1
        return best

    def _cost(self, count: int) -> float:
        """Return the duration of a round with `count` draft tokens, in plain steps."""
        if not self._rounds:
            return 1.0
        plain = statistics.median(self._plain)
        nearest = min((c for c, _ in self._rounds), key=lambda c: abs(c - count))
        seconds = statistics.median_low(s for c, s in self._rounds if c == nearest)
        cost = seconds / plain
        if nearest == count:
            return cost
        # Not measured: extrapolate with the same time for each draft token.
        return 1 + max(cost - 1, 0.02 * nearest) * count / nearest

    def _lap(self) -> float | None:
        now = time.perf_counter()
        elapsed = None if self._last is None else now - self._last
        self._last = now
        return elapsed
