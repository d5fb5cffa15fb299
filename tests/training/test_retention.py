"""Which checkpoints stay."""

import math

from hypothesis import given
from hypothesis import strategies as st

from ddt_jax import settings
from ddt_jax.training.retention import superfluous

VALUES = st.one_of(st.none(), st.integers(-3, 3), st.just(math.nan))


@given(
    st.dictionaries(st.integers(1, 60), VALUES, min_size=1),
    st.builds(
        settings.Train,
        keep_checkpoints=st.integers(1, 4),
        keep_every=st.integers(0, 7),
        keep_best=st.integers(0, 3),
        best_is=st.sampled_from(["lowest", "highest"]),
    ),
    st.data(),
)
def test_one_goes_only_if_nothing_keeps_it(metrics, train, data):
    read_back = data.draw(st.sampled_from(sorted(metrics)))
    gone = superfluous(list(metrics), read_back, train, metrics)
    settled = [s for s in metrics if s <= read_back]
    known = [s for s in settled if metrics[s] is not None and not math.isnan(metrics[s])]

    def beats(a, b):
        if metrics[a] == metrics[b]:
            return a > b
        return (metrics[a] < metrics[b]) == (train.best_is == "lowest")

    for s in metrics:
        kept = (
            s not in settled
            or sum(t > s for t in settled) < train.keep_checkpoints
            or (train.keep_every and s % train.keep_every == 0)
            or (s in known and sum(beats(t, s) for t in known) < train.keep_best)
        )
        assert (s in gone) == (not kept), s
