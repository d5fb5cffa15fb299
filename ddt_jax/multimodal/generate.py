"""Generation of tokens: prompts of different lengths go through the model at once, then a loop runs on the device.

Prompts are moved to the right, so that the rows of a batch write the same slot of the cache in each step; what lies
in front of a prompt is seen by no row. A row's randomness is its seed's and the number of the token's alone, so a text
does not depend on the batch that it was made in.

Legend: B prompts, P longest prompt, N new tokens, V vocabulary, T slots of the cache.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.multimodal import backbone
from ddt_jax.multimodal.code_embedding import Places, Written
from ddt_jax.nn import spans


class Prompts(NamedTuple):
    """Attributes:
    ids_BP: int32, each row's prompt from its first column on.
    lengths_B: int32, 1..P.
    given_BP: int32, `Layout.given` of each prompt, whose positions see all of it; None: they see what stands before.
    """

    ids_BP: Any
    lengths_B: Any
    given_BP: Any = None


class Generated(NamedTuple):
    """Attributes:
    tokens_BN: int32; `pad` behind the end of a row.
    lengths_B: int32, how many tokens of each row count, a stop token included.
    """

    tokens_BN: Any
    lengths_B: Any


class Constraint(Protocol):
    """Which tokens may come next, by a state of each row that its tokens move. It is told the prompt's tokens too."""

    def start(self, batch: int) -> Any:
        """State before the first token; arrays with the batch in front."""

    def advance(self, state: Any, token_B) -> Any:
        """State behind a token."""

    def allowed(self, state: Any):
        """bool [B, V], at least one in each row."""


class WholeImages(NamedTuple):
    """Behind `begin` come exactly `codes` image codes and `end`, and codes and `end` come nowhere else.

    The state is how many codes the image has, -1 outside of one.
    """

    vocab_size: int
    begin: int
    end: int
    first_code: int
    num_codes: int
    codes: int

    def start(self, batch):
        return jnp.full((batch,), -1, jnp.int32)

    def advance(self, state, token_B):
        inside = jnp.where(token_B == self.end, -1, state + 1)
        return jnp.where(state >= 0, inside, jnp.where(token_B == self.begin, 0, -1))

    def allowed(self, state):
        ids_V = jnp.arange(self.vocab_size)
        is_code_V = (ids_V >= self.first_code) & (ids_V < self.first_code + self.num_codes)
        state = state[:, None]
        full = state >= self.codes
        return jnp.where(state < 0, ~is_code_V & (ids_V != self.end), jnp.where(full, ids_V == self.end, is_code_V))


def generate(
    c: settings.Transformer,
    params,
    prompts: Prompts,
    seeds_B,
    s: settings.Sampling,
    *,
    constraint: Constraint | None = None,
    stop: tuple[int, ...] = (),
    pad: int = 0,
    unconditional: Prompts | None = None,
    places: Places | None = None,
    left_B=None,
) -> Generated:
    """Tokens that follow the prompts. Pure: to be jitted with all but the arrays fixed, one compilation for a shape.

    Args:
      c, params: of `backbone.for_decoding`, so that the loop runs in place.
      seeds_B: int32.
      constraint: what may be drawn; everything without.
      stop: ids behind which a row ends.
      unconditional: B or 1 of them, for guidance; one row is computed once and shared.
      places: of the model.
      left_B: int32, tokens that each row may have, from 1 to s.tokens; None: s.tokens.
    """
    model = backbone.Backbone(c)
    guided = s.guidance != 1.0
    if guided and unconditional is None:
        raise ValueError("guidance needs an unconditional prompt")
    b = prompts.ids_BP.shape[0]
    if b == 1 and not guided:
        # XLA drops an axis of length one, and then its CPU loop copies the cache in every step: two rows are faster.
        twice = lambda x: None if x is None else jnp.repeat(jnp.asarray(x), 2, axis=0)  # noqa: E731
        how = {"constraint": constraint, "stop": stop, "pad": pad, "places": places, "left_B": twice(left_B)}
        found = generate(c, params, Prompts(*map(twice, prompts)), twice(seeds_B), s, **how)
        return Generated(*(x[:1] for x in found))
    width = max(prompts.ids_BP.shape[1], unconditional.ids_BP.shape[1] if guided else 0)

    def forward(ids_BS, positions_BS, visible, cache, given_BS=None, before: Written | None = None):
        """Logits behind the last ids, the cache, and what is written of their images.

        Args:
          given_BS: as in `Prompts`.
          before: what is written in front of ids [B, 1]; None: ids are whole prompts.
        """

        def run(m, ids_BS):
            x_BSD, written = m.embed(ids_BS), None
            if places is not None and before is not None:
                x_BSD, written = places.add_next(x_BSD, ids_BS, before)
            elif places is not None:
                places_BS = places.of(ids_BS)
                x_BSD, written = (
                    places.add(x_BSD, ids_BS, places_BS, given_BS),
                    places.written(ids_BS, places_BS, x_BSD.dtype),
                )
            h_BSD, new = m(x_BSD, positions_BS, visible, cache)
            more = None if places is None else places.ahead(h_BSD[:, -1], written.place_B)
            return m.logits(h_BSD[:, -1], more), new, written

        return model.apply({"params": params}, ids_BS, method=run)

    def prefill(prompts):
        ids, positions, given, start = _to_the_right(prompts, width)
        cache = backbone.empty_cache(c, ids.shape[0], width + s.tokens)
        visible = spans.causal(width, start=start) if given is None else spans.bidirectional(given, start=start)
        return forward(ids, positions, visible, cache, given), start

    (logits_BV, cache, written), start_B = prefill(prompts)
    if guided:
        other, other_start = prefill(unconditional)
        (logits_BV, cache, written), start_B = _beside(((logits_BV, cache, written), start_B), (other, other_start), b)

    keys_B = jax.vmap(jax.random.key)(jnp.asarray(seeds_B))

    def draw(logits_BV, n, allowed_BV):
        if guided:
            with_BV, without_BV = jnp.split(logits_BV, 2)
            logits_BV = without_BV + s.guidance * (with_BV - without_BV)
        if allowed_BV is not None:
            logits_BV = jnp.where(allowed_BV, logits_BV, -jnp.inf)
        return sample(logits_BV, jax.vmap(jax.random.fold_in, (0, None))(keys_B, n), s)

    def allowed(state):
        return None if constraint is None else constraint.allowed(state)

    def emit(n, token_B, state, done_B, tokens_BN):
        """What a drawn token changes; rows that are done stay so."""
        token_B = jnp.where(done_B, pad, token_B)
        tokens_BN = jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, n))
        if constraint is not None:
            state = constraint.advance(state, token_B)
        stopped_B = jnp.isin(token_B, jnp.array(stop, jnp.int32)) if stop else jnp.zeros_like(done_B)
        if left_B is not None:
            stopped_B |= n + 1 >= left_B
        return token_B, state, done_B, done_B | stopped_B, tokens_BN

    state = None if constraint is None else _after_prompts(constraint, prompts)
    token_B = draw(logits_BV, 0, allowed(state))
    blank = jnp.full((b, s.tokens), pad, jnp.int32)
    token_B, state, _, done_B, tokens_BN = emit(0, token_B, state, jnp.zeros((b,), bool), blank)

    def unfinished(carry):
        n, _, _, done_B, *_ = carry
        return (n < s.tokens) & ~jnp.all(done_B)

    def step(carry):
        n, token_B, state, done_B, counts_B, tokens_BN, cache, written = carry
        ids_B = jnp.concatenate([token_B, token_B]) if guided else token_B
        slot = cache.length
        visible = spans.causal(1, offset=slot, start=start_B)
        logits_BV, cache, written = forward(ids_B[:, None], (slot - start_B)[:, None], visible, cache, before=written)
        token_B = draw(logits_BV, n, allowed(state))
        token_B, state, before_B, done_B, tokens_BN = emit(n, token_B, state, done_B, tokens_BN)
        return n + 1, token_B, state, done_B, counts_B + ~before_B, tokens_BN, cache, written

    first = (jnp.int32(1), token_B, state, done_B, jnp.ones((b,), jnp.int32), tokens_BN, cache, written)
    _, _, _, _, counts_B, tokens_BN, *_ = jax.lax.while_loop(unfinished, step, first)
    return Generated(tokens_BN, counts_B)


