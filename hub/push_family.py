"""
Publishes all checkpoints of the family that exist on disk, and gathers them in a collection of the Hub.

```
python -m delta_llava.hub.push_family --checkpoints checkpoints --namespace ORG --dry_run
```

`hub/checkpoints.yaml` names the family. An elastic checkpoint gets one branch for each budget that is not its default.
What is missing is printed; what the Hub has already is not sent twice.
"""

import argparse
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from ..configuration_delta_llava import DeltaLlavaConfig
from .card import FAMILY
from .push import prepare, push, talking_to_the_hub


FIELDS = {"checkpoints", "collection", "licenses", "datasets"}


def push_family(
    checkpoints: str | Path,
    namespace: str,
    private: bool = False,
    dry_run: bool = False,
    family: str | Path = FAMILY,
) -> list[str]:
    """
    Publish the family's checkpoints and add them to its collection.

    Args:
        checkpoints (`str` or `Path`): Folder that holds each checkpoint in a folder of its name.
        namespace (`str`): User or organization on the Hub.
        private (`bool`, *optional*, defaults to `False`): Whether repositories and collection are to be private.
        dry_run (`bool`, *optional*, defaults to `False`): Print what would be sent, and send nothing.
        family (`str` or `Path`, *optional*, defaults to `hub/checkpoints.yaml`): What belongs to it.

    Returns:
        `list[str]`: Names of the checkpoints that are missing on disk.

    Raises:
        ValueError: A checkpoint was trained for other budgets than the family lists, or made of another language
            model, or cannot be published; nothing has been sent then. Else as for [`~delta_llava.hub.push.push`].
    """
    if not Path(checkpoints).is_dir():
        raise ValueError(f"checkpoints={checkpoints} is not a folder.")
    content = yaml.safe_load(Path(family).read_text(encoding="utf-8"))
    if unlike := content.keys() ^ FIELDS:
        raise ValueError(f"{family} must have exactly {sorted(FIELDS)}: see {sorted(unlike)}.")
    prepared, missing = {}, []
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
            made_of = yaml.safe_load(sources.read_text(encoding="utf-8"))["language_model"]
            if made_of != language_model:
                raise ValueError(
                    f"{sources} says {made_of}, but {name} is made of {language_model}. If that is another name of "
                    "the same model, as of a local folder, change it there."
                )
            default = config.num_visual_tokens
            others = sorted((budget for budget in budgets if budget != default), reverse=True)
            prepared[name] = [
                prepare(folder, f"{namespace}/{name}", revision, family=family)
                for revision in (None, *(f"tokens-{budget}" for budget in others))
            ]
    print(f"missing in {checkpoints}, or not finished: {', '.join(missing) or 'none'}\n", flush=True)

    for branches in prepared.values():
        # The branches of a repository have the same weights: they are downloaded once for its verifications
        with tempfile.TemporaryDirectory() as home:
            for branch in branches:
                push(branch, private, dry_run, home)
                print(flush=True)
    if prepared and not dry_run:
        about = content["collection"]
        with talking_to_the_hub(f"the collection {about['title']}"):
            api = HfApi()
            collection = api.create_collection(**about, namespace=namespace, private=private, exists_ok=True)
            if (collection.description, collection.private) != (about["description"], private):
                api.update_collection_metadata(collection.slug, description=about["description"], private=private)
            for name in prepared:
                api.add_collection_item(collection.slug, f"{namespace}/{name}", item_type="model", exists_ok=True)
        print(f"collection: {collection.url}")
    return missing


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", required=True, help="folder of folders that have the checkpoints' names")
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
