"""A push publishes a whole checkpoint in one step, whatever happens meanwhile, and nothing else of its folder."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi, get_session, hf_hub_download, parse_eval_result_entries
from huggingface_hub.errors import RepositoryNotFoundError
from loopback_hub import RETRY_AFTER
from safetensors.torch import load, load_file, save_file

from delta_llava import DeltaLlavaProcessor
from delta_llava.hub import client
from delta_llava.hub import push as module
from delta_llava.hub.parts import write_sources
from delta_llava.hub.push import main, prepare, push
from delta_llava.hub.push_family import main as push_family
from delta_llava.hub.verify import verify
from delta_llava.results import MEASUREMENT, write_results
from delta_llava.weights import weight_digests


REPO = "org/delta-llava-7b"
CODE = {"configuration_delta_llava.py", "modeling_delta_llava.py", "processing_delta_llava.py"}
FILES = CODE | {
    ".eval_results/delta-llava.yaml",
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "training/finetune.json",
    "training/finetune.png",
    "training/finetune.yaml",
    "training/sources.yaml",
    "results/tokens-36.json",
}
RESULT = {**dict.fromkeys(MEASUREMENT, "gqa"), "unit": "percent", "value": 61.25, "num_samples": 12578}


def evaluate(folder, budget=36):
    file = folder / f"results/tokens-{budget}.json"
    write_results(file, budget, "lmms-eval 0.7.3", None, weight_digests(folder), [RESULT])


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, noise, tmp_path):
    """`checkpoint(name)`: a checkpoint as training leaves it, among files that must never be published."""

    def make(name="checkpoint", **overrides):
        folder = tmp_path / name
        tiny_model(**{"projector_variant": "residual", "visual_token_budgets": [4, 36], **overrides}).save_pretrained(
            folder
        )
        tiny_processor(num_visual_tokens=overrides.get("num_visual_tokens", 36)).save_pretrained(folder)
        write_sources(folder, vision_tower="openai/clip-vit-large-patch14-336", language_model="lmsys/vicuna-7b-v1.5")
        recipe = {"json_path": "llava_v1_5_mix665k.json", "learning_rate": 0.01, "per_device_train_batch_size": 2}
        (folder / "training/finetune.yaml").write_text(yaml.safe_dump(recipe))
        history = [
            {"step": 1, "loss": 2.0, "learning_rate": 0.01},
            {"step": 1, "train_runtime": 7.0, "train_loss": 2.0},
        ]
        log = {"num_rows": 12, "num_processes": 1, "batch_size": 2, "versions": {"torch": "2.13.0"}}
        (folder / "training/finetune.json").write_text(json.dumps({**log, "log_history": history}))
        noise(1)[0].save(folder / "training/finetune.png")
        evaluate(folder, overrides.get("num_visual_tokens", 36))
        (folder / "checkpoint-1").mkdir(exist_ok=True)
        never = (
            ".env",
            "optimizer.pt",
            "training_args.bin",
            "checkpoint-1/model.safetensors",
            "run.log",
            "training/x.pt",
            "training/.wandb.json",
            "results/notes.json",
        )
        for name in never:
            (folder / name).write_text("never sent")
        return folder

    return make


def publish(folder, repo_id=REPO, revision=None, **options):
    return push(prepare(folder, repo_id, revision), **options)


@pytest.fixture
def unverified(monkeypatch):
    """Without the look from outside, which takes a process of its own; what was looked at."""
    seen = []
    monkeypatch.setattr(module, "verify", lambda *arguments: seen.append(arguments))
    return seen


def visible(hub):
    """What readers see of the repository: files by branch."""
    if REPO not in hub.repositories:
        return {}
    branches = {name: hub.files(REPO, name) for name in hub.refs(REPO) if not name.endswith(".incoming")}
    for files in branches.values():
        files.pop(".gitattributes")
    return branches


def default_budgets(files):
    return [json.loads(files[name])["num_visual_tokens"] for name in ("config.json", "processor_config.json")]


def test_a_push_is_one_verified_commit_of_all_that_belongs_to_a_checkpoint(loopback_hub, checkpoint, tmp_path, capfd):
    folder = checkpoint()
    main(["--checkpoint", str(folder), "--repo_id", REPO, "--private"])
    with pytest.raises(RepositoryNotFoundError):  # private from the first commit on
        HfApi(token=False).model_info(REPO)
    (files,) = visible(loopback_hub).values()
    assert files.keys() == FILES
    generated = {"README.md", ".eval_results/delta-llava.yaml"}
    assert all(files[name] == (folder / name).read_bytes() for name in FILES - generated)
    assert not any(b"never sent" in content or str(tmp_path).encode() in content for content in files.values())
    commit, _first = loopback_hub.log(REPO)
    output = capfd.readouterr()
    assert f'from_pretrained("{REPO}", revision="{commit}", trust_remote_code=True)' in output.out
    beside = ".env, checkpoint-1, optimizer.pt, results/notes.json, run.log, training/.wandb.json, training/x.pt"
    assert f"never sent: {beside}, training_args.bin" in output.out
    assert re.search(rf"Verified {REPO} at {commit}: \d+ tensors .* with 36 visual tokens", output.out)
    assert loopback_hub.environment["HF_TOKEN"] not in output.out + output.err

    card = files["README.md"].decode()
    assert (
        "base_model:\n- openai/clip-vit-large-patch14-336\n- lmsys/vicuna-7b-v1.5" in card and "license: llama2" in card
    )
    assert f'"{REPO}"' in card and "61.25" in card
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/delta-llava.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value, entry.source_name) == ("gqa", "gqa", 61.25, "lmms-eval 0.7.3")
    assert entry.source_url.endswith(f"{REPO}/blob/main/results/tokens-36.json")

    loopback_hub.requests.clear()
    main(["--checkpoint", str(folder), "--repo_id", REPO])
    assert all(request.startswith("GET") for request in loopback_hub.requests)
    assert loopback_hub.log(REPO)[0] == commit
    output = capfd.readouterr().out
    assert f"0 of {len(FILES)} files are to be sent" in output
    assert f"{commit} has been verified before" in output


def test_a_dry_run_prints_all_and_writes_nothing(loopback_hub, checkpoint, unverified, capfd, monkeypatch):
    folder = checkpoint()
    main(["--checkpoint", str(folder), "--repo_id", REPO, "--dry_run"])
    output = capfd.readouterr().out
    assert set(re.findall(r"^send +(\S+) +[\d,]+ bytes$", output, flags=re.MULTILINE)) == FILES
    assert "pipeline_tag: image-text-to-text" in output
    publish(folder, REPO)
    (folder / "generation_config.json").write_text("{}")
    capfd.readouterr()
    loopback_hub.requests.clear()
    main(["--checkpoint", str(folder), "--repo_id", REPO, "--dry_run"])
    assert re.findall(r"^send +(\S+)", capfd.readouterr().out, flags=re.MULTILINE) == ["generation_config.json"]
    assert all(request.startswith("GET") for request in loopback_hub.requests)

    loopback_hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    main(["--checkpoint", str(folder), "--repo_id", REPO, "--dry_run"])
    assert set(re.findall(r"^send +(\S+)", capfd.readouterr().out, flags=re.MULTILINE)) == FILES
    assert not loopback_hub.requests


def test_a_branch_of_a_budget_is_one_commit_off_main_with_another_default_and_card(
    loopback_hub, checkpoint, unverified
):
    folder = checkpoint()
    assert publish(folder, REPO) == publish(folder, REPO, revision="main")
    commit = publish(folder, REPO, revision="tokens-4")
    main_files, branch_files = (visible(loopback_hub)[branch] for branch in ("main", "tokens-4"))
    changed = {name for name in FILES if main_files[name] != branch_files.get(name)}
    # Nothing was evaluated at 4 tokens
    assert changed == {"config.json", "processor_config.json", "README.md", ".eval_results/delta-llava.yaml"}
    assert branch_files.keys() == FILES - {".eval_results/delta-llava.yaml"}
    assert default_budgets(main_files) == [36, 36] and default_budgets(branch_files) == [4, 4]
    assert 'revision="tokens-4"' in branch_files["README.md"].decode()
    assert loopback_hub.log(REPO, "tokens-4") == [commit, *loopback_hub.log(REPO)]
    assert set(loopback_hub.refs(REPO)) == {"main", "tokens-4"}
    assert unverified[-1] == (folder, REPO, commit, 4, None)
    assert publish(folder, REPO, revision="tokens-4") == commit
    with pytest.raises(ValueError, match=r"Branch tokens-16 is for 16 visual tokens.*trained for \[4, 36\]"):
        publish(folder, REPO, revision="tokens-16")


def test_files_of_an_earlier_push_go_and_those_of_others_stay(loopback_hub, checkpoint, unverified):
    folder = checkpoint()
    weights = load_file(folder / "model.safetensors")
    names, half = sorted(weights), len(weights) // 2
    (folder / "model.safetensors").rename(folder / "whole")
    shards = {f"model-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate((names[:half], names[half:]))}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    evaluate(folder)
    publish(folder, REPO)
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="assets/picture.png", repo_id=REPO)
    for name in (*shards, "model.safetensors.index.json"):
        (folder / name).unlink()
    (folder / "whole").rename(folder / "model.safetensors")
    evaluate(folder)
    publish(folder, REPO)
    assert visible(loopback_hub)["main"].keys() == FILES | {"assets/picture.png"}


@pytest.mark.parametrize("how", ["reset", "reset_after", 500])
@pytest.mark.parametrize("scene", ["first push", "next push", "new branch", "next push to a branch"])
def test_interrupted_at_any_request_readers_see_the_old_or_the_new_state_and_the_next_run_finishes(
    loopback_hub, checkpoint, unverified, naps, scene, how
):
    earlier, later = checkpoint("earlier"), checkpoint("later")
    (later / "training/finetune.yaml").write_text("json_path: llava_v1_5_mix665k.json\nseed: 1\n")
    set_weight(later, 1.0)
    before = {
        "first push": [],
        "next push": [prepare(earlier, REPO)],
        "new branch": [prepare(later, REPO)],
        "next push to a branch": [prepare(earlier, REPO), prepare(earlier, REPO, "tokens-4")],
    }[scene]
    prepared = prepare(later, REPO, "tokens-4" if "branch" in scene else None)

    def begin():
        loopback_hub.repositories.clear()
        for state in before:
            push(state)
        loopback_hub.requests.clear()
        return visible(loopback_hub)

    for _ in range(2):  # the first fills the cache
        begin()
        push(prepared)
    new, num_requests = visible(loopback_hub), len(loopback_hub.requests)
    interrupted = 0
    for number in range(1, num_requests + 1):
        old = begin()
        # All later requests fail too, as if the machine were gone: the client's retries do not help
        loopback_hub.fail(at=number, how=how, times=1 if how == "reset_after" else 100)
        try:
            push(prepared)
        except OSError:
            interrupted += 1
        loopback_hub.recover()
        state = visible(loopback_hub)
        if scene == "first push" and state not in ({}, new):
            assert state == {"main": {}}, number
        else:
            assert state in (old, new), number
        push(prepared)
        assert visible(loopback_hub) == new, number
        assert not any(name.endswith(".incoming") for name in loopback_hub.refs(REPO))
    assert interrupted == num_requests or how == "reset_after"


def set_weight(folder, value, **notes):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt", **notes})
    evaluate(folder)


@pytest.mark.parametrize("how", [401, 403, 404, 409, 412, 429, 500, "reset", "stall"])
def test_a_refused_push_says_so_and_how_to_go_on(loopback_hub, checkpoint, unverified, naps, monkeypatch, how):
    monkeypatch.setattr(client, "MAX_SILENCE", 0.2)
    folder = checkpoint()
    publish(folder, REPO)
    before = visible(loopback_hub)
    (folder / "generation_config.json").write_text("{}")
    loopback_hub.requests.clear()
    publish(folder, REPO, dry_run=True)
    loopback_hub.fail(at=len(loopback_hub.requests) + 1, how=how, times=100)
    with pytest.raises(SystemExit) as error:
        main(["--checkpoint", str(folder), "--repo_id", REPO])
    assert ("hf auth login" if how in (401, 403) else "Run the same command again to go on.") in str(error.value)
    assert how in ("reset", "stall") or str(how) in str(error.value)
    assert get_session().timeout.read is None  # so that the limit is ours alone
    if how == 429:
        assert RETRY_AFTER + 1 in naps
    loopback_hub.recover()
    assert visible(loopback_hub) == before


ANSWERS = [b"<html>Log in here</html>", b"", b'{"branches": [', b"[]", b'{"error": "try later"}', b"null", b"\xff\xfe"]


def test_an_answer_that_makes_no_sense_is_reported_as_such(loopback_hub, checkpoint, unverified, naps):
    folder = checkpoint()
    publish(folder)
    (folder / "generation_config.json").write_text("{}")
    prepared = prepare(folder, REPO)
    before, reported = visible(loopback_hub), 0
    for content in ANSWERS:
        loopback_hub.fail(at=1, how=content, times=100)
        with pytest.raises(OSError, match=rf"(?s)What {loopback_hub.url} answered cannot be understood .*HF_ENDPOINT"):
            push(prepared)
        loopback_hub.recover()
        assert visible(loopback_hub) == before
    loopback_hub.repositories.clear()
    loopback_hub.requests.clear()
    push(prepared)
    new, num_requests = visible(loopback_hub), len(loopback_hub.requests)
    # At any request: either it does not matter what was answered, or an error says so, and the next push ends well
    for number in range(1, num_requests + 1):
        for content in ANSWERS[:5:2]:
            loopback_hub.repositories.clear()
            loopback_hub.fail(at=number, how=content)
            try:
                push(prepared)
            except OSError:
                reported += 1
            loopback_hub.recover()
            push(prepared)
            assert visible(loopback_hub) == new, (number, content)
    assert reported > num_requests


def test_a_hub_that_falls_silent_after_the_push_ends_the_verification(
    loopback_hub, checkpoint, unverified, naps, monkeypatch
):
    folder = checkpoint()
    commit = publish(folder)
    monkeypatch.setattr(client, "MAX_SILENCE", 0.05)
    for number in (1, 3):
        loopback_hub.fail(at=number, how="stall", times=1000)
        with pytest.raises(OSError, match="Run the same command again to go on"):
            verify(folder, REPO, commit)
        loopback_hub.recover()


def test_data_of_one_s_own_is_described_in_words_and_data_of_the_hub_is_there(loopback_hub, checkpoint, unverified):
    folder = checkpoint()
    loopback_hub.datasets.add("org/data")
    with pytest.raises(ValueError, match=r"datasets=\['org/typo'\] cannot be found on the Hub: .* in words"):
        push(prepare(folder, REPO, datasets=["org/data", "org/typo"]))
    for recipe in ({"stream": "shards/train"}, {"json_path": "shards/train"}):  # folders, by names of repositories
        (folder / "training/finetune.yaml").write_text(yaml.safe_dump(recipe))
        with pytest.raises(ValueError, match=r"datasets=\['shards/train'\] cannot be found on the Hub"):
            push(prepare(folder, REPO))
    towers = ["org/tower", "lmsys/vicuna-7b-v1.5"]
    with pytest.raises(ValueError, match=r"models=\['org/tower', .* cannot be found on the Hub: correct the name\."):
        push(prepare(folder, REPO, datasets=["org/data"], base_model=towers))
    assert not loopback_hub.repositories
    push(prepare(folder, REPO, datasets=["org/data", "Our own drawings."]))
    card = visible(loopback_hub)["main"]["README.md"].decode()
    assert "datasets:\n- org/data\n" in card and "Our own drawings." in card


def test_a_push_does_not_overwrite_what_somebody_else_has_pushed_meanwhile(
    loopback_hub, checkpoint, unverified, monkeypatch
):
    folder = checkpoint()
    publish(folder, REPO)
    (folder / "generation_config.json").write_text("{}")

    def meanwhile(api, repo_id, commit, additions, compare=module._changes):
        changes = compare(api, repo_id, commit, additions)
        api.upload_file(path_or_fileobj=b"theirs", path_in_repo="generation_config.json", repo_id=REPO)
        return changes

    monkeypatch.setattr(module, "_changes", meanwhile)
    with pytest.raises(OSError, match="412"):
        publish(folder, REPO)
    assert visible(loopback_hub)["main"]["generation_config.json"] == b"theirs"


def test_a_public_repository_is_not_taken_for_a_private_one(loopback_hub, checkpoint, unverified):
    folder = checkpoint()
    publish(folder)
    loopback_hub.requests.clear()
    with pytest.raises(ValueError, match=f"{REPO} is public"):
        publish(folder, private=True)
    assert all(request.startswith("GET") for request in loopback_hub.requests)


def test_an_error_of_xet_is_explained_like_any_other(loopback_hub, checkpoint, unverified, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)

    def upload(*arguments, **options):
        raise RuntimeError("the store is full")

    monkeypatch.setattr("huggingface_hub.hf_api._upload_xet_files", upload, raising=False)
    monkeypatch.setattr("huggingface_hub._commit_api._upload_xet_files", upload)
    with pytest.raises(OSError, match=r"(?s)RuntimeError: .*Run the same command again to go on"):
        publish(checkpoint())


def test_a_repository_of_another_model_is_not_replaced(loopback_hub, checkpoint, unverified):
    HfApi().create_repo(REPO)
    HfApi().upload_file(path_or_fileobj=b'{"model_type": "llama"}', path_in_repo="config.json", repo_id=REPO)
    before = visible(loopback_hub)
    with pytest.raises(ValueError, match=f"{REPO} holds a model of type llama"):
        publish(checkpoint())
    assert visible(loopback_hub) == before


def test_a_branch_alone_and_edited_code_are_reported(loopback_hub, checkpoint, unverified, capsys):
    folder = checkpoint()
    with open(folder / "modeling_delta_llava.py", "a") as file:
        file.write("# mine\n")
    publish(folder, revision="tokens-4")
    output = capsys.readouterr().out
    assert f"main of {REPO} does not hold this checkpoint: push without --revision too." in output
    assert "modeling_delta_llava.py differs from that of this package" in output


def test_what_is_verified_is_what_a_stranger_loads(loopback_hub, checkpoint, unverified, capfd):
    """With files of others beside it and at a branch's budget, but never with the help of the installed package."""
    folder = checkpoint()
    publish(folder)
    HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="q.safetensors", repo_id=REPO)
    verify(folder, REPO, publish(folder, revision="tokens-4"), num_visual_tokens=4)
    assert re.search(f"Verified {REPO} at .* with 4 visual tokens", capfd.readouterr().out)
    code = folder / "modeling_delta_llava.py"
    relative = "from .configuration_delta_llava import"
    code.write_text(code.read_text().replace(relative, relative.replace(" .", " delta_llava.")))
    with pytest.raises(RuntimeError, match="could not be verified"):
        verify(folder, REPO, publish(folder))
    assert "import of delta_llava halted" in capfd.readouterr().err


