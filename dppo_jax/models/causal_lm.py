"""A causal language model as pure functions of its parameter tree.

The family's NNX `Block` is split once into a static graph and parameters. Here
the parameters of all layers are stacked on a leading axis and scanned, so the
time to compile does not grow with depth; for decoding they are unstacked once,
outside the loop, and the same block is called layer by layer. B sequences, T
tokens, D width, V vocabulary, L layers.
"""

from collections.abc import Callable
import dataclasses
import functools
import types
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from dppo_jax.models import alignment
from dppo_jax.models import attention
from dppo_jax.models import experts
from dppo_jax.models import layers
from dppo_jax.models import platforms
from dppo_jax.models import products as products_lib
from dppo_jax.models import quantization
from dppo_jax.models import rope
from dppo_jax.types import PyTree

# What the backward pass of a layer finds again: all of it, nothing, products
# with its weights and what cuDNN's attention made, or what the policy of that
# name in `jax.checkpoint_policies` keeps.
REMAT = (
    'none',
    'full',
    'products',
    'dots_saveable',
    'dots_with_no_batch_dims_saveable',
)


# Of embeddings and of the head: standard deviation of new weights.
INIT_SCALE = 0.02


class Kept(NamedTuple):
  """What a pass leaves beside its result; L layers."""

  cache: Any = None  # List over layers of `attention.Cache`, if asked for.
  routed: experts.Routed = experts.Routed()  # With L behind [B, T], or [L].
  # [L, B, T, F] each, of one new token [L, B, F], if asked for.
  products: products_lib.Products | None = None


