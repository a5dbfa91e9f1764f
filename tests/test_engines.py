"""Two engines, one answer: on random markets, by hand, by the account's own books, and by an
independent library; and nothing is known early."""

import json
import os
import subprocess
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sensequant.backtest.accounts import FIGURES, Account, account_figures, side_by_side
from sensequant.backtest.backtester import (
    ACCOUNT_COLUMNS,
    TRADE_COLUMNS,
    BacktestResult,
    run_backtest,
    sweep,
)
from sensequant.core.errors import DataError
from sensequant.core.testing import expect_fail, random_bars, sessions
from sensequant.core.types import BAR_COLUMNS, IST, Side
from sensequant.market.costs import CostPlan, Product, Slippage
from sensequant.market.simulator import MarketSpec, simulate
from sensequant.trading.grid import (
    EVENT,
    Grid,
    Signals,
    build_grid,
    make_signals,
    part,
    wide_grid,
)
from sensequant.trading.kernel import make_book, play
from sensequant.trading.loop import play_plainly
from sensequant.trading.portfolio import Action, Execution, Portfolio, apply_action, book, mark
from sensequant.trading.risk import Rules
from sensequant.trading.sizing import Sizing, SizingKind
from sensequant.trading.strategies import Swing, SwingParams, View, decide
from sensequant.trading.tape import REASONS, REJECTIONS, flat_rates, make_tape, swings

FREE = Slippage(0, 0, 0)

# --- random markets ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    "How a random market looks."

    seed: int
    n_symbols: int
    n_sessions: int
    bars_a_session: int  # 1 is daily
    missing: float  # share of bars that are not there
    wild: float  # standard deviation of a bar's move
    thin: float  # share of bars with hardly a volume
    locked: float  # share of bars at a circuit limit
    split: float  # share of symbol-sessions with a corporate action


def clock(shape: Shape) -> pd.DatetimeIndex:
    "Starts of all bars: midnights, or minutes from 09:15 on, the last ones near the close."
    days = sessions(shape.n_sessions, "2024-09-16")  # over the change of charges on 2024-10-01
    if shape.bars_a_session == 1:
        return days
    minutes = np.linspace(555, 925, shape.bars_a_session).round().astype(int)
    return pd.DatetimeIndex([day + pd.Timedelta(minutes=int(m)) for day in days for m in minutes])


def random_market(shape: Shape) -> Grid:
    "A grid with everything that can go wrong in one."
    rng, index = np.random.default_rng(shape.seed), clock(shape)
    size = len(index), shape.n_symbols
    ratio, dividend, first = np.ones(size), np.zeros(size), np.zeros(size, bool)
    first[:: shape.bars_a_session] = True
    acts = first & (rng.random(size) < shape.split)
    ratio[acts] = rng.choice([2.0, 1.5, 0.1, 0.001, 1.0], acts.sum(), p=[0.35, 0.3, 0.2, 0.05, 0.1])
    dividend[acts] = rng.choice([0.0, 3.0, -1.0], acts.sum())
    jump = rng.standard_t(3, size) * shape.wild
    close = 200 * np.exp(np.cumsum(rng.normal(0, shape.wild, size) + jump, axis=0))
    close /= np.cumprod(ratio, axis=0)
    opened = np.r_[close[:1], close[:-1]] / ratio * np.exp(jump / 2)
    high = np.maximum(opened, close) * np.exp(abs(rng.normal(0, shape.wild, size)))
    low = np.minimum(opened, close) * np.exp(-abs(rng.normal(0, shape.wild, size)))
    volume = rng.integers(0, 3, size) * rng.integers(50, 200_000, size)
    volume = np.where(rng.random(size) < shape.thin, rng.integers(0, 60, size), volume)
    tape = dict(zip(BAR_COLUMNS, (opened, high, low, close, volume.astype(float)), strict=True))
    here = lock(rng, shape, tape) & (rng.random(size) >= shape.missing)
    here[-1, 0] = True
    for name in BAR_COLUMNS:
        tape[name] = np.where(here, tape[name], 0.0 if name == "volume" else np.nan)
    rows, columns = np.nonzero(acts & here)
    moved = zip(rows, columns, ratio[acts & here], dividend[acts & here], strict=True)
    symbols = [f"S{n}" for n in range(shape.n_symbols)]
    kept = here.any(axis=1)
    events = np.array([(np.flatnonzero(kept).searchsorted(r), *e) for r, *e in moved], EVENT)
    columns_kept = {name: values[kept] for name, values in tape.items()}
    return wide_grid(symbols, index[kept], columns_kept, events)


def lock(rng: np.random.Generator, shape: Shape, tape: dict[str, np.ndarray]) -> np.ndarray:
    "Put some bars at a price they cannot leave; all bars exist so far."
    size = tape["open"].shape
    stuck = rng.random(size) < shape.locked
    price = tape["close"] * np.where(rng.random(size) < 0.5, 1.5, 0.6)
    for name in ("open", "high", "low", "close"):
        tape[name] = np.where(stuck, price, tape[name])
    return np.ones(size, bool)


def random_signals(grid: Grid, seed: int, patience: float) -> Signals:
    "Wishes that last a while, with confidences that tie now and then."
    rng = np.random.default_rng(seed + 1)
    wish = rng.choice([-1, 0, 1], grid.shape, p=[0.2, 0.25, 0.55])
    keep = rng.random(grid.shape) < patience
    for t in range(1, len(wish)):
        wish[t] = np.where(keep[t], wish[t - 1], wish[t])
    return make_signals(grid, wish, rng.choice([0.2, 0.5, 0.5, 0.9, 1.0], grid.shape), "random")


