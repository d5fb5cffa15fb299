"""Which noise levels are trained, and which tokens are seen at each: Selftok's ablation at small scale, on scenes.
Hardware: 2 CPU cores, about 3 minutes for each variant.

Variants are TIME_SCHEDULE: times uniform or logit_normal; token schedule custom (the published piecewise one, its
shares on 32 tokens), uniform or logit_normal. `uniform_custom_weighted` and `uniform_uniform_weighted` weigh the
gradient of a token by 1 / P(it is visible). As published: order of the tokens, squared error of the velocity, times as
drawn (no shift). `python tools/soak.py schedules` runs them all and puts what comes of it beside the published order.
"""

from ddt_jax import config, settings
from ddt_jax.errors import UserError

SCHEDULES = {
    "custom": {"kind": "piecewise", "breakpoints": (200, 400, 600, 800, 1000), "tokens": (12, 11, 5, 3, 1)},
    "uniform": {"kind": "uniform"},
    "logit_normal": {"kind": "logit_normal"},
}
VARIANTS = {f"{t}_{s}": (t, s, False) for t in ("uniform", "logit_normal") for s in SCHEDULES}
VARIANTS |= {f"uniform_{s}_weighted": ("uniform", s, True) for s in ("custom", "uniform")}


def get_config(variant="uniform_custom"):
    if variant not in VARIANTS:
        raise UserError(f"config: {variant!r} is no variant; choose from {', '.join(VARIANTS)}")
    time, schedule, weighted = VARIANTS[variant]
    c = config.defaults()
    c.name = f"schedule_ablation_{variant}"
    c.model.num_tokens = 32
    c.model.encoder_depth = 1
    c.model.decoder_depth = 3
    c.model.schedule = config.defaults(settings.Schedule, direction="selftok", **SCHEDULES[schedule])
    c.model.token_gradient_weights = weighted
    # The published loss on another output: the velocity of a patch has the noise of its 192 values in it, and a linear
    # map from a width of 96 puts out 96 dimensions of it. Images lie in fewer.
    c.model.flow.prediction, c.model.flow.weighting = "x0", "velocity"
    c.model.flow.time = time
    c.model.flow.shift = 1.0
    c.model.flow.solver_steps = 16
    c.model.quantizer.normalize_input = "none"
    c.optimizer.newton_schulz_steps = 4
    c.optimizer.decay_fraction = 0.5
    c.train.steps = 1200
    c.evaluate.verifier = True
    return c
