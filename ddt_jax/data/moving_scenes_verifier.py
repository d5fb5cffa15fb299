"""Reads a moving scene back from its frames: which lane holds which shape, colour and size, and where it moves.

For every lane, least squares over all that it can hold: shape, size, colour, offset, and a start, direction and speed
that put the object somewhere in each frame. Sums over frames decide, so no frame is read for itself; what moves
otherwise than a moving scene does is read as the nearest thing that one could be, and is not `clean`. The background is
fitted to each frame as in data.scenes_verifier; the median over frames counts.

Legend: B clips, T frames, F = B T frames of all clips, S = 32 rows or columns, R = 16 rows of a lane, X = 32 places of
an object's middle along it, H templates (shape, size), K colours, C = 3 channels, P pixels of a cell, M
motions (direction, speed) along an axis. Values are in [0, 1].
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ddt_jax.data import scenes_verifier, shapes
from ddt_jax.data.moving_scenes import DIRECTIONS, LANES, SPEEDS, Mover, MovingScene, axis_of, parse_caption, velocity
from ddt_jax.data.shapes import BASE_SIZE, CELL, COLOURS, JITTERS, SHAPES, SIZES

_CHUNK = 256  # frames at once


@dataclass(frozen=True)
class ReadMovingScene:
    """What was read from one clip.

    Attributes:
      objects: in the order of their lanes, with start and offset.
      cell_mse, block_error: residuals of the worst frame, as in `scenes_verifier.ReadScene`.
    """

    objects: tuple[Mover, ...]
    cell_mse: float
    block_error: float

    @property
    def keys(self):
        """The combination: a frozenset of (shape, colour, size, direction, speed, lane)."""
        return frozenset(o.key for o in self.objects)

    @property
    def clean(self):
        """Whether every frame looks like what was read."""
        return bool(scenes_verifier.is_clean(self.cell_mse, self.block_error))


@lru_cache
def _templates_HRR():
    still = JITTERS.index(0)
    return shapes.alpha_masks(BASE_SIZE)[:, :, still, still].reshape(-1, CELL, CELL)


@lru_cache
def _placed_NI(power: int, axis: int):
    """Templates to a power at each place along a lane, as one matrix from its N = R S pixels to I = X H sums."""
    templates_HRR = _templates_HRR().swapaxes(1, 2) if axis else _templates_HRR()
    wide_HRS = np.zeros((len(templates_HRR), CELL, BASE_SIZE), np.float32)
    wide_HRS[..., :CELL] = templates_HRR**power
    placed_XHRS = np.stack([np.roll(wide_HRS, x - CELL // 2, axis=-1) for x in range(BASE_SIZE)])
    return np.ascontiguousarray(placed_XHRS.reshape(-1, CELL * BASE_SIZE).T)


def _correlate(field_FRSC, power: int, axis: int):
    """Sums of a field times each template (to a power) at each place of a lane: [F, R, S, C] -> [F, X, H, C]."""
    f, c = len(field_FRSC), field_FRSC.shape[-1]
    sums = field_FRSC.transpose(0, 3, 1, 2).reshape(f * c, -1) @ _placed_NI(power, axis)
    return sums.reshape(f, c, BASE_SIZE, -1).transpose(0, 2, 3, 1)


def _gain(away_BTRSC, ground_BRSC, axis: int):
    """How much squared error an object takes away, float32 [B, T, X, H, K], in a lane of all frames.

    |away|^2 - |away - a (c - g)|^2 with a the coverage, g the ground and c the colour, expanded.
    """
    b, t = away_BTRSC.shape[:2]
    away_FRSC = away_BTRSC.reshape(b * t, *away_BTRSC.shape[2:])
    colour_KC = shapes.COLOUR_RGB / 255
    pull_FXHC = _correlate(away_FRSC, 1, axis)
    meeting = (away_BTRSC * ground_BRSC[:, None]).sum(-1, keepdims=True).reshape(*away_FRSC.shape[:3], 1)
    pull_FXHK = pull_FXHC @ colour_KC.T - _correlate(meeting, 1, axis)
    ones = np.ones_like(ground_BRSC[..., :1])
    cover_BXHK = (
        _correlate(ones, 2, axis) * (colour_KC**2).sum(-1)
        - 2 * _correlate(ground_BRSC, 2, axis) @ colour_KC.T
        + _correlate((ground_BRSC**2).sum(-1, keepdims=True), 2, axis)
    )
    return 2 * pull_FXHK.reshape(b, t, *pull_FXHK.shape[1:]) - cover_BXHK[:, None]


def _motions(axis: int):
    return [(d, s) for d in DIRECTIONS if axis_of(d) == axis for s in SPEEDS]


def _best_on_lane(away_BTSSC, ground_BSSC, axis: int, lane: int):
    """(gain float [B], movers B): the best object of each clip on one lane; rows run across the axis."""
    best_B, movers = np.full(len(away_BTSSC), -np.inf), [None] * len(away_BTSSC)
    motions = _motions(axis)
    for offset in JITTERS:
        rows = (CELL * lane + offset + np.arange(CELL)) % BASE_SIZE
        gain_BTXHK = _gain(away_BTSSC[:, :, rows], ground_BSSC[:, rows], axis)
        total_MBXHK = np.zeros((len(motions), *gain_BTXHK[:, 0].shape), np.float32)
        for m, motion in enumerate(motions):
            for t in range(gain_BTXHK.shape[1]):
                total_MBXHK[m] += np.roll(gain_BTXHK[:, t], -velocity(*motion) * t, axis=1)
        flat_BI = total_MBXHK.transpose(1, 0, 2, 3, 4).reshape(len(best_B), -1)
        at_B = flat_BI.argmax(-1)
        for i, at in enumerate(at_B):
            if flat_BI[i, at] > best_B[i]:
                best_B[i] = flat_BI[i, at]
                grid = (len(motions), BASE_SIZE, len(SHAPES), len(SIZES), len(COLOURS))
                m, start, h, z, k = (int(n) for n in np.unravel_index(at, grid))
                movers[i] = Mover(SHAPES[h], COLOURS[k], SIZES[z], *motions[m], lane, start, offset)
    return best_B, movers


def _painted(movers, t: int, ground_SSC):
    """The frames that show these objects over a ground. float32 [T, S, S, C]."""
    frames_TSSC = np.repeat(ground_SSC[None], t, axis=0)
    for o in movers:
        alpha = _templates_HRR()[SHAPES.index(o.shape) * len(SIZES) + SIZES.index(o.size)][..., None]
        for number, picture in enumerate(frames_TSSC):
            place = np.ix_(*((middle - CELL // 2 + np.arange(CELL)) % BASE_SIZE for middle in o.at(number)))
            picture[place] += alpha * (shapes.COLOUR_RGB[COLOURS.index(o.colour)] / 255 - picture[place])
    return frames_TSSC


def _read_chunk(clips_BTSSC) -> list[ReadMovingScene]:
    b, t, s = clips_BTSSC.shape[:3]
    frames = clips_BTSSC.reshape(b * t, s, s, 3).astype(np.float32) / 255
    x_FSSC = scenes_verifier.pool(frames, s // BASE_SIZE)
    grounds = scenes_verifier.background(x_FSSC).reshape(b, t, BASE_SIZE, BASE_SIZE, 3)
    ground_BSSC = np.median(grounds, axis=1).astype(np.float32)
    x_BTSSC = x_FSSC.reshape(grounds.shape)
    away_BTSSC = x_BTSSC - ground_BSSC[:, None]
    turned = (away_BTSSC.swapaxes(2, 3), ground_BSSC.swapaxes(1, 2))
    found = {
        (axis, lane): _best_on_lane(*(turned if axis else (away_BTSSC, ground_BSSC)), axis, lane)
        for axis, lane in itertools.product(range(len(LANES)), range(2))
    }
    read = []
    for i in range(b):
        gains = [sum(max(float(found[axis, lane][0][i]), 0) for lane in range(2)) for axis in range(len(LANES))]
        on_axis = [found[int(np.argmax(gains)), lane] for lane in range(2)]
        movers = tuple(movers[i] for gain_B, movers in on_axis if gain_B[i] > 0)
        left_TSSC = x_BTSSC[i] - _painted(movers, t, ground_BSSC[i])
        cell_mse_N, block_error_N = scenes_verifier.residuals(scenes_verifier.to_cells(left_TSSC))
        read.append(ReadMovingScene(movers, float(cell_mse_N.max()), float(block_error_N.max())))
    return read


def read_moving_scene(clips) -> list[ReadMovingScene]:
    """Reads clips back.

    Args:
      clips: uint8 [B, T, S, S, 3], T at least 2 (one frame shows no direction), S a multiple of 32.

    Raises:
      ValueError: for another dtype or shape.
    """
    clips = np.asarray(clips)
    square = clips.ndim == 5 and clips.shape[2] == clips.shape[3] and clips.shape[4] == 3
    if clips.dtype != np.uint8 or not square or clips.shape[1] < 2 or clips.shape[2] % BASE_SIZE or not clips.shape[2]:
        raise ValueError(
            "moving scenes verifier: clips must be uint8 [B, T, S, S, 3] with T at least 2 and S a multiple of 32, "
            f"not {clips.dtype} {clips.shape}"
        )
    step = max(1, _CHUNK // clips.shape[1])
    return [read for i in range(0, len(clips), step) for read in _read_chunk(clips[i : i + step])]


def score(clips, scenes) -> dict[str, np.ndarray]:
    """Compares clips with the scenes that they should show.

    Args:
      clips: uint8 [B, T, S, S, 3].
      scenes: B of MovingScene, or collections of keys, or None (nothing is then right).

    Returns:
      dict of bool [B]:
        count: as many objects as asked for.
        identity: exactly the asked lanes hold an object, each of the asked shape, colour and size.
        direction: exactly the asked lanes hold an object, and each moves where it should.
        speed: the same, each as fast as it should.
        all_correct: exactly the asked objects, all attributes, and the residual is small.

    Raises:
      ValueError: if the lengths differ or the clips are not such.
    """
    scenes, read = list(scenes), read_moving_scene(clips)
    if len(scenes) != len(read):
        raise ValueError(f"moving scenes verifier: {len(read)} clips but {len(scenes)} scenes")
    result = {name: np.zeros(len(read), bool) for name in ("count", "identity", "direction", "speed", "all_correct")}
    for i, (r, scene) in enumerate(zip(read, scenes, strict=True)):
        keys = scene.keys if isinstance(scene, MovingScene) else frozenset(scene or ())
        if not keys:
            continue
        result["count"][i] = len(r.keys) == len(keys)
        for name, parts in (("identity", (0, 1, 2)), ("direction", (3,)), ("speed", (4,))):
            # The axis goes along, or the two halves of the one axis would pass for those of the other.
            of = [{(axis_of(k[3]), k[5], *(k[p] for p in parts)) for k in some} for some in (keys, r.keys)]
            result[name][i] = of[0] == of[1]
        result["all_correct"][i] = r.keys == keys and r.clean
    return result


def judge(clips, captions) -> dict[str, np.ndarray]:
    """`score` against captions; a caption that cannot be parsed counts as wrong in everything."""
    return score(clips, [parse_caption(c) for c in captions])