SHAPES = st.builds(
    Shape,
    seed=st.integers(0, 10**6),
    n_symbols=st.integers(1, 5),
    n_sessions=st.integers(2, 14),
    bars_a_session=st.sampled_from([1, 1, 2, 6]),
    missing=st.sampled_from([0.0, 0.1, 0.5]),
    wild=st.sampled_from([0.002, 0.01, 0.04]),
    thin=st.sampled_from([0.0, 0.3]),
    locked=st.sampled_from([0.0, 0.1]),
    split=st.sampled_from([0.0, 0.2]),
)
SIZES = st.builds(
    Sizing,
    sizing=st.sampled_from(list(SizingKind)),
    n_slots=st.sampled_from([0, 2]),
    notional_inr=st.sampled_from([20_000.0, 500_000.0]),
    volatility_target_frac=st.sampled_from([0.003, 0.02]),
    size_by_confidence=st.booleans(),
)
RULES = st.builds(
    Rules,
    capital_inr=st.sampled_from([1_000.0, 100_000.0, 5e6]),
    sizing=SIZES,
    max_exposure_inr=st.sampled_from([0.0, 60_000.0]),
    max_symbol_inr=st.sampled_from([0.0, 25_000.0]),
    stop_frac=st.sampled_from([0.0, 0.01, 0.05]),
    target_frac=st.sampled_from([0.0, 0.01, 0.1]),
    daily_loss_inr=st.sampled_from([0.0, 800.0]),
    min_hold_sessions=st.sampled_from([0, 1]),
    max_hold_sessions=st.sampled_from([0, 1, 3]),
    last_entry_minute=st.sampled_from([-1, 800]),
    square_off_minute=st.sampled_from([-1, 850, 920]),
    slippage=st.sampled_from([FREE, Slippage(), Slippage(300, 10, 500)]),
    max_volume_frac=st.sampled_from([0.025, 1.0]),
    circuit_frac=st.sampled_from([0.0, 0.2]),
    product=st.sampled_from([Product.DELIVERY, Product.FUTURES]),
    volatility_sessions=st.just(2),
)


def both(grid: Grid, signals: Signals, rules: Rules) -> tuple[BacktestResult, BacktestResult]:
    "What the compiled and the plain engine make of it, the same to the paisa."
    fast, plain = (run_backtest(grid, signals, rules, engine) for engine in ("kernel", "loop"))
    for name in ("raw_trades", "raw_days", "raw_rejected"):
        np.testing.assert_array_equal(getattr(fast, name), getattr(plain, name), name)
    return fast, plain


VANISHED = Shape(8, 5, 8, 1, 0.0, 0.002, 0.0, 0.1, 0.2)  # a price that a ratio rounds


@settings(max_examples=150, deadline=None)
@example(VANISHED, Rules(slippage=FREE, max_exposure_inr=60_000.0, circuit_frac=0.0), 0.0)
@given(SHAPES, RULES, st.sampled_from([0.0, 0.6, 0.95]))
def test_engines_agree_on_random_markets(shape, rules, patience):
    grid = random_market(shape)
    result, _ = both(grid, random_signals(grid, shape.seed, patience), rules)
    earned = (
        result.raw_trades["gross"] - result.raw_trades["charges"] - result.raw_trades["slippage"]
    )
    assert earned.sum() == result.raw_days["equity"][-1] - round(rules.capital_inr * 100)
    charged = result.raw_days["charges"].sum(), result.raw_days["slippage"].sum()
    assert charged == (result.raw_trades["charges"].sum(), result.raw_trades["slippage"].sum())
    assert (result.raw_trades["slippage"] >= 0).all()
    assert result.raw_days["trades"].sum() == len(result.raw_trades)


def drawn(rng: np.random.Generator) -> tuple[Shape, Rules]:
    "A larger market and rules that let a position live."
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    each = int(pick(1, 1, 6))
    shape = Shape(
        int(rng.integers(10**6)),
        6,
        25,
        each,
        pick(0.0, 0.2, 0.5),
        pick(0.005, 0.02),
        0.1,
        0.05,
        0.03,
    )
    sizing = Sizing(
        pick(*SizingKind), 0, pick(20_000.0, 200_000.0), 0.005, size_by_confidence=pick(True, False)
    )
    rules = Rules(
        capital_inr=pick(50_000.0, 1e6),
        sizing=sizing,
        max_exposure_inr=pick(0.0, 0.0, 40_000.0),
        max_symbol_inr=pick(0.0, 20_000.0),
        stop_frac=pick(0.0, 0.03),
        target_frac=pick(0.0, 0.04),
        daily_loss_inr=pick(0.0, 0.0, 1_500.0),
        min_hold_sessions=pick(0, 2),
        max_hold_sessions=pick(0, 3),
        last_entry_minute=pick(-1, 800) if each > 1 else -1,
        square_off_minute=pick(-1, 850) if each > 1 else -1,
        slippage=pick(FREE, Slippage(1, 5, 140)),
        max_volume_frac=pick(0.025, 0.5),
        product=pick(Product.DELIVERY, Product.FUTURES),
        volatility_sessions=3,
    )
    return shape, rules


def test_everything_that_can_happen_has_happened_in_both_engines():
    "Two hundred larger markets: no branch of the rules is left to luck."
    rng = np.random.default_rng(7)
    reasons, refused = np.zeros(len(REASONS), int), np.zeros(len(REJECTIONS), int)
    parts = shorts = vanished = same_day = 0
    for _ in range(200):
        shape, rules = drawn(rng)
        grid = random_market(shape)
        result, _ = both(grid, random_signals(grid, shape.seed, 0.8), rules)
        raw = result.raw_trades
        reasons += np.bincount(raw["reason"] - 1, minlength=len(REASONS))
        refused += result.raw_rejected[:, :, 0].sum(axis=0)
        parts += len(raw) - len(
            {*zip(raw["column"].tolist(), raw["entry_row"].tolist(), strict=True)}
        )
        shorts += (raw["quantity"] < 0).sum()
        vanished += (
            (raw["reason"] == len(REASONS)) & (raw["exit_row"] < len(grid.index) - 1)
        ).sum()
        same_day += (grid.session[raw["entry_row"]] == grid.session[raw["exit_row"]]).sum()
    seen = dict(zip(REASONS + REJECTIONS, [*reasons.tolist(), *refused.tolist()], strict=True))
    assert min(seen.values()) >= 20, seen
    assert min(parts, shorts, same_day) >= 50 and vanished >= 2, (parts, shorts, same_day, vanished)


# --- the account's own books ---------------------------------------------------------------------


