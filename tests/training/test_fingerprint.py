from dataclasses import replace

import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.tokenizers.base import make_tokenizer
from ddt_jax.training.fingerprint import fingerprint

S = settings.Experiment()
PARAMS = {"encoder": {"w": jnp.arange(4.0)}, "decoder": {"w": jnp.arange(3.0)}}
EXTRA = {"codebook": {"codes": jnp.ones((2, 3))}, "released": {"x": jnp.ones(2)}}


def of(s=S, params=None, extra=None, order="coarse_to_fine", **model):
    s = replace(s, model=replace(s.model, **model))
    tokenizer = make_tokenizer(s.model, s.data.image_size, 8)
    return fingerprint(s, tokenizer, PARAMS | (params or {}), EXTRA | (extra or {}), order)


BASE = of()


def test_it_changes_with_whatever_changes_the_meaning_of_a_code():
    others = [
        of(params={"encoder": {"w": jnp.arange(4.0).at[2].set(2.0000002)}}),
        of(extra={"codebook": {"codes": jnp.ones((2, 3)).at[0, 0].set(2)}}),
        of(order="fine_to_coarse"),
        of(replace(S, data=replace(S.data, image_size=64))),
        of(heads=2),
        of(dtype="bfloat16"),
    ]
    assert len({BASE, *others}) == 7


def test_it_stays_when_only_the_decoder_or_how_the_run_goes_changes():
    assert of() == BASE
    assert of(replace(S, name="other", seed=3, train=replace(S.train, steps=7))) == BASE
    assert of(params={"decoder": {"w": jnp.zeros(5)}}, decoder=settings.Renderer(), stage="decoder") == BASE
    codec = settings.VAECodec(weights="here.safetensors")
    elsewhere = replace(codec, weights="elsewhere.safetensors")
    assert of(codec=codec, patch_size=4) == of(codec=elsewhere, patch_size=4) != of(patch_size=4)


def test_a_tokenizer_that_names_no_parts_is_taken_whole():
    model = settings.LinearTokenizer()
    s = replace(S, model=model)
    one, other = (
        fingerprint(s, make_tokenizer(model, 32, 8), PARAMS | {"decoder": {"w": jnp.full(3, v)}}, EXTRA, "none")
        for v in (0.0, 1.0)
    )
    assert one != other
