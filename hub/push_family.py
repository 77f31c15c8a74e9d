"""
Publishes all checkpoints of the family that exist on disk, and gathers them in a collection of the Hub.

```
python -m delta_llava.hub.push_family --checkpoints checkpoints --namespace ORG --dry_run
```

`hub/checkpoints.yaml` names the family. An elastic checkpoint gets one branch for each budget that is not its default.
What is missing is printed; what the Hub has already is not sent twice.
"""

import argparse
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from ..configuration_delta_llava import DeltaLlavaConfig
from .push import print_pinned, push, talking_to_the_hub


FAMILY = Path(__file__).parent / "checkpoints.yaml"


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
            model; nothing has been sent then. Else as for [`~delta_llava.hub.push.push`].
    """
    family = yaml.safe_load(Path(family).read_text(encoding="utf-8"))
    there, missing = {}, []
    for language_model, listed in family["checkpoints"].items():
        for name, budgets in listed.items():
            folder = Path(checkpoints) / name
            if not folder.is_dir():
                missing.append(name)
                continue
            there[name] = folder, DeltaLlavaConfig.from_pretrained(folder)
            trained, sources = there[name][1].visual_token_budgets, folder / "training/sources.yaml"
            if sorted(trained) != sorted(budgets):
                raise ValueError(f"{folder} was trained for {trained} visual tokens, but {name} is for {budgets}.")
            made_of = yaml.safe_load(sources.read_text(encoding="utf-8"))["language_model"]
            if made_of != language_model:
                raise ValueError(f"{folder} was made of {made_of} ({sources}), but {name} is of {language_model}.")

    for name, (folder, config) in there.items():
        default = config.num_visual_tokens
        others = [budget for budget in reversed(config.visual_token_budgets) if budget != default]
        for revision in (None, *(f"tokens-{budget}" for budget in others)):
            published = push(folder, f"{namespace}/{name}", revision, private=private, dry_run=dry_run)
            if published:
                print_pinned(f"{namespace}/{name}", published)
            print(flush=True)
    if there and not dry_run:
        with talking_to_the_hub(family["collection"]["title"]):
            api = HfApi()
            collection = api.create_collection(
                **family["collection"], namespace=namespace, private=private, exists_ok=True
            )
            for name in there:
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
        missing = push_family(**vars(parser.parse_args(arguments)))
    except OSError as error:
        raise SystemExit(str(error)) from error
    print(f"missing on disk: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
