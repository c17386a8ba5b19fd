"""Names of statistics: their text reads back as the same key, and what cannot be measured is refused."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snpc.errors import UserError
from snpc.runtime.statistics.keys import CLOSED_FORM_STATISTICS, StatisticKey, StatisticKind
from snpc.types import ProbeKind

INDEX = st.none() | st.tuples(st.integers(0, 99), st.integers(0, 99))


@given(st.sampled_from(get_args(StatisticKind)), st.sampled_from(get_args(ProbeKind)), INDEX)
def test_text_reads_back_as_the_same_key(kind: StatisticKind, probe: ProbeKind, index: tuple[int, int] | None) -> None:
    key = StatisticKey(kind, probe, *(index or (None, None)))
    assert StatisticKey.parse(str(key)) == key


def test_text_of_keys() -> None:
    """Criteria and statistics files spell them so."""
    assert str(StatisticKey("energy", "hidden")) == "energy:hidden"
    assert str(StatisticKey("gram_joint", "hidden", 0, 1)) == "gram_joint:hidden#0.1"


@pytest.mark.parametrize("text", ["median:hidden", "gram:tokens", "gram", "", "gate:loss", "joint:hidden#0.0"])
def test_what_cannot_be_measured_is_refused_with_what_can(text: str) -> None:
    with pytest.raises(UserError, match=f"{text!r} is no statistic that can be measured.*energy:K and gram:K"):
        StatisticKey.parse(text)


def test_criteria_and_closed_forms_take_different_statistics() -> None:
    assert set(get_args(StatisticKind)) - CLOSED_FORM_STATISTICS == {"energy", "gram", "routed"}
