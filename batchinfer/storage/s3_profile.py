"""What in the AWS configuration files keeps a client from being built or from getting credentials.

Must not know: requests, answers. Repeats no value of those files, which may be a secret; of a
program that gives credentials it repeats what that said on stderr, as it is meant for somebody.
"""

from __future__ import annotations

import json
import os
import traceback
from pathlib import Path
from typing import Any

_CONFIG_FILE = ("AWS_CONFIG_FILE", "~/.aws/config")
_CREDENTIALS_FILE = ("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
_PROCESS = "credential_process"
#: botocore's names of providers: the first asks a service of the machine, which may be starting.
_CONTAINER = "container-role"
_CREDENTIALS_MODULES = {(name, "credentials.py") for name in ("botocore", "aiobotocore")}
_MAX_SAID = 500  # characters; the end of it, where a program says why


def no_credentials(error: BaseException, session: Any) -> str | None:
    """Why a provider that this machine is set up with gives no credentials, as a sentence.

    None: `error` is of something else, or of a service that may answer later.
    `session`: botocore's.
    """
    from botocore.exceptions import CredentialRetrievalError

    profile = _Profile(session)
    if isinstance(error, CredentialRetrievalError):
        provider, said = error.kwargs["provider"], str(error.kwargs["error_msg"]).strip()
        if provider == _CONTAINER:
            return None
        if provider != "custom-process":
            return f"{profile.where()} gives no credentials ({provider}: {said}): correct it"
        why = f"failed: {said[-_MAX_SAID:]}" if said else "failed and said nothing on stderr"
    elif isinstance(error, json.JSONDecodeError) and profile.has(_PROCESS):
        why = "does not print JSON"
    elif profile.has(_PROCESS) and _is_of_credentials(error):
        why = f"prints JSON that has no credentials ({type(error).__name__}: {error})"
    else:
        return None
    return f"{_PROCESS} of {profile.where(_PROCESS)} {why}. Correct it, or set other credentials"


def _is_of_credentials(error: BaseException) -> bool:
    """Whether botocore failed on what credentials are made of: it looks at little of it before."""
    if not isinstance(error, AttributeError | KeyError | TypeError | ValueError):
        return False
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(Path(file).parts[-2:] in _CREDENTIALS_MODULES for file in files)


def no_client(error: BaseException, session: Any) -> str:
    """What to correct after botocore failed to build a client, as a sentence."""
    profile = _Profile(session)
    if profile.has_plain("s3"):
        return (
            f"`s3 =` of {profile.where('s3')} has a value on its own line: it takes indented lines "
            "(`addressing_style = path`). Correct it or remove it"
        )
    return (
        "botocore can build no client from this machine's AWS configuration "
        f"({type(error).__name__}: {error}): correct {profile.where()} and the AWS_… variables"
    )


class _Profile:
    """The section of the files that a session goes by. Nothing here raises: it is for messages."""

    def __init__(self, session: Any) -> None:
        self._name = str(session.profile or "default")

    def where(self, key: str | None = None) -> str:
        """The profile and the file, that which has `key` if one has."""
        found = [file for file in (_CONFIG_FILE, _CREDENTIALS_FILE) if key in self._section(file)]
        variable, default = found[0] if found else _CONFIG_FILE
        path = f"{os.environ[variable]} ({variable})" if os.environ.get(variable) else default
        return f"profile {self._name} in {path}"

    def has(self, key: str) -> bool:
        return any(key in self._section(file) for file in (_CONFIG_FILE, _CREDENTIALS_FILE))

    def has_plain(self, key: str) -> bool:
        """Whether there is a value where botocore wants a section of its own."""
        files = (_CONFIG_FILE, _CREDENTIALS_FILE)
        return any(isinstance(self._section(file).get(key), str) for file in files)

    def _section(self, file: tuple[str, str]) -> dict[str, Any]:
        from botocore.configloader import load_config, raw_config_parse
        from botocore.exceptions import BotoCoreError

        variable, default = file
        path = os.environ.get(variable) or default
        try:
            if file is _CREDENTIALS_FILE:
                section = raw_config_parse(path).get(self._name)
            else:
                section = load_config(path)["profiles"].get(self._name)
        except BotoCoreError:
            return {}
        return section if isinstance(section, dict) else {}
