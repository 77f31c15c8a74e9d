"""Chat templates: where ours are, and where an answer ends in any of them."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase


TEMPLATES = Path(__file__).parent / "templates"


def stop_at_end_of_turn(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, chat_template: str):
    """
    Makes generation stop at the tokenizer's end token and at the special token that ends an answer in a chat template,
    if there is one, as well as where it stopped before.

    Args:
        generation_config (`GenerationConfig`): Is changed.
        tokenizer (`PreTrainedTokenizerBase`): The model's.
        chat_template (`str`): What counts is the end of its `{% generation %}` span.

    Raises:
        ValueError: If the template cannot be rendered.
    """
    chat = [{"role": role, "content": [{"type": "text", "text": "Hello"}]} for role in ("user", "assistant")]
    try:
        rendered = tokenizer.apply_chat_template(
            chat, chat_template=chat_template, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception as error:  # templates raise anything
        raise ValueError(f"The chat template cannot be rendered: {error}") from error
    answer = [token for token, mask in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mask]
    while answer and tokenizer.decode(answer[-1]).isspace():
        answer.pop()
    found = generation_config.eos_token_id
    end_tokens = {*(found if isinstance(found, list) else [found]), tokenizer.eos_token_id}
    if answer and answer[-1] in tokenizer.added_tokens_decoder:
        end_tokens.add(answer[-1])
    generation_config.eos_token_id = sorted(end_tokens - {None})
    generation_config._from_model_config = False  # otherwise `generate` would rebuild it