@dataclasses.dataclass(frozen=True)
class CausalLM:
  """Pure functions of `params`; `params` holds those loaded, if any.

  Attributes:
    config: sizes.
    family: module of the architecture, for example `models.qwen3`.
    params: {'embed', 'layers' (stacked), 'norm', 'head' unless tied}.
    dtype: of the computation. Parameters keep their own.
    remat: one of `REMAT`: which activations of a layer are recomputed in the
      backward pass. 'full' needs the least memory and about a third more time.
    unrolls_layers: whether each layer is compiled by itself, and not one for
      all of them in a loop. A loop writes what the backward pass needs into
      arrays of all layers and reads it there; without one it stays where it was
      made, at the price of a compilation of all layers. With `remat='none'` all
      of it is kept, then; in a loop an MLP's activations are made again.
    place: puts the hidden states [B, T, D] between layers where they belong on
      a mesh, so that a compiler moves weights to tokens and not the other way.
    by_tokens: has each device map its own tokens, see `sharding.by_tokens`;
      None where all have all of them.
    by_experts: the same for tokens and experts, see `experts.Experts`.
    row_attention: among the tokens of whole rows, by XLA or by a kernel, see
      `attention_kernels`.
    aligns_rows: rows of one sequence each begin with its first token, whatever
      stood before it, as `row_attention` may need.
    attend_to_cache: of a token that is decoded, by XLA or by a kernel, see
      `decode_kernel`.
    keeps_attention: products that are kept have what attention brought beside
      them, for a `row_attention` that can go on from it.
  """

  config: layers.ModelConfig
  family: types.ModuleType
  params: PyTree = None
  dtype: Any = jnp.float32
  remat: str = 'none'
  unrolls_layers: bool = False
  place: Callable[[jax.Array], jax.Array] = lambda hidden: hidden
  by_tokens: Callable[..., Any] | None = None
  by_experts: experts.SpreadFn | None = None
  row_attention: attention.RowAttention = attention.in_xla()
  aligns_rows: bool = False
  attend_to_cache: Callable[..., attention.AttendFn] = attention.attend_to_cache
  keeps_attention: bool = False

  def replace(self, **changes) -> 'CausalLM':
    """A copy with some attributes changed."""
    return dataclasses.replace(self, **changes)

  def init(self, key: jax.Array) -> PyTree:
    """Random float32 parameters; the key is consumed."""
    config = self.config
    key_embed, key_layers, key_head = jax.random.split(key, 3)

    def make_layer(key):
      block = self.family.Block(config, rngs=nnx.Rngs(params=key))
      return nnx.to_pure_dict(nnx.split(block)[1])

    norm = _make_norm(self.family.Block.Norm, config)
    shape = (config.vocab_size, config.hidden_size)
    embedding = INIT_SCALE * jax.random.normal(key_embed, shape)
    params = {
        'embed': {'embedding': embedding},
        'layers': jax.vmap(make_layer)(
            jax.random.split(key_layers, config.num_hidden_layers)
        ),
        'norm': nnx.to_pure_dict(nnx.split(norm)[1]),
    }
    if not config.tie_word_embeddings:
      kernel = INIT_SCALE * jax.random.normal(key_head, shape[::-1])
      params['head'] = {'kernel': kernel}
    return params

  def num_parameters(self) -> tuple[int, int]:
    """All, and those that a token meets: of the experts only its own."""
    config = self.config
    share = config.num_experts_per_tok / max(config.num_experts, 1)
    shapes = jax.eval_shape(self.init, jax.random.key(0))
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    experts = sum(
        x.size for path, x in flat if any(k.key == 'experts' for k in path)
    )
    total = sum(x.size for _, x in flat)
    return total, total - experts + round(share * experts)

  def apply(
      self,
      params: PyTree,
      tokens: jax.Array,
      *,
      positions: jax.Array | None = None,
      segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Logits of the next token everywhere.

    Args:
      params: parameter tree.
      tokens: [B, T] int32.
      positions: [B, T] int32, 0, 1, 2... if not given.
      segment_ids: [B, T] int32; a token sees its own segment only. Padding is
        0. One segment if not given.

    Returns:
      [B, T, V] float32.
    """
    if positions is None:
      positions = jnp.broadcast_to(
          jnp.arange(tokens.shape[1])[None], tokens.shape
      )
    if segment_ids is None:
      segment_ids = jnp.ones_like(tokens)
    hidden, _ = self.trunk(
        params, tokens, positions=positions, segment_ids=segment_ids
    )
    return self.head(params, hidden)

  def trunk(
      self,
      params: PyTree,
      tokens: jax.Array,
      *,
      positions: jax.Array,
      segment_ids: jax.Array,
      prompt_ids: jax.Array | None = None,
      keep_cache: bool = False,
      keep_products: bool = False,
      products: products_lib.Selection | None = None,
      routing: experts.Routing = experts.Routing(),
  ) -> tuple[jax.Array, Kept]:
    """All layers, scanned. [B, T] -> hidden [B, T, D] and what was kept.

    The cache, if kept, is a list over layers of `attention.Cache`. `products`,
    kept by a pass with the same parameters, are not made again.
    Who sees whom: see `attention.visible_within_segments`. Only models with
    experts look at `routing`.
    """
    if self.aligns_rows:
      if keep_cache or keep_products or prompt_ids is not None:
        raise ValueError(
            'Rows are aligned that hold one sequence, and keep nothing.'
        )
      return self._aligned_trunk(
          params, tokens, positions, segment_ids, products, routing
      )
    x = self.place(self._embed(params, tokens))
    where = attention.Where(segment_ids, positions, prompt_ids)
    kinds = self.config.kinds
    sights, attend_with = self.row_attention(
        where, [kind.window for kind in kinds], **self._scores()
    )
    views = [
        (self._rotation(kind, positions), sight)
        for kind, sight in zip(kinds, sights, strict=True)
    ]

    def layer(x, scanned):
      layer_params, kind, replay, index = scanned
      made = None if products is None else products.of(index)
      tape = self._tape(keep_products, made)
      rotation, sight = views[0]
      if len(views) > 1:  # What is selected is kept for every layer.
        rotation, sight = jax.tree.map(
            lambda *options: jax.lax.select_n(kind, *options), *views
        )
      x, cache, routed = self._block(
          layer_params,
          x,
          rotation=rotation,
          attend=attend_with(sight),
          tape=tape,
          routing=routing._replace(replay=replay),
      )
      cache = attention.cache_of(*cache) if keep_cache else None
      made = tape.products if keep_products else None
      return self.place(x), Kept(cache, routed, made)

    if self.remat != 'none':
      layer = jax.checkpoint(
          layer,
          # In straight-line code, a compiler would find it computed already.
          prevent_cse=self.unrolls_layers,
          policy=_remat_policy(self.remat),
      )
    which = jnp.asarray(self.config.layer_kinds, jnp.int32)  # [L]
    replay = routing.replay
    if replay is not None:
      replay = jnp.moveaxis(replay, -2, 0)  # [L, B, T, k]
    x, kept = jax.lax.scan(
        layer, x, (params['layers'], which, replay, jnp.arange(len(which))),
        unroll=self.unrolls_layers,
    )
    routed = kept.routed._replace(
        choices=_layers_last(kept.routed.choices, -2),
        changed=_layers_last(kept.routed.changed, -1),
    )
    cache = self._unstack(kept.cache) if keep_cache else None
    return x, Kept(cache, routed, kept.products)

  def _aligned_trunk(
      self, params, tokens, positions, segment_ids, products, routing
  ):
    """`trunk`, of rows that are moved to the left and back."""
    order = alignment.order_of(segment_ids)
    move = functools.partial(jax.tree.map, order.move)
    if products is not None:
      products = products._replace(entries=order.move(products.entries))
    hidden, kept = self.replace(aligns_rows=False).trunk(
        params,
        order.move(tokens),
        positions=order.move(positions),
        segment_ids=order.move(segment_ids),
        products=products,
        routing=routing._replace(
            replay=move(routing.replay), counted=move(routing.counted)
        ),
    )
    routed = kept.routed._replace(
        choices=jax.tree.map(order.move_back, kept.routed.choices),
        changed=jax.tree.map(order.move_back, kept.routed.changed),
    )
    return order.move_back(hidden), Kept(routed=routed)

  def head(self, params: PyTree, hidden: jax.Array) -> jax.Array:
    """Final norm and vocabulary. [..., D] -> logits [..., V] float32."""
    graph = _norm_graph(self.family.Block.Norm, self.config)
    norm = nnx.merge(graph, params['norm'])
    x = norm(hidden)
    if 'head' in params:
      kernel = params['head']['kernel']
    else:
      kernel = params['embed']['embedding'].T
    dtype = attention.multiplied_in(hidden.dtype)
    if isinstance(kernel, layers.Turned):
      rows = x.astype(dtype).reshape(-1, x.shape[-1])
      logits = layers.columns(kernel.kernel.astype(dtype), rows, axis=1)
      logits = logits.T.reshape(*x.shape[:-1], -1)
    else:
      logits = layers.wide_times(x, kernel, dtype)
    return attention.softcap(logits, self.config.final_logit_softcapping)

  def unstacked(self, params: PyTree) -> PyTree:
    """For `decode`, once, outside the token loop: layers are a list.

    On a CPU, where that is faster, kernels of MLPs and the head are
    `layers.Turned`.
    """
    stacked = params['layers']
    if platforms.current() == 'cpu':
      if not self.config.num_experts:
        stacked = stacked | {'mlp': layers.turned(stacked['mlp'])}
      if self.config.tie_word_embeddings:
        head = params['embed']['embedding']
      else:
        head = params['head']['kernel'].T
      params = params | {'head': {'kernel': layers.Turned(head)}}
    return params | {'layers': self._unstack(stacked)}

  def rotations(self, length: int) -> list:
    """How positions below `length` rotate, for each kind of layers.

    For `decode`: made within the loop, every layer would make the angles anew.
    """
    positions = jnp.arange(length)[None]
    return [
        [x[0] for x in self._rotation(kind, positions)]  # [length, 1, E / 2]
        for kind in self.config.kinds
    ]

  def prefill(
      self,
      params: PyTree,
      tokens: jax.Array,
      *,
      mask: jax.Array,
      keep_products: bool = False,
      routing: experts.Routing = experts.Routing(),
  ) -> tuple[jax.Array, Kept]:
    """Reads left-padded prompts.

    Args:
      params: stacked parameters.
      tokens: [N, P] int32.
      mask: [N, P] bool.
      keep_products: see `trunk`.
      routing: see `trunk`.

    Returns:
      logits [N, V] after the last token, and the prompts' cache.
    """
    hidden, kept = self.trunk(
        params,
        tokens,
        positions=positions_of(mask),
        segment_ids=mask.astype(jnp.int32),
        keep_cache=True,
        keep_products=keep_products,
        routing=routing,
    )
    return self.head(params, hidden[:, -1]), kept

  def decode(
      self,
      params: PyTree,
      tokens: jax.Array,
      *,
      positions: jax.Array,
      rotations: list,
      prompt_cache: list,
      prompt_mask: jax.Array,
      cache: list,
      place: jax.Array,
      count: jax.Array,
      ended: jax.Array | None = None,
      keep_products: bool = False,
      routing: experts.Routing = experts.Routing(),
  ) -> tuple[jax.Array, Kept]:
    """Reads one more token of each completion.

    Args:
      params: from `unstacked`; layers may hold `quantization.Quantized`.
      tokens: [B] int32, the latest token of each completion.
      positions: [B] int32, its position in the whole sequence.
      rotations: from `rotations`, for all positions there may be.
      prompt_cache: list over layers of `attention.Cache`, N prompts.
      prompt_mask: [N, P] bool.
      cache: list over layers of `attention.Cache`, B completions, C tokens.
      place: [] int32, where in the cache the tokens go: a step after the other,
        from 0 again after C - 1.
      count: [] or [B] int32, tokens of each completion with this one, 1 to C.
      ended: [B] bool, completions of which nothing is used any more.
      keep_products: whether to return what kernels make.
      routing: asks for a record, [B, L, k], at most.

    Returns:
      logits [B, V] of the token after it, and the new cache.
    """
    x = self._embed(params, tokens[:, None])  # [B, 1, D]
    views = [
        (
            [jnp.take(x, positions, axis=0)[:, None] for x in rotation],
            attention.visible_in_cache(
                prompt_mask=prompt_mask,
                prompt_positions=positions_of(prompt_mask),
                positions=positions,
                length=cache[0].keys.shape[3],
                place=place,
                count=count,
                window=kind.window,
                ended=ended,
            ),
        )
        for kind, rotation in zip(self.config.kinds, rotations, strict=True)
    ]
    new_cache, choices, made = [], [], []
    for layer_params, kind, prompt, own in zip(
        params['layers'],
        self.config.layer_kinds,
        prompt_cache,
        cache,
        strict=True,
    ):
      rotation, visible = views[kind]
      attend = self.attend_to_cache(
          prompt=prompt, cache=own, visible=visible, **self._scores()
      )
      tape = self._tape(keep_products)
      x, kept, routed = self._block(
          # One layer at a time.
          quantization.widen(layer_params, self.dtype),
          x,
          rotation=rotation,
          attend=attend,
          tape=tape,
          routing=routing,
      )
      new_cache.append(kept)
      choices.append(routed.choices)
      if keep_products:
        made.append(jax.tree.map(lambda x: x[:, 0], tape.products))
    routed = experts.Routed()
    if routing.record:
      routed = routed._replace(choices=jnp.stack(choices, axis=-2)[:, 0])
    if keep_products:
      made = jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *made)
    else:
      made = None
    return self.head(params, x[:, 0]), Kept(new_cache, routed, made)

  def empty_cache(self, batch: int, length: int, dtype: Any) -> list:
    """A list over layers of `attention.Cache`."""
    config = self.config
    sizes = config.num_key_value_heads, config.head_dim
    return [
        attention.empty_cache(batch, length, *sizes, dtype)
        for _ in range(config.num_hidden_layers)
    ]

  def empty_products(self, num_entries: int) -> products_lib.Products:
    """A buffer for what kernels make of so many tokens. [L, E, F] each."""
    token = jnp.zeros((1, 1), jnp.int32)
    _, kept = jax.eval_shape(lambda: self.trunk(
        self.init(jax.random.key(0)), token, positions=token,
        segment_ids=token, keep_products=True,
    ))
    return jax.tree.map(
        lambda x: jnp.zeros((len(x), num_entries, x.shape[-1]), x.dtype),
        kept.products,
    )

  def _embed(self, params: PyTree, tokens: jax.Array) -> jax.Array:
    embedding = params['embed']['embedding']
    x = layers.lookup(embedding, tokens).astype(self.dtype)
    return x * jnp.asarray(self.config.embedding_multiplier, self.dtype)

  def _rotation(
      self, kind: layers.LayerKind, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    return rope.angles(
        positions,
        head_dim=self.config.head_dim,
        theta=kind.rope_theta,
        scaling=kind.rope_scaling,
    )

  def _scores(self) -> dict[str, Any]:
    """How attention scores are scaled and capped."""
    return {
        'scale': self.config.attention_scale,
        'cap': self.config.attn_logit_softcapping,
    }

  def _tape(self, keep_products, made=None) -> products_lib.Tape:
    """Of one layer."""
    if keep_products and made is not None:
      raise ValueError('Products that were kept are not kept again.')
    if keep_products:
      return products_lib.Recorder(attention=self.keeps_attention)
    return products_lib.no_tape if made is None else products_lib.Player(made)

  def _block(
      self, layer_params: PyTree, x: jax.Array, *, routing, **arguments
  ) -> tuple[jax.Array, PyTree, experts.Routed]:
    graph = _block_graph(self.family.Block, self.config)
    block = nnx.merge(graph, layer_params)
    if self.config.num_experts:
      return block(x, routing=routing, spread=self.by_experts, **arguments)
    return *block(x, **arguments), experts.Routed()

  def _unstack(self, stacked: PyTree) -> list:
    """[L, ...] leaves -> a list of L trees."""
    take = lambda layer: jax.tree.map(lambda x: x[layer], stacked)
    return [take(i) for i in range(self.config.num_hidden_layers)]


def _remat_policy(name: str) -> Callable[..., bool]:
  """Which results are kept, of those in `REMAT` but 'none'."""
  policies = jax.checkpoint_policies
  if name == 'full':
    return policies.nothing_saveable
  if name != 'products':
    return getattr(policies, name)

  def keeps(primitive, *arguments, **params):
    # Of experts, and cuDNN's. XLA's attention has axes of a batch.
    return primitive.name.startswith(
        ('ragged_dot', 'dot_product_attention_fwd')
    ) or policies.dots_with_no_batch_dims_saveable(
        primitive, *arguments, **params
    )

  return keeps


def _layers_last(x: PyTree, axis: int) -> PyTree:
  """Moves the scanned axis of an array, if there is one, to `axis`."""
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, axis), x)


def positions_of(mask: jax.Array) -> jax.Array:
  """Positions that count real tokens only. [B, T] bool -> [B, T] int32."""
  return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=-1) - 1, 0)


@functools.cache
def _block_graph(block: type[nnx.Module], config: layers.ModelConfig):
  make = lambda: block(config, rngs=nnx.Rngs(params=0))
  return nnx.split(nnx.eval_shape(make))[0]


@functools.cache
def _norm_graph(norm: type[nnx.Module], config: layers.ModelConfig):
  make = lambda: _make_norm(norm, config)
  return nnx.split(nnx.eval_shape(make))[0]


def _make_norm(norm: type[nnx.Module], config: layers.ModelConfig):
  """The norm after the last layer."""
  return norm(config.hidden_size, epsilon=config.rms_norm_eps)
