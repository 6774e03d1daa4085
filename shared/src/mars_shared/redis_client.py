"""A connection to Redis, and its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from mars_shared.errors import ConfigError, QueueError, QueueUnavailableError

ANSWER_S = 30.0
"""Silence after which a server counts as unavailable; no command blocks on purpose."""


def connect(url: str) -> Redis:
    """A pool of connections, made as they are needed.

    Raises:
        ConfigError: `url` is no Redis URL.
    """
    try:
        return Redis.from_url(
            url,
            protocol=2,
            socket_timeout=ANSWER_S,
            socket_connect_timeout=5.0,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 3),
        )
    except ValueError:
        # The parser's own message may quote a part of the password.
        raise ConfigError("MARS_REDIS_URL: expected redis://:password@host:port/0 (rediss://, unix:// too)") from None


def address_of(client: Redis) -> str:
    """Host and port, or the socket's path; never the password."""
    options = client.connection_pool.connection_kwargs
    return str(options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}")


@contextmanager
def redis_errors(where: str) -> Iterator[None]:
    """Turn the client's errors into ours.

    Raises:
        QueueUnavailableError: Redis does not answer, or cannot write.
        QueueError: it refused a command.
    """
    try:
        yield
    except exceptions.AuthenticationError as error:
        raise QueueUnavailableError(f"Redis at {where} refused the login ({error}); check MARS_REDIS_URL") from error
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        raise QueueUnavailableError(
            f"no answer from Redis at {where} ({error}); is Redis or Valkey running there? "
            "MARS_REDIS_URL=redis://:password@host:port/0 says where"
        ) from error
    except exceptions.ResponseError as error:
        if str(error).startswith("MISCONF"):
            raise QueueUnavailableError(f"Redis at {where} cannot write to its disk ({error}); free some space") from error
        raise QueueError(f"Redis at {where} refused a command: {error}") from error
    except exceptions.RedisError as error:
        raise QueueError(f"Redis at {where} refused a command: {error}") from error
