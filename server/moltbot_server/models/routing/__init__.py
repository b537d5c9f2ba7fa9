"""Routes: several models behind one name, of which always one answers that can."""

from __future__ import annotations

from moltbot_server.models.routing.breaker import BreakerState
from moltbot_server.models.routing.breakers import Breakers
from moltbot_server.models.routing.candidates import Find, ModelOfRoute
from moltbot_server.models.routing.clock import Clock
from moltbot_server.models.routing.engine import RouteEngine

__all__ = ["BreakerState", "Breakers", "Clock", "Find", "ModelOfRoute", "RouteEngine"]
