"""A fresh run holds its codec's weights as they are in the file, spread over the mesh."""

import jax
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.interop import diffusers_vae
from ddt_jax.nn import autoencoder, params

SIZES = settings.Autoencoder(block_out_channels=(8,), layers_per_block=1, latent_channels=2, norm_groups=2)


def test_a_fresh_run_holds_the_weights_of_the_file(tmp_path, monkeypatch):
    boxed = jax.eval_shape(lambda: autoencoder.init(SIZES, jax.random.key(0)))
    rng = np.random.default_rng(0)
    tree = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float16), params.split(boxed)[0])
    codec = settings.VAECodec(preset="custom", sizes=SIZES, weights=str(diffusers_vae.write(tmp_path, tree, SIZES)))
    quantizer = settings.Quantizer(code_dim=2, codebook_size=4)
    model = settings.DDTTokenizer(
        num_tokens=2, width=8, heads=1, encoder_depth=1, decoder_depth=1, mlp_ratio=1, quantizer=quantizer, codec=codec
    )
    built = experiment.build(settings.Experiment(model=model, data=settings.Data(image_size=16)))
    # The rest of the state is made elsewhere and compiles for long.
    zeros = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), built.abstract)
    monkeypatch.setattr(type(built), "_init", lambda self: zeros)
    state = built.init()
    assert state.extra.keys() == {"codebook", "codec"}
    jax.tree.map(
        lambda x, w: np.testing.assert_array_equal(x, w.astype(np.float32), strict=True),
        jax.device_get(state.extra["codec"]),
        tree,
    )
    placed = jax.tree.map(lambda x: x.sharding, state.extra["codec"])
    assert placed == built.shardings.extra["codec"]
    assert not state.extra["codec"]["encoder"]["mid"]["resnet_0"]["conv1"]["kernel"].is_fully_replicated


def test_a_run_whose_weights_are_not_there_leaves_the_workdir_to_the_next_one(tmp_path):
    codec = settings.VAECodec(preset="custom", sizes=SIZES, weights=str(tmp_path / "none.safetensors"))
    model = settings.DDTTokenizer(num_tokens=2, width=8, heads=1, encoder_depth=1, decoder_depth=1, codec=codec)
    s = settings.Experiment(model=model, data=settings.Data(source="digits:train", image_size=16))
    with pytest.raises(UserError, match="none.safetensors: cannot be read: No such file"):
        experiment.train(s, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
