r"""
Publishes a checkpoint on the Hub: one atomic commit of weights, code, processor, recipes, logs and card, then verifies.

```
python -m delta_llava.hub.push --checkpoint checkpoints/delta-llava-7b-144 --repo_id ORG/delta-llava-7b-144 --dry_run
python -m delta_llava.hub.push --checkpoint checkpoints/delta-llava-7b-elastic --repo_id ORG/delta-llava-7b-elastic \
    --revision tokens-36
```

`--dry_run` prints what would be sent, and sends nothing. The branch `tokens-36` has the checkpoint with a default of 36
visual tokens, for `from_pretrained(…, revision="tokens-36")`. Run it again after an interruption, or at any time: what
the Hub already has is not sent again, and readers see either the old state or the new one.
"""

import argparse
import json
import re
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
    get_token,
    hf_hub_download,
    is_offline_mode,
)
from huggingface_hub.errors import RepositoryNotFoundError, StrictDataclassError
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..cascade import CASCADE_NAME
from ..configuration_delta_llava import AUTO_MAP, DeltaLlavaConfig
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..processing_delta_llava import DeltaLlavaProcessor
from ..weights import read_weights, refuse_adapter, weight_files
from .card import FAMILY, build_card, eval_results_yaml
from .client import Refusal, check_repositories, explain_hub_errors, list_files, print_changes, without_same
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
EVAL_RESULTS = ".eval_results/delta-llava.yaml"
SHARDS = "model-*-of-*.safetensors"
# Nothing else is ever sent, or deleted from a repository: no optimizer state, no pickle, no other program's log
OURS = (*REQUIRED_FILES, *RECORDS, SAFE_WEIGHTS_NAME, SHARDS, SAFE_WEIGHTS_INDEX_NAME, "README.md", EVAL_RESULTS)
TOKEN = re.compile(rb"(hf|api_org)_[\w.-]{30,}")
FOLDERS = ("training", "results", "additional_chat_templates")
# Loading the folder reads these, sent or not
READ = (".json", ".jinja", ".py", ".txt", ".model", ".safetensors")
BUDGET_BRANCH = re.compile(r"tokens-([1-9][0-9]*)")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Publication:
    """
    What a branch of a repository is to hold.

    Args:
        checkpoint (`Path`), repo_id (`str`), branch (`str`): Source and destination.
        num_visual_tokens (`int`): Default budget of the branch.
        card (`ModelCard`): Card of the branch.
        files (`dict[str, Path | bytes]`): All files by their names in the repository, with the card: weights as paths,
            the others as the bytes that were read.
        named (`dict[str, list[str]]`): Names that a user or a recipe gave, and that the card says are on the Hub, under
            `"dataset"` and `"model"`.
    """

    checkpoint: Path
    repo_id: str
    branch: str
    num_visual_tokens: int
    card: ModelCard
    files: dict[str, Path | bytes]
    named: dict[str, list[str]]


def prepare(
    checkpoint: str | Path, repo_id: str, revision: str | None = None, family: str | Path = FAMILY, **about
) -> Publication:
    """
    Checks a checkpoint and gathers what to publish of it, without a network.

    Args:
        checkpoint (`str` or `Path`): Folder that training, `merge_adapter`, `convert` or `assemble` has written.
        repo_id (`str`): `ORG/NAME`.
        revision (`str`, *optional*, defaults to `main`): Branch. The default of `tokens-36` is 36 visual tokens.
        family (`str` or `Path`, *optional*, defaults to `hub/checkpoints.yaml`), **about:
            What [`~delta_llava.hub.card.build_card`] takes: `base_model`, `datasets` and `license`.

    Raises:
        ValueError: The checkpoint is incomplete, has weights that are not finite, holds an access token or a link in
            place of a file, or was not trained for the branch's number of visual tokens; the branch's name resembles
            that of a budget; or the card has an unfilled field.
    """
    checkpoint, branch = Path(checkpoint), revision or "main"
    check_repositories(repo_id=repo_id)
    _check_branch(branch)
    _check_files(checkpoint)
    num_visual_tokens = _check_checkpoint(checkpoint, branch)
    revision = None if branch == "main" else branch
    card = build_card(checkpoint, repo_id, revision, num_visual_tokens, family=family, **about)
    files = _files(checkpoint, num_visual_tokens) | {"README.md": str(card).encode()}
    if card.data.eval_results:
        files[EVAL_RESULTS] = eval_results_yaml(card).encode()
    token = get_token()
    for name, content in files.items():
        if isinstance(content, Path):
            with safe_open(content, framework="pt") as weights:
                content = str(weights.metadata()).encode()
        if TOKEN.search(content) or (token and token.encode() in content):
            raise ValueError(f"{name} holds what looks like an access token of the Hub: remove it, and revoke it.")
    known = yaml.safe_load(Path(family).read_text(encoding="utf-8"))["datasets"].values()
    said = [name for name in card.data.datasets or () if name not in known]
    named = {"dataset": said, "model": about.get("base_model") or []}
    return Publication(checkpoint, repo_id, branch, num_visual_tokens, card, files, named)


