"""How well a model that draws images or clips predicts noise on held-out ones, and what it draws.

Held-out images are noised once, the same each time. Pictures have the labels of held-out images, one after another, so
that each class is drawn as often as it occurs. Neither depends on batch size or number of devices.

Legend: B rows of a batch on this process, N blocks of an image, M images of all processes, D pictures drawn.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import mesh as meshes
from ddt_jax import settings as settings_lib
from ddt_jax.diffusion.process import by_noise_level
from ddt_jax.evaluation import gather, metrics, pictures, tables
from ddt_jax.evaluation.judge import standard_error
from ddt_jax.tokenizers.acdit import ACDiT
from ddt_jax.tokenizers.base import example_keys, to_uint8


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
      results: JSON values.
      drawn: uint8 [D, H, W, C], of clips [D, T, H, W, C]; captions: what each should be, or None.
    """

    results: dict[str, Any]
    drawn: np.ndarray
    captions: tuple[str, ...] | None
    picture_name: ClassVar[str] = "samples"

    @property
    def pictured(self) -> bool:
        return len(self.drawn) > 0

    def picture(self) -> np.ndarray:
        """The pictures with their classes, of clips some frames. uint8 [H, W, 3]."""
        return (pictures.grid if self.drawn.ndim == 4 else pictures.contact_sheet)(self.drawn, self.captions)

    def moving(self) -> np.ndarray | None:
        """Clips with their classes, frame by frame: uint8 [T, H, W, 3]; None of images."""
        return pictures.moving_grid(self.drawn, self.captions) if self.pictured and self.drawn.ndim == 5 else None

    def markdown(self) -> str:
        """A table for a person."""
        return tables.drawing(self.results)


@functools.lru_cache(maxsize=4)
def programs(model: ACDiT, frames: int = 0) -> tuple[Callable, Callable]:
    """(errors, draw): (params, extra, batch, seed) → error and noise level of each block [B, N]; and → uint8 images.

    Compiled once per model, so that evaluating again during a run costs no compilation. A batch's `slot` is the number
    of each image, from which its noise follows. frames: of the clips that are drawn, see `ACDiT.sample`.
    """

    def keys(seed, batch, what):
        return example_keys(jax.random.split(jax.random.key(seed))[what], batch["slot"])

    def errors(params, extra, batch, seed):
        return model.errors(params, extra, batch, keys(seed, batch, 0))

    def draw(params, extra, batch, seed):
        return to_uint8(
            model.sample(params, extra, model.labels(batch), keys(seed, batch, 1), frames, batch.get("caption_ids"))
        )

    return jax.jit(errors), jax.jit(draw)


