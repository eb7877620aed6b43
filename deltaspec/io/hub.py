"""Models of the hub: from the local cache where it has all that is needed, else exactly those files are fetched."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaspec.errors import CheckpointError
from deltaspec.io import shards, weight_files
from deltaspec.io.meta_layout import PARAMS
from deltaspec.io.peft_files import CONFIG, choose_adapter
from deltaspec.io.quantisation_config import MODELOPT
from deltaspec.io.sentence_modules import FILES, LIST, lacks_weights, list_folders

ID = re.compile(r"(?P<repo>[\w-][\w.-]*(/[\w-][\w.-]*)?)(@(?P<revision>[\w][\w./-]*))?", re.ASCII)
PATIENCE = 5.0  # seconds until an unreachable hub is given up, name lookup included


def parse_id(ref: str, *, suffixes: tuple[str, ...]) -> tuple[str, str] | None:
    """Split ``owner/name[@revision]`` or ``name@revision``; None where ``ref`` can only be a path.

    >>> parse_id("owner/name@v1", suffixes=()), parse_id("name", suffixes=())
    (('owner/name', 'v1'), None)
    """
    match = ID.fullmatch(ref)
    if match is None or ".." in ref or match["repo"].endswith(suffixes):
        return None
    if "/" not in match["repo"] and not match["revision"]:
        return None
    return match["repo"], match["revision"] or "main"


def fetch(repo: str, revision: str) -> tuple[Path, str]:
    """Return a folder with the config and weights of a model of the hub, and the commit that they come from.

    Raises
    ------
    CheckpointError
        If it is not cached and the hub is switched off, out of reach, or does not give it.
    """
    from huggingface_hub import constants

    folder = _cached(repo, revision)
    if folder is not None and _needed(folder) == [] and _has_config(folder) and not lacks_weights(folder):
        return folder, folder.name
    try:
        if constants.HF_HUB_OFFLINE:
            raise _failure(
                repo, revision, "HF_HUB_OFFLINE is set and the cache does not have it; unset it or use a path"
            )
        return _download(repo, revision)
    except CheckpointError:
        if folder is not None and _needed(folder) == []:
            return folder, folder.name  # only a config is missing, which the model may not have
        raise


def fetch_config(repo: str, revision: str) -> Path:
    """Return the config.json of a model of the hub, from the cache or fetched alone, without any weights.

    Raises
    ------
    CheckpointError
        If it is not cached and the hub is switched off, out of reach, or does not give it.
    """
    from huggingface_hub import constants

    folder = _cached(repo, revision)
    if folder is not None and (folder / "config.json").is_file():
        return folder / "config.json"
    if constants.HF_HUB_OFFLINE:
        raise _failure(repo, revision, "HF_HUB_OFFLINE is set and the cache does not have it; unset it or use a path")
    if "config.json" not in [sibling.rfilename for sibling in _ask(repo, revision).siblings or []]:
        raise _failure(repo, revision, "it has no config.json; pass a folder that has one")
    return _get(repo, "config.json", revision) / "config.json"


def fetch_others(repo: str, revision: str, *, chosen: Callable[[str], bool]) -> None:
    """Bring those files of a model into the cache whose names ``chosen`` takes, beside what is there.

    Raises
    ------
    CheckpointError
        If the hub is switched off or out of reach, or does not give one.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise _failure(repo, revision, "HF_HUB_OFFLINE is set, so files beside the weights cannot be looked for")
    for sibling in _ask(repo, revision).siblings or []:
        if chosen(sibling.rfilename):
            _get(repo, sibling.rfilename, revision)


def _failure(repo: str, revision: str, what: str) -> CheckpointError:
    message = f"Cannot open '{repo}' at revision '{revision}': no such folder here, and as a model of the hub: {what}."
    return CheckpointError(message)


