"""Measurements of transformers on codes of scenes: the whole way of `make quickstart`, edits, spatial and SEED codes;
and of text beside images.

Each takes the options of the command line and a folder for its runs, and returns its part of the record. With
`--tokenizer WORKDIR` a tokenizer that was trained before stands in for the measurement's own; the record says which.
"""

import os
from pathlib import Path

import soak_runs as programs
from soak_gates import at_least, at_most, note, quiet

CODES = {"codes/train": ("scenes:train", 160_000), "codes/heldout": ("scenes:heldout", 2048)}
SEED_CODES = {"train_codes": CODES["codes/train"], "heldout_codes": CODES["codes/heldout"]}
EDITS = {"edits/train": ("scenes_edits:train", 80_000), "edits/heldout": ("scenes_edits:heldout", 2048)}
HELD_OUT = 0.1  # of the text
SPEECHES = 8  # that make a document


def whole_way(options, folder: Path) -> dict:
    """What `make quickstart` does: tokenizer, codes, transformer, pictures from captions and captions of pictures."""
    config = f"configs/llama_scenes.py:{folder}"
    seen, spoken, outcomes = _trained(options, folder, "configs/quickstart.py", CODES, config)
    gates = [
        at_least("pictures of captions, right count", spoken["t2i_count"], 0.95),
        at_least("pictures of captions, fully right", spoken["t2i_all_correct"], 0.45),
        at_least("captions of pictures, fully right", spoken["caption_all_correct"], 0.6),
        at_most("seconds in all", round(sum(o.seconds for o in outcomes), 1), 900),
        *quiet(outcomes),
    ]
    return _record(options, "configs/llama_scenes.py", seen, spoken, gates)


def edits(options, folder: Path) -> dict:
    """configs/llama_edits.py on the tokenizer of the quickstart. How good it is gets reported, not judged."""
    config = f"configs/llama_edits.py:{folder}"
    seen, spoken, outcomes = _trained(options, folder, "configs/quickstart.py", CODES | EDITS, config)
    gates = [at_least("edits asked for", spoken["edits"], 256), *_sound(spoken, outcomes)]
    return _record(options, "configs/llama_edits.py", seen, spoken, gates)


def spatial_codes(options, folder: Path) -> dict:
    """configs/llama_spatial_scenes.py. How good it is gets reported, not judged."""
    config = f"configs/llama_spatial_scenes.py:{folder}"
    seen, spoken, outcomes = _trained(options, folder, "configs/spatial_scenes.py", CODES, config)
    return _record(options, "configs/llama_spatial_scenes.py", seen, spoken, _sound(spoken, outcomes))


def seed_codes(options, folder: Path) -> dict:
    """configs/seed_llama_scenes.py, with the decoder that draws. How good it is gets reported, not judged."""
    seed, stages, outcomes = options.seeds[0], {}, []
    if options.tokenizer:
        (folder / "codes").symlink_to(options.tokenizer.resolve(), target_is_directory=True)
        stages["codes"] = {"digest": programs.digest(folder / "codes")}
    order = ("draw",) if options.tokenizer else ("align", "codes", "draw")
    begins_with = {"codes": "align", "draw": "codes"}
    for stage in order:
        before = begins_with.get(stage)
        also = (f"--config.init_from={folder / before}",) if before else ()
        config = f"configs/seed_scenes.py:{stage}"
        stages[stage], more = programs.train_and_evaluate(config, folder / stage, seed, options, also=also)
        outcomes += more
    outcomes += programs.codes_of(folder / "codes", folder, SEED_CODES)
    config = f"configs/seed_llama_scenes.py:{folder}"
    spoken, more = programs.train_and_evaluate(config, folder / "transformer", seed, options)
    outcomes += more
    return _record(options, "configs/seed_llama_scenes.py", stages, spoken, _sound(spoken, outcomes))


def text_beside_images(options, folder: Path) -> dict:
    """configs/text_beside_images.py: perplexity of real text that was learned alone, in as many updates as beside
    images, beside pixels, beside codes.

    --tokenizer: the folder of `make quickstart`, with its tokenizer and codes; without it there is no arm of codes.
    What images cost is reported, not judged.
    """
    _write_texts(folder / "text")
    arms = ("alone", "updates", "pixels", *(("codes",) if options.tokenizer else ()))
    for name in ("tokenizer", "codes") if options.tokenizer else ():
        (folder / name).symlink_to((options.tokenizer / name).resolve(), target_is_directory=True)
    runs, gates, made = {arm: {} for arm in arms}, [], ()
    for number in options.seeds:
        for arm in arms:
            note(f"{arm}, seed {number}")
            config, workdir = f"configs/text_beside_images.py:{arm}:{folder}", folder / f"{arm}_{number}"
            runs[arm][str(number)], outcomes = programs.train_and_evaluate(config, workdir, number, options, also=made)
            # The first run makes a text tokenizer of the text alone; all others read with it.
            made = made or (f"--config.sequences.text={workdir / 'text'}",)
            gates += [{"arm": arm, "seed": number, **check} for check in quiet(outcomes)]
    for arm in arms[2:]:
        of = {n: (r["plain_perplexity"], runs["updates"][n]["plain_perplexity"]) for n, r in runs[arm].items()}
        costs = ", ".join(f"{100 * (beside / alone - 1):+.2f}" for beside, alone in of.values())
        note(f"perplexity beside {arm}, percent more than alone in as many updates: {costs}")
    config = "configs/text_beside_images.py"
    return {"config": config, "seeds": options.seeds, "results": {"arms": runs}, "gates": gates}


def _write_texts(folder: Path) -> None:
    """The text file of the data folder as documents, the last of them held out."""
    import pyarrow as pa
    from pyarrow import parquet

    data = Path(os.environ.get("DDT_JAX_DATA", programs.ROOT.parent / "shared" / "data"))
    speeches = (data / "text" / "tinyshakespeare.txt").read_text().split("\n\n")
    texts = ["\n\n".join(speeches[i : i + SPEECHES]) for i in range(0, len(speeches), SPEECHES)]
    count = round(len(texts) * (1 - HELD_OUT))
    folder.mkdir()
    for name, part in {"train": texts[:count], "heldout": texts[count:]}.items():
        parquet.write_table(pa.table({"text": part}), folder / f"{name}.parquet")


def _trained(options, folder: Path, tokenizer_config: str, sources: dict, config: str):
    """Figures of a tokenizer (of a given one its digest) and of the transformer on its codes, and all outcomes."""
    seed, tokenizer = options.seeds[0], folder / "tokenizer"
    if options.tokenizer:
        tokenizer.symlink_to(options.tokenizer.resolve(), target_is_directory=True)
        seen, outcomes = {"digest": programs.digest(tokenizer)}, []
    else:
        without = ("--config.evaluate.probe_images=0",)
        seen, outcomes = programs.train_and_evaluate(tokenizer_config, tokenizer, seed, options, to_evaluate=without)
    outcomes += programs.codes_of(tokenizer, folder, sources)
    spoken, more = programs.train_and_evaluate(config, folder / "transformer", seed, options)
    return seen, spoken, outcomes + more


def _sound(spoken: dict, outcomes: list) -> list[dict]:
    return [at_least("captions and pictures asked for", spoken["prompts"], 256), *quiet(outcomes)]


def _record(options, config: str, seen: dict, spoken: dict, gates: list[dict]) -> dict:
    results = {"tokenizer": seen, "transformer": spoken}
    return {"config": config, "seeds": options.seeds[:1], "results": results, "gates": gates}
