"""A small Hugging Face Hub on loopback: models, Spaces and collections in memory, and failures on request."""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


USER = "tester"
TOKEN = "hf_loopback"
RETRY_AFTER = 1  # seconds
LFS_THRESHOLD = 10 * 2**20  # bytes
GITATTRIBUTES = b"".join(
    b"%s filter=lfs diff=lfs merge=lfs -text\n" % pattern for pattern in (b"*.bin", b"*.model", b"*.safetensors")
)
# The Hub's messages by status. At the creation of a repository, the client retries after a 409 with this message, and
# takes any other 409 for a repository that exists.
MESSAGES = {
    401: "Invalid credentials in Authorization header",
    403: "You have no right to do this",
    404: "Repository not found",
    409: "Cannot create repo: another conflicting operation is in progress",
    412: "A commit has happened since. Please refresh and try again.",
    429: "Too many requests",
    500: "Internal error",
}


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str = "", code: str = "", headers: dict[str, str] | None = None, **body):
        self.status = status
        self.body = {"error": message or MESSAGES[status], **body}
        self.headers = {"X-Error-Message": self.body["error"], **({"X-Error-Code": code} if code else {})}
        self.headers |= headers or {}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    content: bytes


@dataclass(frozen=True)
class Request:
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    authorised: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's name of the blob, which for an LFS file is that of the pointer to it."""
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = "version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.data)}\n"
        return "\n".join(lines).encode()

    @property
    def oid(self) -> str:
        """What the client compares its own file with, and the ETag."""
        return self.sha256 if self.lfs else self.blob_id

    def describe(self, path: str) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "oid": self.blob_id, "size": len(self.data)}
        lfs = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return {**entry, "lfs": lfs} if self.lfs else entry


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str
    date: str
    files: dict[str, File]


@dataclass
class Repository:
    id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # uploaded ones, by SHA-256

    def commit(self, branch: str, files: dict[str, File], title: str, message: str = "") -> Commit:
        parent = self.branches.get(branch, "")
        content = json.dumps([parent, title, message, sorted((path, file.oid) for path, file in files.items())])
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, now(), files)
        self.branches[branch] = sha
        return self.commits[sha]

    def resolve(self, revision: str) -> Commit:
        sha = self.branches.get(revision, revision)
        found = [commit for name, commit in self.commits.items() if len(sha) >= 7 and name.startswith(sha)]
        if len(found) != 1:
            raise Refusal(404, f"{self.id} has no revision {revision}", "RevisionNotFound")
        return found[0]

    def log(self, revision: str) -> list[Commit]:
        commits = [self.resolve(revision)]
        while parent := commits[-1].parent:
            commits.append(self.commits[parent])
        return commits

    def entries(self, revision: str) -> dict[str, dict[str, Any]]:
        """Files and folders by path, as the tree lists them."""
        commit = self.resolve(revision)
        entries = {}
        for path, file in sorted(commit.files.items()):
            for folder in map(str, list(PurePosixPath(path).parents)[-2::-1]):
                oid = hashlib.sha1(f"{commit.sha}/{folder}".encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "oid": oid, "size": 0}
            entries[path] = file.describe(path)
        return entries


ROUTES: list[tuple[str, re.Pattern, bool, Callable]] = []


def route(method: str, template: str, write: bool = False):
    """Makes the decorated method answer `method template`; each `{name}` is an argument.

    A Space is a repository whose name begins with `spaces/`, as in its addresses.
    """
    parts = {"repo": "(?:spaces/)?[^/]+/[^/]+", "slug": "[^/]+/[^/]+", "path": ".+"}
    pattern = re.sub(r"\{(\w+)\}", lambda found: f"(?P<{found[1]}>{parts.get(found[1], '[^/]+')})", template)

    def register(handler: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), write, handler))
        return handler

    return register


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def metadata(readme: bytes) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\s", readme.decode(), re.DOTALL)
    return (yaml.safe_load(found[1]) if found else None) or {}


