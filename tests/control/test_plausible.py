"""What no role says is refused; what good roles say, in whatever run, never is."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tricorn.control import messages as m
from tricorn.control.plausible import refuse_nonsense
from tricorn.errors import ProtocolError

from .world import Replicas, Role, Servers, World

STEPS = 6
ADDRESS = ("h", 1)
REFUSED = {
    "synchronous": [
        ("worker-1", m.Committed(epoch=1, upto=1, losses=[0.5])),
        ("worker-0", m.Committed(epoch=1, upto=STEPS + 1, losses=[])),
        ("worker-0", m.Committed(epoch=1, upto=1, losses=[0.5, 0.5])),
        ("worker-0", m.Ready(epoch=1, part="model", held=[STEPS + 1], address=ADDRESS)),
        ("worker-0", m.Saved(epoch=1, step=STEPS + 1, files=[])),
        ("worker-0", m.Want(epoch=1, steps=1)),
        ("worker-0", m.Trained(epoch=1, steps=[1], losses=[0.5])),
        ("worker-0", m.Applied(epoch=1, steps=[1])),
        ("worker-0", m.Evaluated(epoch=1, step=STEPS + 1, samples=1, sums={})),
    ],
    "asynchronous": [
        ("worker-0", m.Committed(epoch=1, upto=1, losses=[0.5])),
        ("server-0", m.Want(epoch=1, steps=1)),
        ("server-0", m.Trained(epoch=1, steps=[1], losses=[0.5])),
        ("worker-0", m.Trained(epoch=1, steps=[STEPS], losses=[0.5])),
        ("worker-0", m.Applied(epoch=1, steps=[1])),
        ("server-0", m.Applied(epoch=1, steps=[0, STEPS])),
        ("server-0", m.Ready(epoch=1, part="server0", held=[9], address=ADDRESS, applied=[(0, STEPS + 1)])),
        ("worker-0", m.Saved(epoch=1, step=1, files=[])),
        ("server-0", m.Saved(epoch=1, step=STEPS + 1, files=[])),
    ],
}
CASES = [(kind, role, message) for kind, cases in REFUSED.items() for role, message in cases]


@pytest.mark.parametrize(("kind", "role", "message"), CASES, ids=lambda part: str(part)[:40])
def test_refused(kind: str, role: str, message: m.Report) -> None:
    with pytest.raises(ProtocolError, match=role):
        refuse_nonsense(role, message, synchronous=kind == "synchronous", total_steps=STEPS)


def checked(world: type[World]) -> type[World]:
    """The world, in which every report goes the way it goes through the server."""

    class Checked(world):
        def _coordinator_hears(self, role: Role) -> None:
            message = role.outbox[0]
            assert m.Decoder(m.Report)(m.encode(message)[m.HEADER.size :]) == message
            refuse_nonsense(
                role.name, message, synchronous=self.facts.synchronous, total_steps=self.facts.total_steps
            )  # fmt: skip
            super()._coordinator_hears(role)

    return Checked


seeds = st.integers(0, 2**32)


@settings(max_examples=50)
@given(seeds, st.integers(1, 3), st.integers(0, 12))
def test_nothing_that_a_good_role_says_is_refused(seed: int, workers: int, faults: int) -> None:
    for world in (
        checked(Replicas)(Random(seed), workers=workers, faults=faults),
        checked(Servers)(Random(seed), workers=workers, servers=2, faults=faults),
    ):
        world.run()
        assert world.outcome == "done"
