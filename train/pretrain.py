r"""
Stage 1: teach the projector to speak to the language model, on images and their captions. Tower and LLM are frozen.

One GPU, or one CPU with `bf16: false` in the recipe:

```
python -m delta_llava.train.pretrain \
    --config train/recipes/vicuna-7b/pretrain.yaml \
    --model_name_or_path checkpoints/delta-llava-vicuna-7b \
    --json_path LLaVA-Pretrain/blip_laion_cc_sbu_558k.json \
    --image_folder LLaVA-Pretrain \
    --output_dir runs/vicuna-7b-pretrain
```

Several GPUs: `accelerate launch -m delta_llava.train.pretrain` with the same arguments. One checkpoint for several
token budgets: `--num_visual_tokens 1 4 16 36 64 144`. After an interruption: `--resume_from_checkpoint latest`.
"""

if not __package__:
    raise SystemExit("Start this stage as a module: python -m delta_llava.train.pretrain")

from accelerate import PartialState
from transformers import ProcessorMixin

from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration
from ..turns import TEMPLATES
from .recipe import Recipe
from .stage import run_stage


def main(arguments: list[str] | None = None):
    run_stage("pretrain", arguments, caption_template, train_projector)


def caption_template(recipe: Recipe, processor: ProcessorMixin) -> str:
    # For this stage alone: the checkpoint keeps the template for conversations
    return (TEMPLATES / "plain.jinja").read_text(encoding="utf-8")


def train_projector(recipe: Recipe, model: DeltaLlavaForConditionalGeneration, processor: ProcessorMixin):
    model.requires_grad_(False)
    # Trained weights in float32: in 16 bits, AdamW's small steps would be rounded away
    model.model.multi_modal_projector.float().requires_grad_(True)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()  # otherwise its threads may abort a process whose work is done
