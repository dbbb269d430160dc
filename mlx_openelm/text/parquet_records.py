"""Records of Parquet files, one for each row, as `record_files` returns those of JSON.

pyarrow, which is an extra, is imported when a file is read.
"""

import io
from collections.abc import Iterator

from mlx_openelm.errors import package_of_extra
from mlx_openelm.message_parts import describe_error
from mlx_openelm.text.record_files import JsonValue

PARQUET_SUFFIX = ".parquet"

_MAGIC = b"PAR1"
_ROWS = 256  # read at a time


def is_parquet(file: io.BufferedReader) -> bool:
    """Return whether a file, open at its start, is Parquet, whatever its name."""
    return file.peek(len(_MAGIC)).startswith(_MAGIC)


def read_rows(file: io.BufferedReader) -> Iterator[JsonValue]:
    """Yield the rows as dictionaries; `line` is the number of the row, from 1.

    Maps become dictionaries, too; of equal keys the last one counts, as in JSON.
    Columns of dates and times are left out: they are no text, and Python has no value
    for some of them. A row that cannot be read is a problem, and the last value.

    Raises:
        OpenELMError: pyarrow is not installed.
    """
    with package_of_extra("pyarrow", "parquet", f"Reading {file.name}"):
        import pyarrow  # type: ignore[import-untyped] # it has no stubs
        from pyarrow import parquet
    number = 0
    try:
        with parquet.ParquetFile(file) as opened:
            columns = [
                field.name
                for field in opened.schema_arrow
                if not pyarrow.types.is_temporal(field.type)
            ]
            for batch in opened.iter_batches(_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist(maps_as_pydicts="lossy"):
                    number += 1
                    yield JsonValue(number, value=row)
    except (
        pyarrow.ArrowException,
        ValueError,  # text that is not UTF-8
        OverflowError,  # a date in a list or structure that Python has no value for
        LookupError,  # an unknown time zone there
        OSError,
    ) as error:
        described = describe_error(error).rstrip(".")
        yield JsonValue(number + 1, problem=f"cannot be read as Parquet ({described})")
