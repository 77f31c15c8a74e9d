r"""
Stage 2: teach the projector and the language model to follow instructions about images. The tower is frozen.

```
accelerate launch -m delta_llava.train.finetune \
    --config train/recipes/vicuna-7b/finetune.yaml \
    --model_name_or_path runs/vicuna-7b-pretrain \
    --json_path LLaVA-Tuning/llava_v1_5_mix665k.json \
    --image_folder LLaVA-Tuning \
    --output_dir runs/vicuna-7b-finetune
```

On one device: `python -m delta_llava.train.finetune`. One checkpoint for several token budgets:
`--num_visual_tokens 1 4 16 36 64 144`. After an interruption: `--resume_from_checkpoint latest`.
"""

if not __package__:
    raise SystemExit("Start this stage as a module: python -m delta_llava.train.finetune")

from pathlib import Path

from accelerate import PartialState
from peft import LoraConfig
from transformers import ProcessorMixin

from ..llava import pad_to_square
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..turns import stop_at_end_of_turn
from .recipe import Recipe
from .stage import lora_config, run_stage


def main(arguments: list[str] | None = None):
    run_stage("finetune", arguments, pad_images, train_projector_and_language_model)


def pad_images(recipe: Recipe, processor: ProcessorMixin):
    recipe.training.assistant_only_loss = True  # as in the collator; TRL then checks the template's end of turn
    if path := recipe.training.chat_template_path:
        processor.chat_template = Path(path).read_text(encoding="utf-8")
    processor.image_processor = pad_to_square(processor.image_processor)


def train_projector_and_language_model(
    recipe: Recipe, model: DeltaLlavaForConditionalGeneration, processor: ProcessorMixin
) -> LoraConfig | None:
    stop_at_end_of_turn(model.generation_config, processor.tokenizer, processor.chat_template)
    model.model.vision_tower.requires_grad_(False)
    # Trained weights in float32: in 16 bits, AdamW's small steps would be rounded away
    model.model.multi_modal_projector.float()
    if recipe.model.use_peft:
        return lora_config(model, recipe.model)
    model.model.language_model.float()
    model.lm_head.float()
    return None


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # otherwise its threads may abort a process whose work is done
