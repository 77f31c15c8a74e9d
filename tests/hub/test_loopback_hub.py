"""The loopback Hub answers the real client as the Hub does, where a push relies on it, and fails on request."""

import hashlib
import threading
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx


REPO = "org/model"
README = b"---\npipeline_tag: image-text-to-text\n---\n# Card\n"
WEIGHTS = bytes(range(256)) * 8


@pytest.fixture
def api(loopback_hub):
    return HfApi()


@pytest.fixture
def commit(api):
    """`commit(files)`: commits contents by path to a repository that exists."""

    def make(files, **options):
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        return api.create_commit(REPO, operations, commit_message="Add files", **options).oid

    api.create_repo(REPO)
    return make


@pytest.fixture
def repo(commit):
    """The commit of a repository with a small file, a folder and an LFS file."""
    return commit({"README.md": README, "code/model.py": b"x = 1\n", "model.safetensors": WEIGHTS})


def test_what_is_committed_is_read_and_described(repo, commit, api, loopback_hub):
    info = api.model_info(REPO)
    assert (info.sha, info.pipeline_tag) == (repo, "image-text-to-text")
    for revision in (None, "main", repo):
        folder = snapshot_download(REPO, revision=revision)
        assert {path: Path(folder, path).read_bytes() for path in api.list_repo_files(REPO)} == loopback_hub.files(REPO)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "absent.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "README.md", revision="absent")
    commit({"hello.txt": b"hello\n"})
    tree = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert tree.keys() == {".gitattributes", "README.md", "code", "code/model.py", "hello.txt", "model.safetensors"}
    blob = "ce013625030ba8dba906f756967f9e9ca394464a"  # echo hello | git hash-object --stdin
    assert tree["hello.txt"].blob_id == blob and tree["hello.txt"].lfs is None
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_an_unchanged_file_is_not_sent_again_and_another_state_has_another_commit(repo, commit, loopback_hub):
    loopback_hub.requests.clear()
    assert commit({"README.md": README, "model.safetensors": WEIGHTS}) == repo
    assert not any("/commit/" in request or request.startswith("PUT") for request in loopback_hub.requests)
    commit({"code/model.py": b"x = 2\n"})
    back = commit({"code/model.py": b"x = 1\n"})
    assert back not in loopback_hub.log(REPO)[1:]  # or it would be served from a stale cache


def test_a_branch_starts_at_a_commit_and_goes_its_own_way(repo, commit, api, loopback_hub):
    head = commit({"code/model.py": b"x = 2\n"})
    api.create_branch(REPO, branch="tokens-36", revision=repo)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_branch(REPO, branch="tokens-36", revision=repo)
    off = commit({"README.md": README + b"36"}, revision="tokens-36")
    branches = {branch.name: branch.target_commit for branch in api.list_repo_refs(REPO).branches}
    assert branches == loopback_hub.refs(REPO) == {"main": head, "tokens-36": off}
    assert loopback_hub.log(REPO, "tokens-36")[:2] == [off, repo]
    assert Path(hf_hub_download(REPO, "README.md", revision="tokens-36")).read_bytes() == README + b"36"
    api.delete_branch(REPO, branch="tokens-36")
    assert loopback_hub.refs(REPO) == {"main": head}


def test_a_commit_is_whole_or_refused(repo, commit, api, loopback_hub):
    api.create_commit(REPO, [CommitOperationDelete("code/model.py")], commit_message="Delete")
    before = loopback_hub.files(REPO)
    assert before.keys() == {".gitattributes", "README.md", "model.safetensors"}
    with pytest.raises(EntryNotFoundError):
        operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("absent.txt")]
        api.create_commit(REPO, operations, commit_message="Half")
    with pytest.raises(HfHubHTTPError, match="412"):
        commit({"new.txt": b"new"}, parent_commit=repo)
    addition = CommitOperationAdd("other.safetensors", b"other")
    addition._is_uploaded, addition._upload_mode = True, "lfs"  # what the client believes
    with pytest.raises(BadRequestError, match="never uploaded"):
        api.create_commit(REPO, [addition], commit_message="Pointer alone")
    with pytest.raises(ValueError, match="Invalid metadata"):
        commit({"README.md": b"---\na: [\n---\n"})
    assert loopback_hub.files(REPO) == before


