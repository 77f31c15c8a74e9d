"""Visitors of the page, in a real browser: `make test-space` has the environment for it."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="Gradio has an environment of its own: make test-space")

import torch
from huggingface_hub.utils import httpx
from loopback_hub import File, LoopbackHub, Repository
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import delta_llava
from delta_llava.costs import UNITS, inference_costs
from delta_llava.demo.ask import CHECKPOINT
from delta_llava.evaluation.gradcam import MAX_NEW_TOKENS, conversation
from delta_llava.hub.push_space import space_files
from delta_llava.space import app


pytestmark = pytest.mark.space
ROOT = Path(delta_llava.__file__).parent
SCREENSHOTS = ROOT / "build" / "space"  # for people to look at
QUESTION = "What is at d4?"
FIGURES = ["Visual tokens", "FLOPs", "Time to first token", "Tokens per second"]


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_processor, tmp_path_factory):
    """The demo's, or an untrained one."""
    if (CHECKPOINT / "model.safetensors").is_file():
        return CHECKPOINT
    folder, model, processor = tmp_path_factory.mktemp("checkpoint"), tiny_model(), tiny_processor()
    words = {token: processor.decode([token]) for token in range(len(processor.tokenizer))}
    said = {token for token, word in words.items() if word.isascii() and word.isalnum()} | {
        processor.tokenizer.eos_token_id
    }
    # What a browser shows as it is
    model.generation_config.suppress_tokens = sorted(set(range(model.lm_head.out_features)) - said)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(checkpoint):
    return app.Page(checkpoint)


