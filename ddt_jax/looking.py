"""What `ddt-jax data` does: a look at a source, before anything is trained on it."""

import time

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.evaluation import pictures
from ddt_jax.training import feed as feeds


def look_at_data(s: settings.Experiment, split: str, count: int, out: str) -> dict:
    """Counts of a source, a grid of its first examples in training order, and how fast they load."""
    loader = feeds.open_images(s, s.data.source if split == "train" else s.data.eval_source, count)
    source = loader.source
    if getattr(source, "arrays", None):
        raise UserError(f"data: {source.name} holds no pictures; look at the images that it was made of")
    start = time.perf_counter()
    batch = loader.batch_at(0)
    seconds = time.perf_counter() - start
    captions = [str(source[int(i)].get("caption", "")) for i in batch["index"]]
    texts = captions if any(captions) else None
    shown = pictures.contact_sheet(batch["video"], texts) if s.data.frames else pictures.grid(batch["image"], texts)
    pictures.save_png(shown, out)
    return {
        "source": source.name,
        "images": len(source),
        "image_size": s.data.image_size,
        "captions": sum(map(bool, captions)) / count,
        "labels": sorted({int(x) for x in batch["label"]}),
        "unreadable": loader.stats.bad,
        "images_per_second": round(count / seconds, 1),
        "example": captions[0],
        "written": out,
    }
