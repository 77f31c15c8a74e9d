"""
A page that shows what a visual token buys: one question, two budgets, both answers and what each cost.

```
python app.py --checkpoint ORG/NAME
```

In a Space, `checkpoint.json` beside this file names the checkpoint and its commit; `delta_llava.hub.push_space` writes
it.
"""

import argparse
import base64
import html
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from math import isqrt
from pathlib import Path

import gradio as gr
import torch
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor, cascade
from delta_llava.costs import flops_unit, inference_costs
from delta_llava.evaluation.gradcam import MAX_NEW_TOKENS, conversation, encode_chat, seen_image, token_relevance
from delta_llava.serving.feature_cache import FeatureCache, cache_image_features
from delta_llava.serving.image_guard import ImageGuard


HERE = Path(__file__).parent
POINTER = HERE / "checkpoint.json"
EXAMPLES = {
    "What is below the pizza?": HERE / "examples" / "small.png",
    "How many animals are there?": HERE / "examples" / "mixed.png",
    "Where is the bus?": HERE / "examples" / "big.png",
}
MAX_QUESTION = 1000  # characters
MAX_SIDE = 1024  # pixels to which images are reduced, far more than a tower reads
MAX_WAITING = 20  # questions in the queue
MAX_VISITORS = 200  # whose images, of up to 3 MiB, and chats are kept
SIDES = ("Budget A", "Budget B")
CASCADE = "cascade"  # beside the budgets: both of the checkpoint's cascade.json
FLOPS = ("vision", "projector", "prefill", "decode")
TYPICAL = {"text_tokens": 64, "new_tokens": 16}  # for the FLOPs that are shown before a question is asked

# On a phone the answers are below the fold
TO_ANSWERS = "() => { if (innerWidth < 700) document.querySelector('.side').scrollIntoView({behavior: 'smooth'}); }"


class Watch(StoppingCriteria):
    """Records the time of every token, and ends an answer that nobody waits for any more."""

    def __init__(self):
        self.times = []
        self.is_over = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(time.perf_counter())
        return torch.full(input_ids.shape[:1], self.is_over.is_set(), device=input_ids.device)


class Upload(gr.Image):
    """Passes on the bytes of an upload, which the guard opens: Gradio would open any file, of any size."""

    is_template = True  # to the browser it is an Image

    def preprocess(self, payload):
        if payload is None:
            return None
        file = Path(payload.path or "").resolve()
        # Gradio checks the path only if the client says that it sends a file
        if not (file.is_file() and file.is_relative_to(Path(self.GRADIO_CACHE).resolve())):
            raise gr.Error("That is not an uploaded image: upload one.")
        return file.read_bytes()

    async def async_move_resource_to_block_cache(self, url_or_file_path):
        if url_or_file_path and "://" in str(url_or_file_path):
            raise gr.Error("This page fetches nothing from addresses: upload the image itself.")
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class Budget(gr.HTML):
    """A slider that stops at the budgets that the patch grid allows, and at the cascade; its value is the budget."""

    def __init__(self, value: int, names: dict[int | str, str], label: str):
        self.budgets = list(names)
        ticks = "".join(f"<span>{'↻' if budget == CASCADE else budget}</span>" for budget in names)
        super().__init__(
            value=value,
            html_template=f"""
                <label><span class="budget-label">{label}: <output></output></span>
                <input type="range" min="0" max="{len(names) - 1}" step="1"></label>
                <div class="ticks" aria-hidden="true">{ticks}</div>""",
            js_on_load=f"""
                const budgets = {json.dumps(self.budgets)};
                const names = {json.dumps(list(names.values()))};
                const slider = element.querySelector('input');
                const show = () => {{
                    const text = names[slider.value];
                    element.querySelector('output').textContent = text;
                    slider.setAttribute('aria-valuetext', text);
                }};
                slider.value = budgets.findIndex(budget => budget == props.value);
                show();
                slider.addEventListener('input', () => {{
                    show();
                    props.value = budgets[slider.value];
                    trigger('input');
                }});""",
            elem_classes="budget",
        )

    def preprocess(self, payload):
        if payload not in self.budgets:
            raise gr.Error(f"{payload} is not a budget of this checkpoint: choose one of {self.budgets}.")
        return self.budgets[self.budgets.index(payload)]  # an integer, which 4.0 and true are not

    def postprocess(self, value):
        return value