def push(
    publication: Publication, private: bool = False, dry_run: bool = False, home: str | Path | None = None
) -> str | None:
    """
    Publishes a checkpoint, and verifies what was published by loading it as a stranger would.

    A new branch starts as one commit off `main`; a later push is one commit on the branch itself.

    Args:
        publication (`Publication`): What [`prepare`] returns.
        private (`bool`, *optional*, defaults to `False`): Make a new repository private.
        dry_run (`bool`, *optional*, defaults to `False`): Print what would be sent, and send nothing.
        home (`str` or `Path`, *optional*): As for [`~delta_llava.hub.verify.verify`].

    Returns:
        `str`: The branch's commit; `None` for a dry run.

    Raises:
        ValueError: The repository is public though `private` was asked for, or holds a model of another type; or a data
            set or a base model that the card names is not on the Hub.
        OSError: The Hub refuses or cannot be reached, its answer cannot be understood, or somebody else has pushed in
            the meantime. Readers see the old state or, if the Hub's last answer was lost, the new one; running the push
            again goes on from there.
        RuntimeError: What was published is not what was sent, or does not load. It stays there for inspection.
    """
    checkpoint, repo_id, branch = publication.checkpoint, publication.repo_id, publication.branch
    print(f"{checkpoint} to {repo_id}, branch {branch}, {publication.num_visual_tokens} visual tokens by default")
    additions = [CommitOperationAdd(name, content) for name, content in publication.files.items()]
    if dry_run and is_offline_mode():
        print("Offline: what the repository holds is not known.")
        _print_changes(publication, additions)
        print(f"\nREADME.md:\n\n{publication.card}")
        return None
    with explain_hub_errors(repo_id):
        api = HfApi()
        for kind, names in publication.named.items():
            if absent := [name for name in names if not api.repo_exists(name, repo_type=kind)]:
                words = ", or describe other data in words, as in --datasets 'Our own drawings'"
                raise Refusal(
                    f"{kind}s={absent} cannot be found on the Hub: correct the name{words * (kind == 'dataset')}."
                )
        branches = _branches(api, repo_id)
        if not (branches or dry_run):
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            branches = _branches(api, repo_id)
            if "main" not in branches:
                raise OSError(f"{repo_id} has been created, but the Hub shows no branch main of it")
        if private and branches and not api.repo_info(repo_id).private:
            raise Refusal(f"{repo_id} is public: make it private in its settings, or push without --private.")
        changes = _changes(api, repo_id, branches.get(branch, branches.get("main")), additions)
        _print_changes(publication, changes)
        if branch not in ("main", *branches) and len(changes) >= len(additions):
            print(f"main of {repo_id} does not hold this checkpoint: push without --revision too.")
        if dry_run:
            print(f"\nREADME.md:\n\n{publication.card}")
            return None
        message = f"Delta-LLaVA with {publication.num_visual_tokens} visual tokens by default"
        commit = _commit(api, repo_id, branch, branches, changes, message)
        differing = [change.path_in_repo for change in _changes(api, repo_id, commit, additions)]
        if (head := _branches(api, repo_id).get(branch)) != commit:
            raise OSError(f"branch {branch} is at {head}, not at {commit}, which has been pushed to it")

    if differing:
        raise RuntimeError(f"{repo_id} at {commit} is not what was sent: {differing} differ.")
    verified = cached_assets_path("delta_llava", namespace="verified", subfolder=repo_id.replace("/", "--")) / commit
    if verified.exists():
        print(f"{commit} has been verified before.")
    else:
        verify(checkpoint, repo_id, commit, publication.num_visual_tokens, home)
        verified.touch()
    print(f'To pin it: from_pretrained("{repo_id}", revision="{commit}", trust_remote_code=True)')
    if changes and branch == "main" and (others := sorted(name for name in branches if name.startswith("tokens-"))):
        print(f"Branches {', '.join(others)} are unchanged: push them too.")
    return commit


