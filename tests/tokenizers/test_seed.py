"""SEED's stages: what each learns, from what, and what stands."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.nn.params import split
from ddt_jax.tokenizers.base import make_tokenizer, to_float

SIZE, B, N, LENGTH = 8, 8, 3, 6
ALIGN = settings.SEED(
    num_tokens=N,
    vision=settings.ViT(patch_size=4, depth=1, width=8, heads=2, mlp_width=12),
    qformer=settings.QFormer(depth=2, width=12, heads=2, mlp_width=12),
    text=settings.TextTower(vocab_size=20, length=LENGTH, depth=1, width=8, heads=2, mlp_width=12),
    contrast=settings.Contrast(width=5),
    quantizer=settings.Quantizer(code_dim=4, codebook_size=16, normalize_input="none", commitment=5.0),
    embedding_depth=1,
    features_depth=1,
    draw=settings.FlowHead(patch_size=4, depth=1, width=8, heads=2, diffusion=settings.RectifiedFlow(solver_steps=2)),
)
CODES, DRAW = replace(ALIGN, stage="codes"), replace(ALIGN, stage="draw")
LEGACY = replace(CODES, recipe="l2-legacy")
VAE = settings.Autoencoder(block_out_channels=(8, 8), layers_per_block=1, latent_channels=2, norm_groups=4)
UNDERSTANDS = {"vision", "qformer", "image_head", "text", "text_head", "contrast"}


def built(config):
    """(model, parameters, extra); parameters are random, with no zeros that hide what they would do."""
    model = make_tokenizer(config, SIZE, B)
    boxed, _ = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        scale = path[-1].key in ("scale", "log_scale")
        return (0.3 * rng.normal(size=leaf.shape) + scale).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(fill, split(boxed)[0])
    return model, params, model.codes.init(jax.random.key(1))[1] if config.stage != "align" else {}


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 20, (B, LENGTH)).astype(np.int32)
    ids[np.arange(LENGTH) >= rng.integers(1, LENGTH + 1, (B, 1))] = settings.NO_TOKEN
    image = rng.integers(0, 256, (B, SIZE, SIZE, 3)).astype(np.uint8)
    return {"image": image, "caption_ids": ids, "slot": np.arange(B, dtype=np.int32)}


def ratios(model, params, extra, batch, key):
    sums, counts, stats = model.loss_fn(params, extra, batch, key)
    return {name: sums[name] / counts[name] for name in sums}, stats


def with_gradients(model, params, extra, key):
    """Terms, statistics, and the largest gradient of each term of the loss in each array: one pass forwards, and one
    backwards for all of them.
    """
    weighed = list(model.loss_weights)

    def run(params):
        terms, stats = ratios(model, params, extra, batch_of(), key)
        return jnp.stack([terms[name] for name in weighed]), (terms, stats)

    _, back, (terms, stats) = jax.vjp(run, params, has_aux=True)
    (grads,) = jax.vmap(back)(jnp.eye(len(weighed)))
    largest = jax.tree.map(lambda g: jnp.abs(g).reshape(len(weighed), -1).max(1), grads)
    return {"terms": terms, "stats": stats, "largest": largest}


def moved(found, model, term):
    """Names of parts in which a term has a gradient."""
    row = list(model.loss_weights).index(term)
    return {name for name, part in found["largest"].items() if max(x[row] for x in jax.tree.leaves(part)) > 0}


@pytest.fixture(scope="module")
def aligned():
    """(model, parameters, what the first stage computes), by one program."""
    model, params, extra = built(ALIGN)
    batch = batch_of()
    few = np.full((3, LENGTH), settings.NO_TOKEN, np.int32)
    few[:2, :2] = 4, 7
    few[1, 2] = 4

    @jax.jit
    def run(params):
        images = to_float(batch["image"])
        return {
            "image": model.embed_images(params, extra, images),
            "text": model.embed_texts(params, batch["caption_ids"]),
            "rows": model.causal_embeddings(params, model.image_rows(params, extra, images)),
            **with_gradients(model, params, extra, jax.random.key(1)),
            "few": model.embed_texts(params, few),
            "shorter": model.embed_texts(params, few[:, :2]),
        }

    return model, params, jax.device_get(run(params))


def computed(config):
    """(model, parameters, what the second stage computes, its terms with another key), by one program."""
    model, params, extra = built(config)

    @jax.jit
    def run(params, extra, key):
        images = to_float(batch_of()["image"])
        rows = model.image_rows(params, extra, images)
        codes = model.encode(params, extra, images)
        return {
            "rows": rows,
            "made": model.causal_embeddings(params, rows),
            "codes": codes,
            "again": model._made_again(params, model._tokens(params, extra, codes)),
            "features": model.features(params, extra, codes),
            "embedded": model.embed_codes(params, extra, codes),
            "vectors": model.code_vectors(params, extra, codes),
            **with_gradients(model, params, extra, key),
        }

    found, again = (jax.device_get(run(params, extra, jax.random.key(i))) for i in (1, 2))
    return model, params, found, again["terms"]


@pytest.fixture(scope="module")
def published():
    return computed(LEGACY)


@pytest.fixture(scope="module")
def averaged():
    return computed(CODES)


def test_the_first_stage_compares_the_last_query_with_the_caption(aligned):
    model, params, found = aligned
    by_hand = found["rows"][:, -1] @ params["image_head"]["kernel"] + params["image_head"]["bias"]
    np.testing.assert_allclose(found["image"], by_hand / np.linalg.norm(by_hand, axis=1, keepdims=True), atol=1e-5)
    logits = np.exp(float(params["contrast"]["log_scale"])) * found["image"] @ found["text"].T
    label = 0.9 * np.eye(B) + 0.1 / B
    log = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (logits, logits.T)]
    np.testing.assert_allclose(found["terms"]["contrast"], -np.mean([(label * x).sum(1) for x in log]), rtol=1e-4)
    np.testing.assert_allclose(found["terms"]["contrast_top1"], np.mean(logits.argmax(1) == np.arange(B)))
    assert moved(found, model, "contrast") == UNDERSTANDS


def test_what_stands_behind_the_end_of_a_caption_has_no_effect(aligned):
    _, _, found = aligned
    few, shorter = found["few"], found["shorter"]
    np.testing.assert_allclose(few[0], shorter[0], atol=1e-6)
    assert np.abs(few[1] - shorter[1]).max() > 1e-3
    assert np.isfinite(few).all()  # the last caption is empty


@pytest.mark.parametrize("recipe", [pytest.param("averaged", marks=pytest.mark.slow), "published"])
def test_terms_of_the_second_stage_reach_what_they_should_and_nothing_that_stands(recipe, request):
    model, _, found, again = request.getfixturevalue(recipe)
    codebook = {"codebook"} if recipe == "published" else set()
    assert moved(found, model, "commitment") == {"down"} | codebook
    assert moved(found, model, "embedding") == {"down", "up", "embedding"}
    assert moved(found, model, "features") == {"down", "up", "features"}
    assert model.loss_weights == {"commitment": 5.0, "embedding": 2.0, "features": 0.5}
    assert {name.split("/")[1] for name in model.inherited} == UNDERSTANDS
    assert found["terms"] == again  # nothing drops out: another key, the same numbers


def test_terms_of_the_second_stage_by_hand(published):
    _, params, found, _ = published
    down, made, codes = params["down"], found["made"], found["codes"]
    z = np.tanh(made @ down["first"]["kernel"] + down["first"]["bias"]) @ down["second"]["kernel"]
    z = z + down["second"]["bias"]
    book = params["codebook"]["vectors"]
    np.testing.assert_array_equal(codes, ((z[:, :, None] - book) ** 2).sum(-1).argmin(-1))
    np.testing.assert_allclose(found["terms"]["commitment"], 1.25 * np.mean((z - book[codes]) ** 2), rtol=1e-4)
    counts = found["stats"]["codebook"]["count"]
    np.testing.assert_array_equal(counts, np.bincount(codes.reshape(-1), minlength=16))
    again = found["again"]
    cosine = (again * made).sum(-1) / np.linalg.norm(again, axis=-1) / np.linalg.norm(made, axis=-1)
    np.testing.assert_allclose(found["terms"]["embedding"], 1 - cosine.mean(), rtol=1e-4)
    np.testing.assert_allclose(found["terms"]["features"], np.mean((found["features"] - found["rows"]) ** 2), rtol=1e-4)
    np.testing.assert_array_equal(found["vectors"], book[codes])
    vectors = again[:, -1] @ params["image_head"]["kernel"] + params["image_head"]["bias"]
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(found["embedded"], vectors, atol=1e-5)
    assert len(np.unique(codes)) > 1


def test_pooled_features_are_the_mean_of_an_image():
    model = make_tokenizer(replace(CODES, features="pooled"), SIZE, B)
    rows = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    np.testing.assert_allclose(model.target({}, rows, None, None), rows.mean(1, keepdims=True), atol=1e-6)
    assert model.target.shape == (1, 8)


def test_features_are_learned_from_clip_and_drawn_from_without_it():
    """By shapes alone; `tests/interop/test_hf_clip_target.py` has the numbers."""
    text = settings.CLIPText(vocab_size=22, length=7, depth=1, width=10, heads=2, mlp_width=12, weights="there")
    learned = make_tokenizer(replace(CODES, features="clip", clip=text), SIZE, B)
    boxed, extra = jax.eval_shape(learned.init, jax.random.key(0))
    assert "target" in extra and "target" not in boxed and learned.caption_length == 7
    batch = batch_of() | {"caption_ids": np.zeros((B, 7), np.int32)}
    params, state = (split(tree)[0] for tree in (boxed, {"target": extra["target"]}))
    sums, counts, _ = jax.eval_shape(learned.loss_fn, params, extra | state, batch, jax.random.key(1))
    assert sums.keys() == learned.loss_weights.keys() == {"commitment", "embedding", "features"}

    vae = settings.VAECodec(preset="custom", sizes=VAE, random_weights=True)
    config = replace(DRAW, features="clip", clip=replace(text, weights=""), codec=vae)
    drawing = make_tokenizer(replace(config, draw=replace(DRAW.draw, patch_size=2)), SIZE, B)
    assert not drawing.caption_length and not drawing.target_weights and drawing.cross_example_terms == ()
    boxed, extra = jax.eval_shape(drawing.init, jax.random.key(0))
    assert extra.keys() == {"codebook", "codec"} and boxed["features"]["head"]["kernel"].value.shape == (12, 10)
    assert "extra/codec" not in drawing.code_parts + drawing.inherited
    params, codec = split(boxed)[0], split(extra["codec"])[0]
    codes, extra = jnp.zeros((B, N), jnp.int32), extra | {"codec": codec}
    assert jax.eval_shape(drawing.features, params, extra, codes).shape == (B, 7, 10)
    assert jax.eval_shape(drawing.decode, params, extra, codes, jax.random.key(0)).shape == (B, SIZE, SIZE, 3)
    flow = jax.eval_shape(drawing.loss_fn, params, extra, batch_of(), jax.random.key(1))[0]
    assert flow.keys() == drawing.loss_weights.keys() == {"flow"}


@pytest.mark.slow
@pytest.mark.parametrize("config", [ALIGN, CODES], ids=["align", "codes"])
def test_a_mesh_gives_the_single_device_sums_and_codebook(config):
    model, params, extra = built(config)
    run = jax.jit(lambda batch: model.loss_fn(params, extra, batch, jax.random.key(1))[::2])
    one = run(batch_of())
    mesh = meshes.make_mesh(settings.Mesh())
    with jax.set_mesh(mesh):
        spread = run(meshes.put_batch(batch_of(), mesh))
    assert mesh.size == 8
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_third_stage_learns_to_draw_and_nothing_else():
    model, params, extra = built(DRAW)

    @jax.jit
    def run(params, extra):
        codes = model.encode(params, extra, to_float(batch_of()["image"]))
        changed = codes.at[:, 2].set((codes[:, 2] + 1) % 16)

        def draw(codes, k):
            return model.decode(params, extra, codes, jax.random.key(3), num_visible=k)

        def predict(features, shown):
            given = jnp.ones((1, 4, 48)), jnp.ones((1,))
            return model._apply(params, "draw", *given, features, jnp.full((1,), shown))

        features = jax.random.normal(jax.random.key(4), (2, 1, 4, 8))
        return {
            **with_gradients(model, params, extra, jax.random.key(1)),
            "codes": codes,
            "images": draw(codes, N),
            "two": (draw(codes, 2), draw(changed, 2)),
            "changed": draw(changed, N),
            "alone": draw(codes[:1], N),
            "hidden": [predict(f, False) for f in features],
            "shown": [predict(f, True) for f in features],
        }

    found = jax.device_get(run(params, extra))
    assert moved(found, model, "flow") == {"draw"}
    assert found["codes"].shape == (B, N) and found["codes"].dtype == np.int32
    assert found["images"].shape == (B, SIZE, SIZE, 3) and np.abs(found["images"]).max() <= 1
    np.testing.assert_allclose(*found["two"], atol=1e-6)  # what a hidden token says has no effect
    assert np.abs(found["changed"] - found["images"]).max() > 1e-4
    np.testing.assert_allclose(found["alone"], found["images"][:1], atol=1e-5)  # nor have others of a batch
    np.testing.assert_array_equal(*found["hidden"])
    assert np.abs(found["shown"][0] - found["shown"][1]).max() > 1e-4


def test_a_vision_transformer_from_a_file_is_no_parameter():
    model = make_tokenizer(replace(CODES, vision_weights="there"), SIZE, B)
    boxed, extra = jax.eval_shape(model.init, jax.random.key(0))
    assert "vision" not in boxed and "vision" in extra and "extra/vision" in model.inherited
    assert "extra/vision" in model.code_parts and "params/text" not in model.code_parts
    assert {"params/down", "params/qformer", "extra/codebook"} < set(model.code_parts)


def test_mistakes_are_named():
    def build(model, **train):
        train = settings.Train(batch_size=8, **train)
        return experiment.build(
            settings.Experiment(model=model, data=settings.Data(image_size=SIZE), train=train), jax.devices()[:1]
        )

    with pytest.raises(UserError, match="train.accumulate=2 would change the contrastive loss"):
        build(ALIGN, accumulate=2)
    batch_norm = replace(CODES, quantizer=replace(CODES.quantizer, normalize_input="batch"))
    with pytest.raises(UserError, match="train.accumulate=2 would change encoder batch norm"):
        build(batch_norm, accumulate=2)
    with pytest.raises(UserError, match="model.vision.patch_size=3 does not divide data.image_size=8"):
        build(replace(ALIGN, vision=replace(ALIGN.vision, patch_size=3)))
    with pytest.raises(UserError, match="model.contrast.temperature=0.0 must be above 0"):
        build(replace(ALIGN, contrast=settings.Contrast(temperature=0.0)))
    with pytest.raises(UserError, match="model.draw.patch_size=3 must divide 8 latents"):
        build(replace(DRAW, draw=replace(DRAW.draw, patch_size=3)))
    with pytest.raises(UserError, match="model.stage='codes' draws nothing"):
        make_tokenizer(CODES, SIZE, B).decode({}, {}, jnp.zeros((1, N), jnp.int32), jax.random.key(0))