class Page:
    """
    A checkpoint, and what the page does with it. One question is answered at a time, so that timings do not mix.

    Args:
        checkpoint (`str` or `Path`): Folder, or `ORG/NAME` of a Hub repository.
        revision (`str`, *optional*): Its branch or commit.
    """

    def __init__(self, checkpoint: str | Path, revision: str | None = None):
        self.processor = DeltaLlavaProcessor.from_pretrained(checkpoint, revision=revision)
        model = DeltaLlavaForConditionalGeneration.from_pretrained(checkpoint, revision=revision, dtype="auto")
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
        self.cache = FeatureCache()
        cache_image_features(self.model, self.cache)
        self.guard = ImageGuard()
        self.config = model.config
        self.budgets = self.config.valid_visual_token_counts
        self.names = {budget: count(budget) for budget in self.budgets}
        self.typical = {budget: self.flops(budget, **TYPICAL) for budget in self.budgets}
        try:
            calibration = cascade.read_calibration(checkpoint, revision)
        except FileNotFoundError:  # so the page offers no cascade
            self.cascade, self.threshold = (), None
        else:
            self.cascade = cascade.check_budgets(calibration["num_visual_tokens"], self.config.patch_grid_size)
            self.threshold = calibration["threshold"]
            self.names[CASCADE] = f"{count(self.cascade[0])}, and {self.cascade[1]} if unsure"
            self.typical[CASCADE] = self.typical[self.cascade[0]]
        # The first pass at a budget takes longer than all later ones, and would mislead the first visitor
        for budget in self.config.visual_token_budgets:
            next(self.answer(Image.new("RGB", (8, 8)), "What is this?", (), budget))

    def flops(self, budget: int, text_tokens: int, new_tokens: int, parts: tuple[str, ...] = FLOPS) -> int | None:
        """FLOPs of these parts of one answer; `None` if `costs` does not know the backbones."""
        try:
            costs = inference_costs(self.config, budget, text_tokens, new_tokens)
        except ValueError:
            return None
        return sum(costs[part] for part in parts)

    def first(self, budget: int | str) -> int:
        """The visual tokens of an answer's first pass."""
        return self.cascade[0] if budget == CASCADE else budget

    def open(self, upload: bytes | None) -> Image.Image | None:
        if upload is None:
            return None
        image = self.guard(upload)
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        return image

    def seen(self, image: Image.Image) -> str:
        """What the tower sees of an image, as a `data:` URL."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        seen = seen_image(pixels, self.processor, self.config.vision_config.patch_size)
        file = BytesIO()
        Image.fromarray((seen * 255).round().byte().numpy()).save(file, "PNG")
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"

    def answer(self, image: Image.Image, question: str, earlier: list, budget: int | str) -> Iterator[tuple[str, dict]]:
        """Yields the answer as it grows, and what it cost so far; an answer of the cascade at once."""
        started, hits = time.perf_counter(), self.cache.hits
        first, largest = self.first(budget), self.cascade[1] if budget == CASCADE else budget
        messages = conversation(image, question, earlier)
        inputs = encode_chat(self.model, self.processor, messages, first, add_generation_prompt=True)
        prompt = inputs["input_ids"].shape[1]
        room = self.config.text_config.max_position_embeddings - prompt - (largest - first)
        if room < 1:
            length = prompt + largest - first
            raise ValueError(f"This chat is too long: {length} tokens of {room + length}. Start a new one.")
        max_new_tokens = min(MAX_NEW_TOKENS, room)
        if budget == CASCADE:
            yield self._cascaded(inputs, prompt - first, max_new_tokens, started)
            return
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        watch = Watch()

        def generate():
            try:
                self.model.generate(
                    **inputs,
                    streamer=streamer,
                    stopping_criteria=[watch],
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                )
            except Exception:
                streamer.end()  # else the reader would wait forever
                raise

        text = ""
        with ThreadPoolExecutor(1) as pool:
            generated = pool.submit(generate)
            try:
                for piece in streamer:
                    text += piece
                    if watch.times:
                        is_cached = self.cache.hits > hits
                        yield text.strip(), self._took(budget, prompt - budget, watch.times, started, is_cached)
            finally:
                watch.is_over.set()
        generated.result()

    def _took(self, budget: int, text_tokens: int, times: list[float], started: float, is_cached: bool) -> dict:
        seconds = times[-1] - times[0]
        return {
            "budget": budget,
            "used": budget,
            "flops": self.flops(budget, text_tokens, len(times), FLOPS[2:] if is_cached else FLOPS),
            "first": times[0] - started,
            "speed": (len(times) - 1) / seconds if seconds else None,
            "notes": ["Image already encoded, so not again."] if is_cached else [],
        }

    def _cascaded(self, inputs, text_tokens: int, max_new_tokens: int, started: float) -> tuple[str, dict]:
        """The cascade's answer, and what it took; FLOPs as if both answers were as long as the longer one."""
        small, large = self.cascade
        output = cascade.generate(
            self.model,
            **inputs,
            budgets=self.cascade,
            threshold=self.threshold,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        budget, ids = int(output.num_visual_tokens[0]), output.sequences[0]
        flops, note = self.flops(small, text_tokens, len(ids)), f"Sure enough at {count(small)}."
        if budget == large:
            flops = flops and flops + self.flops(large, text_tokens, len(ids), FLOPS[1:])
            note = f"Unsure at {count(small)}, so asked again at {large}. FLOPs of both, at the longer answer's length."
        return self.processor.decode(ids, skip_special_tokens=True).strip(), {
            "budget": budget,
            "used": int(output.visual_tokens_used[0]),
            "flops": flops,
            "first": time.perf_counter() - started,
            "speed": None,
            "notes": [note, "The time is that of the whole answer, which comes at once; the image is encoded anew."],
        }


def grid(seen: str | None, budget: int, relevance: torch.Tensor | None = None) -> str:
    """The image under a grid of one cell for each visual token, dimmed where a token mattered less for the answer."""
    side = isqrt(budget)
    lines = "".join(f"M{i} 0V{side}M0 {i}H{side}" for i in range(1, side))
    picture = shade = ""
    caption = "A visual token for each cell." if budget > 1 else "One visual token for the whole image."
    if seen:
        picture = f'<image href="{seen}" width="{side}" height="{side}" preserveAspectRatio="none"/>'
    if relevance is not None:
        shares = (relevance / (relevance.max() or 1)).sqrt()
        shade = "".join(
            f'<rect x="{column}" y="{row}" width="1" height="1" fill-opacity="{0.85 * (1 - share):.2f}"/>'
            for row, shares_of_row in enumerate(shares.tolist())
            for column, share in enumerate(shares_of_row)
        )
        caption = "Lit: the visual tokens that the answer rests on."
    label = f"What the model sees of the image, as {count(budget)}. {caption}"
    return (
        f'<figure><svg viewBox="0 0 {side} {side}" role="img" aria-label="{label}">{picture}{shade}'
        f'<path d="{lines}" stroke-opacity="{min(0.6, 5 / side):.2f}"/></svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def figures(tokens: int | str, flops: int | None, largest: int | None, took: dict | None, notes: list[str]) -> str:
    """Visual tokens, FLOPs, time to first token and speed of one side."""
    size, unit = flops_unit(flops or 0)
    bar = f'<div class="bar"><div style="width: {100 * flops / largest:.1f}%"></div></div>' if flops else ""
    entries = {
        "Visual tokens": took["used"] if took else tokens,
        "FLOPs": f"{'' if took else '≈ '}{flops / size:.3g} {unit}{bar}" if flops else "unknown",
        "Time to first token": f"{took['first']:.3f} s" if took else "—",
        "Tokens per second": f"{took['speed']:.3g}" if took and took["speed"] else "—",
    }
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in entries.items())
    return f'<dl>{cells}</dl><p class="note">{" ".join(notes)}</p>'


def count(budget: int) -> str:
    return f"{budget} visual token" + ("s" if budget > 1 else "")


def message(text: str = "") -> str:
    return f'<p role="alert">{html.escape(text)}</p>' if text else ""


def chat(turns: list[dict], side: int) -> str:
    """Questions, and the answers of one side."""
    shown = ""
    for turn in turns:
        answer = html.escape(turn["answers"][side]) or "…"
        shown += f'<p class="question">{html.escape(turn["question"])}</p>'
        shown += f'<p class="answer">{answer}<small>{count(turn["used"][side])}</small></p>'
    return f'<div role="log" tabindex="0" aria-label="Answers to {SIDES[side]}"><div>{shown}</div></div>'


def build(page: Page) -> gr.Blocks:
    """The page. What a visitor sends stays in the state of the visitor's session, on the server."""
    trained = set(page.config.visual_token_budgets)
    few = min(trained)
    start = (few, max(budget for budget in page.budgets if budget != few))
    first_question, first_image = next(iter(EXAMPLES.items()))

    def describe(budgets, took=(None, None)) -> list[str]:
        flops = [t["flops"] if t else page.typical[budget] for budget, t in zip(budgets, took, strict=True)]
        largest = max((number for number in flops if number), default=None)
        described = []
        for budget, number, t in zip(budgets, flops, took, strict=True):
            notes, tokens = t["notes"] if t else [], budget
            if budget == CASCADE and not t:
                small, large = page.cascade
                tokens = f"{small} or {small + large}"
                unsure = f"and again at {large} if the answer's mean log-probability is below {page.threshold:.3g}"
                again = "and never again" if page.threshold <= cascade.NEVER else unsure
                notes = [f"Asks at {count(small)}, {again}. FLOPs: of the first pass."]
            if not trained.issuperset(page.cascade if budget == CASCADE else (budget,)):
                notes = [*notes, "Not trained at this budget: expect worse answers."]
            described.append(figures(tokens, number, largest, t, notes))
        return described

    def show(session, upload, *budgets):
        """A new image, or none, and with it a new chat."""
        session.update(image=None, seen=None)
        error = ""
        try:
            session["image"] = page.open(upload)
            session["seen"] = session["image"] and page.seen(session["image"])
        except ValueError as refusal:
            error = str(refusal)
        return restart(session, *budgets, error=error)

    def restart(session, *budgets, error=""):
        """A new chat about the same image."""
        session["turns"] = []
        return [message(error), *move(session, *budgets), "", ""]

    def move(session, *budgets):
        return [*(grid(session["seen"], page.first(budget)) for budget in budgets), *describe(budgets)]

    def ask(session, question, *budgets):
        turns = session["turns"]
        try:
            for update in answer_both(question.strip(), session["image"], session["seen"], turns, budgets):
                if session["turns"] is not turns:
                    return  # a new image or chat, to which this answer does not belong
                yield update
        except ValueError as refusal:
            yield {alert: message(str(refusal))}
        except Exception:
            logging.exception("An answer failed")
            yield {alert: message("The model failed on this question, and the log says why: ask another one.")}

    def answer_both(question, image, seen, turns, budgets):
        if image is None:
            raise ValueError("There is no image: upload or paste one, or choose an example.")
        if not question:
            raise ValueError("There is no question: ask something about the image.")
        if len(question) > MAX_QUESTION:
            raise ValueError(f"The question has {len(question)} characters: ask in at most {MAX_QUESTION}.")
        earlier = [[(turn["question"], turn["answers"][side]) for turn in turns] for side in range(2)]
        answers, took = ["", ""], [None, None]
        used = [page.first(budget) for budget in budgets]
        turn = {"question": question, "used": used, "answers": answers}
        yield {alert: message(), **{pictures[side]: grid(seen, budget) for side, budget in enumerate(used)}}
        for side, budget in enumerate(budgets):
            for answer, spent in page.answer(image, question, earlier[side], budget):
                answers[side], took[side], used[side] = answer, spent, spent["used"]
                turns[len(earlier[side]) :] = [turn]  # from the first word, so that a chat goes on after a stop
                yield {
                    box: "",
                    chats[side]: chat(turns, side),
                    **dict(zip(numbers, describe(budgets, took), strict=True)),
                }
        for side in range(2):
            if answers[side]:
                budget = took[side]["budget"]
                relevance = token_relevance(
                    page.model, page.processor, image, question, budget, answers[side], earlier[side]
                )
                yield {pictures[side]: grid(seen, budget, relevance)}

    with gr.Blocks(title="Delta-LLaVA", analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        opened = page.open(first_image.read_bytes())
        session = gr.State({"image": opened, "seen": page.seen(opened), "turns": []})
        gr.HTML(
            "<h1>What does a visual token buy?</h1><p>Delta-LLaVA turns an image into as few visual tokens as you "
            "choose. Few are cheap and fast, many see detail. Choose two budgets, ask, and compare: they answer in "
            "turn, so that neither slows the other.</p>",
            elem_id="head",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                upload = Upload(
                    str(first_image),
                    label="Image",
                    sources=["upload", "clipboard"],
                    height=240,
                    buttons=[],
                    elem_id="upload",
                )
                with gr.Row():
                    examples = [
                        gr.Button(text, icon=str(file), size="sm", min_width=100) for text, file in EXAMPLES.items()
                    ]
                box = gr.Textbox(first_question, label="Question", submit_btn=False, lines=1, max_lines=4)
                with gr.Row(elem_classes="buttons"):
                    asking = gr.Button("Ask both", variant="primary", size="md", min_width=110)
                    stopping = gr.Button("Stop", size="md", min_width=60)
                    clearing = gr.Button("New chat", size="md", min_width=90)
                alert = gr.HTML(elem_id="message")
            budgets, pictures, numbers, chats = [], [], [], []
            with gr.Column(scale=6, min_width=576), gr.Row():  # beside each other, or both below
                for name, budget, text in zip(SIDES, start, describe(start), strict=True):
                    with gr.Column(min_width=280, elem_classes="side"):
                        budgets.append(Budget(budget, page.names, name))
                        with gr.Row(elem_classes="seen"):
                            pictures.append(gr.HTML(grid(session.value["seen"], budget), min_width=140, scale=1))
                            numbers.append(gr.HTML(text, min_width=120, scale=1))
                        chats.append(gr.HTML(elem_classes="chat"))

        quick = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}
        answering = gr.on(
            [asking.click, box.submit],
            ask,
            [session, box, *budgets],
            [box, alert, *pictures, *numbers, *chats],
            api_visibility="private",
            show_progress_on=alert,
            concurrency_limit=1,
        )
        shown = [alert, *pictures, *numbers, *chats]
        stopping.click(None, cancels=[answering])
        upload.change(show, [session, upload, *budgets], shown, cancels=[answering], **quick)
        clearing.click(restart, [session, *budgets], shown, cancels=[answering], **quick)
        for button, (text, file) in zip(examples, EXAMPLES.items(), strict=True):
            button.click(lambda text=text, file=file: (str(file), text), None, [upload, box], **quick)
        for budget in budgets:
            budget.input(move, [session, *budgets], [*pictures, *numbers], trigger_mode="always_last", **quick)
        gr.on([asking.click, box.submit], js=TO_ANSWERS)
    return demo.queue(max_size=MAX_WAITING)


def launch(demo: gr.Blocks, **options):
    """Serve the page as `main` does; `options` are those of `gr.Blocks.launch`."""
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    return demo.launch(
        theme=theme,
        css_paths=HERE / "style.css",
        footer_links=[],
        run_history=False,  # would leave images and questions in the browser
        enable_monitoring=False,
        max_file_size="32mb",
        state_session_capacity=MAX_VISITORS,
        ssr_mode=False,
        allowed_paths=[str(HERE / "examples")],
        **options,
    )


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder or repository (default: what checkpoint.json names)")
    parser.add_argument("--revision", help="branch or commit of the repository")
    options = vars(parser.parse_args(arguments))
    if not options["checkpoint"]:
        if not POINTER.is_file():
            parser.error(f"there is no {POINTER}, so name a checkpoint: --checkpoint FOLDER or ORG/NAME")
        options = json.loads(POINTER.read_text(encoding="utf-8"))
    try:
        page = Page(**options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"error: checkpoint {options['checkpoint']} does not load: {reason}") from error
    launch(build(page))


if __name__ == "__main__":
    main()
