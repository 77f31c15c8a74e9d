"""
Merges the result of LoRA or QLoRA training, adapter and projector, into a plain checkpoint in Hub layout.

```
python -m delta_llava.hub.merge_adapter --adapter runs/vicuna-7b-finetune-lora --output_dir checkpoints/delta-llava-7b
```

The adapter is merged into the weights that it was trained on, without quantization. They are read from where they were
in training, or from `--base_model`. A `checkpoint-N` of the training is an adapter too.
"""

import argparse
import shutil
from pathlib import Path

from tqdm.auto import tqdm

from ..configuration_delta_llava import DeltaLlavaConfig
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration, brief_list
from ..processing_delta_llava import DeltaLlavaProcessor
from ..turns import stop_at_end_of_turn
from ..weights import check_finite, check_place, read_weights
from .parts import new_folder


try:
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
except ModuleNotFoundError as error:
    raise ImportError('Merging needs peft: run `pip install "delta-llava[train]"`.') from error

ADAPTER_WEIGHTS = "adapter_model.safetensors"
NEEDED = ("adapter_config.json", ADAPTER_WEIGHTS, "trained_config.json", "training")


def merge_adapter(
    adapter: str | Path, output_dir: str | Path, base_model: str | None = None
) -> DeltaLlavaForConditionalGeneration:
    """
    Merges an adapter and saves the result with its processor and code files.

    Args:
        adapter (`str` or `Path`): Folder written by `delta_llava.train.finetune` with `use_peft`, or one of its
            `checkpoint-N`.
        output_dir (`str` or `Path`): New or empty folder for the checkpoint.
        base_model (`str`, *optional*): Folder or Hub repository of the checkpoint that the adapter was trained on, by
            default the one in its configuration.

    Returns:
        `DeltaLlavaForConditionalGeneration`: The model as saved, in the dtype of the base model's weights.

    Raises:
        ValueError: `output_dir` holds files, `adapter` is not an adapter, a link in its `training` or the base model's
            index leads out of its folder, the base model is not found, a file of weights cannot be read, the adapter's
            lacks a tensor or holds one that the model does not have, or a weight is not finite.
    """
    adapter = Path(adapter)
    with new_folder(output_dir) as folder:
        if missing := [name for name in NEEDED if not (adapter / name).exists()]:
            raise ValueError(
                f"{adapter} lacks {', '.join(missing)}: name a folder written by delta_llava.train.finetune with "
                "use_peft, or a checkpoint-N in it."
            )
        for file in (path for path in (adapter / "training").iterdir() if not path.is_dir()):
            check_place(adapter, f"training/{file.name}", file)  # what is copied will be published
        adapter_config = PeftConfig.from_pretrained(adapter)
        base_model, revision = base_model or adapter_config.base_model_name_or_path, adapter_config.revision or "main"
        tensors = dict(read_weights(adapter, ADAPTER_WEIGHTS))
        if Path(base_model).is_dir():
            for _ in read_weights(base_model):  # all of them can be read, and are finite
                pass
        try:
            config = DeltaLlavaConfig.from_pretrained(base_model, revision=revision)
        except OSError as error:
            raise ValueError(
                f"The base model of {adapter} cannot be read: base_model={base_model} is neither a folder nor a"
                " repository that can be reached. Say where it is now with --base_model."
            ) from error
        trained = DeltaLlavaConfig.from_json_file(adapter / "trained_config.json")
        config.visual_token_budgets, config.num_visual_tokens = trained.visual_token_budgets, trained.num_visual_tokens

        model = DeltaLlavaForConditionalGeneration.from_pretrained(
            base_model, revision=revision, config=config, dtype="auto"
        )
        model = PeftModel(model, adapter_config)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        file = adapter / ADAPTER_WEIGHTS
        if missing := sorted(expected.keys() - tensors.keys()):
            raise ValueError(f"{file} lacks {len(missing)} of the adapter's tensors: {brief_list(missing)}.")
        for name, weight in expected.items():
            if tensors[name].shape != weight.shape:
                raise ValueError(
                    f"{name} in {file} has shape {tuple(tensors[name].shape)} instead of {tuple(weight.shape)}."
                )
        if unknown := set_peft_model_state_dict(model, tensors).unexpected_keys:
            raise ValueError(f"{file} holds {len(unknown)} tensors that are not the model's: {brief_list(unknown)}.")
        model = model.merge_and_unload(progressbar=True, safe_merge=True)
        for name, weight in tqdm(model.state_dict().items(), desc="checking the result", unit=" tensors"):
            check_finite(name, weight, f"{base_model} with {adapter}")
        processor = DeltaLlavaProcessor.from_pretrained(adapter)
        processor.adopt_budgets(config)
        stop_at_end_of_turn(model.generation_config, processor.tokenizer, processor.chat_template)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        shutil.copytree(adapter / "training", folder / "training")
    return model


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="folder written by training with use_peft, or a checkpoint-N")
    parser.add_argument("--output_dir", required=True, help="new folder for the checkpoint")
    parser.add_argument("--base_model", help="where the model that the adapter was trained on is now")
    options = parser.parse_args(arguments)
    model = merge_adapter(**vars(options))
    print(f"Saved to {options.output_dir}, for {model.config.visual_token_budgets} visual tokens per image.")


if __name__ == "__main__":
    main()