def _print_changes(publication: Publication, changes: list[CommitOperationAdd | CommitOperationDelete]):
    print_changes(changes, len(publication.files))
    checkpoint, files = publication.checkpoint, set(map(Path, publication.files))
    folders = {file.parent for file in files if (checkpoint / file.parent).is_dir()}
    beside = {path.relative_to(checkpoint) for name in folders for path in (checkpoint / name).iterdir()}
    print(f"never sent: {', '.join(sorted(map(str, beside - folders - files))) or 'nothing'}")
    for name in CODE_FILES:
        if publication.files[name] != (Path(__file__).parents[1] / name).read_bytes():
            print(f"{name} differs from that of this package: it is published as it is.")
    print(end="", flush=True)


def _check_branch(branch: str):
    """Refuses a name that readers would take for a budget's branch, or a later push for an earlier push's staging."""
    looks = "token" in branch.casefold() or branch.strip().isdecimal() or branch.casefold() == "main"
    if branch.endswith(".incoming") or (looks and branch != "main" and not BUDGET_BRANCH.fullmatch(branch)):
        raise ValueError(
            f"revision={branch!r} must be main, tokens-N for N visual tokens, such as tokens-36, or a name unlike "
            "these that does not end with .incoming."
        )


def _check_files(checkpoint: Path):
    """Refuses links: whatever they are called, their target is elsewhere or not meant for publication."""
    files = [path for pattern in ("*", f"{FOLDERS[-1]}/*", *RECORDS) for path in checkpoint.glob(pattern)]
    read = [path for path in files if path.parent != checkpoint or path.suffix in READ or path.name in FOLDERS]
    for path in read:
        if path.is_symlink() or (path.parent != checkpoint and path.parent.is_symlink()):
            raise ValueError(f"{path} is a link to {path.resolve()}: replace it by the file to publish.")
        if path.name not in FOLDERS and not path.is_file():
            raise ValueError(f"{path} is not a file: remove it.")


