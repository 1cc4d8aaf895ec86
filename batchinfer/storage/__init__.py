"""`open_store(url)` gives a local folder or a bucket prefix behind one contract, `base.Store`."""

from __future__ import annotations

from collections.abc import Callable

from batchinfer.storage.base import FileInfo, Other, Store
from batchinfer.storage.local import LocalStore
from batchinfer.storage.local_errors import why_no_folder
from batchinfer.storage.retry import RetryPolicy
from batchinfer.storage.s3 import S3Store
from batchinfer.storage.s3_client import S3Client, S3Options
from batchinfer.storage.urls import check_url, is_s3, join_url, local_path, split_url

__all__ = [
    "FileInfo",
    "Other",
    "S3Options",
    "Store",
    "is_s3",
    "join_url",
    "local_path",
    "open_store",
    "split_url",
    "why_no_folder",
]


def _never() -> bool:
    return False


def open_store(
    url: str,
    *,
    s3: S3Options | None = None,
    should_stop: Callable[[], bool] = _never,
    retry_s: float = 120.0,
    single_writer: bool = False,
) -> Store:
    """The store at `url`. No request is made yet; a root that is not there is an empty one.

    A failing request is tried again for `retry_s`; once `should_stop` is true it is not waited for.
    `single_writer`: the caller promises that nobody else creates anything here meanwhile, so a
    store without conditional create will do.
    """
    check_url(url)
    if not is_s3(url):
        return LocalStore(url)
    client = S3Client(s3 or S3Options(), RetryPolicy(should_stop, retry_s))
    return S3Store(url, client, single_writer=single_writer)
