from dataclasses import replace

import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.training.fingerprint import fingerprint

S = settings.Experiment()
PARAMS, EXTRA = {"w": jnp.arange(4.0)}, {"codebook": {"codes": jnp.ones((2, 3))}}
BASE = fingerprint(S, PARAMS, EXTRA, "coarse_to_fine")


def of(s=S, params=PARAMS, extra=EXTRA, order="coarse_to_fine", **model):
    return fingerprint(replace(s, model=replace(s.model, **model)), params, extra, order)


def test_it_changes_with_whatever_changes_the_meaning_of_a_code():
    others = [
        of(params={"w": jnp.arange(4.0).at[2].set(2.0000002)}),
        of(extra={"codebook": {"codes": jnp.ones((2, 3)).at[0, 0].set(2)}}),
        of(order="fine_to_coarse"),
        of(replace(S, data=replace(S.data, image_size=64))),
        of(schedule=replace(S.model.schedule, full_below=0.5)),
        of(heads=2),
    ]
    assert len({BASE, *others}) == 7


def test_it_stays_when_only_how_the_run_goes_changes():
    assert of() == BASE
    assert of(replace(S, name="other", seed=3, train=replace(S.train, steps=7))) == BASE
    assert of(scan_layers=True) == BASE
    codec = settings.VAECodec(random_weights=True)
    assert of(codec=codec) == of(codec=replace(codec, weights="elsewhere.safetensors")) != BASE
