r"""
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
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    cached_assets_path,
    constants,
    get_session,
    get_token,
    hf_hub_download,
    is_offline_mode,
    set_client_factory,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..cascade import CASCADE_NAME
from ..configuration_delta_llava import AUTO_MAP, DeltaLlavaConfig
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from ..weights import read_weights, refuse_adapter, weight_files
from .assemble import is_repository
from .card import FAMILY, build_card
from .verify import verify


CODE_FILES = ("configuration_delta_llava.py", "modeling_delta_llava.py", "processing_delta_llava.py")
REQUIRED_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    *CODE_FILES,
)
STAGES = [f"training/{stage}*.{kind}" for stage in ("pretrain", "finetune") for kind in ("yaml", "json", "png")]
RECORDS = ("training/sources.yaml", *STAGES, "results/tokens-*.json", CASCADE_NAME)
# Nothing else is ever sent, or deleted from a repository: no optimizer state, no pickle, no log of other making
SHARDS = "model-*-of-*.safetensors"
OURS = (*REQUIRED_FILES, *RECORDS, SAFE_WEIGHTS_NAME, SHARDS, SAFE_WEIGHTS_INDEX_NAME, "README.md")
TOKEN = re.compile(rb"(hf|api_org)_[\w.-]{30,}")
FOLDERS = ("training", "results", "additional_chat_templates")
# Whoever loads the folder reads these, whether they are sent or not
READ = (".json", ".jinja", ".py", ".txt", ".model", ".safetensors")
BUDGET_BRANCH = re.compile(r"tokens-([1-9][0-9]*)")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_SILENCE = 120  # seconds that the Hub may leave a request without a byte; huggingface_hub would wait for ever


class Refusal(ValueError):
    """What a push refuses of its own accord, in distinction from errors of reading the Hub's answers."""


@dataclass(frozen=True)
class Prepared:
    """
    What a branch of a repository is to hold.

    Args:
        checkpoint (`Path`), repo_id (`str`), branch (`str`): From where to where.
        num_visual_tokens (`int`): Default budget of the branch.
        card (`ModelCard`): Of the branch.
        files (`dict[str, Path | bytes]`): All files by their names in the repository, the card among them: weights by
            their place, the others as they were read.
        named (`dict[str, list[str]]`): What the card says to be on the Hub by the word of whoever pushes or trained,
            under `"dataset"` and `"model"`.
    """

    checkpoint: Path
    repo_id: str
    branch: str
    num_visual_tokens: int
    card: ModelCard
    files: dict[str, Path | bytes]
    named: dict[str, list[str]]


def prepare(
    checkpoint: str | Path,
    repo_id: str,
    revision: str | None = None,
    base_model: list[str] | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
    family: str | Path = FAMILY,
) -> Prepared:
    """
    Check a checkpoint and gather what is to be published of it, without a network.

    Args:
        checkpoint (`str` or `Path`): Folder that training, `merge_adapter`, `convert` or `assemble` has written.
        repo_id (`str`): `ORG/NAME`.
        revision (`str`, *optional*, defaults to `main`): Branch. `tokens-36` gets 36 visual tokens as its default.
        base_model (`list[str]`, *optional*), datasets (`list[str]`, *optional*), license (`str`, *optional*):
            For the card, where the checkpoint's own records do not tell, as for [`~delta_llava.hub.card.build_card`].
        family (`str` or `Path`, *optional*, defaults to `hub/checkpoints.yaml`): With licenses and data sets by name.

    Raises:
        ValueError: The checkpoint is not whole, has weights that are not finite, holds an access token or a link in
            place of a file, or was not trained for the branch's number of visual tokens; the branch's name is no name
            of a budget, but looks like one; or the card has an unfilled field.
    """
    checkpoint, branch = Path(checkpoint), revision or "main"
    if not is_repository(repo_id):
        raise ValueError(f"repo_id={repo_id} must be ORG/NAME, of letters, digits, '-', '_' and '.'.")
    _check_branch(branch)
    _check_files(checkpoint)
    num_visual_tokens = _check_checkpoint(checkpoint, branch)
    card = build_card(
        checkpoint,
        repo_id,
        revision=None if branch == "main" else branch,
        num_visual_tokens=num_visual_tokens,
        base_model=base_model,
        datasets=datasets,
        license=license,
        family=family,
    )
    files = _files(checkpoint, num_visual_tokens) | {"README.md": str(card).encode()}
    token = get_token()
    for name, content in files.items():
        if isinstance(content, Path):
            with safe_open(content, framework="pt") as weights:
                content = str(weights.metadata()).encode()
        if TOKEN.search(content) or (token and token.encode() in content):
            raise ValueError(f"{name} holds what looks like an access token of the Hub: take it out, and revoke it.")
    known = yaml.safe_load(Path(family).read_text(encoding="utf-8"))["datasets"].values()
    said = [name for name in card.data.datasets or () if name not in known]
    return Prepared(
        checkpoint, repo_id, branch, num_visual_tokens, card, files, {"dataset": said, "model": base_model or []}
    )


