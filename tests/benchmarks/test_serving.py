"""The serving benchmark asks as many clients at a time as it says, counts tokens, and prints what it measured."""

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor

from delta_llava.benchmarks import serving
from delta_llava.benchmarks.serving import Contestant, Request
from delta_llava.processing_delta_llava import open_image
from delta_llava.serving.feature_cache import FeatureCache


TINY = serving.SIZES["tiny"]
REQUEST = Request(text_tokens=5, new_tokens=3)


@asynccontextmanager
async def engine(concurrency, answer_tokens=3, error=None):
    """An engine that answers when `concurrency` requests wait; yields its address and the requests that it got."""
    requests, waiting = [], asyncio.Barrier(concurrency)

    async def answer(http_request):
        requests.append(await http_request.json())
        await waiting.wait()
        if error:
            return web.json_response({"error": {"message": error}}, status=400)
        response = web.StreamResponse()
        await response.prepare(http_request)
        usage = {"prompt_tokens": 36 + 5, "completion_tokens": answer_tokens}
        chunks = [{"choices": [{}]}] * 3 + [{"choices": [], "usage": usage}]
        for chunk in [*map(json.dumps, chunks), "[DONE]"]:
            await response.write(f"data: {chunk}\n\n".encode())
        return response

    application = web.Application(client_max_size=2**26)
    application.router.add_post("/v1/chat/completions", answer)
    async with TestServer(application) as server:
        yield str(server.make_url("")).rstrip("/"), requests


def loaded(concurrency, num_requests, **options):
    """What [`serving.load`] measures of such an engine, and the requests."""
    progress = tqdm(disable=True)

    async def run():
        async with engine(concurrency, **options) as (address, requests):
            contestant = Contestant("Delta-LLaVA", 36, address)
            bodies = [
                serving.make_body(contestant, REQUEST, picture, seed)
                for seed, picture in enumerate(serving.Photographs().take(num_requests))
            ]
            return await asyncio.wait_for(
                serving.load(contestant, bodies, concurrency, REQUEST, progress), timeout=60
            ), requests

    return asyncio.run(run())


def test_as_many_requests_as_asked_are_under_way_and_no_two_have_a_picture_or_a_text_in_common():
    turn, requests = loaded(concurrency=3, num_requests=21)
    assert len(turn["first_token"]) == 21 and 0 < max(turn["first_token"]) < turn["seconds"]
    contents = [request["messages"][0]["content"] for request in requests]
    pictures = {open_image(image["image_url"]["url"]).tobytes() for image, _ in contents}
    texts = {text["text"] for _, text in contents}
    assert len(pictures) == len(texts) == 21
    for request in requests:
        assert request["mm_processor_kwargs"] == {"num_visual_tokens": 36}
        assert (request["max_tokens"], request["ignore_eos"], request["stream"]) == (3, True, True)


def test_an_answer_that_is_not_what_was_asked_for_ends_the_measurement():
    with pytest.raises(RuntimeError, match=r"at 36 visual tokens counted \(41, 2\) tokens .*not \(41, 3\)"):
        loaded(concurrency=2, num_requests=2, answer_tokens=2)
    with pytest.raises(RuntimeError, match=r"Delta-LLaVA answered 400: .*no such budget"):
        loaded(concurrency=1, num_requests=1, error="no such budget")