def test_only_the_token_writes_and_reads_what_is_private(repo, api, tmp_path, loopback_hub):
    api.create_repo("org/secret", private=True)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="org/secret")
    assert hf_hub_download("org/secret", "config.json") and api.model_info("org/secret").private
    before = loopback_hub.files(REPO)
    for stranger in (False, "hf_wrong"):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("org/secret", "config.json", token=stranger, cache_dir=tmp_path)
        operations = [CommitOperationAdd("new.txt", b"new")]
        for write in (
            lambda: api.create_repo("org/other", token=stranger),  # noqa: B023
            lambda: api.create_commit(REPO, operations, commit_message="Write", token=stranger),  # noqa: B023
            lambda: api.create_branch(REPO, branch="b", token=stranger),  # noqa: B023
            lambda: api.create_collection("Family", namespace="org", token=stranger),  # noqa: B023
        ):
            with pytest.raises(HfHubHTTPError, match="401"):
                write()
    assert loopback_hub.files(REPO) == before and loopback_hub.refs(REPO).keys() == {"main"}


def test_a_space_is_another_repository_than_the_model_of_its_name(repo, api, loopback_hub):
    before = loopback_hub.files(REPO)
    api.create_repo(REPO, repo_type="space", space_sdk="gradio")
    commit = api.upload_file(path_or_fileobj=b"page", path_in_repo="app.py", repo_id=REPO, repo_type="space")
    assert api.space_info(REPO).sha == commit.oid and api.model_info(REPO).sha == repo
    assert loopback_hub.files(f"spaces/{REPO}")["app.py"] == b"page" and loopback_hub.files(REPO) == before
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)


def test_collections(repo, api):
    created = api.create_collection("Delta-LLaVA", namespace="org", description="All of them")
    assert api.create_collection("Delta-LLaVA", namespace="org", exists_ok=True).slug == created.slug
    for _ in range(2):
        api.add_collection_item(created.slug, REPO, "model", exists_ok=True)
    assert [item.item_id for item in api.get_collection(created.slug).items] == [REPO]
    assert api.update_collection_metadata(created.slug, description="Some").description == "Some"


@pytest.mark.parametrize("how", [401, 403, 404, 409, 412, 429, 500, "reset", "reset_after"])
def test_a_failure_on_request_comes_once_and_in_its_place(how, repo, api, loopback_hub):
    loopback_hub.requests.clear()
    loopback_hub.fail(at=2, how=how)
    assert api.model_info(REPO).sha == repo
    error, match = (HfHubHTTPError, str(how)) if isinstance(how, int) else (httpx.NetworkError, None)
    with pytest.raises(error, match=match):
        api.create_branch(REPO, branch="b")
    assert loopback_hub.requests == [f"GET /api/models/{REPO}", f"POST /api/models/{REPO}/branch/b"]
    assert ("b" in loopback_hub.refs(REPO)) == (how == "reset_after")
    api.create_branch(REPO, branch="c")


def test_a_stalled_connection_is_silent_until_it_is_released(repo, api, loopback_hub):
    loopback_hub.fail(at=1, how="stall", times=2)
    with pytest.raises(httpx.ReadTimeout):
        api.model_info(REPO, timeout=0.1)
    threading.Timer(0.1, loopback_hub.release).start()
    with pytest.raises(httpx.NetworkError):
        api.create_branch(REPO, branch="b")
    assert loopback_hub.refs(REPO).keys() == {"main"} and api.model_info(REPO).sha == repo
