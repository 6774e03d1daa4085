"""What must not be shown: the credentials of URLs, wherever they stand, and what the environment holds under a telling name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

STARS = "***"
OWN_SECRETS = ("MARS_API_KEY", "MARS_REDIS_PASSWORD")
SECRET_ENDINGS = ("KEY", "TOKEN", "PASSWORD", "SECRET")
"""Of the names of variables whose values are secrets: WANDB_API_KEY, HF_TOKEN, PGPASSWORD, ..."""
SHORTEST_CHARACTERS = 6
"""Of a secret that a name alone makes one: what is shorter is a number or a word, and stands in many lines that are not about it."""
_URL = re.compile(r'[a-z][a-z0-9+.-]*://[^\s"<>]+', re.IGNORECASE)


def without_credentials(url: str) -> str:
    """A URL, or what was taken for one, whose user, password and query are stars.

    Example:
        without_credentials("s3://key:secret@bucket/run") == "s3://***@bucket/run"
    """
    # Up to the last @: a password may hold one, and slashes too.
    without_user = re.sub(r"^([^/@]*://)?.*@", rf"\1{STARS}@", url, flags=re.DOTALL)
    return re.sub(r"\?.+", f"?{STARS}", without_user, flags=re.DOTALL)


def known_secrets(environment: Mapping[str, str], *urls: str | None) -> tuple[str, ...]:
    """Secrets of the environment and of URLs, in each form in which a text may hold them, the longest first.

    Args:
        urls: whose credentials are secrets, besides those in the environment; None: there is none.
    """
    found = {environment.get(name, "") for name in OWN_SECRETS}
    for url in (*urls, environment.get("MARS_REDIS_URL")):
        found.update(_credentials(url or ""))
    for name, value in environment.items():
        told = [value, *value.splitlines()] if name.upper().endswith(SECRET_ENDINGS) else []
        told += [secret for url in _URL.findall(value) for secret in _credentials(url)]
        found.update(secret for secret in told if len(secret) >= SHORTEST_CHARACTERS)
    forms = {form for secret in found - {""} for form in _forms(secret)}
    return tuple(sorted(forms, key=lambda form: (-len(form), form)))


def masked(text: str, secrets: tuple[str, ...] = ()) -> str:
    """A text in which stars stand for the credentials of all URLs, and for these secrets.

    Example:
        masked("asked redis://:abc@host with xyz", ("xyz",)) == "asked redis://***@host with ***"
    """
    if "://" in text:
        text = _URL.sub(lambda url: without_credentials(url[0]), text)
    for secret in secrets:
        text = text.replace(secret, STARS)
    return text


def masked_json(value: Any, secrets: tuple[str, ...] = ()) -> Any:
    """A JSON value whose texts are all masked, names of fields too."""
    match value:
        case str():
            return masked(value, secrets)
        case list():
            return [masked_json(item, secrets) for item in value]
        case dict():
            return {masked(name, secrets): masked_json(item, secrets) for name, item in value.items()}
        case _:
            return value


def _credentials(url: str) -> Iterator[str]:
    """The password, or a user who has none and so is a token; and what a query says, which may sign it."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return  # nobody can be asked at such an address; as a URL in a text it is masked nevertheless
    yield parts.password or parts.username or ""
    yield from (value for _, value in parse_qsl(parts.query) if len(value) >= SHORTEST_CHARACTERS)


def _forms(secret: str) -> set[str]:
    """As it is written, as a URL decodes or encodes it, and as Python quotes it in messages."""
    plain = unquote(secret)
    return {secret, plain, quote(plain, safe=""), repr(secret)[1:-1], repr(plain)[1:-1]}