@pytest.fixture(scope="module")
def url(served):
    demo = app.build(served)
    _, url, _ = app.launch(demo, prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    yield url
    demo.close()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.fail("The page is tested in Debian's Chromium, which is not here: apt-get install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def visit(browser, url):
    """`visit(width, ...)`: a visitor of their own, with the page before them."""
    visitors = []

    def open_page(width=1280, address=url, **options):
        context = browser.new_context(viewport={"width": width, "height": 844}, **options)
        visitors.append(context)
        page = context.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(address)
        expect(page.locator("input[type=range]")).to_have_count(2)
        expect(page.locator("#upload img")).to_be_visible()
        return page

    yield open_page
    for context in visitors:
        problems = [problem for page in context.pages for problem in page.problems]
        context.close()
        assert not problems


@pytest.fixture
def picture(noise, tmp_path):
    """`picture(seed)`: the file of a picture like no other's."""

    def make(number):
        file = tmp_path / f"picture-{number}.png"
        noise(number)[-1].save(file)
        return file

    return make


def upload(page, file):
    shown, remove = page.locator("figure image"), page.get_by_label("Remove Image")
    before = shown.first.get_attribute("href") if shown.count() else ""
    if remove.count():
        remove.click()
    page.locator("#upload input[type=file]").first.set_input_files(file)
    expect(shown).to_have_count(2)
    expect(shown.first).not_to_have_attribute("href", before)


def ask(page, question, number=1):
    """Ask, and return both answers once their maps are there."""
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask both").click()
    return answers(page, number)


def answers(page, number=1):
    for side in (0, 1):
        expect(page.locator(".side").nth(side).locator(".answer")).to_have_count(number, timeout=120_000)
    expect(page.locator("figcaption", has_text="Lit")).to_have_count(2, timeout=120_000)
    return [side.locator(".answer").last.inner_text().split("\n")[0] for side in page.locator(".side").all()]


def move(page, side, budget, served):
    slider = page.locator("input[type=range]").nth(side)
    slider.focus()
    page.keyboard.press("Home")
    for _ in range(served.budgets.index(budget)):
        page.keyboard.press("ArrowRight")
    expect(figures(page, side).first).to_have_text(str(budget))


def figures(page, side):
    return page.locator(".side").nth(side).locator("dd")


def expected(served, image, question, budget, earlier=()):
    """What transformers answers, without the page and its cache."""
    inputs = served.processor.apply_chat_template(
        conversation(image, question, earlier),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": budget},
    )
    served.cache.clear()
    ids = served.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0]
    prompt = inputs["input_ids"].shape[1]
    costs = inference_costs(served.config, budget, prompt - budget, len(ids) - prompt)
    text = served.processor.decode(ids[prompt:], skip_special_tokens=True).strip()
    return text, sum(costs[part] for part in ("vision", "projector", "prefill", "decode"))


def test_a_visitor_uploads_asks_and_compares_two_budgets(visit, served, picture):
    page, file = visit(), picture(1)
    page.screenshot(path=SCREENSHOTS / "before.png", full_page=True)
    upload(page, file)
    move(page, 0, 4, served)
    move(page, 1, 36, served)
    shown = ask(page, QUESTION)
    for side, budget in enumerate((4, 36)):
        text, flops = expected(served, file, QUESTION, budget)
        assert shown[side] == text
        panel = page.locator(".side").nth(side)
        assert panel.locator("dt").all_inner_texts() == FIGURES
        tokens, printed, first, speed = figures(page, side).all_inner_texts()
        size, unit = next((size, unit) for size, unit in UNITS.items() if flops >= size)
        assert (tokens, printed.strip()) == (str(budget), f"{flops / size:.3g} {unit}")
        assert float(first.removesuffix(" s")) > 0 and float(speed) > 0
        assert panel.locator("rect").count() == budget
    assert not page.get_by_role("alert").count()


def test_the_first_look_needs_one_press_of_a_button(visit, served):
    page = visit()
    question, file = next(iter(app.EXAMPLES.items()))
    assert page.get_by_label("Question").input_value() == question
    expect(figures(page, 1).nth(1)).to_contain_text("≈")
    page.get_by_role("button", name="Ask both").click()
    budgets = [int(figures(page, side).first.inner_text()) for side in (0, 1)]
    assert answers(page) == [expected(served, file, question, budget)[0] for budget in budgets]
    page.screenshot(path=SCREENSHOTS / "desktop.png", full_page=True)


def test_an_image_is_pasted(visit, served, picture):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    data = base64.b64encode(picture(7).read_bytes()).decode()
    page.evaluate(
        """async data => {
            const image = await (await fetch('data:image/png;base64,' + data)).blob();
            await navigator.clipboard.write([new ClipboardItem({'image/png': image})]);
        }""",
        data,
    )
    before = page.locator("figure image").first.get_attribute("href")
    page.get_by_label("Paste from clipboard").click()
    expect(page.locator("figure image").first).not_to_have_attribute("href", before)
    assert ask(page, QUESTION)[1] == expected(served, picture(7), QUESTION, served.budgets[-1])[0]


def test_a_chat_goes_on_about_the_same_image_without_encoding_it_again(visit, served, picture):
    page, file = visit(), picture(2)
    upload(page, file)
    budgets = [int(figures(page, side).first.inner_text()) for side in (0, 1)]
    served.cache.clear()
    misses = served.cache.misses
    first = ask(page, QUESTION)
    assert served.cache.misses == misses + 2
    passes, hits = [], served.cache.hits
    handle = served.model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    second = ask(page, "And what is at a1?", number=2)
    handle.remove()
    assert served.cache.misses == misses + 2 and served.cache.hits > hits and not passes
    expect(page.locator(".note", has_text="Image already encoded, so not again.")).to_have_count(2)
    for side, budget in enumerate(budgets):
        assert second[side] == expected(served, file, "And what is at a1?", budget, [(QUESTION, first[side])])[0]

    for number in (3, 4):
        ask(page, QUESTION, number)
    for log in page.get_by_role("log").all():  # the last answer is in sight
        ends = [box["y"] + box["height"] for box in (log.bounding_box(), log.locator(".answer").last.bounding_box())]
        assert ends[0] == pytest.approx(ends[1], abs=20)

    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".answer")).to_have_count(0)
    assert ask(page, QUESTION) == first


