"""The parsers that tools/fuzz.py feeds with damaged input, each with sound inputs to damage.

A parser takes bytes and a folder of its own, and may raise nothing but the documented errors (DOCUMENTED): a line for
the user, a record that is counted and left out, a checkpoint that is passed over.
"""

import contextlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ddt_jax import config, settings
from ddt_jax.data import array_record, codes, images, latents
from ddt_jax.data.base import BadRecord, open_source
from ddt_jax.data.loader import Batcher
from ddt_jax.errors import UserError
from ddt_jax.io import safetensors_file, torch_file, weights_folder
from ddt_jax.multimodal.records import own_document
from ddt_jax.tokenizers.caption_ids import CaptionBytes
from ddt_jax.tokenizers.text import open_text_tokenizer, train_sentencepiece
from ddt_jax.training.stored import Damaged, Stored
from ddt_jax.training.writers import JsonlWriter, read_metrics

DOCUMENTED = (UserError, BadRecord, Damaged)
DATA = settings.Data(image_size=8, max_pixels=1_000_000)
CAPTION = CaptionBytes(64)


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
      seeds: (folder) → sound inputs.
      parse: (input, folder) → None; folder as `seeds` left it.
      text: whether inputs are JSON, to be damaged as such too.
    """

    seeds: Callable[[Path], list[bytes]]
    parse: Callable[[bytes, Path], None]
    text: bool = False


def picture(kind="PNG", mode="RGB", size=(12, 10), **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode).save(
        file, kind, **options
    )
    return file.getvalue()


class _Records:
    """Records as a source, for the batcher."""

    name, label_names = "records", None

    def __init__(self, get, count=1):
        self._get, self._count = get, count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return self._get(index)

    def describe(self, index):
        return str(index)


def into_batch(get: Callable, count: int = 1, arrays: dict | None = None) -> None:
    """The way of records into a batch, where those that cannot be used are left out. Raises BadRecord if all are."""
    source = _Records(get, count)
    if arrays:
        source.arrays = arrays
    batcher = Batcher(source, DATA, count, 0, 0, 1, False, False, keep_captions=True, caption_ids=CAPTION)
    batch, errors = batcher.make_eval(0, count, count)
    assert arrays or batch["image"].shape == (count, 8, 8, 3)
    if not batch["valid"].any():
        raise BadRecord(errors[0][1])


RECORDS = [
    {"image": picture(), "caption": "a red circle", "label": 3},
    {
        "image": np.zeros((9, 8, 3), np.uint8),
        "caption": "é",
        "meta": {"turns": [["USER", [0, "x"]], ["ASSISTANT", [0]]]},
    },
    {"image": picture("JPEG"), "caption": "two", "meta": {"parts": ["x", 0], "images": []}},
]


def _record(data, folder):
    into_batch(lambda i: array_record.unpack(data))


def _archive_of_records(folder):
    array_record.write_array_record(str(folder / "seed"), RECORDS)
    return [(folder / "seed").read_bytes()]


def _record_file(data, folder):
    (folder / "x.arrayrecord").write_bytes(data)
    source = open_source(f"arrayrecord:{folder}/x.arrayrecord")
    into_batch(source.__getitem__, min(len(source), 8))


_PLAN = codes.Plan("a" * 64, 4, 64, 8, "none", False, "scenes:train", 2, 2)


def _codes_seeds(folder):
    with contextlib.suppress(UserError):
        writer = codes.CodesWriter(folder / "codes", _PLAN)
        writer.write(0, [{"codes": np.arange(4)[None], "index": 0, "caption": "x"}])
        writer.complete()
    import msgpack

    whole = {"codes": np.arange(8, dtype="<u2").tobytes(), "index": 1, "caption": "two circles"}
    return [
        msgpack.packb(whole | {"turns": [["USER", [0, "make it red"]], ["ASSISTANT", [1]]]}),
        msgpack.packb(whole | {"parts": ["a", 1, "b", 0], "label": 3}),
    ]


def _codes_record(data, folder):
    source = codes.CodesSource(str(folder / "codes"))
    source.read = lambda index: data
    own_document(source[0], lambda text: np.frombuffer(text.encode(), np.uint8))


def _codes_index(data, folder):
    (folder / "codes" / "index.json").write_bytes(data)
    source = codes.CodesSource(str(folder / "codes"))
    for i in range(min(len(source), 4)):
        own_document(source[i], lambda text: np.frombuffer(text.encode(), np.uint8))


def _codes_index_seeds(folder):
    _codes_seeds(folder)
    return [(folder / "codes" / "index.json").read_bytes()]


def _latents_seeds(folder):
    mean = np.zeros((2, 2, 4), np.float32)
    (folder / "latents").mkdir(exist_ok=True)
    packed = [latents.pack(mean, mean, index=i, label=i, caption="x" * (i + 1)) for i in range(2)]
    from etils import epath

    latents.write_shard(epath.Path(folder / "latents") / latents.shard_name(0, 1), packed)
    index = {"identity": {"codec": "x"}, "source": "x", "shape": [2, 2, 4], "dtype": "float32", "shards": 1}
    index["counts"] = {"0": 2}
    (folder / "latents" / latents.INDEX).write_text(json.dumps(index))
    return packed


def _latent(data, folder):
    source = latents.LatentsSource(str(folder / "latents"))
    source._records.read = lambda index: data
    into_batch(source.__getitem__, arrays=source.arrays)


def _latents_index(data, folder):
    (folder / "latents" / latents.INDEX).write_bytes(data)
    source = latents.LatentsSource(str(folder / "latents"))
    into_batch(source.__getitem__, len(source), arrays=source.arrays)


def _latents_index_seeds(folder):
    _latents_seeds(folder)
    return [(folder / "latents" / latents.INDEX).read_bytes()]


def tar_of(members, layout=tarfile.USTAR_FORMAT) -> bytes:
    """members: (name or TarInfo, bytes)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=layout) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def link(name: str, kind: bytes, to: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def _tars(folder):
    sample = [("a.png", picture()), ("a.txt", b"red"), ("a.cls", b"3"), ("b.jpg", picture("JPEG"))]
    strange = [("/abs.png", picture()), ("../up.png", picture()), ("x/../../up.png", picture()), ("c.png", picture())]
    strange += [(link("soft.png", tarfile.SYMTYPE), b""), (link("hard.png", tarfile.LNKTYPE, "../../c.png"), b"")]
    strange += [("c.txt", b"x")]
    more = [("é/" * 60 + "d.webp", picture("WEBP")), ("é/" * 60 + "d.json", b'{"caption": "x", "label": 5}')]
    return [
        tar_of(sample),
        tar_of(strange),
        tar_of(more, tarfile.PAX_FORMAT),
        tar_of(sample + more, tarfile.GNU_FORMAT),
    ]


def _tar(data, folder):
    (folder / "x.tar").write_bytes(data)
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            source = open_source(f"webdataset:{folder}/x.tar", cache_dir=str(folder / "cache"))
        finally:
            for path in (folder / "cache" / "webdataset").glob("*"):
                path.unlink()
    for i in range(min(len(source), 8)):
        key = source.describe(i).partition(" sample ")[2]
        assert not key.startswith("/") and ".." not in key.split("/"), key
    into_batch(source.__getitem__, min(len(source), 8))


def _parquets(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    columns = {"image": [{"bytes": picture(), "path": "x"}] * 3, "caption": ["a", "é", None], "label": [1, None, 2]}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["x"]}}}}
    for options in ({}, {"compression": "none", "use_dictionary": False}):
        table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, folder / "seed.parquet", row_group_size=2, **options)
        found.append((folder / "seed.parquet").read_bytes())
    return found


