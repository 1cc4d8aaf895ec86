"""What a failed S3 request means: try again, the store refused, or this machine is set up wrong.

Must not know: which request it was. Decides by HTTP status and S3 error code found along the chain
of causes, or by botocore's class where there was no answer; never by message text, nor by the type
that s3fs gives an answer (a 412 is FileExistsError from one server, EINVAL from another).
"""

from __future__ import annotations

import ssl

from batchinfer.errors import ConfigError, TransientError
from batchinfer.storage.retry import RetryableFailure

# By code as well as by status: some arrive with 400 or 409, and DeleteObjects gives a code alone.
RETRYABLE_CODES = frozenset(
    {
        "ConditionalRequestConflict",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
_RETRYABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
_CREDENTIAL_CODES = frozenset(
    {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "InvalidAccessKeyId"}
)
CREDENTIALS_HINT = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), "
    "or s3.profile in the job"
)


class S3Refusal(Exception):
    """The store answered, and another try would be answered the same."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"HTTP {status} {code}: {message}")
        self.status = status
        self.code = code

    @property
    def is_not_implemented(self) -> bool:
        """Also what some stores answer to a header or request that they do not know."""
        return self.status == 501 or self.code in {"NotImplemented", "InvalidArgument"}

    def public(self, what: str, url: str) -> Exception:
        """The error of the Store contract for this refusal of `what` (a verb) on `url`."""
        if self.code == "NoSuchBucket":
            return ConfigError(f"cannot {what} {url}: there is no such bucket at this endpoint")
        if self.code == "NoSuchUpload":
            return TransientError(f"cannot {what} {url}: its upload was aborted. Start again")
        if self.status == 404:
            return FileNotFoundError(f"{url} is not there")
        if self.status in {401, 403} or self.code in _CREDENTIAL_CODES:
            return ConfigError(
                f"cannot {what} {url}: credentials refused ({self}). Check the permissions, or "
                f"{CREDENTIALS_HINT}"
            )
        return ConfigError(f"cannot {what} {url}: the store refused ({self})")


def classify(error: Exception, what: str, url: str) -> Exception:
    """RetryableFailure, S3Refusal or ConfigError; `error` itself if it is none of our business."""
    from aiohttp import ClientError as HttpClientError
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, boto.ClientError):
            return _classify_answer(cause)
        cause = cause.__cause__  # never __context__: that may be another request's refusal
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return ConfigError(f"cannot {what} {url}: {error}. Set AWS_CA_BUNDLE or s3.endpoint_url")
    no_answer = (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.IncompleteReadError,
        boto.ChecksumError,
        boto.CredentialRetrievalError,
        ResponseParserError,
        HttpClientError,
        TimeoutError,
        ConnectionError,
    )
    if isinstance(error, no_answer):
        return RetryableFailure(str(error) or type(error).__name__)
    no_credentials = (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.ProfileNotFound,
        boto.TokenRetrievalError,
        boto.NoAuthTokenError,
    )
    if isinstance(error, no_credentials):
        return ConfigError(
            f"cannot {what} {url}: credentials missing ({error}): {CREDENTIALS_HINT}"
        )
    if isinstance(error, boto.BotoCoreError | ValueError):  # ValueError: a malformed endpoint URL
        return ConfigError(f"cannot {what} {url}: {error}")
    return error


def _classify_answer(error: Exception) -> RetryableFailure | S3Refusal:
    response = error.response  # type: ignore[attr-defined]  # botocore's ClientError
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", ""))
    refusal = S3Refusal(status, code, str(response.get("Error", {}).get("Message", "")))
    if status in _RETRYABLE_STATUSES or code in RETRYABLE_CODES:
        return RetryableFailure(str(refusal))
    return refusal
