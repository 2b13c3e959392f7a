"""Compressed files as streams of what they hold. A stream that ends early or is damaged raises an error of DAMAGED."""

import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, cast


def _zstd(raw: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")


def unpack(raw: IO[bytes], suffix: str) -> IO[bytes]:
    """What a compressed file holds, from its beginning, as a stream that cannot go back."""
    return cast(IO[bytes], io.BufferedReader(_Readable(UNPACK[suffix](raw)), 1 << 16))


class _Readable(io.RawIOBase):
    """An unpacked stream that gives what it has before it raises, and tells pyarrow's errors from those of the store below."""

    def __init__(self, stream: Any):
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read1(len(buffer))
        except OSError as e:
            if e.errno is None and type(e) is OSError:  # pyarrow's own
                raise DamagedError(str(e)) from e
            raise
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


class DamagedError(Exception):
    """What was unpacked is damaged, or ends early."""


DAMAGED = (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, DamagedError)
UNPACK: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": _zstd,
    ".xz": lzma.LZMAFile,
}
