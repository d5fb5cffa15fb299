"""CLIP score: how well pictures fit their captions in the eyes of CLIP (Hessel et al. 2021, arXiv 2104.08718).

100 times the mean cosine, as papers on drawing give it: of ViT-L/14, photographs of MS-COCO have about 26. (Hessel's
own score is 2.5 times the cosine, or 0 where that is negative.)

Legend: B pictures at once, H height, W width, S side of CLIP's pictures, L ids of a caption.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ddt_jax import mesh as meshes
from ddt_jax.evaluation import judges
from ddt_jax.nn.clip import Clip, Sizes
from ddt_jax.tokenizers.caption_ids import MarkedIds
from ddt_jax.tokenizers.text import TextTokenizer


class ClipScore:
    """Looks at pictures on their way.

    Args:
      sizes, params: of `interop.hf_clip`.
      tokenizer: CLIP's own.
      batch: B.
      mesh: over whose devices pictures are judged.

    Raises:
      UserError: the tokenizer is not CLIP's, or not that of this model.
    """

    def __init__(self, sizes: Sizes, params, tokenizer: TextTokenizer, batch: int, mesh):
        meshes.check_batch(batch, mesh, "evaluate.batch_size")
        name = "evaluate: the text tokenizer in evaluate.clip_folder"
        self._captions = MarkedIds(tokenizer, sizes.length, sizes.vocab_size, name)
        self._sizes, self._batch, self._mesh = sizes, batch, mesh
        self._params = judges.everywhere(params, mesh)
        self._cosine = jax.jit(self._judge)
        self._total, self._seen = 0.0, 0

    def watch(self, pictures: Iterable[np.ndarray], captions: Sequence[str]) -> Iterator[np.ndarray]:
        """The same pictures, uint8 [H, W, 3], one after another. A batch counts once its first one is taken.

        Args:
          captions: of each, at least as many.
        """
        pairs = zip(pictures, captions, strict=False)
        while some := list(itertools.islice(pairs, self._batch)):
            cosine_B = self.cosines([picture for picture, _ in some], [caption for _, caption in some])
            self._total, self._seen = self._total + float(cosine_B.sum()), self._seen + len(some)
            yield from (picture for picture, _ in some)

    def results(self) -> dict[str, Any]:
        """t2i_clip_score and t2i_clip_images, of what was seen."""
        return {"t2i_clip_score": 100 * self._total / self._seen, "t2i_clip_images": self._seen}

    def cosines(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
        """float64 [B] of up to `batch` pictures uint8 [H, W, 3] and their captions."""
        rows, s = [self.ids(caption) for caption in captions], self._sizes
        n = len(rows)
        image_BSSC = np.zeros((self._batch, s.image_size, s.image_size, 3), np.uint8)
        ids_BL, end_B = np.zeros((self._batch, s.length), np.int32), np.zeros(self._batch, np.int32)
        for i, (picture, ids) in enumerate(zip(pictures, rows, strict=True)):
            image_BSSC[i], ids_BL[i, : len(ids)], end_B[i] = self.prepared(picture), ids, len(ids) - 1
        batch = meshes.put_batch({"image": image_BSSC, "ids": ids_BL, "end": end_B}, self._mesh)
        return np.asarray(self._cosine(self._params, batch), np.float64)[:n]

    def ids(self, caption: str) -> np.ndarray:
        """int32 [n] of a caption between its marks; what is too long is cut, as CLIP was trained."""
        return self._captions.marked(caption)

    def prepared(self, picture: np.ndarray) -> np.ndarray:
        """As CLIP sees it, uint8 [S, S, 3]: the shorter side becomes S (bicubic), the middle stays."""
        side, (h, w) = self._sizes.image_size, picture.shape[:2]
        size = (side * w // min(h, w), side * h // min(h, w))
        resized = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
        return resized[top : top + side, left : left + side]

    def _judge(self, params, batch):
        pixels_BSSC = batch["image"].astype(jnp.float32) / 127.5 - 1
        seen_BF, read_BF = Clip(self._sizes).apply({"params": params}, pixels_BSSC, batch["ids"], batch["end"])
        return jnp.sum(seen_BF * read_BF, axis=-1)
