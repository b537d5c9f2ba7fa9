"""The channel to a core: keepalive that its rules allow, and retries of calls that are safe to repeat."""

from __future__ import annotations

import json

import grpc

_SAFE = {
    # The client gives every turn a request id, so that the two that start turns are safe to repeat as well.
    "moltbot.v1.ChatService": ("StreamTurn", "RunTurn", "ResumeTurn", "CancelTurn"),
    "moltbot.v1.SessionService": ("GetSession", "ListSessions", "ListMessages", "ResetSession"),
    "moltbot.v1.ModelService": ("GetModel", "ListModels"),
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method} for service, methods in _SAFE.items() for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # The core allows a ping every 10 s. Pings find a dead connection under a stream that is silent for long.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    """Return a channel to the address, with TLS when credentials are given. It connects with the first call."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    return grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