def push(
    prepared: Prepared, private: bool = False, dry_run: bool = False, home: str | Path | None = None
) -> str | None:
    """
    Publish a checkpoint, and verify what was published as a stranger would load it.

    A new branch begins as one commit off `main`; a later push is one commit on the branch itself.

    Args:
        prepared (`Prepared`): What [`prepare`] returns.
        private (`bool`, *optional*, defaults to `False`): Whether the repository is to be private.
        dry_run (`bool`, *optional*, defaults to `False`): Print what would be sent, and send nothing.
        home (`str` or `Path`, *optional*): As for [`~delta_llava.hub.verify.verify`].

    Returns:
        `str`: The commit that the branch stands at; `None` for a dry run.

    Raises:
        ValueError: A repository that was to be private is public, or holds a model of another type, or a data set or a
            base model that was said to be on the Hub is not there.
        OSError: The Hub refuses or cannot be reached, what it answers cannot be understood, or somebody else has pushed
            meanwhile. Readers see the old state or, if the Hub's last answer was lost, the new one: a push that is run
            again goes on from there.
        RuntimeError: What was published is not what was sent, or does not load. It stays, to be looked at.
    """
    repo_id, branch = prepared.repo_id, prepared.branch
    print(f"{prepared.checkpoint} to {repo_id}, branch {branch}, {prepared.num_visual_tokens} visual tokens by default")
    additions = [CommitOperationAdd(name, content) for name, content in prepared.files.items()]
    if dry_run and is_offline_mode():
        print("Offline: what the repository holds is not known.")
        _print_changes(prepared, additions)
        print(f"\nREADME.md:\n\n{prepared.card}")
        return None
    with talking_to_the_hub(repo_id):
        api = HfApi()
        for kind, names in prepared.named.items():
            if absent := [name for name in names if not api.repo_exists(name, repo_type=kind)]:
                words = ", or describe data that is not there in words, as in --datasets 'Our own drawings'"
                raise Refusal(
                    f"{kind}s={absent} cannot be found on the Hub: correct the name{words * (kind == 'dataset')}."
                )
        branches = _branches(api, repo_id)
        if not (branches or dry_run):
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            branches = _branches(api, repo_id)
            if "main" not in branches:
                raise OSError(f"{repo_id} has been created, and the Hub shows no branch main of it")
        if private and branches and not api.repo_info(repo_id).private:
            raise Refusal(f"{repo_id} is public: make it private in its settings, or push without --private.")
        changes = _changes(api, repo_id, branches.get(branch, branches.get("main")), additions)
        _print_changes(prepared, changes)
        if branch not in ("main", *branches) and len(changes) >= len(additions):
            print(f"main of {repo_id} does not hold this checkpoint: push without --revision too.")
        if dry_run:
            print(f"\nREADME.md:\n\n{prepared.card}")
            return None
        message = f"Delta-LLaVA with {prepared.num_visual_tokens} visual tokens by default"
        commit = _commit(api, repo_id, branch, branches, changes, message)
        differing = _changes(api, repo_id, commit, additions)
        if (head := _branches(api, repo_id).get(branch)) != commit:
            raise OSError(f"branch {branch} is at {head}, and not at {commit}, which has been pushed to it")

    if differing:
        names = [change.path_in_repo for change in differing]
        raise RuntimeError(f"{repo_id} at {commit} is not what was sent: {names} differ.")
    verified = cached_assets_path("delta_llava", namespace="verified", subfolder=repo_id.replace("/", "--")) / commit
    if verified.exists():
        print(f"{commit} has been verified before.")
    else:
        verify(prepared.checkpoint, repo_id, commit, prepared.num_visual_tokens, home)
        verified.touch()
    print(f'To pin it: from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True)')
    if changes and branch == "main" and (others := sorted(name for name in branches if name.startswith("tokens-"))):
        print(f"Branches {', '.join(others)} still hold what they held: push them too.")
    return commit