def replayed(result: BacktestResult) -> list[float]:
    "Equity at each session's close when the same trades are booked by `trading.portfolio`, INR."
    grid, rules, raw = result.grid, result.rules, result.raw_trades
    account, equity = Portfolio(rules.capital_inr, rules.plan), []
    days, last = grid.days.date, np.full(len(grid.symbols), np.nan)
    entered = pd.DataFrame(raw).groupby(["entry_row", "column"])[["quantity", "entry_price"]]
    entered = entered.agg({"quantity": "sum", "entry_price": "first"}).reset_index()

    def execute(t, s, quantity, price):
        side, product = (Side.BUY if quantity > 0 else Side.SELL), rules.product
        day = days[grid.session[t]]
        book(account, Execution(grid.symbols[s], side, abs(int(quantity)), price, day, product))

    for t in range(len(grid.index)):
        here = raw[raw["exit_row"] == t]
        before = here["entry_row"] < t
        if t == len(grid.index) - 1:
            before &= here["reason"] < len(REASONS)
        for trade in here[before]:
            execute(t, trade["column"], -trade["quantity"], trade["exit_price"])
        for row in entered[entered["entry_row"] == t].itertuples():
            execute(t, row.column, row.quantity, row.entry_price)
        for trade in here[~before]:
            execute(t, trade["column"], -trade["quantity"], trade["exit_price"])
        last = np.where(np.isnan(grid.close[t]), last, grid.close[t])
        if t + 1 == len(grid.index) or grid.session[t + 1] != grid.session[t]:
            equity.append(mark(account, dict(zip(grid.symbols, last.tolist(), strict=True))))
    return equity


def test_booked_one_by_one_the_trades_give_the_same_account():
    "Cash, charges, credits of the day and marks, from the object that live trading uses."
    rng, booked = np.random.default_rng(11), 0
    for _ in range(40):
        shape, rules = drawn(rng)
        grid = random_market(replace(shape, split=0.0))
        result = run_backtest(grid, random_signals(grid, shape.seed, 0.8), rules)
        np.testing.assert_array_equal(result.daily["equity_inr"], np.round(replayed(result), 2))
        booked += len(result.trades)
    assert booked > 500


# --- worked by hand ------------------------------------------------------------------------------


def priced(
    *rows: tuple[float, ...], start: str = "2025-01-06", volume: float = 1e6
) -> pd.DataFrame:
    "Daily bars from (open, high, low, close)."
    frame = pd.DataFrame(rows, sessions(len(rows), start), columns=["open", "high", "low", "close"])
    return frame.astype(float).assign(volume=volume)


def minutes(day: str, *rows: tuple) -> pd.DataFrame:
    "Bars from (clock, open, high, low, close) within a day."
    index = pd.DatetimeIndex([f"{day} {row[0]}" for row in rows], tz=IST, name="ts")
    columns = ["open", "high", "low", "close"]
    return pd.DataFrame([row[1:] for row in rows], index, columns).astype(float).assign(volume=1e6)


def traded(bars: dict[str, pd.DataFrame], want: list, rules: Rules, **more) -> BacktestResult:
    "Both engines on a few bars."
    grid = build_grid(bars, more.pop("actions", None))
    return both(grid, make_signals(grid, np.array(want), **more), rules)[0]


FLAT_BAR = (100, 101, 99, 100)
BARE = Rules(slippage=FREE, max_volume_frac=1.0, circuit_frac=0.0)


def test_the_charges_of_a_delivery_by_hand():
    "Bought and sold at 100 INR in January 2025 by ICICI Direct's default plan; GST on top."
    plan = CostPlan(cash_transaction_frac=0.0000307)
    result = traded({"A": priced(*[FLAT_BAR] * 4)}, [[1], [1], [0], [0]], replace(BARE, plan=plan))
    trade = result.trades.iloc[0]
    value = trade["quantity"] * 100.0
    brokerage, stt, transaction = value * 0.0007, value * 0.001, value * 0.0000307
    sebi = ipft = value * 1e-6
    gst = 0.18 * (brokerage + transaction + sebi)
    side, stamp, demat = brokerage + stt + transaction + sebi + ipft + gst, value * 0.00015, 23.60
    assert trade["charges_inr"] == pytest.approx(2 * side + stamp + demat, abs=0.06)
    assert (trade["gross_inr"], trade["reason"]) == (0.0, "signal_flat")


def test_an_entry_is_cut_to_what_the_cash_pays():
    "A gap up of a tenth: 1,000 shares were meant, 908 and their fee are paid; one more is not."
    bars = {"A": priced(FLAT_BAR, (110, 111, 109, 110), FLAT_BAR)}
    grid = build_grid(bars)
    signals, fee = make_signals(grid, np.ones((3, 1))), flat_rates(grid, 0.001)
    result = run_backtest(grid, signals, BARE, rates=fee)
    quantity = result.trades["quantity"].iloc[0]
    assert quantity == 908
    assert quantity * 110 * 1.001 <= 100_000 < (quantity + 1) * 110 * 1.001
    assert result.rejected.to_dict("records") == [
        {"symbol": "A", "reason": "cash", "orders": 1, "shares": 92}
    ]


def test_square_off_has_nothing_to_do_after_a_stop_and_the_wish_stays_blocked():
    "Stopped at 10:00, both sides intraday; wanted on, but not taken again until the wish paused."
    bars = minutes(
        "2025-01-06",
        ("09:15", 100, 100, 100, 100),
        ("09:20", 100, 101, 99, 100),
        ("10:00", 99, 99, 97, 97),
        ("10:05", 97, 98, 97, 97),
        ("10:10", 97, 98, 97, 97),
        ("10:15", 97, 98, 97, 97),
        ("15:20", 98, 98, 98, 98),
        ("15:25", 98, 98, 98, 98),
    )
    rules = replace(BARE, stop_frac=0.02, square_off_minute=920, last_entry_minute=900)
    want = [[1], [1], [1], [1], [0], [1], [1], [1]]
    trades = traded({"A": bars}, want, rules).trades
    assert trades["reason"].tolist() == ["stop_loss"]
    assert trades["exit_price_inr"].tolist() == [98.0]
    value = trades["quantity"].iloc[0]
    assert trades["charges_inr"].iloc[0] < 0.0007 * 100 * value  # a delivery pays more than this
    want = [[1], [1], [1], [0], [1], [1], [1], [1]]
    trades = traded({"A": bars}, want, rules).trades
    assert trades["reason"].tolist() == ["stop_loss", "eod_close"]
    assert trades["entry_ts"].dt.strftime("%H:%M").tolist() == ["09:20", "10:15"]
    assert trades["exit_ts"].dt.strftime("%H:%M").tolist() == ["10:00", "15:20"]


