"""Laws of the account on random histories, of sizes and of limits."""

import math
from collections import Counter
from datetime import date, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from sensequant.core.errors import DataError
from sensequant.core.types import Side
from sensequant.market.costs import CostPlan, Leg, Product, charges, to_paise
from sensequant.trading.portfolio import (
    Action,
    Execution,
    Portfolio,
    apply_action,
    available_inr,
    book,
    exposure_inr,
    mark,
    position,
)
from sensequant.trading.risk import allowed_inr, next_state, stop_and_target
from sensequant.trading.sizing import (
    Sizing,
    SizingKind,
    position_inr,
    sizing_numbers,
    whole_shares,
)

FIRST = date(2024, 9, 27)  # NSE's charge changes four days later
state_in_kernel = njit(next_state)
NOTHING = CostPlan(0, 0, 0, dp_charge_inr=0)
PRICES = st.integers(20, 400_000).map(lambda ticks: ticks * 0.05)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["buy", "sell", "mark", "split", "dividend", "night"]),
        st.sampled_from(["AAA", "BBB", "CCC"]),
        st.integers(1, 400),
        PRICES,
    ),
    min_size=1,
    max_size=60,
)


def spent(account: Portfolio) -> int:
    """What the holdings cost, shorts counting below 0."""
    return sum(h.cost_paise * h.sign for h in account.holdings.values())


def step(account: Portfolio, kind: str, symbol: str, size: int, price: float, day: date) -> None:
    """One event of a history; a sale sells at most what is held."""
    held = account.holdings.get(symbol)
    if kind == "buy":
        book(account, Execution(symbol, Side.BUY, size, price, day))
    elif kind == "sell" and held:
        book(account, Execution(symbol, Side.SELL, min(size, held.quantity), price, day))
    elif kind == "mark":
        mark(account, {symbol: price})
    elif kind == "split":
        apply_action(account, symbol, Action(1 + size % 7 / 2, price_inr=price))
    elif kind == "dividend":
        apply_action(account, symbol, Action(dividend_inr=price / 100))


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_cash_and_holdings_always_balance(steps):
    account, day = Portfolio(10_000_000), FIRST
    for kind, *event in steps:
        day += timedelta(days=kind == "night")
        step(account, kind, *event, day)
        earned = account.realised_paise + account.dividends_paise - account.charges_paise
        assert account.cash_paise == account.start_paise - spent(account) + earned
        assert account.charges_paise >= 0
        worth = sum(to_paise(h.value_inr) * h.sign for h in account.holdings.values())
        assert to_paise(account.equity_inr) == account.cash_paise + worth
        for h in account.holdings.values():
            assert h.quantity > 0 and h.cost_paise >= 0
            assert 0 <= h.day_quantity <= h.quantity and 0 <= h.day_cost_paise <= h.cost_paise


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_all_that_is_bought_and_sold_again_leaves_profit_in_cash(steps):
    account, day = Portfolio(10_000_000, NOTHING), FIRST
    flow: Counter = Counter()
    for kind, symbol, size, price in steps:
        day += timedelta(days=kind == "night")
        held = account.holdings.get(symbol)
        if kind == "buy":
            flow["paise"] -= to_paise(size * price)
        if kind == "sell" and held:
            flow["paise"] += to_paise(min(size, held.quantity) * price)
        if kind in ("buy", "sell"):
            step(account, kind, symbol, size, price, day)
    for symbol, held in list(account.holdings.items()):
        flow["paise"] += to_paise(held.quantity * 100.0)
        book(account, Execution(symbol, Side.SELL, held.quantity, 100.0, day))
    assert account.holdings == {}
    assert account.realised_paise == flow["paise"]


@given(st.integers(1, 500), st.integers(1, 500), PRICES, PRICES, st.integers(0, 1))
@settings(max_examples=200, deadline=None)
def test_a_round_trip_is_charged_by_what_the_day_made_of_it(bought, sold, low, high, nights):
    sold, account = min(bought, sold), Portfolio(1e9)
    later = FIRST + timedelta(days=nights)
    book(account, Execution("AAA", Side.BUY, bought, low, FIRST))
    booking = book(account, Execution("AAA", Side.SELL, sold, high, later))
    product = Product.DELIVERY if nights else Product.INTRADAY
    sale = charges(Leg(product, Side.SELL, sold, high), later)
    assert booking.charges_paise == to_paise(sale.total_inr)
    whole = charges(Leg(Product.DELIVERY, Side.BUY, bought, low), FIRST)
    if nights:
        assert booking.credit_paise == 0
        assert account.charges_paise == to_paise(whole.total_inr) + booking.charges_paise
    elif bought == sold:
        entry = charges(Leg(Product.INTRADAY, Side.BUY, bought, low), FIRST)
        assert account.charges_paise == to_paise(entry.total_inr) + booking.charges_paise
    assert booking.credit_paise >= -2  # two roundings of a part against one of the whole


