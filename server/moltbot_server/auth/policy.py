"""What each RPC asks of its caller. An RPC without an entry is refused, and a test fails."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

OWNER = "owner"
"""The workspace's own key: everything."""

MEMBER = "member"
"""May talk and read; may not change models, see what everybody used, nor take answers to their places."""

_EVERYBODY = frozenset({OWNER, MEMBER})
_OWNERS = frozenset({OWNER})

POLICY: Mapping[str, frozenset[str] | None] = MappingProxyType(
    {
        "/grpc.health.v1.Health/Check": None,
        "/grpc.health.v1.Health/Watch": None,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": None,
        "/moltbot.v1.ChatService/StreamTurn": _EVERYBODY,
        "/moltbot.v1.ChatService/RunTurn": _EVERYBODY,
        "/moltbot.v1.ChatService/ResumeTurn": _EVERYBODY,
        "/moltbot.v1.ChatService/CancelTurn": _EVERYBODY,
        "/moltbot.v1.ChatService/Converse": _EVERYBODY,
        "/moltbot.v1.SessionService/GetSession": _EVERYBODY,
        "/moltbot.v1.SessionService/ListSessions": _EVERYBODY,
        "/moltbot.v1.SessionService/ListMessages": _EVERYBODY,
        "/moltbot.v1.SessionService/ResetSession": _EVERYBODY,
        "/moltbot.v1.SessionService/DeleteSession": _EVERYBODY,
        "/moltbot.v1.ModelService/GetModel": _EVERYBODY,
        "/moltbot.v1.ModelService/ListModels": _EVERYBODY,
        "/moltbot.v1.ModelService/LoadModel": _OWNERS,
        "/moltbot.v1.ModelService/SwitchModel": _OWNERS,
        "/moltbot.v1.ModelService/UnloadModel": _OWNERS,
        "/moltbot.v1.RouteService/ListRoutes": _EVERYBODY,
        "/moltbot.v1.RouteService/ReloadRoutes": _OWNERS,
        "/moltbot.v1.InferenceService/Generate": _EVERYBODY,
        "/moltbot.v1.InferenceService/GenerateMany": _EVERYBODY,
        "/moltbot.v1.InferenceService/CountTokens": _EVERYBODY,
        "/moltbot.v1.InferenceService/Abort": _EVERYBODY,
        "/moltbot.v1.InferenceService/Embed": _EVERYBODY,
        "/moltbot.v1.UsageService/ListUsage": _OWNERS,
        "/moltbot.v1.UsageService/ListBudgets": _OWNERS,
        "/moltbot.v1.CacheService/ListCaches": _EVERYBODY,
        "/moltbot.v1.CacheService/ClearCache": _OWNERS,
        "/moltbot.v1.DeliveryService/ReceiveDeliveries": _OWNERS,
        "/moltbot.v1.DeliveryService/ConfirmDelivery": _OWNERS,
        "/moltbot.v1.DeliveryService/RejectDelivery": _OWNERS,
        "/moltbot.v1.DeliveryService/ListDeadLetters": _OWNERS,
        "/moltbot.v1.DeliveryService/RetryDeadLetter": _OWNERS,
        "/moltbot.v1.DeliveryService/DropDeadLetter": _OWNERS,
        "/moltbot.v1.PluginService/GetPlugin": _EVERYBODY,
        "/moltbot.v1.PluginService/ListPlugins": _EVERYBODY,
        "/moltbot.v1.PluginService/CallPlugin": _EVERYBODY,
    }
)
"""RPC -> roles that may call it, or None for everybody without a credential."""
