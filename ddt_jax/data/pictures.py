"""Images of a source with their captions and documents, as records for sequences whose images are not codes.

What a cache keeps of them (data/latents.py) stands in their place as one array, mean and logvar side by side.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from ddt_jax.data import files
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.images import prepare
from ddt_jax.data.latents import LatentsSource
from ddt_jax.errors import UserError
from ddt_jax.settings import Data

DOCUMENT_FIELDS = ("turns", "parts")  # of a record's meta: a document of its own


def encoded_images(record) -> tuple:
    """The images of a source's record, as they come: its `image`, and the `images` of its meta. Raises BadRecord."""
    further = record.get("meta", {}).get("images", ())
    if not isinstance(further, list | tuple):
        raise BadRecord("its further images are no list")
    return record["image"], *further


def fields_of(record) -> dict[str, Any]:
    """What a source's record says beside its images: caption, label, turns, parts, those that it has."""
    more = record.get("meta", {})
    kept = {name: record[name] for name in ("caption", "label") if name in record}
    return kept | {name: more[name] for name in DOCUMENT_FIELDS if name in more}


class PictureRecords:
    """See the module's docstring. Picklable, like every source.

    Args:
      spec: of `data.base.open_source`.
      data: how images are prepared: the same each time, without flips and random crops, which captions don't bear.
      records: only so many, from the first; 0 = all.

    Attributes:
      num_codes: 0. origin: what the order of formats is keyed by. cache_dir: of the settings. identity: which records
        these are, whatever they are called.
      content: (shape, type) of what stands for an image: uint8 [S, S, 3], or of latents [h, w, 2 c].

    Raises:
      UserError: the source cannot be opened, or holds fewer records than are asked for.
    """

    num_codes = 0

    def __init__(self, spec: str, data: Data, records: int = 0):
        options = {"image_size": data.image_size, "cache_dir": data.cache_dir, "retry_seconds": data.retry_seconds}
        self.source = open_source(spec, **options)
        self.content = (data.image_size, data.image_size, 3), np.dtype(np.uint8)
        self.are_latents = isinstance(self.source, LatentsSource)
        if self.are_latents:
            (h, w, c), kept = self.source.arrays["latent_mean"]
            self.content = (h, w, 2 * c), kept
        if not 0 <= records <= len(self.source):
            raise UserError(f"data: {spec} has {len(self.source):,} records, not records={records:,}; 0 takes all")
        self.name = self.origin = self.source.name
        if self.are_latents:  # documents have the same formats as those of the images
            self.origin = self.source.origin
        self.identity, self.cache_dir = files.identity(spec), data.cache_dir
        self._data, self._count = replace(data, flip=False), records or len(self.source)

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        """images: of `content` each; and `fields_of`. Raises BadRecord."""
        record = self.source[index]
        if self.are_latents:
            images = [np.concatenate([record["latent_mean"], record["latent_logvar"]], axis=-1)]
        else:
            images = [prepare(image, self._data) for image in encoded_images(record)]
        return fields_of(record) | {"images": images}

    def without_images(self, index):
        """The same, each image None: not decoded, nor read where the source has `without_image`. Raises BadRecord."""
        if read := getattr(self.source, "without_image", None):  # then a record has one image
            return fields_of(read(index)) | {"images": [None]}
        record = self.source[index]
        return fields_of(record) | {"images": [None] * (1 if self.are_latents else len(encoded_images(record)))}
