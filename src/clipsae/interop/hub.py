"""The Hugging Face Hub: fetching an SAE by its id, publishing one with its card."""

import re
import tempfile
from pathlib import Path

from clipsae.interop.card import model_card
from clipsae.interop.files import first_line
from clipsae.sae import SAE

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ID = re.compile(
    rf"(?P<repo>{_PART}/{_PART})(?P<inside>(/{_PART})*)(@(?P<revision>[A-Za-z0-9._/-]+))?"
)


def fetch(source: str, files: tuple[str, ...], suffixes: tuple[str, ...]) -> Path:
    """The folder or file of an id, from the cache or the network; only files that may be needed.

    Args:
        source: "owner/name", "owner/name/folder" or "owner/name/file.pt", "@revision" at its end.
        files: names to fetch of a folder.
        suffixes: of a file that is fetched by itself.

    Raises:
        FileNotFoundError: neither a folder nor an id; or neither cached nor available.
    """
    match = _ID.fullmatch(source)
    if match is None:
        raise FileNotFoundError(
            f"{source!r} is neither a file or folder nor a Hugging Face id such as owner/name: "
            "check its spelling"
        )
    # Slow to import, and only needed here.
    from huggingface_hub import snapshot_download

    inside = match["inside"].strip("/")
    wanted = [inside] if inside.endswith(suffixes) else [f"{inside}/{f}".strip("/") for f in files]
    try:
        folder = snapshot_download(
            match["repo"], revision=match["revision"], allow_patterns=wanted, etag_timeout=10
        )
    except Exception as error:  # offline, no such repository, no access, a broken cache: many kinds
        raise FileNotFoundError(
            f"{source!r} is not a folder, and could not be downloaded from Hugging Face "
            f"({_why(error)}): check the id, the network and the token"
        ) from error
    path = Path(folder) / inside
    if not path.exists():
        raise FileNotFoundError(
            f"{source!r}: the repository {match['repo']} has no {inside}, or it was not cached"
        )
    return path


def is_id(text: str) -> bool:
    """Whether it is a repository's id, owner/name."""
    return re.fullmatch(rf"{_PART}/{_PART}", text) is not None


def push_to_hub(
    sae: SAE | str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload an SAE",
) -> str:
    """Publish an SAE, with a card written from its results, as `clipsae.load(repo_id)` reads it.

    Args:
        sae: an SAE, or a folder that holds one; of a folder of the store, the evaluations and
            measurements beside it go into the card.
        repo_id: "owner/name"; created if it does not exist.
        private: of a repository that is created.
        token: of the account; None: the one that is logged in.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: no id, or the Hub cannot be reached or refuses.
        FileNotFoundError: the folder holds no SAE.
    """
    if not is_id(repo_id):
        raise ValueError(f"repo_id={repo_id!r}: expected owner/name")
    with tempfile.TemporaryDirectory() as folder:
        save_with_card(sae, Path(folder), repo_id)
        return upload(Path(folder), repo_id, private=private, token=token, message=message)


def upload(
    folder: Path, repo_id: str, *, private: bool = False, token: str | None = None, message: str
) -> str:
    """Upload a folder as it is; the address of the commit.

    Raises:
        ValueError: the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="clipsae")
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # offline, not logged in, no access: many kinds
        raise ValueError(
            f"{repo_id} was not published ({_why(error)}): check the network and the login (hf "
            "auth login)"
        ) from error
    return str(commit.commit_url)


def save_with_card(sae: SAE | str | Path, folder: Path, repo_id: str) -> None:
    """Write what `push_to_hub` publishes: `sae.json`, `sae.safetensors` and `README.md`."""
    results = None if isinstance(sae, SAE) else Path(sae)
    sae = sae if isinstance(sae, SAE) else SAE.load(sae)
    sae.save(folder)
    (folder / "README.md").write_text(model_card(sae, repo_id, results))


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
