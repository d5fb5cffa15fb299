"""The console program `ddt-jax VERB`. It reads arguments and calls `experiment` or `judging`; nothing heavy is
imported before a verb needs it.

Exit codes: 0 done; 1 a bug of ours (with a traceback); 2 something the user can mend (one line); 3 a checkpoint is
damaged, or a step that was replayed gives other numbers; 75 the run was asked to stop, has saved, and goes on with the
same command; 76 what the run needs is away (another process of it, its data, its storage), and all of its processes go
on with the same command; 77 the same, after train.silence_limit seconds without a sign of life.
"""

import argparse
import functools
import os
import sys
import traceback

from ddt_jax import cli_checkpoints, cli_scaling, host_memory, hosts, peers
from ddt_jax.errors import Away, UserError

EXIT_BUG, EXIT_USER = 1, 2

_CONFIG_HELP = "config file, FILE.py or FILE.py:VARIANT; change single settings with --config.NAME.NAME=VALUE"
_WORKDIR_HELP = "directory of the run: its config, log, checkpoints and results"
# What `import` and `export` can do; exchange.IMPORTS and EXPORTS do it.
_IMPORTS = {
    "selftok": "a published Selftok tokenizer, .pth",
    "acdit": "a published ACDiT, .pt",
    "sd3": "SD3-medium, .safetensors or diffusers' folder, for the image stream of a new run with model.kind='selftok'",
    "llama": "a LLaMA, Hugging Face's folder with config.json; makes no run but weights that a run starts from",
}
_EXPORTS = {
    "selftok": "the layout of the published Selftok tokenizers, one .pth; the codec is not part of it",
    "acdit": "the layout of the published ACDiTs, one .pt",
    "vae": "of a run that trains an autoencoder: diffusers' folder, its latents' scale measured",
    "torch": "a folder for PyTorch users: weights with the codec, config, and one Python file that needs PyTorch only",
    "llama": "Hugging Face's folder, of imported weights or of a multimodal run",
    "qformer": "of a SEED run: its Q-Former in the names of transformers' BLIP-2",
    "seed-qformer": "the same in the names of SEED's checkpoints",
    "embeddings": "of a SEED run that learned CLIP's features: what Stable Diffusion draws from, of --codes",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ddt-jax", description="Train and evaluate image tokenizers and multimodal transformers."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name, text, *, config=False, workdir=False, report=False, processes=False, more=""):
        p = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}".strip())
        if config:
            p.add_argument("--config", required=True, metavar="FILE", help=_CONFIG_HELP)
        if workdir:
            p.add_argument("--workdir", required=True, metavar="DIR", help=_WORKDIR_HELP)
        if report:
            p.add_argument("--json", metavar="PATH", help="also write the report to this file, as JSON")
        if processes:
            hosts.add_arguments(p)
        return p

    p = verb(
        "train",
        "train a model, or go on with the run in --workdir",
        config=True,
        workdir=True,
        report=True,
        processes=True,
        more="Ctrl-C or SIGTERM saves and exits with code 75; the same command goes on. A finished run is left alone.",
    )
    p.add_argument("--force", action="store_true", help="go on with a run although decisive settings differ")
    verb(
        "evaluate",
        "evaluate the newest checkpoint on held-out images, or held-out sequences",
        workdir=True,
        report=True,
        processes=True,
        more="Writes results.json, results.md and pictures to the workdir, and says what it leaves out. "
        "--config.evaluate.NAME=VALUE changes how: docs/evaluation.md.",
    )
    p = verb(
        "compare",
        "put the results of evaluated runs side by side",
        report=True,
        more="Prints a Markdown table of what `evaluate` found, and draws PSNR by tokens of all runs.",
    )
    p.add_argument("workdirs", nargs="+", metavar="DIR", help="workdirs of evaluated runs")
    p.add_argument("--out", metavar="PNG", default="compare.png", help="where the picture goes (default: compare.png)")
    p = verb(
        "reconstruct",
        "encode images to codes and decode them again, with growing numbers of tokens",
        workdir=True,
        report=True,
        more="Writes a picture, and prints the codes.",
    )
    p.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files; they are cropped and resized as in training"
    )
    p.add_argument("--out", metavar="PNG", help="where the picture goes (default: WORKDIR/reconstruct.png)")
    p = verb(
        "generate",
        "draw prompts, describe and change pictures with a trained transformer; draw classes with a model that draws",
        workdir=True,
        report=True,
        more="Codes need their tokenizer: sequences.tokenizer of the run, or --config.sequences.tokenizer=DIR. How "
        "tokens are drawn: --config.evaluate.text_to_image.NAME=VALUE (guidance, temperature, top_k, top_p, min_p), "
        "image_to_text for texts; how images are denoised: its guidance, and --config.model.image.diffusion.NAME=VALUE "
        "(solver, solver_steps). The same seed gives the same picture: --config.evaluate.seed=N.",
    )
    p.add_argument(
        "--class", action="append", default=[], metavar="CLASS", dest="classes", help="draw this class: name or number"
    )
    p.add_argument(
        "--frames", type=int, default=0, metavar="N", help="of clips that are drawn (as many as were learned)"
    )
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="draw this; can be repeated")
    p.add_argument("--prompts", default="", metavar="FILE", help="draw these: one on a line, or a benchmark's own file")
    p.add_argument(
        "--caption", action="extend", nargs="+", default=[], metavar="IMAGE", help="describe this picture, or these"
    )
    p.add_argument(
        "--ask",
        action="append",
        default=[],
        nargs=2,
        metavar=("IMAGE", "QUESTION"),
        help="answer a question about a picture, of a run that has learned to",
    )
    p.add_argument("--edit", action="append", default=[], nargs=2, metavar=("IMAGE", "TEXT"), help="change a picture")
    p.add_argument(
        "--continue",
        action="append",
        default=[],
        metavar="TEXT",
        dest="go_on",
        help="go on with this in text and pictures",
    )
    p.add_argument("--force-image", action="store_true", help="go on with a picture first")
    p.add_argument("--samples", type=int, default=1, metavar="N", help="answers to each text (default: 1)")
    p.add_argument("--out", default="", metavar="PNG", help="where the pictures go (default: WORKDIR/generated.png)")
    p = verb(
        "data",
        "look at a data source: how many images, what a few of them are, how fast they load",
        config=True,
        report=True,
        more="Writes a grid of examples as the model will see them.",
    )
    p.add_argument("--split", choices=("train", "eval"), default="train", help="data.source or data.eval_source")
    p.add_argument("--count", type=int, default=32, metavar="N", help="examples in the grid (default: 32)")
    p.add_argument("--out", metavar="PNG", default="data.png", help="where the grid goes (default: data.png)")
    p = verb(
        "latents",
        "keep what the codec makes of every image of a source, to train on that instead of the images",
        config=True,
        report=True,
        more="Then train with data.source, or a transformer's source of pictures, latents:DIR. Ctrl-C exits with code "
        "75; the same command goes on.",
    )
    p.add_argument("--to", required=True, dest="folder", metavar="DIR", help="folder for the shards")
    p.add_argument(
        "--source", default="", metavar="SPEC", help="the images (default: data.source, or the only pictures)"
    )
    p.add_argument("--per-shard", type=int, default=4096, metavar="N", help="images in a shard (default: 4096)")
    p = verb(
        "tokenize",
        "write the images of a source as codes of a trained tokenizer, with their captions",
        workdir=True,
        report=True,
        more="An interrupted one goes on with the same command; shards that are whole are kept. "
        "--config.data.NAME=VALUE changes how images are read.",
    )
    p.add_argument("--to", required=True, metavar="DIR", help="folder of the codes; a local one")
    p.add_argument("--source", default="", metavar="SPEC", help="the images (default: the run's data.source)")
    p.add_argument("--order", default="", help="coarse_to_fine or fine_to_coarse (default: the tokenizer's own)")
    p.add_argument("--records", type=int, default=0, metavar="N", help="only the first N of the source")
    p.add_argument("--shard-records", type=int, default=8192, metavar="N", help="records of a shard (8192)")
    p.add_argument("--batch-size", type=int, default=0, metavar="N", help="images at once (evaluate.batch_size)")
    p.add_argument("--text", default="", metavar="FILE", help="text tokenizer: also store how long captions are in it")
    p.add_argument(
        "--part", default="0/1", metavar="I/N", help="make only every Nth shard from I on: N processes share the work"
    )
    verb("config", "print the resolved settings of a config", config=True, report=True)
    cli_checkpoints.add_verbs(verb, _choices)
    p = verb(
        "import",
        "make a run, or weights to start one from, out of a published checkpoint",
        workdir=True,
        report=True,
        more="The workdir gets a config and a checkpoint at step 0, for evaluate, reconstruct, export and train. "
        "The published Selftok tokenizers work on latents of SD3's autoencoder, ACDiTs on Stable Diffusion's, which "
        "are not in their files: --config.model.codec.weights=FILE.safetensors. Of a LLaMA, which brings its settings "
        "along, the workdir gets weights only.",
    )
    p.add_argument("kind", choices=_IMPORTS, help=_choices(_IMPORTS))
    p.add_argument("--from", required=True, dest="file", metavar="PATH", help="what to read")
    p.add_argument(
        "--config",
        metavar="FILE",
        help=f"{_CONFIG_HELP} (default for selftok: the released model with 512 tokens at 256 px, without an average; "
        "for acdit: H for images)",
    )
    p.add_argument(
        "--vocab-size",
        type=int,
        default=0,
        metavar="N",
        help="llama: a vocabulary of N, the new rows drawn from the distribution of the others (default: its own)",
    )
    p = verb(
        "export",
        "write the newest checkpoint for other programs",
        workdir=True,
        report=True,
        more="Of a run that keeps a weight average it is the average that is written, as it is what evaluate measures.",
    )
    p.add_argument("kind", choices=_EXPORTS, help=_choices(_EXPORTS))
    p.add_argument("--to", required=True, dest="file", metavar="PATH", help="what to write")
    p.add_argument("--codes", default="", metavar="PATH", help="embeddings: folder of tokenize, or generate's --json")
    cli_scaling.add_verbs(verb)
    return parser


