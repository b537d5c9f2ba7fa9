"""The pools of connections of all engines: one for each origin, closed with the last engine that uses it."""

from __future__ import annotations

import ssl

from moltbot_server.models.providers.pool import Origin, Pool


class Pools:
    """Lends pools. Engines that are made anew with a configuration find the connections of those before them."""

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        """`tls` says whom to trust; by default whom this machine trusts."""
        self._tls = tls
        self._lent: dict[Origin, tuple[Pool, int]] = {}

    def lend(self, origin: Origin) -> Pool:
        """Return the pool of an origin; each call is to be met by one of `give_back`."""
        pool, users = self._lent.get(origin) or (Pool(origin, tls=self._tls), 0)
        self._lent[origin] = pool, users + 1
        return pool

    def give_back(self, origin: Origin) -> None:
        """Close the pool of an origin if nobody else uses it."""
        pool, users = self._lent[origin]
        if users > 1:
            self._lent[origin] = pool, users - 1
        else:
            del self._lent[origin]
            pool.close()
