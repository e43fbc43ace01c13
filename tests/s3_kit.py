"""A real S3 server on loopback, with faults on demand; and what lies in a bucket, read without the code under test."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3 import models
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Environ = dict[str, Any]
Fault = Callable[[Environ], "tuple[str, str] | None"]
"""Looks at (and may change) a request; answers it with a status line and an error code, or lets it pass."""

logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request would bury what a test has to say

_NUMBERS = itertools.count()


class S3Server:
    """Moto's server in a thread of this process; other processes reach it too."""

    def __init__(self) -> None:
        self._app = _in_turn(DomainDispatcherApplication(create_backend_app))
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        """Method, path and query of each."""
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def _answer(self, environ: Environ, start_response: Any) -> Iterable[bytes]:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}")
        for fault in list(self.faults):
            refused = fault(environ)
            if refused is not None:
                status, code = refused
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response(status, [("Content-Type", "application/xml")])
                return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]
        return self._app(environ, start_response)

    @contextlib.contextmanager
    def running(self) -> Iterator[S3Server]:
        """Serve, with this process' AWS_* variables set for it."""
        self._thread.start()
        variables = {
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        try:
            with mock.patch.dict(os.environ, variables):
                yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    @contextlib.contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Have each request go past ``fault`` first."""
        self.faults.append(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)

    @functools.cached_property
    def client(self) -> Any:
        """A plain boto3 client."""
        return boto3.client("s3", endpoint_url=self.url)

    def bucket(self, *, versioned: bool = False, lock: bool = False) -> str:
        """Make a bucket that nobody has used."""
        name = f"bucket-{os.getpid()}-{next(_NUMBERS)}"
        self.client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=lock)
        if versioned:
            self.client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name


def _in_turn(app: Any) -> Callable[[Environ, Any], Iterable[bytes]]:
    """Requests take effect one after the other, and whole: Moto's threads would lose puts to one key at once.

    Of one whose sender has died half-way nothing happens, as in S3.
    """
    turn = threading.Lock()

    def answer(environ: Environ, start_response: Any) -> Iterable[bytes]:
        expected = int(environ.get("CONTENT_LENGTH") or 0)
        try:
            body = environ["wsgi.input"].read(expected) if expected else b""
        except OSError:
            body = b""
        if len(body) < expected:
            start_response("400 Bad Request", [("Content-Type", "application/xml")])
            return [b"<Error><Code>IncompleteBody</Code><Message>no</Message></Error>"]
        with turn:
            if expected:
                environ["wsgi.input"] = io.BytesIO(body)
            found: Iterable[bytes] = app(environ, start_response)
            return found

    return answer


def ignores_conditions(environ: Environ) -> None:
    """A server that doesn't look at preconditions."""
    environ.pop("HTTP_IF_NONE_MATCH", None)


def refuses(
    method: str, *, query: str = "", path: str = "", status: str = "403 Forbidden", code: str = "AccessDenied"
) -> Fault:
    """A server that answers some requests with an error."""

    def fault(environ: Environ) -> tuple[str, str] | None:
        wanted = environ["REQUEST_METHOD"] == method and path in environ["PATH_INFO"]
        return (status, code) if wanted and query in environ.get("QUERY_STRING", "") else None

    return fault


def everything(server: S3Server, bucket: str, prefix: str = "") -> dict[tuple[str, str], bytes | None]:
    """Every version of every object, by key and version; None for a delete marker."""
    found: dict[tuple[str, str], bytes | None] = {}
    client = server.client
    for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
        for item in page.get("Versions", []):
            got = client.get_object(Bucket=bucket, Key=item["Key"], VersionId=item["VersionId"])
            found[item["Key"], item["VersionId"]] = got["Body"].read()
        found |= {(item["Key"], item["VersionId"]): None for item in page.get("DeleteMarkers", [])}
    return found


@dataclass(frozen=True)
class Kept:
    """Something that a bucket holds."""

    key: str
    id: str
    """Of the version, or of the unfinished upload."""
    kind: str
    """``visible``, ``older``, ``marker`` or ``upload``."""
    content: bytes


def kept(bucket: str) -> list[Kept]:
    """All that the server in this process holds of a bucket, from its memory: parts of uploads can't be asked for."""
    store = models.s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket]
    found = []
    for key, versions in store.keys.lists():
        for version in versions:
            marker = isinstance(version, models.FakeDeleteMarker)
            kind = "marker" if marker else "visible" if version is versions[-1] else "older"
            found.append(Kept(key, version.version_id, kind, b"" if marker else version.value))
    for upload in store.multiparts.values():
        parts = b"".join(upload.parts[number].value for number in sorted(upload.parts))
        found.append(Kept(upload.key_name, upload.id, "upload", parts))
    return found


def uploads(server: S3Server, bucket: str) -> list[str]:
    """Keys of unfinished uploads."""
    return [item["Key"] for item in server.client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])]
