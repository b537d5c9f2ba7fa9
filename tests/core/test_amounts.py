"""Amounts of money, as people read them."""

from __future__ import annotations

import pytest
from moltbot_server.cli.usage_telling import in_money
from moltbot_server.config_models import Budget
from moltbot_server.store import UsageRow
from moltbot_server.usage.budgets import Limit


@pytest.mark.parametrize(
    ("amount", "places", "said"),
    [
        (0.0, 2, "0"),
        (2.5, 2, "2.50"),
        (1234.5, 2, "1,234.50"),
        (0.25, 2, "0.25"),
        (0.05, 2, "0.050"),
        (0.0042, 2, "0.0042"),
        (0.000_056, 2, "0.000056"),
        (0.000_001, 4, "0.0000010"),
        (2.5, 4, "2.5000"),
        (0.000_25, 4, "0.00025"),
    ],
)
def test_an_amount_says_at_least_two_digits(amount: float, places: int, said: str) -> None:
    assert in_money(amount, places=places) == said


@pytest.mark.parametrize(("most", "said"), [(12.5, "12.5"), (500.0, "500"), (1200.0, "1,200"), (0.00001, "0.00001")])
def test_a_budget_that_is_used_up_is_told_without_powers_of_ten(most: float, said: str) -> None:
    state = Limit(Budget(scope="workspace", period="day", max_cost=most), now=0.0)
    state.count([UsageRow(workspace="w", cost=most * 1e6)])
    assert f"budget of {said} CNY;" in state.reached("w", "", "m", "CNY")
