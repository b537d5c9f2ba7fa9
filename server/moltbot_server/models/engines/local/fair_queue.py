"""Who is served next: fair between workspaces, and between the sessions of each.

Each workspace has a tag, the service that it has had divided by its weight, and the lowest tag is served first
(start-time fair queueing). One that comes back after a pause starts from the queue's clock, so that it can neither save
service up nor be made to pay for what was free. The sessions of a workspace share its service in the same way.
Service is the time of a replica, expected when a row is taken and corrected when it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from heapq import heapify, heappop, heapreplace
from itertools import islice

from moltbot_server.models.engines.local.rows import Row

_KEPT_SESSIONS = 256


class _Session:
    """The rows of one session, and the service that it had."""

    __slots__ = ("rows", "tag")

    def __init__(self, tag: float) -> None:
        self.tag = tag
        self.rows: deque[Row] = deque()


class _Workspace:
    """The sessions of one workspace, and the service that it had; `waiting` holds those sessions that have rows."""

    __slots__ = ("clock", "cost", "count", "sessions", "tag", "waiting", "weight")

    def __init__(self, tag: float, weight: float) -> None:
        self.tag = tag
        self.weight = weight
        self.clock = self.cost = 0.0
        self.count = 0
        self.sessions: dict[str, _Session] = {}
        self.waiting: dict[str, _Session] = {}

    def session(self, name: str) -> _Session:
        found = self.sessions.get(name)
        if found is None:
            if len(self.sessions) >= _KEPT_SESSIONS + 2 * len(self.waiting):
                self.sessions = {n: s for n, s in self.sessions.items() if s.rows or s.tag > self.clock}
            found = self.sessions[name] = _Session(self.clock)
        return found

    def walk(self, of: Callable[[str], bool] | None = None) -> Iterator[Row]:
        """Yield the rows in the order in which they would be served; only of those sessions, if told."""
        line = [
            (session.tag, session.rows[0].number, 0, session)
            for name, session in self.waiting.items()
            if of is None or of(name)
        ]
        heapify(line)
        while line:
            tag, _, at, session = line[0]
            row = session.rows[at]
            yield row
            if at + 1 < len(session.rows):
                heapreplace(line, (tag + row.cost, session.rows[at + 1].number, at + 1, session))
            else:
                heappop(line)


class FairQueue:
    """Rows that wait. Pure: it knows no threads and no clock but the one that it is told.

    Each row has its expected `cost` in seconds of a replica when it is put.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """`weights` of workspaces: one of 2 gets twice as much as one of 1, which is the default.

        Raises:
            ValueError: a weight is not above 0.
        """
        self._weights = dict(weights or {})
        if any(weight <= 0 for weight in self._weights.values()):
            raise ValueError("the weight of a workspace has to be above 0")
        self._workspaces: dict[str, _Workspace] = {}
        self._waiting: dict[str, _Workspace] = {}
        self._clock = 0.0
        self._count = 0
        self._cost = 0.0

    def __len__(self) -> int:
        return self._count

    def weight(self, workspace: str) -> float:
        """Return the weight of a workspace."""
        return self._weights.get(workspace, 1.0)

    def count(self, workspace: str) -> int:
        """Return how many rows of a workspace wait."""
        found = self._waiting.get(workspace)
        return found.count if found else 0

    def count_of(self, workspace: str, session: str) -> int:
        """Return how many rows of a session wait."""
        found = self._waiting.get(workspace)
        inside = found.waiting.get(session) if found else None
        return len(inside.rows) if inside else 0

    @property
    def workspaces(self) -> int:
        """How many workspaces wait."""
        return len(self._waiting)

    def put(self, row: Row, *, first: bool = False) -> None:
        """Add a row behind those of its session; `first` puts it back before them."""
        workspace = self._workspaces.get(row.workspace)
        if workspace is None:
            workspace = _Workspace(self._clock, self.weight(row.workspace))
            self._workspaces[row.workspace] = workspace
        if not workspace.count:
            workspace.tag = max(workspace.tag, self._clock)
            self._waiting[row.workspace] = workspace
        session = workspace.session(row.session)
        if not session.rows:
            session.tag = max(session.tag, workspace.clock)
            workspace.waiting[row.session] = session
        if first:
            session.rows.appendleft(row)
        else:
            session.rows.append(row)
        workspace.cost += row.cost
        workspace.count += 1
        self._cost += row.cost
        self._count += 1
        row.waits = True

    def remove(self, row: Row) -> bool:
        """Take a row out that nobody waits for any more; tell whether it was there."""
        if not row.waits:
            return False
        row.waits = False
        workspace = self._waiting[row.workspace]
        session = workspace.waiting[row.session]
        session.rows.remove(row)
        if not session.rows:
            del workspace.waiting[row.session]
        workspace.cost -= row.cost
        workspace.count -= 1
        self._cost -= row.cost
        self._count -= 1
        if not workspace.count:
            workspace.cost = 0.0
            del self._waiting[row.workspace]
        if not self._count:
            self._cost = 0.0
            self._workspaces.clear()  # who waits for nobody owes nobody
        return True

    def walk(self, of: Callable[[str, str], bool] | None = None) -> Iterator[Row]:
        """Yield the rows in the order in which they would be served; nothing may change meanwhile.

        `of` says, of a workspace and a session, whether rows of it are wanted.
        """
        line = []
        for index, (name, workspace) in enumerate(self._waiting.items()):
            rows = workspace.walk(None if of is None else partial(of, name))
            if (row := next(rows, None)) is not None:
                line.append((workspace.tag, row.number, index, row, rows, workspace.weight))
        heapify(line)
        while line:
            tag, _, index, row, rows, weight = line[0]
            yield row
            follower = next(rows, None)
            if follower is None:
                heappop(line)
            else:
                heapreplace(line, (tag + row.cost / weight, follower.number, index, follower, rows, weight))

    def take(self, rows: Iterable[Row]) -> None:
        """Take rows out to be served, and charge their workspaces and sessions for them."""
        for row in rows:
            weights = sum(workspace.weight for workspace in self._waiting.values())
            workspace = self._waiting[row.workspace]
            session = workspace.waiting[row.session]
            workspace.clock += row.cost / len(workspace.waiting)
            workspace.tag += row.cost / workspace.weight
            session.tag += row.cost
            self._clock += row.cost / weights
            row.charged = row.cost
            self.remove(row)

    def charge(self, row: Row, more: float) -> None:
        """Correct what a row was charged with, now that its service is known."""
        workspace = self._workspaces.get(row.workspace)
        if workspace is None:
            return
        workspace.tag += more / workspace.weight
        if (session := workspace.sessions.get(row.session)) is not None:
            session.tag += more

    def expired(self, now: float, most: int) -> Sequence[Row]:
        """Take out those of the first rows that did not begin before their deadline."""
        late = [
            row
            for row in islice(self.walk(), most)
            if row.deadline is not None and row.deadline <= now and not row.began
        ]
        for row in late:
            self.remove(row)
        return late

    def ahead(self, workspace: str, session: str) -> float:
        """Return about how much service comes before that of another row of a session, in seconds of a replica."""
        typical = self._cost / max(1, self._count)
        own = self._waiting.get(workspace)
        weight = self.weight(workspace)
        before, debt = 0.0, 0.0
        if own is not None:
            mine = own.waiting.get(session)
            behind = sum(row.cost for row in mine.rows) if mine else 0.0
            before = min(own.cost, (behind + typical) * len(own.waiting))
        if (known := self._workspaces.get(workspace)) is not None:
            debt = max(0.0, known.tag - self._clock)
        level = (before + typical) / weight + debt
        return before + sum(
            min(other.cost, level * other.weight) for other in self._waiting.values() if other is not own
        )

    def clear(self) -> list[Row]:
        """Take all rows out."""
        rows = list(self.walk())
        for row in rows:
            self.remove(row)
        return rows