@given(st.lists(st.integers(1, 100), min_size=1, max_size=8), PRICES)
@settings(max_examples=100, deadline=None)
def test_the_demat_charge_is_paid_once_a_share_and_day(parts, price):
    account = Portfolio(1e9, CostPlan(0, 0, 0))
    book(account, Execution("AAA", Side.BUY, sum(parts), price, FIRST))
    later = FIRST + timedelta(days=3)
    paid = [
        book(account, Execution("AAA", Side.SELL, part, price, later)).charges_paise
        for part in parts
    ]
    free = [
        charges(Leg(Product.DELIVERY, Side.SELL, p, price, False), later, CostPlan(0, 0, 0))
        for p in parts
    ]
    assert sum(paid) == 2_360 + sum(to_paise(c.total_inr) for c in free)
    assert account.holdings == {}


@given(PRICES, PRICES, st.integers(1, 1000))
@settings(max_examples=100, deadline=None)
def test_a_short_earns_what_a_long_loses(entry, leave, quantity):
    results = []
    for opens, closes in ((Side.BUY, Side.SELL), (Side.SELL, Side.BUY)):
        account = Portfolio(1e9)
        book(account, Execution("AAA", opens, quantity, entry, FIRST, Product.FUTURES))
        assert exposure_inr(account, "AAA") == pytest.approx(quantity * entry)
        assert available_inr(account) <= 1e9 - quantity * entry + 0.01
        mark(account, {"AAA": leave})
        before = account.equity_inr
        done = book(account, Execution("AAA", closes, quantity, leave, FIRST, Product.FUTURES))
        assert account.equity_inr == pytest.approx(before - done.charges_paise / 100, abs=0.011)
        results.append(account.realised_paise)
    assert results[0] == -results[1]


@given(PRICES, st.integers(1, 500), st.floats(0.05, 20))
@settings(max_examples=200, deadline=None)
def test_an_action_without_news_changes_no_wealth(price, quantity, ratio):
    account = Portfolio(1e9, NOTHING)
    book(account, Execution("AAA", Side.BUY, quantity, price, FIRST))
    before = account.equity_inr
    apply_action(account, "AAA", Action(ratio=ratio))
    assert account.equity_inr == pytest.approx(before, abs=0.02)
    held = account.holdings.get("AAA")
    assert (held.quantity if held else 0) == math.floor(quantity * ratio + 1e-9)
    if held:
        assert held.average_price_inr == pytest.approx(price / ratio, rel=1e-3, abs=0.02)


def test_what_a_sale_refuses_leaves_no_trace():
    account = Portfolio(1e6)
    book(account, Execution("AAA", Side.BUY, 10, 100.0, FIRST))
    before = vars(account) | {"holdings": dict(account.holdings)}
    with pytest.raises(DataError, match="cannot be sold"):
        book(account, Execution("AAA", Side.SELL, 11, 100.0, FIRST))
    with pytest.raises(DataError, match="above 0 INR"):
        mark(account, {"AAA": -1.0})
    assert vars(account) == before
    assert position(account, "AAA").quantity == 10


@given(
    st.sampled_from(list(SizingKind)),
    st.floats(0, 1e8),
    st.floats(0, 1),
    st.floats(0, 0.2) | st.just(math.nan),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_a_size_lies_within_the_account_and_grows_with_confidence(kind, equity, p, swing, scaled):
    numbers = sizing_numbers(Sizing(kind, size_by_confidence=scaled), 10, 0.04, 0.02)
    size = position_inr(numbers, equity, p, swing)
    assert 0 <= size <= equity
    assert position_inr(numbers, equity, min(1.0, p + 0.1), swing) >= size - 1e-9 * equity
    shares = whole_shares(size, 101.35, 1)
    assert shares * 101.35 <= size * (1 + 1e-9) + 1e-6
    assert (shares + 1) * 101.35 > size


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_caps_hold_once_a_wish_is_cut(wanted, held):
    got = allowed_inr(wanted, held, 100_000.0, 25_000.0)
    assert 0 <= got <= wanted
    assert got == 0 or (held + got <= 100_000 * (1 + 1e-12) and got <= 25_000)
    assert got == wanted or got in (0.0, 25_000.0, 100_000.0 - held)


@given(st.lists(st.integers(-700_000, 300_000), max_size=8))
@settings(deadline=None)
def test_a_halt_lasts_and_comes_at_the_limit(profits):
    state, worst = 0, 0
    for profit in profits:
        assert state_in_kernel(state, profit, 500_000, 0.8) == next_state(
            state, profit, 500_000, 0.8
        )
        state, worst = next_state(state, profit, 500_000, 0.8), min(worst, profit)
        assert (state == 2) == (worst <= -500_000)
        if state != 2:
            assert (state == 1) == (profit <= -400_000)


@given(PRICES, st.sampled_from([1, -1]), st.floats(0.001, 0.5), st.floats(0.001, 0.5))
def test_stop_and_target_lie_on_either_side(price, sign, stop_frac, target_frac):
    stop, target = stop_and_target(price, sign, stop_frac, target_frac)
    assert sign * stop < sign * price < sign * target
