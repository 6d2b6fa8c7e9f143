"""The rows that a policy is run over: as sampled, grouped or packed.

A rollout has a row for each completion, as long as the longest that is allowed
and with the prompt repeated for each completion of a group. Grouped rows hold
the prompt once and behind it all these completions. Packed rows hold
several completions next to each other, and a prompt once for all those of its
group that share a row; what is left of the longest is not computed. How many
rows that takes is known at run time: a loop runs over as many as there are.

Every slot reads one token and predicts one (`types.Rows`), so a completion of n
tokens takes n slots, of which the first reads the last token of its prompt; the
prompt takes those before, sees itself alone, and is seen by its completions.

B sequences of a rollout, b of them chosen, G in a group; T slots of a row as
sampled, P prompt tokens; K parts of m packed rows of R slots.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import halvings
from dppo_jax import loops
from dppo_jax.types import given
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout
from dppo_jax.types import Rows


class Layout(NamedTuple):
  """Where the slots of the rows of K parts come from."""

  source: jax.Array  # [K, m, R] int32, row * T + slot; B * T if empty.
  num_parts: Any  # int, or [] int32: parts that hold anything.
  segments: PyTree = ()  # [K, m, R] int32; () keeps those of the rollout.
  prompt_segments: PyTree = ()  # [K, m, R] int32, see `types.Rows`.
  # A part is computed to the shortest of these that its rows fit in, R if ().
  lengths: tuple[int, ...] = ()


# arrange(rows [B, T], chosen [b], num_parts) -> Layout of the rows `chosen`, in
# at most so many parts.
ArrangeFn = Callable[[Rows, jax.Array, int], Layout]


def rows_of(rollout: Rollout) -> Rows:
  """The rows of a rollout as they were sampled."""
  return Rows(
      inputs=rollout.tokens[:, :-1],
      targets=rollout.tokens[:, 1:],
      positions=rollout.positions[:, :-1],
      input_segments=rollout.segment_ids[:, :-1],
      target_segments=rollout.segment_ids[:, 1:],
      token_mask=rollout.token_mask,
      routing=rollout.routing,
      entries=rollout.entries,
  )


def as_sampled(rows: Rows, chosen: jax.Array, num_parts: int) -> Layout:
  """A row for each completion, in equal parts."""
  length = rows.token_mask.shape[1]
  source = chosen[:, None] * length + jnp.arange(length)[None]
  return Layout(source.reshape(num_parts, -1, length), num_parts)


def make_grouped(*, prompt_length: int, group_size: int) -> ArrangeFn:
  """A row for each group: its prompt once, behind it all its completions.

  They stand as they were sampled, as long as the longest that is allowed; the
  rows' attention is that of `attention.Groups`.

  Args:
    prompt_length: P, see `make_packed`; at least 2.
    group_size: G; what is chosen are whole groups, one after the other.
  """
  first = prompt_length - 1  # A prompt's last token is read for a completion.

  def arrange(rows, chosen, num_parts):
    length = rows.token_mask.shape[1]
    slots = (chosen[:, None] * length + jnp.arange(length)[None]).reshape(
        -1, group_size, length
    )
    of_group = lambda prompt, own: jnp.concatenate(
        [prompt, own.reshape(len(own), -1)], axis=1
    )
    source = of_group(slots[:, 0, :first], slots[:, :, first:])
    places = jnp.arange(group_size)[None, :, None]
    number = of_group(
        jnp.ones((1, first), jnp.int32),
        jnp.broadcast_to(places + 2, (1, group_size, length - first)),
    )
    real = jnp.take(rows.input_segments.ravel(), source) > 0
    parts = lambda x: x.reshape(num_parts, -1, x.shape[-1])
    return Layout(
        parts(source),
        num_parts,
        parts(jnp.where(real, number, 0)),
        parts(jnp.where(real & (number > 1), 1, 0)),
    )

  return arrange


def make_packed(
    *,
    row_length: int,
    prompt_length: int,
    group_size: int,
    row_multiple: int = 1,
    num_halvings: int = 0,
    halving_steps: int = 1,
) -> ArrangeFn:
  """Packs completions in rows, those with most tokens first.

  The groups with most tokens come first, and of each the longest completion. It
  goes to the first row with enough room, if possible to one that holds its
  prompt. A completion without a sampled token goes nowhere.

  Args:
    row_length: R, at least T.
    prompt_length: P; every row of a rollout begins with so many slots of a
      prompt, padded on the left.
    group_size: G; a group's completions are next to each other.
    row_multiple: the rows of a part are a multiple of it.
    num_halvings: a part whose rows are all empty behind R / 2 is computed as if
      R were that, and so on, so often; see `halvings.sizes`.
    halving_steps: to each half, likewise.
  """
  lengths = tuple(halvings.sizes(row_length, num_halvings, halving_steps))

  def arrange(rows, chosen, num_parts):
    batch, length = rows.token_mask.shape
    if row_length < length:
      raise ValueError(
          f'row_length={row_length} is shorter than a prompt and its '
          f'completion, {length} slots; use at least {length}.'
      )
    # A row that another one is opened after holds at least that many.
    max_rows = -(-len(chosen) // (row_length // length))
    part = -(-max_rows // (num_parts * row_multiple)) * row_multiple
    mask = jnp.take(rows.token_mask, chosen, axis=0)
    places = jnp.arange(length)[None] + 1
    last = jnp.max(jnp.where(mask, places, 0), axis=-1)
    sizes = jnp.maximum(last - (prompt_length - 1), 0)
    real = jnp.take(rows.input_segments, chosen, axis=0)[:, : prompt_length - 1]
    prompt_sizes = jnp.sum(real > 0, axis=-1)
    placed = _first_fit(
        sizes, prompt_sizes, chosen // group_size,
        num_groups=batch // group_size, row_length=row_length,
        max_rows=max_rows,
    )
    num_rows = -(-max_rows // part) * part
    source, segments, prompts = _lay_out(
        placed, sizes, prompt_sizes, chosen, num_rows=num_rows,
        row_length=row_length, prompt_length=prompt_length,
        shape=(batch, length),
    )
    parts = lambda x: x.reshape(-1, part, row_length)
    return Layout(
        parts(source), -(-placed.num_rows // part), parts(segments),
        parts(prompts), lengths,
    )

  return arrange


class _Placed(NamedTuple):
  """Where each of b completions and its prompt go; [b] int32 but the last."""

  row: jax.Array
  start: jax.Array
  prompt_start: jax.Array
  brings_prompt: jax.Array  # bool, the first of its group in this row.
  num_rows: jax.Array  # []


def _first_fit(
    sizes, prompt_sizes, groups, *, num_groups, row_length, max_rows
) -> _Placed:
  """Rows for completions, one after the other.

  In a row, a prompt stands in front of the completions of its group, and no
  other group among them: who attends need not look far (packed_attention.py).
  """
  of_groups = jax.ops.segment_sum(sizes, groups, num_groups)
  order = jnp.lexsort((-sizes, groups, -of_groups[groups]))

  def place(i, carry):
    placed, used, latest = carry
    index = order[i]
    size = sizes[index]
    holds = latest == groups[index]
    needed = size + jnp.where(holds, 0, prompt_sizes[index])
    row = jnp.argmax(jnp.where(needed <= row_length - used, 1 + holds, 0))
    put = lambda x, value: x.at[index].set(value)
    new = placed._replace(
        row=put(placed.row, row),
        start=put(placed.start, used[row] + needed[row] - size),
        prompt_start=put(placed.prompt_start, used[row]),
        brings_prompt=put(placed.brings_prompt, ~holds[row]),
        num_rows=jnp.maximum(placed.num_rows, row + 1),
    )
    after = (
        new, used.at[row].add(needed[row]), latest.at[row].set(groups[index])
    )
    return jax.tree.map(lambda x, y: jnp.where(size > 0, x, y), after, carry)

  count = jnp.zeros(len(sizes), jnp.int32)
  empty = jnp.zeros(max_rows, jnp.int32)
  nothing = _Placed(count, count, count, count > 0, jnp.int32(0))
  placed, _, _ = jax.lax.fori_loop(
      0, len(sizes), place, (nothing, empty, empty - 1)
  )
  # The prompt of those that found it in their row.
  bringer = placed.brings_prompt & (sizes > 0)
  starts = jnp.zeros((num_groups, max_rows), jnp.int32)
  starts = starts.at[groups, placed.row].max(
      jnp.where(bringer, placed.prompt_start, 0)
  )
  return placed._replace(
      prompt_start=starts[groups, placed.row], brings_prompt=bringer
  )


def _lay_out(
    placed, sizes, prompt_sizes, chosen, *, num_rows, row_length,
    prompt_length, shape,
):
  """Source, segment and continued segment of every slot. [num_rows, R] each."""
  batch, length = shape
  end = num_rows * row_length
  # A segment is known by where it starts, counted from 1.
  first = placed.row * row_length
  own = placed.start + 1
  prompt = jnp.where(prompt_sizes > 0, placed.prompt_start + 1, 0)

  def put(outputs, starts, counts, origins, width, segments, continued):
    """Writes runs of `counts` slots, at most `width`, from `origins` on."""
    steps = jnp.arange(width)[None]
    slots = jnp.where(
        steps < counts[:, None], starts[:, None] + steps, end
    ).ravel()
    values = (
        origins[:, None] + steps,
        jnp.broadcast_to(segments[:, None], (len(counts), width)),
        jnp.broadcast_to(continued[:, None], (len(counts), width)),
    )
    return tuple(
        x.at[slots].set(value.ravel(), mode='drop')
        for x, value in zip(outputs, values, strict=True)
    )

  outputs = (
      jnp.full(end, batch * length, jnp.int32),
      jnp.zeros(end, jnp.int32),
      jnp.zeros(end, jnp.int32),
  )
  outputs = put(
      outputs, first + placed.start, sizes,
      chosen * length + prompt_length - 1, length - prompt_length + 1, own,
      prompt,
  )
  outputs = put(
      outputs, first + placed.prompt_start,
      jnp.where(placed.brings_prompt, prompt_sizes, 0),
      chosen * length + prompt_length - 1 - prompt_sizes, prompt_length - 1,
      prompt, jnp.zeros_like(prompt),
  )
  return tuple(x.reshape(num_rows, row_length) for x in outputs)


def take(
    layout: Layout,
    part: jax.Array,
    rows: Rows,
    *trees: PyTree,
    length: int | None = None,
) -> tuple[Rows, ...]:
  """Rows and trees of [B, T, ...], laid out as a part; 0 in empty slots.

  Returns:
    the part's rows and trees of [m, length, ...]: so many slots of a row from
    the first, R if None.
  """
  of_part = lambda x: x[part][:, :length]
  source = of_part(layout.source)

  def pick(x):
    flat = x.reshape(-1, *x.shape[2:])
    return jnp.take(flat, source, axis=0, mode='fill', fill_value=0)

  rows, *trees = jax.tree.map(pick, (rows, *trees))
  if given(layout.segments):
    rows = rows._replace(
        input_segments=of_part(layout.segments),
        target_segments=of_part(layout.segments),
        prompt_segments=of_part(layout.prompt_segments),
    )
  return rows, *trees


def put_back(layout: Layout, tree: PyTree, like: jax.Array) -> PyTree:
  """What `take` took: [K, m, R, ...] -> [B, T, ...], 0 where nothing was.

  Args:
    layout: of the parts.
    tree: of arrays.
    like: [B, T].
  """
  source = layout.source.ravel()

  def put(x):
    values = x.reshape(-1, *x.shape[3:])
    flat = jnp.zeros((like.size, *values.shape[1:]), values.dtype)
    flat = flat.at[source].set(values, mode='drop')
    return flat.reshape(*like.shape, *values.shape[1:])

  return jax.tree.map(put, tree)


def over_parts(
    fn: Callable[[jax.Array, int], tuple[PyTree, PyTree]],
    layout: Layout,
    zeros: PyTree,
) -> tuple[PyTree, PyTree]:
  """Runs `fn(part, length)` over the parts that hold anything.

  Of each, the first `length` slots of a row are computed, an int that the
  program knows: behind them the part is empty, see `make_packed`.

  Args:
    fn: returns what is added up, and arrays of [m, length, ...].
    layout: of the parts.
    zeros: what sums begin with.

  Returns:
    the sums; and the arrays of all parts, [K, m, R, ...], 0 in other slots.
  """
  num_parts, _, row_length = layout.source.shape
  branches = [_filled_up(fn, x, row_length) for x in _lengths(layout)]
  which = _which(layout)
  return loops.over_first(
      lambda part: jax.lax.switch(which[part], branches, part),
      layout.num_parts, num_parts, zeros,
  )


def num_slots(layout: Layout) -> jax.Array:
  """Slots that `over_parts` computes, over all parts. [] int32."""
  num_parts, num_rows, _ = layout.source.shape
  lengths = jnp.asarray(_lengths(layout))[_which(layout)]
  runs = jnp.arange(num_parts) < layout.num_parts
  return num_rows * jnp.sum(jnp.where(runs, lengths, 0))


def _lengths(layout: Layout) -> list[int]:
  """Those that the rows of a part may be computed to, from the shortest."""
  row_length = layout.source.shape[-1]
  return sorted(layout.lengths) or [row_length]


def _which(layout: Layout) -> jax.Array:
  """Of `_lengths`, the shortest that holds all of a part. [K] int32."""
  lengths = _lengths(layout)
  if len(lengths) == 1:
    return jnp.zeros(len(layout.source), jnp.int32)
  ends = jnp.where(layout.segments > 0, jnp.arange(lengths[-1]) + 1, 0)
  return jnp.searchsorted(jnp.asarray(lengths), jnp.max(ends, axis=(1, 2)))


def _filled_up(fn, length, row_length):
  """`fn` of so many slots of a row; what it returns is 0 behind them."""
  if length == row_length:
    return lambda part: fn(part, length)
  fill_up = lambda x: jnp.pad(
      x, [(0, 0), (0, row_length - length)] + [(0, 0)] * (x.ndim - 2)
  )

  def run(part):
    terms, out = fn(part, length)
    return terms, jax.tree.map(fill_up, out)

  return run