@contextmanager
def talking_to_the_hub(what: str) -> Iterator[None]:
    """Ends a request that is met with silence, and tells after any failure of one how to go on (`OSError`)."""
    session = get_session()
    if _limit_silence not in session.event_hooks["request"]:
        hooks = {**session.event_hooks, "request": [*session.event_hooks["request"], _limit_silence]}
        set_client_factory(lambda: type(session)(event_hooks=hooks, follow_redirects=True, timeout=None))
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        # Uploads hide it behind a RuntimeError, downloads behind the news that nothing is in the cache
        reason = error.__cause__ or error if isinstance(error, (RuntimeError, LocalEntryNotFoundError)) else error
        told = f"{type(reason).__name__}: {reason}"
        if isinstance(reason, HfHubHTTPError) and reason.response.status_code in (401, 403):
            advice = "Log in by `hf auth login`, with a token that may write there, and run the same command again."
        elif isinstance(reason, (HTTPError, OSError, RuntimeError)):
            advice = "Run the same command again to go on."
        else:
            told = f"What {constants.ENDPOINT} answered cannot be understood ({told})."
            advice = (
                "See what answers there, which HF_ENDPOINT, a proxy or the login page of a network may decide, and "
                "whether huggingface_hub is up to date. Run the same command again to go on."
            )
        raise OSError(
            f"{told}\nReaders of {what} see the old state, or the new one if its commit was the last thing done. "
            f"{advice}"
        ) from error


def _limit_silence(request):
    for part, seconds in request.extensions["timeout"].items():
        request.extensions["timeout"][part] = MAX_SILENCE if seconds is None else min(seconds, MAX_SILENCE)


def print_changes(changes: list[CommitOperationAdd | CommitOperationDelete], num_files: int):
    """Prints what a commit would send of `num_files` files, and delete."""
    sent = [change for change in changes if isinstance(change, CommitOperationAdd)]
    for addition in sent:
        print(f"send    {addition.path_in_repo:44}{addition.upload_info.size:>15,} bytes")
    for change in changes[len(sent) :]:
        print(f"delete  {change.path_in_repo}")
    print(f"{len(sent)} of {num_files} files are to be sent", flush=True)


def _print_changes(prepared: Prepared, changes: list[CommitOperationAdd | CommitOperationDelete]):
    print_changes(changes, len(prepared.files))
    files = set(map(Path, prepared.files))
    folders = {file.parent for file in files}
    beside = {
        path.relative_to(prepared.checkpoint) for name in folders for path in (prepared.checkpoint / name).iterdir()
    }
    print(f"never sent: {', '.join(sorted(map(str, beside - folders - files))) or 'nothing'}")
    for name in CODE_FILES:
        if prepared.files[name] != (Path(__file__).parents[1] / name).read_bytes():
            print(f"{name} is another than that of this package: it is published as it is.")
    print(end="", flush=True)


def _check_branch(branch: str):
    """Refuse a branch that readers would take for one of a budget, or a push for one that it has left behind."""
    looks = "token" in branch.casefold() or branch.strip().isdecimal() or branch.casefold() == "main"
    if branch.endswith(".incoming") or (looks and branch != "main" and not BUDGET_BRANCH.fullmatch(branch)):
        raise ValueError(
            f"revision={branch!r} must be main, tokens-N for N visual tokens, as tokens-36 is, or a name that is not "
            "like these and does not end with .incoming."
        )