def _choices(texts: dict[str, str]) -> str:
    return "; ".join(f"{name}: {text}" for name, text in texts.items())


def _arguments(argv):
    """Arguments of the verb, and the --config.a.b=value pairs among them."""
    overrides, rest = [], []
    for text in argv:
        if text.startswith("--config."):
            key, equals, value = text[len("--config.") :].partition("=")
            if not equals:
                raise UserError(f"{text} needs a value: {text}=VALUE")
            overrides.append((key, value))
        else:
            rest.append(text)
    return _parser().parse_args(rest), tuple(overrides)


def _report(args, result: dict, text: str) -> None:
    if args.json:
        import json

        from etils import epath

        try:
            epath.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
            epath.Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--json: cannot write {args.json}: {error.strerror or error}") from error
    print(text)


def _train(args, overrides) -> int:
    from ddt_jax import config, experiment
    from ddt_jax.training.loop import EXIT_STOPPED

    s = config.load(args.config, overrides)
    hosts.join(args.coordinator, args.num_processes, args.process_id, args.join_timeout, args.peer_timeout)
    result = experiment.train(s, args.workdir, force=args.force)
    if result["finished"]:
        _report(args, result, f"finished at step {result['step']:,}: {args.workdir}")
        return 0
    _report(
        args, result, f"stopped and saved at step {result['step']:,} of {s.train.steps:,}; the same command goes on"
    )
    return EXIT_STOPPED


