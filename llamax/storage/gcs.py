"""Google Cloud Storage through its own library, which finds credentials as everywhere: `gcloud auth
application-default login`, GOOGLE_APPLICATION_CREDENTIALS, a machine's service account; STORAGE_EMULATOR_HOST for none.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import requests
from google.api_core import exceptions as answers
from google.auth import exceptions as auth
from google.cloud import storage
from requests.adapters import HTTPAdapter

from llamax.storage.bucket import ABSENT, Conflict, Missing, Object, Reply, StorageError

TIMEOUT = (5, 20)  # seconds to connect, and between two answers
KEYS = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
GONE = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, auth.TransportError)


class GCS:
    """A bucket of Google Cloud Storage (`llamax.storage.bucket.Client`). A version is the object's generation."""

    def __init__(self, name: str) -> None:
        self._name = name
        try:  # objects belong to no project, but the client wants a name
            api = storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "llamax"))
        except auth.DefaultCredentialsError:
            raise StorageError(f"gs://{name}: no credentials for Google Cloud Storage; {KEYS}") from None
        for scheme in ("http://", "https://"):
            api._http.mount(scheme, HTTPAdapter(pool_maxsize=32))  # copies.py asks from sixteen threads
        self._bucket = api.bucket(name)

    def list(self, prefix: str) -> list[Object]:
        found = self._bucket.client.list_blobs(self._bucket, prefix=prefix, timeout=TIMEOUT, retry=None)
        return [_described(blob) for blob in found]

    def read(self, key: str) -> tuple[bytes, str]:
        blob = self._bucket.blob(key)
        data = blob.download_as_bytes(timeout=TIMEOUT, retry=None)
        return data, str(blob.generation)

    def stat(self, key: str) -> Object:
        blob = self._bucket.blob(key)
        blob.reload(timeout=TIMEOUT, retry=None)
        return _described(blob)

    def write(self, key: str, data: bytes, expect: str | None) -> Object:
        blob = self._bucket.blob(key)
        match = None if expect is None else 0 if expect == ABSENT else int(expect)
        blob.upload_from_string(data, if_generation_match=match, timeout=TIMEOUT, retry=None)
        return _described(blob)

    def upload(self, key: str, path: Path) -> None:
        self._bucket.blob(key).upload_from_filename(str(path), timeout=TIMEOUT, retry=None)

    def download(self, key: str, path: Path) -> None:
        self._bucket.blob(key).download_to_filename(str(path), timeout=TIMEOUT, retry=None)

    def delete(self, key: str) -> None:
        try:
            self._bucket.blob(key).delete(timeout=TIMEOUT, retry=None)
        except answers.NotFound as error:
            if self._no_bucket(error):
                raise

    def meaning(self, error: Exception) -> Reply | None:
        if isinstance(error, answers.PreconditionFailed):
            return Reply(Conflict)
        if isinstance(error, answers.NotFound):
            if self._no_bucket(error):
                return Reply(StorageError, f"there is no bucket {self._name}; create it, or correct the address")
            return Reply(Missing)
        if isinstance(error, auth.DefaultCredentialsError | auth.RefreshError):
            return Reply(StorageError, f"the credentials are refused ({error}); {KEYS}")
        if isinstance(error, answers.Unauthorized | answers.Forbidden):
            return Reply(StorageError, f"permission denied ({error.code}); give this account access to {self._name}")
        if isinstance(error, GONE):
            return Reply(StorageError, f"no answer ({type(error).__name__})", True)
        if isinstance(error, answers.GoogleAPICallError):
            passing = error.code is None or error.code >= 500 or error.code in (408, 429)
            return Reply(StorageError, f"{error.code} {error.message}", passing)
        return None

    def _no_bucket(self, error: Any) -> bool:
        """Whether a 404 is about the bucket: uploads and listings name no object that could be missing."""
        url = str(getattr(error.response, "url", "") if getattr(error, "response", None) is not None else "")
        if "/o/" in url:
            return "specified bucket" in str(error).lower()
        return True


def _described(blob: Any) -> Object:
    return Object(blob.name, int(blob.size or 0), str(blob.generation), blob.updated.timestamp())