def evaluate_drawing(
    model: ACDiT,
    params,
    extra,
    batches: Iterable[dict],
    settings: settings_lib.Evaluate,
    *,
    mesh,
    count: int,
    class_names: tuple[str, ...] | None = None,
    verify: Callable | None = None,
    progress: Callable[[int], None] | None = None,
    drawing=contextlib.nullcontext(),  # noqa: B008  it holds no state
) -> Report:
    """Measures a model on held-out images, and draws.

    Args:
      batches: of `Loader.eval_batches`; rows of this process.
      count: pictures to be judged; of them, the first settings.pictures are kept.
      verify: (images uint8 [D, H, W, C], labels [D], or None of a model that is told none) → results.
      progress: told how many held-out images have been seen.
      drawing: context in which pictures are drawn; what it yields, if anything, is told how many there are.

    Returns:
      A report. diffusion: the training loss without dropped labels; mse_t25 ... mse_t100: errors by quarters of the
      noise level; mse_by_block: by the number of the block, of which later ones see more; seconds_per_picture: of the
      fastest batch that was drawn behind the first, which compiles; not where there was one batch alone.

    Raises:
      ValueError: if there is no valid image.
    """
    errors, _ = programs(model)
    rows, seen, seed = [], 0, np.uint32(settings.seed)
    for batch in batches:
        b, name = len(batch["index"]), "video" if model.frames else "image"
        valid_B = np.asarray(batch.get("valid", np.ones(b, bool)))
        told = {what: np.asarray(batch[what]) for what in ("label", "caption_ids") if what in batch}
        given = {name: batch[name], "slot": np.maximum(batch["index"], 0), **told}
        on_device = meshes.put_batch(given, mesh)
        local = functools.partial(gather.local_rows, by_rows=on_device[name].sharding)
        error_BN, t_BN = map(local, errors(params, extra, on_device, seed))
        rows.append({"valid": valid_B, "error": error_BN, "t": t_BN, **told})
        seen += int(valid_B.sum())
        if progress is not None:
            progress(seen)
    table = gather.valid_rows(rows)
    error_MN, t_MN = table["error"].astype(np.float64), table["t"]
    weighted_M = (error_MN * np.asarray(model.process.weight(jnp.asarray(t_MN)))).mean(1)
    results = {
        "n": len(error_MN),
        "diffusion": float(weighted_M.mean()),
        "diffusion_standard_error": standard_error(weighted_M),
    }
    for name, here_MN in by_noise_level(t_MN).items():
        if here_MN.any():
            results[name] = float(error_MN[here_MN].mean())
    results["mse_by_block"] = error_MN.mean(0).tolist()

    shown = min(settings.pictures, len(error_MN))
    order_D = np.arange(max(shown, count)) % len(error_MN)
    label_D = table["label"][order_D].astype(np.int32)
    text_DZ = table["caption_ids"][order_D] if "caption_ids" in table else None
    seconds: list[float] = []
    with drawing as tell:
        how = {"mesh": mesh, "text_DZ": text_DZ, "seconds": seconds}
        done = tell and (lambda count: tell(f"{count:,} of {len(label_D):,}"))
        drawn = draw(model, params, extra, label_D, settings, **how, done=done)
    if len(seconds) > 1:
        results["seconds_per_picture"] = min(seconds[1:])
    captions = None
    if text_DZ is not None:
        captions = tuple(bytes(row).rstrip(b"\0").decode() for row in text_DZ)
    elif model.classes:
        captions = _captions(label_D, class_names)
    if verify is not None:
        results |= verify(drawn, label_D if model.classes else None)
        if text_DZ is not None:
            results |= follow_captions(drawn, captions)
    return Report(results | {"drawn": len(drawn)}, drawn[:shown], captions and captions[:shown])


@functools.lru_cache(maxsize=4)
def _features(model: ACDiT) -> Callable:
    def features(params, extra, batch, seed):
        return model.features(params, extra, batch, example_keys(jax.random.key(seed), batch["slot"]))

    return jax.jit(features)


def clean_features(model: ACDiT, params, extra, batches: Iterable[dict], seed: int, *, mesh):
    """What a model makes of clean images or clips, for probes: (float32 [M, D], labels int32 [M]) of valid rows."""
    rows, name = [], "video" if model.frames else "image"
    for batch in batches:
        on_device = meshes.put_batch({name: batch[name], "slot": np.maximum(batch["index"], 0)}, mesh)
        found = _features(model)(params, extra, on_device, np.uint32(seed))
        features_BD = gather.local_rows(found, by_rows=on_device[name].sharding)
        rows.append({"valid": batch["valid"], "features": features_BD, "label": batch["label"]})
    table = gather.valid_rows(rows)
    return table["features"], table["label"]


