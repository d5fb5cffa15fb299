import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import mesh, settings
from ddt_jax.evaluation import metrics, reconstruction
from ddt_jax.evaluation.reconstruction import evaluate_reconstruction
from ddt_jax.tokenizers.base import example_keys
from tests.evaluation import two_processes

SIZE, GRID, LEVELS = 16, 4, 8  # a code per 4 x 4 block and image: its mean brightness in 8 levels


class BlockMeans:
    """Codes are quantised block means in reading order; what is not shown is grey."""

    num_tokens = GRID * GRID
    codebook_size = LEVELS
    image_size = SIZE

    def __init__(self, noise=0.0):
        self.noise = noise
        self.loss_weights = {"reconstruction": 1.0}
        self.traces = {"encode": 0, "decode": 0}

    def encode(self, params, extra, images_BHWC):
        self.traces["encode"] += 1
        assert images_BHWC.dtype == jnp.float32
        means = images_BHWC.reshape(-1, GRID, SIZE // GRID, GRID, SIZE // GRID, 3).mean((2, 4, 5))
        return jnp.clip((means.reshape(-1, 16) + 1) / 2 * LEVELS, 0, LEVELS - 1).astype(jnp.int32)

    def decode(self, params, extra, codes_BK, rng, *, num_visible=None, steps=None):
        self.traces["decode"] += 1
        shown = jnp.arange(16) < jnp.reshape(16 if num_visible is None else num_visible, (-1, 1))
        values = jnp.where(shown, (codes_BK + 0.5) / LEVELS * 2 - 1, 0.0) * params["scale"]
        image = values.reshape(-1, GRID, 1, GRID, 1, 1) * jnp.ones((1, 1, SIZE // GRID, 1, SIZE // GRID, 3))
        image = image.reshape(-1, SIZE, SIZE, 3)
        if not self.noise:
            return image
        keys_B = example_keys(rng, jnp.arange(codes_BK.shape[0]))
        return image + self.noise * jax.vmap(lambda key: jax.random.normal(key, (SIZE, SIZE, 3)))(keys_B)


class WithCommitment(BlockMeans):
    def __init__(self):
        super().__init__()
        self.loss_weights = {"reconstruction": 1.0, "commitment": 0.1}

    def loss_fn(self, params, extra, batch, rng):
        mean = batch["image"].astype(jnp.float32).mean((1, 2, 3)) + batch["slot"]
        return {"commitment": mean.sum()}, {"commitment": jnp.float32(mean.size)}, {}


PLAIN, NOISY = BlockMeans(), BlockMeans(noise=0.1)  # shared, for each has compiled programs
PARAMS = {"scale": jnp.float32(1.0)}
SETTINGS = settings.Evaluate(visible=(0.125, 0.25, 0.5, 1.0), pictures=3)


def _images(n=20, seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (n, GRID, 1, GRID, 1, 1)) * np.ones((1, 1, 4, 1, 4, 3))
    return np.clip(blocks.reshape(n, SIZE, SIZE, 3) + rng.integers(-9, 9, (n, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def _batches(images, size, index=True):
    """Padded to the batch size with junk that must not count."""
    for start in range(0, len(images), size):
        rows = images[start : start + size]
        padding = size - len(rows)
        junk = np.random.default_rng(9).integers(0, 256, (padding, *rows.shape[1:]), dtype=np.uint8)
        batch = {
            "image": np.concatenate([rows, junk]),
            "valid": np.arange(size) < len(rows),
            "slot": np.arange(size, dtype=np.int32),
        }
        if index:
            position = start + np.arange(size)
            batch["index"] = np.where(position < len(images), position, -1).astype(np.int32)
        yield batch


def _evaluate(tokenizer, batches, **kwargs):
    return evaluate_reconstruction(tokenizer, PARAMS, {}, batches, kwargs.pop("settings", SETTINGS), **kwargs)


def _by_hand(images, shown):
    """NumPy twin of BlockMeans without noise."""
    x = images / 127.5 - 1
    codes = np.clip((x.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4, 5)).reshape(-1, 16) + 1) / 2 * LEVELS, 0, 7).astype(int)
    return codes, _draw(codes, shown)


def _draw(codes, shown):
    values = np.where(np.arange(16) < shown, (codes + 0.5) / LEVELS * 2 - 1, 0.0).reshape(-1, 4, 4)
    return (
        np.round(np.clip((values + 1) * 127.5, 0, 255))
        .astype(np.uint8)
        .repeat(4, 1)
        .repeat(4, 2)[..., None]
        .repeat(3, -1)
    )


def test_figures_equal_those_computed_by_hand():
    images = _images()
    report = _evaluate(PLAIN, _batches(images, 8))
    results = report.results
    assert results["n"] == 20
    assert list(results["psnr_by_tokens"]) == ["2", "4", "8", "16"]
    for k in (2, 4, 8, 16):
        codes, expected = _by_hand(images, k)
        assert results["psnr_by_tokens"][str(k)] == pytest.approx(metrics.psnr(images, expected).mean(), abs=1e-3)
        assert results["ssim_by_tokens"][str(k)] == pytest.approx(metrics.ssim(images, expected).mean(), abs=1e-4)
        np.testing.assert_array_equal(report.reconstructions[k], expected[:3])
    assert results["psnr"] == results["psnr_by_tokens"]["16"] and results["ssim"] == results["ssim_by_tokens"]["16"]
    np.testing.assert_array_equal(report.originals, images[:3])
    usage = metrics.codebook_usage(codes, LEVELS)
    assert results["codebook_perplexity"] == pytest.approx(usage["perplexity"])
    assert results["codebook_perplexity_by_position"] == pytest.approx(usage["perplexity_by_position"])
    assert results["codebook_used"] == 8
    wrong = _draw(np.roll(codes, 1, axis=0), 16)  # all but the first, whose predecessor is its batch's last
    wrong[0] = _draw(codes[7:8], 16)[0]
    assert results["psnr_wrong_image_codes"] == pytest.approx(metrics.psnr(images, wrong).mean(), abs=1e-3)


def test_codes_out_of_order_cost_what_the_tokens_carry():
    results = _evaluate(PLAIN, _batches(_images(), 8)).results
    assert results["psnr_drop_shuffled"] == pytest.approx(results["psnr"] - results["psnr_shuffled_codes"])
    assert results["psnr_drop_shuffled"] > 10
    flat = np.full((4, SIZE, SIZE, 3), 100, np.uint8) + np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    assert _evaluate(PLAIN, _batches(flat, 8)).results["psnr_drop_shuffled"] == 0


def test_shuffle_is_a_permutation_of_each_image_keyed_by_seed_and_index():
    codes = np.arange(32).reshape(2, 16)
    a = reconstruction._shuffled(codes, 0, np.array([5, -1]))
    np.testing.assert_array_equal(np.sort(a), codes)
    np.testing.assert_array_equal(a[0], reconstruction._shuffled(codes[:1], 0, np.array([5]))[0])
    assert (a[0] != reconstruction._shuffled(codes[:1], 0, np.array([6]))[0]).any()
    assert (a[0] != reconstruction._shuffled(codes[:1], 1, np.array([5]))[0]).any()


def test_neither_batch_size_nor_padding_nor_order_changes_a_noisy_figure():
    images, tokenizer = _images(), NOISY
    whole = _evaluate(tokenizer, _batches(images, 8))
    parts = _evaluate(tokenizer, _batches(images, 3))
    backwards = _evaluate(tokenizer, list(_batches(images, 3))[::-1])
    np.testing.assert_array_equal(whole.reconstructions[16], parts.reconstructions[16])
    assert whole.results["psnr_by_tokens"] == pytest.approx(parts.results["psnr_by_tokens"], rel=1e-12)
    assert whole.results["psnr_shuffled_codes"] == pytest.approx(backwards.results["psnr_shuffled_codes"], rel=1e-12)
    counted = _evaluate(tokenizer, _batches(images, 3, index=False))  # without an index rows are counted
    assert whole.results["psnr_by_tokens"] == pytest.approx(counted.results["psnr_by_tokens"], rel=1e-12)


def test_noise_differs_between_images_and_seeds_and_repeats_for_a_seed():
    same = np.repeat(_images(1), 3, axis=0)
    tokenizer = NOISY
    a = _evaluate(tokenizer, _batches(same, 3)).reconstructions[16]
    assert (a[0] != a[1]).any()
    np.testing.assert_array_equal(a, _evaluate(tokenizer, _batches(same, 3), seed=0).reconstructions[16])
    assert (a != _evaluate(tokenizer, _batches(same, 3), seed=1).reconstructions[16]).any()


def test_one_program_serves_all_prefixes_and_later_evaluations():
    tokenizer = BlockMeans()
    for _ in range(2):
        _evaluate(tokenizer, _batches(_images(), 8))
    assert tokenizer.traces == {"encode": 1, "decode": 1}


def test_a_mesh_of_devices_gives_the_same_figures():
    devices = mesh.make_mesh(settings.Mesh())
    images, tokenizer = _images(16), NOISY
    plain = _evaluate(tokenizer, _batches(images, 8)).results
    with jax.set_mesh(devices):
        over = _evaluate(BlockMeans(noise=0.1), _batches(images, 8), put=lambda b: mesh.put_batch(b, devices)).results
    assert plain["psnr_by_tokens"] == pytest.approx(over["psnr_by_tokens"], rel=1e-6)
    assert plain["psnr_wrong_image_codes"] == pytest.approx(over["psnr_wrong_image_codes"], rel=1e-6)


def test_rows_in_the_middle_that_are_not_valid_count_nowhere():
    images, tokenizer = _images(6), PLAIN
    (batch,) = _batches(images, 8)
    batch["valid"][[0, 3]] = False
    good = _evaluate(tokenizer, [batch], verifier=lambda x, index: {"all_correct": np.ones(len(x), bool)})
    rest = _evaluate(tokenizer, _batches(images[[1, 2, 4, 5]], 8))
    assert good.results["n"] == 4 and good.results["scenes_all_correct"] == 1
    for name in ("psnr", "ssim", "psnr_wrong_image_codes", "codebook_perplexity"):
        assert good.results[name] == pytest.approx(rest.results[name])
    np.testing.assert_array_equal(good.originals, rest.originals)


def test_verifier_judges_decoded_images_and_originals_by_their_index():
    images = _images(20)
    asked = []

    def verifier(x, index):
        asked.append(index.tolist())
        exact = (x == images[index]).all((1, 2, 3))
        return {"all_correct": exact, "count": index % 4 == 0}

    results = _evaluate(PLAIN, _batches(images, 8), verifier=verifier).results
    assert sorted(sum(asked, [])) == sorted(2 * list(range(20)))
    assert results["scenes_all_correct"] == 0 and results["scenes_all_correct_originals"] == 1
    assert results["scenes_all_correct_interval"] == pytest.approx([0, 0.1611], abs=1e-4)
    assert results["scenes_count"] == 0.25
    low, high = results["scenes_count_interval"]
    assert low < 0.25 < high


def test_commitment_distance_of_whole_batches_where_the_tokenizer_has_one():
    images = _images(20)
    assert "commitment_distance" not in _evaluate(PLAIN, _batches(images, 8)).results
    results = _evaluate(WithCommitment(), _batches(images, 8)).results
    assert results["commitment_distance"] == pytest.approx(images[:16].mean() + 3.5, rel=1e-5)


@pytest.mark.parametrize(
    ("shares", "tokens", "counts"),
    [
        ((0.125, 0.25, 0.5, 1.0), 16, [2, 4, 8, 16]),
        ((0.125, 0.25, 0.5, 1.0), 64, [8, 16, 32, 64]),
        ((0.125, 0.25, 0.5, 1.0), 4, [1, 2, 4]),
        ((1.0, 0.5), 3, [2, 3]),
        ((0.01,), 1, [1]),
        ((), 8, [8]),
    ],
)
def test_shares_become_rising_counts_that_end_with_all(shares, tokens, counts):
    assert reconstruction.visible_counts(shares, tokens) == counts


def test_prefixes_of_given_images():
    images = _images(3)
    codes, rows = reconstruction.reconstruct_prefixes(PLAIN, PARAMS, {}, images, SETTINGS)
    assert list(rows) == ["2 tokens", "4 tokens", "8 tokens", "16 tokens"]
    np.testing.assert_array_equal(codes, _by_hand(images, 16)[0])
    np.testing.assert_array_equal(rows["4 tokens"], _by_hand(images, 4)[1])


def test_report_is_saved_as_json_table_and_picture(tmp_path):
    said = []
    report = _evaluate(PLAIN, _batches(_images(), 8), progress=said.append, verifier=lambda x, i: {"count": i > 4})
    assert said == [8, 16, 20]
    paths = report.save(tmp_path / "out")
    assert [p.name for p in paths] == ["reconstruction.json", "reconstruction.md", "reconstruction.png"]
    assert json.loads(paths[0].read_text()) == report.results
    table = paths[1].read_text()
    assert f"| 16 | {report.results['psnr']:.2f} | {report.results['ssim']:.4f} |" in table
    assert "| scenes count | 75.0% (" in table and "commitment" not in table
    assert report.picture().shape[0] > 5 * 96


class Difference:
    """A judge: mean brightness lost, by image, and how many images there were."""

    def __init__(self):
        self.images, self.indices = 0, []

    def see(self, seen):
        np.testing.assert_array_equal(seen.local(seen.on_device[1]), seen.decoded_BHWC)
        np.testing.assert_array_equal(seen.local(seen.on_device[0]), seen.image_BHWC)
        self.images += int(seen.valid_B.sum())
        self.indices += seen.index_B[seen.valid_B].tolist()
        return {"lost": (seen.image_BHWC.astype(float) - seen.decoded_BHWC).mean((1, 2, 3))}

    def results(self):
        return {"judged": self.images}


def test_judges_see_every_image_once_and_their_figures_are_averaged():
    images, judge = _images(), Difference()
    report = _evaluate(PLAIN, _batches(images, 8), judges=[judge])
    lost = (images.astype(float) - _by_hand(images, 16)[1]).mean((1, 2, 3))
    assert report.results["lost"] == pytest.approx(lost.mean(), abs=1e-6)
    assert report.results["lost_standard_error"] == pytest.approx(lost.std() / np.sqrt(20), abs=1e-6)
    assert report.results["judged"] == 20 and judge.indices == list(range(20))
    np.testing.assert_array_equal(report.codes, _by_hand(images, 16)[0])


def test_codes_and_labels_of_the_valid_images_come_in_order():
    images = _images(20)
    batches = [b | {"label": np.where(b["valid"], b["index"] % 3, -1)} for b in _batches(images, 8)]
    put = lambda batch: {k: jnp.asarray(v) for k, v in batch.items()}  # noqa: E731
    codes, labels = reconstruction.codes_of(PLAIN, PARAMS, {}, batches, put=put)
    np.testing.assert_array_equal(codes, _by_hand(images, 16)[0])
    assert labels.tolist() == [i % 3 for i in range(20)]
    report = _evaluate(PLAIN, batches)
    np.testing.assert_array_equal(report.labels, labels)
    assert set(_evaluate(PLAIN, _batches(images, 8)).labels) == {-1}


def test_small_images_have_no_ssim_rather_than_an_empty_one():
    class Small(BlockMeans):
        def decode(self, *args, **kwargs):
            return super().decode(*args, **kwargs)[:, :8, :8]

        def encode(self, params, extra, images_BHWC):
            return super().encode(params, extra, jnp.repeat(jnp.repeat(images_BHWC, 2, 1), 2, 2))

    results = _evaluate(Small(), _batches(_images()[:, :8, :8], 8)).results
    assert not [name for name, value in results.items() if name.startswith("ssim") or value is None]


def test_no_pictures_can_be_asked_for():
    report = _evaluate(PLAIN, _batches(_images(), 8), settings=settings.Evaluate(pictures=0))
    assert len(report.originals) == 0 and report.results["n"] == 20


def test_no_images_is_an_error_and_not_a_nan():
    with pytest.raises(ValueError, match="no images"):
        _evaluate(PLAIN, [])
    batch = next(iter(_batches(_images(8), 8)))
    with pytest.raises(ValueError, match="no valid images"):
        _evaluate(PLAIN, [batch | {"valid": np.zeros(8, bool)}])


_PROCESS = """
import json, sys
import jax

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[3]))  # before anything makes an array
import tests.evaluation.test_reconstruction as t
from ddt_jax import mesh, settings
from ddt_jax.evaluation import frechet, gather
from ddt_jax.evaluation.frechet import Moments

shared = sys.argv[2] == "shared"
devices = mesh.make_mesh(settings.Mesh(data=1, tensor=4) if shared else settings.Mesh())
reader = mesh.reader(devices)
assert reader == (mesh.Reader(0, 1, (0,)) if shared else mesh.Reader(jax.process_index(), 2, (0, 1)))
part = slice(8 // reader.count * reader.index, 8 // reader.count * (reader.index + 1))
batches = [{k: v[part] for k, v in b.items()} for b in t._batches(t._images(20), 8)]
with jax.set_mesh(devices):
    put, verifier = lambda b: mesh.put_batch(b, devices), lambda x, i: {"count": i % 4 == 0}
    report = t._evaluate(t.WithCommitment(), batches, put=put, verifier=verifier)
    labelled = [b | {"label": b["index"]} for b in batches]
    codes, labels = t.reconstruction.codes_of(t.PLAIN, t.PARAMS, {}, labelled, put=put)

features = t.np.random.default_rng(0).normal(size=(7, 3))
part = features[:5] if jax.process_index() == 0 else features[5:]
both = gather.moments(Moments.of(part), 3)
one = gather.moments(Moments.of(features) if jax.process_index() == 1 else None, 3)
assert frechet.distance(both, Moments.of(features)) < 1e-12 and frechet.distance(one, both) < 1e-12
assert one.count == both.count == 7 and gather.moments(None, 3) is None
assert gather.agreed(jax.process_index() + 5) == 5
order = labels.argsort()
assert labels[order].tolist() == list(range(20))
t.np.testing.assert_array_equal(codes[order], t._by_hand(t._images(20), 16)[0])
print(json.dumps(report.results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["apart", "shared"])
def test_two_processes_report_the_figures_of_one(rows):
    results = two_processes.results(_PROCESS, rows, timeout=120)
    assert results[0] == results[1]
    one = _evaluate(WithCommitment(), _batches(_images(20), 8), verifier=lambda x, i: {"count": i % 4 == 0}).results
    # Not the control: "the image before" is that of the same process.
    for name in set(one) - {"psnr_wrong_image_codes"}:
        assert results[0][name] == pytest.approx(one[name], rel=1e-6), name