class LoopbackHub:
    """
    The server, which runs from its creation until `close`.

    Args:
        home (`Path`): Folder for the cache of subprocesses, see `environment`.

    Attributes:
        url (`str`): The endpoint.
        datasets (`set[str]`): Names of data sets that exist, but cannot be read.
        requests (`list[str]`): The requests, as `"METHOD path"`, without the client's look-up of agents.
        environment (`dict[str, str]`): Variables that point a subprocess here, with the token and an empty cache.
    """

    def __init__(self, home: Path):
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.datasets: set[str] = set()
        self.requests: list[str] = []
        self._count = 0
        self._failures: dict[int, int | str | bytes] = {}
        self._released = threading.Event()
        self._lock = threading.RLock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1",
        }
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self):
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def fail(self, at: int, how: int | str | bytes, times: int = 1):
        """
        Makes requests fail.

        Args:
            at (`int`): Number of the first one, counted from now: 1 is the next.
            how (`int`, `str` or `bytes`): A status of `MESSAGES`; `"reset"` (of the connection, and nothing is done),
                `"reset_after"` (it is done, but the answer is lost) or `"stall"` (silence until `release`); or an
                answer to send instead, with status 200, while nothing is done.
            times (`int`, *optional*, defaults to 1): Number of requests in a row.
        """
        with self._lock:
            self._failures |= dict.fromkeys(range(self._count + at, self._count + at + times), how)

    def recover(self):
        """Ends all failures."""
        with self._lock:
            self._failures.clear()

    def release(self):
        """Drops the stalled connections without an answer."""
        with self._lock:
            self._released.set()
            self._released = threading.Event()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files that a reader of the revision sees."""
        with self._lock:
            commit = self.repositories[repo_id].resolve(revision)
            return {path: file.data for path, file in commit.files.items()}

    def refs(self, repo_id: str) -> dict[str, str]:
        """The commit of every branch."""
        with self._lock:
            return dict(self.repositories[repo_id].branches)

    def log(self, repo_id: str, branch: str = "main") -> list[str]:
        """The commits of a branch, the newest first."""
        with self._lock:
            return [commit.sha for commit in self.repositories[repo_id].log(branch)]

    def receive(self, method: str, path: str) -> tuple[int | str | bytes | None, threading.Event]:
        """Records a request; returns how it fails, and the event that ends a stall."""
        with self._lock:
            self._count += 1
            self.requests.append(f"{method} {path}")
            return self._failures.pop(self._count, None), self._released

    def answer(self, method: str, path: str, query: str, headers: Any, body: bytes) -> Answer:
        """Answers a request, or raises a `Refusal`."""
        path = path.replace("/api/spaces/", "/api/models/spaces/")
        credentials = headers.get("Authorization")
        request = Request(parse_qs(query), headers, body, authorised=credentials == f"Bearer {TOKEN}")
        for route_method, pattern, write, handler in ROUTES:
            found = pattern.fullmatch(path)
            if not found or route_method != ("GET" if method == "HEAD" else method):
                continue
            arguments = {name: unquote(value) for name, value in found.groupdict().items()}
            with self._lock:
                if write and not request.authorised:
                    # To the client, a repository that a stranger may not write to does not exist
                    raise Refusal(401, code="RepoNotFound" if "repo" in arguments and not credentials else "")
                if "repo" in arguments:
                    arguments["repo"] = self._repository(arguments["repo"], request.authorised)
                if "slug" in arguments:
                    arguments["collection"] = self._collection(arguments.pop("slug"), request.authorised)
                content = handler(self, request, **arguments)
            if isinstance(content, Answer):
                return content
            return Answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())
        raise Refusal(404, f"The loopback Hub does not know {method} {path}")

    def _named(self, payload: dict[str, Any]) -> str:
        space = "spaces/" * (payload.get("type") == "space")
        return f"{space}{payload.get('organization') or USER}/{payload['name']}"

    def _repository(self, repo_id: str, authorised: bool) -> Repository:
        repo = self.repositories.get(repo_id)
        if repo is None or (repo.private and not authorised):
            raise Refusal(404 if authorised else 401, f"{repo_id}: {MESSAGES[404]}", "RepoNotFound")
        return repo

    def _collection(self, slug: str, authorised: bool) -> dict[str, Any]:
        collection = self.collections.get(slug)
        if collection is None or (collection["private"] and not authorised):
            raise Refusal(404, f"Collection {slug} not found")
        return collection

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self, request: Request):
        try:
            empty = not metadata(request.json["content"].encode())
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid YAML", errors=[{"message": str(error)}], warnings=[]) from error
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}] if empty else []}

    @route("POST", "/api/repos/create", write=True)
    def create_repo(self, request: Request):
        payload = request.json
        kind = payload.get("type", "model")
        if kind not in ("model", "space") or (kind == "space") != ("sdk" in payload):
            raise Refusal(400, "The loopback Hub has models and Spaces, and these alone have an SDK")
        repo_id = self._named(payload)
        if repo_id in self.repositories:
            raise Refusal(409, f"You already created this {kind} repo", url=f"{self.url}/{repo_id}")
        private = payload.get("visibility") == "private" or bool(payload.get("private"))
        self.repositories[repo_id] = repo = Repository(repo_id, private)
        repo.commit("main", {".gitattributes": File(GITATTRIBUTES)}, "initial commit")
        return {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def info(self, request: Request, repo: Repository, revision: str = "main"):
        commit = repo.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in request.query:
            for sibling in siblings:
                entry = commit.files[sibling["rfilename"]].describe(sibling["rfilename"])
                sibling |= {"blobId": entry["oid"], "size": entry["size"]}
                if "lfs" in entry:
                    sibling["lfs"] = {**entry["lfs"], "sha256": entry["lfs"]["oid"]}
        card = metadata(commit.files["README.md"].data) if "README.md" in commit.files else {}
        return {
            "id": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit.sha,
            "lastModified": commit.date,
            "private": repo.private,
            "siblings": siblings,
            "tags": card.get("tags", []),
            "cardData": card or None,
            **{name: card[name] for name in ("pipeline_tag", "library_name", "model-index") if name in card},
        }

    @route("GET", "/api/datasets/{path}")
    def dataset_info(self, request: Request, path: str):
        if path not in self.datasets:
            raise Refusal(404 if request.authorised else 401, f"{path}: {MESSAGES[404]}", "RepoNotFound")
        return {"id": path, "sha": "0" * 40, "private": False, "tags": [], "siblings": []}

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{path}")
    def tree(self, request: Request, repo: Repository, revision: str, path: str = ""):
        entries = repo.entries(revision)
        if path and entries.get(path, {}).get("type") != "directory":
            raise Refusal(404, f"{path} is not a folder of {repo.id}", "EntryNotFound")
        inside = {name: entry for name, entry in entries.items() if name.startswith(path and f"{path}/")}
        if request.query.get("recursive") != ["true"]:
            inside = {name: entry for name, entry in inside.items() if str(PurePosixPath(name).parent) == (path or ".")}
        return list(inside.values())

    @route("GET", "/api/models/{repo}/refs")
    def list_refs(self, request: Request, repo: Repository):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in repo.branches.items()
        ]
        return {"branches": branches, "tags": [], "converts": [], "pullRequests": []}

    @route("POST", "/api/models/{repo}/branch/{branch}", write=True)
    def create_branch(self, request: Request, repo: Repository, branch: str):
        start = repo.resolve(request.json.get("startingPoint", "main"))
        if branch in repo.branches:
            raise Refusal(409, f"Reference refs/heads/{branch} already exists")
        repo.branches[branch] = start.sha

    @route("DELETE", "/api/models/{repo}/branch/{branch}", write=True)
    def delete_branch(self, request: Request, repo: Repository, branch: str):
        if branch == "main":
            raise Refusal(403, "Cannot delete the branch main")
        if repo.branches.pop(branch, None) is None:
            raise Refusal(404, f"{repo.id} has no branch {branch}", "RevisionNotFound")

    @route("POST", "/api/models/{repo}/preupload/{revision}", write=True)
    def preupload(self, request: Request, repo: Repository, revision: str):
        known = repo.resolve(revision).files
        attributes = known[".gitattributes"].data.decode() if ".gitattributes" in known else ""
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]

        def decide(path: str, size: int) -> dict[str, Any]:
            lfs = size > LFS_THRESHOLD or any(fnmatch(PurePosixPath(path).name, pattern) for pattern in patterns)
            oid = known[path].oid if path in known else None
            return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

        return {"files": [decide(file["path"], file["size"]) for file in request.json["files"]]}

    @route("POST", "/api/models/{repo}/commit/{revision}", write=True)
    def create_commit(self, request: Request, repo: Repository, revision: str):
        if revision not in repo.branches:
            raise Refusal(404, f"{repo.id} has no branch {revision}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        head = repo.resolve(revision)
        if not head.sha.startswith(header["value"].get("parentCommit", head.sha)):
            raise Refusal(412)
        files = dict(head.files)
        for operation in operations:
            key, value = operation["key"], operation["value"]
            if key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise Refusal(400, f"{value['path']}: the LFS object {value['oid']} was never uploaded")
                files[value["path"]] = File(repo.objects[value["oid"]], lfs=True)
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            elif key == "deletedFile":
                raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            else:
                raise Refusal(400, f"The loopback Hub does not know the operation {key}")
        sha = repo.commit(revision, files, header["value"]["summary"], header["value"].get("description", "")).sha
        return {"commitOid": sha, "commitUrl": f"{self.url}/{repo.id}/commit/{sha}", "pullRequestUrl": None}

    @route("POST", r"/{repo}\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, request: Request, repo: Repository):
        base = f"{self.url}/{repo.id}.git/info/lfs/objects"
        objects = []
        for wanted in request.json["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repo.objects:
                entry["actions"] = {
                    "upload": {"href": f"{base}/upload/{wanted['oid']}"},
                    "verify": {"href": f"{base}/verify"},
                }
            objects.append(entry)
        return {"transfer": "basic", "objects": objects}

    # The client sends no token here: the address is the permission
    @route("PUT", r"/{path}\.git/info/lfs/objects/upload/{oid}")
    def lfs_upload(self, request: Request, path: str, oid: str):
        repo = self._repository(path, authorised=True)
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, f"These are not the bytes of the LFS object {oid}")
        repo.objects[oid] = request.body

    @route("POST", r"/{repo}\.git/info/lfs/objects/verify", write=True)
    def lfs_verify(self, request: Request, repo: Repository):
        if len(repo.objects.get(request.json["oid"], b"")) != request.json["size"]:
            raise Refusal(404, f"The LFS object {request.json['oid']} is not there, or of another size")

    @route("GET", "/{repo}/resolve/{revision}/{path}")
    def resolve(self, request: Request, repo: Repository, revision: str, path: str):
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise Refusal(404, f"{repo.id} has no file {path}", "EntryNotFound", headers)
        file = commit.files[path]
        headers |= {"ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        return Answer(200, headers, file.data)

    @route("POST", "/api/collections", write=True)
    def create_collection(self, request: Request):
        title, namespace = request.json["title"], request.json["namespace"]
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        slug = f"{namespace}/{name}-{hashlib.sha1(f'{namespace}/{title}'.encode()).hexdigest()[:24]}"
        if slug in self.collections:
            raise Refusal(409, "Collection already exists", slug=slug)
        self.collections[slug] = {
            "slug": slug,
            "title": title,
            "description": request.json.get("description"),
            "owner": {"name": namespace},
            "items": [],
            "lastUpdated": now(),
            "position": len(self.collections),
            "private": request.json.get("private", False),
            "theme": "blue",
            "upvotes": 0,
        }
        return self.collections[slug]

    @route("GET", "/api/collections/{slug}")
    def get_collection(self, request: Request, collection: dict[str, Any]):
        return collection

    @route("PATCH", "/api/collections/{slug}", write=True)
    def update_collection(self, request: Request, collection: dict[str, Any]):
        collection |= request.json
        return {"data": collection}

    @route("POST", "/api/collections/{slug}/items", write=True)
    def add_item(self, request: Request, collection: dict[str, Any]):
        item, note = request.json["item"], request.json.get("note")
        repo = self._repository(item["id"], authorised=True)
        if any(known["id"] == repo.id for known in collection["items"]):
            raise Refusal(409, f"{repo.id} is in the collection already")
        object_id = hashlib.sha1(f"{collection['slug']}/{repo.id}".encode()).hexdigest()[:24]
        entry = {"_id": object_id, **item, "position": len(collection["items"]), "note": note and {"text": note}}
        collection["items"].append(entry)
        return collection


class _Server(ThreadingHTTPServer):
    request_queue_size = 64
    hub: LoopbackHub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def serve(self):
        hub, url, body = self.server.hub, urlsplit(self.path), self._read_body()
        if url.path == "/api/agent-harnesses":  # a look-up of the client's own, once per process
            self._send(Answer(200, {}, b'{"standardEnvVars": [], "harnesses": {}}'))
            return
        how, released = hub.receive(self.command, url.path)
        if how == "stall":
            released.wait()
        if how in ("stall", "reset"):
            self._reset()
            return
        try:
            if how in MESSAGES:
                of_repository = "/api/models/" in url.path or "/resolve/" in url.path
                raise Refusal(
                    how,
                    code="RepoNotFound" if how == 404 and of_repository else "",
                    headers={"Retry-After": str(RETRY_AFTER)} if how == 429 else None,
                )
            if isinstance(how, bytes):
                answer = Answer(200, {}, how)
            else:
                answer = hub.answer(self.command, url.path, url.query, self.headers, body)
        except Refusal as refusal:
            answer = Answer(refusal.status, refusal.headers, json.dumps(refusal.body).encode())
        if how == "reset_after":
            self._reset()
        else:
            self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer):
        self.send_response(answer.status, HTTPStatus(answer.status).phrase)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    def _reset(self):
        # Closing without lingering sends RST instead of FIN. The file over the socket would keep it open
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()
        self.close_connection = True

    def log_message(self, *arguments):
        pass
