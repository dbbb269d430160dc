"""Detokenize an answer and detect its end: EOS, stop texts, loops, the budget."""

from collections import deque
from collections.abc import Sequence

from mlx_openelm.generation.options import Sampling
from mlx_openelm.text.tokenizer import Tokenizer

LONGEST_BLOCK = 64  # tokens of a repeated block
SHORTEST_LOOP = 16  # tokens in all, so that a row of dots is not a loop


class Answer:
    """The answer to a prompt, built token by token.

    Attributes:
        tokens: its ids, without EOS.
        finish_reason: None until it ends; then "stop" (EOS or a stop text), "loop" (see
            `Sampling.stop_loops`) or "length" (the budget is used up).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        sampling: Sampling,
        budget: int,
        *,
        keeps_first_space: bool = False,
    ) -> None:
        """Start an answer to a prompt's ids, of at most `budget` tokens.

        Args:
            keeps_first_space: also after a prompt of BOS alone, where the first space
                is otherwise the tokenizer's.
        """
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._eos_id = tokenizer.eos_id
        self._budget = budget
        self._decoder = tokenizer.stream_decoder(
            after=prompt, keeps_first_space=keeps_first_space
        )
        self._stops = StopTexts(sampling.stop)
        self._loop = LoopFinder(sampling.stop_loops) if sampling.stop_loops else None

    def add(self, token: int) -> str:
        """Add a token; return the text that is final now, "" after the end."""
        if self.finish_reason:
            return ""
        if token == self._eos_id:
            return self._end("stop")
        self.tokens.append(token)
        text = self._stops.add(self._decoder.add(token))
        if self._stops.matched:
            self.finish_reason = "stop"
        elif self._loop and self._loop.add(token):
            text += self._end("loop")
        elif len(self.tokens) == self._budget:
            text += self._end("length")
        return text

    def _end(self, reason: str) -> str:
        """Return the withheld text, which may still contain a stop text."""
        text = self._stops.add(self._decoder.finish()) + self._stops.finish()
        self.finish_reason = "stop" if self._stops.matched else reason
        return text


class StopTexts:
    """Passes text on until a stop text occurs in it.

    A possible beginning of a stop text is withheld, across token boundaries.

    Attributes:
        matched: whether a stop text has occurred; no text is returned after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._withheld = ""
        self.matched = False

    def add(self, text: str) -> str:
        """Add text; return what cannot be part of a stop text."""
        if self.matched:
            return ""
        self._withheld += text
        hits = [(self._withheld.find(stop), len(stop)) for stop in self._stops]
        # The stop text that is complete first counts, as if characters came singly.
        ends = [(place + length, place) for place, length in hits if place >= 0]
        if ends:
            self.matched = True
            return self._release(min(ends)[1])
        return self._release(len(self._withheld) - self._possible_start())

    def finish(self) -> str:
        """Return the withheld text at the end of the answer."""
        return self._release(0 if self.matched else len(self._withheld))

    def _possible_start(self) -> int:
        """Return the length of the longest tail that begins a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(self._withheld)), 0, -1):
            if any(stop.startswith(self._withheld[-length:]) for stop in self._stops):
                return length
        return 0

    def _release(self, length: int) -> str:
        text, self._withheld = self._withheld[:length], self._withheld[length:]
        return text


class LoopFinder:
    """Detects that an answer ends in a repeated block of tokens.

    A loop is a block of 1 to 64 tokens that is repeated `times` times or more at the
    end and covers 16 tokens or more. The time per token does not grow with the text.
    """

    def __init__(self, times: int) -> None:
        periods = range(1, LONGEST_BLOCK + 1)
        # Consecutive tokens equal to the one a period earlier: all blocks but one.
        self._needed = [
            (max(times, -(-SHORTEST_LOOP // period)) - 1) * period for period in periods
        ]
        self._runs = [0 for _ in periods]
        self._newest_first: deque[int] = deque(maxlen=LONGEST_BLOCK)

    def add(self, token: int) -> bool:
        """Add a token; return whether it completes a loop."""
        is_loop = False
        for place, earlier in enumerate(self._newest_first):
            run = self._runs[place] + 1 if earlier == token else 0
            self._runs[place] = run
            is_loop = is_loop or run >= self._needed[place]
        self._newest_first.appendleft(token)
        return is_loop
