"""As much of a W&B server as a run needs, which can be lost in the middle.

wandb_server.py: serves, and prints where.
wandb_server.py FOLDER CASE: logs to such a server, loses it (CASE "server") or W&B's own process
("core"), logs on, finishes.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            answer = {"data": self.data(asked["query"], asked["variables"])}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def data(self, query: str, variables: dict) -> dict:
        if "UpsertBucket" in query:
            print(f"run {variables['name']} of group {variables['groupName']}", file=sys.stderr)
            project = {"id": "a", "name": "clipsae", "entity": {"id": "b", "name": "me"}}
            bucket = {"id": "c", "name": variables["name"], "displayName": "x", "config": "{}"}
            return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": self.server.url} for name in variables["files"]]
            return {"createRunFiles": {"runID": "c", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "d", "entity": "me", "username": "me", "flags": "{}"}}
        return {"model": None}


def children(name: str) -> list[int]:
    """Processes of that name that this one started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # ended meanwhile
            continue
        parent = int(text.rpartition(")")[2].split()[1])
        if parent == os.getpid() and name in text:
            found.append(int(stat.parent.name))
    return found


def serve() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    print(server.url, flush=True)
    server.serve_forever()


def main(folder: str, case: str) -> None:
    server = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        lose(folder, case, server)
    finally:  # it holds our output open
        server.kill()


def lose(folder: str, case: str, server: subprocess.Popen) -> None:
    url = server.stdout.readline().strip()
    os.environ.update(WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40)
    for name in ("WANDB_MODE", "WANDB_SERVICE"):  # (the process of W&B that the tests may have)
        os.environ.pop(name, None)
    logging.basicConfig()

    from clipsae.training.logging import finish, log_results, wandb_logger

    logger = wandb_logger(
        project="clipsae",
        entity=None,
        mode="online",
        group="g",
        tags=[],
        name="n",
        run_id="r1",
        job_type="experiment",
        run_config={},
        folder=Path(folder),
        run_folder=Path(folder),
        finish_timeout=2,
    )
    print("offline" if logger.experiment.offline else "online", flush=True)
    logger.log_metrics({"train/loss": 1.0}, step=1)
    if case == "server":
        server.kill()
    else:
        for pid in children("wandb-core"):
            os.kill(pid, signal.SIGKILL)
    for step in range(2, 300):
        logger.log_metrics({"train/loss": 1.0 / step}, step=step)
    log_results(
        logger, [{"dataset": "a", "setting": "on", "n": 5, "accuracy": 50.0}], {"topn/on_5": 50.0}
    )
    finish(logger, failed=False)
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else serve()