def test_what_could_not_be_verified_is_verified_again(loopback_hub, checkpoint, monkeypatch):
    """Though a second push finds nothing to send."""
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise RuntimeError("it does not load")

    monkeypatch.setattr(module, "verify", fail)
    prepared = prepare(checkpoint(), REPO)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it does not load"):
            push(prepared)
    assert len(calls) == 2 and calls[0] == calls[1]


def test_verification_names_what_differs(loopback_hub, checkpoint, unverified):
    folder = checkpoint()
    commit = publish(folder, REPO)
    value = float(load(visible(loopback_hub)["main"]["model.safetensors"])["lm_head.weight"][0, 0])
    set_weight(folder, 3.0)
    with pytest.raises(RuntimeError, match=f"{REPO} at {commit}: 1 of .* tensors differ: lm_head.weight"):
        verify(folder, REPO, commit)
    set_weight(folder, value)
    with pytest.raises(RuntimeError, match=f"{REPO} at {commit} answers {{'num_visual_tokens': 36"):
        verify(folder, REPO, commit, num_visual_tokens=4)


def test_a_new_commit_is_not_served_from_a_stale_cache_and_a_pinned_one_stays(
    loopback_hub, checkpoint, unverified, in_fresh_process
):
    folder = checkpoint()
    code = folder / "modeling_delta_llava.py"
    value = float(load_file(folder / "model.safetensors")["lm_head.weight"][0, 0])

    def loaded(*revisions):
        """Mark and weight of each revision, loaded in a new process with the cache of the earlier ones."""
        return in_fresh_process(
            f"""
from transformers import AutoModelForImageTextToText
found = []
for revision in {revisions!r}:
    model = AutoModelForImageTextToText.from_pretrained({REPO!r}, revision=revision, trust_remote_code=True)
    found.append((getattr(type(model), "mark", None), float(model.lm_head.weight[0, 0])))
print(found)
""",
            **{"HF_HUB_OFFLINE": "0", **loopback_hub.environment},
        )

    old = publish(folder, REPO)
    assert loaded(None) == str([(None, value)])
    start = r"(class DeltaLlavaForConditionalGeneration\(.*?:\n)"
    code.write_text(re.sub(start, r'\1    mark = "new"\n', code.read_text(), count=1))
    set_weight(folder, 2.0)
    new = publish(folder, REPO)
    assert loaded(None, old, new) == str([("new", 2.0), (None, value), ("new", 2.0)])