def test_errors_are_sentences_and_the_page_goes_on(visit, served, tmp_path, picture, monkeypatch):
    page, alert = visit(), "#message [role=alert]"
    (tmp_path / "broken.png").write_text("no image")
    page.get_by_label("Remove Image").click()
    page.locator("#upload input[type=file]").first.set_input_files(tmp_path / "broken.png")
    expect(page.locator(alert)).to_contain_text("it is no image of the formats")
    Image.new("1", (8000, 8000)).save(tmp_path / "vast.png")
    page.get_by_label("Remove Image").click()
    page.locator("#upload input[type=file]").first.set_input_files(tmp_path / "vast.png")
    expect(page.locator(alert)).to_contain_text("8000 x 8000 pixels")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator(alert)).to_have_text("There is no image: upload or paste one, or choose an example.")
    upload(page, picture(3))
    expect(page.locator(alert)).to_have_count(0)
    for question, sentence in (("  ", "There is no question"), ("x" * 1001, "The question has 1001 characters")):
        page.get_by_label("Question").fill(question)
        page.get_by_role("button", name="Ask both").click()
        expect(page.locator(alert)).to_contain_text(sentence)
    assert page.locator(".answer").count() == 0
    ask(page, QUESTION)
    monkeypatch.setattr(served.config.text_config, "max_position_embeddings", 100)
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator(alert)).to_contain_text("This chat is too long")
    assert not page.get_by_text("Traceback").count()


