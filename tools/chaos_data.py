"""The parts of tools/chaos.py that hurt data: bits of a checkpoint, and latents that are NaN."""

import json
import random
import shutil
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
    """Single bits flipped all over the newest checkpoint, half of them as if it had not been read back.

    Returns:
      injected, detected, harmless (every array is bit by bit what it was), silent (neither), files.
    """
    from ddt_jax.training.stored import LIST, Damaged, Stored

    step = max(programs.saved_steps(workdir))
    folder = workdir.parent / "flipped"
    shutil.copytree(workdir / "checkpoints" / str(step), folder)
    whole = {name: Stored(folder).read(name).tobytes() for name in Stored(folder).names()}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    found = {"injected": count, "detected": 0, "harmless": 0, "silent": 0, "files": len(files)}
    listed = (folder / LIST).read_bytes()
    for i in range(count):
        every = i < 2 * len(files)  # each file twice, then by size
        file = files[i // 2 % len(files)] if every else rng.choices(files, [p.stat().st_size for p in files])[0]
        read_back, content = i % 2 == 0 or file.name == LIST, file.read_bytes()
        if not read_back:
            (folder / LIST).unlink()
        flip(file, rng.randrange(len(content) * 8))
        stored = Stored(folder)
        try:
            by_files = read_back and file.name != LIST and stored.file_problem()
            if by_files or stored.array_problems():
                outcome = "detected"
            else:
                same = {name: stored.read(name).tobytes() for name in stored.names()} == whole
                outcome = "harmless" if same else "silent"
        except Damaged:
            outcome = "detected"
        found[outcome] += 1
        file.write_bytes(content)
        (folder / LIST).write_bytes(listed)
    shutil.rmtree(folder)
    return found


def nan_batches(folder: Path, options) -> dict:
    """A run on latents of which a few are NaN.

    Returns:
      skipped (steps), kept (their batches), bad_losses (lines of the log whose loss is not finite), code (of the run).
    """
    import numpy as np
    from PIL import Image

    from ddt_jax.data import latents
    from ddt_jax.data.base import open_source

    images, cache, config = folder / "images", folder / "latents", folder / "nan.py"
    images.mkdir(parents=True)
    rng = np.random.default_rng(options.seeds[0])
    for i in range(_IMAGES):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(images / f"{i:03d}.png")

    def write_config(source):
        config.write_text(_NAN_CONFIG.format(smoke=str(programs.ROOT / "configs" / "nan.py"), source=source))

    write_config(f"folder:{images}")
    programs.must(programs.run(programs.command("latents", "--config", str(config), "--to", str(cache))), "latents")
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
    outcome = programs.must(programs.run(train), "the run on NaN")
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = list((workdir / "bad_batches").glob("*")) if (workdir / "bad_batches").exists() else []
    return {
        "skipped": sum("is not finite; skipped" in line for line in outcome.heard),
        "kept": len(kept),
        "bad_losses": sum(not np.isfinite(float(line["loss"])) for line in log),
        "code": outcome.code,
    }
