"""A Hub on this machine, as far as the hub's own client needs one to read a file and to commit: HTTP on a free port."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

Files = dict[str, bytes]


class LocalHub:
    """Repositories with their commits.

    Attributes:
        repos: repository -> branch, tag or commit -> files.
        refused: repository -> the error code that the Hub says of it ("GatedRepo", "RepoNotFound", "down").
        asked: (method, path) of every request.
        created: what create_repo was given.
        commits: (repository, branch, headers of the request, summary, pull request or not) of every commit.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Files]] = {}
        self.refused: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.created: list[dict] = []
        self.commits: list[tuple] = []
        hub = self

        class Handler(_Handler):
            local = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, repo: str, content: str, revision: str = "main", file: str = "longctx.yaml") -> str:
        """A commit with one file more; its hash."""
        revisions = self.repos.setdefault(repo, {})
        files = {**revisions.get(revision, {}), file: content.encode()}
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        revisions |= {revision: files, commit: files}
        return commit

    def commit_of(self, repo: str, revision: str) -> str:
        revisions = self.repos[repo]
        return next(name for name, files in revisions.items() if len(name) == 40 and files == revisions[revision])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    local: LocalHub

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **{key.replace("_", "-"): one for key, one in headers.items()}}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.local.asked.append((self.command, self.path))
        repo, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        revision = unquote(revision)
        code = self.local.refused.get(repo, None if repo in self.local.repos else "RepoNotFound")
        if code is not None:
            self.answer({"GatedRepo": 403, "down": 503}.get(code, 404), X_Error_Code=code)
        elif revision not in self.local.repos[repo]:
            self.answer(404, X_Error_Code="RevisionNotFound")
        elif name not in self.local.repos[repo][revision]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.local.commit_of(repo, revision))
        else:
            content = self.local.repos[repo][revision][name]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            self.answer(200, content, ETag=etag, X_Repo_Commit=self.local.commit_of(repo, revision))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.local.asked.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        parts = path[1:].split("/")  # api/models/USER/REPO/ACTION/REVISION
        if parts[1] == "repos":
            self.answer(200, json.dumps(self.create(json.loads(body))).encode())
        elif parts[1] == "validate-yaml":
            self.answer(200, b'{"errors": [], "warnings": []}')
        elif parts[4] == "branch":
            revisions = self.local.repos["/".join(parts[2:4])]
            revisions.setdefault(unquote(parts[5]), dict(revisions["main"]))
            self.answer(200, b"{}")
        elif parts[4] == "preupload":
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in _files(body)]
            self.answer(200, json.dumps({"files": files}).encode())
        else:
            self.commit("/".join(parts[2:4]), unquote(parts[5]), body, "create_pr=1" in query)

    def create(self, given: dict) -> dict:
        self.local.created.append(given)
        repo = f"{given['organization'] or 'me'}/{given['name']}"
        if repo not in self.local.repos:
            self.local.put(repo, "", file=".gitattributes")
        return {"url": f"{self.local.url}/{repo}"}

    def commit(self, repo: str, revision: str, body: bytes, pull_request: bool) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        target = "refs/pr/1" if pull_request else revision
        self.local.repos[repo].setdefault(target, dict(self.local.repos[repo][revision]))
        for line in lines[1:]:
            content = base64.b64decode(line["value"]["content"]).decode()
            oid = self.local.put(repo, content, target, line["value"]["path"])
        said = (repo, revision, dict(self.headers), lines[0]["value"]["summary"], pull_request)
        self.local.commits.append(said)
        found = {"commitOid": oid, "commitUrl": f"{self.local.url}/{repo}/commit/{oid}"}
        if pull_request:
            found["pullRequestUrl"] = f"{self.local.url}/{repo}/discussions/1"
        self.answer(200, json.dumps(found).encode())


def _files(body: bytes) -> list[dict]:
    return json.loads(body)["files"]
