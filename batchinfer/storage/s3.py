"""A bucket prefix as a Store.

Must not know: Parquet, rows, local paths, how a request is sent. Of S3's conditions only
`If-None-Match: *` on a single PUT is relied on: Ceph RGW ignores it on a multipart complete, and
compares If-Match with other quotes than those it returns.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, cast

from batchinfer.errors import ConfigError, TransientError
from batchinfer.storage.base import FileInfo, OnOther, Other
from batchinfer.storage.retry import RetryableFailure
from batchinfer.storage.s3_client import S3Client
from batchinfer.storage.s3_errors import RETRYABLE_CODES, S3Refusal
from batchinfer.storage.s3_files import RangeReader
from batchinfer.storage.s3_upload import upload
from batchinfer.storage.urls import S3_SCHEME, join_url

logger = logging.getLogger(__name__)

_MAX_KEY_BYTES = 1024
DELETE_BATCH = 1000  # S3's limit for one DeleteObjects


class S3Store:
    """Keys are object names below `s3://bucket/prefix/`."""

    is_local = False

    def __init__(self, url: str, client: S3Client, *, single_writer: bool = False) -> None:
        self._is_single_writer = single_writer
        self.url = url.rstrip("/")
        self._bucket, _, prefix = self.url.removeprefix(S3_SCHEME).partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = client

    def url_of(self, key: str) -> str:
        return join_url(self.url, key)

    def why_no_file(self, key: str) -> str | None:
        num_bytes = len((self._prefix + key).encode())
        if num_bytes > _MAX_KEY_BYTES:
            return f"with {num_bytes:,} bytes it is too long for a key"
        return None

    def parents(self) -> Iterator[S3Store]:
        url = self.url
        while "/" in url.removeprefix(S3_SCHEME):
            url = url.rpartition("/")[0]
            yield S3Store(url, self._client, single_writer=self._is_single_writer)

    def list(
        self, prefix: str = "", *, recursive: bool = True, on_other: OnOther | None = None
    ) -> Iterator[FileInfo]:
        arguments = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        if not recursive:
            arguments["Delimiter"] = "/"
        while True:
            page = self._client.call("list_objects_v2", "list", self.url_of(prefix), **arguments)
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # a folder marker that some consoles leave
                    yield self._file_info(entry["Key"], entry["Size"], entry["ETag"])
            if on_other is not None:
                for entry in page.get("CommonPrefixes", ()):
                    on_other(entry["Prefix"].removeprefix(self._prefix)[:-1], Other.FOLDER)
            if not page.get("IsTruncated"):
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def stat(self, key: str) -> FileInfo | None:
        try:
            answer = self._client.call("head_object", "read", self.url_of(key), **self._at(key))
        except FileNotFoundError:
            return None
        return self._file_info(self._prefix + key, answer["ContentLength"], answer["ETag"])

    def read(self, key: str) -> bytes:
        answer = self._client.call("get_object", "read", self.url_of(key), **self._at(key))
        return bytes(answer["Body"])

    def open(self, key: str) -> BinaryIO:
        url = self.url_of(key)
        opened = self.stat(key)
        if opened is None:
            raise FileNotFoundError(f"{url} is not there")

        def fetch(start: int, stop: int) -> bytes:
            byte_range = f"bytes={start}-{stop - 1}"
            answer = self._client.call("get_object", "read", url, Range=byte_range, **self._at(key))
            # Compared here and not by If-Match, which Ceph RGW refuses for the ETag that it sent.
            if _unquoted(answer["ETag"]) != opened.version:
                raise TransientError(f"{url} was replaced while it was read. Start again")
            return bytes(answer["Body"])

        return cast(BinaryIO, RangeReader(opened.size_bytes, fetch))

    def put(self, key: str, content: bytes) -> None:
        url = self.url_of(key)
        self._client.call("put_object", "write", url, Body=content, **self._at(key))

    def create(self, key: str, content: bytes) -> bool:
        if self._is_single_writer:  # promised, so looking first is enough
            return self._create_after_looking(key, content)
        is_ours = self._create(key, content)
        if is_ours is None:
            raise ConfigError(
                f"cannot create {self.url_of(key)}: this store does not support `If-None-Match: "
                "*`. Make sure that one run at a time works on this output, and set "
                "output.single_writer: true"
            )
        return is_ours

    def _create_after_looking(self, key: str, content: bytes) -> bool:
        try:
            return self.read(key) == content
        except FileNotFoundError:
            self.put(key, content)
            return True

    def publish(self, key: str, write: Callable[[BinaryIO], None]) -> None:
        upload(self._client, self.url_of(key), self._at(key), write)

    def publish_once(self, key: str, write: Callable[[BinaryIO], None]) -> bool:
        if self._is_single_writer:  # promised, so looking first is enough
            if self.stat(key) is not None:
                return False
            self.publish(key, write)
            return True
        return upload(self._client, self.url_of(key), self._at(key), write, is_once=True)

    def delete(self, keys: Iterable[str]) -> None:
        names = [self._at(key)["Key"] for key in keys]
        for start in range(0, len(names), DELETE_BATCH):
            self._delete_batch(names[start : start + DELETE_BATCH])

    def sweep(self, owns: Callable[[str], bool]) -> int:
        num_aborted = 0
        try:
            for name, upload_id in self._unfinished_uploads():
                key = name.removeprefix(self._prefix)
                if owns(key):
                    self._abort(key, upload_id)
                    num_aborted += 1
        except ConfigError as error:
            # Listing and aborting is often not granted, and leftovers only cost their storage.
            logger.warning("incomplete uploads are left as they are: %s", error)
        return num_aborted

    def supports_create(self, key: str) -> bool:
        self._create(key, secrets.token_bytes(16))
        is_refused = self._create(key, secrets.token_bytes(16)) is False
        self.delete([key])
        return is_refused

    def close(self) -> None:
        self._client.close()

    def _at(self, key: str) -> dict[str, str]:
        assert key
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _file_info(self, name: str, size_bytes: int, etag: str) -> FileInfo:
        return FileInfo(name.removeprefix(self._prefix), size_bytes, _unquoted(etag))

    def _create(self, key: str, content: bytes) -> bool | None:
        """None: the store cannot create-if-absent."""
        url = self.url_of(key)

        def attempt() -> bool | None:
            try:
                self._client.once(
                    "put_object", "create", url, Body=content, IfNoneMatch="*", **self._at(key)
                )
            except S3Refusal as refusal:
                if refusal.is_not_implemented:
                    return None
                if refusal.status != 412:
                    raise
            else:
                return True
            try:
                answer = self._client.once("get_object", "read", url, **self._at(key))
            except S3Refusal as refusal:
                if refusal.status != 404:
                    raise
                return False  # taken and deleted again: in any case not ours
            return bool(answer["Body"] == content)

        return self._client.retried(attempt, "create", url)

    def _delete_batch(self, names: Sequence[str]) -> None:
        """One answer speaks for many keys: what failed for a passing reason is asked for again."""
        pending = names

        def attempt() -> None:
            nonlocal pending
            objects = [{"Key": name} for name in pending]
            answer = self._client.once(
                "delete_objects",
                "delete below",
                self.url,
                Bucket=self._bucket,
                Delete={"Objects": objects, "Quiet": True},
            )
            failed = [error for error in answer.get("Errors", ()) if error["Code"] != "NoSuchKey"]
            if not failed:
                return
            first = failed[0]
            reason = f"{len(failed)} keys, first {first['Key']}: {first.get('Message', '')}"
            if any(error["Code"] not in RETRYABLE_CODES for error in failed):
                status = 403 if first["Code"] == "AccessDenied" else 400
                raise S3Refusal(status, first["Code"], reason)
            pending = [error["Key"] for error in failed]
            raise RetryableFailure(f"{first['Code']} for {reason}")

        self._client.retried(attempt, "delete below", self.url)

    def _unfinished_uploads(self) -> Iterator[tuple[str, str]]:
        """(object name, upload id) of each upload below the prefix that was begun and not ended."""
        arguments = {"Bucket": self._bucket, "Prefix": self._prefix}
        while True:
            page = self._client.call(
                "list_multipart_uploads", "list the uploads of", self.url, **arguments
            )
            for begun in page.get("Uploads", ()):
                yield begun["Key"], begun["UploadId"]
            if not page.get("IsTruncated"):
                return
            arguments["KeyMarker"] = page["NextKeyMarker"]
            arguments["UploadIdMarker"] = page["NextUploadIdMarker"]

    def _abort(self, key: str, upload_id: str) -> None:
        def attempt() -> None:
            try:
                self._client.once(
                    "abort_multipart_upload",
                    "abort the upload of",
                    self.url_of(key),
                    UploadId=upload_id,
                    **self._at(key),
                )
            except S3Refusal as refusal:
                if (
                    refusal.code != "NoSuchUpload"
                ):  # ended meanwhile, or an abort whose reply was lost
                    raise

        self._client.retried(attempt, "abort the upload of", self.url_of(key))


def _unquoted(etag: str) -> str:
    return etag.strip('"')
