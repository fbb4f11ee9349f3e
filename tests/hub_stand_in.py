"""A Hugging Face hub of one's own: the endpoints that an upload and a download use, in memory, on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class Hub(BaseHTTPRequestHandler):
    """Repositories of regular files; each commit keeps all of its files."""

    repositories: ClassVar[dict[str, list[tuple[str, dict[str, bytes]]]]] = {}  # name -> (commit, files), oldest first
    cards: ClassVar[list[str]] = []  # that were to be validated
    private: ClassVar[dict[str, bool]] = {}

    def log_message(self, *_):
        pass

    def reply(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline(), 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def version(self, name, revision):
        versions = self.repositories.get(name, [])
        if revision == "main":
            return versions[-1] if versions else None
        return next((v for v in versions if v[0] == revision), None)

    def do_POST(self):
        body, path = self.body(), self.path.partition("?")[0]
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            if name in self.repositories:
                return self.reply({"error": "exists", "url": f"http://{self.headers['Host']}/{name}"}, 409)
            self.repositories[name] = [(hashlib.sha1(name.encode()).hexdigest(), {".gitattributes": b""})]
            self.private[name] = wanted.get("private") or wanted.get("visibility") == "private"
            return self.reply({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return self.reply({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [f["path"] for f in json.loads(body)["files"]]
            return self.reply({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            files = dict(self.repositories[found[1]][-1][1])
            for operation in map(json.loads, body.splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "deletedFile":
                    del files[value["path"]]
            commit = hashlib.sha1(body).hexdigest()
            self.repositories[found[1]].append((commit, files))
            return self.reply(
                {"success": True, "commitOid": commit, "commitUrl": f"http://{self.headers['Host']}/{found[1]}/commit/{commit}"}
            )
        return self.reply({"error": path}, 404)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            version = self.version(found[1], found[2] or "main")
            if version is None:
                return self.reply({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in version[1]]
            return self.reply({"id": found[1], "sha": version[0], "siblings": siblings, "private": False})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            version = self.version(found[1], found[2])
            if version is None:
                return self.reply({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            listed = [(k, len(v), hashlib.sha1(v).hexdigest()) for k, v in version[1].items()]
            return self.reply([{"type": "file", "path": k, "size": size, "oid": oid} for k, size, oid in listed])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            version = self.version(found[1], found[2])
            if version is None or found[3] not in version[1]:
                return self.reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            content = version[1][found[3]]
            told = {"X-Repo-Commit": version[0], "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            return self.reply(content, headers=told)
        return self.reply({"error": path}, 404)

    do_HEAD = do_GET


def start():
    """A hub in a thread; returns its address and the class that holds its state."""
    kind = type("OwnHub", (Hub,), {"repositories": {}, "cards": [], "private": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", kind
