"""Logits and greedy text equal transformers' LLaMA, by way of its own files."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.interop import llama
from ddt_jax.multimodal import backbone, generate
from ddt_jax.nn import spans

pytestmark = pytest.mark.slow

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 10_000.0}
CASES = {
    "shared key heads": {"num_key_value_heads": 2},
    "tied head": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "scaled as LLaMA 3.1": {"num_key_value_heads": 1, "rope_parameters": LLAMA3},
    "scaled linearly, wide heads": {
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    },
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def model_in_folder(request, oracle, tmp_path):
    torch, transformers = oracle("torch"), oracle("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        eos_token_id=None,
        **request.param,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # as initialised, logits are so small that nothing would show
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.15 if p.ndim > 1 else 1 + 0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    return model, tmp_path


@pytest.mark.parametrize("scan", [False, True])
def test_logits_equal_transformers(model_in_folder, oracle, scan):
    torch, (model, folder) = oracle("torch"), model_in_folder
    c = replace(llama.read_settings(folder), scan_layers=scan)
    values = llama.read(folder, c)
    ids = np.random.default_rng(0).integers(0, 96, (2, 50)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    positions = np.broadcast_to(np.arange(50, dtype=np.int32), ids.shape)
    got = backbone.Backbone(c).apply({"params": values}, ids, positions, spans.causal(50), method="everything")
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_greedy_text_equals_transformers_for_64_tokens(model_in_folder, oracle):
    torch, (model, folder) = oracle("torch"), model_in_folder
    read = llama.read_settings(folder)
    c, values = backbone.for_decoding(read, llama.read(folder, read))
    prompts = np.random.default_rng(1).integers(0, 96, (3, 9)).astype(np.int32)
    lengths = np.array([9, 4, 6], np.int32)
    out = jax.jit(
        lambda v: generate.generate(
            c, v, generate.Prompts(prompts, lengths), jnp.arange(3), settings.Sampling(tokens=64, temperature=0.0)
        )
    )(values)
    for prompt, length, ours in zip(prompts, lengths, np.asarray(out.tokens_BN), strict=True):
        given = torch.tensor(prompt[None, :length], dtype=torch.long)
        mask = torch.ones_like(given)
        theirs = model.generate(given, attention_mask=mask, do_sample=False, max_new_tokens=64, pad_token_id=0)
        np.testing.assert_array_equal(ours, theirs[0, length:].numpy())
