"""PluginService: the plugins of the core. This release has none, and says so."""

from __future__ import annotations

from moltbot.v1 import plugin_pb2, plugin_pb2_grpc

from moltbot_server.errors import PluginNotFound
from moltbot_server.rpc import names
from moltbot_server.rpc.interceptors import Call


class PluginService(plugin_pb2_grpc.PluginServiceServicer):
    """Serves plugins."""

    async def GetPlugin(self, request: plugin_pb2.GetPluginRequest, call: Call) -> plugin_pb2.GetPluginResponse:  # type: ignore[override]
        """Answer one plugin."""
        raise _none(names.read_plugin(request.name, "name"))

    async def ListPlugins(self, request: plugin_pb2.ListPluginsRequest, call: Call) -> plugin_pb2.ListPluginsResponse:  # type: ignore[override]
        """Answer the plugins that are installed."""
        names.page_size(request.page_size, default=50, most=200)
        names.read_place_token(("plugins",), request.page_token)
        return plugin_pb2.ListPluginsResponse()

    async def CallPlugin(self, request: plugin_pb2.CallPluginRequest, call: Call) -> plugin_pb2.CallPluginResponse:  # type: ignore[override]
        """Call a plugin by itself."""
        raise _none(names.read_plugin(request.name, "name"))


def _none(plugin: str) -> PluginNotFound:
    return PluginNotFound(f"there is no plugin {plugin!r}; this release has none")
