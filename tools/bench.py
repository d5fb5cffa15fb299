"""Short timings of one part against another, in one process and in turns.

    python tools/bench.py decode                       25 steps of decoding 64 images against one pass of the decoder
    python tools/bench.py decode --config configs/ddt_cifar10.py --images 16 --steps 50

Prints JSON. Weights are random: they do not matter for the time. Each part is compiled, run once, and then timed in
turns with the others; the least of each is compared, because whatever else the machine does can only add to it.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed


def least_seconds(parts: dict, repeats: int) -> dict[str, float]:
    """Name → seconds of its fastest call. parts: name → function of nothing that returns arrays."""
    import jax

    found = dict.fromkeys(parts, float("inf"))
    for round_ in range(repeats + 1):  # the first compiles
        for name, part in parts.items():
            begun = time.perf_counter()
            jax.block_until_ready(part())
            if round_:
                found[name] = min(found[name], time.perf_counter() - begun)
    return found


def decode(options) -> dict:
    """A whole decoding against one pass of the decoder and one of the encoder, for the same number of images."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from ddt_jax import config, experiment, settings

    pairs = [text.removeprefix("--config.").partition("=") for text in options.overrides]
    s = config.load(str(options.config), tuple((key, value) for key, _, value in pairs))
    built = experiment.build(dataclasses.replace(s, mesh=settings.Mesh()), jax.devices()[:1])
    model, state, rows, key = built.model, built.init(), options.images, jax.random.key(0)
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, model.codebook_size, (rows, model.num_tokens)), jnp.int32)
    images = jnp.asarray(rng.uniform(-1, 1, (rows, model.image_size, model.image_size, 3)), jnp.float32)
    # The decoder's inputs are what decoding gives it: patches of noise, one time, all codes visible.
    patches = jax.eval_shape(lambda x: model._patches(state.extra, x), images)
    noise = jax.random.normal(key, patches.shape, patches.dtype)
    none, every = jnp.zeros((rows,), jnp.int32), jnp.full((rows,), model.num_tokens, jnp.int32)

    @jax.jit
    def forward(state):
        vectors = model.quantizer.lookup(state.extra["codebook"], codes)
        return model._apply(state.params, "predict", noise, jnp.ones((rows,)), vectors, none, every)

    whole = jax.jit(lambda state: model.decode(state.params, state.extra, codes, key, steps=options.steps))
    encode = jax.jit(lambda state: model.encode(state.params, state.extra, images))
    parts = {"forward": forward, "decode": whole, "encode": encode}
    seconds = least_seconds({name: lambda part=part: part(state) for name, part in parts.items()}, options.repeats)
    return {
        "config": s.name,
        "images": rows,
        "steps": options.steps,
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "decode_in_forwards": round(seconds["decode"] / seconds["forward"], 2),
        # What a sampler would cost that runs the encoder at every step, to learn from it which tokens are visible.
        "with_encoder_in_forwards": round(
            (seconds["decode"] + options.steps * seconds["encode"]) / seconds["forward"], 2
        ),
        "device": jax.devices()[0].device_kind,
        "load": round(os.getloadavg()[0], 2),
    }


BENCHMARKS = {"decode": decode}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.NAME.NAME=VALUE changes a setting of the config.",
    )
    parser.add_argument("name", choices=BENCHMARKS, help="what is timed")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.py", metavar="FILE")
    parser.add_argument("--images", type=int, default=64, metavar="N", help="images at once (default: 64)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="solver steps (default: 25)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed calls of each part (default: 20)")
    options, rest = parser.parse_known_args(argv)
    wrong = [text for text in rest if not text.startswith("--config.") or "=" not in text]
    if wrong:
        parser.error(f"unknown: {' '.join(wrong)}")
    options.overrides = rest
    print(json.dumps(BENCHMARKS[options.name](options), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