def test_a_pipeline_answers_from_a_repository_at_each_branch_s_budget_and_then_offline(
    loopback_hub, checkpoint, unverified, noise, tmp_path, in_fresh_process
):
    folder = checkpoint()
    for revision in (None, "tokens-4"):
        publish(folder, REPO, revision)
    noise(1)[0].save(tmp_path / "image.png")
    code = f"""
from transformers import pipeline
budgets = []
for revision in (None, "tokens-4"):
    pipe = pipeline("image-text-to-text", model={REPO!r}, revision=revision, trust_remote_code=True)
    pipe.model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: budgets.append(args[2]))
    chat = [dict(role="user", content=[dict(type="image", url="image.png"), dict(type="text", text="What is it?")])]
    assert pipe(text=chat, generate_kwargs=dict(max_new_tokens=2))
print(budgets)
"""
    assert in_fresh_process(code, **{"HF_HUB_OFFLINE": "0", **loopback_hub.environment}) == "[36, 4]"
    num_requests = len(loopback_hub.requests)
    assert in_fresh_process(code, **loopback_hub.environment) == "[36, 4]"
    assert len(loopback_hub.requests) == num_requests


def break_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def move_weights(folder, name):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / name.strip("/"))
    index = {"weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def misshape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(2, 2)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja is not there"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds neither"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "holds both"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge_adapter"),
        (lambda folder: break_config(folder, auto_map={}), "auto_map of .* must be"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text(
                '{"auto_map": {"AutoTokenizer": ["a/b--c.D"]}}'
            ),
            "takes code from another repository",
        ),
        (lambda folder: break_config(folder, num_visual_tokens=True), r"config\.json: .*num_visual_tokens.*got bool"),
        (lambda folder: break_config(folder, num_visual_tokens=4), "num_visual_tokens is 4 in the config, 36"),
        (
            lambda folder: DeltaLlavaProcessor.from_pretrained(folder, visual_token_budgets=[36]).save_pretrained(
                folder
            ),
            r"visual_token_budgets is \[4, 36\] in the config, \[36\] in the processor",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
            "model.safetensors cannot be read: ",
        ),
        (lambda folder: break_config(folder, transformers_weights="other.safetensors"), "transformers_weights in"),
        (lambda folder: move_weights(folder, "other.safetensors"), r"has weights in \['other\.safetensors'\]"),
        (lambda folder: move_weights(folder, "/model-1-of-1.safetensors"), "places weights in '/model-"),
        (lambda folder: set_weight(folder, 1, note="hf_" + "a" * 34), r"model\.safetensors holds what looks like"),
        (
            lambda folder: (folder / "training/finetune.yaml").write_text("stream: org/x\nkey: hf_loopback"),
            r"training/finetune\.yaml holds what looks like an access token",
        ),
        (misshape, r"mismatched keys: .*lm_head\.weight"),
        (lambda folder: break_config(folder, projector_variant="paper"), "missing keys: .*multi_modal_projector"),
        (lambda folder: (folder / "training/sources.yaml").write_text("language_model: mine"), "base_model"),
    ],
)
def test_what_would_not_serve_others_is_refused_before_anything_is_sent(
    loopback_hub, checkpoint, unverified, damage, message
):
    folder = checkpoint()
    damage(folder)
    with pytest.raises(ValueError, match=message):
        publish(folder, REPO)
    assert not loopback_hub.requests


