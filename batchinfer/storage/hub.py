"""Files of the Hugging Face hub, downloaded once into its library's own cache.

Must not know: what is in them. Where the hub cannot be reached, what is cached is taken. The
library's own variables hold: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from batchinfer.errors import ConfigError

#: Without a limit a network that swallows packets would be waited for without end.
_ANSWER_S = 10.0


def hub_files(
    what: str,
    name: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    repo_type: str = "model",
) -> Path:
    """The local folder of a repository's files that match. `what`: how a message begins.

    Raises ConfigError.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    def download(*, is_offline: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                repo_type=repo_type,
                revision=revision,
                allow_patterns=list(patterns),
                local_files_only=is_offline,
            )
        )

    # Whatever is raised: errors of the network are those of the HTTP library that is used below.
    try:
        HfApi().repo_info(name, repo_type=repo_type, revision=revision, timeout=_ANSWER_S)
        return download(is_offline=False)
    except Exception as error:
        try:
            return download(is_offline=True)
        except Exception:
            at = f" at revision {revision}" if revision else ""
            raise ConfigError(
                f"{what}: could not get {name}{at} from the hub ({constants.ENDPOINT}): "
                f"{_reason(error)}. Check the name, the network and your access, or give a local "
                "path"
            ) from error


def _reason(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
