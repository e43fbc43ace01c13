"""What object storage and its two libraries say when something is wrong, in words that say what to do.

The libraries' own texts are never passed on: they hold addresses, and may hold more.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from sisa.errors import BusyError, SisaError, StoreError

AGAIN = "Run the command again: what was done is kept, and nothing half-written is used."
DENIED = (
    "The credentials need s3:GetObject, PutObject, DeleteObject, DeleteObjectVersion, AbortMultipartUpload on the "
    "prefix and s3:ListBucket, ListBucketVersions, ListBucketMultipartUploads on the bucket."
)
_BUSY = re.compile(r"SlowDown|ServiceUnavailable|TooManyRequests|Throttl|\b(429|503)\b")
_SLOW = re.compile(r"timed out|TimedOut|kind: Timeout|(Read|Connect)Timeout")
_DENIED = re.compile(r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|\b(401|403)\b")
_UNREACHABLE = re.compile(r"error sending request|connect|dns|EndpointConnection", re.IGNORECASE)
_STATUS = re.compile(r"status code: (\d{3})")


class DeniedError(StoreError):
    """The credentials may not do what has to be done."""


@contextlib.contextmanager
def told(what: str, where: str) -> Iterator[None]:
    """Turn what the libraries raise into errors of ours; a ``FileNotFoundError`` stays what it is.

    Args:
        what: What was being done ("read", "erase").
        where: The URI of what it was done to.
    """
    try:
        yield
    except (BaseError, BotoCoreError, ClientError) as error:
        raise _meaning(error, what, where) from None  # its text, and so its trace, may hold more than an address
    except TimeoutError as error:
        raise _meaning(error, what, where) from None
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise _meaning(error, what, where) from None
        raise


def _meaning(error: Exception, what: str, where: str) -> SisaError:
    text = f"{type(error).__name__} {error}"
    head = f"object storage: can't {what} {where}"
    if "NoSuchBucket" in text:  # a whole store is missing, not one object
        return StoreError(f"{head}: there is no such bucket", hint="Make the bucket; check region and endpoint.")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | NoCredentialsError) or _DENIED.search(text):
        return DeniedError(f"{head}: access denied", hint=DENIED)
    if _BUSY.search(text):
        return BusyError(f"{head}: the server asks for fewer requests, again and again", hint=AGAIN)
    if _SLOW.search(text):
        return BusyError(f"{head}: no answer in time", hint=AGAIN)
    if _UNREACHABLE.search(text):
        return StoreError(
            f"{head}: the server can't be reached", hint=f"Check AWS_ENDPOINT_URL, AWS_REGION and the network. {AGAIN}"
        )
    status = _STATUS.search(text)
    answer = f"the server answered with status {status[1]}" if status else f"it failed ({type(error).__name__})"
    return StoreError(f"{head}: {answer}", hint=AGAIN)
