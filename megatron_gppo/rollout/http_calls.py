"""Plain blocking HTTP to servers of the run, for the few calls that are not generation."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from megatron_gppo.rollout.engine import EngineFaultError, authorization


def opener() -> urllib.request.OpenerDirector:
    # No proxies: urllib would send requests for this very machine to the one in http_proxy.
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def request(
    url: str, path: str, api_key: str | None, body: dict[str, Any] | None = None, method: str | None = None
) -> urllib.request.Request:
    """Raises ValueError for a URL without a scheme."""
    data = None if body is None else json.dumps(body).encode()
    headers = authorization(api_key) | {"Content-Type": "application/json"}
    return urllib.request.Request(url.rstrip("/") + path, data=data, headers=headers, method=method)


def call(
    url: str,
    path: str,
    api_key: str | None,
    body: dict[str, Any] | None = None,
    *,
    method: str | None = None,
    timeout_s: float,
) -> bytes:
    """The answer; a body is POSTed. Raises EngineFaultError with what the server said, or that it does not answer."""
    try:
        with opener().open(request(url, path, api_key, body, method), timeout=timeout_s) as response:
            answer: bytes = response.read()
            return answer
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:300]
        raise EngineFaultError(f"{url}{path} answered {error.code}: {said}") from error
    except (OSError, http.client.HTTPException) as error:
        raise EngineFaultError(
            f"{url}{path}: {getattr(error, 'reason', None) or error or type(error).__name__}"
        ) from error