def _evaluate(args, overrides) -> int:
    from ddt_jax import judging

    hosts.join(args.coordinator, args.num_processes, args.process_id, args.join_timeout, args.peer_timeout)
    result = judging.evaluate(args.workdir, overrides)
    _report(args, result["results"], "\n".join([result["table"], "written:", *(f"  {p}" for p in result["written"])]))
    return 0


def _compare(args, overrides) -> int:
    from ddt_jax import judging

    if overrides:
        raise UserError(f"--config.{overrides[0][0]}: compare reads results as they are and takes no settings")
    result = judging.compare(args.workdirs, args.out)
    _report(args, result["runs"], f"{result['table']}\nwritten: {result['written']}")
    return 0


def _reconstruct(args, overrides) -> int:
    from ddt_jax import judging

    result = judging.reconstruct(args.workdir, args.images, args.out, overrides)
    lines = [f"{name}: {' '.join(map(str, codes))}" for name, codes in result["codes"].items()]
    _report(args, result, "\n".join([*lines, f"written: {result['written']}"]))
    return 0


def _tokenize(args, overrides) -> int:
    from ddt_jax import tokenize
    from ddt_jax.training.loop import EXIT_STOPPED

    try:
        index, count = map(int, args.part.split("/"))
    except ValueError:
        raise UserError(f"--part {args.part} is not I/N, such as 0/4") from None
    result = tokenize.tokenize(
        args.workdir,
        args.to,
        source=args.source,
        order=args.order,
        records=args.records,
        shard_records=args.shard_records,
        batch_size=args.batch_size,
        text=args.text,
        part=(index, count),
        overrides=overrides,
    )
    if result["stopped"]:
        _report(args, result, f"stopped after {result['made']:,} shards, which are kept; the same command goes on")
        return EXIT_STOPPED
    state = "complete" if result["complete"] else "other parts are still missing"
    text = f"{result['records']:,} records in {result['shards']:,} shards ({state}), {result['bad']:,} left out"
    _report(args, result, f"{text}, tokenizer {result['tokenizer'][:8]}…, {result['order']}: {result['written']}")
    return 0


