"""Who sees whom, and attention among those: whole rows, or one new token.

A model decides once for each kind of layer what is visible, and hands its
layers a function of queries, keys and values that knows it. B sequences, T
tokens, H query heads, K key and value heads, E width of a head; N prompts, G
completions of each, P prompt tokens, C completion tokens.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax.models import platforms
from dppo_jax.models import products
from dppo_jax.models import quantization

# attend(q [B, T, H, E], k [B, T, K, E], v [B, T, K, E], tape)
#   -> (out [B, T, H, E], whatever should be kept, usually keys and values).
AttendFn = Callable[
    [jax.Array, jax.Array, jax.Array, products.Tape], tuple[jax.Array, Any]
]

# attention(where, windows, scale=, cap=) -> (sights, attend_with). A sight is
# what layers of a window have to know, one for each of `windows`, all of one
# structure, so that scanned layers select theirs; attend_with(sight) -> attend.
RowAttention = Callable[..., tuple[list[Any], Callable[[Any], AttendFn]]]

# share(attend) of an attend(q, k, v, rows, rest) -> [B, T, H, E]: each device
# has its own rows and heads. q, k and v may be trees with heads, `rows` is one
# of [B, ...], `rest` is for all.
ShareFn = Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]

# Rows longer than that never have scores [T, T] of all tokens at once.
LONG_ROW = 2048
BLOCK = 512
# A row is cut in so many stretches, if they are long enough: the keys behind a
# stretch are left out of it.
NUM_STRETCHES = 4
SHORTEST_STRETCH = 128
NO_WINDOW = 2**30


def alone(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """A `ShareFn` of one device."""
  return attend


class Where(NamedTuple):
  """Which tokens of a row belong together. [B, T] int32 each."""

  segment_ids: jax.Array
  positions: jax.Array
  prompt_ids: jax.Array | None = None


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """Squeezes smoothly into (-cap, cap); None changes nothing."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def multiplied_in(dtype: Any) -> Any:
  """The type of the factors of a product that is summed in float32.

  A CPU does not multiply float16 into float32, and bfloat16 not always; there
  the factors are widened, which changes no product.
  """
  narrow = jnp.dtype(dtype).itemsize < 4
  return jnp.float32 if narrow and platforms.current() == 'cpu' else dtype


def visible_within_segments(
    where: Where, *, window: int | None
) -> jax.Array:
  """Which earlier tokens a token sees. [B, T, T] bool.

  Those of its own segment, and those of the segment that it continues. Padding
  is segment 0 and sees itself, which keeps its rows finite; nothing else sees
  it.

  Args:
    where: the tokens' segments; their positions, from which distances are
      taken; and the segment that a token's segment continues, 0 for none.
    window: see `LayerKind`.
  """
  return sees(where, slots_of(where), where, slots_of(where), window)


class InCache(NamedTuple):
  """What one new token of each completion sees, in either of two forms.

  The cache of the completions is a ring: all write to the same place, one step
  after the other, wherever each of them began.
  """

  prompt: jax.Array  # [N, G or 1, P] bool
  own: jax.Array  # [N or 1, G or 1, C] bool
  first: jax.Array  # [B] int32, slot of the prompt from which on it is seen.
  count: jax.Array  # [B] int32, slots of the ring that are, up to `place`.
  place: jax.Array  # [] int32, where the new tokens go.


