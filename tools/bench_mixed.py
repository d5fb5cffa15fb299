"""`python tools/bench.py mixed`: what captions and images cost in one step, against what they cost apart.

A row of the mixed step is full of captions with their images, as many positions of the one as of the other (the
mixture of arXiv 2408.11039 §4.1); captions are random. Half as many rows hold texts alone, half as many images alone:
rows are equally long, and positions and images are as many in these two steps together as in the mixed one.
"""

import functools
import os
from dataclasses import replace

from bench_timing import least_seconds, load

MARKS = 4  # of a document with an image: BOS, BOV, EOV, EOS
APART = ("text", "images")


def mixed(options) -> dict:
    """Seconds and operations of the mixed step and of the two others, one after the other; the same of gradients alone,
    as an optimizer runs once or twice."""
    import jax

    from ddt_jax.scaling import flops

    s = load(options)
    built, batches, about = built_and_batches(s)
    devices = built["mixed"].mesh.devices.flatten()
    steps, gradients, operations = {}, {}, {}
    with jax.set_mesh(built["mixed"].mesh):
        for name, one in built.items():
            state, batch = one.init(), batches[name]
            operations[name] = flops.count(one.step, one.abstract, batch), flops.count(gradient(one), state, batch)
            gradients[name] = functools.partial(jax.jit(gradient(one)), one.init(), batch)
            steps[name] = _steps(one.step.lower(one.abstract, batch).compile(), state, batch)
        parts = {"mixed": steps["mixed"], "apart": lambda: [steps[name]() for name in APART]}
        parts["mixed_gradient"] = gradients["mixed"]
        parts["apart_gradient"] = lambda: [gradients[name]() for name in APART]
        seconds = least_seconds(parts, options.repeats)
    work = {"mixed": operations["mixed"], "apart": [sum(x) for x in zip(*(operations[n] for n in APART), strict=True)]}
    return {
        "config": s.name,
        "settings": [text.removeprefix("--config.") for text in options.overrides],
        **about,
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "gflop": {name: [round(x / 1e9, 3) for x in of] for name, of in work.items()},  # of a step, of a gradient
        "step_over_apart": round(seconds["mixed"] / seconds["apart"], 3),
        "gradient_over_apart": round(seconds["mixed_gradient"] / seconds["apart_gradient"], 3),
        "gflop_over_apart": [round(x / y, 3) for x, y in zip(work["mixed"], work["apart"], strict=True)],
        "device": f"{len(devices)} x {devices[0].device_kind}",
        "load": round(os.getloadavg()[0], 2),
    }


def _steps(compiled, state, batch):
    """One more step at each call: it consumes the state that it is given."""
    held = [state]

    def step():
        held[0], metrics = compiled(held[0], batch)
        return metrics

    return step


def gradient(built):
    """(state, batch) → gradient of the loss of a step."""
    import jax
    import jax.numpy as jnp

    def loss(params, extra, batch):
        sums, counts, _ = built.model.loss_fn(params, extra, batch, jax.random.key(0))
        weights = built.model.loss_weights
        return sum(weight * sums[name] / jnp.maximum(counts[name], 1) for name, weight in weights.items())

    return lambda state, batch: jax.grad(loss)(state.params, state.extra, batch)


def built_and_batches(s) -> tuple[dict, dict, dict]:
    """What is trained and a batch of it on the devices, by name; how many of what is in a batch.

    Raises:
      UserError: the config's images are not denoised, or its rows are odd in number or too short.
    """
    import jax
    import numpy as np

    from ddt_jax import experiment, settings
    from ddt_jax.errors import UserError
    from ddt_jax.multimodal import documents, sequence
    from ddt_jax.multimodal.vocabulary import Vocabulary

    if not isinstance(s.model, settings.Multimodal) or s.model.image.kind != "diffusion":
        raise UserError(f"mixed needs a config with model.image.kind='diffusion', not {s.name}")
    q, text_ids = s.sequences, s.sequences.text_vocab_size
    vocabulary = Vocabulary.extend(text_ids, 0)
    transformer = replace(s.model.transformer, vocab_size=s.model.transformer.vocab_size or vocabulary.size)
    denoising = replace(s.model, transformer=transformer)
    no_images = settings.CodeImages(num_tokens=1, codebook_size=1)  # of which text has none: a language model
    form = experiment.make_model(replace(s, model=denoising)).form
    length, batch_size = form.rows + MARKS, s.train.batch_size  # of an image alone, of a text alone, half of a pair
    pairs = q.context // (2 * length)
    if not pairs or batch_size % 2:
        raise UserError(
            f"mixed needs sequences.context={q.context} to be {2 * length} or more, for an image with as much "
            f"text, and train.batch_size={batch_size} to be even"
        )
    rng = np.random.default_rng(0)

    def text(length):
        return rng.integers(0, text_ids, length)

    def image(number=0):
        return documents.Image(rng.integers(0, 256, form.shape).astype(form.dtype), number)

    kinds = {  # model, a document, documents of a row, images of a row, rows
        "mixed": (denoising, lambda: documents.text_to_image(text(length), image()), pairs, pairs, batch_size),
        "text": (
            replace(denoising, image=no_images),
            lambda: documents.text_only(text(length - 2)),
            2 * pairs,
            0,
            batch_size // 2,
        ),
        "images": (denoising, lambda: documents.image_only(image()), 2 * pairs, 2 * pairs, batch_size // 2),
    }
    built, batches, context = {}, {}, 2 * length * pairs
    for name, (model, document, count, images, size) in kinds.items():
        rows = []
        for _ in range(size):
            layouts = [sequence.lay_out(document(), vocabulary, form) for _ in range(count)]
            row = sequence.pack_row(layouts, context, images, vocabulary["PAD"], form)
            rows.append(row | {"rows": sequence.target_rows(row["target"], int(row["target"].sum()))})
        sizes = replace(q, context=context, images=images, targets=len(rows[0]["rows"]))
        train = replace(s.train, batch_size=size)
        made = built[name] = experiment.build(replace(s, model=model, sequences=sizes, train=train))
        arrays = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        arrays |= {"slot": np.arange(size), "stop": np.zeros(size)}
        shapes = experiment.abstract_batch(made)
        batches[name] = {key: jax.device_put(arrays[key].astype(x.dtype), x.sharding) for key, x in shapes.items()}
    about = {
        "positions": {name: x["tokens"].size for name, x in batches.items()},
        "images": batch_size * pairs,
        "context": context,
    }
    return built, batches, about
