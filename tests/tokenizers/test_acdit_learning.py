"""ACDiT learns: what it draws goes on with what it drew before, and follows its label."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddt_jax import settings
from ddt_jax.tokenizers.acdit import ACDiT
from ddt_jax.training.state import unbox
from tests.tokenizers.acdit_small import SIZE, small

B, DRAWN = 32, 64

pytestmark = pytest.mark.slow


def trained(classes, diffusion, guidance=1.0):
    """A model of images that are all bright or all dark, class 1 and 0."""
    config = small(depth=2, width=32, classes=classes, diffusion=diffusion, guidance=guidance)
    model = ACDiT(config, SIZE, B)
    params = unbox(jax.jit(model.init)(jax.random.key(0))[0])
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(4e-3, 0.0, 400)))

    @jax.jit
    def step(params, opt_state, key):
        label = jax.random.randint(jax.random.fold_in(key, 7), (B,), 0, 2)
        image = jnp.broadcast_to(jnp.where(label, 230, 25).astype(jnp.uint8)[:, None, None, None], (B, SIZE, SIZE, 3))
        batch = {"image": image, "label": label, "slot": jnp.arange(B)}

        def loss(params):
            sums, counts, _ = model.loss_fn(params, {}, batch, key)
            return sums["diffusion"] / counts["diffusion"]

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = optimizer.init(params)
    for i in range(400):
        params, opt_state, value = step(params, opt_state, jax.random.fold_in(jax.random.key(1), i))
    return model, params, float(value)


@pytest.mark.parametrize(
    "diffusion",
    [
        settings.DDPM(schedule="linear", solver="dpmpp_2m", solver_steps=25, clip=1.0),
        settings.RectifiedFlow(solver="dpmpp_2m", solver_steps=10),
    ],
    ids=["ddpm", "flow"],
)
def test_later_blocks_go_on_with_what_the_first_one_drew(diffusion):
    model, params, _ = trained(0, diffusion)
    keys = jax.random.split(jax.random.key(2), DRAWN)
    images = np.asarray(jax.jit(model.sample)(params, {}, jnp.zeros((DRAWN,), jnp.int32), keys))
    blocks = images.reshape(DRAWN, 2, 4, 2, 4, 3).mean((2, 4, 5)).reshape(DRAWN, 4)  # brightness of each
    bright = blocks[:, 0] > 0
    assert 0.2 < bright.mean() < 0.8  # the first block chooses; without a context the others would for themselves
    alike = (blocks > 0) == bright[:, None]
    assert alike.all(1).mean() > 0.9, alike.mean(0)
    assert np.abs(np.abs(images) - 0.8).mean() < 0.15


def test_labels_are_followed():
    model, params, _ = trained(2, settings.RectifiedFlow(solver="dpmpp_2m", solver_steps=10), guidance=2.0)
    label = np.arange(DRAWN) % 2
    keys = jax.random.split(jax.random.key(2), DRAWN)
    images = np.asarray(jax.jit(model.sample)(params, {}, jnp.asarray(label), keys))
    assert ((images.mean((1, 2, 3)) > 0) == label).mean() > 0.9  # 0.94 without guidance; chance is 0.5