def visible_in_cache(
    *,
    prompt_mask: jax.Array,
    prompt_positions: jax.Array,
    positions: jax.Array,
    length: int,
    place: jax.Array,
    count: jax.Array,
    window: int | None,
    ended: jax.Array | None = None,
) -> InCache:
  """What one new token of each completion sees of its prompt and of itself.

  Args:
    prompt_mask: [N, P] bool, of prompts that end with the last slot.
    prompt_positions: [N, P] int32.
    positions: [B] int32 of the new tokens; B = N * G.
    length: C, of the completions' cache.
    place: [] int32, where in the cache the new tokens go.
    count: [] or [B] int32, tokens of a completion with the new one, at most C.
    window: see `LayerKind`.
    ended: [B] bool, completions for which a kernel need not read theirs.
  """
  num_prompts = prompt_mask.shape[0]
  age = (place - jnp.arange(length)[None, None]) % length  # Tokens ago.
  own = age < count.reshape(num_prompts if count.ndim else 1, -1, 1)
  prompt = prompt_mask[:, None, :]
  if window is not None:
    new = positions.reshape(num_prompts, -1, 1)  # [N, G, 1]
    prompt = prompt & (new - prompt_positions[:, None, :] < window)
    own = own & (age < window)
  # For kernels; positions of a prompt begin with 0.
  group_size = len(positions) // num_prompts
  first = prompt_mask.shape[1] - jnp.repeat(
      jnp.sum(prompt_mask, axis=1), group_size
  )
  seen = jnp.broadcast_to(count, positions.shape)
  if ended is not None:
    seen = jnp.where(ended, 1, seen)
  if window is not None:
    first = jnp.maximum(first, first + positions - window + 1)
    seen = jnp.minimum(seen, window)
  return InCache(prompt, own, first, seen, place)


def attend_within_row(
    visible: jax.Array, *, scale: float, cap: float | None
) -> AttendFn:
  """Attention of every token to those that it sees in its row.

  Args:
    visible: [B, T, T] bool; nobody sees what stands behind.
    scale: of the scores.
    cap: see `softcap`; of the scores.
  """

  def attend(q, k, v, tape=products.no_tape):
    attended = [
        _attention(
            q[:, i:j], k[:, :j], v[:, :j], visible[:, i:j, :j],
            scale=scale, cap=cap,
        )
        for i, j in _stretches(q.shape[1], SHORTEST_STRETCH)
    ]
    attended = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *attended)
    tape.attends(attended)
    return attended.out, (k, v)

  return attend


class Queries(NamedTuple):
  """Some tokens of rows that ask. [B, n, ...]."""

  q: jax.Array  # [B, n, H, E]
  where: Where
  places: jax.Array  # [1, n] int32, slots of the row.


class Keys(NamedTuple):
  """The tokens that they may see. [B, S, ...]."""

  k: jax.Array  # [B, S, K, E]
  v: jax.Array
  where: Where
  places: jax.Array  # [1, S] int32


# split(attend) of an attend(queries, keys, rest) -> [B, n, H, E].
SplitFn = Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]


