"""Short measurements, each against what it is to be judged by.

    python tools/bench.py decode                       25 steps of decoding 64 images against one pass of the decoder
    python tools/bench.py decode --config configs/ddt_cifar10.py --images 16 --steps 50
    python tools/bench.py step --config configs/ddt_cifar10.py --config.train.batch_size=256
                                                       a train step: examples per second, and its share of what the
                                                       device reaches on one product of matrices in the same type
    python tools/bench.py blocks                       skip-causal attention (ACDiT) block by block against a mask
    python tools/bench.py mixed                        a step on captions and images against one on as much text and one
                                                       on as many images
    python tools/bench.py cache                        1,024 tokens with a cache and without; one at 512, at 4,096
    python tools/bench.py llama --gigabytes 4          memory for `import llama` and `export llama` against its limit

Prints JSON. Weights are random: they do not matter for time and memory. What is timed is compiled, run once, and then
timed in turns with the others in one process; the least of each is compared, because whatever else the machine does
can only add to it. Memory is the peak of a process that runs the verb, above that for a tiny model.
"""

import argparse
import json
import os
import sys
import time

from bench_llama import llama
from bench_mixed import mixed
from bench_timing import ROOT, least_seconds, load


def decode(options) -> dict:
    """A whole decoding against one pass of the decoder and one of the encoder, for the same number of images."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from ddt_jax import experiment, settings

    s = load(options)
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


def step(options) -> dict:
    """A train step on a batch that lies on the devices already, in rounds of several steps."""
    import jax

    from ddt_jax import experiment, settings
    from ddt_jax.scaling import flops
    from ddt_jax.training import corpus

    s = load(options)
    if isinstance(s.model, settings.Multimodal) and not s.model.transformer.vocab_size:
        s, _ = corpus.resolve(s)
    built = experiment.build(s)
    devices = built.mesh.devices.flatten()
    side = options.matrix or (2048 if devices[0].platform == "cpu" else 8192)
    dtype = getattr(s.model, "dtype", "") or getattr(getattr(s.model, "transformer", None), "dtype", "") or "float32"
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda x: x @ x)  # of random numbers: of equal ones it takes less power, and is faster
    peak = 2 * side**3 / least_seconds({"product": lambda: product(square)}, options.repeats)["product"]
    with jax.set_mesh(built.mesh):
        batch = random_batch(built)
        work = flops.count(built.step, built.abstract, batch)
        begun = time.perf_counter()
        compiled = built.step.lower(built.abstract, batch).compile()
        compile_seconds = time.perf_counter() - begun
        held = [built.init()]  # a step consumes the state that it is given

        def some_steps():
            for _ in range(options.steps):
                held[0], metrics = compiled(held[0], batch)
            return metrics

        seconds = least_seconds({"steps": some_steps}, options.repeats)["steps"] / options.steps
    memory = devices[0].memory_stats() or {}
    return {
        "config": s.name,
        "settings": [text.removeprefix("--config.") for text in options.overrides],
        "parameters": sum(x.size for x in jax.tree.leaves(built.abstract.params)),
        "batch_size": s.train.batch_size,
        "seconds_per_step": seconds,
        "examples_per_second": round(s.train.batch_size / seconds, 1),
        # Products of matrices as written: what is computed again for gradients, and Muon's products, count.
        "tflop_per_step": work / 1e12,
        "tflops_per_device": round(work / seconds / len(devices) / 1e12, 4),
        "tflops_of_one_product": round(peak / 1e12, 4),
        "share_of_one_product": round(work / seconds / len(devices) / peak, 4),
        "product": f"{side} x {side} {dtype}",
        "compile_seconds": round(compile_seconds, 1),
        "peak_memory_gb": round(memory["peak_bytes_in_use"] / 1e9, 2) if memory else None,
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "jax": jax.__version__,
        "load": round(os.getloadavg()[0], 2),
    }


def random_batch(built) -> dict:
    """A batch that a step takes, of no meaning, on the devices."""
    import jax
    import numpy as np

    from ddt_jax import experiment

    rng = np.random.default_rng(0)

    def one(name, like):
        if name in ("position", "slot", "rows"):
            numbers = np.broadcast_to(np.arange(like.shape[-1]), like.shape)
            return np.minimum(numbers, built.settings.sequences.context - 2) if name == "rows" else numbers
        if np.issubdtype(like.dtype, np.floating):
            return rng.standard_normal(like.shape, np.float32)
        most = {"image": 256, "tokens": getattr(built.model, "first_code", 1)}.get(name, 1)
        return rng.integers(0, most, like.shape)

    shapes = experiment.abstract_batch(built)
    return {name: jax.device_put(one(name, x).astype(x.dtype), x.sharding) for name, x in shapes.items()}


# A model whose cache is small beside its weights, and one that writes a thousand tokens in seconds.
WIDE = {"width": 1024, "depth": 4, "heads": 8, "kv_heads": 2, "mlp_width": 4096}
SMALL = {"width": 256, "depth": 4, "heads": 4, "kv_heads": 4, "mlp_width": 768}
TOKENS, LENGTHS, FEW, MANY = 1024, (512, 4096), 8, 136


def cache(options) -> dict:
    """What a cache saves, and what a longer one costs. Weights are random, one prompt, the likeliest token."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ddt_jax import settings
    from ddt_jax.multimodal import backbone
    from ddt_jax.multimodal.generate import Prompts, generate
    from ddt_jax.nn import params as params_lib
    from ddt_jax.nn import spans

    def make(sizes):
        c = settings.Transformer(vocab_size=1024, **sizes)
        return backbone.for_decoding(c, params_lib.split(backbone.init(c, jax.random.key(0)))[0])

    c, params = make(SMALL)
    sampling = settings.Sampling(tokens=TOKENS, temperature=0.0)
    prompt = Prompts(np.ones((1, 1), np.int32), np.ones(1, np.int32))
    with_cache = jax.jit(lambda p: generate(c, p, prompt, jnp.arange(1), sampling))

    def forward(length):
        ids, position = jnp.ones((1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None]
        model = backbone.Backbone(c)
        last = lambda m: m.logits(m(m.embed(ids), position, spans.causal(length))[0][:, -1])  # noqa: E731
        return jax.jit(lambda p: model.apply({"params": p}, method=last))

    some = np.arange(TOKENS // 8, TOKENS + 1, TOKENS // 8)  # forwards over a text that grows, timed at eight lengths
    parts = {f"forward_{n}": forward(n) for n in some} | {"with_cache": with_cache}
    seconds = least_seconds({n: lambda f=f: f(params) for n, f in parts.items()}, options.repeats)
    without = float(np.interp(np.arange(1, TOKENS + 1), some, [seconds[f"forward_{n}"] for n in some]).sum())

    wide, weights = make(WIDE)

    def write(length, tokens):
        """Some tokens behind a prompt, so that the cache has `length` slots in the end."""
        given = Prompts(np.ones((1, length - tokens), np.int32), np.full(1, length - tokens, np.int32))
        how = settings.Sampling(tokens=tokens, temperature=0.0)
        made = jax.jit(lambda p: generate(wide, p, given, jnp.arange(1), how))
        return lambda: made(weights)

    # Prompts cost the same but for a few positions; what is left is tokens.
    at = {(length, tokens): write(length, tokens) for length in LENGTHS for tokens in (FEW, MANY)}
    taken = least_seconds(at, options.repeats)
    per_token = {f"token_at_{n}": (taken[n, MANY] - taken[n, FEW]) / (MANY - FEW) for n in LENGTHS}
    short, long = per_token.values()
    return {
        "tokens": TOKENS,
        "seconds": {"with_cache": seconds["with_cache"], "without_cache": without, **per_token},
        "with_over_without": round(seconds["with_cache"] / without, 4),
        "parameters_of_the_wide_one": sum(x.size for x in jax.tree.leaves(weights)),
        "long_over_short": round(long / short, 3),
        "device": jax.devices()[0].device_kind,
        "load": round(os.getloadavg()[0], 2),
    }


BLOCKS, HEADS, HEAD_DIM = (4, 256), 12, 64  # ACDiT-B on ImageNet at 256 px: blocks and tokens of one


def blocks(options) -> dict:
    """What it saves that each block gets the keys it sees alone: medians of ratios of calls in turns."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ddt_jax.nn import spans
    from ddt_jax.nn.attention import attend

    n, size = BLOCKS
    seen = spans.skip_causal(n, size)
    rng = np.random.default_rng(0)
    qkv = [jnp.asarray(rng.normal(size=(1, HEADS, 2 * n * size, HEAD_DIM)), jnp.float32) for _ in range(3)]

    def calls(method):
        forwards = lambda *qkv: attend(*qkv, seen, method=method)  # noqa: E731
        both = jax.grad(lambda *qkv: jnp.sum(jnp.sin(forwards(*qkv))), (0, 1, 2))
        return {"forwards": jax.jit(forwards), "forwards_and_backwards": jax.jit(both)}

    def seconds(call):
        begun = time.perf_counter()
        jax.block_until_ready(call(*qkv))
        return time.perf_counter() - begun

    dense, by_block, found = calls("dense"), calls("blocks"), {}
    for name in dense:
        pairs = [(seconds(by_block[name]), seconds(dense[name])) for _ in range(options.repeats + 1)][1:]
        found[name] = {
            "seconds_by_block": float(np.median([a for a, _ in pairs])),
            "seconds_dense": float(np.median([b for _, b in pairs])),
            "by_block_over_dense": round(float(np.median([a / b for a, b in pairs])), 3),
        }
    return {
        "blocks": n,
        "tokens_of_a_block": size,
        **found,
        "share_of_the_logits": round((n + 1) / (4 * n), 4),
        "device": jax.devices()[0].device_kind,
        "load": round(os.getloadavg()[0], 2),
    }


BENCHMARKS = {"decode": decode, "step": step, "mixed": mixed, "blocks": blocks, "cache": cache, "llama": llama}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.NAME.NAME=VALUE changes a setting of the config.",
    )
    parser.add_argument("name", choices=BENCHMARKS, help="what is measured")
    parser.add_argument(
        "--config", metavar="FILE", help="default: configs/quickstart.py; mixed: configs/transfusion_scenes.py:plain"
    )
    parser.add_argument("--images", type=int, default=64, metavar="N", help="images at once (default: 64)")
    parser.add_argument(
        "--steps", type=int, default=25, metavar="N", help="solver steps, or train steps of a round (default: 25)"
    )
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed calls of each part (default: 20)")
    parser.add_argument("--matrix", type=int, default=0, metavar="N", help="step: side of the product's matrices")
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, metavar="N", help="llama: size of the model (default: 4)"
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="llama: a disk for four times that (default: the system's /tmp)"
    )
    options, rest = parser.parse_known_args(argv)
    wrong = [text for text in rest if not text.startswith("--config.") or "=" not in text]
    if wrong:
        parser.error(f"unknown: {' '.join(wrong)}")
    options.overrides = rest
    default = "transfusion_scenes.py:plain" if options.name == "mixed" else "quickstart.py"
    options.config = options.config or f"{ROOT / 'configs' / default}"
    from ddt_jax.errors import UserError

    try:
        print(json.dumps(BENCHMARKS[options.name](options), indent=2))
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    from ddt_jax import host_memory

    host_memory.use_huge_pages()  # as the command line program does
    sys.exit(main())
