"""One S3 request: sent through s3fs's session and event loop, classified, tried again.

Must not know: keys and prefixes, what a refusal means to a caller. s3fs supplies credentials,
connections and the event loop's thread; its own retries and botocore's are not in the path, so
`retry.py` is the only thing that tries again. (s3fs's `call_s3` also drops arguments that its
botocore does not know, so that a create-if-absent would overwrite; the client refuses them.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any, TypeVar

from batchinfer.errors import ConfigError
from batchinfer.storage.retry import RetryableFailure, RetryPolicy
from batchinfer.storage.s3_errors import (
    LostConnection,
    NoS3Answer,
    S3Refusal,
    classify,
    no_s3_server,
    other_scheme,
)
from batchinfer.storage.s3_profile import no_client, no_credentials
from batchinfer.storage.s3_setup import right_scheme

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60  # silence on a connection, not the length of a transfer
MAX_CONNECTIONS = 32
#: Of a server that has not given one answer of S3's yet; of one that has, they pass.
_MAX_FOREIGN_ANSWERS = 5
# What S3 always sends: a web server or a login page answers 200 to anything, and would be taken for
# an empty bucket that stores whatever is put.
_ALWAYS_SENT = {
    "list_objects_v2": "IsTruncated",
    "list_multipart_uploads": "IsTruncated",
    "get_object": "ETag",
    "head_object": "ETag",
    "put_object": "ETag",
    "upload_part": "ETag",
    "create_multipart_upload": "UploadId",
    "complete_multipart_upload": "ETag",
}
_BEGINS_OBJECT = frozenset({"put_object", "create_multipart_upload"})


@dataclass(frozen=True, slots=True)
class S3Options:
    """How to reach the store. None: what the standard AWS environment and files say."""

    endpoint_url: str | None = None
    profile: str | None = None
    region: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    server_side_encryption: str | None = None
    kms_key_id: str | None = None

    def arguments(self, operation: str) -> dict[str, str]:
        """What every request of an operation carries."""
        arguments = {"RequestPayer": "requester"} if self.requester_pays else {}
        if operation in _BEGINS_OBJECT:
            if self.server_side_encryption:
                arguments["ServerSideEncryption"] = self.server_side_encryption
            if self.kms_key_id:
                arguments["SSEKMSKeyId"] = self.kms_key_id
        return arguments


class S3Client:
    """`what` is a verb for messages, `url` what it is done to. May be used from several threads."""

    def __init__(self, options: S3Options, retry: RetryPolicy) -> None:
        from s3fs import S3FileSystem

        session = {"profile": options.profile} if options.profile else {}
        self._filesystem = S3FileSystem(
            anon=options.anonymous,
            endpoint_url=options.endpoint_url,
            client_kwargs={"region_name": options.region} if options.region else {},
            config_kwargs={
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "max_pool_connections": MAX_CONNECTIONS,
                "retries": {"total_max_attempts": 1, "mode": "standard"},
            },
            use_listings_cache=False,
            skip_instance_cache=True,
            **session,
        )
        self._options = options
        self._connection: Any = None
        self._retry = retry
        self._was_accepted = False  # a request of ours, by this store, with these credentials
        self._num_foreign_answers = 0
        self._has_asked_scheme = False

    def call(self, operation: str, what: str, url: str, **arguments: Any) -> dict[str, Any]:
        """The response; "Body" is bytes in both ways. Raises the errors of the Store contract."""
        return self.retried(lambda: self.once(operation, what, url, **arguments), what, url)

    def retried(self, attempt: Callable[[], T], what: str, url: str) -> T:
        """`attempt` until it neither raises RetryableFailure nor is out of time."""
        try:
            return self._retry.call(attempt, f"{what} {url}")
        except S3Refusal as refusal:
            raise refusal.public(what, url, was_accepted=self._was_accepted) from refusal

    def once(self, operation: str, what: str, url: str, **arguments: Any) -> dict[str, Any]:
        """A single try. Raises RetryableFailure, S3Refusal, ConfigError or TransientError."""
        try:
            response = self._send(operation, what, url, arguments)
        except S3Refusal as refusal:
            self._was_accepted |= refusal.is_authentic
            if operation == "head_object" and not refusal.has_reason and refusal.status != 404:
                # The answer to HEAD has no body, so no reason: GET is refused for the same.
                self._send("get_object", what, url, arguments | {"Range": "bytes=0-0"})
            raise
        self._was_accepted = True
        return response

    def close(self) -> None:
        if self._connection is not None:
            self._filesystem.close_session(self._filesystem.loop, self._connection)
            self._connection = None

    def _send(
        self, operation: str, what: str, url: str, arguments: dict[str, Any]
    ) -> dict[str, Any]:
        from fsspec.asyn import sync

        arguments = arguments | self._options.arguments(operation)
        try:
            response: dict[str, Any] = sync(
                self._filesystem.loop, self._request, operation, arguments
            )
        except Exception as error:  # classified by status, code and class; the unforeseen goes on
            failure = self._classified(error, what, url)
            if failure is error:
                raise
            if isinstance(failure, NoS3Answer):
                failure = self._foreign(what, url, failure)
            elif isinstance(failure, LostConnection):
                failure = self._lost(what, url, failure)
            raise failure from error
        field = _ALWAYS_SENT.get(operation)
        if field is not None and field not in response:
            failure = NoS3Answer(f"no {field} in the answer to {operation}")
            raise self._foreign(what, url, failure)
        return response

    def _classified(self, error: Exception, what: str, url: str) -> Exception:
        """`classify`, and what the AWS configuration files are to blame for."""
        session = self._filesystem.session
        if wrong := no_credentials(error, session):
            if self._was_accepted:  # not wrong from the start: the program may find its way again
                return RetryableFailure(wrong)
            return ConfigError(f"cannot {what} {url}: {wrong}")
        failure = classify(error, what, url, was_accepted=self._was_accepted)
        if failure is error and self._connection is None and not isinstance(error, MemoryError):
            return ConfigError(f"cannot {what} {url}: {no_client(error, session)}")
        return failure

    def _foreign(self, what: str, url: str, failure: NoS3Answer) -> Exception:
        self._num_foreign_answers += 1
        if self._was_accepted or self._num_foreign_answers < _MAX_FOREIGN_ANSWERS:
            return failure
        return no_s3_server(what, url, failure)

    def _lost(self, what: str, url: str, failure: LostConnection) -> Exception:
        """A server that waits for TLS closes a connection without it, or the other way around."""
        if self._was_accepted or self._connection is None or self._has_asked_scheme:
            return failure
        self._has_asked_scheme = True
        scheme = right_scheme(self._connection.meta.endpoint_url)
        return other_scheme(what, url, scheme) if scheme else failure

    async def _request(self, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
        if "Body" in arguments:
            # aiohttp warns of, and blocks its loop on, bytes above 1 MiB. BytesIO shares them.
            arguments = arguments | {"Body": BytesIO(arguments["Body"])}
        self._connection = await self._filesystem.set_session()
        response: dict[str, Any] = await getattr(self._connection, operation)(**arguments)
        if "Body" in response:
            async with response["Body"] as stream:
                response["Body"] = await stream.read()
        return response