def _cached(repo: str, revision: str) -> Path | None:
    """Return the snapshot that the cache has for a revision, complete or not."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    named = cache / "refs" / revision
    commit = named.read_text().strip() if named.is_file() else revision
    folder = cache / "snapshots" / commit
    return folder if commit and "/" not in commit and folder.is_dir() else None


def _has_config(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", CONFIG, PARAMS))


def _choose(names: list[str]) -> list[str]:
    """Choose which of a model's files to open: an adapter's two, or the weights."""
    adapter = choose_adapter(names)
    if CONFIG in names and adapter:
        return [adapter]
    return list(weight_files.choose_weights(names))


def _needed(folder: Path) -> list[str] | None:
    """Return which weight files a snapshot still lacks; None where it cannot tell."""
    chosen = _choose([path.name for path in folder.iterdir() if path.exists()])
    if not chosen:
        return None
    if not chosen[0].endswith(".json"):
        return weight_files.missing_shards(chosen)
    files = set(shards.read_index(folder / chosen[0]).values())
    return sorted(file for file in files if not (folder / file).exists())


def _download(repo: str, revision: str) -> tuple[Path, str]:
    """Fetch what the hub's file list says is needed."""
    info = _ask(repo, revision)
    names = [sibling.rfilename for sibling in info.siblings or []]
    chosen = _choose(names)
    if not chosen:
        listed = ", ".join(sorted(names)[:8]) or "nothing"
        what = f"it has no weights in safetensors or .bin, only {listed}; choose another revision or convert it"
        raise _failure(repo, revision, what)
    configs = [name for name in ("config.json", CONFIG, PARAMS, MODELOPT) if name in names]
    folder = Path()
    for name in [*configs, *chosen]:
        folder = _get(repo, name, revision)
    for name in _needed(folder) or []:
        _get(repo, name, folder.name)
    if LIST in names:
        inner = tuple(f"{name}/" for name in list_folders(_get(repo, LIST, folder.name) / LIST))
        for name in [name for name in names if name.startswith(inner)][:FILES] if inner else ():
            _get(repo, name, folder.name)
    return folder, folder.name


def _ask(repo: str, revision: str) -> Any:
    """Ask the hub for a model's commit and files."""
    try:
        return ask(lambda api, patience: api.model_info(repo, revision=revision, timeout=patience))
    except Exception as cause:  # every version of the library raises its own network errors
        raise _failure(repo, revision, explain(cause)) from cause


def ask(question: Callable[[Any, float], Any]) -> Any:
    """Ask the hub's API something, and give up in time even where name lookup hangs.

    Parameters
    ----------
    question : callable
        Takes an HfApi and the seconds that its answer may take; what it raises is raised.
    """
    from huggingface_hub import HfApi

    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(question(HfApi(), PATIENCE - 1))
        except Exception as cause:
            answers.append(cause)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    answer = answers[0] if answers else TimeoutError(f"no answer within {PATIENCE:g} s")
    if isinstance(answer, Exception):
        raise answer
    return answer


def _get(repo: str, name: str, revision: str) -> Path:
    """Fetch one file into the cache, and return the snapshot that it is in."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(repo, name, revision=revision, etag_timeout=PATIENCE))
    except Exception as cause:
        what = f"'{name}' could not be fetched: {explain(cause)}"
        raise _failure(repo, revision, what) from cause
    return path.parents[name.count("/")]


def explain(cause: Exception) -> str:
    """Say in words what went wrong at the hub, and what to do."""
    from huggingface_hub import errors

    if isinstance(cause, errors.GatedRepoError):
        return "it is gated; accept its terms on its page and run hf auth login"
    if isinstance(cause, errors.RevisionNotFoundError):
        return "it has no such revision; check the name after @"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return "it does not exist or is private; check the name, or run hf auth login"
    if isinstance(cause, errors.HfHubHTTPError):
        return f"the hub answered with an error ({str(cause).splitlines()[0]}); try again later"
    first = " ".join(str(cause).split()) or type(cause).__name__
    return f"the hub cannot be reached ({first[:200]}); check the network, or download it elsewhere and give its path"