def test_a_share_that_misses_the_square_off_leaves_at_its_next_open():
    morning = [("09:15", *FLAT_BAR), ("09:20", *FLAT_BAR)]
    late = minutes("2025-01-06", *morning, ("15:20", *FLAT_BAR))
    next_day = minutes("2025-01-07", ("09:15", 90, 91, 89, 90), ("15:20", *FLAT_BAR))
    bars = {"A": pd.concat([late.iloc[:2], next_day]), "B": pd.concat([late, next_day])}
    rules = replace(BARE, square_off_minute=920)
    trades = traded(bars, [[1, 0]] * 5, rules).trades
    assert trades["reason"].tolist() == ["eod_close"]
    assert trades["exit_ts"].iloc[0] == pd.Timestamp("2025-01-07 09:15", tz=IST)
    assert trades["exit_price_inr"].iloc[0] == 90.0


def test_a_bad_day_halts_and_the_next_session_begins_anew():
    "6,500 INR lost at a close: both leave at the next open, B is bought again after a pause."
    a = priced(FLAT_BAR, FLAT_BAR, (100, 100, 87, 87), *[(87, 88, 86, 87)] * 4)
    b = priced(*[FLAT_BAR] * 7)
    rules = replace(BARE, daily_loss_inr=5_000.0)
    want = [[1, 1], [1, 1], [1, 1], [1, 1], [1, 0], [1, 1], [1, 1]]
    result = traded({"A": a, "B": b}, want, rules)
    trades = result.trades
    assert trades["reason"].tolist() == ["risk_halt", "risk_halt", "backtest_end"]
    assert trades["symbol"].tolist() == ["A", "B", "B"]
    assert (trades["exit_ts"][:2] == a.index[3]).all() and trades["entry_ts"][2] == a.index[6]


def test_a_warning_opens_nothing_and_closes_nothing():
    "Four fifths of the cap: what is held stays, what is wanted waits."
    a = priced(FLAT_BAR, FLAT_BAR, (100, 100, 91, 91), *[(91, 92, 90, 91)] * 2)
    b = priced(*[FLAT_BAR] * 5)
    want = [[1, 0], [1, 0], [1, 1], [1, 1], [1, 1]]
    trades = traded({"A": a, "B": b}, want, replace(BARE, daily_loss_inr=5_000.0)).trades
    assert trades["reason"].tolist() == ["backtest_end"] * 2
    assert trades["entry_ts"].tolist() == [a.index[1], a.index[4]]


def test_holding_limits_count_sessions_from_the_entry():
    "Entered on session 1; not before session 3's close by signal, not after session 4's by time."
    bars = {"A": priced(*[FLAT_BAR] * 8)}
    least = traded(
        bars, [[1], [0], [0], [0], [0], [0], [0], [0]], replace(BARE, min_hold_sessions=2)
    )
    assert least.trades["holding_sessions"].tolist() == [3]
    most = traded(bars, [[1]] * 8, replace(BARE, max_hold_sessions=2))
    assert most.trades[["reason", "holding_sessions"]].to_numpy().tolist() == [["time_exit", 3]]
    stop = replace(BARE, min_hold_sessions=5, stop_frac=0.01)
    assert traded(bars, [[1]] * 8, stop).trades["reason"].tolist() == ["stop_loss"]


def test_a_locked_share_is_neither_bought_nor_sold():
    "Upper limit on day 1: no entry. Lower limit on days 4 and 5: a stop waits for day 6."
    up, down, floor = (120,) * 4, (96,) * 4, (76.8,) * 4
    rows = [FLAT_BAR, up, (120, 121, 119, 120), (120, 121, 119, 120), down, floor, (80, 81, 79, 80)]
    rules = replace(BARE, circuit_frac=0.2, stop_frac=0.05, sizing=Sizing(n_slots=2))
    result = traded({"A": priced(*rows)}, [[1]] * 7, rules)
    trade = result.trades.iloc[0]
    assert result.rejected["reason"].tolist() == ["no market"]
    assert trade["entry_ts"].day == 8 and trade["entry_price_inr"] == 120.0
    assert (trade["reason"], trade["exit_price_inr"]) == ("stop_loss", 80.0)


def test_a_thin_bar_gives_a_part_and_the_rest_follows():
    "A tenth of 5,000 shares a bar: 500 of 1,000 are bought; 500 leave on one day, or 300 and 200."
    bars = priced(*[FLAT_BAR] * 6)
    bars["volume"] = [5_000, 5_000, 5_000, 3_000, 3_000, 3_000]
    rules = replace(BARE, max_volume_frac=0.1)
    result = traded({"A": bars}, [[1], [1], [0], [0], [0], [0]], rules)
    assert result.trades["quantity"].tolist() == [300, 200]
    assert result.trades["exit_ts"].tolist() == list(bars.index[3:5])
    assert result.rejected.to_dict("records")[0]["shares"] == 500
    sold = result.trades["charges_inr"]
    assert sold.iloc[0] > 23.6 and sold.iloc[1] > 23.6  # the demat charge on each of two days


def test_splits_and_dividends_leave_the_account_as_it_was():
    "101 shares become 151 and a half, worth the same; the half is paid out, stop and target move."
    halved = tuple(price / 1.5 for price in FLAT_BAR)
    bars = priced(FLAT_BAR, FLAT_BAR, halved, halved, halved)
    index, columns = bars.index, {name: bars[[name]].to_numpy() for name in BAR_COLUMNS}
    grid = wide_grid(["A"], index, columns, np.array([(2, 0, 1.5, 0.0), (3, 0, 1.0, 2.0)], EVENT))
    sized = Sizing(SizingKind.NOTIONAL, notional_inr=10_100.0)
    rules = replace(BARE, sizing=sized, stop_frac=0.05, target_frac=0.05)
    signals, free = make_signals(grid, np.ones((5, 1))), flat_rates(grid, 0.0)
    result = run_backtest(grid, signals, rules, rates=free)
    plain = run_backtest(grid, signals, rules, "loop", free)
    np.testing.assert_array_equal(plain.raw_trades, result.raw_trades)
    trade = result.trades.iloc[0]
    assert (trade["quantity"], trade["reason"]) == (151, "backtest_end")
    assert trade["entry_price_inr"] == pytest.approx(100 / 1.5)
    assert result.daily["equity_inr"].tolist() == [100_000, 100_000, 100_000, 100_302, 100_302]
    assert trade["net_inr"] == 302.0
    assert grid.market == pytest.approx([0, 0, 0, 3 / 100, 0])


