"""A stand-in for the hub on this machine: as much of its HTTP interface as huggingface_hub uses to upload to it and to load from it."""
import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import yaml

SHA = "a" * 40


class Hub:
    "Repositories in memory. `tokens`: token -> (user, organisations, role)."
    def __init__(self, tokens):
        self.tokens, self.repos, self.large, self.seen, self.faults, self.protected = tokens, {}, {}, [], [], set()
        hub = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *args): pass
            def do_GET(self): hub.answer(self)
            do_POST = do_PUT = do_HEAD = do_GET
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self): self.server.shutdown(); self.server.server_close()
    def fail(self, path, status, times=1): self.faults.append([path, status, times])
    def paths(self, pattern): return [p for m, p in self.seen if re.search(pattern, f"{m} {p}")]

    def answer(self, request):
        length = int(request.headers.get("Content-Length") or 0)
        body, url = request.rfile.read(length), urlparse(request.path)
        path, token = unquote(url.path), (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.seen.append((request.command, path))
        for fault in self.faults:
            if fault[2] and re.search(fault[0], f"{request.command} {path}"):
                fault[2] -= 1
                return self.send(request, fault[1], {"error": f"made to fail, {token}"})
        for pattern, handle in self.routes:
            if found := re.fullmatch(pattern, f"{request.command} {path}"):
                if not path.startswith("/lfs/") and token not in self.tokens: return self.send(request, 401, {"error": "Invalid credentials"})
                return self.send(request, *handle(self, token, body, *found.groups()))
        self.send(request, 404, {"error": f"no route for {request.command} {path}"})

    def send(self, request, status, content, headers={}):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.send_response(status)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **headers}.items(): request.send_header(name, str(value))
        request.end_headers()
        if request.command != "HEAD": request.wfile.write(data)

    def may_write(self, token, repo):
        user, organisations, role = self.tokens[token]
        return role == "write" and repo.split("/")[0] in (user, *organisations) and repo not in self.protected

    def whoami(self, token, body):
        user, organisations, role = self.tokens[token]
        return 200, {"type": "user", "name": user, "orgs": [{"name": o} for o in organisations], "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": role}}}

    def create(self, token, body):
        asked = json.loads(body)
        repo = f"{asked['organization'] or self.tokens[token][0]}/{asked['name']}"
        if repo in self.repos: return 409, {"error": "You already created this model repo", "url": f"{self.url}/{repo}"}
        if not self.may_write(token, repo): return 403, {"error": f"You don't have the rights to create a model under the namespace \"{repo.split('/')[0]}\""}
        self.repos[repo] = {"private": asked.get("visibility") == "private" or asked.get("private") is True, "files": {}, "commits": 0}
        return 200, {"url": f"{self.url}/{repo}"}

    def check_write(self, token, body, repo):
        if repo not in self.repos: return 404, {"error": "Repository not found"}
        return (200, {}) if self.may_write(token, repo) else (403, {"error": "no write access"})

    def info(self, token, body, repo):
        if repo not in self.repos: return 404, {"error": "Repository not found"}
        return 200, {"id": repo, "sha": SHA, "private": self.repos[repo]["private"], "tags": [], "siblings": [{"rfilename": f} for f in self.repos[repo]["files"]]}

    def tree(self, token, body, repo, folder):
        files = self.repos[repo]["files"]
        if folder: return 404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"}
        return 200, [{"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for p, d in files.items()]

    def validate(self, token, body):
        "What the hub is known to refuse in a card's front matter."
        text = json.loads(body)["content"]
        found, wrong = re.match(r"---\n([\s\S]*?)\n---(\n|$)", text), []
        data = yaml.safe_load(found[1]) if found else {}
        for field in ("base_model", "datasets"):
            for name in [data.get(field, [])] if isinstance(data.get(field), str) else data.get(field, []):
                if not re.fullmatch(r"([\w-][\w.-]*/)?[\w.-]+", name): wrong.append(f'"{field}" with value "{name}" is not valid. Use an id.')
        return (400, {"errors": [{"message": m} for m in wrong], "warnings": []}) if wrong else (200, {"errors": [], "warnings": []})

    def preupload(self, token, body, repo):
        files = self.repos[repo]["files"]
        def mode(f): return "lfs" if f["path"].endswith((".safetensors", ".bin", ".model")) or f["size"] > 10 * 2**20 else "regular"
        def oid(f):
            if f["path"] not in files: return None
            data = files[f["path"]]
            return hashlib.sha256(data).hexdigest() if mode(f) == "lfs" else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return 200, {"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False, "oid": oid(f)} for f in json.loads(body)["files"]]}

    def batch(self, token, body, repo):
        objects = [{"oid": o["oid"], "size": o["size"], **({} if o["oid"] in self.large else {"actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}?X-Amz-Signature=signed"}}})} for o in json.loads(body)["objects"]]
        return 200, {"transfer": "basic", "objects": objects}

    def put(self, token, body, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self.large[oid] = body
        return 200, {}

    def commit(self, token, body, repo):
        if not self.may_write(token, repo): return 403, {"error": "no write access"}
        files = dict(self.repos[repo]["files"])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file": files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile": files[value["path"]] = self.large[value["oid"]]
            if line["key"] == "deletedFile": del files[value["path"]]
        self.repos[repo].update(files=files, commits=self.repos[repo]["commits"] + 1)
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{SHA}", "commitOid": SHA, "pullRequestUrl": None}

    def resolve(self, token, body, repo, name):
        files = self.repos[repo]["files"] if repo in self.repos else {}
        if name not in files: return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        return 200, files[name], {"X-Repo-Commit": SHA, "ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "Content-Type": "application/octet-stream"}

    routes = [(r"GET /api/whoami-v2", whoami), (r"POST /api/repos/create", create), (r"GET /api/models/(\w[\w.-]*/[\w.-]+)/auth-check/write", check_write), (r"POST /api/validate-yaml", validate),
              (r"GET /api/models/(\w[\w.-]*/[\w.-]+)/tree/\w+(/.*)?", tree), (r"POST /api/models/(\w[\w.-]*/[\w.-]+)/preupload/main", preupload), (r"POST /(\w[\w.-]*/[\w.-]+)\.git/info/lfs/objects/batch", batch),
              (r"PUT /lfs/(\w+)", put), (r"POST /api/models/(\w[\w.-]*/[\w.-]+)/commit/main", commit), (r"GET /api/models/(\w[\w.-]*/[\w.-]+)(?:/revision/\w+)?", info),
              (r"(?:GET|HEAD) /(\w[\w.-]*/[\w.-]+)/resolve/\w+/(.+)", resolve)]
