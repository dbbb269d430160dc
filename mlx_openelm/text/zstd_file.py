"""Files packed with zstd; the package zstandard is imported when one is read."""

import io
from typing import Any

from mlx_openelm.errors import package_of_extra


class ZstdFile(io.RawIOBase):
    """Reader of concatenated zstd frames. Unlike zstandard's, it detects truncation."""

    def __init__(self, path: str, file: io.BufferedReader) -> None:
        with package_of_extra("zstandard", "torch", f"Reading {path}"):
            import zstandard
        self._errors = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None  # the current one
        self._file = file
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            unused = b""
            if self._frame and self._frame.eof:
                unused, self._frame = self._frame.unused_data, None
            compressed = unused or self._file.read(1 << 14)
            if not compressed:
                if self._frame:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(compressed))
            except self._errors as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
