"""
Publishes a checkpoint on the Hub: one atomic commit of weights, code, processor, recipes, logs and card, then verified.

```
python -m delta_llava.hub.push --checkpoint checkpoints/delta-llava-7b-144 --repo_id ORG/delta-llava-7b-144 --dry_run
python -m delta_llava.hub.push --checkpoint checkpoints/delta-llava-7b-elastic --repo_id ORG/delta-llava-7b-elastic \
    --revision tokens-36
```

`--dry_run` prints what would be sent, and sends nothing. A branch `tokens-36` holds the checkpoint with 36 visual
tokens as its default, for `from_pretrained(…, revision="tokens-36")`. Run it again after an interruption, or at any
time: what the Hub has already is not sent twice, and readers see either the old state or the new one.
"""

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session, is_offline_mode
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..configuration_delta_llava import AUTO_MAP, DeltaLlavaConfig
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from .card import build_card
from .verify import verify


REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "configuration_delta_llava.py",
    "modeling_delta_llava.py",
    "processing_delta_llava.py",
)
RECORDS = ("training/*.yaml", "training/*.json", "training/*.png", "results/*.json")
# Nothing else is ever sent, or deleted from a repository: no optimizer state, no pickle, no log of other making
OURS = (*REQUIRED_FILES, *RECORDS, SAFE_WEIGHTS_NAME, "model-*-of-*.safetensors", SAFE_WEIGHTS_INDEX_NAME, "README.md")
TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
MAX_SILENCE = 120  # seconds that the Hub may leave a request without a byte; huggingface_hub would wait for ever


class Published(NamedTuple):
    """The commit (`str`) that a branch stands at now, and whether this push has made it (`bool`)."""

    commit: str
    is_new: bool


def push(
    checkpoint: str | Path,
    repo_id: str,
    revision: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    base_model: list[str] | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
) -> Published | None:
    """
    Publish a checkpoint, and verify what was published as a stranger would load it.

    Args:
        checkpoint (`str` or `Path`): Folder that training, `merge_adapter`, `convert` or `assemble` has written.
        repo_id (`str`): `ORG/NAME`, created where it does not exist.
        revision (`str`, *optional*, defaults to `main`): Branch. `tokens-36` gets 36 visual tokens as its default.
        private (`bool`, *optional*, defaults to `False`): Whether the repository is to be private.
        dry_run (`bool`, *optional*, defaults to `False`): Print what would be sent, and send nothing.
        base_model (`list[str]`, *optional*), datasets (`list[str]`, *optional*), license (`str`, *optional*):
            For the card, where the checkpoint's own records do not tell.

    Returns:
        `Published`: Where the branch stands; `None` for a dry run.

    Raises:
        ValueError: The checkpoint is not whole, holds an access token or was not trained for the branch's number of
            visual tokens, its card has an unfilled field, or a repository that was to be private is public.
        OSError: The Hub refuses or cannot be reached, or somebody else has pushed meanwhile. Readers see the old state
            or, if the Hub's last answer was lost, the new one: a push that is run again goes on from there.
        RuntimeError: What was published is not what was sent, or does not load. It stays, to be looked at.
    """
    checkpoint, branch = Path(checkpoint), revision or "main"
    num_visual_tokens = _check_checkpoint(checkpoint, branch)
    card = build_card(
        checkpoint,
        repo_id,
        revision=revision,
        num_visual_tokens=num_visual_tokens,
        base_model=base_model,
        datasets=datasets,
        license=license,
    )
    files = _files(checkpoint, num_visual_tokens) | {"README.md": str(card).encode()}
    _check_secrets(files)
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]  # reads and hashes them all
    with talking_to_the_hub(repo_id):
        api = HfApi()
        branches = {} if dry_run and is_offline_mode() else _branches(api, repo_id)
        if not (branches or dry_run):
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            branches = _branches(api, repo_id)
        if private and branches and not api.repo_info(repo_id).private:
            raise ValueError(f"{repo_id} is public: make it private in its settings, or push without --private.")
        changes = _changes(api, repo_id, branches.get(branch, branches.get("main")), additions)
        print(f"{checkpoint} to {repo_id}, branch {branch}, {num_visual_tokens} visual tokens by default")
        _print(checkpoint, additions, changes)
        if dry_run:
            print(f"\nREADME.md:\n\n{card}")
            return None
        message = f"Delta-LLaVA with {num_visual_tokens} visual tokens by default"
        published = _commit(api, repo_id, branch, branches, changes, message)
        differing = _changes(api, repo_id, published.commit, additions)

    if differing:
        names = [change.path_in_repo for change in differing]
        raise RuntimeError(f"{repo_id} at {published.commit} is not what was sent: {names} differ.")
    if not published.is_new:
        print(
            "Nothing to send. To verify what is there: python -m delta_llava.hub.verify "
            f"--checkpoint {checkpoint} --repo_id {repo_id} --revision {published.commit} "
            f"--num_visual_tokens {num_visual_tokens}"
        )
        return published
    verify(checkpoint, repo_id, published.commit, num_visual_tokens)
    if others := sorted(name for name in branches if name.startswith("tokens-") and branch == "main"):
        print(f"Branches {', '.join(others)} still hold what they held: push them too.")
    return published


