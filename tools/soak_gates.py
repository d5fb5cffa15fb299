"""Gates of a measurement: a figure, its limit, and whether it holds."""

from soak_runs import Outcome


def note(text: str) -> None:
    print(f"soak: {text}", flush=True)


def gate(name: str, value, limit, ok: bool) -> dict:
    note(f"{'ok    ' if ok else 'MISSED'} {name}: {value} (limit {limit})")
    return {"gate": name, "value": value, "limit": limit, "passed": bool(ok)}


def at_least(name, value, limit):
    return gate(name, value, f">= {limit}", value is not None and value >= limit)


def at_most(name, value, limit):
    return gate(name, value, f"<= {limit}", value is not None and value <= limit)


def ladder(results: dict) -> list[float]:
    """PSNR by number of tokens shown, fewest first."""
    by_tokens = results["psnr_by_tokens"]
    return [by_tokens[k] for k in sorted(by_tokens, key=int)]


def tokens_carry_the_image(results: dict) -> list[dict]:
    """The gates that every trained tokenizer has to pass."""
    steps = [b - a for a, b in zip(ladder(results), ladder(results)[1:], strict=False)]
    return [
        at_least("images evaluated", results["n"], 1000),
        gate("smallest rise of PSNR with tokens", round(min(steps), 3), "> 0", min(steps) > 0),
        at_least("PSNR lost by shuffling codes", results["psnr_drop_shuffled"], 3.0),
    ]


def quiet(outcomes: list[Outcome]) -> list[dict]:
    return [
        at_most("warnings and tracebacks", sum(len(o.complaints) for o in outcomes), 0),
        at_most("processes left over", sum(o.leftover for o in outcomes), 0),
    ]
