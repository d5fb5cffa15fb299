"""SEED's three stages, one after another: each begins with the run before it, evaluates, and codes can be written; and
a transformer that reads these codes describes and draws.
"""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image

from ddt_jax import config, exchange, experiment, judging, settings, speaking, tokenize
from ddt_jax.data.codes import CodesSource
from ddt_jax.errors import UserError
from ddt_jax.io import safetensors_file, weights_folder
from ddt_jax.multimodal import documents
from ddt_jax.training import warm_start

pytestmark = pytest.mark.slow
SMALL = settings.SEED(
    num_tokens=4,
    vision=settings.ViT(patch_size=16, depth=1, width=8, heads=1, mlp_width=8),
    qformer=settings.QFormer(depth=1, width=8, heads=1, mlp_width=8, norm="post"),
    text=settings.TextTower(vocab_size=300, length=24, depth=1, width=8, heads=1, mlp_width=8),
    contrast=settings.Contrast(width=8),
    quantizer=settings.Quantizer(code_dim=4, codebook_size=16, normalize_input="none"),
    embedding_depth=1,
    features_depth=1,
    draw=settings.FlowHead(patch_size=16, depth=1, width=8, heads=1, diffusion=settings.RectifiedFlow(solver_steps=1)),
)
VAE = settings.Autoencoder(block_out_channels=(8, 8), layers_per_block=1, latent_channels=2, norm_groups=4)
TRAIN = settings.Train(steps=2, batch_size=8, tensorboard=False)
EVALUATE = settings.Evaluate(images=40, batch_size=40, pictures=2, probe_images=32, counterfactuals=0, visible=(1.0,))


