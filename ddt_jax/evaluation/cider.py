"""CIDEr-D of captions against several by people (Vedantam et al. 2015, arXiv 1411.5726).

An n-gram of a caption weighs as often as it occurs, times log of images over images in whose references it does. For
n = 1 .. 4 the vectors of a caption and of a reference are compared by cosine, in which a caption's weight counts up to
the reference's only, times exp(-(difference of lengths)^2 / (2 sigma^2)). CIDEr-D is the mean over n and references,
times 10, as of the authors' program: they do not divide counts by their sum, as the paper does, and take the number of
2-grams for the length.

It is only comparable for the same images: how rare an n-gram is depends on them.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_LONGEST = 4
_SIGMA = 6.0
_SCALE = 10.0

# n't and 's apart from their word, words with inner hyphens, dots and slashes whole, other signs but punctuation.
_WORD = re.compile(r"n't\b|'(?:s|re|ve|ll|d|m)\b|\w+?(?=n't\b)|\w+(?:[-./]\w+)*|[^\w\s.,:;?!'`\"()\[\]{}-]")


def words(caption: str) -> list[str]:
    """Words in lower case, without punctuation: what Stanford's tokenizer of the Penn treebank makes of a caption, but
    for abbreviations and a few contractions (gonna)."""
    return _WORD.findall(re.sub(r"\bcannot\b", "can not", caption.lower().replace("\u2019", "'")))


def cider_d(said: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """CIDEr-D of each image's caption, float64 [N], from 0 to 10.

    Args:
      said: words of the caption of each image.
      references: words of the captions by people of each image, at least one.

    Raises:
      ValueError: other numbers of images, or one without references.
    """
    if len(said) != len(references) or not all(references):
        raise ValueError(
            f"{len(said)} captions, {len(references)} images, {sum(map(bool, references))} with references"
        )
    counted = [[_counts(caption) for caption in of_image] for of_image in references]
    found_in = Counter(gram for of_image in counted for gram in set().union(*of_image))

    def weighed(counts):
        return {gram: n * math.log(len(said) / max(1, found_in[gram])) for gram, n in counts.items()}

    scores = np.zeros(len(said))
    for i, (caption, of_image) in enumerate(zip(said, counted, strict=True)):
        counts = _counts(caption)
        ours = weighed(counts)
        alike = [_alike(ours, weighed(other), _length(counts) - _length(other)) for other in of_image]
        scores[i] = _SCALE * np.mean(alike)
    return scores


def _counts(caption) -> Counter:
    """How often each n-gram occurs."""
    sizes = range(1, _LONGEST + 1)
    return Counter(tuple(caption[i : i + n]) for n in sizes for i in range(len(caption) - n + 1))


def _length(counts) -> int:
    return sum(n for gram, n in counts.items() if len(gram) == 2)


def _alike(ours, theirs, longer: int) -> float:
    """Mean over n of the cosines of two captions, whose n-grams are weighed."""
    dot, our_square, their_square = (np.zeros(_LONGEST) for _ in range(3))
    for gram, weight in ours.items():
        n = len(gram) - 1
        other = theirs.get(gram, 0.0)
        dot[n] += min(weight, other) * other
        our_square[n] += weight**2
    for gram, weight in theirs.items():
        their_square[len(gram) - 1] += weight**2
    norm = np.sqrt(our_square * their_square)
    cosine = np.divide(dot, norm, out=np.zeros(_LONGEST), where=norm > 0)
    return float(cosine.mean() * math.exp(-(longer**2) / (2 * _SIGMA**2)))
