"""When the reference syncs, whatever the strategy."""

import re

import pytest

from humanline.errors import ConfigError
from humanline.reference import AdapterReference, ModelReference, Reference, WindowedReference


class Noting(Reference):
    """A reference that only notes the steps at which it is told to sync."""

    def __init__(self, sync_every):
        super().__init__(sync_every)
        self.synced = []

    def log_probs(self, rows):
        raise NotImplementedError

    def become_policy(self, step):
        self.synced.append(step)


def noting(sync_every, steps):
    reference = Noting(sync_every)
    for step in steps:
        reference.before_optimizer_step(step)
    return reference


@pytest.mark.parametrize(("sync_every", "synced"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 6]), (9, []), (None, [])])
def test_the_reference_syncs_at_the_steps_that_sync_every_divides(sync_every, synced):
    reference = noting(sync_every, range(1, 9))
    assert reference.synced == synced
    assert reference.last_sync == max(synced, default=0)


def test_a_resumed_reference_knows_its_last_sync():
    resumed = noting(3, [])
    resumed.load_state_dict(noting(3, range(1, 9)).state_dict())
    assert resumed.last_sync == 6


@pytest.mark.parametrize("strategy", [AdapterReference, ModelReference, WindowedReference])
@pytest.mark.parametrize("sync_every", [0, -1, 1.5, True, "4"])
def test_a_period_that_is_no_number_of_steps_is_refused_by_name(strategy, sync_every):
    message = f"reference.sync_every: expected a positive integer or null (never sync), got {sync_every!r};"
    with pytest.raises(ConfigError, match=re.escape(message)):
        strategy(sync_every)
