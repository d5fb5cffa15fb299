"""The parts of tools/chaos.py that hurt data: bits of a checkpoint, and latents that are NaN."""

import json
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import soak_runs as programs
from chaos_faults import flip
from etils import epath

# A tokenizer on latents of a tiny autoencoder: images are bytes and cannot be NaN, latents can.
_NAN_CONFIG = """
from ddt_jax import config, settings

def get_config():
    c = config.sibling({smoke!r}, "smoke").get_config()
    sizes = settings.Autoencoder(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_groups=4)
    c.model.codec = config.defaults(settings.VAECodec, preset="custom", sizes=sizes, random_weights=True)
    c.data.source = {source!r}
    return c
"""
_IMAGES, _BAD = 64, (5, 40)  # images of the source, and those of which the latents become NaN


def flipped_bits(workdir: Path, count: int, rng: random.Random) -> dict:
    """Single bits flipped all over the newest checkpoint, half of them as if it had not been read back; each time it is
    restored, as a run does that goes on.

    Returns:
      injected, detected (the checkpoint is refused), harmless (every restored value is bit by bit what it was), silent
      (neither), files, and refused_by (the hashes of the files, or what the arrays show).
    """
    import jax

    from ddt_jax import experiment, settings
    from ddt_jax.errors import UserError
    from ddt_jax.training.checkpoint import Checkpoints, digest
    from ddt_jax.training.stored import LIST

    warnings.filterwarnings("ignore", "coroutine", RuntimeWarning)  # Orbax drops some when a file is damaged
    s = experiment.saved_settings(str(workdir))
    built = experiment.build(replace(s, mesh=settings.Mesh()), jax.devices()[:1], to_train=False)
    step, copy = max(programs.saved_steps(workdir)), workdir.parent / "flipped"
    folder = copy / "checkpoints" / str(step)
    shutil.copytree(workdir / "checkpoints" / str(step), folder)

    def restored() -> str | None:
        """Digest of what a run would go on from; None if it would not from this checkpoint."""
        points = Checkpoints(copy, s.train, read_only=True)
        try:
            with jax.set_mesh(built.mesh):
                return digest(points.restore(built.abstract))
        except UserError:
            return None
        finally:
            points.close()

    whole, listed = restored(), (folder / LIST).read_bytes()
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    found = {"injected": count, "detected": 0, "harmless": 0, "silent": 0, "files": len(files)}
    refused_by = {"hashes of files": 0, "arrays": 0}
    for i in range(count):
        every = i < 2 * len(files)  # each file twice, then by size
        file = files[i // 2 % len(files)] if every else rng.choices(files, [p.stat().st_size for p in files])[0]
        read_back, content = i % 2 == 0 or file.name == LIST, file.read_bytes()
        if not read_back:
            (folder / LIST).unlink()
        flip(file, rng.randrange(len(content) * 8))
        value = restored()
        found["detected" if value is None else "harmless" if value == whole else "silent"] += 1
        if value is None:
            refused_by["hashes of files" if read_back and file.name != LIST else "arrays"] += 1
        file.write_bytes(content)
        (folder / LIST).write_bytes(listed)
    if restored() != whole:
        raise programs.Failed("the checkpoint is not restored as it was before the first flip")
    shutil.rmtree(copy)
    return {**found, "refused_by": refused_by}


def nan_batches(folder: Path, seed: int, env: dict[str, str]) -> dict:
    """A run on latents of which a few are NaN. env: variables of its commands.

    Returns:
      skipped (steps), kept (their batches), bad_losses (lines of the log whose loss is not finite), code (of the run).
    """
    import numpy as np
    from PIL import Image

    from ddt_jax.data import latents
    from ddt_jax.data.base import open_source

    images, cache, config = folder / "images", folder / "latents", folder / "nan.py"
    images.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(_IMAGES):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(images / f"{i:03d}.png")

    def write_config(source):
        config.write_text(_NAN_CONFIG.format(smoke=str(programs.ROOT / "configs" / "nan.py"), source=source))

    write_config(f"folder:{images}")
    make = programs.command("latents", "--config", str(config), "--to", str(cache))
    programs.must(programs.run(make, env=env), "latents")
    source = open_source(f"latents:{cache}", image_size=32)
    records = [source[i] for i in range(len(source))]
    for i in _BAD:
        records[i] = records[i] | {"latent_mean": np.full_like(records[i]["latent_mean"], np.nan)}
    packed = (latents.pack(r["latent_mean"], r["latent_logvar"], index=i) for i, r in enumerate(records))
    (shard,) = cache.glob("*.arrayrecord")
    latents.write_shard(epath.Path(shard), packed)
    write_config(f"latents:{cache}")
    workdir = folder / "run"
    train = programs.command("train", "--config", str(config), "--workdir", str(workdir), "--config.train.log_every=1")
    outcome = programs.must(programs.run(train, env=env), "the run on NaN")
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = list((workdir / "bad_batches").glob("*")) if (workdir / "bad_batches").exists() else []
    return {
        "skipped": sum("is not finite; skipped" in line for line in outcome.heard),
        "kept": len(kept),
        "bad_losses": sum(not np.isfinite(float(line["loss"])) for line in log),
        "code": outcome.code,
    }
