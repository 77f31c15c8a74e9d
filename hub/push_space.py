r"""
Publishes a checkpoint's page as a Space of the Hub: one atomic commit of app, metadata and this package's source.

```
python -m delta_llava.hub.push_space --checkpoint ORG/delta-llava-7b-elastic --repo_id ORG/delta-llava --dry_run
```

`--dry_run` prints what would be sent, and sends nothing. The Space serves the commit that the checkpoint's `main`
(or `--revision`) is at now: push again to serve a newer one.
"""

import argparse
import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, SpaceCard, constants, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from ..configuration_delta_llava import DeltaLlavaConfig
from .client import Refusal, check_repositories, explain_hub_errors, list_files, print_changes, without_same


PACKAGE = Path(__file__).parents[1]
# All that app.py imports of this package, which a Space cannot install
SOURCES = (
    "__init__.py",
    "cascade.py",
    "configuration_delta_llava.py",
    "costs.py",
    "evaluation/__init__.py",
    "evaluation/gradcam.py",
    "modeling_delta_llava.py",
    "processing_delta_llava.py",
    "serving/__init__.py",
    "serving/feature_cache.py",
    "serving/image_guard.py",
)
POINTER = "checkpoint.json"  # says what the app serves, and marks a Space as ours


def space_files(checkpoint: str, commit: str) -> dict[str, bytes]:
    """
    All files of a Space, by name: the page, its style, requirements and examples; README.md and `checkpoint.json`,
    which name the checkpoint, `ORG/NAME` on the Hub, and its commit to serve; and `delta_llava/` with the source that
    the page imports.
    """
    page = PACKAGE / "space"
    paths = [*(page / name for name in ("app.py", "style.css", "requirements.txt")), *sorted(page.glob("examples/*"))]
    card = SpaceCard.load(page / "README.md")
    card.data.models = [checkpoint]
    return {
        "README.md": str(card).encode(),
        POINTER: json.dumps({"checkpoint": checkpoint, "revision": commit}, indent=2).encode() + b"\n",
        **{path.relative_to(page).as_posix(): path.read_bytes() for path in paths},
        **{f"delta_llava/{name}": (PACKAGE / name).read_bytes() for name in SOURCES},
    }


def push_space(
    checkpoint: str, repo_id: str, revision: str | None = None, private: bool = False, dry_run: bool = False
) -> str | None:
    """
    Publishes a Space that serves a checkpoint of the Hub.

    Args:
        checkpoint (`str`): `ORG/NAME` of a Delta-LLaVA model on the Hub.
        repo_id (`str`): `ORG/NAME` of the Space.
        revision (`str`, *optional*, defaults to `main`): Branch or commit of the checkpoint.
        private (`bool`, *optional*, defaults to `False`): Make a new Space private.
        dry_run (`bool`, *optional*, defaults to `False`): Print what would be sent, and send nothing.

    Returns:
        `str`: The commit that the Space is at; `None` for a dry run.

    Raises:
        ValueError: A name is not ORG/NAME, the checkpoint or its revision is not on the Hub or not a Delta-LLaVA model,
            or the Space holds another app or is public though `private` was asked for.
        OSError: The Hub refuses or cannot be reached, or somebody else has pushed in the meantime.
    """
    check_repositories(checkpoint=checkpoint, repo_id=repo_id)
    with explain_hub_errors(repo_id):
        api = HfApi()
        model = _check_checkpoint(api, checkpoint, revision)
        print(f"{checkpoint} at {model.sha} to the Space {repo_id}")
        additions = [CommitOperationAdd(name, data) for name, data in space_files(checkpoint, model.sha).items()]
        exists = api.repo_exists(repo_id, repo_type="space")
        if not (exists or dry_run):
            api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        head, changes = _changes(api, repo_id, additions) if exists or not dry_run else (None, additions)
        if private and head and not api.space_info(repo_id).private:
            raise Refusal(f"The Space {repo_id} is public: make it private in its settings, or push without --private.")
        print_changes(changes, len(additions))
        if model.private or model.gated:
            print(f"{checkpoint} is not public: give the Space a secret HF_TOKEN that may read it, in its settings.")
        if dry_run:
            return None
        if changes:
            message = f"Page of {checkpoint} at {model.sha[:7]}"
            commit = api.create_commit(repo_id, changes, commit_message=message, repo_type="space", parent_commit=head)
            head = commit.oid
    print(f"{constants.ENDPOINT}/spaces/{repo_id} at {head}")
    return head


def _check_checkpoint(api: HfApi, checkpoint: str, revision: str | None):
    """The Hub's description of a checkpoint's commit, which must be a Delta-LLaVA model."""
    try:
        model = api.model_info(checkpoint, revision=revision)
        config = hf_hub_download(checkpoint, "config.json", revision=model.sha)
    except RepositoryNotFoundError as error:
        raise Refusal(f"checkpoint={checkpoint} cannot be found on the Hub: push it with hub.push first.") from error
    except RevisionNotFoundError as error:
        raise Refusal(f"checkpoint={checkpoint} has no revision {revision}.") from error
    except RemoteEntryNotFoundError as error:
        raise Refusal(f"checkpoint={checkpoint} has no config.json: it is not a model.") from error
    model_type = json.loads(Path(config).read_text(encoding="utf-8")).get("model_type")
    if model_type != DeltaLlavaConfig.model_type:
        raise Refusal(f"checkpoint={checkpoint} is a model of type {model_type}, not {DeltaLlavaConfig.model_type}.")
    return model


def _changes(
    api: HfApi, repo_id: str, additions: list[CommitOperationAdd]
) -> tuple[str, list[CommitOperationAdd | CommitOperationDelete]]:
    """A Space's head, and what makes it hold these files, and no others in our folders; additions first."""
    head = api.space_info(repo_id).sha
    remote = list_files(api, repo_id, head, repo_type="space")
    if "app.py" in remote and POINTER not in remote:
        raise Refusal(f"The Space {repo_id} holds another app, which a push would replace: name another Space.")
    added = {addition.path_in_repo for addition in additions}
    deleted = [name for name in remote if name.startswith(("delta_llava/", "examples/")) and name not in added]
    return head, [*without_same(additions, remote), *map(CommitOperationDelete, deleted)]


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="ORG/NAME of the model on the Hub")
    parser.add_argument("--repo_id", required=True, help="ORG/NAME of the Space")
    parser.add_argument("--revision", help="branch or commit of the model (default: main)")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument("--dry_run", action="store_true", help="print what would be sent, and send nothing")
    try:
        push_space(**vars(parser.parse_args(arguments)))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