def _check_files(checkpoint: Path):
    """Refuse links: what they lead to lies elsewhere, or is not meant for others, whatever the link is called."""
    files = [path for pattern in ("*", f"{FOLDERS[-1]}/*", *RECORDS) for path in checkpoint.glob(pattern)]
    read = [path for path in files if path.parent != checkpoint or path.suffix in READ or path.name in FOLDERS]
    for path in read:
        if path.is_symlink() or (path.parent != checkpoint and path.parent.is_symlink()):
            raise ValueError(f"{path} is a link, to {path.resolve()}: put what is to be published there itself.")
        if path.name not in FOLDERS and not path.is_file():
            raise ValueError(f"{path} is no file: take it away.")


def _check_checkpoint(checkpoint: Path, branch: str) -> int:
    """Refuse a checkpoint that would not load for others; return the number of visual tokens that `branch` is for."""
    refuse_adapter(checkpoint, checkpoint)
    if missing := [name for name in REQUIRED_FILES if not (checkpoint / name).is_file()]:
        raise ValueError(f"{checkpoint} is no whole checkpoint: {', '.join(missing)} is not there.")
    try:
        config = DeltaLlavaConfig.from_pretrained(checkpoint)
    except StrictDataclassError as error:
        raise ValueError(f"{checkpoint / 'config.json'}: {' '.join(str(error).split())}") from error
    auto_map = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if auto_map != AUTO_MAP:
        raise ValueError(f"auto_map of {checkpoint / 'config.json'} is {auto_map}, but must be {AUTO_MAP}.")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        # Code of another repository could change behind a pinned commit
        if others := re.findall(r'"Auto\w+": \[?\s*"([^"]*--[^"]*)"', (checkpoint / name).read_text(encoding="utf-8")):
            raise ValueError(f"{checkpoint / name} takes code from another repository: {others}.")
    processor = DeltaLlavaProcessor.from_pretrained(checkpoint)
    for name, theirs in (
        ("num_visual_tokens", processor.num_visual_tokens),
        # Processors of earlier releases do not tell
        ("visual_token_budgets", processor.visual_token_budgets or config.visual_token_budgets),
        ("patch_grid_size", processor.patch_grid_size or config.patch_grid_size),
        ("image_token_id", processor.image_token_id),
    ):
        if getattr(config, name) != theirs:
            raise ValueError(
                f"{checkpoint}: {name} is {getattr(config, name)} in the config, {theirs} in the processor."
            )
    if getattr(config, "transformers_weights", None):
        raise ValueError(f"transformers_weights in {checkpoint / 'config.json'} names other weights: take it out.")
    if others := [name for name in weight_files(checkpoint) if not fnmatch(name, SHARDS) and name != SAFE_WEIGHTS_NAME]:
        raise ValueError(f"{checkpoint} has weights in {others}: name them {SHARDS}, as save_pretrained does.")
    for _ in read_weights(checkpoint):  # all of them can be read, and are finite
        pass
    # On meta no weight is read, but each name and shape is compared
    _, info = DeltaLlavaForConditionalGeneration.from_pretrained(
        checkpoint, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True
    )
    if any(info.values()):
        found = ", ".join(f"{kind.replace('_', ' ')}: {sorted(map(str, keys))}" for kind, keys in info.items() if keys)
        raise ValueError(f"The weights in {checkpoint} are not those of its config: {found}.")

    match = BUDGET_BRANCH.fullmatch(branch)
    num_visual_tokens = int(match[1]) if match else config.num_visual_tokens
    if num_visual_tokens not in config.visual_token_budgets:
        raise ValueError(
            f"Branch {branch} is for {num_visual_tokens} visual tokens, but {checkpoint} was trained for "
            f"{config.visual_token_budgets}."
        )
    return num_visual_tokens


