"""Laws of charges on random trades, and the twin in a compiled function."""

from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from sensequant.core.types import Side
from sensequant.market.costs import (
    CHARGES,
    CostPlan,
    Leg,
    Product,
    charge_items,
    charge_paise,
    charge_table,
    charges,
    contract_note,
    portion,
    rate_table,
    slipped_price,
    to_paise,
)

DAYS = st.dates(date(2020, 1, 1), date(2026, 12, 31))
VALUES = st.integers(1, 10**11)  # paise, up to the largest trade
PLANS = st.builds(
    CostPlan,
    brokerage_delivery_frac=st.floats(0, 0.025),
    brokerage_intraday_frac=st.floats(0, 0.025),
    brokerage_futures_frac=st.floats(0, 0.025),
    brokerage_max_inr=st.sampled_from([0.0, 20.0]),
    dp_charge_inr=st.sampled_from([0.0, 13.5, 20.0]),
    cash_transaction_frac=st.sampled_from([0.0, 3.07e-5]),
)
PRODUCTS = st.sampled_from(list(Product))


@njit
def items_in_kernel(row: np.ndarray, value: int, with_dp: bool) -> tuple:
    return charge_items(row, value, with_dp)


@njit
def paise_in_kernel(inr: float) -> int:
    return to_paise(inr)


@given(DAYS, PRODUCTS, PLANS, VALUES, st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_kernel_charges_the_very_same_paise(day, product, plan, value, with_dp):
    for row in rate_table([day], product, plan)[0]:
        plain = charge_items(row.tolist(), value, with_dp)
        assert items_in_kernel(row, value, with_dp) == plain
        assert all(paise >= 0 for paise in plain)
        assert charge_paise(row.tolist(), value, with_dp) == sum(plain)


@given(DAYS, PRODUCTS, PLANS, st.integers(1, 10**6), st.integers(1, 100_000))
@settings(max_examples=200, deadline=None)
def test_rows_and_items_are_one(day, product, plan, quantity, ticks):
    price = min(ticks * 0.05, 1e9 / quantity)
    for at, side in enumerate(Side):
        leg = Leg(product, side, quantity, price)
        row = rate_table([day], product, plan)[0, at].tolist()
        paise = charge_items(row, to_paise(quantity * price), True)
        charged = charges(leg, day, plan)
        assert tuple(vars(charged).values()) == tuple(p / 100 for p in paise)
        assert to_paise(charged.total_inr) == sum(paise)


@given(DAYS, PRODUCTS, PLANS, VALUES, VALUES)
@settings(max_examples=200, deadline=None)
def test_a_larger_trade_is_never_charged_less(day, product, plan, one, other):
    small, large = sorted((one, other))
    for row in rate_table([day], product, plan)[0].tolist():
        pairs = zip(charge_items(row, small, True), charge_items(row, large, True), strict=True)
        assert all(a <= b for a, b in pairs)


@given(VALUES, st.integers(0, 2 * 10**7), st.sampled_from([1, 100]))
@settings(max_examples=300, deadline=None)
def test_portions_are_exact_and_round_half_up(amount, rate, unit):
    twice = 2 * amount * rate  # billionths of half a paisa
    got = portion(amount, rate, unit)
    assert got % unit == 0
    assert -unit * 10**9 < twice - 2 * got * 10**9 + 1 <= unit * 10**9


@given(st.integers(-(10**12), 10**12))
@settings(max_examples=300, deadline=None)
def test_money_that_is_whole_paise_stays_so(paise):
    assert to_paise(paise / 100) == paise == paise_in_kernel(paise / 100)


@given(st.floats(-1e9, 1e9))
@settings(max_examples=300, deadline=None)
def test_a_kernel_rounds_money_alike(inr):
    assert to_paise(inr) == paise_in_kernel(inr)
    assert abs(to_paise(inr) / 100 - inr) < 0.00501


@given(st.lists(st.tuples(PRODUCTS, st.sampled_from(list(Side)), st.integers(1, 5000)), min_size=1))
@settings(max_examples=100, deadline=None)
def test_a_note_is_its_trades_but_for_the_rupee_of_stt(trades):
    legs = [Leg(p, s, q, 123.45) for p, s, q in trades]
    note, parts = contract_note(legs, "2025-06-02"), [charges(leg, "2025-06-02") for leg in legs]
    for name in (f"{c}_inr" for c in CHARGES if c != "stt"):
        assert getattr(note, name) == pytest.approx(sum(getattr(p, name) for p in parts), abs=1e-6)
    apart = sum(p.stt_inr for p in parts)
    assert abs(note.stt_inr - apart) <= 0.5 + 0.005 * len(legs) + 1e-6
    assert note.stt_inr == int(note.stt_inr)


@pytest.mark.parametrize("product", list(Product))
def test_rates_change_on_their_days_and_on_no_others(product):
    days = np.arange("2020-01-01", "2026-12-31", dtype="datetime64[D]")
    table = rate_table(days, product)
    changed = days[1:][(table[1:] != table[:-1]).any(axis=(1, 2))]
    facts = charge_table()
    mine = facts[facts["product"].isin([product, "all"]) & (facts["status"] == "used")]
    known = {str(d.date()) for d in mine["effective_from"]} - {"2019-04-01", "2020-01-01"}
    assert {str(d) for d in changed} == known


@given(
    st.floats(0.05, 1e5),
    st.sampled_from([1, -1]),
    st.floats(0, 1),
    st.tuples(st.floats(0, 50), st.floats(0, 50), st.floats(0, 200)),
)
@settings(max_examples=200, deadline=None)
def test_slippage_is_always_against_the_trader(price, sign, share, numbers):
    got = slipped_price(price, sign, share, numbers)
    assert sign * (got - price) >= 0
    assert sign * (slipped_price(price, sign, min(1, share * 2), numbers) - got) >= -1e-9 * price
