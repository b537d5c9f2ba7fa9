"""A model provider on this machine that stands in for a remote one, in two dialects, and fails as it is told to.

`moltbot mock-provider` runs it; docs/mock-provider.md is its guide.
"""

from moltbot_server.testing_provider.script import Fault, Script, ScriptError
from moltbot_server.testing_provider.server import MockProvider

__all__ = ["Fault", "MockProvider", "Script", "ScriptError"]