def _files(checkpoint: Path, num_visual_tokens: int) -> dict[str, Path | bytes]:
    """What is to be published but for the card, with another default budget where that is not the checkpoint's own."""
    paths = [checkpoint / name for name in REQUIRED_FILES]
    for pattern in (SAFE_WEIGHTS_INDEX_NAME, "training/sources.yaml", "results/tokens-*.json", CASCADE_NAME):
        paths += sorted(checkpoint.glob(pattern))
    for stage in ("pretrain", "finetune"):  # what lies beside the recipes and is not of one is not for others
        for recipe in sorted(checkpoint.glob(f"training/{stage}*.yaml")):
            paths += [path for kind in (".yaml", ".json", ".png") if (path := recipe.with_suffix(kind)).exists()]
    # Read once, so that what is sent is what has been checked
    files = {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in paths}
    files |= {name: checkpoint / name for name in weight_files(checkpoint)}
    for name in ("config.json", "processor_config.json"):
        values = json.loads(files[name])
        if values["num_visual_tokens"] != num_visual_tokens:
            values["num_visual_tokens"] = num_visual_tokens
            files[name] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _branches(api: HfApi, repo_id: str) -> dict[str, str]:
    """Commits of a repository's branches; none where there is no repository."""
    try:
        branches = {branch.name: branch.target_commit for branch in api.list_repo_refs(repo_id).branches}
    except RepositoryNotFoundError:
        return {}
    if any(not COMMIT.fullmatch(commit) for commit in branches.values()):
        raise ValueError(f"the branches are {branches}")
    return branches


def _changes(
    api: HfApi, repo_id: str, commit: str | None, additions: list[CommitOperationAdd]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What makes a commit (`None`: an empty repository) hold these files, and of ours no others; additions first."""
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit) if commit else ()
    remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    is_there_config = "config.json" in remote
    changes = [addition for addition in additions if not is_same(addition, remote.pop(addition.path_in_repo, None))]
    if is_there_config and any(change.path_in_repo == "config.json" for change in changes):
        # From the cache, a proxy's page that was once taken for it would come again for ever
        file = hf_hub_download(repo_id, "config.json", revision=commit, force_download=True)
        model_type = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
        if model_type != DeltaLlavaConfig.model_type:
            raise Refusal(f"{repo_id} holds a model of type {model_type}, which a push would replace: name another.")
    for name in remote:
        # Weights of an earlier push in other shards, say; what was not made here is left alone
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in OURS):
            changes.append(CommitOperationDelete(name))
    return changes


def is_same(addition: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Whether a repository's file has the content already that is to be added."""
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
) -> str:
    staging = f"{branch}.incoming"
    if staging in branches:  # of a push that was interrupted
        api.delete_branch(repo_id, branch=staging)
    head = branches.get(branch)
    if head is not None:
        if not changes:
            return head
        return api.create_commit(repo_id, changes, commit_message=message, revision=branch, parent_commit=head).oid
    # A new branch appears with its commit: begun at main under its own name, it would have main's default for a while
    commit = branches["main"]
    if changes:
        api.create_branch(repo_id, branch=staging, revision=commit)
        commit = api.create_commit(repo_id, changes, commit_message=message, revision=staging, parent_commit=commit).oid
    api.create_branch(repo_id, branch=branch, revision=commit)
    if changes:
        api.delete_branch(repo_id, branch=staging)
    return commit


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of the checkpoint")
    parser.add_argument("--repo_id", required=True, help="ORG/NAME")
    parser.add_argument("--revision", help="branch (default: main); tokens-36 gets 36 visual tokens as its default")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry_run", action="store_true", help="print what would be sent, and send nothing")
    parser.add_argument("--base_model", nargs="+", help="ORG/NAME of tower and language model, for the card")
    parser.add_argument("--datasets", nargs="+", help="data trained on: ORG/NAME on the Hub, or words, for the card")
    parser.add_argument("--license", help="the language model's, as the Hub names it, for the card")
    options = vars(parser.parse_args(arguments))
    where = {name: options.pop(name) for name in ("private", "dry_run")}
    try:
        push(prepare(**options), **where)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
