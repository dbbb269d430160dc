"""Whether guessing pays, and how many tokens at once: judged by the clock.

A round verifies k guessed tokens in one forward pass of k + 1. If each guess is right
with probability a, it brings 1 + a + ... + a^k tokens; a plain step brings one. So
guessing pays while that is more than what a round takes, in plain steps.
"""

import statistics
import time
from collections import deque

MEMORY = 10  # guesses, about, that the share of right ones is taken from
PAUSE = 8  # plain steps before the first retry; each one in vain doubles it
LOSS = 0.03  # share of the time that retries in vain may take
MARGIN = 1.03  # what a round must gain, or it is not worth the noise


class Pace:
    """What is known of plain steps, of rounds, and of the guesses' luck.

    The clock runs from one token that was read to the next one: what a reader of the
    stream does in between belongs to both kinds of steps.
    """

    def __init__(self, length: int) -> None:
        """Begin to learn; a round may guess up to `length` tokens."""
        self._length = length
        self._plain: deque[float] = deque(maxlen=9)  # seconds
        self._rounds: deque[tuple[int, float]] = deque(maxlen=24)  # guesses, seconds
        self.begin()

    def begin(self) -> None:
        """Forget how lucky the guesses were: another text begins."""
        self._hits, self._guesses = 1.0, 2.0
        self._waited, self._pause = 0, 0.0
        self._last: float | None = None

    def read_plain(self, queued: bool) -> None:
        """A token came by a plain step, which was queued while the one before ran."""
        elapsed = self._lap()
        if queued and elapsed is not None:
            self._plain.append(elapsed)
        self._waited += 1

    def read_round(self, guessed: int, right: int) -> None:
        """A round was read, in which the first `right` guesses were right."""
        elapsed = self._lap()
        if elapsed is not None:
            self._rounds.append((guessed, elapsed))
        loss = self._cost(guessed) - 1 - right  # plain steps
        retried = self._waited >= self._pause > 0
        if loss > 0:
            self._pause = max(PAUSE, loss / LOSS, 2 * self._pause if retried else 0)
            self._waited = 0
        elif retried:  # what was before the pause does not count any more
            self._hits, self._guesses, self._pause = 1.0, 2.0, 0.0
        for place in range(min(right + 1, guessed)):
            self.judge(place < right)

    def judge(self, right: bool) -> None:
        """A guess was right, or wrong; it need not have been in a round."""
        fade = 1 - 1 / MEMORY
        self._hits = fade * self._hits + right
        self._guesses = fade * self._guesses + 1

    def choose(self, most: int) -> int:
        """Return how many tokens, up to `most`, to guess in the next round; 0: none."""
        most = min(most, self._length)
        if most < 1 or len(self._plain) < 2:
            return 0
        if not self._rounds:
            return 1
        rate = self._hits / self._guesses
        best, brought, power = 0, 1.0, 1.0
        quickest = MARGIN
        for count in range(1, most + 1):
            power *= rate
            brought += power
            speed = brought / self._cost(count)
            if speed > quickest:
                best, quickest = count, speed
        if not best and self._waited >= self._pause:
            return 1
        return best

    def _cost(self, count: int) -> float:
        """What a round of so many guesses takes, in plain steps."""
        if not self._rounds:
            return 1.0
        plain = statistics.median(self._plain)
        known = min((c for c, _ in self._rounds), key=lambda c: abs(c - count))
        found = statistics.median_low(s for c, s in self._rounds if c == known) / plain
        if known == count:
            return found
        # Unknown: as if each guess took the same.
        return 1 + max(found - 1, 0.02 * known) * count / known

    def _lap(self) -> float | None:
        now = time.perf_counter()
        elapsed = None if self._last is None else now - self._last
        self._last = now
        return elapsed
