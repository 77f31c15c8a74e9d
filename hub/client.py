"""What the commands that talk to the Hub share: names, errors that say how to go on, and changes to a repository."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash


MAX_SILENCE = 120  # seconds without a byte from the Hub; huggingface_hub has no limit of its own


class Refusal(ValueError):
    """What a command refuses by its own rules, as opposed to errors in reading the Hub's answers."""


def is_repository(name: str) -> bool:
    """Whether a repository of the Hub can have this name, with its owner: ORG/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_repositories(**names: str):
    """Raises a `ValueError` for the first argument that is not ORG/NAME."""
    for argument, name in names.items():
        if not is_repository(name):
            raise ValueError(f"{argument}={name} must be ORG/NAME, of letters, digits, '-', '_' and '.'.")


@contextmanager
def explain_hub_errors(target: str) -> Iterator[None]:
    """
    Ends requests that the Hub leaves without an answer, and turns every error but a [`Refusal`] into an `OSError` that
    says what readers of `target` see and how to go on.
    """
    session = get_session()
    if _limit_silence not in session.event_hooks["request"]:
        hooks = {**session.event_hooks, "request": [*session.event_hooks["request"], _limit_silence]}
        set_client_factory(lambda: type(session)(event_hooks=hooks, follow_redirects=True, timeout=None))
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        # Uploads wrap the cause in a RuntimeError, downloads in the error that nothing is cached
        cause = error.__cause__ or error if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) else error
        reason = f"{type(cause).__name__}: {cause}"
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            advice = "Log in with `hf auth login`, with a token that may write there, and run the same command again."
        elif isinstance(cause, (HTTPError, OSError, RuntimeError)):
            advice = "Run the same command again to go on."
        else:
            reason = f"What {constants.ENDPOINT} answered cannot be understood ({reason})."
            advice = (
                "Check what answers there (HF_ENDPOINT, a proxy or a network's login page may decide it) and whether "
                "huggingface_hub is up to date. Run the same command again to go on."
            )
        raise OSError(
            f"{reason}\nReaders of {target} see the old state, or the new one if its commit was the last thing done. "
            f"{advice}"
        ) from error


def _limit_silence(request):
    for part, seconds in request.extensions["timeout"].items():
        request.extensions["timeout"][part] = MAX_SILENCE if seconds is None else min(seconds, MAX_SILENCE)


def list_files(api: HfApi, repo_id: str, commit: str, repo_type: str = "model") -> dict[str, RepoFile]:
    """What a commit holds, by name."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def without_same(additions: Iterable[CommitOperationAdd], remote: dict[str, RepoFile]) -> list[CommitOperationAdd]:
    """The additions that a commit with the files `remote` does not already hold with the same content."""
    return [addition for addition in additions if not _is_same(addition, remote.get(addition.path_in_repo))]


def _is_same(addition: CommitOperationAdd, remote: RepoFile | None) -> bool:
    if remote is None or remote.size != addition.upload_info.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        return remote.blob_id == git_hash(file.read())


def print_changes(changes: list[CommitOperationAdd | CommitOperationDelete], num_files: int):
    """Prints what a commit would send, out of `num_files` files, and what it would delete; additions come first."""
    sent = [change for change in changes if isinstance(change, CommitOperationAdd)]
    for addition in sent:
        print(f"send    {addition.path_in_repo:44}{addition.upload_info.size:>15,} bytes")
    for change in changes[len(sent) :]:
        print(f"delete  {change.path_in_repo}")
    print(f"{len(sent)} of {num_files} files are to be sent", flush=True)
