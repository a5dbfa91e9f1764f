"""What a row of a panel may know: its own moment, of all symbols, and nothing else."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata

from sensequant.core.testing import random_bars
from sensequant.core.types import LABEL_COLUMNS
from sensequant.features.features import TECHNICAL, technical
from sensequant.features.labels import forward_labels, sample_weights, volatility
from sensequant.features.panel import (
    known_together,
    rank_across,
    relative_classes,
    relative_target,
    stack,
)
from sensequant.features.windows import purged_folds, usable_rows

NAMES = (*TECHNICAL, "spread", "market_return")


def tables(n=9, days=120):
    "Tables of symbols that list one after the other and miss some days."
    out = {}
    for k in range(n):
        bars = random_bars(days, seed=k).iloc[5 * k :]
        bars = bars.drop(bars.index[np.random.default_rng(k).choice(len(bars), 3, replace=False)])
        spread = volatility(bars["close"]) * np.sqrt(5)
        table = technical(bars).assign(spread=spread, market_return=np.arange(len(bars)) * 1e-3)
        out[f"S{k}"] = table.join(forward_labels(bars))
    return out


@pytest.fixture(scope="module")
def panel():
    "Nine symbols."
    return stack(tables())


def made(panel):
    "All that a panel gives a row."
    target = relative_target(panel, panel["spread"])
    return rank_across(panel, NAMES).assign(target=target, known=known_together(panel).to_numpy())


def test_stacking_loses_nothing():
    parts = tables()
    panel = stack(parts)
    assert len(panel) == sum(map(len, parts.values()))
    assert list(zip(panel.index, panel["symbol"], strict=True)) == sorted(
        (ts, s) for s, t in parts.items() for ts in t.index
    )
    for symbol, rows in panel.groupby("symbol", observed=True):
        back = rows.drop(columns="symbol")
        whole = parts[symbol].astype(dict.fromkeys(NAMES, np.float32))
        pd.testing.assert_frame_equal(back, whole, check_freq=False)


def test_ranks_agree_with_scipy_moment_by_moment(panel):
    ranks = rank_across(panel, NAMES, raw=())
    assert ranks.min().min() == -0.5 and ranks.max().max() == 0.5
    for ts in panel.index.unique()[::7]:
        for name in NAMES[::4]:
            x, ours = panel.loc[[ts], name].to_numpy(), ranks.loc[[ts], name].to_numpy()
            held = ~np.isnan(x)
            if held.sum() < 5:
                assert np.isnan(ours).all()
            else:
                twin = (rankdata(x[held]) - 1) / (held.sum() - 1) - 0.5
                np.testing.assert_allclose(ours[held], twin, atol=1e-7)
                assert np.isnan(ours[~held]).all()


def test_only_rows_of_the_same_moment_count(panel):
    whole, rng = made(panel), np.random.default_rng(0)
    for ts in rng.choice(panel.index.unique(), 6):
        mine = panel.index == ts
        other = panel.copy()
        numbers = [*NAMES, "forward_return"]
        for name in numbers:
            other[name] *= np.where(mine, 1, rng.uniform(-2, 2, len(other))).astype(
                other[name].dtype
            )
        for changed in (other, panel[panel.index <= ts], panel[mine]):
            pd.testing.assert_frame_equal(made(changed).loc[[ts]], whole.loc[[ts]])
        mine_changed = panel.copy()
        mine_changed["forward_return"] *= np.where(mine, rng.uniform(-2, 2, len(mine)), 1)
        again = relative_target(mine_changed, panel["spread"])
        assert again[~mine].equals(whole["target"][~mine])


def test_names_of_symbols_do_not_matter(panel):
    parts = tables()
    turned = dict(zip(parts, reversed(parts.values()), strict=True))
    whole, other = (
        p.assign(**made(p).add_prefix("made_")).reset_index() for p in (panel, stack(turned))
    )
    names = dict(zip(parts, reversed(parts), strict=True))
    other["symbol"] = other["symbol"].map(names)
    columns = ["ts", "symbol", *[c for c in whole if c.startswith("made_")]]
    whole, other = (
        f[columns].astype({"symbol": str}).sort_values(["ts", "symbol"], ignore_index=True)
        for f in (whole, other)
    )
    pd.testing.assert_frame_equal(whole, other, rtol=1e-12)


def test_targets_are_relative_and_classes_follow_them(panel):
    target = relative_target(panel, panel["spread"])
    raw = panel["forward_return"] / panel["spread"].astype(float)
    held = raw.groupby(level=0).transform("count") >= 5
    twin = (raw - raw.groupby(level=0).transform("mean")).clip(-3, 3).where(held)
    pd.testing.assert_series_equal(target, twin, check_names=False)
    words = relative_classes(target, 0.2)
    assert (words[target > 0.2] == "LONG").all() and (words[target < -0.2] == "SHORT").all()
    assert (words.isna() == target.isna()).all() and words.nunique() == 3


def test_folds_of_relative_targets_need_the_moment_all_is_known(panel):
    "Purged by each row's own end, a target could still hold a return of the tested block."
    rows = panel.assign(target=relative_target(panel, panel["spread"]))
    together = known_together(panel)
    rows, together = rows[rows["target"].notna()], together[rows["target"].notna().to_numpy()]
    own, latest = rows["label_known_at"], pd.DatetimeIndex(together)
    late = pd.DatetimeIndex(own) < latest
    assert late.any() and (late | (pd.DatetimeIndex(own) == latest)).all()
    leaks = []
    for ends in (own, together):
        train, test = purged_folds(rows.index, ends, 4)[-1]
        leaks.append((latest[train] >= rows.index[test[0]]).sum())
        assert not set(rows.index[train]) & set(rows.index[test])
    assert leaks[0] > 0 and leaks[1] == 0


def test_weights_of_a_panel_are_those_of_its_symbols(panel):
    rows = usable_rows(panel, TECHNICAL)
    weights = pd.Series(sample_weights(rows), index=rows.index)
    assert weights.mean() == pytest.approx(1)
    for symbol, part in rows.groupby("symbol", observed=True):
        mine = weights[(rows["symbol"] == symbol).to_numpy()]
        alone = sample_weights(part[list(LABEL_COLUMNS)])
        np.testing.assert_allclose(mine / mine.mean(), alone)