def _generate(args, overrides) -> int:
    from ddt_jax import drawings, generating

    if drawings.draws(args.workdir):
        if any([args.prompts, args.caption, args.ask, args.edit, args.go_on, args.force_image]):
            raise UserError(f"generate: {args.workdir} only draws; give --class or --prompt, or neither")
        how = {
            "classes": args.classes,
            "prompts": args.prompt,
            "samples": args.samples,
            "frames": args.frames,
            "out": args.out,
        }
        result = drawings.generate(args.workdir, overrides=overrides, **how)
        _report(args, result, "\n".join(f"written: {path}" for path in result["written"]))
        return 0
    if args.classes or args.frames:
        raise UserError(f"generate: {args.workdir} is told texts, not --class and --frames; give --prompt TEXT")
    result = generating.generate(
        args.workdir,
        prompt=args.prompt,
        prompts_file=args.prompts,
        caption=args.caption,
        ask=args.ask,
        edit=args.edit,
        go_on=args.go_on,
        force_image=args.force_image,
        samples=args.samples,
        out=args.out,
        overrides=overrides,
    )
    lines = [f"{file}: {text}" for file, text in result["captions"].items()]
    lines += [f"{a['image']}: {a['question']} {a['answer']}" for a in result["answers"]]
    lines += [" ".join(p if isinstance(p, str) else f"[picture {p}]" for p in parts) for parts in result["told"]]
    lines += [f"{result['no_image']} of {len(result['drawn'])} answers are no image"] if result["no_image"] else []
    lines += [f"written: {result['written']}"] if result["written"] else []
    _report(args, result, "\n".join(lines))
    return 0


def _data(args, overrides) -> int:
    from ddt_jax import config, looking

    result = looking.look_at_data(config.load(args.config, overrides), args.split, args.count, args.out)
    _report(args, result, "\n".join(f"{k}: {v}" for k, v in result.items()))
    return 0


