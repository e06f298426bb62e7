"""A real MLflow server, and an HTTP proxy before it that loses, delays or replaces answers."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# What the proxy does with a request: pass it on; pass it on and close the connection instead of answering; answer 500
# with a text; close the connection; or wait some seconds and pass it on.
PASS, LOSE, FAIL, REFUSE = "pass", "lose", "fail", "refuse"
DISK_FULL = (
    b'{"error_code": "INTERNAL_ERROR", "message": "(sqlite3.OperationalError) database or disk is full"}'
)


class Server:
    """`mlflow server` on a database of its own.

    Args:
        directory: for the database and the artifacts.
        store: URI of the database; None: sqlite.
    """

    def __init__(self, directory: Path, store: str | None = None) -> None:
        self.directory = directory
        self.store = store or f"sqlite:///{directory}/server.db"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.directory / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(
                        sys.executable,
                        "-m",
                        "mlflow",
                        "server",
                        "--host",
                        "127.0.0.1",
                        "--port",
                        str(self.port),
                    ),
                    *("--workers", "1", "--backend-store-uri", self.store),
                    *("--artifacts-destination", str(self.directory / "artifacts")),
                ],
                # Without the queues of MLflow's GenAI jobs: eight more processes, which start before it answers.
                env=os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        self.stop()
        raise AssertionError((self.directory / "server.log").read_text()[-2000:])

    def stop(self) -> None:
        """End it, with all its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Proxy:
    """Passes requests on to a server.

    Args:
        port: of the server.

    Attributes:
        uri: of the proxy.
        behave: called with the path of each request; returns what to do with it, a number being seconds of delay.
        paths: of all requests, such as "runs/create".
    """

    def __init__(self, port: int) -> None:
        self.behave: Callable[[str], str | float] = lambda path: PASS
        self.paths: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0].rpartition("/mlflow/")[2]
                proxy.paths.append(path)
                what = proxy.behave(path)
                if what == REFUSE:
                    return
                if what == FAIL:
                    self._answer(500, DISK_FULL)
                    return
                if isinstance(what, float | int):
                    time.sleep(what)
                server = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                content = answer.read()
                server.close()
                if what != LOSE:
                    self._answer(answer.status, content)

            def _answer(self, status: int, content: bytes) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except ConnectionError:  # the client did not wait
                    pass

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """End it."""
        self._server.shutdown()
        self._server.server_close()


def once(path: str, what: str | float) -> Callable[[str], str | float]:
    """A behaviour: `what` for the first request to `path`, then pass on."""
    left = [what]
    return lambda found: left.pop() if found == path and left else PASS
