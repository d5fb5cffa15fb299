"""Autoencoder files: every array has its place, both ways; what does not fit is named. Numbers against diffusers."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.interop import diffusers_vae
from ddt_jax.nn import autoencoder, params

SMALL = settings.Autoencoder(
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=4,
    norm_groups=4,
    use_quant_conv=True,
    scaling_factor=0.5,
    shift_factor=0.1,
)


def random_params(sizes, dtype=np.float32):
    """Plain arrays of every size, traced only: nothing is compiled."""
    boxed = jax.eval_shape(lambda: autoencoder.init(sizes, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(0, 0.1, s.shape).astype(dtype), params.split(boxed)[0])


def assert_same_bytes(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True), a, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_what_is_written_is_read_bitwise(tmp_path, dtype):
    tree = random_params(SMALL, dtype)
    path = diffusers_vae.write(tmp_path, tree, SMALL)
    assert diffusers_vae.read_sizes(tmp_path) == SMALL
    assert_same_bytes(diffusers_vae.read(tmp_path, SMALL), tree)
    again = diffusers_vae.write(tmp_path / "again", diffusers_vae.read(path, SMALL), SMALL)
    assert again.read_bytes() == path.read_bytes()


def test_old_names_of_the_attention_are_read_and_written(tmp_path):
    tree = random_params(SMALL)
    old = diffusers_vae.to_arrays(tree, old_attention_names=True)
    names = {name.split(".attentions.0.")[1] for name in old if name.startswith("encoder.mid_block.attentions")}
    wanted = {"group_norm", "query", "key", "value", "proj_attn"}
    assert names == {f"{name}.{kind}" for name in wanted for kind in ("weight", "bias")}
    assert_same_bytes(diffusers_vae.from_arrays(old, SMALL), tree)


def test_every_array_that_does_not_fit_is_named_in_one_line():
    arrays = diffusers_vae.to_arrays(random_params(SMALL))
    del arrays["encoder.conv_in.bias"]
    arrays["encoder.extra.weight"] = np.zeros(3)
    arrays["decoder.conv_out.weight"] = np.zeros((3, 8, 5, 5))
    query = "decoder.mid_block.attentions.0.query.weight"
    arrays[query] = np.zeros((16, 16))
    with pytest.raises(UserError) as error:
        diffusers_vae.from_arrays(arrays, SMALL, "vae.safetensors")
    text = str(error.value)
    assert "\n" not in text and "vae.safetensors" in text
    assert "encoder.conv_in.bias is missing" in text
    assert "encoder.extra.weight has no place" in text
    assert "decoder.conv_out.weight is 3 x 8 x 5 x 5, not 3 x 8 x 3 x 3" in text
    assert f"{query} is there as decoder.mid_block.attentions.0.to_q.weight too" in text


def test_files_that_are_not_there_or_no_safetensors_are_the_users_errors(tmp_path):
    with pytest.raises(UserError, match="none.safetensors: cannot be read: No such file"):
        diffusers_vae.read(tmp_path / "none.safetensors", SMALL)
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="bad.safetensors: is no safetensors file, or damaged"):
        diffusers_vae.read(tmp_path / "bad.safetensors", SMALL)


def test_a_config_beside_the_file_must_agree(tmp_path):
    diffusers_vae.write(tmp_path, random_params(SMALL), SMALL)
    with pytest.raises(UserError, match="scaling_factor is 0.5, not 1.5"):
        diffusers_vae.read(tmp_path, replace(SMALL, scaling_factor=1.5))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"act_fn": "relu"}))
    with pytest.raises(UserError, match="act_fn='relu' instead of 'silu'"):
        diffusers_vae.read_sizes(tmp_path)


@pytest.mark.parametrize(("preset", "count"), [("sd", 83_653_863), ("sd3", 83_819_683)])
def test_published_sizes_have_as_many_parameters(preset, count):
    """The counts are those of diffusers' AutoencoderKL; the slow test below counts again."""
    boxed = jax.eval_shape(lambda: autoencoder.init(autoencoder.PRESETS[preset], jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(params.split(boxed)[0])) == count


def theirs(oracle, sizes):
    levels = len(sizes.block_out_channels)
    return oracle("diffusers").AutoencoderKL(
        block_out_channels=sizes.block_out_channels,
        layers_per_block=sizes.layers_per_block,
        latent_channels=sizes.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=sizes.use_quant_conv,
        use_post_quant_conv=sizes.use_quant_conv,
        scaling_factor=sizes.scaling_factor,
        shift_factor=sizes.shift_factor,
    )


@pytest.mark.slow
@pytest.mark.parametrize("preset", autoencoder.PRESETS)
def test_published_sizes_are_those_of_diffusers(oracle, preset):
    sizes = autoencoder.PRESETS[preset]
    with oracle("torch").device("meta"):
        model = theirs(oracle, sizes)
    boxed = jax.eval_shape(lambda: autoencoder.init(sizes, jax.random.key(0)))
    ours = params.split(boxed)[0]
    names = {
        diffusers_vae.diffusers_name(jax.tree_util.keystr(path, simple=True, separator="/")): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(ours)
    }
    assert names == {name: value.numel() for name, value in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("quant_conv", [True, False])
def test_numbers_are_those_of_diffusers(oracle, tmp_path, quant_conv):
    torch = oracle("torch")
    sizes = replace(SMALL, block_out_channels=(32, 64), norm_groups=32, use_quant_conv=quant_conv)
    torch.manual_seed(0)
    model = theirs(oracle, sizes).eval()
    with torch.no_grad():  # away from the zeros and ones that norms and biases start with
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "theirs")
    tree = diffusers_vae.read(tmp_path / "theirs", sizes)
    written = diffusers_vae.write(tmp_path / "ours", tree, sizes)
    assert written.read_bytes() == (tmp_path / "theirs" / diffusers_vae.FILE).read_bytes()

    network = autoencoder.Autoencoder(sizes)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)

    def run(images):
        mean, logvar = network.apply({"params": tree}, images, method="encode")
        decoded = network.apply({"params": tree}, mean, method="decode")
        return jnp.sum(jnp.square(decoded)) + jnp.sum(mean * logvar), (mean, logvar, decoded)

    gradient, found = jax.jit(jax.grad(run, has_aux=True))(images)
    leaf = torch.tensor(images.transpose(0, 3, 1, 2)).requires_grad_()
    posterior = model.encode(leaf).latent_dist
    decoded = model.decode(posterior.mean).sample
    (decoded.square().sum() + (posterior.mean * posterior.logvar).sum()).backward()
    expected = (posterior.mean, posterior.logvar, decoded, leaf.grad)
    # Float32 on both sides; the gradient has passed twice as many layers.
    for name, got, want, limit in zip(
        ("mean", "logvar", "decoded", "gradient"), (*found, gradient), expected, (1e-5, 1e-5, 1e-5, 3e-5), strict=True
    ):
        want = want.detach().numpy().transpose(0, 2, 3, 1)
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error < limit, (name, error)
