"""Text on which a quantization is measured.

The default, `calibration.txt`, has twelve passages of English prose and dialogue, 35
KB, in the public domain in the USA, from these books (in Project Gutenberg editions
without their notices; no endorsement):

    Kenneth Grahame, The Wind in the Willows    L. Carroll, Through the Looking-Glass
    Thornton W. Burgess, The Burgess Bird Book  James Baldwin, Fifty Famous Stories
    Rudyard Kipling, The Jungle Book            Nathaniel Hawthorne, A Wonder Book
    Frances H. Burnett, The Secret Garden       E. Nesbit, The Railway Children
    Andrew Lang, The Blue Fairy Book            Joseph Jacobs, Celtic Fairy Tales
    H. C. Andersen, Fairy Tales                 Aesop's Fables, tr. G. F. Townsend
"""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.input_files import open_text
from mlx_openelm.message_parts import count_of, describe_error
from mlx_openelm.text.tokenizer import Tokenizer

SAMPLE = Path(__file__).with_name("calibration.txt")
SAMPLE_NAME = "the bundled sample of English prose"
WINDOW = 256  # tokens
MAX_CHARACTERS = 1_000_000  # longer texts are cut, as encoding takes time
LEARNING_CHARACTERS = 10_000_000  # of a text that is learned from
HELD_OUT = 8  # windows, at most, of each part of a text that is not learned from


def read_calibration(
    path: Path | None, max_characters: int = MAX_CHARACTERS
) -> tuple[str, str]:
    """Return the name of the text, and its first `max_characters`.

    Args:
        path: a text file; None is the bundled sample.

    Raises:
        OpenELMError: the file cannot be read, or is not UTF-8.
    """
    try:
        with (path or SAMPLE).open("rb") as opened, open_text(opened) as decoded:
            text = decoded.read(max_characters)
    except (OSError, ValueError) as error:
        raise OpenELMError(
            f"Cannot read {path or SAMPLE} as UTF-8 text: {describe_error(error)}; "
            "pass a plain text file as `calibration`."
        ) from error
    return (path.name if path else SAMPLE_NAME), text


def calibration_windows(
    tokenizer: Tokenizer,
    text: str,
    config: OpenELMConfig,
    *,
    num_tokens: int,
    window: int = WINDOW,
) -> mx.array:
    """Return token ids (N, 1 + T): windows spread over the text, each after a BOS.

    T is `window`, or the model's context length if that is smaller.

    Args:
        num_tokens: upper bound of N * T; short texts give less.

    Raises:
        OpenELMError: the text is shorter than one window.
    """
    T = min(window, config.max_context_length)
    ids = tokenizer.encode(text, bos=False)
    N = min(max(1, num_tokens // T), len(ids) // T)
    if N == 0:
        raise _too_short(len(ids), T)
    starts = [i * (len(ids) // N) for i in range(N)]
    return mx.array([[tokenizer.bos_id, *ids[s : s + T]] for s in starts])


@dataclass(frozen=True, slots=True)
class LearningWindows:
    """A text in three parts of separate windows, each token ids (N, 1 + T).

    Attributes:
        learn: to train on.
        choose: to choose the best step by.
        report: for the receipt.
    """

    learn: mx.array
    choose: mx.array
    report: mx.array


def learning_windows(
    tokenizer: Tokenizer, text: str, config: OpenELMConfig, *, window: int = WINDOW
) -> LearningWindows:
    """Divide a text into windows, each after a BOS, of which a fifth is held out.

    Held-out windows are spread over the text; there are at most `HELD_OUT` to choose by
    and as many to report on. T is as in `calibration_windows`.

    Raises:
        OpenELMError: the text is shorter than three windows.
    """
    T = min(window, config.max_context_length)
    ids = tokenizer.encode(text, bos=False)
    N = len(ids) // T
    if N < 3:
        raise _too_short(len(ids), 3 * T)
    count = min(max(1, N // 10), HELD_OUT)
    spread = [(2 * i + 1) * N // (4 * count) for i in range(2 * count)]  # distinct
    windows = [[tokenizer.bos_id, *ids[i * T : (i + 1) * T]] for i in range(N)]
    learn = [window for i, window in enumerate(windows) if i not in spread]
    held_out = [windows[i] for i in spread]
    return LearningWindows(
        mx.array(learn), mx.array(held_out[::2]), mx.array(held_out[1::2])
    )


def _too_short(num_tokens: int, needed: int) -> OpenELMError:
    return OpenELMError(
        f"The calibration text has {count_of(num_tokens, 'token')}, but needs at "
        f"least {needed}; pass a longer one as `calibration`."
    )
