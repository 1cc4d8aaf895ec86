"""Writes an object of any size: one PUT if it fits in a part, else a multipart upload.

Must not know: prefixes, who publishes what. Invariant: the object appears whole or not at all. A
lost reply to the request that completes an upload: a random `publish-id` in the object's metadata
says whether the object is ours.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from batchinfer.errors import ConfigError
from batchinfer.storage.retry import RetryableFailure
from batchinfer.storage.s3_client import S3Client
from batchinfer.storage.s3_errors import S3Refusal
from batchinfer.storage.s3_files import PartWriter

logger = logging.getLogger(__name__)


#: Asks a store to refuse what would replace an object.
_IF_ABSENT = {"IfNoneMatch": "*"}


def upload(
    client: S3Client,
    url: str,
    target: dict[str, str],
    write: Callable[[BinaryIO], None],
    *,
    is_once: bool = False,
) -> bool:
    """What `write` writes becomes the object `target` (Bucket and Key).

    `is_once`: unless there is one. Returns whether it did.
    """
    multipart = _Multipart(client, url, target, is_once=is_once)
    try:
        with PartWriter(multipart.upload_part) as writer:
            write(cast(BinaryIO, writer))
            if not writer.num_parts:
                return _put(client, url, target, bytes(writer.rest), is_once=is_once)
            writer.flush_part()
        if multipart.complete():
            return True
    except BaseException:  # also KeyboardInterrupt: parts cost money until somebody aborts
        multipart.abort()
        raise
    multipart.abort()
    return False


def _put(
    client: S3Client, url: str, target: dict[str, str], content: bytes, *, is_once: bool
) -> bool:
    condition = _IF_ABSENT if is_once else {}

    def attempt() -> bool:
        try:
            client.once("put_object", "write", url, Body=content, **condition, **target)
        except S3Refusal as refusal:
            if is_once and refusal.status == 412:
                return False
            raise
        return True

    return client.retried(attempt, "write", url)


class _Multipart:
    """An upload that begins with its first part."""

    def __init__(
        self, client: S3Client, url: str, target: dict[str, str], *, is_once: bool
    ) -> None:
        self._client = client
        self._url = url
        self._target = target
        self._is_once = is_once
        self._condition = _IF_ABSENT if is_once else {}
        self._publish_id = secrets.token_hex(16)
        self._parts: list[dict[str, Any]] = []
        self._upload_id: str | None = None

    def upload_part(self, number: int, content: bytes) -> None:
        if self._upload_id is None:
            metadata = {"publish-id": self._publish_id}
            begun = self._client.call(
                "create_multipart_upload", "write", self._url, Metadata=metadata, **self._target
            )
            self._upload_id = begun["UploadId"]
        sent = self._client.call(
            "upload_part",
            "write",
            self._url,
            UploadId=self._upload_id,
            PartNumber=number,
            Body=content,
            **self._target,
        )
        checksums = {name: sent[name] for name in sent if name.startswith("Checksum")}
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"], **checksums})

    def complete(self) -> bool:
        """Whether the object is this upload's; False if there was one, and there may be none."""

        def attempt() -> bool:
            try:
                self._client.once(
                    "complete_multipart_upload",
                    "write",
                    self._url,
                    UploadId=self._upload_id,
                    MultipartUpload={"Parts": self._parts},
                    **self._condition,
                    **self._target,
                )
            except S3Refusal as refusal:
                if self._is_once and refusal.status == 412:
                    return False
                # An earlier try may have completed it, with the reply lost.
                if refusal.code != "NoSuchUpload" or not self._is_published():
                    raise
            return True

        is_ours = self._client.retried(attempt, "write", self._url)
        if is_ours:
            self._upload_id = None
        return is_ours

    def abort(self) -> None:
        """One try: the error that led here counts, and what stays is swept by a later start."""
        if self._upload_id is None:
            return
        try:
            self._client.once(
                "abort_multipart_upload",
                "abort the upload of",
                self._url,
                UploadId=self._upload_id,
                **self._target,
            )
        except (RetryableFailure, S3Refusal, ConfigError) as error:
            logger.warning("upload of %s not aborted, a later start will: %s", self._url, error)

    def _is_published(self) -> bool:
        try:
            answer = self._client.once("head_object", "read", self._url, **self._target)
        except S3Refusal as refusal:
            if refusal.status != 404:
                raise
            return False
        return bool(answer["Metadata"].get("publish-id") == self._publish_id)
