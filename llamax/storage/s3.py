"""S3 through boto3, which finds credentials, region and endpoint as everywhere: AWS_PROFILE, AWS_ENDPOINT_URL, ..."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore import exceptions as aws
from botocore.config import Config

from llamax.storage.bucket import ABSENT, Conflict, Missing, Object, Reply, StorageError

# copies.py asks from sixteen threads, and a transfer from ten more. What is tried again is bucket.py's to say; but of a
# large file each part is, so that one lost part does not cost the others.
CONFIG = Config(connect_timeout=5, read_timeout=20, max_pool_connections=32, retries={"total_max_attempts": 1})
PARTS = CONFIG.merge(Config(retries={"total_max_attempts": 4, "mode": "standard"}))
KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
PASSING = {"SlowDown", "Throttling", "RequestTimeout", "RequestTimeTooSkewed", "ConditionalRequestConflict"}
GONE = (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError, aws.ResponseStreamingError)


class S3:
    """A bucket of S3, or of anything that speaks its protocol with conditional writes (`llamax.storage.bucket.Client`).

    A version is the ETag: two writes of the same bytes have one, so what beats must change its text.
    """

    def __init__(self, name: str) -> None:
        self._name, session = name, boto3.session.Session()
        self._api, self._transfer = (session.client("s3", config=config) for config in (CONFIG, PARTS))

    def list(self, prefix: str) -> list[Object]:
        pages = self._api.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=prefix)
        return [
            Object(item["Key"], item["Size"], item["ETag"], item["LastModified"].timestamp())
            for page in pages
            for item in page.get("Contents", ())
        ]

    def read(self, key: str) -> tuple[bytes, str]:
        answer = self._api.get_object(Bucket=self._name, Key=key)
        return answer["Body"].read(), answer["ETag"]

    def stat(self, key: str) -> Object:
        answer = self._api.head_object(Bucket=self._name, Key=key)
        return Object(key, answer["ContentLength"], answer["ETag"], answer["LastModified"].timestamp())

    def write(self, key: str, data: bytes, expect: str | None) -> Object:
        how: dict[str, str] = (
            {} if expect is None else {"IfNoneMatch": "*"} if expect == ABSENT else {"IfMatch": expect}
        )
        answer = self._api.put_object(Bucket=self._name, Key=key, Body=data, **how)
        return Object(key, len(data), answer["ETag"], 0.0)

    def upload(self, key: str, path: Path) -> None:
        self._transfer.upload_file(str(path), self._name, key)

    def download(self, key: str, path: Path) -> None:
        self._transfer.download_file(self._name, key, str(path))

    def delete(self, key: str) -> None:
        self._api.delete_object(Bucket=self._name, Key=key)

    def meaning(self, error: Exception) -> Reply | None:
        if isinstance(error, Boto3Error) and isinstance(error.__context__, Exception):
            error = error.__context__  # a transfer wraps what ended it
        if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError | aws.CredentialRetrievalError):
            return Reply(StorageError, f"no credentials for S3; {KEYS}")
        if isinstance(error, GONE):
            return Reply(StorageError, f"no answer ({type(error).__name__}) from {self._api.meta.endpoint_url}", True)
        if isinstance(error, aws.ClientError):
            return self._answered(error)
        return Reply(StorageError, str(error)) if isinstance(error, aws.BotoCoreError | Boto3Error) else None

    def _answered(self, error: Any) -> Reply:
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return Reply(StorageError, f"there is no bucket {self._name}; create it, or correct the address")
        if status == 412:
            return Reply(Conflict)
        if status == 404:
            return Reply(Missing)
        if code in WRONG_KEYS:
            return Reply(StorageError, f"the credentials are refused ({code}); {KEYS}")
        if status in (401, 403):
            return Reply(StorageError, f"permission denied ({code}); give these credentials access to {self._name}")
        passing = status >= 500 or status in (408, 429) or code in PASSING
        return Reply(StorageError, f"{code} {error.response.get('Error', {}).get('Message', '')}".strip(), passing)
