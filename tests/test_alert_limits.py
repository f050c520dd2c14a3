"""The limits' multiples chosen on three published texts, tried on the fourth; see benchmarks/alert_limits.py."""

import sys
from pathlib import Path

import numpy as np
import published
import pytest

from moe_monitor import baseline

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import alert_limits

KINDS = {kind.name: kind for kind in alert_limits.KINDS}


@pytest.mark.parametrize("held", published.TEXTS)
def test_limits_chosen_without_a_text_hold_on_it(held):
    for name, kind in KINDS.items():
        if name not in alert_limits.SHIPPED:
            continue
        chosen_on = [text for text in published.TEXTS if text != held]
        chosen = alert_limits.choose(kind, alert_limits.values(kind, np.random.default_rng(21), chosen_on))
        over, caught = alert_limits.tried(kind, chosen, [held], seed=22)
        # Without the broadest text (c4) or the narrowest (wikipedia) the largest change is unknown: at the limit.
        assert max(over) < (1.0 if name == "cv" else 1.03), name
        assert min(caught) > 1, name


def test_it_is_the_shipped_limits_that_are_chosen_again():
    rng = np.random.default_rng(3)
    windows = [published.window(rng, "tulu") for _ in range(5)]
    model = baseline.summarise(windows, "olmoe", published.LAYERS, published.EXPERTS, published.TOP_K, 60.0)
    tokens = model.statistics.window_tokens
    ranks = [list(range(s.start, s.stop)) for s in alert_limits.RANKS]
    made = {
        "imbalance": (model.statistics.imbalance, model.imbalance_limit(tokens)),
        "cv": (model.statistics.cv, model.cv_limit(tokens)),
        "ranks": (model.rank_imbalance(ranks), model.rank_imbalance_limit(ranks)),
    }
    assert set(made) == set(alert_limits.SHIPPED)
    for name, (normal, limit) in made.items():
        ours = alert_limits.limit(KINDS[name], normal, alert_limits.SHIPPED[name])
        np.testing.assert_allclose(limit, ours, rtol=1e-9)