@contextmanager
def talking_to_the_hub(repo_id: str) -> Iterator[None]:
    """Ends a request that is met with silence, and tells after any failure of one how to go on (`OSError`)."""
    hooks = get_session().event_hooks
    if _limit_silence not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _limit_silence]}
    try:
        yield
    except (HTTPError, RuntimeError) as error:  # huggingface_hub's uploads hide the reason behind a RuntimeError
        reason = error.__cause__ if isinstance(error, RuntimeError) else error
        raise OSError(
            f"{type(reason).__name__}: {reason}\nReaders of {repo_id} see the old state, or the new one if its commit "
            "was the last thing done. Run the same command again to go on."
        ) from error


def _limit_silence(request):
    for part, seconds in request.extensions["timeout"].items():
        if seconds is None:
            request.extensions["timeout"][part] = MAX_SILENCE


def _print(
    checkpoint: Path,
    additions: list[CommitOperationAdd],
    changes: list[CommitOperationAdd | CommitOperationDelete],
):
    sent = [change for change in changes if isinstance(change, CommitOperationAdd)]
    for addition in sent:
        print(f"send    {addition.path_in_repo:44}{addition.upload_info.size:>15,} bytes")
    for change in changes[len(sent) :]:
        print(f"delete  {change.path_in_repo}")
    print(f"{len(additions) - len(sent)} of {len(additions)} files are there already")
    files = {Path(addition.path_in_repo) for addition in additions}
    folders = {file.parent for file in files}
    beside = {path.relative_to(checkpoint) for folder in folders for path in (checkpoint / folder).iterdir()}
    print(f"never sent: {', '.join(sorted(map(str, beside - folders - files))) or 'nothing'}", flush=True)


def _check_checkpoint(checkpoint: Path, branch: str) -> int:
    """Refuse a checkpoint that would not load for others; return the number of visual tokens that `branch` is for."""
    if (checkpoint / "adapter_config.json").exists():
        raise ValueError(f"{checkpoint} holds an adapter: make a checkpoint of it by delta_llava.hub.merge_adapter.")
    if missing := [name for name in REQUIRED_FILES if not (checkpoint / name).is_file()]:
        raise ValueError(f"{checkpoint} is no whole checkpoint: {', '.join(missing)} is not there.")
    config = DeltaLlavaConfig.from_pretrained(checkpoint)
    auto_map = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if auto_map != AUTO_MAP:
        raise ValueError(f"auto_map of {checkpoint / 'config.json'} is {auto_map}, but must be {AUTO_MAP}.")
    processor = DeltaLlavaProcessor.from_pretrained(checkpoint)
    for name, theirs in (
        ("num_visual_tokens", processor.num_visual_tokens),
        ("image_token_id", processor.image_token_id),
    ):
        if getattr(config, name) != theirs:
            raise ValueError(
                f"{checkpoint}: {name} is {getattr(config, name)} in the config, {theirs} in the processor."
            )
    for name in _weights(checkpoint):
        if not (checkpoint / name).is_file():
            raise ValueError(f"{checkpoint} lacks {name}, which holds some of its weights.")
    # On meta no weight is read, but each name and shape is compared
    _, info = DeltaLlavaForConditionalGeneration.from_pretrained(
        checkpoint, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True
    )
    if any(info.values()):
        found = ", ".join(f"{kind.replace('_', ' ')}: {sorted(map(str, keys))}" for kind, keys in info.items() if keys)
        raise ValueError(f"The weights in {checkpoint} are not those of its config: {found}.")

    match = re.fullmatch(r"tokens-(\d+)", branch)
    num_visual_tokens = int(match[1]) if match else config.num_visual_tokens
    if num_visual_tokens not in config.visual_token_budgets:
        raise ValueError(
            f"Branch {branch} is for {num_visual_tokens} visual tokens, but {checkpoint} was trained for "
            f"{config.visual_token_budgets}."
        )
    return num_visual_tokens


