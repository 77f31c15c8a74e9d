"""
Publishes all checkpoints of the family that are on disk, and gathers them in a collection of the Hub.

```
python -m delta_llava.hub.push_family --checkpoints checkpoints --namespace ORG --dry_run
```

`hub/checkpoints.yaml` lists the family. An elastic checkpoint gets a branch for each budget other than its default.
What is missing is printed; what the Hub already has is not sent again.
"""

import argparse
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from ..configuration_delta_llava import DeltaLlavaConfig
from .card import FAMILY
from .client import explain_hub_errors
from .push import prepare, push


FIELDS = {"checkpoints", "collection", "licenses", "datasets"}


def push_family(
    checkpoints: str | Path,
    namespace: str,
    private: bool = False,
    dry_run: bool = False,
    family: str | Path = FAMILY,
) -> list[str]:
    """
    Publishes the family's checkpoints and adds them to its collection.

    Args:
        checkpoints (`str` or `Path`): Folder with a folder for each checkpoint, of its name.
        namespace (`str`): User or organization on the Hub.
        private (`bool`, *optional*, defaults to `False`): Make repositories and collection private.
        dry_run (`bool`, *optional*, defaults to `False`): Print what would be sent, and send nothing.
        family (`str` or `Path`, *optional*, defaults to `hub/checkpoints.yaml`): The family.

    Returns:
        `list[str]`: Names of the checkpoints that are missing on disk.

    Raises:
        ValueError: A checkpoint has other budgets or another language model than the family lists, or cannot be
            published; then nothing has been sent. Otherwise as for [`~delta_llava.hub.push.push`].
    """
    if not Path(checkpoints).is_dir():
        raise ValueError(f"checkpoints={checkpoints} is not a folder.")
    content = yaml.safe_load(Path(family).read_text(encoding="utf-8"))
    if unlike := content.keys() ^ FIELDS:
        raise ValueError(f"{family} must have exactly {sorted(FIELDS)}: see {sorted(unlike)}.")
    publications, missing = {}, []
    for language_model, listed in content["checkpoints"].items():
        for name, budgets in listed.items():
            folder = Path(checkpoints) / name
            if not (folder / "config.json").is_file():
                missing.append(name)
                continue
            config = DeltaLlavaConfig.from_pretrained(folder)
            trained = config.visual_token_budgets
            if sorted(trained) != sorted(budgets):
                raise ValueError(f"{folder} was trained for {trained} visual tokens, but {name} is for {budgets}.")
            sources = folder / "training" / "sources.yaml"
            found = yaml.safe_load(sources.read_text(encoding="utf-8"))["language_model"]
            if found != language_model:
                raise ValueError(
                    f"{sources} says {found}, but {name} is made of {language_model}. If that is another name of the "
                    "same model, such as a local folder, change it there."
                )
            default = config.num_visual_tokens
            others = sorted((budget for budget in budgets if budget != default), reverse=True)
            publications[name] = [
                prepare(folder, f"{namespace}/{name}", revision, family=family)
                for revision in (None, *(f"tokens-{budget}" for budget in others))
            ]
    print(f"missing in {checkpoints}, or not finished: {', '.join(missing) or 'none'}\n", flush=True)

    for branches in publications.values():
        # The branches of a repository have the same weights, which are downloaded once for all verifications
        with tempfile.TemporaryDirectory() as home:
            for branch in branches:
                push(branch, private, dry_run, home)
                print(flush=True)
    if publications and not dry_run:
        about = content["collection"]
        with explain_hub_errors(f"the collection {about['title']}"):
            api = HfApi()
            collection = api.create_collection(**about, namespace=namespace, private=private, exists_ok=True)
            if (collection.description, collection.private) != (about["description"], private):
                api.update_collection_metadata(collection.slug, description=about["description"], private=private)
            for name in publications:
                api.add_collection_item(collection.slug, f"{namespace}/{name}", item_type="model", exists_ok=True)
        print(f"collection: {collection.url}")
    return missing


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", required=True, help="folder with a folder for each checkpoint, of its name")
    parser.add_argument("--namespace", required=True, help="user or organization on the Hub")
    parser.add_argument("--private", action="store_true", help="make new repositories and the collection private")
    parser.add_argument("--dry_run", action="store_true", help="print what would be sent, and send nothing")
    parser.add_argument("--family", default=FAMILY, help="YAML file (default: hub/checkpoints.yaml)")
    try:
        push_family(**vars(parser.parse_args(arguments)))
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
