"""A trained model that draws from noise: `ddt-jax generate` of a run that denoises images or clips block by block."""

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from ddt_jax import experiment, settings
from ddt_jax.data.base import open_source
from ddt_jax.errors import UserError
from ddt_jax.evaluation import drawing, pictures
from ddt_jax.tokenizers.caption_ids import CaptionBytes


def draws(workdir: str) -> bool:
    """Whether a run is one of these. Raises UserError if there is no run."""
    return isinstance(experiment.saved_settings(workdir).model, settings.ACDiT)


def generate(
    workdir: str,
    *,
    classes: Sequence[str] = (),
    prompts: Sequence[str] = (),
    samples: int = 1,
    frames: int = 0,
    out: str = "",
    overrides: tuple[tuple[str, str], ...] = (),
) -> dict:
    """Draws pictures, or clips, of classes and captions; the same seed (evaluate.seed) gives the same ones.

    Args:
      classes: names or numbers.
      prompts: captions. With neither it draws what was told nothing.
      samples: of each.
      frames: of clips; 0: as many as were learned. See `ACDiT.sample` for more.
      out: PNG; "" = WORKDIR/generated.png. Clips also go beside it, as a GIF.

    Returns:
      "drawn": the class or caption of each, in the order of the pictures, and "written": paths.

    Raises:
      UserError: as `experiment.restore`, or for a class, a caption or a length that the run does not know.
    """
    if samples < 1:
        raise UserError(f"generate: --samples {samples} must be at least 1")
    saved = experiment.saved_settings(workdir, overrides)
    model = experiment.make_model(saved)
    if frames:
        model.check_length(frames)
    asked = [(_number(text, saved), "", text) for text in classes] + [
        (-1, _fits(text, saved), text) for text in prompts
    ]
    asked = [one for one in asked or [(-1, "", "told nothing")] for _ in range(samples)]
    built, state = experiment.restore(workdir, overrides)
    label_D, length = np.array([label for label, _, _ in asked], np.int32), saved.model.caption_bytes
    text_DZ = CaptionBytes(length)(caption for _, caption, _ in asked) if length else None
    texts = [text for _, _, text in asked]
    given = (built.model, experiment.weights(state), state.extra, label_D, built.settings.evaluate)
    with jax.set_mesh(built.mesh):
        drawn = drawing.draw(*given, mesh=built.mesh, frames=frames, text_DZ=text_DZ)
    report = drawing.Report({}, drawn, tuple(texts))
    path = epath.Path(out or epath.Path(workdir) / "generated.png")
    written = [pictures.save_png(report.picture(), path)]
    if (moving := report.moving()) is not None:
        written.append(pictures.save_gif(moving, path.with_suffix(".gif")))
    return {"drawn": texts, "written": [str(p) for p in written]}


def _fits(text: str, s: settings.Experiment) -> str:
    """The text, if it can be told to a run. Raises UserError."""
    most, length = s.model.caption_bytes, len(text.encode())
    if not most:
        raise UserError(
            f"generate: the run draws classes and knows no text (model.caption_bytes=0); leave out {text!r}"
        )
    if not 0 < length <= most:
        raise UserError(f"generate: {text!r} has {length} bytes, the run knows 1 to model.caption_bytes={most}")
    return text


def _number(text: str, s: settings.Experiment) -> int:
    """The label that a class, by name or number, has in a run. Raises UserError."""
    if not s.model.classes:
        raise UserError(
            f"generate: the run was told no classes (model.classes=0), so --class {text} says nothing to it"
        )
    if text.isdigit() and int(text) < s.model.classes:
        return int(text)
    d = s.data
    names = open_source(d.source, image_size=d.image_size, cache_dir=d.cache_dir, clips=d.frames > 0).label_names
    if text not in (names or ()):
        known = f"; choose from {', '.join(names)}" if names and len(names) <= 20 else ""
        raise UserError(f"generate: --class {text} is none of the run's {s.model.classes} classes (from 0){known}")
    return names.index(text)