def link(folder, name, target):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)


def link_folder(folder, name):
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: link(folder, "training/pretrain.png", folder.parent / "secret"),
        lambda folder: link(folder, "training/finetune.png", "../../secret"),
        lambda folder: link(folder, "results/tokens-4.json", "../.env"),
        lambda folder: link(folder, "training/pretrain.yaml", "nowhere"),
        lambda folder: link(folder, "added_tokens.json", folder.parent / "secret"),
        lambda folder: [link(folder.parent, "chain", "secret"), link(folder, "config.json", "../chain")],
        lambda folder: link(folder, "model.safetensors", "checkpoint-1/model.safetensors"),
        lambda folder: link_folder(folder, "training"),
        lambda folder: link_folder(folder, "results"),
        lambda folder: os.mkfifo(folder / "training/pretrain.json"),
        lambda folder: (folder / "training/pretrain.yaml").mkdir(),
    ],
)
def test_nothing_but_the_folder_s_own_files_is_read(loopback_hub, checkpoint, unverified, damage, tmp_path):
    folder = checkpoint()
    (tmp_path / "secret").write_text("secret")
    damage(folder)
    with pytest.raises(ValueError, match=r"is a link to .*: replace it|is not a file: remove it"):
        publish(folder)
    assert not loopback_hub.requests