def of(stage, init_from=""):
    return settings.Experiment(
        name=stage,
        model=replace(SMALL, stage=stage),
        init_from=str(init_from),
        optimizer=settings.Optimizer(name="adamw"),
        train=TRAIN,
        evaluate=EVALUATE,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Workdirs of the three stages."""
    root = tmp_path_factory.mktemp("seed")
    experiment.train(of("align"), str(root / "align"))
    experiment.train(of("codes", root / "align"), str(root / "codes"))
    experiment.train(of("draw", root / "codes"), str(root / "draw"))
    return root


def test_each_stage_goes_on_from_the_one_before(root, tmp_path):
    align, codes, draw = (root / name for name in ("align", "codes", "draw"))
    found, found_later, results = (judging.evaluate(str(run)) for run in (align, codes, draw))
    found, results = found["results"], results["results"]
    assert found["retrieval"].keys() == {"by_embedding"} and found["retrieval_images"] == 40
    assert (codes / "text" / "tokenizer.model").read_bytes() == (align / "text" / "tokenizer.model").read_bytes()
    (_, first), (_, second) = (experiment.restore(str(run), whole=True) for run in (align, codes))
    for name in ("vision", "qformer", "text"):
        jax.tree.map(np.testing.assert_array_equal, experiment.weights(first)[name], second.params[name])
    assert found_later["results"]["retrieval"]["by_embedding"] == found["retrieval"]["by_embedding"]
    assert found_later["results"]["retrieval"].keys() == {"by_embedding", "by_code", "by_shuffled_codes"}
    assert "codebook_used" in found_later["results"] and "Retrieval among 40" in found_later["table"]
    assert results["retrieval"] == found_later["results"]["retrieval"] and results["num_tokens"] == 4
    assert (draw / "reconstructions.png").exists() and "psnr" in results

    with pytest.raises(UserError, match="goes on from what another run has learned; set init_from"):
        experiment.train(of("codes"), str(tmp_path / "none"))
    with pytest.raises(UserError, match="model.stage='codes', which draws nothing"):
        judging.reconstruct(str(codes), [])
    others = replace(of("draw", codes), model=replace(SMALL, stage="draw", causal=False))
    with pytest.raises(UserError, match="makes other codes than this run would; set as there: model.causal"):
        experiment.train(others, str(tmp_path / "other"))


def test_it_is_trained_and_measured_on_karpathys_splits(tmp_path):
    rng, images = np.random.default_rng(0), []
    for number in range(12):
        split = ("train", "restval", "test")[number % 3]
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(tmp_path / f"{number}.jpg")
        said = [{"raw": f"picture {number} in {word}"} for word in ("red", "green", "blue", "grey", "pink")]
        images.append({"split": split, "filename": f"{number}.jpg", "sentences": said})
    (tmp_path / "dataset.json").write_text(json.dumps({"images": images}))
    where = f"karpathy:{tmp_path}/dataset.json"
    data = settings.Data(source=f"{where}?split=train+restval&each=caption", eval_source=f"{where}?split=test")
    experiment.train(replace(of("align"), data=data), str(tmp_path / "run"))
    found = judging.evaluate(str(tmp_path / "run"))
    assert [found["results"][f"retrieval_{of}"] for of in ("images", "texts")] == [4, 20]
    assert found["table"].startswith("Retrieval among 4 images and 20 captions; chance at 1 is 25.00%.")


def test_a_qformer_is_exported_and_begun_with(root, tmp_path):
    names = {"qformer": "qformer.layernorm.weight", "seed-qformer": "Qformer.bert.embeddings.LayerNorm.weight"}
    trained = experiment.weights(experiment.restore(str(root / "align"))[1])["qformer"]
    for kind, name in names.items():
        exchange.export(kind, str(root / "align"), str(tmp_path / kind))
        assert name in weights_folder.load(tmp_path / kind)
        begun = experiment.build(replace(of("align"), model=replace(SMALL, qformer_weights=str(tmp_path / kind))))
        jax.tree.map(np.testing.assert_array_equal, begun.starting_weights()["qformer"], trained)
    started = begun.init()
    jax.tree.map(np.testing.assert_array_equal, (started.params["qformer"], started.ema["qformer"]), (trained, trained))


def clip_folder(folder):
    """A CLIP's text encoder in Hugging Face's format, random and thin but for its 77 rows of 768, and its tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    common = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    text = common | {"hidden_size": 768, "intermediate_size": 8, "vocab_size": 258, "max_position_embeddings": 77}
    vision = common | {"hidden_size": 8, "intermediate_size": 8, "image_size": 16, "patch_size": 16}
    sizes = {"model_type": "clip", "projection_dim": 4, "text_config": text, "vision_config": vision}
    layer = "encoder.layers.0"
    shapes = {"embeddings.token_embedding.weight": (258, 768), "embeddings.position_embedding.weight": (77, 768)}
    maps = {f"self_attn.{x}_proj": (768, 768) for x in ("q", "k", "v", "out")}
    for name, shape in (maps | {"mlp.fc1": (8, 768), "mlp.fc2": (768, 8)}).items():
        shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    for name in (f"{layer}.layer_norm1", f"{layer}.layer_norm2", "final_layer_norm"):
        shapes |= {f"{name}.weight": (768,), f"{name}.bias": (768,)}
    rng = np.random.default_rng(0)
    arrays = {f"text_model.{name}": 0.1 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir()
    weights_folder.save(folder, arrays)
    (folder / "config.json").write_text(json.dumps(sizes))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(alphabet)} | {"<|startoftext|>": 256, "<|endoftext|>": 257}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    model.save(str(folder / "tokenizer.json"))
    return settings.CLIPText(vocab_size=258, depth=1, heads=1, mlp_width=8, weights=str(folder))


def test_features_of_clip_are_learned_and_exported_for_stable_diffusion(root, tmp_path):
    clip = clip_folder(tmp_path / "clip")
    s = of("codes", root / "align")
    s = replace(s, model=replace(s.model, features="clip", clip=clip))
    run, codes, file = (str(tmp_path / name) for name in ("run", "codes", "e.safetensors"))
    experiment.train(s, run)
    tokenize.tokenize(run, codes, records=3)
    result = exchange.export("embeddings", run, file, codes)
    assert result["shape"] == [3, 77, 768] and "embeddings 3 x 77 x 768 for Stable Diffusion 1" in result["summary"]
    found = safetensors_file.load(file)
    assert found["embeddings"].shape == (3, 77, 768) and np.isfinite(found["embeddings"]).all()
    np.testing.assert_array_equal(found["codes"], np.concatenate([CodesSource(codes)[i]["codes"] for i in range(3)]))

    # What stands of it is drawn from without CLIP, on latents of a codec that codes know nothing of.
    vae = settings.VAECodec(preset="custom", sizes=VAE, random_weights=True)
    of_draw = replace(s.model, stage="draw", clip=replace(clip, weights=""), codec=vae)
    of_draw = replace(of_draw, draw=replace(SMALL.draw, patch_size=8))
    built = experiment.build(replace(s, model=of_draw, init_from=run), jax.devices()[:1])
    begin = warm_start.find(built.settings, built.model, built.mesh, built.abstract, experiment.make_model)
    assert {"/".join(name.split("/")[:2]) for name in begin.plan.left} == {"extra/target"}
    assert {"/".join(name.split("/")[:2]) for name in begin.plan.fresh} == {"params/draw", "extra/codec"}

    with pytest.raises(UserError, match="has model.features='patches', of its own vision transformer"):
        exchange.export("embeddings", str(root / "draw"), file, codes)
    with pytest.raises(UserError, match="export embeddings: needs --codes"):
        exchange.export("embeddings", run, file)
    with pytest.raises(UserError, match="export qformer: takes no --codes, only embeddings does"):
        exchange.export("qformer", run, file, codes)


def test_a_transformer_on_these_codes_describes_and_draws(root):
    written = {}
    for folder, run, more in (
        ("train_codes", "codes", {}),
        ("heldout_codes", "codes", {"source": "scenes:heldout"}),
        ("drawn_codes", "draw", {}),
    ):
        tokenize.tokenize(str(root / run), str(root / folder), records=40, **more)
        written[folder] = CodesSource(str(root / folder))
    assert len({source.plan.tokenizer for source in written.values()}) == 1  # a decoder changes no code
    np.testing.assert_array_equal(written["train_codes"].code_vectors(), written["drawn_codes"].code_vectors())
    sizes = {"width": 8, "depth": 1, "heads": 1, "kv_heads": 1, "mlp_width": 8}
    changed = {f"model.transformer.{name}": value for name, value in sizes.items()}
    changed |= {"train.steps": 2, "train.batch_size": 8, "train.tensorboard": False, "optimizer.name": "adamw"}
    changed |= {"evaluate.prompts": 3, "evaluate.images": 8, "evaluate.image_to_text.tokens": 4}
    pairs = tuple((name, str(value)) for name, value in changed.items())
    s = config.load(f"configs/seed_llama_scenes.py:{root}", pairs)
    experiment.train(s, str(root / "transformer"))
    results = judging.evaluate(str(root / "transformer"))["results"]
    assert results["prompts"] == 3 and {"image_bits", "t2i_all_correct", "caption_parsed"} <= results.keys()
    # What it draws is what the third stage makes of codes, whose two steps show anything but grey.
    speaker = speaking.open_speaker(str(root / "transformer"))
    drawn = speaker.draw([documents.text_to_image(speaker.encode_text("a small red disc"), documents.Image())], [3])
    assert drawn.valid.all() and drawn.pictures.shape == (1, 32, 32, 3) and np.ptp(drawn.pictures) > 0
