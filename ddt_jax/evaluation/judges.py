"""What looks at each batch of a pass besides PSNR and SSIM: LPIPS, rFID, PNG pairs for other tools, and swapped tokens.

All see images rounded to 8 bits. Each is a `judge.Judge`: `see` is called for every batch, `results` once.

Legend: B rows of a batch on this process, H height, W width, K tokens, D features.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.evaluation import frechet, gather, pictures, probes
from ddt_jax.evaluation.judge import Seen
from ddt_jax.nn import inception
from ddt_jax.nn import lpips as lpips_lib
from ddt_jax.tokenizers.base import to_float


class LPIPS:
    """Distance of each pair by the features of a classifier.

    Args:
      params: of `nn.lpips.load`.
      mesh: where the images lie.
    """

    def __init__(self, params, backbone: lpips_lib.Backbone, mesh):
        self._params = everywhere(params, mesh)

        def distance(params, a_BHWC, b_BHWC):
            return lpips_lib.distance(params, to_float(a_BHWC), to_float(b_BHWC), backbone=backbone)

        self._distance = jax.jit(distance)

    def see(self, seen: Seen) -> dict[str, np.ndarray]:
        return {"lpips": seen.local(self._distance(self._params, *seen.on_device)).astype(np.float64)}

    def results(self) -> dict[str, Any]:
        return {}


class RFID:
    """Frechet distance between Inception's features of the images and of their reconstructions.

    Args:
      params: of `nn.inception.load`.
      mesh: where the images lie.
      known: moments of the originals, where an earlier evaluation has left them. Process 0 decides for all.
      keep: is given them where they were not known, on process 0.
    """

    def __init__(self, params, mesh, known: frechet.Moments | None, keep: Callable[[frechet.Moments], Any]):
        self._params = everywhere(params, mesh)
        self._features = jax.jit(inception.features)
        self._is_known = bool(gather.agreed(known is not None))
        self._originals = known if self._is_known and jax.process_index() == 0 else None
        self._decoded: frechet.Moments | None = None
        self._keep = keep

    def see(self, seen: Seen) -> dict[str, np.ndarray]:
        image, decoded = seen.on_device
        self._decoded = self._add(self._decoded, seen, decoded)
        if not self._is_known:
            self._originals = self._add(self._originals, seen, image)
        return {}

    def results(self) -> dict[str, Any]:
        originals, decoded = (gather.moments(m, inception.FEATURES) for m in (self._originals, self._decoded))
        if not self._is_known and jax.process_index() == 0:
            self._keep(originals)
        return {"rfid": frechet.distance(originals, decoded), "rfid_images": decoded.count}

    def _add(self, total, seen, image):
        features_BD = seen.local(self._features(self._params, image))[seen.valid_B]
        if not len(features_BD):
            return total
        part = frechet.Moments.of(features_BD)
        return part if total is None else total + part


class SavedImages:
    """Writes originals/N.png and reconstructions/N.png, N the position in the source. PNG loses nothing.

    Raises:
      UserError: if the folder holds images already, which a tool that compares folders would count, or can't be
        written.
    """

    def __init__(self, folder: str):
        self._folders = [epath.Path(folder) / name for name in ("originals", "reconstructions")]
        held = any(path.is_dir() and any(path.iterdir()) for path in self._folders)
        if gather.agreed(held):  # no process writes before all have come here
            raise UserError(f"config: evaluate.save_images={folder} holds images already; name another folder")

    def see(self, seen: Seen) -> dict[str, np.ndarray]:
        if not meshes.reader().leads:  # another process has the same images
            return {}
        for folder, image_BHWC in zip(self._folders, (seen.image_BHWC, seen.decoded_BHWC), strict=True):
            for image, index in zip(image_BHWC[seen.valid_B], seen.index_B[seen.valid_B], strict=True):
                try:
                    pictures.save_png(image, folder / f"{index:08}.png")
                except OSError as error:
                    raise UserError(
                        f"config: evaluate.save_images: cannot write to {folder}: {error.strerror or error}"
                    ) from error
        return {}

    def results(self) -> dict[str, Any]:
        return {}


class Counterfactuals:
    """Images from A's tokens with a third of them taken from B: which attributes follow which tokens.

    Selftok's page shows that swapped tokens of a spatial tokenizer cut and paste, those of this kind change attributes.
    A are the images of the first batch, B is the image after each. Thirds are counted in reading order.

    Args:
      decode: (codes, positions in the source) of this process's rows → images over the mesh, as the pass decodes them.
      order_K: positions of the tokens in reading order.
      pairs: how many are in the picture.
    """

    def __init__(self, decode: Callable[[np.ndarray, np.ndarray], Any], order_K, pairs: int):
        thirds = zip(("first", "middle", "last"), np.array_split(np.asarray(order_K), 3), strict=True)
        self._subsets = {name: positions for name, positions in thirds if len(positions)}
        self._decode, self._pairs = decode, pairs
        self._first: Seen | None = None
        self._picture: np.ndarray | None = None

    def see(self, seen: Seen) -> dict[str, np.ndarray]:
        self._first = self._first or seen
        return {}

    def results(self) -> dict[str, Any]:
        """Share of images that are nearer to B's reconstruction than to A's, for each third."""
        first = self._first
        assert first is not None, "the pass has at least one batch"
        (own,) = np.nonzero(first.valid_B)
        after = np.arange(len(first.valid_B))  # padding stays as it is
        after[own] = np.roll(own, -1)
        a_BK, b_BK = first.codes_BK, first.codes_BK[after]
        # B's tokens with A's noise as well: the images of a column differ by their tokens alone.
        a_BHWC, b_BHWC = first.decoded_BHWC, first.local(self._decode(b_BK, first.index_B))
        mixed = {
            name: first.local(self._decode(probes.swap_tokens(a_BK, b_BK, positions), first.index_B))
            for name, positions in self._subsets.items()
        }
        nearer = {name: _nearer(image, b_BHWC, a_BHWC) for name, image in mixed.items()}
        table = gather.columns({"valid": first.valid_B & (after != np.arange(len(after))), **nearer})
        valid = table.pop("valid")
        if not valid.any():
            return {}
        shown = own[: self._pairs]
        count = 0
        rows = {"A from tokens": a_BHWC[shown]}
        for name, positions in self._subsets.items():
            rows[f"{name} third of B\n{_numbers(count, len(positions))}"] = mixed[name][shown]
            count += len(positions)
        rows |= {"B from tokens": b_BHWC[shown], "B": first.image_BHWC[after[shown]]}
        self._picture = pictures.reconstruction_grid(first.image_BHWC[shown], rows, first="A")
        return {"counterfactual_nearer_b": {name: float(column[valid].mean()) for name, column in table.items()}}

    def picture(self) -> np.ndarray | None:
        """A, its reconstruction, a row for each third, B's reconstruction and B. None without two images."""
        return self._picture


def _numbers(before, count):
    return f"token {before + 1}" if count == 1 else f"tokens {before + 1} to {before + count}"


def _nearer(image_BHWC, to_BHWC, than_BHWC):
    to_B, than_B = (
        np.square(image_BHWC.astype(np.float64) - other_BHWC).sum((1, 2, 3)) for other_BHWC in (to_BHWC, than_BHWC)
    )
    return to_B < than_B


def everywhere(params, mesh):
    """Arrays of the host, whole on each device of the mesh."""
    place = functools.partial(jax.ShapeDtypeStruct, sharding=meshes.replicated(mesh))
    return jax.tree.map(lambda x: meshes.put_whole(x, place(x.shape, x.dtype)), params)
