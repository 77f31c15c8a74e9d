"""A Space is published whole and in one step: the page, the source that it needs, and the commit of its checkpoint."""

import ast
import json
import re
from itertools import count
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

import delta_llava
from delta_llava.hub.push_space import SOURCES, main


MODEL, SPACE = "org/delta-llava-7b", "org/what-a-token-buys"
PACKAGE = Path(delta_llava.__file__).parent
PAGE = {"README.md", "app.py", "style.css", "requirements.txt", "checkpoint.json"}
ARGUMENTS = ["--checkpoint", MODEL, "--repo_id", SPACE]


@pytest.fixture
def model(loopback_hub):
    """`model(config)`: puts a model on the Hub, and returns its commit."""

    def make(config='{"model_type": "delta_llava"}', repo_id=MODEL, private=False):
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_file(path_or_fileobj=config.encode(), path_in_repo="config.json", repo_id=repo_id).oid

    return make


def space(hub):
    files = hub.files(f"spaces/{SPACE}")
    files.pop(".gitattributes")
    return files


def locate(module, folder=None):
    """Where a module would be; the clone's own folder may have any name."""
    first, *rest = module.split(".")
    if folder is not None:
        return folder.joinpath(first, *rest)
    return PACKAGE.joinpath(*rest) if first == "delta_llava" else PACKAGE.parent / "not ours"


