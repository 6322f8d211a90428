"""Plain blocking HTTP to the servers of a run, for the few calls that are not generation."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any


class HttpCallError(RuntimeError):
    """A call failed. The message names the URL and says what the server answered, or that it did not."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status  # None: there was no answer


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that a server started with --api-key demands."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def call(
    url: str,
    path: str,
    api_key: str | None,
    body: dict[str, Any] | None = None,
    *,
    method: str | None = None,
    timeout_s: float,
) -> bytes:
    """The answer; a body is POSTed. Raises HttpCallError, and ValueError for a URL without a scheme."""
    request = urllib.request.Request(
        url.rstrip("/") + path,
        data=None if body is None else json.dumps(body).encode(),
        headers=authorization(api_key) | {"Content-Type": "application/json"},
        method=method,
    )
    # No proxies: servers are peers inside the cluster, and an http_proxy in the environment is not meant for them.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as response:
            answer: bytes = response.read()
            return answer
    except urllib.error.HTTPError as error:
        said = _message(error.read())
        raise HttpCallError(f"{request.full_url} answered {error.code}: {said}", error.code) from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, TimeoutError):
            what = f"did not answer within {timeout_s:g} s"
        else:
            what = f"failed: {cause or type(cause).__name__}"
        raise HttpCallError(f"{request.full_url} {what}", None) from error


def _message(answer: bytes) -> str:
    """What a server says went wrong: SGLang's "message", FastAPI's "detail", or the text as it is."""
    try:
        fields = json.loads(answer)
        return str(fields.get("message") or fields.get("detail") or fields)
    except (ValueError, AttributeError):
        return answer.decode(errors="replace")[:1000]