def test_what_is_sent_is_what_was_checked(loopback_hub, checkpoint, unverified, tmp_path):
    folder = checkpoint()
    (folder / "training/finetune_notes.json").write_text("{}")  # of no recipe
    prepared = prepare(folder, REPO)
    log = (folder / "training/finetune.json").read_bytes()
    (tmp_path / "secret").write_text("secret")
    link(folder, "training/finetune.json", tmp_path / "secret")
    push(prepared)
    (files,) = visible(loopback_hub).values()
    assert files.keys() == FILES and files["training/finetune.json"] == log


def test_a_page_in_place_of_a_file_is_not_taken_again(loopback_hub, checkpoint, unverified, naps):
    folder = checkpoint()
    commit = publish(folder)
    cached = Path(hf_hub_download(REPO, "config.json", revision=commit))
    cached.write_text("<html>")
    break_config(folder, visual_token_budgets=[1, 4, 36])
    assert publish(folder) != commit


def test_links_that_no_push_reads_are_no_reason_to_refuse(checkpoint, tmp_path):
    folder = checkpoint()
    link(folder, "latest", "checkpoint-1")
    link(folder, "train.log", tmp_path / "log")
    (tmp_path / "named").symlink_to(folder)
    assert prepare(tmp_path / "named", REPO).files.keys() == FILES


