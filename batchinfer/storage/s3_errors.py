"""What a failed S3 request means: try again, the store refused, or this machine is set up wrong.

Must not know: which request it was. Decides by HTTP status and S3 error code found along the chain
of causes, or by botocore's class where there was no answer; never by message text, nor by the type
that s3fs gives an answer (a 412 is FileExistsError from one server, EINVAL from another).
"""

from __future__ import annotations

import errno
import ssl

from batchinfer.errors import AccessLost, ConfigError, TransientError
from batchinfer.limits import file_limit
from batchinfer.storage.retry import RetryableFailure
from batchinfer.storage.s3_setup import odd_variables, set_up_wrong

# By code as well as by status: some arrive with 400 or 409, and DeleteObjects gives a code alone.
RETRYABLE_CODES = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "TemporaryRedirect",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
_RETRYABLE_STATUSES = frozenset({408, 425, 429})
_CREDENTIAL_CODES = frozenset({"InvalidAccessKeyId", "InvalidToken", "InvalidTokenId"})
_EXPIRED_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
)
_CLOCK_CODES = frozenset({"RequestTimeTooSkewed", "RequestInTheFuture"})
_FULL_CODES = frozenset({"QuotaExceeded", "StorageFull", "XMinioStorageFull"})
_REGION_CODES = frozenset(
    {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
)
_CREDENTIALS_HINT = (
    "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), "
    "or s3.profile in the job"
)
_DENIED_HINT = (
    "check the permissions of these credentials; a requester-pays bucket needs "
    "s3.requester_pays: true, one that demands encryption s3.server_side_encryption; for other "
    "credentials "
)
_ENDPOINT_HINT = "check s3.endpoint_url (AWS_ENDPOINT_URL) and any proxy before it"


class NoS3Answer(RetryableFailure):
    """An answer that is not S3's: cut off or garbled on the way, or from another kind of server."""


class LostConnection(RetryableFailure):
    """No answer, or not a whole one."""


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

    @property
    def has_reason(self) -> bool:
        """Whether there is a code of S3's: not in answers to HEAD, nor from other servers."""
        return bool(self.code) and not self.code.isdigit()

    @property
    def is_authentic(self) -> bool:
        """Whether the store has accepted who asks, though not what was asked for."""
        return self.status in {404, 412} and self.has_reason

    def public(self, what: str, url: str, *, was_accepted: bool) -> Exception:
        """The error of the Store contract for this refusal of `what` (a verb) on `url`.

        `was_accepted`: an earlier request with the same credentials was.
        """
        cannot = f"cannot {what} {url}: "
        if self.code == "NoSuchBucket":
            return ConfigError(f"{cannot}there is no such bucket at this endpoint")
        if self.code == "NoSuchUpload":
            return TransientError(f"{cannot}its upload was aborted. Start again")
        if self.status == 404 and what == "read":
            return FileNotFoundError(f"{url} is not there")
        if self.code in _FULL_CODES or self.status == 507:
            return TransientError(f"{cannot}the store is full ({self}): free space and start again")
        if passing := self._passing():
            if was_accepted:
                return AccessLost(
                    f"{cannot}{passing} since the run began ({self}). Finished rows are durable: "
                    "renew what is refused and start again"
                )
            return ConfigError(f"{cannot}{passing} ({self}): fix that, or {_credentials_hint()}")
        return ConfigError(cannot + self._advice())

    def _passing(self) -> str | None:
        """What is wrong that may have been right a moment ago."""
        if self.code in _EXPIRED_CODES:
            return "the credentials have expired"
        if self.code in _CREDENTIAL_CODES:
            return "credentials refused"
        if self.code in _CLOCK_CODES:
            return "this machine's clock is wrong"
        return None

    def _advice(self) -> str:
        if self.code == "AccessDenied" or (self.status == 403 and not self.has_reason):
            return f"access denied ({self}): {_DENIED_HINT}{_credentials_hint()}"
        if self.code == "SecondLevelDomainForbidden":
            return (
                f"the store requires the bucket in the host name ({self}): write `s3 =` and, "
                "indented below it, `addressing_style = virtual` into the AWS configuration file "
                "(AWS_CONFIG_FILE)"
            )
        if self.code in _REGION_CODES or self.status in {301, 307, 308}:
            return f"the bucket is in another region or at another endpoint ({self}): set s3.region"
        if self.status in {404, 405} or not self.has_reason:
            return (
                f"the endpoint does not answer like an S3 server ({self}): {_ENDPOINT_HINT}, and "
                "that the URL does not name the bucket twice"
            )
        if self.status in {401, 403}:
            return f"credentials refused ({self}). Check the permissions, or {_credentials_hint()}"
        return f"the store refused ({self})"


def _credentials_hint() -> str:
    odd = odd_variables()
    return f"{odd}; correct that, or {_CREDENTIALS_HINT}" if odd else _CREDENTIALS_HINT


def other_scheme(what: str, url: str, scheme: str) -> ConfigError:
    return ConfigError(
        f"cannot {what} {url}: the endpoint speaks {'TLS' if scheme == 'https' else 'plain HTTP'}: "
        f"write {scheme}:// in s3.endpoint_url (AWS_ENDPOINT_URL)"
    )


def no_s3_server(what: str, url: str, failure: NoS3Answer) -> ConfigError:
    return ConfigError(
        f"cannot {what} {url}: the endpoint does not answer like an S3 server ({failure}): "
        f"{_ENDPOINT_HINT}"
    )


def classify(error: Exception, what: str, url: str, *, was_accepted: bool) -> Exception:
    """RetryableFailure, S3Refusal, ConfigError or TransientError; `error` itself if it is none of
    our business.
    """
    from aiohttp import ClientError as HttpClientError
    from aiohttp import ClientResponseError
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, boto.ClientError):
            return _classify_answer(cause)
        cause = cause.__cause__  # never __context__: that may be another request's refusal
    if isinstance(error.__context__, ssl.SSLCertVerificationError):
        return ConfigError(f"cannot {what} {url}: {error}. Set AWS_CA_BUNDLE or s3.endpoint_url")
    if isinstance(error, RecursionError):  # botocore follows the store from region to region
        return S3Refusal(301, "PermanentRedirect", "redirected too many times")
    is_wrapper = isinstance(error, boto.HTTPClientError | boto.ConnectionError)
    cause = getattr(error, "kwargs", {}).get("error") if is_wrapper else error
    if isinstance(cause, ResponseParserError | ClientResponseError):  # the latter: no HTTP either
        return NoS3Answer(str(cause).splitlines()[0][:200])
    if wrong := set_up_wrong(cause):
        if was_accepted:  # not wrong from the start: files of credentials are rewritten
            return RetryableFailure(wrong)
        return ConfigError(f"cannot {what} {url}: {wrong}")
    no_answer = (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.IncompleteReadError,
        boto.ChecksumError,
        boto.CredentialRetrievalError,
        HttpClientError,
        TimeoutError,
        ConnectionError,
    )
    if isinstance(error, no_answer):
        return LostConnection(_in_words(error, cause))
    if isinstance(error, _no_credentials()):
        if was_accepted:
            return AccessLost(
                f"cannot {what} {url}: the credentials have expired since the run began ({error}). "
                "Finished rows are durable: renew them and start again"
            )
        return ConfigError(
            f"cannot {what} {url}: credentials missing ({error}): {_credentials_hint()}"
        )
    if isinstance(error, boto.BotoCoreError):
        return ConfigError(f"cannot {what} {url}: {error}")
    if isinstance(error, OSError):  # of a file or a descriptor; never FileNotFoundError of a key
        return RetryableFailure(f"{error}")
    return error


