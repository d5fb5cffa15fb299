"""Reads a scene back from its pixels: which cell holds which shape, colour and size. The judge of scenes.

Least squares against every picture a cell can hold (4 shapes x 2 sizes x 9 jitters x 6 colours, or nothing) over the
background. That is the best of the known ones under a robust error, then a plane fitted to the pixels that agree
with it, so that objects, even three large ones of a colour, cannot pull it. Larger pictures are averaged down to 32 px.

A picture may have the right best match and still be no good, so `all_correct` also asks for a small residual in two
ways: the mean square over a cell (noise, foreign objects) and the largest mean over 4 x 4 px blocks (a missing half, a
ghost, a smear: noise averages away there, a wrong patch does not).

Legend: B images, N = 4 B cells, S image side, P pixels of a cell, Q of an image averaged 2 x 2, T templates (shape,
size, dy, dx), K colours, C = 3 channels, F = 3 coefficients of a plane, G known backgrounds. Values are in [0, 1].
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ddt_jax.data import shapes
from ddt_jax.data.scenes import Obj, Scene, parse_caption
from ddt_jax.data.shapes import BASE_SIZE, CELL, CELLS, COLOURS, JITTERS, SHAPES, SIZES

# Medians and maxima of cell and block error over 1,000 scenes at 32 px. Clean: 1e-6, 1e-5 and 0.001, 0.002; noise of
# sigma 0.08: 0.007, 0.008 and 0.04, 0.08; blur of sigma 1 px: 0.004, 0.008 and 0.06, 0.16; half of an object missing:
# 0.016, 0.08 and 0.25, 0.57 (2 to 3 % pass: thin bars of a weak contrast).
MAX_CELL_MSE = 0.03
MAX_BLOCK_ERROR = 0.17

_CHUNK = 256  # images at once: the fits then stay within some 60 MB
# Distance in colour from the background beyond which a (2 x 2 averaged) pixel belongs to an object: at most, and in a
# clean picture.
_INLIER = 0.25
_MIN_INLIER = 0.03
_SCALE = 0.1  # of the same distance, where a pixel begins to count as foreign when the known backgrounds are compared
_RIDGE = 4.0  # pixels' worth of trust in the known background
EMPTY = -1


@dataclass(frozen=True)
class ReadScene:
    """What was read from one picture.

    Attributes:
      objects: in the order of their cells, with jitter.
      cell_mse: mean square residual of the worst cell.
      block_error: root mean square over channels of the mean residual in the worst 4 x 4 px block.
    """

    objects: tuple[Obj, ...]
    cell_mse: float
    block_error: float

    @property
    def keys(self):
        """The combination: a frozenset of (shape, colour, size, cell)."""
        return frozenset(o.key for o in self.objects)

    @property
    def count(self):
        return len(self.objects)

    @property
    def clean(self):
        """Whether the picture looks like what was read from it."""
        return bool(is_clean(self.cell_mse, self.block_error))


def is_clean(cell_mse, block_error):
    """Whether these residuals are those of a picture that looks like what was read from it."""
    return (cell_mse <= MAX_CELL_MSE) & (block_error <= MAX_BLOCK_ERROR)


@dataclass(frozen=True)
class _Reading:
    """Arrays: attributes int [B, 4] (EMPTY where a cell is), jitter int [B, 4, 2] (dx, dy), residuals float [B]."""

    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    jitter: np.ndarray
    cell_mse: np.ndarray
    block_error: np.ndarray


@lru_cache
def _templates_TP():
    masks = shapes.alpha_masks(BASE_SIZE)
    return masks.reshape(-1, CELL * CELL)


@lru_cache
def _plane_SSF():
    ramp = (np.arange(BASE_SIZE, dtype=np.float32) + 0.5) / BASE_SIZE * 2 - 1
    return np.stack([np.ones((BASE_SIZE, BASE_SIZE), np.float32), *np.meshgrid(ramp, ramp)], -1)


def pool(x, factor):
    """Means over factor x factor pixels: [B, S, S, C] -> [B, S / factor, S / factor, C]."""
    # Adding slices is many times faster than a mean over two axes of a reshaped array.
    offsets = range(factor)
    return sum(x[:, i::factor, j::factor] for i in offsets for j in offsets) / np.float32(factor**2)


def to_cells(x_BSSC):
    """[B, 32, 32, C] -> [N, P, C], cells row by row."""
    b, c = x_BSSC.shape[0], x_BSSC.shape[-1]
    return x_BSSC.reshape(b, 2, CELL, 2, CELL, c).transpose(0, 1, 3, 2, 4, 5).reshape(b * 4, CELL * CELL, c)


def _disagreement(x_BQC, known_QC):
    """How badly a background fits, float32 [B]. Geman-McClure: an object's pixel costs about 1 whatever its colour."""
    off_BQ = sum((x_BQC[..., c] - known_QC[:, c]) ** 2 for c in range(x_BQC.shape[-1]))
    return (off_BQ / (off_BQ + _SCALE**2)).sum(-1)