@pytest.mark.parametrize(
    "branch",
    [
        *("tokens-036", "tokens-0", "tokens--1", "Tokens-36", "tokens-36 ", "tokens-\uff13\uff16", "tokens_36", "36"),
        *("token-36", "tokens-36.incoming", "dev.incoming", "tokens-36/x", "Main"),
    ],
)
def test_a_branch_that_resembles_a_budget_s_and_a_repository_without_owner_are_refused(tmp_path, branch):
    with pytest.raises(ValueError, match=r"revision=.* must be main, tokens-N"):
        prepare(tmp_path, REPO, branch)
    with pytest.raises(ValueError, match="repo_id=mine must be ORG/NAME"):
        prepare(tmp_path, "mine")


def test_weights_that_are_not_finite_are_refused_by_name(loopback_hub, checkpoint, unverified):
    folder = checkpoint()
    commit = publish(folder)
    loopback_hub.requests.clear()
    set_weight(folder, float("nan"))
    for refuse in (lambda: publish(folder), lambda: verify(folder, REPO, commit)):
        with pytest.raises(ValueError, match=r"lm_head.weight in .*model.safetensors holds NaN or infinite"):
            refuse()


FAMILY = {
    "licenses": {"lmsys/vicuna-7b-v1.5": "llama2"},
    "datasets": {"llava_v1_5_mix665k": "liuhaotian/LLaVA-Instruct-150K"},
    "collection": {"title": "Delta-LLaVA", "description": "Few visual tokens."},
    "checkpoints": {
        "lmsys/vicuna-7b-v1.5": {"seven-36": [36], "seven-elastic": [4, 36], "seven-4": [4]},
        "lmsys/vicuna-13b-v1.5": {"thirteen-36": [36]},
    },
}