def test_the_portfolio_takes_actions_as_the_engines_do():
    "The same split and dividend, booked by hand in the account of live trading."
    account, day = Portfolio(100_000, CostPlan(dp_charge_inr=0.0)), date(2025, 1, 7)
    book(account, Execution("A", Side.BUY, 101, 100.0, day))
    before = account.equity_inr
    apply_action(account, "A", Action(1.5, 0.0, 100 / 1.5))
    assert mark(account, {"A": 100 / 1.5}) == pytest.approx(before, abs=0.011)
    apply_action(account, "A", Action(dividend_inr=2.0))
    assert account.equity_inr == pytest.approx(before, abs=0.011)  # what was paid left the price
    assert mark(account, {"A": 100 / 1.5}) == pytest.approx(before + 302, abs=0.011)


def acted(bars: pd.DataFrame, events: list[tuple], rules: Rules) -> BacktestResult:
    "Both engines on one share that is wanted always, with its actions."
    columns = {name: bars[[name]].to_numpy() for name in BAR_COLUMNS}
    grid = wide_grid(["A"], bars.index, columns, np.array(events, EVENT))
    return both(grid, make_signals(grid, np.ones((len(bars), 1))), rules)[0]


def test_a_demerger_moves_stop_and_target_by_what_it_paid():
    """Bought at 100: stop 95, target 108. The share gives away 40 INR: 55 and 68. A later split
    of two shares for one makes them 27.50 and 34; only then does a fall to 27 reach the stop."""
    after, halved = (60, 61, 59, 60), (30, 30.5, 29.5, 30)
    rules = replace(BARE, stop_frac=0.05, target_frac=0.08)
    parted = [(2, 0, 1.0, 40.0), (4, 0, 2.0, 0.0)]
    fall = priced(FLAT_BAR, FLAT_BAR, after, after, halved, (30, 30, 27, 28), (28, 28, 28, 28))
    trade = acted(fall, parted, rules).trades.iloc[0]
    assert (trade["reason"], trade["exit_price_inr"]) == ("stop_loss", 27.5)
    assert trade["exit_ts"] == fall.index[5]
    # 1,000 shares are meant, fewer are paid; each earns 2 x 27.50 + 40 - 100 INR
    bought = trade["quantity"] / 2
    assert trade["gross_inr"] == pytest.approx(-5 * bought)
    rise = priced(FLAT_BAR, FLAT_BAR, after, after, halved, (30, 35, 30, 34), (34, 34, 34, 34))
    trade = acted(rise, parted, rules).trades.iloc[0]
    assert (trade["reason"], trade["exit_price_inr"]) == ("take_profit", 34.0)
    assert trade["gross_inr"] == pytest.approx(8 * trade["quantity"] / 2)
    both_at_once = [(2, 0, 2.0, 40.0)]
    fall = priced(FLAT_BAR, FLAT_BAR, halved, (30, 30, 27, 28), (28, 28, 28, 28))
    trade = acted(fall, both_at_once, rules).trades.iloc[0]
    assert (trade["exit_price_inr"], trade["exit_ts"]) == (27.5, fall.index[3])


def test_a_short_pays_what_a_demerger_gives():
    "Sold at 100: stop 105, target 92. The share gives away 40 INR, which the short owes: 65, 52."
    after = (60, 61, 59, 60)
    rules = replace(BARE, product=Product.FUTURES, stop_frac=0.05, target_frac=0.08)
    bars = priced(FLAT_BAR, FLAT_BAR, after, (60, 61, 51, 55), (55, 55, 55, 55))
    columns = {name: bars[[name]].to_numpy() for name in BAR_COLUMNS}
    grid = wide_grid(["A"], bars.index, columns, np.array([(2, 0, 1.0, 40.0)], EVENT))
    trade = both(grid, make_signals(grid, -np.ones((5, 1))), rules)[0].trades.iloc[0]
    assert (trade["reason"], trade["exit_price_inr"]) == ("take_profit", 52.0)
    assert trade["gross_inr"] == pytest.approx(8 * trade["quantity"])


def test_a_price_that_gave_something_away_is_at_no_limit_and_is_no_swing():
    "From 100 to a still 60 after 40 INR were paid; as a fall it would be locked and of 51 %."
    still = (60, 60, 60, 60)
    bars = priced(FLAT_BAR, FLAT_BAR, still, still, still)
    rules = replace(BARE, circuit_frac=0.2, sizing=Sizing(n_slots=2))
    sized = replace(rules, sizing=Sizing(SizingKind.VOLATILITY), volatility_sessions=2)
    columns = {name: bars[[name]].to_numpy() for name in BAR_COLUMNS}
    for events, free, swing in (([(2, 0, 1.0, 40.0)], True, 0.0), ([], False, np.log(0.6))):
        grid = wide_grid(["A"], bars.index, columns, np.array(events, EVENT))
        want = np.array([[1], [0], [0], [0], [0]])
        exits = both(grid, make_signals(grid, want), rules)[0].trades["exit_ts"]
        assert exits.tolist() == [bars.index[2 if free else 3]]
        assert grid.moves[2, 0] == pytest.approx(swing)
        assert swings(grid, sized)[3, 0] == pytest.approx(abs(swing) / np.sqrt(2))


def test_a_short_exists_in_futures_alone():
    "Sold at 100, bought back at 80 INR; with delivery the same wish is to stay out."
    bars = {"A": priced(FLAT_BAR, FLAT_BAR, (90, 91, 89, 90), (80, 81, 79, 80), (80, 81, 79, 80))}
    want = [[-1], [-1], [0], [0], [0]]
    rules = replace(BARE, product=Product.FUTURES, lot=75)
    trade = traded(bars, want, rules).trades.iloc[0]
    assert (trade["direction"], trade["quantity"], trade["gross_inr"]) == ("SHORT", 975, 19_500.0)
    assert traded(bars, want, BARE).trades.empty
    stopped = replace(rules, stop_frac=0.005, target_frac=0.5)
    assert traded(bars, want, stopped).trades["reason"].tolist() == ["stop_loss"]
    target = replace(rules, target_frac=0.1)
    assert traded(bars, want, target).trades["exit_price_inr"].tolist() == [90.0]


