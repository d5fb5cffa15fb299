"""What an evaluation leaves out, and why; what features of the originals depend on."""

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.evaluation import reconstruction, suite

MESH = meshes.make_mesh(settings.Mesh(), jax.devices()[:1])
SETTINGS = settings.Experiment(data=settings.Data(source="a", eval_source="b"))


class Quiet:
    """Progress that nobody looks at."""

    @contextlib.contextmanager
    def phase(self, name):
        yield lambda detail: None


def source(names=None, n=100, name="source"):
    """Records are their own number."""

    class Source:
        label_names = names

        def __len__(self):
            return n

        def __getitem__(self, index):
            return {"image": np.full((2, 2, 3), index, np.uint8)}

    Source.name = name
    return Source()


def known_codes(monkeypatch, s=SETTINGS, names=(None, None), opens=True):
    monkeypatch.setattr(reconstruction, "codes_of", lambda *a, **k: (np.zeros((3, 2), int), np.array([0, 1, -1])))

    def open_known():
        if not opens:
            raise UserError("data: no file matches x")
        return SimpleNamespace(source=source(names[0]), eval_batches=lambda n, batch_size: [])

    left_out = []
    args = (None, None, None, s, MESH, open_known, source(names[1]), Quiet(), left_out)
    return suite._known_codes(*args), left_out


def test_codes_of_the_training_half_are_not_there_without_images_of_their_own(monkeypatch):
    found, left_out = known_codes(monkeypatch, opens=False)
    assert found is None and left_out == ["probes and entropies: data: no file matches x"]
    none = dataclasses.replace(SETTINGS, evaluate=settings.Evaluate(probe_images=0))
    assert known_codes(monkeypatch, none) == (None, ["probes and entropies: evaluate.probe_images is 0"])
    same = dataclasses.replace(SETTINGS, data=settings.Data(source="a", eval_source="a"))
    found, left_out = known_codes(monkeypatch, same)
    assert found is None and "are the same images" in left_out[0]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ((None, None), [0, 1, -1]),
        ((("cat", "dog"), ("cat", "dog")), [0, 1, -1]),
        ((("cat", "dog"), None), [0, 1, -1]),
        ((("cat", "dog"), ("dog", "cat")), [-1, -1, -1]),
    ],
)
def test_labels_of_other_classes_are_none(monkeypatch, names, labels):
    (codes, found), left_out = known_codes(monkeypatch, names=names)
    assert found.tolist() == labels and len(codes) == 3 and not left_out


def test_probes_need_labels_of_several_classes():
    assert "no labels" in suite._no_probe(np.array([], int), np.array([1]))
    assert "no labels" in suite._no_probe(np.array([0, 1]), np.array([], int))
    assert "one class" in suite._no_probe(np.array([2, 2]), np.array([1]))
    assert suite._no_probe(np.array([0, 1]), np.array([1])) == ""


def test_probe_results_are_those_of_all_tokens_and_the_commonest_class():
    def found(value):
        return {"accuracy": value, "interval": [value - 0.1, value + 0.1], "n": 4}

    probed = {"2": {"linear": found(0.25), "knn": found(0.5)}, "4": {"linear": found(0.75), "knn": found(0.5)}}
    results = suite._probe_results(probed, np.zeros(9), np.array([3, 3, 3, 0]))
    assert results["probe_chance"] == 0.75 and results["probe_images"] == 9 and results["probe_test_images"] == 4
    assert results["probe_linear"] == 0.75 and results["probe_linear_interval"] == [0.65, 0.85]
    assert results["probe_linear_by_tokens"] == {"2": 0.25, "4": 0.75}


def test_features_of_the_originals_are_keyed_by_all_they_depend_on():
    weights = suite.Weights(None, {}, "digest")

    def key(s=SETTINGS, of=None, weights=weights):
        return suite._originals_key(s, of or source(), weights)

    def with_data(**values):
        return dataclasses.replace(SETTINGS, data=dataclasses.replace(SETTINGS.data, **values))

    few = dataclasses.replace(SETTINGS, evaluate=settings.Evaluate(images=50))
    keys = [
        key(),
        key(few),
        key(dataclasses.replace(few, seed=1)),
        key(with_data(image_size=64)),
        key(with_data(crop="stretch")),
        key(with_data(background=(0, 0, 0))),
        key(of=source(name="other")),
        key(of=source(n=101)),
        key(weights=suite.Weights(None, {}, "other")),
    ]
    changed = source()
    type(changed).__getitem__ = lambda self, index: {"image": np.full((2, 2, 3), index + 1, np.uint8)}
    keys.append(key(of=changed))
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert key(dataclasses.replace(SETTINGS, seed=1)) == key()  # all images, in whatever order
    assert key(with_data(threads=7)) == key()
