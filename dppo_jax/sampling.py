"""The decode engine: prompts in, completions out, inside a compiled program.

A prompt is prefilled once for the G completions drawn from it; a loop of
`decoding` draws the rest of the B = N * G completions. What the behaviour
policy must remember (log-prob, record) is taken from the very logits that were
sampled. N prompts, P prompt tokens, C completion tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import decoding
from dppo_jax import divergences
from dppo_jax import halvings
from dppo_jax.models import attention
from dppo_jax.models import experts
from dppo_jax.models import products as products_lib
from dppo_jax.models import quantization
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import PyTree

# Of a row of logits. A power of two, so that a vocabulary that is split over
# devices is split between blocks.
_MAX_BLOCKS = 128


class Completions(NamedTuple):
  """What was sampled, [B, C] unless said otherwise."""

  tokens: jax.Array  # int32, padded after the end token.
  mask: jax.Array  # bool, True up to and including the end token.
  logprobs: jax.Array  # float32, of the distribution that was sampled.
  record: PyTree  # [B, C, ...]
  truncated: jax.Array  # [B] bool, no end token within C.
  num_steps: jax.Array  # [] int32, calls of the model, prefill included.
  # Experts of the tokens that were read: prompts [N, P, L, k] and completions
  # [B, C - 1, L, k]; () unless recorded.
  routing: PyTree = ()
  # What kernels made of the tokens that were read, [L, E, F] each; and where in
  # it, of prompts [N, P] and completions [B, C - 1] int32. () unless kept.
  products: PyTree = ()
  entries: PyTree = ()


def process_logits(
    logits: jax.Array,
    *,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
) -> jax.Array:
  """Logits of the distribution that is really sampled.

  The sampler and the learner both call this one function, so the log-probs of
  both belong to the same family of distributions.

  Args:
    logits: [..., V].
    temperature: 0 is greedy: all mass on the first largest logit.
    top_p: keep the smallest set of most likely tokens with this mass.
    top_k: keep that many most likely tokens, and all that equal the last of
      them; 0 keeps all.

  Returns:
    [..., V] float32, -inf on tokens that cannot be sampled.
  """
  logits = logits.astype(jnp.float32)
  if temperature == 0:
    best = jnp.argmax(logits, axis=-1)
    chosen = jax.nn.one_hot(best, logits.shape[-1], dtype=bool)
    # 0, or NaN where the largest is not finite: not a certain token.
    return jnp.where(chosen, logits - logits, -jnp.inf)
  logits = logits / temperature
  if top_k:
    smallest = jax.lax.top_k(logits, top_k)[0][..., -1:]
    logits = jnp.where(logits >= smallest, logits, -jnp.inf)
  if top_p < 1:
    ordered = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    # The first token is always kept; the last kept one crosses top_p.
    smallest = jnp.min(
        jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True
    )
    logits = jnp.where(logits >= smallest, logits, -jnp.inf)
  return logits


def categorical(keys: jax.Array, logits: jax.Array) -> jax.Array:
  """A token of each row by its own key, by the softmax of `logits`. [B] int32.

  A block of tokens is drawn by the sum of its probabilities, then a token of
  that block, both by the largest logit plus Gumbel noise. That is exact but for
  the noise's 23 bits, by which what is below 1e-7 comes too rarely: the total
  variation is 6e-8 (k + V / k) at most, 8e-5 for 128 blocks of 1187 tokens. It
  needs k + V / k random numbers a row for k blocks: V of them cost more than
  all else that a draw does.

  Args:
    keys: [B].
    logits: [B, V] float32, -inf on what cannot be drawn.
  """
  size = logits.shape[-1]
  count = max(x for x in range(1, _MAX_BLOCKS + 1) if not size % x)
  blocks = logits.reshape(-1, count, size // count)
  largest = jnp.max(blocks, axis=(1, 2), keepdims=True)
  masses = jnp.sum(jnp.exp(blocks - largest), axis=-1)
  # Of a key each: parts of one array would be split over a mesh as that is,
  # and exchanged for each token.
  of_blocks, of_tokens = jnp.unstack(jax.vmap(jax.random.split)(keys), axis=1)
  drawn = _gumbel_max(of_blocks, jnp.log(masses))
  block = jnp.take_along_axis(
      blocks, drawn[:, None, None], axis=1, mode='promise_in_bounds'
  )[:, 0]
  return drawn * (size // count) + _gumbel_max(of_tokens, block)


def _gumbel_max(keys: jax.Array, logits: jax.Array) -> jax.Array:
  """`jax.random.categorical` of each row with its own key."""
  return jax.vmap(jax.random.categorical)(keys, logits)


def row_keys(key: jax.Array, num_rows: int) -> jax.Array:
  """One key per row, so its tokens do not depend on its batch mates. [B]."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
      key, jnp.arange(num_rows)
  )


