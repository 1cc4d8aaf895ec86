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

from batchinfer.storage.retry import RetryPolicy
from batchinfer.storage.s3_errors import S3Refusal, classify

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60  # silence on a connection, not the length of a transfer
MAX_CONNECTIONS = 32


@dataclass(frozen=True, slots=True)
class S3Options:
    """How to reach the store. None: what the standard AWS environment and files say."""

    endpoint_url: str | None = None
    profile: str | None = None
    region: str | None = None
    anonymous: bool = False


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
        self._connection: Any = None
        self._retry = retry

    def call(self, operation: str, what: str, url: str, **arguments: Any) -> dict[str, Any]:
        """The response; "Body" is bytes in both ways. Raises the errors of the Store contract."""
        return self.retried(lambda: self.once(operation, what, url, **arguments), what, url)

    def retried(self, attempt: Callable[[], T], what: str, url: str) -> T:
        """`attempt` until it neither raises RetryableFailure nor is out of time."""
        try:
            return self._retry.call(attempt, f"{what} {url}")
        except S3Refusal as refusal:
            raise refusal.public(what, url) from refusal

    def once(self, operation: str, what: str, url: str, **arguments: Any) -> dict[str, Any]:
        """A single try. Raises RetryableFailure, S3Refusal or ConfigError."""
        from fsspec.asyn import sync

        try:
            response: dict[str, Any] = sync(
                self._filesystem.loop, self._request, operation, arguments
            )
        except Exception as error:  # classified by status, code and class; the unforeseen goes on
            failure = classify(error, what, url)
            if failure is error:
                raise
            raise failure from error
        return response

    def close(self) -> None:
        if self._connection is not None:
            self._filesystem.close_session(self._filesystem.loop, self._connection)
            self._connection = None

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