def test_both_models_read_the_same_prompt(tmp_path):
    folders = serving.save_models(TINY, [144, 36], tmp_path)
    picture = open_image(serving.Photographs().take(1)[0])
    body = json.loads(serving.make_body(Contestant(serving.BASELINE, 144, ""), REQUEST, "", seed=1))
    (_, text) = body["messages"][0]["content"]
    assert "mm_processor_kwargs" not in body
    prompts = {}
    for name, folder in folders.items():
        config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert config.architectures[0] in ("LlavaForConditionalGeneration", "DeltaLlavaForConditionalGeneration")
        chat = [{"role": "user", "content": [{"type": "image"}, text]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        options = {} if name == serving.BASELINE else {"num_visual_tokens": 144}
        prompts[name] = processor(images=[picture], text=[prompt], return_tensors="pt", **options)
    llava, ours = prompts.values()
    assert llava["input_ids"].tolist() == ours["input_ids"].tolist()
    assert torch.equal(llava["pixel_values"], ours["pixel_values"])
    assert llava["input_ids"].shape == (1, 144 + 5) and (llava["input_ids"] == 319).sum() == 144


def test_contestants_take_turns_and_the_report_is_there_after_each_round(tmp_path, monkeypatch):
    turns, file = [], tmp_path / "serving.json"

    async def load(contestant, bodies, concurrency, request, progress):
        contents = [json.loads(body)["messages"][0]["content"] for body in bodies]
        written = json.loads(file.read_text()) if file.exists() else {"load": [{"rounds": []}]}
        salts = {json.loads(body).get("cache_salt") for body in bodies}
        turns.append((contestant.num_visual_tokens, concurrency, salts, len(written["load"][0]["rounds"])))
        pictures.append([image["image_url"]["url"] for image, _ in contents])
        return {"seconds": 2.0, "first_token": [0.5] * len(bodies)}

    pictures = []
    monkeypatch.setattr(serving, "load", load)
    contestants = [Contestant(serving.BASELINE, 144, ""), Contestant("Delta-LLaVA", 36, "")]
    report = {"rounds": 2}
    serving.measure(contestants, [1, 8], REQUEST, report, file)
    questions = [(1, {None}), (1, {"another"}), (1, {None})]
    in_a_round = [(budget, clients, {None}) for clients in (1, 8) for budget in (144, 36)]
    in_a_round += [(budget, *question) for budget in (144, 36) for question in questions]
    warm_up = [(144, 2, {None}, 0), (36, 2, {None}, 0)]
    assert turns == warm_up + [(*turn, written) for written in (0, 1) for turn in in_a_round]
    assert json.loads(file.read_text()) == report
    assert all(len(row["rounds"]) == 2 for row in report["load"] + report["questions"])
    # A photograph is asked about again, by one contestant alone
    assert pictures[6] == pictures[7] == pictures[8] != pictures[9] == pictures[10]
    new = [picture for number, turn in enumerate(pictures) if turn not in pictures[:number] for picture in turn]
    assert len(set(new)) == len(new) == 2 * 2 + 2 * 2 * (8 + 16 + serving.PHOTOGRAPHS_ASKED_AGAIN)


def test_tables_have_the_medians_of_rounds_and_of_their_ratios(cells):
    def row(first_token, slowness=(1, 3, 2), **label):
        rounds = [{"seconds": 10 * slow, "first_token": [slow * first for first in first_token]} for slow in slowness]
        return {**label, "rounds": rounds}

    report = {"size": "small", "device": "cpu", "dtype": "float32", "vllm": "0.32.0", "torch": "2", "threads": 1}
    report |= {"text_tokens": 68, "new_tokens": 8, "rounds": 3}
    label = {"model": "Delta-LLaVA", "num_visual_tokens": 36}
    report["load"] = [
        row([0.1 * place for place in range(41)], concurrency=16, model=serving.BASELINE, num_visual_tokens=576),
        row([0.5] * 82, slowness=(1, 2, 1), concurrency=16, **label),
    ]
    report["questions"] = [
        row([first] * 4, engine=engine, question=name, **label)
        for engine, firsts in {"vLLM": (0.4, 0.1, 0.05), "transformers": (0.2, 0.02)}.items()
        for name, first in zip(serving.QUESTIONS, firsts, strict=False)
    ]
    assert cells(serving.table(report)) == [
        ["16", "LLaVA-1.5", "576", "2.05", "1.00", "4000", "1.00", "7600", "1.00"],
        ["16", "Delta-LLaVA", "36", "8.2", "3.00", "500", "0.17", "500", "0.09"],
    ]
    assert cells(serving.questions_table(report)) == [
        ["vLLM", "Delta-LLaVA", "36", "800", "200", "0.25", "100", "0.12"],
        ["transformers", "Delta-LLaVA", "36", "400", "40", "0.10", "", ""],
    ]


def test_another_question_about_an_image_finds_its_features(monkeypatch):
    caches = []
    monkeypatch.setattr(serving, "FeatureCache", lambda: caches.append(FeatureCache()) or caches[0])
    rows = serving.measure_feature_cache(TINY, [36, 1], REQUEST, 2, torch.device("cpu"), torch.float32)
    assert [(row["num_visual_tokens"], row["question"]) for row in rows] == [
        (budget, name) for budget in (36, 1) for name in list(serving.QUESTIONS)[:2]
    ]
    asked = 2 * (1 + 2) * serving.PHOTOGRAPHS_ASKED_AGAIN
    assert (caches[0].hits, caches[0].misses) == (asked, asked)
    assert all(len(turn["first_token"]) == serving.PHOTOGRAPHS_ASKED_AGAIN for row in rows for turn in row["rounds"])


@pytest.mark.vllm
def test_the_engine_serves_every_contestant(tmp_path, capsys, cells):
    pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
    arguments = ["--size", "tiny", "--budgets", "144", "36", "1", "--concurrency", "1", "4", "--rounds", "1"]
    serving.main([*arguments, "--output", str(tmp_path / "serving.json")])
    report = json.loads((tmp_path / "serving.json").read_text())
    assert [row["num_visual_tokens"] for row in report["load"]] == [144, 144, 36, 1] * 2
    printed = cells(capsys.readouterr().out)
    assert len(printed) == 8 + 4 + 3 and all(float(cell) > 0 for row in printed[:8] for cell in row[3:])
