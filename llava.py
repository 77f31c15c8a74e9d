"""How LLaVA-1.5 was given images and questions in training, which transformers' processors for it leave out."""

from transformers import BaseImageProcessor, LlavaImageProcessor, PreTrainedTokenizerBase

from .processing_delta_llava import DeltaLlavaProcessor


NO_GAP, GAP = '{%- set gap = "" -%}', '{%- set gap = " " -%}'


def pad_to_square(image_processor: BaseImageProcessor) -> LlavaImageProcessor:
    """
    The vision tower's image processor, but with images padded to squares in the mean colour instead of cropped: a
    question may be about what a centre crop removes. Image size, resampling, mean and deviation stay.
    """
    settings = image_processor.to_dict()
    side = settings["crop_size"] if settings.get("do_center_crop") else settings["size"]
    whole = {"do_pad": True, "size": side, "do_center_crop": False, "crop_size": side, "do_convert_rgb": True}
    return LlavaImageProcessor.from_dict({**settings, **whole})


def fit_spaces(chat_template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """
    Makes `templates/vicuna-v1.jinja` give a conversation the token ids that LLaVA's code gives it.

    That code splits a prompt at each `<image>` and tokenizes the pieces separately. A SentencePiece tokenizer puts a
    space before each piece. In a whole text, one that is not `legacy` does so only at the start: it needs an explicit
    space after its first token and after each image.

    Args:
        chat_template (`str`): Jinja template.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer that knows `<image>`.

    Returns:
        `str`: The template, with or without these spaces. One without a place for them is returned unchanged.

    Raises:
        ValueError: If the token ids are not LLaVA's in either case.
    """
    if NO_GAP not in chat_template:
        return chat_template
    image_token = DeltaLlavaProcessor.image_token
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    turns = {"user": content, "assistant": "It."}
    chat = [{"role": role, "content": turns[role]} for role in ("user", "assistant", "user")]
    fitted = [chat_template, chat_template.replace(NO_GAP, GAP)]
    texts = [tokenizer.apply_chat_template(chat, chat_template=each, tokenize=False) for each in fitted]
    expected = tokenizer.convert_tokens_to_ids([tokenizer.bos_token] if tokenizer.bos_token else [])
    for index, piece in enumerate(texts[0].removeprefix(tokenizer.bos_token or "").split(image_token)):
        expected += tokenizer.convert_tokens_to_ids([image_token] if index else [])
        expected += tokenizer.encode(piece, add_special_tokens=False)
    for each, text in zip(fitted, texts, strict=True):
        if tokenizer.encode(text, add_special_tokens=False) == expected:
            return each
    raise ValueError(
        f"{type(tokenizer).__name__} does not tokenize a text with {image_token} as LLaVA-1.5 does, piece by piece:"
        " name a Jinja file whose spaces make up for it with --chat_template."
    )