def draw(
    model: ACDiT,
    params,
    extra,
    label_D,
    settings: settings_lib.Evaluate,
    *,
    mesh,
    frames: int = 0,
    text_DZ=None,
    seconds: list[float] | None = None,
    done: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Pictures of labels int32 [D], -1 for none: uint8 [D, H, W, C], or clips [D, T, H, W, C], on every process.

    Args:
      frames: T; 0: as many as the model learned.
      text_DZ: captions, of a model that is told them; None: none.
      seconds: gets what a picture of each batch took.
      done: told how many have been drawn.
    """
    if not len(label_D):
        clip = (frames or model.frames,) if model.frames else ()
        return np.zeros((0, *clip, model.image_size, model.image_size, 3), np.uint8)
    parts = meshes.row_parts(mesh)
    size = min(settings.batch_size, -(-len(label_D) // parts) * parts)
    reader = meshes.reader(mesh)
    share = size // reader.count
    rows = []
    for start in range(0, len(label_D), size):
        index_B = start + reader.index * share + np.arange(share)
        inside_B = index_B < len(label_D)
        label_B = np.where(inside_B, label_D[np.minimum(index_B, len(label_D) - 1)], -1)
        given = {"label": label_B.astype(np.int32), "slot": index_B.astype(np.int32)}
        if text_DZ is not None:
            given["caption_ids"] = text_DZ[np.minimum(index_B, len(label_D) - 1)]
        given, began = meshes.put_batch(given, mesh), time.perf_counter()
        images = programs(model, frames)[1](params, extra, given, np.uint32(settings.seed))
        images_BHWC = gather.local_rows(images, by_rows=given["slot"].sharding)
        if seconds is not None:
            seconds.append((time.perf_counter() - began) / size)
        rows.append({"valid": inside_B, "index": index_B, "image": images_BHWC})
        if done is not None:
            done(min(start + size, len(label_D)))
    table = gather.valid_rows(rows)
    return table["image"][np.argsort(table["index"])]


def count_objects(images, label_D) -> dict[str, Any]:
    """Of pictures of scenes, whose class is the number of their objects: shares that a program reads as asked.

    scenes_clean: nothing in the picture but background and objects. With labels also scenes_count: as many objects, and
    scenes_count_chance: of who always draws the commonest number.
    """
    from ddt_jax.data.scenes_verifier import read_scene

    read = read_scene(images)
    right, found = {"scenes_clean": sum(r.clean for r in read)}, {}
    if label_D is not None:
        right["scenes_count"] = sum(r.count == n for r, n in zip(read, label_D, strict=True))
        found["scenes_count_chance"] = float(np.bincount(label_D).max() / len(read))
    return found | _shares(right, len(read))


def follow_objects(clips, label_D) -> dict[str, Any]:
    """Of clips of moving scenes, whose class says where their objects go: shares that a program reads as asked.

    scenes_clean: all frames look like one such scene. With labels also scenes_direction: exactly the objects asked for,
    each on its lane and in its direction, and scenes_direction_chance: of who always draws the commonest class.
    """
    from ddt_jax.data.moving_scenes import label_of
    from ddt_jax.data.moving_scenes_verifier import read_moving_scene

    read = read_moving_scene(clips)
    right, found = {"scenes_clean": sum(r.clean for r in read)}, {}
    if label_D is not None:
        right["scenes_direction"] = sum(
            bool(r.keys) and label_of(r.keys) == n for r, n in zip(read, label_D, strict=True)
        )
        found["scenes_direction_chance"] = float(np.bincount(label_D).max() / len(read))
    return found | _shares(right, len(read))


def follow_captions(drawn, captions) -> dict[str, Any]:
    """Of pictures or clips of scenes: shares that a program reads as their captions say; scenes_all_correct and others.

    A caption that is none of such scenes counts as wrong.
    """
    from ddt_jax.data import moving_scenes_verifier, scenes_verifier

    judge = (scenes_verifier if drawn.ndim == 4 else moving_scenes_verifier).judge
    found = judge(drawn, captions)
    return _shares({f"scenes_{name}": int(right.sum()) for name, right in found.items()}, len(drawn))


def _shares(right: dict[str, int], n: int) -> dict[str, Any]:
    found = {}
    for name, successes in right.items():
        found[name] = successes / n
        found[f"{name}_interval"] = list(metrics.binomial_interval(successes, n))
    return found


def _captions(label_D, names) -> tuple[str, ...]:
    def caption(label):
        if label < 0:
            return "no class"
        return names[label] if names and label < len(names) else f"class {label}"

    return tuple(caption(int(label)) for label in label_D)
