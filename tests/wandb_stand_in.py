"""A fake W&B server on loopback, which records what the real client sends."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "feedfacefeedfacefeedfacefeedfacefeedface"
"""Recognisable, with the length of a real key."""

ENTITY = "someone"


@dataclass
class StoredRun:
    """A stored run: its latest fields, and the lines of its history."""

    fields: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


@dataclass
class Trial:
    """A trial of a sweep.

    Args:
        run_id: Id of its W&B run.
        settings: Its parameters.
        stops_after: Rows of its history after which its agent is asked to stop it; `None`: never.
        is_given: Whether an agent has got it.
    """

    run_id: str
    settings: dict[str, Any]
    stops_after: int | None = None
    is_given: bool = False


@dataclass
class StandIn:
    """The state of the server: everything that clients have sent.

    Args:
        url: The value for `WANDB_BASE_URL`.
        operations: Name and variables of every GraphQL request, in order.
        runs: The runs by id.
        views: Saved workspaces and reports, in order of creation.
        artifacts: Type and collection of every artifact.
        projects: The existing projects.
        sweeps: The configs of the sweeps, as YAML, by id.
        trials: Commands for the agents of sweeps: each heartbeat takes the first one whose turn it is.
        preempting: Ids of the runs that were marked as preempting.
    """

    url: str
    operations: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    runs: dict[str, StoredRun] = field(default_factory=dict)
    views: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[tuple[str, str]] = field(default_factory=list)
    projects: tuple[str, ...] = ("comparison",)
    sweeps: dict[str, str] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    preempting: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Record a GraphQL request and answer it."""
        named = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = named[1] if named else ""
        self.operations.append((name, variables))
        answer = getattr(self, f"_answer_{_snake(name)}", None)
        return answer(variables) if answer else _nothing(query)

    def _answer_viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": _viewer()}

    def _answer_get_viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": _viewer()}

    def _answer_get_default_entity(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": _viewer()}

    def _answer_server_features_query(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _answer_upsert_bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        is_new = variables["name"] not in self.runs
        run = self.runs.setdefault(variables["name"], StoredRun())
        run.fields |= {key: value for key, value in variables.items() if value is not None}
        bucket = self._bucket(variables["name"]) | {"project": _project(run.fields["project"])}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _answer_run_resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = variables["name"] in self.runs
        bucket = self._bucket(variables["name"]) if known else None
        return {"model": _project(variables["project"]) | {"bucket": bucket}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        return {
            "id": f"id-{name}",
            "name": name,
            "displayName": run.fields.get("displayName"),
            "description": None,
            "sweepName": None,
            "notes": None,
            "tags": run.fields.get("tags") or [],
            "config": run.fields.get("config") or "{}",
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.lines),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(run.lines[-1:]),
            "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": 1}),
        }

    def _answer_create_run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
        return {
            "createRunFiles": {"runID": f"id-{variables['run']}", "uploadHeaders": [], "files": files}
        }

    def _answer_create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        asked = variables["input"]
        name = asked["artifactCollectionName"]
        self.artifacts.append((asked["artifactTypeName"], name))
        sequence = {"id": name, "name": name, "latestArtifact": None}
        artifact = {"id": f"artifact-{name}", "state": "PENDING", "artifactSequence": sequence}
        return {"createArtifact": {"artifact": artifact}}

    def _answer_create_artifact_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "file", "uploadUrl": f"{self.url}/upload", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}

    def _answer_update_artifact_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "file", "uploadUrl": f"{self.url}/upload", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": "manifest", "file": file}}}

    def _answer_create_artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = [
            {
                "storagePath": file["name"],
                "uploadUrl": f"{self.url}/upload",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in variables["input"]["artifactFiles"]
        ]
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _answer_commit_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "digest"}}}

    def _answer_upsert_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self._upsert(variables)

    def _answer_upsert_view2(self, variables: dict[str, Any]) -> dict[str, Any]:
        return self._upsert(variables)

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = next((view for view in self.views if view["id"] == variables.get("id")), None)
        if known is None:
            known = {"id": f"view{len(self.views)}"}
            self.views.append(known)
        known |= {key: value for key, value in variables.items() if key != "id"}
        view = {
            **known,
            "project": _project(known["projectName"]),
            "updatedAt": _TIME,
            "createdAt": _TIME,
        }
        return {"upsertView": {"view": view, "inserted": True}}

    def _answer_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        if variables["name"] not in self.projects:
            return {"project": None}
        edges = self._edges(variables["viewType"], variables["viewName"])
        return {"project": {"allViews": {"edges": edges}}}

    def _answer_project_views(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = self._edges(variables.get("viewType", "runs"))
        page = {"endCursor": None, "hasNextPage": False}
        views = {"edges": edges, "pageInfo": page, "totalCount": len(edges)}
        return {"project": _project(variables["project"]) | {"allViews": views}}

    def _answer_project_internal_id(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": _project(variables["projectName"])}

    def _answer_get_projects(self, variables: dict[str, Any]) -> dict[str, Any]:
        more = {"createdAt": _TIME, "isBenchmark": False, "user": _viewer()}
        page = {"endCursor": None, "hasNextPage": False}
        nodes = [{"node": _project(project) | more} for project in self.projects]
        return {"models": {"edges": nodes, "pageInfo": page}}

    def _answer_upsert_sweep(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = f"sweep{len(self.sweeps)}"
        self.sweeps[name] = variables["config"]
        sweep = {"name": name, "project": _project(variables["projectName"])}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _answer_sweep_with_runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["sweep"]
        sweep = {"id": name, "name": name, "config": self.sweeps[name], "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def _answer_create_agent(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": f"agent-{variables['sweep']}"}}}

    def _answer_heartbeat(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Give an agent that trains nothing its next trial, and stop the one that is to be stopped."""
        commands: list[dict[str, Any]] = []
        running = json.loads(variables["runState"])
        for name in running:
            stops_after = next(trial.stops_after for trial in self.trials if trial.run_id == name)
            lines = len(self.runs[name].lines) if name in self.runs else 0
            if stops_after is not None and lines >= stops_after:
                commands.append({"type": "stop", "run_id": name})
        waiting = [trial for trial in self.trials if not trial.is_given]
        if not running and waiting:
            waiting[0].is_given = True
            settings = {key: {"value": value} for key, value in waiting[0].settings.items()}
            run = {"type": "run", "run_id": waiting[0].run_id, "args": settings, "program": "maml"}
            commands.append(run)
        return {"agentHeartbeat": {"agent": {"id": variables["id"]}, "commands": json.dumps(commands)}}

    def _edges(self, kind: str, name: str | None = None) -> list[dict[str, Any]]:
        return [
            {"node": {**view, "project": _project(view["projectName"])}, "cursor": view["id"]}
            for view in self.views
            if view["type"] == kind and name in (None, view["name"])
        ]

    def add_lines(self, name: str, files: dict[str, Any]) -> None:
        """Store a part of a run's stream at the offset that the client gives."""
        run = self.runs.setdefault(name, StoredRun())
        if history := files.get("wandb-history.jsonl"):
            start = history["offset"]
            run.lines[start : start + len(history["content"])] = history["content"]
        if summary := files.get("wandb-summary.json"):
            run.summary = json.loads(summary["content"][-1])


_TIME = "2026-01-01T00:00:00"


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def _viewer() -> dict[str, Any]:
    teams = {"edges": [{"node": {"name": ENTITY}}]}
    person = {"id": "person", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "a@b.c"}
    return {**person, "flags": "{}", "teams": teams, "admin": False, "deletedAt": None, "apiKeys": None}


def _project(name: str) -> dict[str, Any]:
    entity = {"id": ENTITY, "name": ENTITY}
    return {"id": "project", "internalId": "17", "name": name, "entityName": ENTITY, "entity": entity}


def _nothing(query: str) -> dict[str, Any]:
    """Answer an unknown request with null."""
    top = re.search(r"\{\s*(\w+)", query)
    return {top[1]: None} if top else {}


class QuietServer(ThreadingHTTPServer):
    """A server that ignores disconnecting clients."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing."""


def at(server: StandIn) -> dict[str, str]:
    """Return the environment variables that connect W&B's client to a server."""
    return {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": API_KEY}


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve on a free loopback port until the context ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply(200, {})

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._reply(200, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
            if not self._is_known():
                self._reply(401, {"errors": [{"message": "permission denied"}]})
                return
            with server_state.lock:
                if self.path == "/graphql":
                    self._reply(
                        200, {"data": server_state.answer(body["query"], body.get("variables") or {})}
                    )
                elif match := re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                    server_state.add_lines(match[1], body.get("files") or {})
                    if body.get("preempting"):
                        server_state.preempting.add(match[1])
                    self._reply(200, {})
                else:
                    self._reply(404, {})

        def _is_known(self) -> bool:
            kind, _, secret = (self.headers.get("Authorization") or "").partition(" ")
            return kind == "Basic" and base64.b64decode(secret).decode() == f"api:{API_KEY}"

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Keep the terminal clean."""

    server = QuietServer(("127.0.0.1", 0), Handler)
    server_state = StandIn(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server_state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