def _no_credentials() -> tuple[type[Exception], ...]:
    from botocore import exceptions as boto

    return (
        boto.NoCredentialsError,
        boto.PartialCredentialsError,
        boto.ProfileNotFound,
        boto.TokenRetrievalError,
        boto.NoAuthTokenError,
        boto.SSOError,
        boto.RefreshWithMFAUnsupportedError,
    )


def _in_words(error: Exception, cause: object) -> str:
    """Also what botocore leaves out: that a name is unknown, or that no descriptor was left."""
    text = str(error) or type(error).__name__
    reason = getattr(getattr(cause, "os_error", cause), "strerror", None)
    if reason and reason not in text:
        text += f" ({reason})"
    if getattr(cause, "errno", None) in (errno.EMFILE, errno.ENFILE):
        text += f": {file_limit()}"
    return text


def _classify_answer(error: Exception) -> RetryableFailure | S3Refusal:
    response = error.response  # type: ignore[attr-defined]  # botocore's ClientError
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(response.get("Error", {}).get("Code", ""))
    refusal = S3Refusal(status, code, str(response.get("Error", {}).get("Message", "")))
    is_down = status >= 500 and status not in {501, 505, 507}
    if status == 500 and not refusal.has_reason:  # also botocore's word for 200 and a garbled body
        return NoS3Answer(str(refusal))
    if is_down or status in _RETRYABLE_STATUSES or code in RETRYABLE_CODES:
        return RetryableFailure(str(refusal))
    return refusal