def _parquet(data, folder):
    (folder / "x.parquet").write_bytes(data)
    source = open_source(f"parquet:{folder}/x.parquet")
    into_batch(source.__getitem__, min(len(source), 8))


_DESCRIBED = {"split": "test", "filepath": "val2014", "filename": "a.png", "sentences": [{"raw": "two"}, {"raw": "é"}]}


def _splits(folder):
    (folder / "val2014").mkdir(exist_ok=True)
    for place in ("a.png", "val2014/a.png"):
        (folder / place).write_bytes(picture())
    flat = {"split": "test", "filename": "a.png", "sentences": [{"raw": "a red circle"}] * 5, "imgid": 3}
    trees = [_DESCRIBED, flat, flat | {"split": "train"}], [flat] * 3, [_DESCRIBED | {"cocoid": 42}]
    return [json.dumps({"images": images, "dataset": "coco"}).encode() for images in trees]


def _split(data, folder):
    (folder / "x.json").write_bytes(data)
    for options in ("", "&each=caption&captions=1"):
        source = open_source(f"karpathy:{folder}/x.json?split=test{options}")
        into_batch(source.__getitem__, min(len(source), 8))


def _pictures(folder):
    kinds = [("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("PPM", "RGB")]
    kinds += [("BMP", "RGB"), ("GIF", "P"), ("TIFF", "RGB")]
    return [picture(*kind) for kind in kinds] + [picture("TIFF", compression="tiff_lzw")]


def _picture(data, folder):
    images.prepare(data, DATA)


def _configs(folder):
    return [
        json.dumps(config.dump(settings.Experiment(model=model()))).encode()
        for model in (settings.DDTTokenizer, settings.LinearTokenizer, settings.Multimodal, settings.VAE)
    ]


def _config(data, folder):
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return  # what a run stores is read by `saved_config`
    if isinstance(tree, dict):
        config.to_json(config.from_dict(tree))


def _overrides(folder):
    texts = ["optimizer.lr=1e-3", "model.heads=4", "evaluate.visible=(0.5, 1.0)", "mesh.fsdp=-1", "train.ema=0.9"]
    texts += ["data.background=[255, 255, 255]", "data.flip=true", "optimizer.name=adamw", "name=x"]
    return [text.encode() for text in texts]


def _override(data, folder):
    key, _, text = data.decode("utf-8", "surrogateescape").replace("\n", " ").partition("=")
    config.from_dict(config.override(config.dump(settings.Experiment()), ((key, text),)))


def _saved_config(data, folder):
    from ddt_jax.training.checkpoint import saved_config

    (folder / "config.json").write_bytes(data)
    config.from_dict(saved_config(folder))


ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int8), "c": np.zeros((), np.float16)}