def test_what_is_not_sure_at_all_is_not_opened_however_it_is_sized():
    "Wanted for four days at a confidence of 0, then of 0.9; a 0 afterwards closes nothing."
    bars = {"A": priced(*[FLAT_BAR, (100, 101, 99, 101)] * 4, FLAT_BAR)}
    sure = np.r_[np.zeros(4), 0.9, np.zeros(4)][:, None]
    sizes = [Sizing(kind, n_slots=2) for kind in SizingKind]
    sizes += [replace(sizing, size_by_confidence=True) for sizing in sizes]
    for sizing in sizes:
        rules = replace(BARE, sizing=sizing, volatility_sessions=2)
        result = traded(bars, np.ones((9, 1)), rules, confidence=sure)
        assert result.trades["reason"].tolist() == ["backtest_end"]
        assert result.trades["entry_ts"].tolist() == [bars["A"].index[5]]
        assert result.rejected.empty


def test_bad_news_opens_no_long_that_had_no_chance_before():
    """A long is wanted from day 3 on, on news of 0. No bar trades on day 4, so it lapses; on news
    of -0.4 it is not made up for, whatever the account: a fixed sum a position, in both engines."""
    bars = priced(*[(p, p + 1, p - 1, p) for p in (100, 99, 98, 101, 103, 105, 107, 109)])
    bars.loc[bars.index[4], "volume"] = 0
    rule = Swing(SwingParams(fast_sessions=2, slow_sessions=3))
    rules = replace(BARE, sizing=Sizing(SizingKind.NOTIONAL, notional_inr=20_000.0))
    entries = {}
    for late in (0.0, -0.4):
        mood = np.r_[np.zeros(4), np.full(4, late)]
        made = decide(rule, View("A", bars, sentiment=mood))
        assert made.want.tolist() == [0, 0, -1, 1, 1, 1, 1, 1]
        sure = made.confidence[:, None]
        result = traded({"A": bars}, made.want[:, None], rules, confidence=sure)
        entries[late] = result.trades["entry_ts"].tolist()
    assert entries == {0.0: [bars.index[5]], -0.4: []}


def test_the_surest_comes_first_where_cash_or_caps_are_short():
    bars = {name: priced(*[FLAT_BAR] * 4) for name in "ABC"}
    sized = Sizing(SizingKind.NOTIONAL, notional_inr=60_000.0)
    sure = np.tile([0.5, 0.9, 0.5], (4, 1))
    result = traded(bars, np.ones((4, 3)), replace(BARE, sizing=sized), confidence=sure)
    bought = result.trades.set_index("symbol")["quantity"]
    assert bought["B"] == 600 and 390 < bought["A"] < 400 and "C" not in bought
    capped = replace(BARE, sizing=sized, max_exposure_inr=70_000.0, max_symbol_inr=50_000.0)
    result = traded(bars, np.ones((4, 3)), capped, confidence=sure)
    assert result.trades.set_index("symbol")["quantity"].to_dict() == {"A": 200, "B": 500}
    assert set(result.rejected["reason"]) == {"caps"}


# --- one share without costs, and an independent library -----------------------------------------


def test_one_share_without_costs_is_three_lines_of_pandas():
    "Wanted at a close is held until the next; opens at the last close, so nothing stays in cash."
    bars = random_bars(400, seed=5)
    bars["open"] = bars["close"].shift(1).fillna(bars["close"])
    bars["high"], bars["low"] = (bars[["open", "close"]].agg(end, axis=1) for end in ("max", "min"))
    want = (bars["close"].rolling(5).mean() > bars["close"].rolling(20).mean()).to_numpy()
    grid = build_grid({"A": bars * [0.01, 0.01, 0.01, 0.01, 1e6]})
    rules = Rules(1e6, slippage=FREE, max_volume_frac=1.0, circuit_frac=0.0)
    signals, rates = make_signals(grid, want[:, None]), flat_rates(grid, 0.0)
    daily = run_backtest(grid, signals, rules, rates=rates).daily
    held = pd.Series(want, bars.index).shift(1, fill_value=False)
    expected = bars["close"].pct_change().where(held, 0.0)
    np.testing.assert_allclose(daily["net_return"], expected, atol=2e-6)


VECTORBT = os.environ.get("VECTORBT_PYTHON", "")
FEE, CASH, EACH = 0.0012, 2e6, 50_000.0


def many_crosses() -> tuple[Grid, np.ndarray]:
    "Twenty shares, and when a cross of averages wants them."
    many = {f"S{n:02d}": random_bars(500, seed=n).assign(volume=10**9) for n in range(20)}
    grid = build_grid(many)
    close = pd.DataFrame(grid.close)
    return grid, (close.rolling(10).mean() > close.rolling(30).mean()).to_numpy()


def known_equity() -> np.ndarray:
    "What vectorbt 1.2.0 answered on 2026-11-29: INR at the end of each session."
    return np.loadtxt(Path(__file__).with_name("vectorbt_equity.csv"), skiprows=1)


def test_vectorbt_finds_the_same_equity():
    "A cross of averages on 20 shares, one pot of cash, a flat fee: equal to half a paisa a fill."
    grid, want = many_crosses()
    sized = Sizing(SizingKind.NOTIONAL, notional_inr=EACH)
    rules = Rules(CASH, sized, slippage=FREE, max_volume_frac=1.0, circuit_frac=0.0)
    result = run_backtest(grid, make_signals(grid, want), rules, rates=flat_rates(grid, FEE))
    theirs, equity = known_equity(), result.daily["equity_inr"].to_numpy()
    assert len(result.trades) > 150 and np.ptp(theirs) > 1_000
    fills = 2 * len(result.trades)
    np.testing.assert_allclose(equity[:-1], theirs[:-1], rtol=0, atol=0.005 * fills)
    forced = result.trades[result.trades["reason"] == "backtest_end"]
    fee = FEE * (forced["quantity"] * forced["exit_price_inr"]).sum()
    assert equity[-1] == pytest.approx(theirs[-1] - fee, abs=0.005 * fills)


