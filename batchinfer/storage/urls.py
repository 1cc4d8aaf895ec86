"""Text of URLs: which kind, which folder, which name. Touches no storage.

Must not know: what is behind a URL. Only two kinds exist: local paths and `s3://bucket/key`.
"""

from __future__ import annotations

from pathlib import Path

from batchinfer.errors import ConfigError

S3_SCHEME = "s3://"


def is_s3(url: str) -> bool:
    return url.startswith(S3_SCHEME)


def check_url(url: str) -> None:
    """ConfigError for a URL that no store here can serve. Never repeats a secret."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url:
            raise ConfigError("an empty path: write a local folder or s3://bucket/prefix")
        return
    if scheme != "s3":
        raise ConfigError(f"{scheme}:// is not supported: write a local path or s3://bucket/prefix")
    bucket = rest.partition("/")[0]
    if "@" in bucket:
        raise ConfigError(
            f"credentials in a URL are refused (s3://***@{bucket.rpartition('@')[2]}/…): "
            "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not bucket:
        raise ConfigError(f"{url} names no bucket: write s3://bucket/prefix")
    for part in rest.rstrip("/").split("/"):
        if part in ("", ".", ".."):
            what = f"`{part}` as a part of it is" if part else "`//` in it is"
            raise ConfigError(
                f"{url}: {what} taken literally by S3, and no other program would find what is "
                "there. Write the path that you mean"
            )


def local_path(path: str) -> Path:
    """A path with `~` replaced. ConfigError where nobody knows that home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        home = path.partition("/")[0]
        raise ConfigError(f"{path}: {home} is not a known home folder (see HOME)") from None


def split_url(url: str) -> tuple[str, str]:
    """(folder, name): `s3://b/x/y.parquet` -> (`s3://b/x`, `y.parquet`), `y` -> (`.`, `y`).

    The name of a bare bucket or of `/` is empty. `join_url` of the two is `url` again.
    """
    check_url(url)
    start = len(S3_SCHEME) if is_s3(url) else 0
    bare = url.rstrip("/") if len(url.rstrip("/")) > start else url
    cut = bare.rfind("/", start)
    if cut < 0:
        return (bare, "") if start else (".", bare)
    return (bare[:cut] or "/", bare[cut + 1 :])


def join_url(root: str, key: str) -> str:
    """The URL of `key` below `root`."""
    if not key:
        return root
    return key if root == "." else f"{root.rstrip('/')}/{key}"
