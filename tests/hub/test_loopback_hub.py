"""The loopback Hub answers the real client as the Hub does, and fails as it is told."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    hf_hub_download,
    hf_hub_url,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from loopback_hub import GITATTRIBUTES
from transformers import AutoConfig


REPO = "org/model"
README = b"---\npipeline_tag: image-text-to-text\nlibrary_name: transformers\n---\n# Card\n"
WEIGHTS = bytes(range(256)) * 8


@pytest.fixture
def api(loopback_hub):
    return HfApi()


@pytest.fixture
def commit(api):
    """Commits contents by their path, to a repository that is there."""

    def make(files, **arguments):
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        return api.create_commit(REPO, operations, commit_message="Add files", **arguments).oid

    api.create_repo(REPO)
    return make


@pytest.fixture
def repo(commit):
    """A repository with a small file, a folder and an LFS file; its commit."""
    return commit({"README.md": README, "code/model.py": b"x = 1\n", "model.safetensors": WEIGHTS})


def test_what_is_committed_is_read(repo, api, loopback_hub):
    info = api.model_info(REPO, files_metadata=True)
    assert (info.sha, info.pipeline_tag, info.library_name) == (repo, "image-text-to-text", "transformers")
    weights = {sibling.rfilename: sibling for sibling in info.siblings}["model.safetensors"]
    assert (weights.size, weights.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())

    for revision in (None, "main", repo):
        folder = snapshot_download(REPO, revision=revision)
        read = {path: Path(folder, path).read_bytes() for path in api.list_repo_files(REPO)}
        assert read == loopback_hub.files(REPO)
    assert scan_cache_dir().repos and constants.HF_HUB_CACHE in folder
    with pytest.raises(EntryNotFoundError) as missing:
        hf_hub_download(REPO, "absent.json")
    assert missing.value.response.headers["X-Repo-Commit"] == repo
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "README.md", revision="absent")


def test_small_files_have_the_names_that_git_gives_their_blobs(commit, api):
    commit({"hello.txt": b"hello\n"})
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"  # echo hello | git hash-object --stdin
    assert api.get_paths_info(REPO, "hello.txt")[0].blob_id == blob


def test_the_tree_has_folders_and_last_commits(repo, commit, api):
    assert {entry.path for entry in api.list_repo_tree(REPO)} == {
        ".gitattributes",
        "README.md",
        "code",
        "model.safetensors",
    }
    assert [entry.path for entry in api.list_repo_tree(REPO, "code")] == ["code/model.py"]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "absent"))
    commit({"other.txt": b"other"})
    entries = api.list_repo_tree(REPO, recursive=True, expand=True)
    last = {entry.path: entry.last_commit for entry in entries}
    assert last["README.md"].oid == repo


def test_a_download_resumes_where_it_ended(repo, loopback_hub):
    answer = get_session().get(hf_hub_url(REPO, "model.safetensors"), headers={"Range": "bytes=100-"})
    assert (answer.status_code, answer.content) == (206, WEIGHTS[100:])
    assert answer.headers["Content-Range"] == f"bytes 100-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"
    beyond = get_session().get(hf_hub_url(REPO, "model.safetensors"), headers={"Range": f"bytes={len(WEIGHTS)}-"})
    assert beyond.status_code == 416


def test_an_unchanged_file_is_not_sent_again(repo, commit, loopback_hub):
    loopback_hub.requests.clear()
    assert commit({"README.md": README, "model.safetensors": WEIGHTS}) == repo
    assert not any("/commit/" in request or request.startswith("PUT") for request in loopback_hub.requests)
    assert commit({"README.md": README, "code/model.py": b"x = 2\n"}) != repo
    assert loopback_hub.files(REPO)["code/model.py"] == b"x = 2\n"
    back = commit({"code/model.py": b"x = 1\n"})
    assert back not in loopback_hub.log(REPO)[1:]  # what was cached under another commit is not this one


def test_a_folder_goes_there_and_comes_back(api, tmp_path, loopback_hub):
    (tmp_path / "code").mkdir()
    contents = {
        "README.md": README,
        "code/empty.py": b"",
        "model.safetensors": WEIGHTS * 1000,
        "b.safetensors": WEIGHTS,
    }
    for path, content in contents.items():
        (tmp_path / path).write_bytes(content)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path)
    assert loopback_hub.files(REPO) == {**contents, ".gitattributes": GITATTRIBUTES}
    folder = Path(snapshot_download(REPO))
    assert {path: (folder / path).read_bytes() for path in contents} == contents


def test_a_branch_starts_at_a_commit_and_goes_its_own_way(repo, commit, api, loopback_hub):
    head = commit({"code/model.py": b"x = 2\n"})
    api.create_branch(REPO, branch="tokens-36", revision=repo)
    with pytest.raises(HfHubHTTPError) as exists:
        api.create_branch(REPO, branch="tokens-36", revision=repo)
    assert exists.value.response.status_code == 409
    off = commit({"README.md": README + b"36"}, revision="tokens-36")
    api.create_tag(REPO, tag="v1", revision="tokens-36")

    assert loopback_hub.refs(REPO) == {"main": head, "tokens-36": off}
    assert {branch.name: branch.target_commit for branch in api.list_repo_refs(REPO).branches} == loopback_hub.refs(
        REPO
    )
    assert loopback_hub.log(REPO, "tokens-36")[:2] == [off, repo]
    assert [item.commit_id for item in api.list_repo_commits(REPO)] == loopback_hub.log(REPO)
    assert loopback_hub.files(REPO, "v1")["README.md"] == README + b"36"
    assert Path(hf_hub_download(REPO, "README.md", revision="tokens-36")).read_bytes() == README + b"36"
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="tokens-36")
    assert loopback_hub.refs(REPO) == {"main": head}
    with pytest.raises(RevisionNotFoundError):
        commit({"a.txt": b"a"}, revision="tokens-36")


def test_a_commit_copies_and_deletes_and_is_whole_or_not_at_all(repo, api, loopback_hub):
    operations = [
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationCopy("README.md", "COPY.md"),
        CommitOperationDelete("code/"),
    ]
    api.create_commit(REPO, operations, commit_message="Copy")
    files = loopback_hub.files(REPO)
    assert set(files) == {".gitattributes", "README.md", "COPY.md", "model.safetensors", "copy.safetensors"}
    assert files["copy.safetensors"] == WEIGHTS

    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("absent.txt")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, operations, commit_message="Half")
    assert loopback_hub.files(REPO) == files


def test_a_commit_on_another_parent_is_refused(repo, commit, loopback_hub):
    head = commit({"code/model.py": b"x = 2\n"}, parent_commit=repo)
    with pytest.raises(HfHubHTTPError) as conflict:
        commit({"code/model.py": b"x = 3\n"}, parent_commit=repo)
    assert conflict.value.response.status_code == 412
    assert loopback_hub.refs(REPO) == {"main": head}


def test_an_lfs_file_that_was_never_uploaded_is_refused(repo, api, loopback_hub):
    addition = CommitOperationAdd("other.safetensors", b"other")
    addition._is_uploaded, addition._upload_mode = True, "lfs"  # what the client believes
    with pytest.raises(BadRequestError, match="never uploaded"):
        api.create_commit(REPO, [addition], commit_message="Pointer alone")
    assert loopback_hub.refs(REPO) == {"main": repo}


def test_an_upload_must_be_announced_and_be_what_its_name_says(repo, loopback_hub):
    objects = f"{loopback_hub.url}/{REPO}.git/info/lfs/objects"
    oid = hashlib.sha256(b"right").hexdigest()
    assert get_session().put(f"{objects}/upload/{oid}", content=b"right").status_code == 403
    headers = {"Authorization": f"Bearer {loopback_hub.environment['HF_TOKEN']}"}
    wanted = {"operation": "upload", "objects": [{"oid": oid, "size": 5}]}
    get_session().post(f"{objects}/batch", json=wanted, headers=headers)
    assert get_session().put(f"{objects}/upload/{oid}", content=b"wrong").status_code == 400
    assert get_session().put(f"{objects}/upload/{oid}", content=b"right").status_code == 200


def test_a_private_repository_is_not_there_for_a_stranger(api, tmp_path):
    api.create_repo("org/secret", private=True)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="org/secret")
    assert api.model_info("org/secret").private
    assert hf_hub_download("org/secret", "config.json")
    for stranger in (False, "hf_wrong"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("org/secret", token=stranger)
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("org/secret", "config.json", token=stranger, cache_dir=tmp_path)


@pytest.mark.parametrize("stranger", [False, "hf_wrong"])
def test_every_write_needs_the_token(repo, api, stranger, loopback_hub):
    collection = api.create_collection("Family", namespace="org")
    before = loopback_hub.files(REPO)
    operations = [CommitOperationAdd("new.txt", b"new")]
    for write in (
        lambda: api.create_repo("org/other", token=stranger),
        lambda: api.delete_repo(REPO, token=stranger),
        lambda: api.create_commit(REPO, operations, commit_message="Write", token=stranger),
        lambda: api.create_branch(REPO, branch="b", token=stranger),
        lambda: api.create_tag(REPO, tag="t", token=stranger),
        lambda: api.add_collection_item(collection.slug, REPO, "model", token=stranger),
    ):
        with pytest.raises(HfHubHTTPError) as refused:
            write()
        assert refused.value.response.status_code == 401
    assert loopback_hub.files(REPO) == before
    assert set(loopback_hub.refs(REPO)) == {"main"}


def test_a_repository_is_created_once_and_can_go(repo, api):
    assert api.whoami()["name"]
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as exists:
        api.create_repo(REPO)
    assert exists.value.response.status_code == 409
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_a_space_is_another_repository_than_the_model_of_its_name(repo, api, loopback_hub):
    before = loopback_hub.files(REPO)
    api.create_repo(REPO, repo_type="space", space_sdk="gradio")
    commit = api.upload_file(path_or_fileobj=b"page", path_in_repo="app.py", repo_id=REPO, repo_type="space")
    assert api.space_info(REPO).sha == commit.oid == api.list_repo_commits(REPO, repo_type="space")[0].commit_id
    assert Path(hf_hub_download(REPO, "app.py", repo_type="space")).read_bytes() == b"page"
    assert loopback_hub.files(REPO) == before and api.model_info(REPO).sha == repo
    api.delete_repo(REPO, repo_type="space")
    assert api.repo_exists(REPO) and not api.repo_exists(REPO, repo_type="space")


def test_a_card_with_broken_metadata_is_refused(repo, commit):
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit({"README.md": b"---\na: [\n---\n"})
    with pytest.warns(UserWarning, match="empty or missing"):
        commit({"README.md": b"# No metadata\n"})


def test_collections(repo, api):
    created = api.create_collection("Delta-LLaVA", namespace="org", description="All of them")
    assert api.create_collection("Delta-LLaVA", namespace="org", exists_ok=True).slug == created.slug
    added = api.add_collection_item(created.slug, REPO, "model", note="36 tokens")
    assert [(item.item_id, item.note) for item in added.items] == [(REPO, "36 tokens")]
    with pytest.raises(HfHubHTTPError) as exists:
        api.add_collection_item(created.slug, REPO, "model")
    assert exists.value.response.status_code == 409
    api.update_collection_item(created.slug, added.items[0].item_object_id, note="144 tokens")
    assert api.get_collection(created.slug).items[0].note == "144 tokens"
    assert api.update_collection_metadata(created.slug, description="Some").description == "Some"

    for number in range(5):
        api.create_repo(f"org/model-{number}")
        api.add_collection_item(created.slug, f"org/model-{number}", "model")
    assert not list(api.list_collections(owner="other")) and not list(api.list_collections(item="models/org/other"))
    listed = list(api.list_collections(owner="org", item=f"models/{REPO}"))
    assert (len(listed[0].items), len(api.get_collection(created.slug).items)) == (4, 6)
    api.delete_collection_item(created.slug, added.items[0].item_object_id)
    assert REPO not in {item.item_id for item in api.get_collection(created.slug).items}
    api.delete_collection(created.slug)
    assert not list(api.list_collections())


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500])
def test_a_status_on_purpose_shows_and_changes_nothing(status, repo, api, loopback_hub):
    loopback_hub.requests.clear()
    loopback_hub.fail(at=2, how=status)
    assert api.model_info(REPO).sha == repo
    with pytest.raises(RepositoryNotFoundError if status == 404 else HfHubHTTPError) as failure:
        api.create_branch(REPO, branch="b")
    assert failure.value.response.status_code == status
    assert ("Retry-After" in failure.value.response.headers) == (status == 429)
    assert loopback_hub.requests == [f"GET /api/models/{REPO}", f"POST /api/models/{REPO}/branch/b"]
    assert set(loopback_hub.refs(REPO)) == {"main"}
    api.create_branch(REPO, branch="b")


@pytest.mark.parametrize(("how", "done"), [("reset", False), ("reset_after", True)])
def test_a_connection_is_reset_before_or_after_the_work(how, done, repo, api, loopback_hub):
    loopback_hub.fail(at=1, how=how)
    with pytest.raises(httpx.NetworkError):
        api.create_branch(REPO, branch="b")
    assert ("b" in loopback_hub.refs(REPO)) == done


def test_a_stalled_connection_says_nothing_until_it_is_released(repo, api, loopback_hub):
    loopback_hub.fail(at=1, how="stall", times=2)
    with pytest.raises(httpx.ReadTimeout):
        api.model_info(REPO, timeout=0.1)
    threading.Timer(0.1, loopback_hub.release).start()
    with pytest.raises(httpx.NetworkError):
        api.create_branch(REPO, branch="b")
    assert set(loopback_hub.refs(REPO)) == {"main"}
    assert api.model_info(REPO).sha == repo


def test_the_client_tries_again_where_it_does_of_its_own_accord(repo, commit, loopback_hub, naps):
    for how in (429, 500, "reset", "reset_after"):
        loopback_hub.fail(at=1, how=how)
        commit({"a.txt": str(how).encode()})
    assert naps == [2.0, 1, 1, 1]  # Retry-After and a second more, or a second
    loopback_hub.fail(at=1, how=500, times=6)
    with pytest.raises(HfHubHTTPError):
        commit({"a.txt": b"again"})
    assert naps[4:] == [1, 2, 4, 8, 8]


def test_an_unknown_failure_is_refused(loopback_hub):
    with pytest.raises(ValueError, match="'teapot'"):
        loopback_hub.fail(at=1, how="teapot")


CONFIGURATION = b'{"model_type": "loop", "auto_map": {"AutoConfig": "configuration_loop.LoopConfig"}}'
CODE = """
from transformers import PreTrainedConfig

class LoopConfig(PreTrainedConfig):
    model_type = "loop"
    version = %d
"""


def test_transformers_loads_code_from_it_in_this_process_and_in_another(commit, loopback_hub):
    for version in (1, 2):
        commit({"config.json": CONFIGURATION, "configuration_loop.py": (CODE % version).encode()})
        assert AutoConfig.from_pretrained(REPO, trust_remote_code=True).version == version
    code = f"import transformers as t; print(t.AutoConfig.from_pretrained({REPO!r}, trust_remote_code=True).version)"
    environment = {**os.environ, **loopback_hub.environment}
    completed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert completed.stdout.strip() == "2", completed.stderr
    assert all(Path(home, "hub").is_dir() for home in (constants.HF_HOME, loopback_hub.environment["HF_HOME"]))