def attend_in_blocks(
    where: Where,
    window: jax.Array | None,
    *,
    scale: float,
    cap: float | None,
    parts: int = 1,
    split: SplitFn | None = None,
) -> AttendFn:
  """As `attend_within_row`, without an array of [T, T].

  The scores of a block of queries exist at a time, and are computed again in
  the backward pass. The keys behind a stretch of the row are left out of it.

  Args:
    where: the tokens' segments and positions.
    window: [] int32, see `LayerKind`; None for none.
    scale: of the scores.
    cap: see `softcap`; of the scores.
    parts: of a row, on as many devices.
    split: shares the queries of a row among them, see `sharding.by_queries`;
      every query then looks at all keys.
  """

  def of_block(queries, keys, window):
    visible = sees(
        queries.where, queries.places, keys.where, keys.places, window
    )
    return _attention(
        queries.q, keys.k, keys.v, visible, scale=scale, cap=cap
    ).out

  def of_all(queries, keys, window):
    """A block after the other; BLOCK queries on all devices together."""
    block = jax.checkpoint(of_block, prevent_cse=False)
    out = jax.lax.map(
        lambda queries: block(queries, keys, window),
        jax.tree.map(lambda x: _in_blocks(x, BLOCK // parts), queries),
    )  # [number of blocks, B, n, H, E]
    out = jnp.moveaxis(out, 0, 1).reshape(len(queries.q), -1, *out.shape[3:])
    return out[:, : queries.q.shape[1]]

  def attend(q, k, v, tape=products.no_tape):
    del tape
    places = slots_of(where)
    queries, keys = Queries(q, where, places), Keys(k, v, where, places)
    if split is not None:
      return split(of_all)(queries, keys, window), (k, v)
    cut = lambda tree, *ends: jax.tree.map(lambda x: x[:, slice(*ends)], tree)
    outs = [
        of_all(cut(queries, i, j), cut(keys, j), window)
        for i, j in _stretches(q.shape[1], BLOCK)
    ]
    return jnp.concatenate(outs, axis=1), (k, v)

  return attend


def in_xla(*, parts: int = 1, split: SplitFn | None = None) -> RowAttention:
  """Attention of whole rows without a kernel, of long ones in blocks.

  Args:
    parts: of a row, on as many devices.
    split: shares the queries of a row among them, see `attend_in_blocks`; None
      where a device has whole rows.
  """

  def attention(where, windows: Sequence[int | None], **scores):
    if where.positions.shape[1] <= LONG_ROW and split is None:
      sights = [visible_within_segments(where, window=x) for x in windows]
      return sights, lambda visible: attend_within_row(visible, **scores)
    return limits_of(windows), lambda window: attend_in_blocks(
        where, window, parts=parts, split=split, **scores
    )

  return attention


class Groups(NamedTuple):
  """Rows that hold a prompt and behind it all its completions.

  Such a row has `prompt` + G * C slots; it stands for G rows of `prompt` + C.
  """

  prompt: int  # Slots of the prompt, at least one.
  size: int  # G

  def apart(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prompts [B, prompt, ...] and completions [B * G, C, ...]."""
    prompts, own = x[:, : self.prompt], x[:, self.prompt :]
    return prompts, own.reshape(len(x) * self.size, -1, *x.shape[2:])

  def together(self, prompts: jax.Array, own: jax.Array) -> jax.Array:
    """The rows that `apart` took apart."""
    own = own.reshape(len(prompts), -1, *own.shape[2:])
    return jnp.concatenate([prompts, own], axis=1)

  def repeated(self, x: jax.Array) -> jax.Array:
    """A row for each completion, its prompt in front. [B * G, T, ...]."""
    prompts, own = self.apart(x)
    return jnp.concatenate(
        [jnp.repeat(prompts, self.size, axis=0), own], axis=1
    )

  def sequences(self, where: Where) -> Where:
    """Of the rows that `repeated` makes, of one sequence each."""
    real = self.repeated(where.segment_ids) > 0
    return Where(real.astype(jnp.int32), self.repeated(where.positions))


def in_groups(rows: RowAttention, groups: Groups) -> RowAttention:
  """Attention of rows that share a prompt, by that of a row for each.

  All other parts of a layer see the prompt once for its group.

  Args:
    rows: attention of the rows that these stand for.
    groups: how rows share prompts.
  """

  def attention(where, windows: Sequence[int | None], **scores):
    sights, attend_with = rows(groups.sequences(where), windows, **scores)

    def attend_groups_with(sight):
      def attend(q, k, v, tape=products.no_tape):
        del tape
        out, _ = attend_with(sight)(*map(groups.repeated, (q, k, v)))
        prompts = out[:: groups.size, : groups.prompt]
        return groups.together(prompts, out[:, groups.prompt :]), (k, v)

      return attend

    return sights, attend_groups_with

  return attention


def in_merged_groups(groups: Groups) -> RowAttention:
  """As `in_groups`, without a kernel and for rows that are not long.

  A completion's attention to its prompt and that to itself are two products
  each, and one softmax; nothing of the prompt is repeated.

  Args:
    groups: how rows share prompts.
  """

  def attention(where, windows: Sequence[int | None], **scores):
    split = groups.prompt
    sights = []
    for window in windows:
      visible = visible_within_segments(groups.sequences(where), window=window)
      sights.append((
          visible[:: groups.size, :split, :split], visible[:, split:]
      ))

    def attend_with(sight):
      among_prompts, of_completions = sight

      def attend(q, k, v, tape=products.no_tape):
        del tape
        prompts, completions = zip(*map(groups.apart, (q, k, v)), strict=True)
        out = groups.together(
            _attention(*prompts, among_prompts, **scores).out,
            _attention_after_prompts(
                *completions, *prompts[1:], of_completions, **scores
            ),
        )
        return out, (k, v)

      return attend

    return sights, attend_with

  return attention


def _in_blocks(x, largest):
  """[B, n, ...] -> [blocks, B, `largest` or less, ...], 0 at the end."""
  length = x.shape[1]
  count = -(-length // largest)
  size = -(-length // count)
  x = jnp.pad(
      x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
  )
  x = x.reshape(x.shape[0], count, size, *x.shape[2:])
  return jnp.moveaxis(x, 1, 0)


def _stretches(length, shortest):
  """Where the stretches of a row begin and end."""
  count = min(max(length // shortest, 1), NUM_STRETCHES)
  size = -(-length // count)
  return [(i, min(i + size, length)) for i in range(0, length, size)]


def limits_of(windows: Sequence[int | None]) -> list[jax.Array | None]:
  """Of windows, so that scanned layers can select theirs; None for none."""
  if all(window is None for window in windows):
    return [None] * len(windows)
  return [jnp.int32(NO_WINDOW if x is None else x) for x in windows]


def fill_up(tree, multiple: int):
  """[B, T, ...] until `multiple` divides T. Zeros are padding: segment 0."""
  pad = lambda x: jnp.pad(
      x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2)
  )
  return jax.tree.map(pad, tree)


def slots_of(where: Where) -> jax.Array:
  """Slots of a row, [1, T]."""
  return jnp.arange(where.segment_ids.shape[1])[None]


def sees(where, places, of_keys, key_places, window):
  """Which keys [B, S] the tokens of [B, n] see. [B, n, S] bool."""
  tokens, keys = lambda x: x[:, :, None], lambda x: x[:, None]
  seen = tokens(places) >= keys(key_places)
  same = tokens(where.segment_ids) == keys(of_keys.segment_ids)
  if where.prompt_ids is not None:
    continued = tokens(where.prompt_ids)
    same |= (continued == keys(of_keys.segment_ids)) & (continued > 0)
  if window is None:
    return seen & same
  distance = tokens(where.positions) - keys(of_keys.positions)
  return seen & same & (distance < window)


def _attention(q, k, v, visible, *, scale, cap):
  """Of queries [B, T, H, E] among keys [B, S, K, E]; visible [B, T, S]."""
  batch, length, heads, size = q.shape
  num_keys = k.shape[2]
  # Moved once, so that the products and their gradients take rows as they lie.
  queries = jnp.moveaxis(q, 1, 2).reshape(
      batch, num_keys, heads // num_keys, length, size
  )
  keys, values = cache_of(k, v)
  scores = _scores(queries, keys)
  scores = softcap(scores * scale, cap)
  [weights], sums, largest = _softmax_parts(
      [hide(scores, visible[:, None, None])]
  )
  out = product('bkhts,bkse->bkhte', weights.astype(q.dtype), values) / sums
  by_token = lambda x: jnp.moveaxis(x.reshape(batch, heads, length, -1), 1, 2)
  log_sum = by_token(largest + jnp.log(sums))[..., 0]
  return products.Attended(by_token(out).astype(q.dtype), log_sum)


@jax.custom_vjp
def _scores(queries, keys):
  """Of queries [B, K, H / K, T, E] for keys [B, K, E, S]. [B, K, H / K, T, S].

  The gradient for keys that JAX makes turns that of the scores, which are the
  larger factor; this one turns the queries.
  """
  return product('bkhte,bkes->bkhts', queries, keys)


def _scores_forward(queries, keys):
  return _scores(queries, keys), (queries, keys)


def _scores_backward(kept, gradient):
  queries, keys = kept
  of_queries = product('bkhts,bkes->bkhte', gradient, keys)
  of_keys = product('bkhte,bkhts->bkes', queries, gradient)
  return of_queries.astype(queries.dtype), of_keys.astype(keys.dtype)


_scores.defvjp(_scores_forward, _scores_backward)


def _attention_after_prompts(
    q, k, v, prompt_k, prompt_v, visible, *, scale, cap
):
  """Of B completions, G of each of N prompts. [B, C, H, E].

  Queries, keys and values are [B, C, H or K, E], those of the prompts
  [N, P, K, E]; visible [B, C, P + C].
  """
  batch, length, heads, size = q.shape
  num_prompts, split, num_keys, _ = prompt_k.shape
  # [N, K, G, H / K, C, E], with the queries of a prompt next to each other.
  queries = jnp.transpose(
      q.reshape(num_prompts, -1, length, num_keys, heads // num_keys, size),
      (0, 3, 1, 4, 2, 5),
  )
  together = lambda x: x.reshape(num_prompts, num_keys, -1, x.shape[-1])
  apart = lambda x: x.reshape(*queries.shape[:-1], x.shape[-1])
  by_group = lambda x: x.reshape(num_prompts, -1, *x.shape[1:])
  keys = jnp.transpose(by_group(k), (0, 3, 1, 4, 2))  # [N, K, G, E, C]
  values = jnp.transpose(by_group(v), (0, 3, 1, 2, 4))
  prompt_keys, prompt_values = cache_of(prompt_k, prompt_v)
  scores = (
      apart(product('nkte,nkep->nktp', together(queries), prompt_keys)),
      product('nkghte,nkges->nkghts', queries, keys),
  )
  seen = by_group(visible)[:, None, :, None]  # [N, 1, G, 1, C, P + C]
  (of_prompt, of_own), sums, _ = _softmax_parts([
      hide(softcap(x * scale, cap), y)
      for x, y in zip(scores, jnp.split(seen, [split], axis=-1), strict=True)
  ])
  cast = lambda x: x.astype(q.dtype)
  out = apart(
      product('nktp,nkpe->nkte', together(cast(of_prompt)), prompt_values)
  )
  out += product('nkghts,nkgse->nkghte', cast(of_own), values)
  out = jnp.transpose(out / sums, (0, 2, 4, 1, 3, 5))
  return cast(out).reshape(batch, length, heads, size)


def hide(scores, visible):
  """Scores of what is not visible are finite, as padding may see nothing."""
  return jnp.where(visible, scores, jnp.finfo(scores.dtype).min)


def _softmax_parts(scores):
  """Exponentials of scores that share a softmax.

  Also their sum, and the score that all were lowered by, [..., 1] each. What
  they weigh is divided by the sum, and not each of them: it is smaller.
  """
  largest = functools.reduce(
      jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in scores)
  )
  largest = jax.lax.stop_gradient(largest)  # The result does not depend on it.
  weights = [jnp.exp(x - largest) for x in scores]
  sums = sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights)
  return weights, sums, largest


class Cache(NamedTuple):
  """Keys and values of S tokens, each or both `quantization.Quantized`.

  The last two axes are those of the products that one new token asks for:
  scores are q @ keys, what it takes along is weights @ values.
  """

  keys: Any  # [B, K, E, S]
  values: Any  # [B, K, S, E]


def cache_of(k: jax.Array, v: jax.Array) -> Cache:
  """From keys and values [B, S, K, E]."""
  return Cache(jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2))


def convert_cache(cache: Cache, dtype: Any) -> Cache:
  """In another type; 8 bits with a scale for each token and head."""
  return Cache(
      quantization.convert(cache.keys, dtype, axis=2),
      quantization.convert(cache.values, dtype, axis=3),
  )


def empty_cache(
    batch: int, length: int, num_heads: int, size: int, dtype: Any
) -> Cache:
  """Room for `length` tokens."""
  return Cache(
      quantization.zeros((batch, num_heads, size, length), dtype, axis=2),
      quantization.zeros((batch, num_heads, length, size), dtype, axis=3),
  )


def lengthen(cache: Cache, length: int) -> Cache:
  """With room for `length` tokens, at least as many as there was room for."""
  more = length - cache.keys.shape[3]
  if not more:
    return cache

  def fill_up(x, axis):
    widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)

  return Cache(
      jax.tree.map(lambda x: fill_up(x, 3), cache.keys),
      jax.tree.map(lambda x: fill_up(x, 2), cache.values),
  )


def insert(cache: Cache, k: jax.Array, v: jax.Array, place: jax.Array) -> Cache:
  """One new token of each row, [B, 1, K, E] each, at that place."""
  new = convert_cache(cache_of(k, v), quantization.dtype_of(cache.keys))
  put = lambda axis: lambda old, new: (
      jax.lax.dynamic_update_slice_in_dim(old, new, place, axis=axis)
  )
  return Cache(
      jax.tree.map(put(3), cache.keys, new.keys),
      jax.tree.map(put(2), cache.values, new.values),
  )


def attend_to_cache(
    *,
    prompt: Cache,
    cache: Cache,
    visible: InCache,
    scale: float,
    cap: float | None,
) -> AttendFn:
  """Attention of one new token to its prompt and its own completion.

  The prompt's keys and values exist once per prompt and are shared by its G
  completions; B = N * G.

  Args:
    prompt: of N prompts of P tokens.
    cache: of B completions, room for C tokens.
    visible: from `visible_in_cache`.
    scale: of the scores.
    cap: see `softcap`; of the scores.
  """
  num_prompts = prompt.keys.shape[0]

  def attend(q, k, v, tape=products.no_tape):  # [B, 1, H or K, E]
    kept = insert(cache, k, v, visible.place)
    batch, _, heads, size = q.shape
    num_keys = k.shape[2]
    own_keys, own_values, of_own_keys, of_own_values = _factors(kept, q.dtype)
    prompt_keys, prompt_values, *of_prompts = _factors(prompt, q.dtype)
    # [N, K, 1, 1, P]
    of_prompt_keys, of_prompt_values = (
        None if x is None else x[:, :, None] for x in of_prompts
    )
    scaled = lambda x, scale: x if scale is None else x * scale
    groups = lambda x: x.reshape(num_prompts, -1, *x.shape[1:])
    rows = lambda x: x.reshape(batch, *x.shape[2:])
    # Of a prompt, what its completions ask stands together: [N, K, G, ...].
    by_prompt = lambda x: jnp.moveaxis(groups(x), 1, 2)
    by_row = lambda x: rows(jnp.moveaxis(x, 2, 1))
    # The cache is read as it is kept: through a reshape, XLA copies it.
    q = q.reshape(batch, num_keys, heads // num_keys, size)
    of_prompt = scaled(
        product('nkghe,nkep->nkghp', by_prompt(q), prompt_keys), of_prompt_keys
    )
    own = scaled(product('bkhe,bkec->bkhc', q, own_keys), of_own_keys)
    of_prompt = jnp.where(
        visible.prompt[:, None, :, None],
        softcap(of_prompt * scale, cap),
        -jnp.inf,
    )
    own = rows(jnp.where(
        visible.own[:, :, None, None],
        groups(softcap(own * scale, cap)),
        -jnp.inf,
    ))
    # One softmax of both; its sum divides what the weights bring, not them.
    over = lambda reduce, x: reduce(x, axis=-1, keepdims=True)
    largest = jnp.maximum(
        by_row(over(jnp.max, of_prompt)), over(jnp.max, own)
    )
    of_prompt = jnp.exp(of_prompt - by_prompt(largest))
    own = jnp.exp(own - largest)
    sums = by_row(over(jnp.sum, of_prompt)) + over(jnp.sum, own)
    of_prompt = scaled(of_prompt, of_prompt_values).astype(q.dtype)
    own = scaled(own, of_own_values).astype(q.dtype)
    out = by_row(product('nkghp,nkpe->nkghe', of_prompt, prompt_values))
    out += product('bkhc,bkce->bkhe', own, own_values)
    out = (out / sums).astype(v.dtype).reshape(batch, 1, heads, size)
    log_sum = (largest + jnp.log(sums)).reshape(batch, 1, heads)
    tape.attends(products.Attended(out, log_sum))
    return out, kept

  return attend


def _factors(cache: Cache, dtype: Any) -> tuple[Any, ...]:
  """Keys and values in `dtype`, and the scale [B, K, 1, S] of each, or None.

  A TPU multiplies a cache by its scales for longer than it reads it. There, the
  scales are left: to scores and to weights, of which there are fewer.
  """
  # Weights times a small scale would lose their digits in float16.
  if platforms.current() != 'tpu' or dtype == jnp.float16:
    keys, values = (quantization.widen(x, dtype).astype(dtype) for x in cache)
    return keys, values, None, None
  (keys, of_keys), (values, of_values) = (
      x if isinstance(x, quantization.Quantized) else (x, None) for x in cache
  )
  if of_values is not None:
    of_values = jnp.swapaxes(of_values, 2, 3)
  return keys.astype(dtype), values.astype(dtype), of_keys, of_values


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """An einsum that is summed in float32, and stays it."""
  factors = (z.astype(multiplied_in(z.dtype)) for z in (x, y))
  return jnp.einsum(
      subscripts, *factors, preferred_element_type=jnp.float32
  )
