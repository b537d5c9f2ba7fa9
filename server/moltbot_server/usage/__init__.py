"""What turns used and cost, and the budgets that hold for it."""

from moltbot_server.usage.budgets import OTHERS, BudgetUse
from moltbot_server.usage.ledger import KEPT_DAYS, Ledger

__all__ = ["KEPT_DAYS", "OTHERS", "BudgetUse", "Ledger"]
