"""Does a learning rate hold at other widths? How far activations move in the first steps, width by width.

    python tools/coordinate_check.py                       # backbone and tokenizer, with Muon and with AdamW
    python tools/coordinate_check.py backbone --optimizer adamw --widths 64,128,256,512 --to runs/coordinates

A model of each width learns a few steps from one batch, with `optimizer.transfer_from` and without. Then one kind of
parameters is moved to where it came, all others stand where they began, and activations are looked at. The table has
the exponent with which their change grows with the width: 0 is what lets a rate hold at all widths (arXiv 2203.03466
appendix D.1). One kind at a time, because tables alone move activations so far that nothing else is seen beside them.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddt_jax import experiment, settings
from ddt_jax.data.scenes import ScenesSource
from ddt_jax.nn import spans
from ddt_jax.nn.images import patchify
from ddt_jax.tokenizers import base
from ddt_jax.training import optimizer as optimizers
from ddt_jax.training import transfer

BASE = 32  # the width where the rate was found
WIDTHS = (32, 64, 128, 256)
KINDS = ("backbone", "tokenizer")
TABLES, INNER, OUT = "tables, gains, biases, maps into the width", "maps between widths", "maps out of the width"
RATES = {"muon": 3e-3, "adamw": 3e-4}  # so small that norms do not hide how far a step goes
_ROWS, _CONTEXT, _IDS, _CODES = 8, 32, 48, 16
_QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None  # few steps, many programs


def experiment_of(kind: str, width: int) -> settings.Experiment:
    """A small model of the kind at a width, its heads 16 wide."""
    if kind == "backbone":
        sizes = {"width": BASE, "depth": 1, "heads": 2, "kv_heads": 2, "mlp_width": 2 * BASE}
        transformer = settings.Transformer(vocab_size=_IDS + _CODES, scan_layers=False, **sizes)
        image = settings.CodeImages(num_tokens=4, codebook_size=_CODES)
        model = settings.Multimodal(transformer=transformer, image=image)
    else:
        sizes = {"width": BASE, "heads": 2, "encoder_depth": 1, "decoder_depth": 1, "mlp_ratio": 2}
        codes = settings.Quantizer(code_dim=4, codebook_size=_CODES, normalize_input="none")
        model = settings.DDTTokenizer(num_tokens=4, quantizer=codes, **sizes)
    s = settings.Experiment(model=transfer.at_width(model, width))
    how = replace(s.optimizer, schedule="constant", warmup=0, weight_decay=0.0, clip_norm=0.0)
    return replace(s, optimizer=how, train=replace(s.train, batch_size=_ROWS, ema=0.0))


def batch_of(kind: str) -> dict:
    """Sequences that count on by one, two or three; or scenes."""
    slots = np.arange(_ROWS, dtype=np.int32)
    if kind != "backbone":
        scenes = ScenesSource("train", 32)
        return {"image": np.stack([scenes[i]["image"] for i in range(_ROWS)]), "slot": slots}
    places = np.arange(_CONTEXT, dtype=np.int32)
    every = np.broadcast_to(places, (_ROWS, _CONTEXT))
    tokens = (slots[:, None] * 5 + places * (1 + slots[:, None] % 3)) % _IDS
    rows = np.where(places < _CONTEXT - 1, every, -1).astype(np.int32)
    return {"tokens": tokens, "position": every, "start": np.zeros_like(every), "rows": rows, "slot": slots}


@dataclass(frozen=True)
class Compiled:
    """What is the same at a width with and without transfer.

    Attributes:
      gradient: (params, extra, key) → (gradient, extra behind the step).
      activations: (params, extra) → name → array.
    """

    gradient: Callable
    activations: Callable


@functools.cache
def compiled(kind: str, width: int) -> Compiled:
    model, batch = experiment.make_model(experiment_of(kind, width)), batch_of(kind)

    def loss(params, extra, key):
        sums, counts, stats = model.loss_fn(params, extra, batch, key)
        return sum(w * sums[name] / counts[name] for name, w in model.loss_weights.items()), stats

    def gradient(params, extra, key):
        grads, stats = jax.grad(loss, has_aux=True)(params, extra, key)
        return grads, model.update_extra(extra, stats, key)

    activations = _of_backbone if kind == "backbone" else _of_tokenizer
    jit = functools.partial(jax.jit, compiler_options=_QUICK)
    return Compiled(jit(gradient), jit(functools.partial(activations, model, batch)))


def _of_backbone(model, batch, params, extra):
    def run(module):
        visible = spans.causal(_CONTEXT, start=batch["start"])
        hidden_BSD, _ = module(module.embed(batch["tokens"]), batch["position"], visible)
        return {"last hidden state": hidden_BSD, "logits": module.logits(hidden_BSD)}

    return model.module.apply({"params": model.all_params(params, extra)}, method=run)


def _of_tokenizer(model, batch, params, extra):
    patches_BNP = patchify(base.to_float(batch["image"]), model.config.patch_size)
    # Vectors that stand in the place of codes: which code is nearest would jump.
    codes_BKd = jax.random.normal(jax.random.key(1), (_ROWS, model.num_tokens, model.config.quantizer.code_dim))
    noisy_BNP = patches_BNP + jax.random.normal(jax.random.key(2), patches_BNP.shape)
    none_B, all_B = jnp.zeros((_ROWS,), jnp.int32), jnp.full((_ROWS,), model.num_tokens, jnp.int32)

    def run(network):
        features_BKd = network.encode(patches_BNP)
        return features_BKd, network.predict(noisy_BNP, jnp.linspace(0.1, 0.9, _ROWS), codes_BKd, none_B, all_B)

    last = lambda module, _: module.path in (("encoder", "norm"), ("decoder", "blocks"))  # noqa: E731
    how = {"capture_intermediates": last, "mutable": ["intermediates"]}
    (features_BKd, predicted_BNP), seen = model._network.apply({"params": params}, method=run, **how)
    (read_BSD,) = seen["intermediates"]["encoder"]["norm"]["__call__"]
    (drawn_BND,) = seen["intermediates"]["decoder"]["blocks"]["__call__"]
    return {
        "encoder's last state": read_BSD,
        "features of codes": features_BKd,
        "decoder's last state": drawn_BND,
        "prediction": predicted_BNP,
    }


@functools.cache
def kinds_of(kind: str):
    """Tree of what each parameter is: TABLES, INNER or OUT."""
    builds = (experiment.build(experiment_of(kind, w), jax.devices()[:1], to_train=False) for w in (2 * BASE, BASE))
    here, there = builds

    def one(d, here, there):
        reads, writes = transfer.grown(d, here.shape, there.shape)
        return TABLES if reads == 1 else OUT if writes == 1 else INNER

    return jax.tree.map(one, here.declarations, here.abstract.params, there.abstract.params)


@functools.cache  # at the width BASE nothing is scaled, so that is asked for twice
def changes(kind: str, width: int, optimizer: str, transferred: bool, lr: float, steps: int) -> dict[str, float]:
    """ACTIVATION by WHAT → root of the mean square of the change of an activation where that kind of parameters is
    moved by so many steps; ACTIVATION at first → its size.
    """
    s = experiment_of(kind, width)
    s = replace(s, optimizer=replace(s.optimizer, name=optimizer, lr=lr, transfer_from=BASE if transferred else 0))
    built, of = experiment.build(s, jax.devices()[:1], to_train=False), compiled(kind, width)
    tx = optimizers.make_optimizer(s.optimizer, steps, built.declarations)
    state = built.init()
    params, extra, opt_state = state.params, state.extra, state.opt_state
    before = of.activations(params, extra)

    @functools.partial(jax.jit, compiler_options=_QUICK)
    def moved(grads, opt_state, params):
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for step in range(steps):
        grads, extra = of.gradient(params, extra, jax.random.key(step))
        params, opt_state = moved(grads, opt_state, params)
    size = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))  # noqa: E731
    found = {f"{name} at first": size(x) for name, x in before.items()}
    for what in (TABLES, INNER, OUT):
        mixed = jax.tree.map(lambda k, new, old, w=what: new if k == w else old, kinds_of(kind), params, state.params)
        after = of.activations(mixed, extra)
        found |= {f"{name} by {what}": size(after[name] - x) for name, x in before.items()}
    return found


def exponents(by_width: dict[int, dict[str, float]]) -> dict[str, float]:
    """With which power of the width each grows: least squares over the logarithms. What is 0 somewhere has none."""
    widths, found = sorted(by_width), {}
    for name in by_width[widths[0]]:
        values = np.array([by_width[w][name] for w in widths])
        if (values > 1e-9).all():
            found[name] = float(np.polyfit(np.log(widths), np.log(values), 1)[0])
    return found


def check(kind: str, optimizer: str, widths=WIDTHS, steps: int = 4, lr: float = 0.0) -> dict:
    """{"on" and "off": {"changes": width → `changes`, "exponents": `exponents`}}, and how it was made."""
    lr = lr or RATES[optimizer]
    found = {"kind": kind, "optimizer": optimizer, "lr": lr, "steps": steps}
    for name, transferred in (("on", True), ("off", False)):
        by_width = {w: changes(kind, w, optimizer, transferred and w != BASE, lr, steps) for w in widths}
        found[name] = {"changes": by_width, "exponents": exponents(by_width)}
    return found


def table(found: dict) -> str:
    on, off = (found[name]["exponents"] for name in ("on", "off"))
    lines = [f"{found['kind']}, {found['optimizer']}, {found['steps']} steps at {found['lr']:g}", ""]
    lines += ["| grows with the width to the power of | on | off |", "|---|---:|---:|"]
    return "\n".join([*lines, *(f"| {name} | {on[name]:+.2f} | {off[name]:+.2f} |" for name in on if name in off)])


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", nargs="*", metavar="KIND", help=f"{' or '.join(KINDS)} (default: both)")
    parser.add_argument("--optimizer", action="append", choices=tuple(RATES), help="default: both")
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), metavar="N,N", help="multiples of 32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.0, help=f"default: {RATES}")
    parser.add_argument("--to", metavar="DIR", help="also write KIND_OPTIMIZER.json there")
    options = parser.parse_args(arguments)
    if unknown := set(options.kind) - set(KINDS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    widths = tuple(int(w) for w in options.widths.split(","))
    for kind in options.kind or KINDS:
        for optimizer in options.optimizer or RATES:
            found = check(kind, optimizer, widths, options.steps, options.lr)
            print(table(found), end="\n\n", flush=True)
            if options.to:
                folder = Path(options.to)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{kind}_{optimizer}.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
