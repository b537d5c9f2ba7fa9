"""Where sessions and turns are kept: one protocol, a file for each store."""

from moltbot_server.store.pending import Pending as Pending
from moltbot_server.store.protocol import GUESSED as GUESSED
from moltbot_server.store.protocol import SEQUENCE_AFTER_CRASH as SEQUENCE_AFTER_CRASH
from moltbot_server.store.protocol import Deleted as Deleted
from moltbot_server.store.protocol import Elsewhere as Elsewhere
from moltbot_server.store.protocol import EndedTurn as EndedTurn
from moltbot_server.store.protocol import Moved as Moved
from moltbot_server.store.protocol import NewTurn as NewTurn
from moltbot_server.store.protocol import Store as Store
from moltbot_server.store.protocol import StoredSession as StoredSession
from moltbot_server.store.protocol import StoredTurn as StoredTurn
from moltbot_server.store.protocol import Taken as Taken
from moltbot_server.store.protocol import UsagePage as UsagePage
from moltbot_server.store.protocol import UsagePlace as UsagePlace
from moltbot_server.store.protocol import UsageQuery as UsageQuery
from moltbot_server.store.protocol import UsageRow as UsageRow