def _check_checkpoint(checkpoint: Path, branch: str) -> int:
    """Refuses a checkpoint that would not load for others; returns the number of visual tokens of `branch`."""
    refuse_adapter(checkpoint, checkpoint)
    if missing := [name for name in REQUIRED_FILES if not (checkpoint / name).is_file()]:
        raise ValueError(f"{checkpoint} is incomplete: {', '.join(missing)} is not there.")
    try:
        config = DeltaLlavaConfig.from_pretrained(checkpoint)
    except StrictDataclassError as error:
        raise ValueError(f"{checkpoint / 'config.json'}: {' '.join(str(error).split())}") from error
    auto_map = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("auto_map")
    if auto_map != AUTO_MAP:
        raise ValueError(f"auto_map of {checkpoint / 'config.json'} is {auto_map}, but must be {AUTO_MAP}.")
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        # Code of another repository could change under a pinned commit
        if others := re.findall(r'"Auto\w+": \[?\s*"([^"]*--[^"]*)"', (checkpoint / name).read_text(encoding="utf-8")):
            raise ValueError(f"{checkpoint / name} takes code from another repository: {others}.")
    processor = DeltaLlavaProcessor.from_pretrained(checkpoint)
    for name, theirs in (
        ("num_visual_tokens", processor.num_visual_tokens),
        # Processors of earlier releases have neither
        ("visual_token_budgets", processor.visual_token_budgets or config.visual_token_budgets),
        ("patch_grid_size", processor.patch_grid_size or config.patch_grid_size),
        ("image_token_id", processor.image_token_id),
    ):
        if getattr(config, name) != theirs:
            raise ValueError(
                f"{checkpoint}: {name} is {getattr(config, name)} in the config, {theirs} in the processor."
            )
    if getattr(config, "transformers_weights", None):
        raise ValueError(f"transformers_weights in {checkpoint / 'config.json'} names other weights: remove it.")
    if others := [name for name in weight_files(checkpoint) if not fnmatch(name, SHARDS) and name != SAFE_WEIGHTS_NAME]:
        raise ValueError(f"{checkpoint} has weights in {others}: name them {SHARDS}, as save_pretrained does.")
    for _ in read_weights(checkpoint):  # all of them can be read, and are finite
        pass
    # On meta no weight is read, but all names and shapes are compared
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
    """What to publish apart from the card, with the default budget set to `num_visual_tokens`."""
    paths = [checkpoint / name for name in REQUIRED_FILES]
    for pattern in (SAFE_WEIGHTS_INDEX_NAME, "training/sources.yaml", "results/tokens-*.json", CASCADE_NAME):
        paths += sorted(checkpoint.glob(pattern))
    for stage in ("pretrain", "finetune"):  # other files beside the recipes are not published
        for recipe in sorted(checkpoint.glob(f"training/{stage}*.yaml")):
            paths += [path for kind in (".yaml", ".json", ".png") if (path := recipe.with_suffix(kind)).exists()]
    # Read once, so that what is sent is what was checked
    files = {path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in paths}
    files |= {name: checkpoint / name for name in weight_files(checkpoint)}
    for name in ("config.json", "processor_config.json"):
        values = json.loads(files[name])
        if values["num_visual_tokens"] != num_visual_tokens:
            values["num_visual_tokens"] = num_visual_tokens
            files[name] = (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _branches(api: HfApi, repo_id: str) -> dict[str, str]:
    """Commits of a repository's branches; none if there is no repository."""
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
    """What makes a commit (`None`: no repository) hold these files, and no others of `OURS`; additions first."""
    remote = list_files(api, repo_id, commit) if commit else {}
    changes = without_same(additions, remote)
    if "config.json" in remote and any(change.path_in_repo == "config.json" for change in changes):
        # Forced: a proxy's page that was once cached in its place would come back for ever
        file = hf_hub_download(repo_id, "config.json", revision=commit, force_download=True)
        model_type = json.loads(Path(file).read_text(encoding="utf-8")).get("model_type")
        if model_type != DeltaLlavaConfig.model_type:
            raise Refusal(f"{repo_id} holds a model of type {model_type}, which a push would replace: name another.")
    added = {addition.path_in_repo for addition in additions}
    for name in remote:
        # Such as an earlier push's weights in other shards; files of others are left alone
        ours = any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in OURS)
        if ours and name not in added:
            changes.append(CommitOperationDelete(name))
    return changes


def _commit(
    api: HfApi,
    repo_id: str,
    branch: str,
    branches: dict[str, str],
    changes: list[CommitOperationAdd | CommitOperationDelete],
    message: str,
) -> str:
    """
    Commits the changes and returns the branch's commit. At any moment readers of the branch see its old state or its
    new one: a new branch is built as `BRANCH.incoming`, and gets its name when it is complete.
    """
    staging = f"{branch}.incoming"
    if staging in branches:  # of an interrupted push
        api.delete_branch(repo_id, branch=staging)
    head = branches.get(branch)
    if head is not None:
        if not changes:
            return head
        return api.create_commit(repo_id, changes, commit_message=message, revision=branch, parent_commit=head).oid
    # Not under its own name from the start, or it would have main's default for a while
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
    parser.add_argument("--revision", help="branch (default: main); the default of tokens-36 is 36 visual tokens")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry_run", action="store_true", help="print what would be sent, and send nothing")
    parser.add_argument("--base_model", nargs="+", help="ORG/NAME of tower and language model, for the card")
    parser.add_argument("--datasets", nargs="+", help="training data: ORG/NAME on the Hub, or words, for the card")
    parser.add_argument("--license", help="the language model's, as the Hub names it, for the card")
    options = vars(parser.parse_args(arguments))
    where = {name: options.pop(name) for name in ("private", "dry_run")}
    try:
        push(prepare(**options), **where)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