def background(x_BSSC):
    """The background of each image, objects removed. float32 [B, 32, 32, C]."""
    b, side, _, channels = x_BSSC.shape
    coarse_BQC = pool(x_BSSC, 2).reshape(b, (side // 2) ** 2, channels)
    known = shapes.backgrounds(BASE_SIZE) / np.float32(255)
    known_GQC = pool(known, 2).reshape(len(known), -1, channels)
    best_B = np.stack([_disagreement(coarse_BQC, known_QC) for known_QC in known_GQC], -1).argmin(-1)
    away_BQC = coarse_BQC - known_GQC[best_B]
    basis_QF = pool(_plane_SSF()[None], 2).reshape(-1, 3)
    coef_BFC = np.zeros((b, 3, channels), np.float32)
    fifth = coarse_BQC.shape[1] // 5
    for _ in range(3):
        left_BQC = away_BQC - basis_QF @ coef_BFC
        off_BQ = np.sqrt(np.einsum("bqc,bqc->bq", left_BQC, left_BQC))
        # A quarter of the picture at least is an empty cell: the spread of its best fifth says how far noise goes, so
        # that the soft edges of objects, close to the background but not part of it, are left out of a clean picture.
        spread_B1 = np.partition(off_BQ, fifth, axis=1)[:, fifth, None]
        inlier_BQ = off_BQ < np.clip(4 * spread_B1, _MIN_INLIER, _INLIER)
        weighted_BFQ = basis_QF.T * inlier_BQ[:, None, :]
        gram_BFF = weighted_BFQ @ basis_QF + _RIDGE * np.eye(3, dtype=np.float32)
        coef_BFC = np.linalg.solve(gram_BFF, weighted_BFQ @ away_BQC)
    plane_BSSC = (_plane_SSF().reshape(-1, 3) @ coef_BFC).reshape(x_BSSC.shape)
    return known[best_B] + plane_BSSC


def _fit_cells(x_NPC, ground_NPC):
    """Least squares over all templates and colours.

    Returns:
      (best_N, error_N, empty_N): index of the best (template, colour) pair, its squared error, that of an empty cell.
    """
    alpha_TP = _templates_TP()
    square_PT, alpha_PT = (alpha_TP**2).T, alpha_TP.T
    colour_KC = shapes.COLOUR_RGB / 255
    away_NPC = x_NPC - ground_NPC
    # |away + a g - a c|^2 with a the coverage, g the ground and c the colour, expanded so that no [N, T, K, P] is made.
    empty_N = np.einsum("npc,npc->n", away_NPC, away_NPC)
    own_NT = 2 * (np.einsum("npc,npc->np", away_NPC, ground_NPC) @ alpha_PT) + (ground_NPC**2).sum(-1) @ square_PT
    pull_NCT = away_NPC.transpose(0, 2, 1) @ alpha_PT + ground_NPC.transpose(0, 2, 1) @ square_PT
    error_NTK = (
        (empty_N[:, None] + own_NT)[..., None]
        - 2 * (pull_NCT.transpose(0, 2, 1) @ colour_KC.T)
        + square_PT.sum(0)[:, None] * (colour_KC**2).sum(-1)
    )
    flat_NI = error_NTK.reshape(len(x_NPC), error_NTK.shape[1] * error_NTK.shape[2])
    best_N = flat_NI.argmin(-1)
    return best_N, np.take_along_axis(flat_NI, best_N[:, None], 1)[:, 0], empty_N


def residuals(left_NPC):
    """Of what a reading leaves of cells: mean squares, and the largest block error of each. float32 [N] each."""
    quarter = pool(left_NPC.reshape(-1, CELL, CELL, left_NPC.shape[-1]), 2)
    blocks = (quarter[:, 1:, 1:] + quarter[:, 1:, :-1] + quarter[:, :-1, 1:] + quarter[:, :-1, :-1]) / 4
    return (left_NPC**2).mean((1, 2)), np.sqrt((blocks**2).mean(-1).max((1, 2)))


def _read_chunk(images_BSSC):
    b, s = images_BSSC.shape[:2]
    x_BSSC = pool(images_BSSC.astype(np.float32) / 255, s // BASE_SIZE)
    x_NPC, ground_NPC = to_cells(x_BSSC), to_cells(background(x_BSSC))
    best_N, error_N, empty_N = _fit_cells(x_NPC, ground_NPC)
    filled_N = error_N < empty_N
    template_N, colour_N = np.divmod(best_N, len(COLOURS))
    grid = (len(SHAPES), len(SIZES), len(JITTERS), len(JITTERS))
    shape_N, size_N, dy_N, dx_N = np.unravel_index(template_N, grid)

    alpha_NP1 = (_templates_TP()[template_N] * filled_N[:, None])[..., None]
    left_NPC = x_NPC - ground_NPC - alpha_NP1 * (shapes.COLOUR_RGB[colour_N][:, None] / 255 - ground_NPC)
    cell_mse_N, block_error_N = residuals(left_NPC)

    def per_cell(values_N):
        return np.where(filled_N, values_N, EMPTY).reshape(b, 4)

    jitter = np.array(JITTERS)
    return _Reading(
        shape=per_cell(shape_N),
        colour=per_cell(colour_N),
        size=per_cell(size_N),
        jitter=np.stack([jitter[dx_N], jitter[dy_N]], -1).reshape(b, 4, 2),
        cell_mse=cell_mse_N.reshape(b, 4).max(-1),
        block_error=block_error_N.reshape(b, 4).max(-1),
    )


def _read(images):
    images = np.asarray(images)
    square = images.ndim == 4 and images.shape[1] == images.shape[2] and images.shape[3] == 3
    if images.dtype != np.uint8 or not square or images.shape[1] % BASE_SIZE or not images.shape[1]:
        raise ValueError(
            "scenes verifier: images must be uint8 [B, S, S, 3] with S a multiple of 32, "
            f"not {images.dtype} {images.shape}"
        )
    # An empty batch still passes through once, so that every array has its shape.
    chunks = [_read_chunk(images[i : i + _CHUNK]) for i in range(0, max(len(images), 1), _CHUNK)]
    return _Reading(*(np.concatenate([getattr(c, f) for c in chunks]) for f in _Reading.__dataclass_fields__))


def read_scene(images):
    """Reads pictures back.

    Args:
      images: uint8 [B, S, S, 3], S a multiple of 32.
    Returns:
      list of B ReadScene.
    Raises:
      ValueError: for another dtype or shape.
    """
    r = _read(images)
    return [
        ReadScene(
            tuple(
                Obj(
                    SHAPES[r.shape[i, cell]],
                    COLOURS[r.colour[i, cell]],
                    SIZES[r.size[i, cell]],
                    cell,
                    int(r.jitter[i, cell, 0]),
                    int(r.jitter[i, cell, 1]),
                )
                for cell in range(len(CELLS))
                if r.shape[i, cell] != EMPTY
            ),
            float(r.cell_mse[i]),
            float(r.block_error[i]),
        )
        for i in range(len(r.cell_mse))
    ]


def _wanted(scenes):
    """Attributes asked for, int [B, 4] each (EMPTY where no object is), and whether anything is asked, bool [B]."""
    shape, colour, size = (np.full((len(scenes), len(CELLS)), EMPTY) for _ in range(3))
    for i, scene in enumerate(scenes):
        for h, c, z, cell in scene.keys if isinstance(scene, Scene) else scene or ():
            shape[i, cell], colour[i, cell], size[i, cell] = SHAPES.index(h), COLOURS.index(c), SIZES.index(z)
    return shape, colour, size, (shape != EMPTY).any(-1)


def _kind_counts(shape, colour):
    """How many objects of each (shape, colour) an image holds. int [B, shapes * colours]."""
    kind = np.where(shape == EMPTY, EMPTY, shape * len(COLOURS) + colour)
    return (kind[..., None] == np.arange(len(SHAPES) * len(COLOURS))).sum(1)


def score(images, scenes):
    """Compares pictures with the scenes that they should show.

    Args:
      images: uint8 [B, S, S, 3].
      scenes: B of Scene, or collections of (shape, colour, size, cell), or None (nothing is then right).
    Returns:
      dict of bool [B]:
        count: as many objects as asked for.
        presence: each asked (shape, colour) is somewhere, as often as asked.
        position: exactly the asked cells hold an object.
        shape, colour, size: each asked cell holds an object, and with that attribute.
        all_correct: exactly the asked objects, all attributes, and the residual is small (see the top of this file).
    Raises:
      ValueError: if the lengths differ or the images are not such.
    """
    scenes = list(scenes)
    r = _read(images)
    if len(scenes) != len(r.cell_mse):
        raise ValueError(f"scenes verifier: {len(r.cell_mse)} images but {len(scenes)} scenes")
    shape, colour, size, askable = _wanted(scenes)
    free = shape == EMPTY
    result = {
        "count": (r.shape != EMPTY).sum(-1) == (~free).sum(-1),
        "presence": (_kind_counts(r.shape, r.colour) >= _kind_counts(shape, colour)).all(-1),
        "position": ((r.shape == EMPTY) == free).all(-1),
        "shape": (free | (r.shape == shape)).all(-1),
        "colour": (free | (r.colour == colour)).all(-1),
        "size": (free | (r.size == size)).all(-1),
    }
    clean = is_clean(r.cell_mse, r.block_error)
    result["all_correct"] = result["position"] & result["shape"] & result["colour"] & result["size"] & clean
    return {name: right & askable for name, right in result.items()}


def judge(images, captions):
    """`score` against captions; a caption that cannot be parsed counts as wrong in everything."""
    return score(images, [parse_caption(c) for c in captions])
