"""The text that a quantization is measured on.

`calibration.txt` is the sample that is used unless the person gives another: twelve
passages of English prose and dialogue, 35 KB, in the public domain in the USA, from
these books (in Project Gutenberg editions, whose notices are removed; no endorsement):

    Kenneth Grahame, The Wind in the Willows    L. Carroll, Through the Looking-Glass
    Thornton W. Burgess, The Burgess Bird Book  James Baldwin, Fifty Famous Stories
    Rudyard Kipling, The Jungle Book            Nathaniel Hawthorne, A Wonder Book
    Frances H. Burnett, The Secret Garden       E. Nesbit, The Railway Children
    Andrew Lang, The Blue Fairy Book            Joseph Jacobs, Celtic Fairy Tales
    H. C. Andersen, Fairy Tales                 Aesop's Fables, tr. G. F. Townsend
"""

from pathlib import Path

import mlx.core as mx

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Tokenizer

SAMPLE = Path(__file__).with_name("calibration.txt")
SAMPLE_NAME = "the bundled sample of English prose"
WINDOW = 256  # tokens
MAX_CHARACTERS = 1_000_000  # of a longer text the beginning: encoding takes its time


def read_calibration(path: Path | None) -> tuple[str, str]:
    """Return what the text is called, and the text.

    Args:
        path: a text file; None is the bundled sample.

    Raises:
        OpenELMError: the file cannot be read, or is not UTF-8.
    """
    try:
        text = (path or SAMPLE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OpenELMError(
            f"Cannot read {path or SAMPLE} as UTF-8 text: {error}; give a plain text "
            "file as `calibration`."
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
    """Return token ids (N, 1 + T): windows from all over the text, each after a BOS.

    T is `window`, or the context where that is shorter.

    Args:
        num_tokens: N * T at most; fewer where the text has fewer.

    Raises:
        OpenELMError: the text does not fill one window.
    """
    T = min(window, config.max_context_length)
    ids = tokenizer.encode(text[:MAX_CHARACTERS], bos=False)
    N = min(max(1, num_tokens // T), len(ids) // T)
    if N == 0:
        raise OpenELMError(
            f"The calibration text has {len(ids)} tokens, and {T} are needed; give a "
            "longer one as `calibration`."
        )
    starts = [i * (len(ids) // N) for i in range(N)]
    return mx.array([[tokenizer.bos_id, *ids[s : s + T]] for s in starts])
