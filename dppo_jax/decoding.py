"""The two loops that draw one token after the other until all have ended.

`together` lets all completions advance side by side: prompts are read from one
shared cache, and the loop ends with the longest completion. `in_slots` keeps a
fixed number of slots busy: one whose completion has ended takes the next of the
queue within the loop, so the cost follows the tokens and not the longest
completion of the batch. A row draws with a key of its own and attends to its
own prompt and tokens, so both loops give the same tokens.

N prompts, G completions of each, B = N * G rows, S slots, P prompt tokens, C
completion tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax.models import attention
from dppo_jax.models import experts
from dppo_jax.models import products as products_lib
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.models.causal_lm import Kept
from dppo_jax.types import Prompts
from dppo_jax.types import PyTree

# Scopes of the loop that copies prompts to slots, of loops over fewer, and of
# those of `together`, each with its number.
FILL = 'fill'
FEWER = 'fewer'
STAGE = 'stage'
# Tokens of a stage, at least, and stages, at most, where nobody asks for a
# number: each compiles another loop.
SHORTEST_STAGE = 128
MOST_STAGES = 4


class Column(NamedTuple):
  """One token of each of B rows; as `Outputs` all C of them, [B, C, ...]."""

  tokens: jax.Array  # [B] int32.
  mask: jax.Array  # [B] bool, whether it was sampled.
  logprobs: jax.Array  # [B] float32.
  record: PyTree  # [B, ...]


Outputs = Column
# draw(logits [B, V], keys [B], index [] or [B]) -> (column, ended [B] bool).
DrawFn = Callable[
    [jax.Array, jax.Array, jax.Array], tuple[Column, jax.Array]
]


class Start(NamedTuple):
  """What is known after the prompts were read.

  Attributes:
    params: from `CausalLM.unstacked`.
    rotations: from `CausalLM.rotations`, of P + C positions.
    prompts: [N, P].
    prompt: what prefill kept: the cache of each layer, and the experts that
      were taken.
    routing: whether to remember the experts of every token.
    keys: [B], one for each row.
    first: token 0 of every row.
    ended: [B] bool, that it ended the completion.
    cache_dtype: of the completions' keys and values.
    products: what kernels made of the prompts, in a buffer that has room for
      completions, see `num_entries`; () if it is not kept.
  """

  params: PyTree
  rotations: list
  prompts: Prompts
  prompt: Kept
  routing: experts.Routing
  keys: jax.Array
  first: Column
  ended: jax.Array
  cache_dtype: Any
  products: products_lib.Buffer | tuple[()] = ()


class Read(NamedTuple):
  """What is remembered of tokens that were read, [B, C - 1] or one, [B]."""

  choices: PyTree  # Experts, [..., L, k].
  entries: PyTree  # int32, of products; () if they are not kept.


class Drawn(NamedTuple):
  """What a loop returns."""

  outputs: Outputs
  read: Read
  num_steps: jax.Array  # [] int32.
  products: products_lib.Buffer | tuple[()] = ()


def num_entries(
    *, num_prompts: int, prompt_length: int, batch: int, num_slots: int,
    length: int,
) -> int:
  """Tokens whose products a rollout may keep, those of empty slots included.

  Args:
    num_prompts: N.
    prompt_length: P.
    batch: B.
    num_slots: S; 0 for B.
    length: C.
  """
  slots = num_slots or batch
  # As many as if all took as long: completion i waits for i - S + 1 others to
  # end, which have by step i // S * (C - 1).
  steps = -(-batch // slots) * (length - 1)
  return num_prompts * prompt_length + slots * steps


def default_stages(length: int) -> int:
  """Of a loop over so many tokens whose cache is read as a whole."""
  return min(max(length // SHORTEST_STAGE, 1), MOST_STAGES)


def stage_lengths(length: int, num_stages: int) -> list[int]:
  """Places of the cache in each stage, about equally many more each time.

  Args:
    length: C, those of the last.
    num_stages: 1 to C.
  """
  return [-(-length * i // num_stages) for i in range(1, num_stages + 1)]


def stage_ends(length: int, num_stages: int) -> list[int]:
  """Index of the token that the next stage begins with; of the last, C."""
  # One more than there are places, as nothing reads the last token.
  return [min(x + 1, length) for x in stage_lengths(length, num_stages)]


def _read(model, start, tokens, products, **sights):
  """One more token of each row: logits, cache, what is remembered, products.

  Args:
    model: the architecture.
    start: the prompts, read.
    tokens: [B] int32.
    products: with room for those of these tokens; () if they are not kept.
    **sights: what rows see, see `CausalLM.decode`.
  """
  logits, kept = model.decode(
      start.params,
      tokens,
      rotations=start.rotations,
      keep_products=bool(products),
      routing=start.routing,
      **sights,
  )
  entries = ()
  if products:
    products, entries = products.add(kept.products)
  return logits, kept.cache, Read(kept.routed.choices, entries), products


def together(
    model: CausalLM,
    draw: DrawFn,
    start: Start,
    *,
    length: int,
    pad_id: int,
    num_stages: int = 1,
) -> Drawn:
  """All rows at once.

  Without a kernel a step reads the whole cache, whatever is in it. In stages it
  begins with room for a part of the tokens, and another loop, compiled for
  itself, goes on with more. Of 4 stages a step reads 5/8 on average, of 2 it
  reads 3/4.

  Args:
    model: the architecture, in the sampler's dtype.
    draw: takes token number `index` of every row.
    start: the prompts, read.
    length: C.
    pad_id: the token of what was not sampled.
    num_stages: how many loops share the tokens, 1 to C.
  """
  batch = start.keys.shape[0]
  group_size = batch // start.prompts.mask.shape[0]
  lengths = jnp.repeat(jnp.sum(start.prompts.mask, axis=-1), group_size)

  def write(outputs, column, index):
    put = lambda old, new: jax.lax.dynamic_update_index_in_dim(
        old, new.astype(old.dtype), index, axis=1
    )
    return jax.tree.map(put, outputs, column)

  def advance(carry):
    index, outputs, read, done, cache, products = carry
    last = jax.lax.dynamic_index_in_dim(outputs.tokens, index - 1, 1, False)
    logits, cache, one, products = _read(
        model,
        start,
        last,
        products,
        positions=lengths + index - 1,
        prompt_cache=start.prompt.cache,
        prompt_mask=start.prompts.mask,
        cache=cache,
        place=index - 1,
        count=index,
        ended=done,
    )
    column, ended = draw(logits, start.keys, index)
    column = column._replace(
        tokens=jnp.where(done, pad_id, column.tokens),
        mask=column.mask & ~done,
        logprobs=jnp.where(done, 0.0, column.logprobs),
    )
    return (
        index + 1,
        write(outputs, column, index),
        # Of the token that was read, not of the one that was drawn.
        write(read, one, index - 1),
        done | ended,
        cache,
        products,
    )

  def until(end, carry):
    """Advances while token `end` is not next and somebody has not ended."""
    busy = lambda carry: (carry[0] < end) & ~jnp.all(carry[3])
    return jax.lax.while_loop(busy, advance, carry)

  outputs = write(_blank(start.first, length, pad_id), start.first, 0)
  nothing = _nothing_read(start, length)
  if length == 1:  # Nothing is read, so there is no column to write.
    return Drawn(outputs, nothing, jnp.int32(1), start.products)
  rooms = stage_lengths(length, num_stages)
  cache = model.empty_cache(batch, rooms[0], start.cache_dtype)
  carry = (
      jnp.int32(1), outputs, nothing, start.ended, cache, start.products
  )
  ends = stage_ends(length, num_stages)
  for stage, (room, end) in enumerate(zip(rooms, ends, strict=True)):
    *head, cache, products = carry
    cache = [attention.lengthen(x, room) for x in cache]
    with jax.named_scope(f'{STAGE}{stage}'):
      carry = until(end, (*head, cache, products))
  index, outputs, read, *_, products = carry
  return Drawn(outputs, read, index, products)


class Slots(NamedTuple):
  """What is being decoded, [S] each."""

  row: jax.Array  # int32, which completion; B where there is none.
  count: jax.Array  # int32, tokens drawn so far.
  last: jax.Array  # int32, the latest of them.


def in_slots(
    model: CausalLM,
    draw: DrawFn,
    start: Start,
    *,
    sizes: Sequence[int],
    length: int,
    pad_id: int,
) -> Drawn:
  """S rows at a time; what comes next in the queue fills a slot at once.

  The cache of the slots is a ring that all write to at the same place, so no
  scatter touches it and nothing is copied when a slot changes hands: who came
  later sees less of it. Only the keys and values of a prompt are copied, once
  for each row.

  Once the queue is empty, slots stay empty. When the next of `sizes` is enough,
  another loop goes on with so many, and so on: a step then costs what fewer
  rows do. Each loop is compiled for itself.

  Args:
    model: the architecture, in the sampler's dtype.
    draw: takes token number `index` of every slot.
    start: the prompts, read.
    sizes: S, at most B, and what to go on with after it, from the largest.
    length: C.
    pad_id: the token of what was not sampled.
  """
  batch, num_slots = start.keys.shape[0], sizes[0]
  fill = _make_fill(start)

  def advance(carry):
    step, slots, following, own_prompts, cache, outputs, read, products = carry
    mask = start.prompts.mask[_prompt_of(start, slots.row)]  # [S, P]
    logits, cache, one, products = _read(
        model,
        start,
        slots.last,
        products,
        positions=jnp.sum(mask, axis=-1) + slots.count - 1,
        prompt_cache=own_prompts,
        prompt_mask=mask,
        cache=cache,
        place=step % length,
        count=slots.count,
    )
    keys = start.keys[jnp.minimum(slots.row, batch - 1)]
    column, ended = draw(logits, keys, slots.count)
    # Slots without a row write nowhere.
    put = lambda column: lambda old, new: old.at[slots.row, column].set(
        new.astype(old.dtype), mode='drop'
    )
    outputs = jax.tree.map(put(slots.count), outputs, column)
    # Of the token that was read, not of the one that was drawn.
    read = jax.tree.map(put(slots.count - 1), read, one)
    slots = slots._replace(count=slots.count + 1, last=column.tokens)
    free = ended | (slots.count == length) | (slots.row == batch)
    return (
        step + 1,
        *fill(slots, free, following, own_prompts),
        cache,
        outputs,
        read,
        products,
    )

  slots, following, own_prompts = _first_slots(start, fill, num_slots)
  outputs = jax.tree.map(
      lambda old, new: old.at[:, 0].set(new.astype(old.dtype)),
      _blank(start.first, length, pad_id),
      start.first,
  )
  carry = (
      jnp.int32(0),
      slots,
      following,
      own_prompts,
      model.empty_cache(num_slots, length, start.cache_dtype),
      outputs,
      _nothing_read(start, length),
      start.products,
  )
  if length == 1:
    return Drawn(outputs, carry[-2], jnp.int32(1), start.products)

  def until(enough, carry):
    """Advances while more slots than that are taken: all, with a queue."""
    busy = lambda carry: jnp.sum(carry[1].row < batch) > enough
    return jax.lax.while_loop(busy, advance, carry)

  # Until the next size is enough, and in the end until nobody is left.
  limits = (*sizes[1:], 0)
  carry = until(limits[0], carry)
  for size, enough in itertools.pairwise(limits):
    with jax.named_scope(FEWER):
      carry = until(enough, _go_on_with(size, carry, nobody=batch))
  step, *_, outputs, read, products = carry
  return Drawn(outputs, read, step + 1, products)


def _first_slots(start: Start, fill, num_slots: int):
  """The first of the queue: what `fill` makes of slots that are all free."""
  zeros = jnp.zeros(num_slots, jnp.int32)
  nobody = Slots(zeros + start.keys.shape[0], zeros, zeros)
  copies = jax.tree.map(
      lambda x: jnp.zeros((num_slots, *x.shape[1:]), x.dtype),
      start.prompt.cache,
  )
  return fill(nobody, jnp.ones(num_slots, bool), jnp.int32(0), copies)


def _go_on_with(size, carry, *, nobody):
  """So many of the slots, with all rows that there still are."""
  step, slots, following, own_prompts, cache, *rest = carry
  order = jnp.argsort(slots.row == nobody, stable=True)
  kept = order[:size]
  slots, own_prompts, cache = jax.tree.map(
      lambda x: jnp.take(x, kept, axis=0), (slots, own_prompts, cache)
  )
  return step, slots, following, own_prompts, cache, *rest


def _make_fill(start: Start) -> Callable[..., tuple[Slots, jax.Array, PyTree]]:
  """`fill(slots, free, following, own_prompts)`, which returns all but `free`.

  Slots that are free [S] take what follows in the queue, from place `following`
  on, and a copy of its prompt.
  """
  batch = start.keys.shape[0]
  # A row that ended with its first token needs no slot.
  queue = jnp.argsort(start.ended, stable=True)
  waiting = jnp.sum(~start.ended)

  def fill(slots, free, following, own_prompts):
    place = following + jnp.cumsum(free) - 1
    taken = free & (place < waiting)
    row = jnp.where(taken, queue[jnp.minimum(place, batch - 1)], batch)
    order = jnp.argsort(~taken, stable=True)  # Those that took one first.

    def copy(i, own_prompts):
      slot = order[i]
      prompt = _prompt_of(start, row[slot])
      take = lambda to, of: jax.lax.dynamic_update_slice_in_dim(
          to, jax.lax.dynamic_slice_in_dim(of, prompt, 1), slot, axis=0
      )
      return jax.tree.map(take, own_prompts, start.prompt.cache)

    count = jnp.sum(taken)
    with jax.named_scope(FILL):
      own_prompts = jax.lax.fori_loop(0, count, copy, own_prompts)
    first = start.first.tokens[jnp.minimum(row, batch - 1)]
    slots = Slots(
        jnp.where(free, row, slots.row),
        jnp.where(free, 1, slots.count),
        jnp.where(taken, first, slots.last),
    )
    return slots, following + count, own_prompts

  return fill


def _prompt_of(start: Start, row: jax.Array) -> jax.Array:
  """Index of a row's prompt; of the last one where there is no row."""
  batch, count = start.keys.shape[0], start.prompts.mask.shape[0]
  return jnp.minimum(row, batch - 1) // (batch // count)


def _blank(first: Column, length: int, pad_id: int) -> Outputs:
  """Nothing sampled yet. [B, C, ...] leaves."""
  outputs = jax.tree.map(
      lambda x: jnp.zeros((x.shape[0], length, *x.shape[1:]), x.dtype), first
  )
  return outputs._replace(tokens=jnp.full_like(outputs.tokens, pad_id))


def _nothing_read(start: Start, length: int) -> Read:
  """Of all completions, before the first step."""
  blank = lambda x: jnp.zeros(
      (start.keys.shape[0], length - 1, *x.shape[2:]), x.dtype
  )
  # Experts of the prompts, which have as many of each token.
  choices = jax.tree.map(blank, start.prompt.routed.choices)
  entries = blank(start.prompts.tokens) if start.products else ()
  return Read(choices, entries)
