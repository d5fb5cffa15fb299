"""Writes a cache of latents (`data/latents.py`): what a model's frozen codec makes of all images of a source, or of all
frames of its clips.

Legend: B batch, F frames, H height, W width; h, w, c height, width and channels of the latent.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np

from ddt_jax import config, settings
from ddt_jax import mesh as meshes
from ddt_jax.data import latents
from ddt_jax.data.loader import Loader
from ddt_jax.errors import UserError
from ddt_jax.io import atomic
from ddt_jax.nn.codec import VAECodec
from ddt_jax.tokenizers.base import to_float
from ddt_jax.training.checksum import checksums
from ddt_jax.training.progress import Progress

_CLIPS = 4  # read at a time; a clip of 300 frames at 256 px has 59 MB


def identity(model, data: settings.Data, params=None) -> dict:
    """Everything that the latents of an image depend on, by the names of the settings.

    Args:
      model: a tokenizer, or a transformer whose images are denoised.
      params: of its codec, on the devices; without them the weights are left out.

    Raises:
      UserError: if the codec has no latents of its own, or images would be cropped or flipped at random.
    """
    codec = getattr(model, "codec", None)
    if not isinstance(codec, VAECodec):
        raise UserError("config: model.codec has no latents to keep: it must be an autoencoder (kind='vae')")
    if data.flip or data.crop == "random":
        raise UserError(
            f"config: latents are kept of images as they are; data.flip={data.flip} and data.crop={data.crop!r} would "
            "change them in every epoch; set data.flip=False and data.crop=center"
        )
    found = {f"model.codec.sizes.{name}": value for name, value in config.dump(codec.sizes).items()}
    found |= {f"data.{name}": config.dump(getattr(data, name)) for name in ("image_size", "crop", "background")}
    if params is not None:
        weights = json.dumps(checksums(params), sort_keys=True)
        found["model.codec.weights"] = hashlib.sha256(weights.encode()).hexdigest()
    return found | {"model.codec.dtype": codec.dtype}


def layout(codec: VAECodec, image_size: int) -> tuple[tuple[int, int, int], str]:
    """Shape of a latent and the name of the type it is kept in."""
    size = image_size // codec.downsampling
    # The codec's last layer rounds to this type before its outputs are widened, so nothing is lost.
    return (size, size, codec.channels), codec.dtype


def check(source, model, data: settings.Data, params: Callable) -> None:
    """Raises UserError if the source holds latents that the model's codec would not make of their images.

    Args:
      source: any; one of images passes.
      params: () → parameters of the codec.
    """
    if isinstance(source, latents.LatentsSource):
        identity(model, data)  # refuses before weights are read
        folder = source.name.partition(":")[2]
        latents.check_identity(folder, source.identity, identity(model, data, params()))


def write(
    folder, source, data: settings.Data, model, params, *, mesh, batch_size: int, per_shard: int, stream=sys.stderr
) -> dict:
    """Writes what is missing of the latents of all records, shard by shard; a shard is whole or absent.

    Args:
      folder: epath.
      source: of images, or of clips if data.frames says so.
      data: how they are prepared, and how many threads do that.
      model: whose codec it is.
      params: of the codec, on the devices.
      per_shard: records of the source that a shard covers.
      mesh: over whose devices the rows of a batch are spread.
      batch_size: images, or frames, at a time.
      stream: where progress is shown.

    Returns:
      "images" (or clips) of the source, "records" in the folder, "unreadable", "shards", "written" of them in this
      call.

    Raises:
      UserError: if the folder holds other latents or cannot be written, or as the loader.
    """
    clips, at_a_time = data.frames > 0, batch_size
    if clips:
        data, at_a_time = replace(data, prefetch=1), _CLIPS
    loader = Loader(source, data, batch_size=1, seed=0, shuffle=False, keep_captions=True, whole_clips=clips)
    codec, count, (shape, dtype) = model.codec, len(source), layout(model.codec, data.image_size)
    made = identity(model, data, params)
    starts = range(0, count, per_shard)
    index = {
        "source": source.name,
        "images": count,
        "per_shard": per_shard,
        "shards": len(starts),
        "shape": shape,
        "dtype": dtype,
        "clips": clips,
        "label_names": source.label_names,
        "identity": made,
        "counts": _counts_before(folder, source, per_shard, made),
    }
    names = {start: latents.shard_name(i, len(starts)) for i, start in enumerate(starts)}
    done = {start for start in starts if names[start] in index["counts"] and (folder / names[start]).exists()}
    posterior = jax.jit(lambda params, image: codec.posterior(params, to_float(image)))

    def posteriors(frames_FHWC):
        """Of any number of frames, so many at a time that one program does: [(mean, logvar), ...], on the devices."""
        for at in range(0, len(frames_FHWC), batch_size):
            part_BHWC = frames_FHWC[at : at + batch_size]
            padding = [(0, batch_size - len(part_BHWC)), (0, 0), (0, 0), (0, 0)]
            yield posterior(params, meshes.put_batch({"image": np.pad(part_BHWC, padding)}, mesh)["image"])

    def records(start, tick):
        with loader.iterate_eval(start, min(start + per_shard, count), at_a_time) as batches:
            ahead = None  # the devices work on one batch while the one before is packed
            for batch in batches:
                frames_FHWC, places = _frames(batch)
                computing = batch, places, [*posteriors(frames_FHWC)]
                if ahead is not None:
                    yield from _packed(*ahead, index["dtype"])
                    tick()
                ahead = computing
            yield from _packed(*ahead, index["dtype"])
            tick()

    batches = {start: -(-min(per_shard, count - start) // at_a_time) for start in starts}
    ticks = sum(batches[start] for start in done)
    try:
        _write_index(folder, index)
        with Progress(sum(batches.values()), ticks, at_a_time, stream=stream) as progress:

            def tick():
                nonlocal ticks
                ticks += 1
                progress.update(ticks)

            for start in starts:
                if start not in done:
                    index["counts"][names[start]] = latents.write_shard(folder / names[start], records(start, tick))
                    _write_index(folder, index)
    except OSError as error:
        raise UserError(f"latents: cannot write to {folder}: {error.strerror or error}") from error
    total = sum(index["counts"].values())
    return {
        "images": count,
        "records": total,
        "unreadable": count - total,
        "shards": len(starts),
        "written": len(starts) - len(done),
    }


def _counts_before(folder, source, per_shard, made) -> dict:
    """Records by shard of an earlier call. Raises UserError if that wrote something else."""
    before = latents.read_index(str(folder))
    if before is None:
        return {}
    latents.check_identity(str(folder), before["identity"], made)
    for name, value in (("source", source.name), ("images", len(source)), ("per_shard", per_shard)):
        if before.get(name) != value:
            raise UserError(
                f"latents: {folder} was begun with {name}={before.get(name)}, now it is {value}; choose another folder"
            )
    return before["counts"]


def _frames(batch):
    """All pictures of a batch uint8 [F, H, W, 3], and where among them those of each valid row are."""
    rows = np.flatnonzero(batch["valid"])
    if "image" in batch:
        return batch["image"], {row: row for row in rows}
    ends = np.cumsum([0, *(len(batch["video"][row]) for row in rows)])
    places = {row: slice(ends[i], ends[i + 1]) for i, row in enumerate(rows)}
    return np.concatenate([batch["video"][row] for row in rows]) if places else (), places


def _packed(batch, places, posteriors, dtype):
    if not places:
        return
    both = zip(*jax.device_get(posteriors), strict=True)
    mean, logvar = (np.concatenate(x).astype(latents.TYPES[dtype]) for x in both)
    for row, place in places.items():
        label, index, caption = int(batch["label"][row]), int(batch["index"][row]), batch["caption"][row]
        yield latents.pack(mean[place], logvar[place], index=index, label=label, caption=caption)


def _write_index(folder, index):
    atomic.write_text(folder / latents.INDEX, json.dumps(index, indent=2) + "\n")