def _safetensors_seeds(folder):
    safetensors_file.save(folder / "seed", ARRAYS, {"format": "pt"})
    return [(folder / "seed").read_bytes()]


def _whole(tree) -> None:
    """Touches every byte of what was read."""
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ():
        if isinstance(value, np.ndarray):
            value.tobytes()
        elif isinstance(value, dict | list | tuple) and value is not tree:
            with contextlib.suppress(RecursionError):  # a list may hold itself
                _whole(value)


def _safetensors(data, folder):
    (folder / "x").write_bytes(data)
    _whole(safetensors_file.load(folder / "x"))


def _torch_seeds(folder):
    torch_file.save(folder / "seed", ARRAYS | {"more": {"x": [1, 2.5, None, True, (2**40, "é")]}})
    tensor = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {"a": [1]}, [])]
    return [(folder / "seed").read_bytes(), b"".join(tensor)]


def _torch(data, folder):
    (folder / "x").write_bytes(data)
    _whole(torch_file.load(folder / "x"))


def _index_seeds(folder):
    weights_folder.save(folder / "weights", ARRAYS, file_bytes=8)
    return [(folder / "weights" / "model.safetensors.index.json").read_bytes()]


def _index(data, folder):
    (folder / "weights" / "model.safetensors.index.json").write_bytes(data)
    for lazy in weights_folder.load(folder / "weights").values():
        np.asarray(lazy)


