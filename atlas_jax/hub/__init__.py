"""Models by the name of their repository: `org/name[:quantisation]` becomes files in the cache of `huggingface_hub`."""

from __future__ import annotations

from pathlib import Path

from atlas_jax.hub._choice import HubError, Repository

__all__ = ["HubError", "Repository", "find_model"]


def find_model(repository: str, *, offline: bool = False) -> Path:
    """The file or folder of a repository's model, fetched if it is not in the cache or not the latest.

    A fetch that was broken off goes on where it was. The cache, the access token, the endpoint and offline mode are those of
    `huggingface_hub`: `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`.

    Args:
      repository: `org/name`, or `org/name:Q8_0` for one quantisation, or `org/name:file.gguf`.
      offline: take what the cache has and ask nobody.

    Raises:
      HubError: there is no such repository, file or quantisation, it may not be read, or it cannot be fetched.
    """
    from atlas_jax.hub import _download  # huggingface_hub takes 0.4 s to import

    return _download.find(Repository.parse(repository), offline=offline)
