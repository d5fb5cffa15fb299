"""Cosines of pictures and captions are those of transformers' CLIP, and pictures pass through untouched."""

import functools
import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.evaluation.clip_score import ClipScore
from ddt_jax.interop import hf_clip
from ddt_jax.nn.clip import Clip, Sizes
from ddt_jax.nn.params import split

VISION = settings.ViT(patch_size=4, depth=1, width=8, heads=2, mlp_width=8, class_token=True, pixels="clip")
SIZES = Sizes(VISION, 8, 300, 12, 8, 2, 2, 8, "quick", 1e-5, 6)
PICTURES = np.random.default_rng(0).integers(0, 256, (5, 10, 15, 3), np.uint8)
CAPTIONS = ["a red disc", "A BLUE FRAME", "a red disc and a caption that is far too long", "", "a red frame"]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A tokenizer.json of bytes with CLIP's marks, whose captions are read in lower case."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(alphabet)} | {"<|startoftext|>": 298, "<|endoftext|>": 299}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = [("<|startoftext|>", 298), ("<|endoftext|>", 299)]
    model.add_special_tokens([name for name, _ in marks])
    single = "<|startoftext|> $A <|endoftext|>"
    model.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=marks)
    path = tmp_path_factory.mktemp("clip") / "tokenizer.json"
    model.save(str(path))
    return path


def scorer(params, tokenizer_file, sizes=SIZES, batch=2):
    from ddt_jax.tokenizers.text import open_text_tokenizer

    mesh = meshes.make_mesh(settings.Mesh(), jax.devices()[:1])
    return ClipScore(sizes, params, open_text_tokenizer(tokenizer_file), batch, mesh)


@functools.cache
def random_params(sizes):
    images, ids = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 3), np.int32)
    shapes = jax.eval_shape(Clip(sizes).init, jax.random.key(0), images, ids, np.zeros(1, np.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), split(shapes)[0])


def test_pictures_pass_and_the_mean_is_over_all_of_them(tokenizer_file):
    score = scorer(random_params(SIZES), tokenizer_file)
    np.testing.assert_array_equal(np.stack(list(score.watch(iter(PICTURES), CAPTIONS))), PICTURES)
    singly = [score.cosines([p], [c])[0] for p, c in zip(PICTURES, CAPTIONS, strict=True)]
    found = score.results()
    assert found["t2i_clip_images"] == 5 and found["t2i_clip_score"] == pytest.approx(100 * np.mean(singly), rel=1e-5)
    assert np.ptp(singly) > 0.01 and np.all(np.abs(singly) <= 1)


def test_captions_stand_between_marks_and_are_cut(tokenizer_file):
    score = scorer(random_params(SIZES), tokenizer_file)
    short, long, empty = (score.ids(CAPTIONS[i]) for i in (0, 2, 3))
    assert (short[0], short[-1], len(short)) == (298, 299, 2 + len("a red disc"))
    assert (long[0], long[-1], len(long)) == (298, 299, 12)
    assert empty.tolist() == [298, 299]
    np.testing.assert_array_equal(score.ids("A RED DISC"), short)


def test_the_middle_of_a_picture_is_seen(tokenizer_file):
    score = scorer(random_params(SIZES), tokenizer_file)
    wide = np.zeros((8, 20, 3), np.uint8)
    wide[:, 6:14] = 255
    assert score.prepared(wide).shape == (8, 8, 3) and score.prepared(wide).min() == 255
    assert score.prepared(wide.transpose(1, 0, 2)).min() == 255


def test_a_folder_that_holds_no_clip_is_refused(tmp_path, tokenizer_file):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(UserError, match=r"config\.json describes no "):
        hf_clip.read_sizes(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        hf_clip.read_sizes(tmp_path / "nowhere")
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "hidden_size": 16}
    common |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    vision = common | {"image_size": 8, "patch_size": 4}
    text = common | {"vocab_size": 300, "max_position_embeddings": 12}
    for wrong in ({}, {"vocab_size": "many"}, {"num_attention_heads": 3}, {"num_attention_heads": 0}):
        found = {"model_type": "clip", "projection_dim": 6, "vision_config": vision, "text_config": text | wrong}
        (tmp_path / "config.json").write_text(json.dumps(found))
        if not wrong:
            assert hf_clip.read_sizes(tmp_path).length == 12
            continue
        with pytest.raises(UserError, match=r"config\.json") as error:
            hf_clip.read_sizes(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="has 300 ids, its model 299"):
        scorer(random_params(SIZES), tokenizer_file, replace(SIZES, vocab_size=299))


@pytest.mark.slow
def test_cosines_equal_those_of_transformers(oracle, tmp_path, tokenizer_file):
    torch, transformers = oracle("torch"), oracle("transformers")
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = {
        "vocab_size": 300,
        "hidden_size": 16,
        "max_position_embeddings": 12,
        "bos_token_id": 298,
        "eos_token_id": 299,
        **common,
    }
    vision = {"hidden_size": 24, "image_size": 8, "patch_size": 4, **common}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # biases and norms start at values that hide a mistake
            p.copy_(torch.randn_like(p) * 0.3 + ("norm" in name and "weight" in name))
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    sizes = hf_clip.read_sizes(tmp_path)
    score = scorer(hf_clip.read(tmp_path, sizes), tmp_path, sizes, batch=8)
    ours = score.cosines(list(PICTURES), CAPTIONS)

    tokens = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), pad_token="<|endoftext|>")
    given = tokens(CAPTIONS, padding=True, truncation=True, max_length=12, return_tensors="pt")
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    processor = transformers.CLIPImageProcessor(**size)
    pixels = processor(list(PICTURES), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], pixel_values=pixels)
    theirs = (found.image_embeds * found.text_embeds).sum(-1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert np.ptp(theirs) > 0.05
