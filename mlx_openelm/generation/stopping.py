"""Tokens become text, until something ends the answer."""

from collections import deque
from collections.abc import Sequence

from mlx_openelm.generation.options import Sampling
from mlx_openelm.text.tokenizer import Tokenizer

LONGEST_BLOCK = 64  # tokens that are said again and again, in a loop
SHORTEST_LOOP = 16  # tokens in all: a row of dots is none


class Answer:
    """What is said behind a prompt, token by token.

    Attributes:
        tokens: what was said, without EOS.
        finish_reason: None while it goes on; "stop" (EOS or a stop text), "loop" (see
            `Sampling.stop_loops`) or "length" (the budget is spent).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        sampling: Sampling,
        budget: int,
    ) -> None:
        """Begin an answer to a prompt's ids, of at most `budget` tokens."""
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._eos_id = tokenizer.eos_id
        self._budget = budget
        self._decoder = tokenizer.stream_decoder(after=prompt)
        self._stops = StopTexts(sampling.stop)
        self._loop = LoopFinder(sampling.stop_loops) if sampling.stop_loops else None

    def add(self, token: int) -> str:
        """Return the text that has become certain; none once the answer has ended."""
        if self.finish_reason:
            return ""
        if token == self._eos_id:
            return self._end("stop")
        self.tokens.append(token)
        text = self._stops.add(self._decoder.add(token))
        if self._stops.found:
            self.finish_reason = "stop"
        elif self._loop and self._loop.add(token):
            text += self._end("loop")
        elif len(self.tokens) == self._budget:
            text += self._end("length")
        return text

    def _end(self, reason: str) -> str:
        """Release what was held back, in which there may yet be a stop text."""
        text = self._stops.add(self._decoder.finish()) + self._stops.finish()
        self.finish_reason = "stop" if self._stops.found else reason
        return text


class StopTexts:
    """Lets text through until one of the stop texts stands in it.

    What may be the beginning of a stop text is held back, wherever token borders fall.

    Attributes:
        found: whether a stop text was met; nothing comes through after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Return the text that surely stands before any stop text."""
        if self.found:
            return ""
        self._held += text
        hits = [(self._held.find(stop), len(stop)) for stop in self._stops]
        # The stop text that is complete first counts, as if letters came one by one.
        ends = [(place + length, place) for place, length in hits if place >= 0]
        if ends:
            self.found = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._possible_start())

    def finish(self) -> str:
        """Return what was held back, once it is known that nothing follows."""
        return self._release(0 if self.found else len(self._held))

    def _possible_start(self) -> int:
        """The length of the longest tail that is a beginning of a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text


class LoopFinder:
    """Notices that the tail of what is said is one block, many times over.

    A loop is a block of 1 to 64 tokens that stands at the end `times` times or more in
    a row, on 16 tokens or more. A token costs the same however many there were.
    """

    def __init__(self, times: int) -> None:
        periods = range(1, LONGEST_BLOCK + 1)
        # Tokens in a row that equal the one a period before them: all blocks but one.
        self._needed = [
            (max(times, -(-SHORTEST_LOOP // period)) - 1) * period for period in periods
        ]
        self._runs = [0 for _ in periods]
        self._newest_first: deque[int] = deque(maxlen=LONGEST_BLOCK)

    def add(self, token: int) -> bool:
        """Return whether a loop ends in this token."""
        found = False
        for place, earlier in enumerate(self._newest_first):
            run = self._runs[place] + 1 if earlier == token else 0
            self._runs[place] = run
            found = found or run >= self._needed[place]
        self._newest_first.appendleft(token)
        return found