def _latents(args, overrides) -> int:
    from ddt_jax import config, experiment
    from ddt_jax.training.loop import EXIT_STOPPED

    if args.per_shard < 1:
        raise UserError(f"--per-shard must be at least 1, got {args.per_shard}")
    s = config.load(args.config, overrides)
    try:
        result = experiment.write_latents(s, args.folder, args.source, per_shard=args.per_shard)
    except KeyboardInterrupt:
        print("ddt-jax: stopped; shards that are whole stay, and the same command goes on", file=sys.stderr)
        return EXIT_STOPPED
    text = f"{result['records']:,} latents of {result['images']:,} images in {result['shards']} shards: {args.folder}"
    _report(args, result, text)
    return 0


def _config(args, overrides) -> int:
    from ddt_jax import config

    s = config.load(args.config, overrides)
    _report(args, config.dump(s), config.to_json(s).rstrip())
    return 0


def _import(args, overrides) -> int:
    from ddt_jax import config, exchange

    if args.kind in exchange.WEIGHT_IMPORTS:
        if args.config or overrides:
            raise UserError(f"import {args.kind}: takes no --config, its settings are in --from; leave it out")
        result = exchange.WEIGHT_IMPORTS[args.kind](args.file, args.workdir, args.vocab_size)
    else:
        kind = exchange.IMPORTS[args.kind]
        if args.vocab_size:
            raise UserError(f"import {args.kind}: takes no --vocab-size, only llama does; leave it out")
        if not args.config and not kind.default:
            raise UserError(f"import {args.kind}: needs --config FILE, the config of the run to make")
        s = config.load(args.config, overrides) if args.config else kind.default(overrides)
        result = kind.run(s, args.file, args.workdir)
    _report(args, result, result.pop("summary"))
    return 0


def _export(args, overrides) -> int:
    from ddt_jax import exchange

    if overrides:
        raise UserError(f"--config.{overrides[0][0]}: export writes what the run has and takes no settings")
    result = exchange.export(args.kind, args.workdir, args.file, args.codes)
    _report(args, result, result.pop("summary"))
    return 0


_VERBS = {
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "reconstruct": _reconstruct,
    "tokenize": _tokenize,
    "generate": _generate,
    "data": _data,
    "latents": _latents,
    "config": _config,
    "checkpoint": lambda args, overrides: cli_checkpoints.checkpoint(args, overrides, _report),
    "replay": lambda args, overrides: cli_checkpoints.replay(args, overrides, _report),
    "import": _import,
    "export": _export,
    **{name: functools.partial(run, report=_report) for name, run in cli_scaling.VERBS.items()},
}


def _left(code: int) -> int:
    """The code; does not come back in one of several processes, whose usual way out waits for the others."""
    if peers.has_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    # C++ libraries below us log what is no news to a user; a value set outside wins.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    try:
        args, overrides = _arguments(sys.argv[1:] if argv is None else argv)
        if args.verb in ("train", "evaluate"):  # which write to their workdir: a restart compiles nothing again
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{args.workdir}/compiled")
        return _VERBS[args.verb](args, overrides)
    except UserError as error:
        print(f"ddt-jax: {error}", file=sys.stderr)
        return _left(peers.EXIT_ALONE if isinstance(error, Away) else EXIT_USER)
    except BrokenPipeError:  # the reader of our output went away, as in `ddt-jax config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if peers.is_lost(error):
            peers.end_alone(error)
        if not peers.has_joined():
            raise
        traceback.print_exc()
        return _left(EXIT_BUG)
    except KeyboardInterrupt:
        print("ddt-jax: interrupted before there was anything to save", file=sys.stderr)
        return _left(130)


def console() -> int:
    """The program: `main` in a process that may be started anew for its memory."""
    host_memory.use_huge_pages()
    return main()


if __name__ == "__main__":
    sys.exit(console())