@pytest.mark.slow
@pytest.mark.skipif(not VECTORBT, reason="VECTORBT_PYTHON names no Python with vectorbt 1.2.0")
def test_vectorbt_still_answers_as_its_file_says(tmp_path):
    "To be asked again after the market of the comparison has changed."
    grid, want = many_crosses()
    job = {"open": grid.open, "close": grid.close, "want": want, "notional": EACH}
    np.savez(tmp_path / "job.npz", **job, fee=FEE, cash=CASH)
    command = [VECTORBT, os.path.join(os.path.dirname(__file__), "vectorbt_twin.py"), "orders"]
    subprocess.run([*command, str(tmp_path)], check=True, timeout=300)
    answer = np.load(tmp_path / "answer.npz")["equity"]
    np.testing.assert_allclose(known_equity(), answer, rtol=0, atol=1e-3)


# --- nothing is known early ----------------------------------------------------------------------


def shifted(want: np.ndarray, bars: int) -> np.ndarray:
    "Wishes that come `bars` later, or earlier where below 0."
    moved = np.roll(want, bars, axis=0)
    moved[: max(bars, 0)] = 0
    moved[len(moved) + min(bars, 0) :] = 0
    return moved


def test_a_bar_later_is_worse_and_tomorrow_known_is_absurd():
    "On planted markets, summed over seeds: what fell rises; the same wishes late, and an oracle."
    gains = np.zeros(3)
    for seed in range(5):
        spec = MarketSpec(12, date(2023, 1, 2), date(2024, 6, 28), seed=seed, signal_ic=0.25)
        planted = simulate(spec)
        grid = build_grid({symbol: planted.bars(symbol) for symbol in planted.symbols})
        close = pd.DataFrame(grid.close).ffill()
        fell = (-close.pct_change(5, fill_method=None) > 0.02).to_numpy().astype(np.int8)
        rose = (close.shift(-1) > close).to_numpy().astype(np.int8)
        rules = Rules(1e6, slippage=FREE)
        for at, want in enumerate((shifted(fell, 1), fell, rose)):
            result = run_backtest(grid, make_signals(grid, want), rules)
            gains[at] += np.log(result.daily["equity_inr"].iloc[-1] / 1e6)
    assert gains[0] < gains[1] - 0.5 and gains[2] > gains[1] + 5, gains


@settings(max_examples=60, deadline=None)
@given(SHAPES, RULES, st.floats(0.2, 0.9))
def test_what_comes_later_changes_nothing_before(shape, rules, share):
    grid = random_market(shape)
    signals = random_signals(grid, shape.seed, 0.7)
    cut = int(len(grid.days) * share)
    row = int(np.searchsorted(grid.session, cut))
    if not 0 < row < len(grid.index):
        return
    rng = np.random.default_rng(shape.seed)
    noisy = {name: getattr(grid, name).copy() for name in BAR_COLUMNS}
    noise = rng.uniform(0.5, 2, (len(grid.index) - row, 1))
    for name in BAR_COLUMNS:
        noisy[name][row:] *= noise
    want = signals.want.copy()
    want[row:] = -want[row:]
    other = wide_grid(grid.symbols, grid.index, noisy, grid.events)
    first = run_backtest(grid, signals, rules)
    second = run_backtest(other, make_signals(other, want, signals.confidence), rules)
    np.testing.assert_array_equal(first.raw_days[:cut], second.raw_days[:cut])
    done = [r.raw_trades[r.raw_trades["exit_row"] < row] for r in (first, second)]
    np.testing.assert_array_equal(*done)


# --- parts, sweeps, tables -----------------------------------------------------------------------


def test_a_part_of_a_grid_is_traded_like_its_bars_alone_but_for_what_came_before():
    grid = random_market(Shape(3, 4, 12, 6, 0.1, 0.01, 0.0, 0.0, 0.0))
    signals = random_signals(grid, 3, 0.8)
    cut, rows = part(grid, grid.days[4], grid.days[9])
    assert len(cut.days) == 6 and (np.diff(cut.session) >= 0).all() and cut.session[0] == 0
    inside = Signals(signals.want[rows], signals.confidence[rows])
    columns = {name: getattr(cut, name).copy() for name in BAR_COLUMNS}
    alone = wide_grid(cut.symbols, cut.index, columns)
    rules = replace(BARE, capital_inr=1e6)
    one, two = (both(g, inside, rules)[0] for g in (cut, alone))
    np.testing.assert_array_equal(one.raw_trades, two.raw_trades)
    assert cut.market[0] != alone.market[0]
    np.testing.assert_array_equal(cut.market[1:], alone.market[1:])
    np.testing.assert_array_equal(cut.market, grid.market[4:10])
    np.testing.assert_array_equal(np.vstack([cut.past, cut.moves]), grid.moves[:10])


def test_a_sweep_is_its_backtests_one_by_one():
    grid = random_market(Shape(5, 4, 20, 1, 0.1, 0.02, 0.0, 0.0, 0.05))
    rng = np.random.default_rng(2)
    trials = [(random_signals(grid, n, 0.8), drawn(rng)[1]) for n in range(12)]
    for (signals, rules), trial in zip(trials, sweep(grid, trials), strict=True):
        alone = run_backtest(grid, signals, rules)
        np.testing.assert_array_equal(trial.raw_trades, alone.raw_trades)
        pd.testing.assert_frame_equal(trial.daily, alone.daily)


def test_tables_have_their_columns_and_add_up():
    shape, rules = drawn(np.random.default_rng(4))
    grid = random_market(shape)
    result = run_backtest(grid, random_signals(grid, 4, 0.9), rules)
    assert tuple(result.trades.columns) == TRADE_COLUMNS
    assert tuple(result.daily.columns) == ACCOUNT_COLUMNS
    trades, daily = result.trades, result.daily
    assert set(trades["strategy"]) == {"random"} and json.dumps(result.summary)
    together = trades[["charges_inr", "slippage_inr", "net_inr"]].sum(axis=1)
    np.testing.assert_allclose(together, trades["gross_inr"], atol=1e-6)
    equity = rules.capital_inr * (1 + daily["net_return"]).cumprod()
    np.testing.assert_allclose(equity, daily["equity_inr"], rtol=1e-9)
    assert daily["n_trades"].sum() == len(trades)


def test_no_trade_is_an_account_in_cash():
    grid = build_grid({"A": random_bars(30)})
    result, _ = both(grid, make_signals(grid, np.zeros((30, 1))), BARE)
    assert result.trades.empty and tuple(result.trades.columns) == TRADE_COLUMNS
    assert (result.daily["net_return"] == 0).all() and np.isnan(result.summary["win_rate"])