def test_a_model_that_fails_is_a_sentence_too(visit, served, monkeypatch):
    def fail(**kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(served.model, "generate", fail)
    page = visit()
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#message [role=alert]")).to_contain_text("The model failed on this question")
    monkeypatch.undo()
    page.get_by_label("Question").fill(QUESTION)
    page.get_by_role("button", name="Ask both").click()
    answers(page, number=1)


@pytest.mark.parametrize("how", ["stops", "leaves", "takes another image"])
def test_the_model_stops_when_its_visitor_does(visit, served, monkeypatch, how):
    passes = []
    handle = served.model.lm_head.register_forward_hook(lambda *_: passes.append(time.sleep(0.1)))
    monkeypatch.setattr(served.model.generation_config, "eos_token_id", None)
    try:
        page = visit()
        page.get_by_role("button", name="Ask both").click()
        expect(page.locator(".answer").first).to_contain_text(re.compile(r"\w"))
        page.screenshot(path=SCREENSHOTS / "streaming.png", full_page=True)
        if how == "leaves":
            page.goto("about:blank")
        else:
            page.get_by_role("button", name="Stop" if how == "stops" else list(app.EXAMPLES)[1]).click()
        page.wait_for_timeout(2000)
        stopped_at = len(passes)
        page.wait_for_timeout(1000)
        assert len(passes) == stopped_at < MAX_NEW_TOKENS
    finally:
        handle.remove()
        monkeypatch.undo()
    if how == "leaves":
        return
    expect(page.locator(".side").first.locator(".answer")).to_have_count(int(how == "stops"))
    ask(page, "Again?", number=1 + (how == "stops"))


def test_it_works_with_a_keyboard_alone(visit):
    page = visit()

    def tab_to(what):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate(
                f"document.activeElement.matches({what!r}) && document.activeElement.matches(':focus-visible')"
            ):
                return
        raise AssertionError(f"Tab does not reach {what}")

    page.keyboard.press("Tab")
    tab_to("#upload button")
    example = list(app.EXAMPLES)[1]
    for _ in range(10):
        tab_to("button")
        if page.evaluate("document.activeElement.innerText.trim()") == example:
            break
    page.keyboard.press("Enter")
    expect(page.get_by_label("Question")).to_have_value(example)
    tab_to("textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    first = answers(page)
    assert all(first)
    tab_to("input[type=range]")
    page.keyboard.press("ArrowRight")
    expect(page.locator("input[type=range]").first).to_have_attribute("aria-valuetext", "4 visual tokens")
    expect(figures(page, 0).first).to_have_text("4")
    page.keyboard.press("ArrowRight")
    expect(figures(page, 0).first).to_have_text("9")
    assert page.locator("input[type=range]").first.evaluate("slider => slider === document.activeElement")


def test_on_a_phone_columns_stack_and_nothing_overflows(visit):
    page = visit(width=390, has_touch=True, is_mobile=True)
    ask(page, "Wherever is the " + "x" * 200 + "?")
    page.wait_for_timeout(700)  # of scrolling to the answers
    assert -1 <= page.locator(".side").first.bounding_box()["y"] < 400
    first, second = (side.bounding_box() for side in page.locator(".side").all())
    assert second["y"] >= first["y"] + first["height"]
    wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 391).length"
    assert (page.evaluate("document.documentElement.scrollWidth"), page.evaluate(wide)) == (390, 0)
    page.screenshot(path=SCREENSHOTS / "phone.png", full_page=True)


@pytest.mark.parametrize("width", [720, 1024, 1280])
def test_answers_stand_side_by_side_where_there_is_room(visit, width):
    page = visit(width=width)
    first, second = (side.bounding_box() for side in page.locator(".side").all())
    assert first["y"] == second["y"] and first["x"] + first["width"] < second["x"]
    assert first["width"] == pytest.approx(second["width"], abs=1)
    assert page.evaluate("document.documentElement.scrollWidth") == width


# Of every text that is seen, with the background behind it
CONTRAST = r"""() => {
    const luminance = colour => colour.slice(0, 3).map(c => c / 255).map(
        c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
    ).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const parse = text => text.match(/[\d.]+/g).map(Number);
    const texts = [...document.querySelectorAll('.gradio-container *')].filter(element =>
        element.checkVisibility() && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
    return texts.map(element => {
        let behind = element, background;
        do {
            background = parse(getComputedStyle(behind).backgroundColor);
            behind = behind.parentElement;
        } while (behind && background[3] === 0);
        const [dark, light] = [background, parse(getComputedStyle(element).color)].map(luminance).sort((a, b) => a - b);
        return [element.innerText, (light + 0.05) / (dark + 0.05), luminance(background)];
    });
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_in_both_themes(visit, theme):
    page = visit(color_scheme=theme)
    page.get_by_role("button", name="Ask both").click()
    answers(page)
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # of buttons that fade
    texts = page.evaluate(CONTRAST)
    assert len(texts) > 40
    assert not [(text, contrast) for text, contrast, _ in texts if contrast < 4.5]
    behind = {background for text, _, background in texts if text in FIGURES}
    assert max(behind) < 0.1 if theme == "dark" else min(behind) > 0.9
    page.screenshot(path=SCREENSHOTS / f"{theme}.png", full_page=True)


def test_two_visitors_at_once_see_their_own_things_alone(visit, served, picture):
    visitors = [(visit(), picture(4), "What is this?"), (visit(), picture(5), "How many are there?")]
    for page, file, _ in visitors:
        upload(page, file)
    for page, _, question in visitors:
        page.get_by_label("Question").fill(question)
        page.get_by_role("button", name="Ask both").click()
    for page, file, question in visitors:
        shown = answers(page)
        assert shown[1] == expected(served, file, question, served.budgets[-1])[0]
        assert set(page.locator(".question").all_inner_texts()) == {question}
    assert visit().locator(".question").count() == 0


def test_a_budget_without_training_and_costs_that_are_unknown_are_said_so(tiny_model, tiny_processor, tmp_path):
    tiny_model(visual_token_budgets=[36]).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    page = app.Page(tmp_path)
    assert app.CASCADE not in page.names
    shown = str(app.build(page).get_config_file()["components"])
    assert shown.count("Not trained at this budget: expect worse answers.") == 1
    assert "<dd>36</dd>" in shown and "<dd>144</dd>" in shown
    assert "unknown" in app.figures(36, None, None, None, [])


def test_a_cascade_is_offered_where_the_checkpoint_has_one(visit, checkpoint, picture, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    file = folder / "cascade.json"
    file.write_text(json.dumps({"num_visual_tokens": [4, 36], "threshold": 0.0, "validation": {}}))
    cascaded = app.Page(folder)
    demo = app.build(cascaded)
    _, url, _ = app.launch(demo, prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    page, image = visit(address=url), picture(8)
    upload(page, image)
    slider = page.locator("input[type=range]").first
    slider.focus()
    page.keyboard.press("End")
    expect(slider).to_have_attribute("aria-valuetext", "4 visual tokens, and 36 if unsure")
    expect(page.locator(".note").first).to_contain_text("again at 36 if the answer's mean log-probability is below 0.")
    page.screenshot(path=SCREENSHOTS / "cascade.png", full_page=True)
    text, flops = expected(cascaded, image, QUESTION, 36)
    assert ask(page, QUESTION)[0] == text
    expect(page.locator(".answer small").first).to_have_text("40 visual tokens")
    expect(page.locator(".note").first).to_contain_text("Unsure at 4 visual tokens, so asked again at 36.")
    assert figures(page, 0).first.inner_text() == "40" and page.locator(".side").first.locator("rect").count() == 36
    demo.close()

    cascaded.threshold = -1e9
    ((text, took),) = cascaded.answer(Image.open(image), QUESTION, (), app.CASCADE)
    assert (text, took["flops"]) == expected(cascaded, image, QUESTION, 4)
    assert (took["budget"], took["used"]) == (4, 4) and took["flops"] < flops
    file.write_text("[")
    with pytest.raises(ValueError, match=r"cascade\.json is damaged"):
        app.Page(folder)


def call(url, data):
    """What a client without a browser gets from the event of the page that opens an image."""
    with httpx.Client(base_url=url, timeout=30) as client:
        events = client.get("/config").json()["dependencies"]
        function = next(event["id"] for event in events if event["api_name"] == "show")
        body = {"data": data, "fn_index": function, "session_hash": "client", "trigger_id": None}
        joined = client.post("/gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            return joined.text
        return client.get("/gradio_api/queue/data", params={"session_hash": "client"}).text


def test_no_client_reaches_a_file_or_a_private_address(url, served, httpserver_url, tmp_path, picture):
    picture(6).rename(tmp_path / "secret.png")
    address = f"{httpserver_url(tmp_path)}/secret.png"
    names = ["/etc/passwd", str(tmp_path / "secret.png"), "app.py", address, address.replace("127.0.0.1", "localhost")]
    shown = json.loads(call(url, [None, None, 1, 144]).rpartition("data: {")[0].rpartition("data: ")[2])
    assert shown["success"]
    for name in names:
        for payload in ({"path": name}, {"path": name, "url": name}, {"url": name}, {"path": name, "is_stream": True}):
            for meta in ({}, {"meta": {"_type": "gradio.FileData"}}):
                answer = call(url, [None, {**payload, **meta}, 1, 144])
                assert '"success":false' in answer.replace(" ", "") and "data:image" not in answer, (payload, meta)
        for route in ("file", "proxy"):
            assert httpx.get(f"{url}gradio_api/{route}={name}").status_code >= 400, (route, name)
    for budget in (5, "4", None, 145):
        assert '"success":false' in call(url, [None, None, budget, 144]).replace(" ", "")


def test_the_space_runs_alone_as_it_was_pushed(visit, checkpoint, tmp_path):
    hub = LoopbackHub(tmp_path / "home")
    model = Repository("org/model", private=False)
    hub.repositories[model.id] = model
    commit = model.commit("main", {f.name: File(f.read_bytes()) for f in checkpoint.iterdir() if f.is_file()}, "model")
    folder = tmp_path / "space"
    for name, content in space_files(model.id, commit.sha).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    # Without `site`, which makes an editable installation of the package known
    environment = {**os.environ, **hub.environment, "PYTHONPATH": os.path.dirname(os.path.dirname(torch.__file__))}
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "-S", "-u", "app.py"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", Path(log.name).read_text())):
            assert process.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.2)
        page = visit(address=found[0])
        page.get_by_role("button", name="Ask both").click()
        assert all(answers(page))
    finally:
        process.terminate()
        process.wait()
        log.close()
        hub.close()
    assert f"GET /{model.id}/resolve/{commit.sha}/model.safetensors" in hub.requests
