"""Measurements on CIFAR-10's files: on two cores against PCA, and on an accelerator."""

import json
import sys
from pathlib import Path

import soak_runs as programs
from soak_gates import at_least, note, quiet, tokens_carry_the_image

ON_DEVICE = (  # of cifar10_device: four hits per code and step, and an average over as many epochs as on two cores
    "--config.model.dtype=bfloat16",
    "--config.model.quantizer.decay=0.9",
    "--config.data.workers=12",
    "--config.train.batch_size=256",
    "--config.train.ema=0.999",
    "--config.train.steps=20000",
    "--config.train.log_every=200",
    "--config.train.checkpoint_every=5000",
)


def cifar10(options, folder: Path) -> dict:
    """Trains on the Parquet files for some minutes of wall time; PCA on the same held-out images is what to beat."""
    results, outcomes = programs.train_and_evaluate(
        "configs/ddt_cifar10.py", folder / "run", options.seeds[0], options, minutes=options.minutes
    )
    note("fitting PCA to the training images ...")
    baseline = pca_psnr("configs/ddt_cifar10.py", options, components=32, images=results["n"])
    gates = [
        at_least("PSNR against PCA with 32 coefficients", results["psnr"], baseline["psnr"]),
        *tokens_carry_the_image(results),
        *quiet(outcomes),
    ]
    results |= {
        "stopped_by_the_clock": outcomes[0].code == programs.SAVED,
        "wall_seconds_of_training": round(outcomes[0].seconds, 1),
    }
    return {
        "config": "configs/ddt_cifar10.py",
        "seeds": options.seeds[:1],
        "results": {**results, "pca": baseline},
        "gates": gates,
    }


def cifar10_device(options, folder: Path) -> dict:
    """Many more steps of CIFAR-10 than two cores can take, in bfloat16. `--config.train.steps` sets how many."""
    config, pairs = "configs/ddt_cifar10.py", folder / "pairs"
    options.overrides = [*ON_DEVICE, *options.overrides]  # the last of two wins
    bench = [sys.executable, "tools/bench.py", "step", "--config", config, *options.overrides]
    speed = json.loads(programs.must(programs.run(bench), "bench.py step").stdout)
    note(f"{speed['examples_per_second']:,.0f} images/s, {speed['tflops_per_device']} TFLOP/s")
    to_evaluate = ("--config.evaluate.images=10000", f"--config.evaluate.save_images={pairs}")
    results, outcomes = programs.train_and_evaluate(
        config, folder / "run", options.seeds[0], options, minutes=options.minutes, to_evaluate=to_evaluate
    )
    note("training a classifier on the same images ...")
    judge = [sys.executable, "tools/cifar_features.py", "--config", config, "--pairs", str(pairs)]
    features = json.loads(programs.must(programs.run(judge), "cifar_features.py").stdout)
    gates = [
        at_least("PSNR, above that of two cores (docs/soak/cifar10.json)", results["psnr"], 22.4),
        at_least("originals that the classifier names right", features["accuracy"]["originals"], 0.85),
        at_least("images compared", features["images"], 10_000),
        *tokens_carry_the_image(results),
        *quiet(outcomes),
    ]
    results |= {
        "stopped_by_the_clock": outcomes[0].code == programs.SAVED,
        "wall_seconds_of_training": round(outcomes[0].seconds, 1),
        "speed": speed,
        "classifier": features,
    }
    return {"config": config, "seeds": options.seeds[:1], "results": results, "gates": gates}


def pca_psnr(config: str, options, *, components: int, images: int) -> dict:
    """PSNR of PCA with unquantised coefficients, fitted to the training images, on the images that `evaluate` takes."""
    import numpy as np
    from scipy.linalg import eigh

    from ddt_jax.data.base import open_source
    from ddt_jax.data.images import prepare
    from ddt_jax.data.loader import Loader
    from ddt_jax.evaluation.metrics import psnr

    s = programs.load_config(config, options)
    source, held_out = (
        open_source(spec, image_size=s.data.image_size, cache_dir=s.data.cache_dir)
        for spec in (s.data.source, s.data.eval_source)
    )
    rows = np.stack([prepare(source[i]["image"], s.data).ravel() for i in range(len(source))]).astype(np.float32)
    mean = rows.mean(axis=0)
    rows -= mean
    size = rows.shape[1]
    basis = eigh(rows.T @ rows / len(rows), subset_by_index=[size - components, size - 1])[1]

    loader = Loader(held_out, s.data, batch_size=s.train.batch_size, seed=s.seed)
    batches = list(loader.eval_batches(images, s.evaluate.batch_size))
    truth = np.concatenate([batch["image"][batch["valid"]] for batch in batches])
    flat = truth.reshape(len(truth), -1) - mean
    decoded = np.clip(np.rint(flat @ basis @ basis.T + mean), 0, 255).astype(np.uint8).reshape(truth.shape)
    return {
        "components": components,
        "fitted_to": len(rows),
        "n": len(truth),
        "psnr": round(float(psnr(truth, decoded).mean()), 4),
    }
