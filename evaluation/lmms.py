"""
Delta-LLaVA as the model `delta_llava` of lmms-eval, which finds it by this package's entry point.

```
lmms-eval --model delta_llava --model_args pretrained=ORG/NAME,num_visual_tokens=36,dtype=bfloat16,batch_size=8 \
    --tasks pope --verbosity DEBUG
```

Without `--verbosity DEBUG` that command reports an error but exits as if there had been none, unlike `evaluation.run`.
Its results hold the model's arguments as given: the commit, and a budget that was not given, are only in its log.
`evaluation.run` records both.
"""

import json
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import simple_parse_args_string
from loguru import logger
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, StoppingCriteria

from ..cascade import generate, read_calibration
from ..llava import fit_spaces, pad_to_square
from ..turns import TEMPLATES
from .checkpoint import check_visual_tokens, locate
from .fastv import fastv


# For tasks without a limit: lmms-eval's for LLaVA
MAX_NEW_TOKENS = 1024
VICUNA = TEMPLATES / "vicuna-v1.jinja"


class DeltaLlava(lmms):
    """
    A checkpoint that answers lmms-eval's requests at one number of visual tokens.

    Args:
        pretrained (`str`): Folder or Hub repository of the checkpoint.
        revision (`str`, *optional*): Branch or commit of the repository.
        num_visual_tokens (`int` or `"auto"`, *optional*, defaults to the checkpoint's): Budget of each image; with
            FastV, how many tokens it keeps of a question's images together. It may be changed between tasks.
        dtype (`str`, *optional*, defaults to `"auto"`): Dtype of the weights; `"auto"` is the checkpoint's.
        batch_size (`int`, *optional*, defaults to 1): Requests per batch, on each process.
        device (`str`, *optional*): `"cuda"`, `"cpu"`, or `"auto"` to spread the weights over all GPUs. By default a GPU
            if there is one, a different one for each process.
        attn_implementation (`str`, *optional*): As `from_pretrained` takes it.
        fastv_layer (`int`, *optional*): The checkpoint is transformers' LLaVA-1.5, and FastV drops its visual tokens
            after this layer. It is asked in the way that LLaVA-1.5, and ours, were trained: with images padded to
            squares and Vicuna's system prompt, both of which llava-hf's checkpoints omit.
        cascade (`bool`, *optional*, defaults to `False`): Answer with `delta_llava.cascade`, as the checkpoint was
            calibrated. It may be changed between tasks.

    Raises:
        ValueError: For a number of visual tokens that the checkpoint does not allow, a batch size below 1, a layer
            that the language model does not have, or a cascade that was not calibrated.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        num_visual_tokens: int | str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        attn_implementation: str | None = None,
        fastv_layer: int | None = None,
        cascade: bool = False,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size} must be a number, 1 or more.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        folder, self.commit = locate(pretrained, revision)
        config = AutoConfig.from_pretrained(folder)
        is_auto = num_visual_tokens == "auto" and fastv_layer is None
        check_visual_tokens(config, [] if num_visual_tokens is None or is_auto else [num_visual_tokens], fastv_layer)
        if num_visual_tokens is None:
            num_visual_tokens = config.num_visual_tokens if fastv_layer is None else config.image_seq_length
        self.num_visual_tokens, self.fastv_layer = num_visual_tokens, fastv_layer
        self.calibration = read_calibration(folder) if cascade else None
        self.cascade, self.usage = cascade, torch.zeros(2)  # visual tokens, images
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device or self.accelerator.device,
            attn_implementation=attn_implementation,
        ).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.config = self.model.config
        if fastv_layer is None:
            asked = "visual tokens per image, prompts by the checkpoint's chat template"
        else:
            asked = f"visual tokens per question kept by FastV after layer {fastv_layer}, prompts as for LLaVA-1.5"
            self.processor.image_processor = pad_to_square(self.processor.image_processor)
            template = VICUNA.read_text(encoding="utf-8")
            self.processor.chat_template = fit_spaces(template, self.processor.tokenizer)
            self.processor.tokenizer.padding_side = "left"
        logger.info(
            f"{pretrained}, commit {self.commit}, {self.model.dtype} on {self.device}, {num_visual_tokens} {asked}"
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "DeltaLlava":
        """
        Loads the model of `--model_args`, `name=value,…`. They win over the command line's own options,
        `additional_config`, because lmms-eval always has a value for `--batch_size`.
        """
        given = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**given, **simple_parse_args_string(arg_string)})

    def mean_visual_tokens(self) -> float:
        """Mean per image over both passes of a cascade and all processes, since the last call."""
        tokens, images = self.accelerator.reduce(self.usage.to(self.device)).tolist()
        self.usage = torch.zeros(2)
        return tokens / max(images, 1)

    @property
    def device(self) -> torch.device:
        """Where inputs go, and where lmms-eval gathers the counts of several processes."""
        return self.model.device

    def clean(self):
        """Keeps the model for the next task; lmms-eval would drop it to make room for a judge."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Answers requests in batches with equal generation arguments, the longest first.

        Returns the answers in the order of the requests, each cut before the first of `until`.

        Raises:
            RuntimeError: If documents cannot be answered; the message names the task and the documents.
        """
        groups = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True), []).append(index)
        answers = [None] * len(requests)
        description = f"answering, {self.num_visual_tokens} visual tokens"
        with tqdm(total=len(requests), desc=description, unit="request", disable=self.rank != 0) as progress:
            for arguments, indices in groups.items():
                # What needs most memory comes first, and texts of similar length need little padding
                indices.sort(key=lambda index: len(requests[index].args[0]), reverse=True)
                for first in range(0, len(indices), self.batch_size):
                    batch = indices[first : first + self.batch_size]
                    for index, answer in zip(batch, self._answer([requests[i] for i in batch], arguments), strict=True):
                        answers[index] = answer
                    progress.update(len(batch))
        return answers

    @torch.inference_mode()
    def _answer(self, requests: list[Instance], arguments: str) -> list[str]:
        where = ", ".join(f"{task} {split} document {doc_id}" for *_, doc_id, task, split in (r.args for r in requests))
        try:
            options, until = generation_options(json.loads(arguments))
            inputs = self._inputs(requests)
            if self.cascade:
                # Its answers end at the end token, as they did in calibration
                output = generate(self.model, **inputs, **options)
                self.usage += torch.tensor([output.visual_tokens_used.sum(), len(inputs.get("pixel_values", ()))])
                generated = output.sequences
            else:
                prompt_length = inputs["input_ids"].shape[1]
                criteria = [UntilStrings(self.processor, until, prompt_length)] if until else []
                pruned = self.fastv_layer is not None
                with fastv(self.model, self.num_visual_tokens, self.fastv_layer) if pruned else nullcontext():
                    generated = self.model.generate(**inputs, **options, stopping_criteria=criteria)[:, prompt_length:]
            texts = self.processor.batch_decode(generated, skip_special_tokens=True)
        except Exception as error:
            # A missing answer must not count as a wrong one
            raise RuntimeError(f"{where}, at {self.num_visual_tokens} visual tokens: {error}") from error
        return [cut(text, until) for text in texts]

    def _inputs(self, requests: list[Instance]) -> dict[str, torch.Tensor]:
        chats = []
        for _, doc_to_messages, _, doc_id, task, split in (request.args for request in requests):
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            if kinds := {part.type for message in messages.messages for part in message.content} - {"text", "image"}:
                raise ValueError(f"The messages hold {sorted(kinds)}: Delta-LLaVA takes images and text.")
            chats.append(messages.to_hf_messages())
        num_visual_tokens = self.calibration["num_visual_tokens"][0] if self.cascade else self.num_visual_tokens
        budget = {"num_visual_tokens": num_visual_tokens} if self.fastv_layer is None else {}
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **budget},
        ).to(self.device, self.model.dtype)

    def loglikelihood(self, requests: list[Instance]):
        raise NotImplementedError("delta_llava is a chat model, and lmms-eval's chat tasks need no likelihoods.")

    def generate_until_multi_round(self, requests: list[Instance]):
        raise NotImplementedError("delta_llava answers tasks of one round: output_type generate_until.")


class UntilStrings(StoppingCriteria):
    """
    Ends each row whose answer, after `prompt_length` tokens of the padded prompt, has one of the strings `until`.

    transformers' own `stop_strings` also reads the end of the prompt: after a prompt that ends in a line break, one
    more would be the empty line that most tasks stop at.
    """

    def __init__(self, processor, until: list[str], prompt_length: int):
        self.processor, self.until, self.prompt_length = processor, until, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        texts = self.processor.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        done = [any(end in text for end in self.until) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def generation_options(arguments: dict) -> tuple[dict, list[str]]:
    """
    Splits a task's generation arguments into those of `generate` and the strings `until` (one, or a list) that end an
    answer. Without a temperature above 0 the answer is greedy.

    Raises:
        ValueError: If `until` is of another type, or has an empty string.
    """
    options = {"max_new_tokens": MAX_NEW_TOKENS, **arguments}
    until = options.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not all(isinstance(end, str) and end for end in until):
        raise ValueError(f"until={until} must be a string or a list of strings, none of them empty.")
    options.setdefault("do_sample", (options.get("temperature") or 0) > 0)
    if not options["do_sample"]:
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
    return options, until


def cut(text: str, until: list[str]) -> str:
    """An answer up to the first of the strings `until`, or all of it."""
    for end in until:
        text = text.partition(end)[0]
    return text
