"""`gft-lite push`: upload an adapter or a model to the hub, with card and metrics."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from gft_lite.utils.errors import UserError, short_repr
from gft_lite.utils.files import read_json
from gft_lite.utils.secrets import find_secret

# Files of a run that are uploaded beside its adapter or merged model.
_FIGURES = ("summary.json", "metrics.jsonl", "eval/base.json", "eval/trained.json")
_TEXT = {".json", ".jsonl", ".md", ".txt", ".jinja", ".yaml"}
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")

Files = dict[str, Path]  # By their path in the repository.


class PushError(RuntimeError):
    """The hub can't be reached, or failed."""


def check_repository(name: str) -> None:
    """Raises: UserError for a name that no repository of the hub can have."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error).partition(":")[0].rstrip(".")
        rule = "REPO: must be a name on the hub such as USER/MODEL"
        raise UserError([f"{rule}, got {short_repr(name)}. {reason}."]) from None


def find_token() -> str:
    """The user's token for the hub. Raises: UserError if there is none."""
    token = get_token()
    if token is None:
        rule = "HF_TOKEN: must be set to upload, got no token"
        raise UserError([f"{rule}. Log in with `hf auth login`, or use --dry-run."])
    return token


def files_to_push(target: str | Path, model: str | Path | None = None) -> Files:
    """The files of a finished run, or of the folder of an adapter or a model.

    `model` is the folder of the merged model that takes the place of the run's adapter.
    Raises: UserError for another folder, and for a file that contains a secret.
    """
    target = Path(target)
    is_run = os.path.isfile(target / "recipe.yaml")
    weights = Path(model) if model else target / "adapter" if is_run else target
    if not any(os.path.isfile(weights / name) for name in _WEIGHTS):
        rule = "must be a finished run, or the folder of an adapter or of a merged model"
        raise UserError([f"RUN: {rule}, got {short_repr(str(target))}."])
    found = {file.name: file for file in sorted(weights.iterdir()) if _is_part(file)}
    figures = _FIGURES if is_run else ()
    found |= {f"run/{name}": target / name for name in figures if (target / name).is_file()}
    for file in found.values():
        if file.suffix in _TEXT and find_secret(file.read_text("utf-8", errors="replace")):
            rule = "must not contain a token or password, got one"
            raise UserError([f"{file}: {rule}. Remove it before the file is uploaded."])
    return found


def _is_part(file: Path) -> bool:
    """True for a file of a model, not for a hidden one or the rest of an interrupted write."""
    return file.is_file() and not file.name.startswith(".") and file.suffix != ".tmp"


def describe(files: Mapping[str, Path]) -> list[str]:
    """A line for each file with its size in bytes, and one for all."""
    sizes = {name: file.stat().st_size for name, file in files.items()}
    sizes[f"{len(sizes)} files"] = sum(sizes.values())
    return [f"{size:>15,}  {name}" for name, size in sizes.items()]


def local_base(files: Mapping[str, Path]) -> str | None:
    """The base of an adapter if it is named by a folder of this machine, which others lack."""
    config = files.get("adapter_config.json")
    if config is None:
        return None
    rule = "must be the configuration of an adapter"
    base = read_json(
        config, lambda value: value.get("base_model_name_or_path"), rule, "Restore it."
    )
    return base if base and os.path.isabs(base) else None


def push(files: Mapping[str, Path], repository: str, *, private: bool, token: str) -> str:
    """Upload files in one commit to a repository, which is created if needed; returns its URL.

    Raises: UserError if the hub rejects the token or the name, PushError if it fails.
    """
    disable_progress_bars()
    api = HfApi(token=token)
    additions: list[Any] = [CommitOperationAdd(name, file) for name, file in files.items()]
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        # An existing repository keeps its visibility.
        if private and not api.model_info(url.repo_id).private:
            rule = f"--private: must be given for a private repository, got {url.repo_id}"
            raise UserError([f"{rule}, which is public. Nothing was uploaded. Choose another."])
        message = f"Upload {len(additions)} files with gft-lite"
        api.create_commit(url.repo_id, additions, commit_message=message)
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = error.server_message or error.response.reason_phrase
        if status in (400, 401, 403, 404, 409):
            rule = "REPO: must be a repository that the token may write to"
            got = f"{repository!r} and the answer {status} ({reason})"
            advice = "Check the name and the token's permissions."
            raise UserError([f"{rule}, got {got}. {advice}"]) from None
        raise PushError(f"the hub answered {status} ({reason}). Run the command again.") from None
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise PushError(f"{api.endpoint} can't be reached ({reason}).") from None
    return str(url)