def make_sampler(
    model: CausalLM,
    *,
    group_size: int,
    max_completion_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
    record: Callable[[jax.Array, jax.Array], PyTree] = lambda *_: (),
    dtype: Any = None,
    weights_dtype: Any = None,
    cache_dtype: Any = None,
    num_slots: int = 0,
    num_halvings: int = 0,
    halving_steps: int = 1,
    num_stages: int = 1,
    record_routing: bool = False,
) -> Callable[..., Completions]:
  """A function that samples G completions of each prompt.

  Args:
    model: the architecture.
    group_size: G, completions per prompt.
    max_completion_length: C.
    eos_ids: tokens that end a completion; they count as sampled.
    pad_id: what follows the end.
    temperature: see `process_logits`.
    top_p: see `process_logits`.
    top_k: see `process_logits`.
    record: what to remember of each position, from [B, V] logits and [B]
      tokens.
    dtype: of the computation; the model's if not given.
    weights_dtype: in which a layer's kernels are kept, `dtype` if not given;
      int8 and float8 with a scale for each output.
    cache_dtype: in which keys and values are kept, `dtype` if not given; int8
      and float8 with a scale for each token and head.
    num_slots: completions that are decoded at a time, see `decoding`; 0 or B
      for all of them.
    num_halvings: how often slots are halved as the last completions end, see
      `halvings.sizes`.
    halving_steps: to each half, likewise.
    num_stages: 1 to C, loops that all completions at once are decoded in, with
      a cache that grows from one to the next, see `decoding.together`.
    record_routing: whether to remember the experts of every token.

  Returns:
    `sample(params, prompts, keys [B], products)`, a pure function. Rows are
    grouped by prompt. With `products`, a buffer with `decoding.num_entries`
    entries, what kernels make is written over what was there.
  """
  dtype = jnp.dtype(dtype or model.dtype)
  weights_dtype = jnp.dtype(weights_dtype or dtype)
  cache_dtype = jnp.dtype(cache_dtype or dtype)
  # Nothing is kept for a backward pass.
  model = model.replace(dtype=dtype, remat='none', unrolls_layers=False)
  limits = {'length': max_completion_length, 'pad_id': pad_id}
  routing = experts.Routing(record=record_routing)
  draw = _make_draw(temperature, top_p, top_k, record, eos_ids)

  def sample(params, prompts, keys, products=()):
    # Cast and unstack once, not once a token.
    params = quantization.convert_kernels(params, dtype, weights_dtype)
    logits, prompt = model.prefill(
        quantization.widen(params, dtype), prompts.tokens, mask=prompts.mask,
        keep_products=bool(products), routing=routing,
    )
    entries = ()
    if products:
      products, entries = products_lib.begin(products, prompt.products)
    prompt = prompt._replace(cache=[
        attention.convert_cache(x, cache_dtype) for x in prompt.cache
    ])
    first, ended = draw(jnp.repeat(logits, group_size, axis=0), keys, 0)
    num_positions = prompts.tokens.shape[1] + max_completion_length
    start = decoding.Start(
        model.unstacked(params), model.rotations(num_positions), prompts,
        prompt, routing, keys, first, ended, cache_dtype, products,
    )
    num_rows = keys.shape[0]
    if 0 < num_slots < num_rows or num_halvings:
      sizes = halvings.sizes(num_slots or num_rows, num_halvings, halving_steps)
      drawn = decoding.in_slots(model, draw, start, sizes=sizes, **limits)
    else:
      drawn = decoding.together(
          model, draw, start, num_stages=num_stages, **limits
      )
    completions = _complete(drawn, eos_ids)
    read = drawn.read
    if record_routing:
      routing_of = prompt.routed.choices, read.choices
      completions = completions._replace(routing=routing_of)
    if products:
      completions = completions._replace(
          products=drawn.products.products, entries=(entries, read.entries)
      )
    return completions

  return sample


def _complete(drawn, eos_ids):
  """The outputs of a loop."""
  tokens, mask, logprobs, recorded = drawn.outputs
  ended = jnp.isin(tokens, jnp.asarray(eos_ids)) & mask
  return Completions(
      tokens=tokens,
      mask=mask,
      logprobs=logprobs,
      record=recorded,
      truncated=~jnp.any(ended, axis=-1),
      num_steps=drawn.num_steps,
  )


def _make_draw(temperature, top_p, top_k, record, eos_ids):
  """The `decoding.DrawFn` of a sampler."""

  def draw(logits, keys, index):
    """Token number `index` of every row, and whether it ends the row."""
    logits = process_logits(
        logits, temperature=temperature, top_p=top_p, top_k=top_k
    )
    index = jnp.broadcast_to(index, keys.shape)
    keys = jax.vmap(jax.random.fold_in)(keys, index)
    tokens = categorical(keys, logits)
    return decoding.Column(
        tokens,
        jnp.ones(tokens.shape, bool),
        divergences.token_logprobs(logits, tokens),
        record(logits, tokens),
    ), jnp.isin(tokens, jnp.asarray(eos_ids))

  return draw
