"""Pictures and captions of one class each ("a photo of a deer", as `?caption=label` writes), judged by a classifier.

Figures are called as those of `compositional`, and mean the same: everything that a caption says is right. A classifier
errs, so beside the share of drawn pictures stands that of real ones with the same captions.

Legend: B images, S image side, C = 3 channels.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ddt_jax.data.base import class_caption
from ddt_jax.errors import UserError
from ddt_jax.evaluation.compositional import Figures, shares


class NamedClasses:
    """See the module's docstring.

    Args:
      names: of the classes, by number.
      classify: uint8 [B, S, S, C] → int [B], the number of the likeliest class of each.

    Raises:
      UserError: two classes have one name, so that nobody can say which of them a caption means.
    """

    def __init__(self, names: Sequence[str], classify: Callable[[np.ndarray], np.ndarray]):
        self._classes = {class_caption(name): number for number, name in enumerate(names)}
        if len(self._classes) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise UserError(f"evaluate: two classes of evaluate.classifier are called {twice!r}; captions mean either")
        self._classify = classify

    def pictures(self, images_BSSC, captions: Sequence[str], valid_B=None) -> Figures:
        """`t2i_all_correct`: the share of pictures that show the class of their captions, for all that is known.

        Args:
          valid_B: bool, which of the images were drawn; None: all.

        Raises:
          UserError: a caption that names no class.
        """
        return shares({"t2i_all_correct": self.right_pictures(images_BSSC, captions, valid_B)})

    def real(self, images_BSSC, captions: Sequence[str]) -> Figures:
        """`t2i_real_pictures`: the same share of real pictures, which no drawn ones can be expected to better."""
        return shares({"t2i_real_pictures": self.right_pictures(images_BSSC, captions)})

    def captions(self, said: Sequence[str], truth: Sequence[str]) -> Figures:
        """`caption_all_correct`: the share that names the right class; `caption_parsed`: that names one at all.

        Raises:
          UserError: a truth that names no class.
        """
        parsed = [text in self._classes for text in said]
        return shares({"caption_all_correct": self.right_captions(said, truth), "caption_parsed": parsed})

    def right_pictures(self, images_BSSC, captions: Sequence[str], valid_B=None) -> list[bool]:
        """Which pictures `t2i_all_correct` counts."""
        asked = self._asked(captions)
        if not asked:
            return []
        valid = np.ones(len(asked), bool) if valid_B is None else np.asarray(valid_B, bool)
        found = self._classify(np.asarray(images_BSSC))
        return [bool(v) and int(f) == a for v, f, a in zip(valid, found, asked, strict=True)]

    def right_captions(self, said: Sequence[str], truth: Sequence[str]) -> list[bool]:
        """Which captions `caption_all_correct` counts."""
        return [self._classes.get(text) == true for text, true in zip(said, self._asked(truth), strict=True)]

    def _asked(self, captions) -> list[int]:
        for i, text in enumerate(captions):
            if text not in self._classes:
                some = ", ".join(repr(known) for known in list(self._classes)[:2])
                raise UserError(
                    f"evaluate: caption {i + 1} of {len(captions)}, {text!r}, names no class of evaluate.classifier, "
                    f"as {some} do; write captions with ?caption=label, or leave the classifier out"
                )
        return [self._classes[text] for text in captions]