_LLAMA = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_LLAMA |= {"intermediate_size": 128, "vocab_size": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_LLAMA |= {"rope_theta": 5e5, "max_position_embeddings": 128, "hidden_act": "silu", "model_type": "llama"}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"patch_size": 8, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "image_size": 32}
_VAE = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2, "act_fn": "silu"}
_VAE |= {"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}


def _foreign(*trees):
    return lambda folder: [json.dumps(tree).encode() for tree in trees]


def _reader(module, function):
    def parse(data, folder):
        import importlib

        (folder / "config.json").write_bytes(data)
        getattr(importlib.import_module(f"ddt_jax.interop.{module}"), function)(folder)

    return parse


def _text_seeds(folder):
    model = train_sentencepiece(["a red circle", "two blue squares"] * 4, 300)
    pieces = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    pieces |= {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    }
    pieces |= {"post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}}
    pieces["decoder"]["use_regex"] = True
    pieces["model"] = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    pieces["model"] |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    pieces["model"] |= {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    return [model.data, json.dumps(pieces).encode()]


def _text(data, folder):
    (folder / "tokenizer").write_bytes(data)
    text = open_text_tokenizer(folder / "tokenizer")
    text.decode(text.encode("a red circle\u2581é ab"))


def _checkpoint_seeds(name):
    def seeds(folder):
        import orbax.checkpoint as ocp

        from ddt_jax.training.checksum import checksums

        if not (folder / "step").exists():
            with ocp.StandardCheckpointer() as saver:
                saver.save((folder / "step" / "state").resolve(), ARRAYS)
            (folder / "step" / "meta").mkdir()
            meta = {"format": 1, "step": 1, "checksums": checksums(ARRAYS), "metrics": {"loss": 0.5}, "config": {}}
            (folder / "step" / "meta" / "metadata").write_text(json.dumps(meta))
            stored = Stored(folder / "step")
            stored.write_list(stored.hashes())
        return [(folder / "step" / name).read_bytes()]

    return seeds


def _checkpoint(name):
    def parse(data, folder):
        path, found = folder / "step" / name, []
        whole = path.read_bytes()
        path.write_bytes(data)
        try:
            for look in (Stored.meta, Stored.names, Stored.listed, Stored.file_problem, Stored.array_problems):
                try:
                    look(Stored(folder / "step"))
                except Damaged as error:
                    found.append(error)
        finally:
            path.write_bytes(whole)
        if found:
            raise found[0]

    return parse


def _log(data, folder):
    (folder / "metrics.jsonl").write_bytes(data)
    writer = JsonlWriter(folder)
    writer.truncate_after(2)
    writer.close()
    assert all(isinstance(record["step"], int | float) for record in read_metrics(folder / "metrics.jsonl"))


def _log_seeds(folder):
    return [b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": "nan", "eval/psnr": 20.5}\n{"step": 3, "lo']


TARGETS = {
    "record": Target(lambda folder: [array_record.pack(r) for r in RECORDS], _record),
    "array_record": Target(_archive_of_records, _record_file),
    "codes_record": Target(_codes_seeds, _codes_record),
    "codes_index": Target(_codes_index_seeds, _codes_index, text=True),
    "latent": Target(_latents_seeds, _latent),
    "latents_index": Target(_latents_index_seeds, _latents_index, text=True),
    "tar": Target(_tars, _tar),
    "parquet": Target(_parquets, _parquet),
    "karpathy": Target(_splits, _split, text=True),
    "picture": Target(_pictures, _picture),
    "config": Target(_configs, _config, text=True),
    "override": Target(_overrides, _override),
    "saved_config": Target(_configs, _saved_config),
    "safetensors": Target(_safetensors_seeds, _safetensors),
    "torch": Target(_torch_seeds, _torch),
    "weights_index": Target(_index_seeds, _index, text=True),
    "llama": Target(_foreign(_LLAMA, _LLAMA | {"rope_scaling": _LLAMA3}), _reader("llama", "read_settings"), text=True),
    "vision": Target(
        _foreign(_VISION | {"model_type": "clip_vision_model"}, {"model_type": "siglip", "vision_config": _VISION}),
        _reader("hf_vision", "read_settings"),
        text=True,
    ),
    "vae": Target(_foreign(_VAE), _reader("diffusers_vae", "read_sizes"), text=True),
    "text_tokenizer": Target(_text_seeds, _text),
    "checkpoint_meta": Target(_checkpoint_seeds("meta/metadata"), _checkpoint("meta/metadata"), text=True),
    "checkpoint_arrays": Target(_checkpoint_seeds("state/_METADATA"), _checkpoint("state/_METADATA"), text=True),
    "checkpoint_list": Target(_checkpoint_seeds("files.json"), _checkpoint("files.json"), text=True),
    "log": Target(_log_seeds, _log, text=False),
}
