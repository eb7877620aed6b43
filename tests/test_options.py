"""Options refuse what makes no sense, naming the option."""

from __future__ import annotations

import pytest

from deltaspec.errors import OptionError
from deltaspec.options import AnalyzeOptions

WRONG = {
    "--device": {"device": "tpu"},
    "--include": {"include": "("},
    "--spectra": {"spectra": ("delta", "delta")},
    "a tuple": {"spectra": "delta"},
    "--vocab": {"vocab": "all"},
    "--vectors": {"vectors": -1},
    "--workers": {"workers": -1},
    "--memory": {"memory": -1},
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_option_is_named(said):
    with pytest.raises(OptionError, match=said):
        AnalyzeOptions(**WRONG[said])


def test_how_a_run_is_computed_is_not_what_it_is():
    """Workers and memory may change between a killed run and its resumption; the order of spectra too."""
    one = AnalyzeOptions(workers=1, memory=10**9, spectra=("delta", "base"))
    other = AnalyzeOptions(workers=7, spectra=("base", "delta"))
    assert one.identity() == other.identity()
    assert one.identity() != AnalyzeOptions(exact=True, spectra=("base", "delta")).identity()
