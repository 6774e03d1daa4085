"""What the command line asks of running services over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from mars_shared.errors import ConfigError, InputError, MarsError
from mars_shared.images import media_type_of
from mars_shared.settings import Deployment


def get_json(url: str, deployment: Deployment) -> dict[str, Any]:
    """GET a JSON object.

    Raises:
        ConfigError: nothing answers there.
        MarsError: it answers with an error.
    """
    return _json(_request("GET", url, deployment))


def request_rollouts(
    url: str, deployment: Deployment, *, question: str, images: list[tuple[str, Path]], truth: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """POST /v1/rollouts with image files.

    Args:
        images: (source name, file) in order.
        options: further form fields, e.g. {"num_generations": 4}; None values are left out.

    Raises:
        InputError: a file cannot be read, is no image, or the service refuses the request.
    """
    files = [(name, (path.name, *_image(name, path))) for name, path in images]
    fields = {"question": question, "truth": truth, **options}
    data = {key: str(value) for key, value in fields.items() if value is not None}
    return _json(_request("POST", f"{url}/v1/rollouts", deployment, data=data, files=files))


def _image(name: str, path: Path) -> tuple[bytes, str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"image {name!r}: {path} cannot be read ({error.strerror})") from error
    return content, media_type_of(content, what=f"image {name!r} ({path})")


def _request(method: str, url: str, deployment: Deployment, **arguments: Any) -> httpx.Response:
    headers = {}
    if deployment.api_key is not None:
        headers["Authorization"] = f"Bearer {deployment.api_key.get_secret_value()}"
    try:
        return httpx.request(method, url, headers=headers, timeout=600, trust_env=False, **arguments)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"{url} does not answer ({error}); start the services with `mars up RECIPE`") from error


def _json(response: httpx.Response) -> dict[str, Any]:
    if response.status_code < 400:
        try:
            result: dict[str, Any] = response.json()
        except ValueError as error:
            raise MarsError(f"{response.url} answered {response.text[:80]!r}; expected JSON") from error
        return result
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    kind = InputError if response.status_code < 500 else MarsError
    raise kind(f"{response.url} answered {response.status_code}: {message}")