def test_an_account_that_lost_everything_has_figures_still():
    "Sold short at 100, the next day opens at 250: more is owed than was there."
    bars = {"A": priced(FLAT_BAR, FLAT_BAR, (250, 251, 249, 250), (250, 251, 249, 250))}
    rules = replace(BARE, product=Product.FUTURES)
    result = traded(bars, [[-1], [-1], [-1], [-1]], rules)
    account = Account(result.trades, result.daily, result.rejected, rules.capital_inr)
    found = account_figures(account)
    assert found == pytest.approx({n: result.summary[n] for n in FIGURES}, nan_ok=True)
    assert found["net_return"] == pytest.approx(result.trades["net_inr"].sum() / 100_000)
    assert found["net_return"] < -1
    assert np.isnan([found["sharpe"], found["max_drawdown"]]).all() and found["n_trades"] == 1
    assert found["benchmark_return"] == pytest.approx(1.5) and found["charges_inr"] > 0
    idle = traded(bars, [[0]] * 4, rules)
    pair = side_by_side({"a": result.daily, "b": idle.daily}, {"a": 100_000, "b": 1_000_000})
    together = result.daily["equity_inr"] + idle.daily["equity_inr"]
    np.testing.assert_allclose(1_100_000 * (1 + pair["net_return"]).cumprod(), together)


def test_what_cannot_be_traded_is_refused():
    grid = build_grid({"A": random_bars(30)})
    deep = build_grid({"A": random_bars(30).assign(volume=10**12)})
    tape = make_tape(deep, make_signals(deep, np.ones((30, 1))), BARE)
    with expect_fail(DataError, "the grid's shape"):
        make_tape(grid, Signals(np.zeros((3, 1), np.int8), np.zeros((3, 1))), BARE)
    rich = tape.rules._replace(capital=10**13)
    for engine in (play, play_plainly):
        with expect_fail(DataError, "at most 1e9 INR"):
            engine(tape._replace(rules=rich, rates=flat_rates(grid, 0.0)))
    assert len(make_book(tape, 7).trades) == 7


def test_volatility_is_measured_in_shares_of_one_size():
    "A split is no swing."
    bars = random_bars(60)
    halved = bars.copy()
    halved.loc[halved.index[40:], ["open", "high", "low", "close"]] /= 2
    columns = {name: halved[[name]].to_numpy() for name in BAR_COLUMNS}
    grid = wide_grid(["A"], bars.index, columns, np.array([(40, 0, 2.0, 0.0)], EVENT))
    rules = Rules(sizing=Sizing(SizingKind.VOLATILITY))
    np.testing.assert_allclose(swings(grid, rules), swings(build_grid({"A": bars}), rules))


@pytest.mark.parametrize("each", [1, 6])
def test_a_part_is_sized_by_the_swings_before_it(each):
    "No warm-up is lost: the first bar of a part is sized as it is in the whole."
    sized = Sizing(SizingKind.VOLATILITY, volatility_target_frac=1e-3)
    rules = replace(BARE, capital_inr=1e6, sizing=sized)
    for split in (0.1, 0.0):
        grid = random_market(Shape(4, 3, 40, each, 0.1, 0.01, 0.0, 0.0, split))
        cut, rows = part(grid, grid.days[30], grid.days[36])
        np.testing.assert_array_equal(swings(cut, rules), swings(grid, rules)[30:38])
        assert np.isfinite(swings(cut, rules)).all()
        again, _ = part(cut, grid.days[33])
        np.testing.assert_array_equal(swings(again, rules), swings(grid, rules)[33:38])
    want = np.zeros(grid.shape)
    want[rows] = 1
    whole = both(grid, make_signals(grid, want), rules)[0]
    mine = both(cut, make_signals(cut, want[rows]), rules)[0]
    keys = ["symbol", "entry_ts", "entry_price_inr"]
    bought = [run.trades.groupby(keys)["quantity"].sum() for run in (whole, mine)]
    assert len(bought[0]) == 3 and bought[0].min() > 10
    pd.testing.assert_series_equal(*bought)


def test_dearer_costs_never_earn_more():
    "The same fills at a fixed sum a position: each rise of a fee or of slippage is a loss."
    market = simulate(MarketSpec(6, date(2024, 1, 1), date(2024, 12, 31), seed=5))
    grid = build_grid({symbol: market.bars(symbol) for symbol in market.symbols})
    close = pd.DataFrame(grid.close)
    want = (close.rolling(5).mean() > close.rolling(20).mean()).to_numpy()
    sized = Sizing(SizingKind.NOTIONAL, notional_inr=20_000.0)
    rules = Rules(1e6, sized, slippage=FREE)
    fees = [0.0, 0.0005, 0.001, 0.01]
    runs = [both_of(grid, want, rules, flat_rates(grid, fee)) for fee in fees]
    slips = [FREE, Slippage(0, 5, 0), Slippage(0, 5, 140), Slippage(20, 5, 140)]
    runs += [both_of(grid, want, replace(rules, slippage=s), None) for s in slips]
    for some in (runs[:4], runs[4:]):
        assert len({len(run.trades) for run in some}) == 1 and len(some[0].trades) > 30
        net = [run.summary["net_return"] for run in some]
        assert net == sorted(net, reverse=True) and len(set(net)) == 4, net


def both_of(grid: Grid, want: np.ndarray, rules: Rules, rates: np.ndarray | None) -> BacktestResult:
    "The compiled engine by a schedule of its own, checked by the plain one."
    signals = make_signals(grid, want)
    fast, plain = (run_backtest(grid, signals, rules, e, rates) for e in ("kernel", "loop"))
    np.testing.assert_array_equal(fast.raw_trades, plain.raw_trades)
    return fast


def test_the_table_of_trades_grows_where_exits_come_in_parts():
    "One wish, 78 parts: more trades than wishes began."
    bars = random_bars(80)
    bars["volume"] = np.r_[10**6, 10**6, np.full(78, 100)]
    grid = build_grid({"A": bars})
    want = np.r_[np.ones(2), np.zeros(78)][:, None]
    rules = replace(BARE, max_volume_frac=0.1)
    result, plain = both(grid, make_signals(grid, want), rules)
    assert len(result.trades) == len(plain.trades) == 78