def _to_the_right(prompts, width):
    """Prompts that end in the last of `width` columns: ids, positions, `given` and where each begins."""
    start_B = width - jnp.asarray(prompts.lengths_B)
    column_BW = jnp.arange(width, dtype=jnp.int32) - start_B[:, None]
    from_BW = jnp.clip(column_BW, 0, prompts.ids_BP.shape[1] - 1)
    moved = lambda x_BP: jnp.take_along_axis(jnp.asarray(x_BP), from_BW, axis=1)  # noqa: E731
    given_BW = None
    if prompts.given_BP is not None:
        given_BW = moved(prompts.given_BP)
        given_BW = jnp.where((column_BW >= 0) & (given_BW > 0), given_BW + start_B[:, None], 0)
    return moved(prompts.ids_BP), jnp.maximum(column_BW, 0), given_BW, start_B


def _beside(conditional, unconditional, batch):
    """Prefilled rows behind one another; one unconditional row is repeated. `length` is the same in both."""

    def one(a, b):
        return a if jnp.ndim(a) == 0 else jnp.concatenate([a, jnp.broadcast_to(b, (batch, *b.shape[1:]))])

    return jax.tree.map(one, conditional, unconditional)


def _after_prompts(constraint, prompts):
    lengths_B = prompts.lengths_B

    def one(state, column):
        n, token_B = column
        moved = constraint.advance(state, token_B)
        keep = lambda new, old: jnp.where((n < lengths_B).reshape(-1, *[1] * (new.ndim - 1)), new, old)  # noqa: E731
        return jax.tree.map(keep, moved, state), None

    batch, length = prompts.ids_BP.shape
    return jax.lax.scan(one, constraint.start(batch), (jnp.arange(length), jnp.asarray(prompts.ids_BP).T))[0]


def sample(logits_BV, keys_B, s: settings.Sampling):
    """One id of each row, int32 [B]. A logit of -inf is never drawn."""
    if s.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / s.temperature
    if s.top_k:
        weakest_B1 = jax.lax.top_k(logits_BV, min(s.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= weakest_B1, logits_BV, -jnp.inf)
    if s.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        share_BV = jax.nn.softmax(sorted_BV)
        needed_BV = jnp.cumsum(share_BV, axis=-1) - share_BV < s.top_p  # less than p lies in front
        weakest_B1 = jnp.min(sorted_BV, axis=-1, keepdims=True, where=needed_BV, initial=jnp.inf)
        logits_BV = jnp.where(logits_BV >= weakest_B1, logits_BV, -jnp.inf)
    if s.min_p > 0:
        weakest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(s.min_p)
        logits_BV = jnp.where(logits_BV >= weakest_B1, logits_BV, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
