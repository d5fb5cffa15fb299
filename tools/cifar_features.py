"""Features of a small CIFAR-10 classifier, where Inception's weights are not at hand: a stand-in for rFID.

    python tools/cifar_features.py --config configs/ddt_cifar10.py --pairs DIR

Trains a classifier on the labels of the config's training images, then compares the PNG pairs that
`evaluate --config.evaluate.save_images=DIR` wrote: the Frechet distance between its features of originals and of
reconstructions, and how often it names the class of each right. Prints JSON. The figures compare tokenizers with each
other, judged by one classifier; they are no rFID. Made for an accelerator, a minute on one.

Legend: B images, D features.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever else is installed

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

CLASSES = 10
SIDES = ("originals", "reconstructions")
BATCH = 256


class Classifier(nn.Module):
    """Convolutions with residual pairs at three sizes; (logits [B, 10], features [B, 4 width])."""

    width: int = 64
    dtype: str = "bfloat16"

    @nn.compact
    def __call__(self, images_B):
        def conv(x, width):
            x = nn.Conv(width, (3, 3), use_bias=False, dtype=self.dtype)(x)
            return nn.silu(nn.GroupNorm(num_groups=None, group_size=16)(x))

        x = images_B.astype(self.dtype) / 127.5 - 1
        x = conv(x, self.width)
        for factor in (2, 4, 4):
            x = nn.max_pool(conv(x, factor * self.width), (2, 2), (2, 2))
            x = x + conv(conv(x, factor * self.width), factor * self.width)
        features_BD = jnp.max(x, axis=(1, 2)).astype(jnp.float32)
        return nn.Dense(CLASSES)(features_BD), features_BD


def fit(model, images, labels, *, epochs: int, seed: int = 0):
    """Parameters of the classifier. images: uint8 [N, 32, 32, 3]; labels: int [N]."""
    steps = max(1, epochs * len(images) // BATCH)
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3), weight_decay=0.05)
    params = model.init(jax.random.key(seed), jnp.asarray(images[:1]))
    images, labels = jnp.asarray(images), jnp.asarray(labels, jnp.int32)

    def augmented(key, x):
        flip, shift = jax.random.split(key)
        x = jnp.where(jax.random.bernoulli(flip), x[:, ::-1], x)
        at = jax.random.randint(shift, (2,), 0, 9)
        return jax.lax.dynamic_slice(jnp.pad(x, ((4, 4), (4, 4), (0, 0)), mode="reflect"), (*at, 0), x.shape)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x)[0], y).mean()

    @jax.jit
    def step(n, params, state):
        chosen, keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), n))
        rows = jax.random.randint(chosen, (BATCH,), 0, len(images))
        x = jax.vmap(augmented)(jax.random.split(keys, BATCH), images[rows])
        updates, state = optimizer.update(jax.grad(loss)(params, x, labels[rows]), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for n in range(steps):
        params, state = step(n, params, state)
    return params


def look(model, params, images):
    """(logits float32 [N, classes], features float32 [N, D])."""
    run = jax.jit(lambda x: model.apply(params, x))
    found = [run(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
    return tuple(np.concatenate([np.asarray(x) for x in parts]) for parts in zip(*found, strict=True))


def load(spec: str, s, most: int = 0):
    """(images uint8 [N, 32, 32, 3], labels) of a source in its own order."""
    from ddt_jax.data.base import open_source
    from ddt_jax.data.images import prepare

    source = open_source(spec, image_size=s.data.image_size, cache_dir=s.data.cache_dir)
    records = [source[i] for i in range(min(most or len(source), len(source)))]
    return np.stack([prepare(r["image"], s.data) for r in records]), np.array([r["label"] for r in records])


def read_pairs(folder: Path):
    """(originals, reconstructions), uint8 [N, H, W, 3], in the order of their names."""
    from PIL import Image

    if not all((folder / side).is_dir() for side in SIDES):
        raise SystemExit(f"{folder} holds no PNG pairs; evaluate a run with --config.evaluate.save_images={folder}")
    names = sorted(p.name for p in (folder / SIDES[0]).iterdir())
    return tuple(np.stack([np.asarray(Image.open(folder / side / n)) for n in names]) for side in SIDES)


def compare(s, pairs: Path, *, epochs: int, **sizes) -> dict:
    """The figures, for the settings of a run and the folder of its PNG pairs. sizes: of the classifier."""
    from ddt_jax.evaluation import frechet

    original, decoded = read_pairs(pairs)
    truth, labels = load(s.data.eval_source, s, len(original))
    if not np.array_equal(truth, original):
        raise SystemExit(f"{pairs} does not hold the first {len(original)} images of {s.data.eval_source}")
    model = Classifier(**sizes)
    params = fit(model, *load(s.data.source, s), epochs=epochs)
    seen = {name: look(model, params, x) for name, x in zip(SIDES, (original, decoded), strict=True)}
    right = {name: round(float(np.mean(logits.argmax(-1) == labels)), 4) for name, (logits, _) in seen.items()}
    moments = [frechet.Moments.of(features) for _, features in seen.values()]
    halves = [frechet.Moments.of(seen[SIDES[0]][1][i::2]) for i in (0, 1)]
    return {
        "images": len(original),
        "features": int(next(iter(seen.values()))[1].shape[1]),
        "accuracy": right,
        "frechet": round(float(frechet.distance(*moments)), 4),
        # What two sets of half as many other originals are apart: a distance of this size is none.
        "frechet_of_halves": round(float(frechet.distance(*halves)), 4),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "ddt_cifar10.py"), metavar="FILE")
    parser.add_argument("--pairs", type=Path, required=True, metavar="DIR", help="what evaluate.save_images wrote")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="of the classifier (default: 20)")
    options = parser.parse_args(argv)
    from ddt_jax import config

    print(json.dumps(compare(config.load(options.config), options.pairs, epochs=options.epochs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
