"""File systems by address: local paths, buckets, whatever fsspec opens."""

from typing import Any

from .errors import DataError

INSTALL = {"hf": "huggingface_hub", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp", "https": "aiohttp"}


def file_system(address: str, key: str = "data.path") -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it. Raises DataError that names `key` if there is none."""
    import fsspec

    options: dict[str, Any] = {}
    if address.startswith(("gs://", "gcs://")):
        import aiohttp

        # A stalled connection would hang for ever, and a listing of before would hide what came since.
        options = {"use_listings_cache": False, "requests_timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)}
    try:
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as e:
        package = INSTALL.get(address.partition(":")[0])
        way_out = f"; install {package} beside everstep" if package else ""
        raise DataError(f"{key} {address!r} cannot be opened: {e}{way_out}") from e
    except ValueError as e:  # an unknown protocol
        raise DataError(f"{key} {address!r} cannot be opened: {e}") from e