def imports(file):
    """Files of this package that one of them imports, as names in `SOURCES`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = locate(node.module or "", file.parents[node.level - 1] if node.level else None)
            candidates = [module, *(module / alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            candidates = [locate(alias.name) for alias in node.names]
        else:
            continue
        files = [path for c in candidates for path in (c.with_suffix(".py"), c / "__init__.py") if path.is_file()]
        found |= {path.relative_to(PACKAGE).as_posix() for path in files if path.is_relative_to(PACKAGE)}
    return found


def test_the_sources_are_all_that_the_page_imports_and_no_more():
    needed, unread = set(), {PACKAGE / "space/app.py"}
    while unread:
        names = imports(unread.pop()) - needed
        names |= {f"{folder}__init__.py" for name in names for folder in ("", re.sub("[^/]+$", "", name))} - needed
        needed |= names
        unread |= {PACKAGE / name for name in names}
    assert set(SOURCES) == needed


def test_a_push_is_one_commit_of_page_source_and_checkpoint(loopback_hub, model, capfd):
    commit = model()
    main(ARGUMENTS)
    files = space(loopback_hub)
    assert files.keys() >= PAGE | {f"delta_llava/{name}" for name in SOURCES}
    assert json.loads(files["checkpoint.json"]) == {"checkpoint": MODEL, "revision": commit}
    for name in files.keys() - {"README.md", "checkpoint.json"}:
        source = PACKAGE / name.removeprefix("delta_llava/")
        assert files[name] == (source if name.startswith("delta_llava/") else PACKAGE / "space" / name).read_bytes()
    metadata = yaml.safe_load(files["README.md"].split(b"---\n")[1])
    assert metadata["models"] == [MODEL] and len(metadata["short_description"]) <= 60
    assert {name: metadata[name] for name in ("sdk", "app_file", "license", "python_version")} == {
        "sdk": "gradio",
        "app_file": "app.py",
        "license": "apache-2.0",
        "python_version": "3.11",
    }
    head, _first = loopback_hub.log(f"spaces/{SPACE}")
    output = capfd.readouterr().out
    assert f"{MODEL} at {commit} to the Space {SPACE}" in output
    assert f"{loopback_hub.url}/spaces/{SPACE} at {head}" in output

    loopback_hub.requests.clear()
    main(ARGUMENTS)
    assert loopback_hub.log(f"spaces/{SPACE}")[0] == head
    assert all(request.startswith("GET") for request in loopback_hub.requests)
    assert f"0 of {len(files)} files are to be sent" in capfd.readouterr().out


def test_a_later_push_serves_the_later_checkpoint_and_leaves_no_file_of_an_earlier_page(loopback_hub, model):
    first = model()
    main(ARGUMENTS)
    api = HfApi()
    for name in ("delta_llava/gone.py", "notes.md"):
        api.upload_file(path_or_fileobj=b"x = 1\n", path_in_repo=name, repo_id=SPACE, repo_type="space")
    second = model('{"model_type": "delta_llava", "num_visual_tokens": 36}')
    main(ARGUMENTS)
    files = space(loopback_hub)
    assert json.loads(files["checkpoint.json"])["revision"] == second != first
    assert "delta_llava/gone.py" not in files and "notes.md" in files
    assert len(loopback_hub.log(f"spaces/{SPACE}")) == 5
    main([*ARGUMENTS, "--revision", first])
    assert json.loads(space(loopback_hub)["checkpoint.json"])["revision"] == first


def test_a_dry_run_prints_all_and_writes_nothing(loopback_hub, model, capfd):
    model()
    loopback_hub.requests.clear()
    main([*ARGUMENTS, "--dry_run", "--private"])
    sent = re.findall(r"^send +(\S+) +[\d,]+ bytes$", capfd.readouterr().out, flags=re.MULTILINE)
    assert set(sent) >= PAGE
    assert loopback_hub.repositories.keys() == {MODEL}
    assert not any(request.startswith(("POST", "DELETE")) for request in loopback_hub.requests)


def test_a_private_space_and_a_private_checkpoint(loopback_hub, model, capfd):
    model(private=True)
    main([*ARGUMENTS, "--private"])
    assert loopback_hub.repositories[f"spaces/{SPACE}"].private
    assert "give the Space a secret HF_TOKEN" in capfd.readouterr().out
    main(ARGUMENTS)
    assert loopback_hub.repositories[f"spaces/{SPACE}"].private

    loopback_hub.repositories[f"spaces/{SPACE}"].private = False
    with pytest.raises(SystemExit, match=f"The Space {SPACE} is public: make it private in its settings"):
        main([*ARGUMENTS, "--private"])


@pytest.mark.parametrize(
    ("config", "arguments", "reason"),
    [
        (None, ARGUMENTS, f"checkpoint={MODEL} cannot be found on the Hub: push it with hub.push first"),
        ('{"model_type": "llava"}', ARGUMENTS, f"checkpoint={MODEL} is a model of type llava, not delta_llava"),
        ('{"model_type": "delta_llava"}', [*ARGUMENTS, "--revision", "tokens-5"], "has no revision tokens-5"),
        (
            '{"model_type": "delta_llava"}',
            ["--checkpoint", MODEL, "--repo_id", "alone"],
            "repo_id=alone must be ORG/NAME",
        ),
        (None, ["--checkpoint", "demo/out/checkpoint", "--repo_id", SPACE], "checkpoint=demo/out/checkpoint must be"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_written(config, arguments, reason, loopback_hub, model):
    if config:
        model(config)
    with pytest.raises(SystemExit, match=re.escape(reason)):
        main(arguments)
    assert f"spaces/{SPACE}" not in loopback_hub.repositories


def test_another_app_is_not_replaced(loopback_hub, model):
    model()
    api = HfApi()
    api.create_repo(SPACE, repo_type="space", space_sdk="gradio")
    api.upload_file(path_or_fileobj=b"", path_in_repo="app.py", repo_id=SPACE, repo_type="space")
    with pytest.raises(SystemExit, match=f"The Space {SPACE} holds another app"):
        main(ARGUMENTS)
    assert space(loopback_hub) == {"app.py": b""}


@pytest.mark.parametrize("how", ["reset", 500, 403])
def test_interrupted_at_any_request_visitors_get_the_old_or_the_new_page_and_the_next_run_finishes(
    loopback_hub, model, naps, how
):
    model()
    main(ARGUMENTS)
    old = space(loopback_hub)
    commit = model('{"model_type": "delta_llava", "num_visual_tokens": 36}')
    for number in count(1):
        loopback_hub.fail(at=number, how=how, times=20)
        try:
            main(ARGUMENTS)
        except SystemExit as error:
            assert "the same command again" in str(error)
            assert space(loopback_hub) == old
        else:
            break
        finally:
            loopback_hub.recover()
    assert number > 5
    assert json.loads(space(loopback_hub)["checkpoint.json"])["revision"] == commit
