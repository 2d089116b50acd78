"""Folders and repositories: what `from_pretrained` and `push_to_hub` do with the Hugging Face hub.

A local folder never touches the network. From a repository only JSON and safetensors files come,
into the cache of huggingface-hub; nothing in them is run.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.tensorfile import refuse_pickle

CONFIG, MODEL, CARD = "config.json", "model.safetensors", "README.md"
MODEL_TYPE = "vlbeit"
"""In config.json, by which transformers finds the class (vlbeit.hf)."""
WANTED = ("*.json", "*.safetensors", "README.md")
"""Patterns of what is fetched of a repository; they match in subfolders too."""
SET_ASIDE = "optimizer.safetensors"
"""Not fetched: a resume needs it, and it is twice the size of the model."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(place: str) -> bool:
    """Whether a word has the form NAMESPACE/NAME."""
    return _REPOSITORY.fullmatch(place) is not None and ".." not in place


def local_folder(
    place: str | Path,
    *,
    wanted: Sequence[str] = WANTED,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder itself, or where the files of a hub repository lie after they were fetched.

    Args:
        place: a folder, or NAMESPACE/NAME if there is no folder of that name.
        wanted: patterns of the files to fetch.
        revision: branch, tag or commit; None: the default branch.
        token, cache_dir, force_download: as everywhere in huggingface-hub.
        local_files_only: take what the cache has; HF_HUB_OFFLINE=1 does the same for all calls.

    Raises:
        InputError: neither a folder nor a repository that can be reached.
        UnsafeError: a folder with weights as a pickle only.
    """
    path = Path(place)
    if path.is_dir():
        refuse_pickle(path)
        return path
    if path.exists():
        raise InputError(f"{place}: is a file; give the folder that holds {CONFIG} and {MODEL}")
    if not is_repository(str(place)):
        raise InputError(f"{place}: no such folder, and no NAMESPACE/NAME of a hub repository")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                str(place),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                allow_patterns=list(wanted),
                ignore_patterns=[SET_ASIDE],
            )
        )
    except Exception as error:  # see `upload`
        _explain(error, str(place), revision)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool = False,
    message: str = "Upload by vlbeit",
) -> str:
    """Every file of a folder into a hub repository, as one commit; it is made if it is not there.

    Args:
        private: of a new repository; None: as the namespace has it.
        token: None: the one that huggingface-hub keeps or HF_TOKEN.

    Returns:
        the address of the commit.

    Raises:
        ConfigError: `repo_id` is not NAMESPACE/NAME.
        SaveError: the hub cannot be reached or refuses.
    """
    if not is_repository(repo_id):
        raise ConfigError(f"{repo_id!r} is not NAMESPACE/NAME of a hub repository")
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            revision=branch,
            create_pr=create_pr,
        )
    except Exception as error:  # HTTP errors are httpx's or httpx2's, by the version of the library
        raise SaveError(
            f"{repo_id}: the upload of {folder} failed ({_first_line(error)}); the folder is "
            "complete, so try again, or upload it with `hf upload`"
        ) from None
    return str(found)


def _explain(error: Exception, repo_id: str, revision: str | None) -> NoReturn:
    """What went wrong, in the user's terms."""
    from huggingface_hub import errors

    where = repo_id if revision is None else f"{repo_id} at {revision}"
    kinds: list[tuple[Any, str]] = [
        (errors.GatedRepoError, "its owner must grant access, and a token must be given"),
        (
            errors.RepositoryNotFoundError,
            "no folder of that name here, and no repository on the hub (or a private one without a "
            "token)",
        ),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (
            errors.LocalEntryNotFoundError,
            "no folder of that name here, it is not in the cache, and the hub cannot be asked "
            "(offline, or local_files_only); check the path, or fetch it once while online",
        ),
    ]
    for kind, words in kinds:
        if isinstance(error, kind):
            raise InputError(f"{where}: {words}") from None
    raise InputError(f"{where}: cannot be fetched ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