def test_a_family_is_pushed_as_far_as_it_exists_and_gathered_in_a_collection(
    loopback_hub, checkpoint, unverified, tmp_path, capsys
):
    checkpoint("seven-36", visual_token_budgets=[36])
    checkpoint("seven-elastic")
    (tmp_path / "seven-4/checkpoint-1").mkdir(parents=True)  # still in training
    family = tmp_path / "family.yaml"
    family.write_text(yaml.safe_dump(FAMILY, sort_keys=False))
    arguments = ["--checkpoints", str(tmp_path), "--namespace", "org", "--family", str(family)]
    push_family([*arguments, "--dry_run"])
    assert all(request.startswith("GET") for request in loopback_hub.requests)
    push_family(arguments)
    output = capsys.readouterr().out
    assert "or not finished: seven-4, thirteen-36" in output
    assert loopback_hub.refs("org/seven-36").keys() == {"main"}
    assert loopback_hub.refs("org/seven-elastic").keys() == {"main", "tokens-4"}
    assert default_budgets(loopback_hub.files("org/seven-elastic", "tokens-4")) == [4, 4]
    (collection,) = loopback_hub.collections.values()
    items = [item["id"] for item in collection["items"]]
    assert collection["title"] == "Delta-LLaVA" and items == ["org/seven-36", "org/seven-elastic"]

    # What comes later joins the same collection, and nothing is sent twice
    checkpoint("seven-4", visual_token_budgets=[4], num_visual_tokens=4)
    values = {**FAMILY, "collection": {"title": "Delta-LLaVA", "description": "Fewer visual tokens."}}
    family.write_text(yaml.safe_dump(values, sort_keys=False))
    commits = {name: loopback_hub.log(name)[0] for name in items}
    push_family(arguments)
    assert commits == {name: loopback_hub.log(name)[0] for name in items}
    (collection,) = loopback_hub.collections.values()
    assert collection["description"] == "Fewer visual tokens."
    assert [item["id"] for item in collection["items"]] == [*items, "org/seven-4"]


