"""`python tools/bench.py llama`: memory of the verbs that read and write LLaMA's files."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_timing import ROOT

# LLaMA 3.2 1B (its config.json), but for a head of its own and a depth that follows from the size that is asked for.
LLAMA = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0}
ADDED = 65_536  # rows for codes of images
TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64}
FILES = 8

# getrusage counts what the parent held when it forked; the high-water mark in /proc is of this program alone.
_WITH_PEAK = """
import sys
from ddt_jax import cli
code = cli.main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""


def llama(options) -> dict:
    """Peak memory of the verbs for a random bfloat16 model in several files, and whether it comes out as it went in."""
    import numpy as np

    from ddt_jax.io import weights_folder

    found = {"seconds": {}, "peak_gb_above_baseline": {}, "baseline_gb": {}, "limit_gb_above_baseline": {}}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench_llama_") as root:
        verbs = {
            "import": ["import", "llama", "--from", "{0}/theirs", "--workdir", "{0}/ours"],
            "export": ["export", "llama", "--workdir", "{0}/ours", "--to", "{0}/again"],
            "import_longer": ["import", "llama", "--from", "{0}/theirs", "--workdir", "{0}/longer"],
        }
        longer = LLAMA["vocab_size"] + ADDED
        verbs["import_longer"] += ["--vocab-size", str(longer)]
        _write_llama(f"{root}/tiny/theirs", LLAMA | TINY, 1)
        about = _write_llama(f"{root}/model/theirs", LLAMA, options.gigabytes * 1e9)
        for name, arguments in verbs.items():
            base, _ = _peak([a.format(f"{root}/tiny") for a in arguments])
            peak, seconds = _peak([a.format(f"{root}/model") for a in arguments])
            new = 2e-9 * longer * LLAMA["hidden_size"] if name == "import_longer" else 0
            largest = max(about["largest_tensor_gb"], new)
            found["seconds"][name] = round(seconds, 1)
            found["baseline_gb"][name] = round(base / 1e9, 3)
            found["peak_gb_above_baseline"][name] = round((peak - base) / 1e9, 3)
            found["limit_gb_above_baseline"][name] = round(2 * largest + 1, 3)
        before, after = (weights_folder.load(f"{root}/model/{name}") for name in ("theirs", "again"))
        bits = lambda array: np.asarray(array).view(np.uint8)  # noqa: E731
        same = before.keys() == after.keys() and all(np.array_equal(bits(x), bits(after[n])) for n, x in before.items())
    limits = found["limit_gb_above_baseline"]
    within = all(peak <= limits[name] for name, peak in found["peak_gb_above_baseline"].items())
    return {**about, **found, "within_limits": within, "identical": same, "load": round(os.getloadavg()[0], 2)}


def _write_llama(folder, config: dict, size: float) -> dict:
    """A random model of about so many bytes, at least one layer, tensor by tensor; what it is."""
    import ml_dtypes
    import numpy as np

    from ddt_jax.io import weights_folder

    d, f, e = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    wide, narrow = config["num_attention_heads"] * e, config["num_key_value_heads"] * e
    block = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    block |= {"self_attn.q_proj": (wide, d), "self_attn.k_proj": (narrow, d), "self_attn.v_proj": (narrow, d)}
    block |= {"self_attn.o_proj": (d, wide), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    table = (config["vocab_size"], d)
    depth = (size / 2 - 2 * np.prod(table)) / sum(np.prod(shape) for shape in block.values())
    depth = max(1, round(float(depth)))
    shapes = {"model.embed_tokens": table}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    shapes |= {"model.norm": (d,), "lm_head": table}

    def lazy(seed, shape):
        make = lambda: np.random.default_rng(seed).standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)  # noqa: E731
        return weights_folder.Lazy(shape, np.dtype(ml_dtypes.bfloat16), make)

    arrays = {f"{name}.weight": lazy(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    sizes = [array.nbytes for array in arrays.values()]
    weights_folder.save(folder, arrays, file_bytes=max(*sizes, sum(sizes) // FILES))
    text = json.dumps({"model_type": "llama", "num_hidden_layers": depth, **config})
    Path(folder, "config.json").write_text(text)
    files = len(list(Path(folder).glob("*.safetensors")))
    about = {"model_gb": sum(sizes) / 1e9, "largest_tensor_gb": max(sizes) / 1e9}
    return {name: round(value, 3) for name, value in about.items()} | {"tensors": len(sizes), "files": files}


def _peak(arguments) -> tuple[int, float]:
    """Bytes that the process of a verb held at most, and its seconds."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", _WITH_PEAK, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr}")
    return int(done.stderr.splitlines()[-1]) * 1024, time.perf_counter() - begun
