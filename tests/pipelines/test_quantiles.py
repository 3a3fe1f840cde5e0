"""The quantile tables against scipy's distributions, and against themselves on every machine."""

import numpy as np
import pytest
from scipy import stats

from pipelines.quantiles import STEPS, UNIT, log_uniform, symmetric_beta
from vggcore.digest import digest

CHANCES = (np.arange(STEPS) + 0.5) / STEPS

# Frozen on 2026-11-29: if one of these changes, every run that draws from the table changes.
FROZEN = {
    (log_uniform, (0.75, 4 / 3)): "92b8c41b64bcd6a8",
    (log_uniform, (0.3, 3.3)): "628278f4b2bf74c4",
    (symmetric_beta, (0.2,)): "4ea4b2300e09acf4",
    (symmetric_beta, (1.0,)): "2de8a04717ddd17d",
}


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 0.5, 1.0, 1.5, 2.0, 8.0, 64.0, 100.0])
def test_the_beta_table_has_scipys_quantiles_rounded_to_a_65536th(alpha):
    found = symmetric_beta(alpha)

    expected = stats.beta.ppf(CHANCES, alpha, alpha) * UNIT
    assert np.abs(found - expected).max() <= 0.5 + 1e-6
    assert np.all(np.diff(found) >= 0) and found.min() >= 0 and found.max() <= UNIT
    assert np.array_equal(found, UNIT - found[::-1])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_draws_from_the_beta_table_are_as_far_from_the_distribution_as_its_steps(alpha):
    found = symmetric_beta(alpha) / UNIT

    at = np.linspace(0.001, 0.999, 997)
    shares = np.searchsorted(found, at, side="right") / STEPS
    assert np.abs(shares - stats.beta.cdf(at, alpha, alpha)).max() <= 0.5 / STEPS + 0.001


@pytest.mark.parametrize(("low", "high"), [(0.75, 4 / 3), (0.3, 3.3), (1.0, 1.0), (0.01, 100.0)])
def test_the_log_uniform_table_is_uniform_in_the_logarithm(low, high):
    found = log_uniform(low, high)

    assert np.abs(found - low * np.exp(CHANCES * np.log(high / low)) * UNIT).max() <= 0.5 + 1e-6
    assert found[0] >= low * UNIT - 0.5 and found[-1] <= high * UNIT + 0.5


def test_the_tables_are_the_frozen_ones_and_nobody_can_change_them():
    found = {(make, of): digest(make(*of).tolist(), hex_characters=16) for make, of in FROZEN}

    assert found == FROZEN
    with pytest.raises(ValueError, match="read-only"):
        symmetric_beta(0.2)[0] = 1