def _weights(checkpoint: Path) -> list[str]:
    index, single = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if index.exists() == single.exists():
        found = "both" if single.exists() else "neither"
        raise ValueError(f"{checkpoint} must hold {single.name} or {index.name}, and holds {found}.")
    if single.exists():
        return [single.name]
    return [index.name, *sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _files(checkpoint: Path, num_visual_tokens: int) -> dict[str, Path | bytes]:
    """What is to be published but for the card, with another default budget where that is not the checkpoint's own."""
    names = [*REQUIRED_FILES, *_weights(checkpoint)]
    names += [
        path.relative_to(checkpoint).as_posix() for pattern in RECORDS for path in sorted(checkpoint.glob(pattern))
    ]
    files = {name: checkpoint / name for name in names}
    for name in ("config.json", "processor_config.json"):
        values = json.loads(files[name].read_text(encoding="utf-8"))
        if values["num_visual_tokens"] != num_visual_tokens:
            values["num_visual_tokens"] = num_visual_tokens
            files[name] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _check_secrets(files: dict[str, Path | bytes]):
    for name, content in files.items():
        if not name.endswith(".safetensors") and TOKEN.search(_content(content)):
            raise ValueError(f"{name} holds what looks like an access token of the Hub: take it out, and revoke it.")


def _content(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _branches(api: HfApi, repo_id: str) -> dict[str, str]:
    """Commits of a repository's branches; none where there is no repository."""
    try:
        return {branch.name: branch.target_commit for branch in api.list_repo_refs(repo_id).branches}
    except RepositoryNotFoundError:
        return {}


def _changes(
    api: HfApi, repo_id: str, commit: str | None, additions: list[CommitOperationAdd]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes a commit (`None`: an empty repository) hold these files, and of ours no others; additions first."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit) if commit else ()
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    changes = [addition for addition in additions if not _is_same(addition, remote.pop(addition.path_in_repo, None))]
    for name in remote:
        # Weights of an earlier push in other shards, say; what was not made here is left alone
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in OURS):
            changes.append(CommitOperationDelete(name))
    return changes


def _is_same(addition: CommitOperationAdd, there: RepoFile | None) -> bool:
    if there is None or there.size != addition.upload_info.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        return there.blob_id == git_hash(file.read())


def _commit(
    api: HfApi,
    repo_id: str,
    branch: str,
    branches: dict[str, str],
    changes: list[CommitOperationAdd | CommitOperationDelete],
    message: str,
) -> Published:
    staging = f"{branch}.incoming"
    if staging in branches:  # of a push that was interrupted
        api.delete_branch(repo_id, branch=staging)
    head = branches.get(branch)
    if head is not None:
        if not changes:
            return Published(head, is_new=False)
        commit = api.create_commit(repo_id, changes, commit_message=message, revision=branch, parent_commit=head).oid
        return Published(commit, is_new=True)
    # A new branch appears with its commit: begun at main under its own name, it would have main's default for a while
    commit = branches["main"]
    if changes:
        api.create_branch(repo_id, branch=staging, revision=commit)
        commit = api.create_commit(repo_id, changes, commit_message=message, revision=staging, parent_commit=commit).oid
    api.create_branch(repo_id, branch=branch, revision=commit)
    if changes:
        api.delete_branch(repo_id, branch=staging)
    return Published(commit, is_new=True)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of the checkpoint")
    parser.add_argument("--repo_id", required=True, help="ORG/NAME")
    parser.add_argument("--revision", help="branch (default: main); tokens-36 gets 36 visual tokens as its default")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry_run", action="store_true", help="print what would be sent, and send nothing")
    parser.add_argument("--base_model", nargs="+", help="ORG/NAME of tower and language model, for the card")
    parser.add_argument("--datasets", nargs="+", help="ORG/NAME of the data sets trained on, for the card")
    parser.add_argument("--license", help="the language model's, as the Hub names it, for the card")
    options = parser.parse_args(arguments)
    try:
        published = push(**vars(options))
    except OSError as error:
        raise SystemExit(str(error)) from error
    if published:
        print_pinned(options.repo_id, published)


def print_pinned(repo_id: str, published: Published):
    """Print a commit, and how to load exactly that one."""
    print(f"{repo_id} stands at commit {published.commit}. To pin it:")
    print(f'from_pretrained("{repo_id}", revision="{published.commit}", trust_remote_code=True)')


if __name__ == "__main__":
    main()