@pytest.mark.parametrize(
    ("name", "budgets", "message"),
    [
        ("seven-4", [4, 36], r"seven-4 was trained for \[4, 36\] visual tokens, but seven-4 is for \[4\]"),
        ("thirteen-36", [36], "says lmsys/vicuna-7b-v1.5, but thirteen-36 is made of lmsys/vicuna-13b-v1.5"),
    ],
)
def test_a_family_member_under_a_wrong_name_is_refused_before_anything_is_sent(
    loopback_hub, checkpoint, unverified, tmp_path, name, budgets, message
):
    checkpoint("seven-36", visual_token_budgets=[36])
    checkpoint(name, visual_token_budgets=budgets)
    (tmp_path / "family.yaml").write_text(yaml.safe_dump(FAMILY))
    with pytest.raises(SystemExit, match=message):
        push_family(["--checkpoints", str(tmp_path), "--namespace", "org", "--family", str(tmp_path / "family.yaml")])
    assert not loopback_hub.requests


def test_the_family_s_file_lists_what_its_tables_know():
    family = yaml.safe_load((module.Path(module.__file__).parent / "checkpoints.yaml").read_text())
    assert family["checkpoints"].keys() == family["licenses"].keys()
    for listed in family["checkpoints"].values():
        for name, budgets in listed.items():
            assert name.endswith("-elastic") if len(budgets) > 1 else name.endswith(f"-{budgets[0]}")
