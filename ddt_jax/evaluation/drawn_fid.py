"""FID of drawn pictures: the distance between Inception's features of what a model draws from captions, and of the
pictures that these captions are of.

Legend: B pictures at once, H height, W width, N pictures, D features.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import jax
import numpy as np

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.data import files
from ddt_jax.errors import UserError
from ddt_jax.evaluation import asked, frechet, judges
from ddt_jax.nn import inception


class DrawnFID:
    """See the module's docstring. Captions are read, and pictures with them, before anything is drawn.

    Args:
      params, digest: of `suite.read_inception`.
      s: of the run; evaluate.fid_images captions, or as many as there are.
      data: how the pictures are prepared: as those that the model draws.
      mesh: over whose devices pictures are judged.

    Attributes:
      captions: from which pictures are to be drawn: those of `asked.captioned`, in its order.

    Raises:
      UserError: settings that cannot be used, a picture that can no longer be read, less than two captions.
    """

    def __init__(self, params, digest: str, s: settings.Experiment, data: settings.Data, mesh):
        e = s.evaluate
        if e.fid_images < 2:
            raise UserError(f"config: evaluate.fid_images={e.fid_images} must be two or more, or 0 for no FID")
        meshes.check_batch(e.batch_size, mesh, "evaluate.batch_size")
        self._batch, self._mesh = e.batch_size, mesh
        self._params, self._features = judges.everywhere(params, mesh), jax.jit(inception.features)
        self._held_out: Callable[[], Iterator] = lambda: asked.with_pictures(s, data, e.fid_images)
        self.captions, pixels = [], hashlib.sha256()
        for caption, picture in self._held_out():
            self.captions.append(caption)
            pixels.update(np.ascontiguousarray(picture))
        if len(self.captions) < 2:
            raise UserError(
                "evaluate: FID needs two captions or more in sequences.eval_sources; set evaluate.fid_images=0, "
                "or name other sources"
            )
        self._folder = files.cache_folder(s.data.cache_dir) / "fid"
        self._key = {"pixels": pixels.hexdigest(), "images": len(self.captions), "weights": digest}

    def results(self, drawn: Iterable[np.ndarray]) -> dict[str, Any]:
        """t2i_fid and t2i_fid_images.

        Args:
          drawn: uint8 [H, W, 3] for each caption, of which a batch at a time is held.
        """
        ours = self._moments(drawn)
        assert ours.count == len(self.captions), f"{ours.count} pictures of {len(self.captions)} captions"
        originals = frechet.read(self._folder, self._key)
        if originals is None:
            originals = self._moments(picture for _, picture in self._held_out())
            frechet.keep(self._folder, self._key, originals)
        return {"t2i_fid": frechet.distance(originals, ours), "t2i_fid_images": ours.count}

    def _moments(self, pictures) -> frechet.Moments:
        pictures = iter(pictures)
        return frechet.moments(
            self._of(np.stack(some)) for some in iter(lambda: list(islice(pictures, self._batch)), [])
        )

    def _of(self, image_BHWC):
        """Features [B, D] of up to a batch, which is filled up so that one program serves all."""
        fill = np.zeros((self._batch - len(image_BHWC), *image_BHWC.shape[1:]), np.uint8)
        batch = meshes.put_batch({"image": np.concatenate([image_BHWC, fill])}, self._mesh)
        return np.asarray(self._features(self._params, batch["image"]))[: len(image_BHWC)]
