"""Mixture of experts: a router sends each token to a few of E gated MLPs.

Dropless: every token reaches all the experts it chose, however many others
chose them too. Tokens are sorted by expert and multiplied group by group
(`jax.lax.ragged_dot`), so there is neither a capacity nor padding, and a
sequence's result does not depend on its batch mates. XLA has a grouped product
for it on TPU; on CPU it multiplies all rows with all experts, which is good for
tests only. M tokens, D width, E experts, k experts of a token, F inner width of
an expert.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from dppo_jax.models import layers
from dppo_jax.models import products
from dppo_jax.types import PyTree


class Routing(NamedTuple):
  """What is asked of routers beside experts for each token; nothing here.

  Attributes:
    replay: [..., k], experts to take in place of the router's own choice. Their
      weights are still the router's, so it goes on learning (rollout routing
      replay, arXiv:2510.11370). An axis of layers [B, T, L, k] where many
      layers are asked at once.
    record: whether to say which experts were taken.
    counted: [...] bool, tokens over which the balance is measured.
  """

  replay: jax.Array | None = None
  record: bool = False
  counted: jax.Array | None = None


class Routed(NamedTuple):
  """What routers answer; () where it was not asked for.

  Attributes:
    choices: [..., k] of the smallest unsigned type, experts taken.
    changed: [...] float32, share of a token's experts that the router would
      not have taken itself; with a replay only.
    balance: [] float32, see `balance_loss`.
  """

  choices: PyTree = ()
  changed: PyTree = ()
  balance: PyTree = ()


def choice_dtype(num_experts: int):
  """The smallest that can name an expert: rollouts hold many of them."""
  return jnp.uint8 if num_experts <= 256 else jnp.uint16


def balance_loss(
    *, probs: jax.Array, choices: jax.Array, counted: jax.Array
) -> jax.Array:
  """How unevenly a layer uses its experts; k if it uses all alike.

  E * sum over experts of f * P: f is the share of tokens that take the expert,
  P its mean probability, which carries the gradient (Switch Transformers,
  arXiv:2101.03961 Eq. 4 to 6, there times a coefficient and with k = 1). The
  transformers library computes the same, but f and P over all layers at once.

  Args:
    probs: [M, E], the router's, over all experts.
    choices: [M, k] int32, experts that were taken.
    counted: [M] bool; 0 if no token counts.
  """
  num_experts = probs.shape[-1]
  weights = counted / jnp.maximum(jnp.sum(counted), 1)  # [M]
  taken = jnp.sum(jax.nn.one_hot(choices, num_experts), axis=1)  # [M, E]
  share, mean = weights @ taken, weights @ probs  # [E]
  return num_experts * jnp.sum(share * mean)


class Router(nnx.Module):
  """The k most likely experts of a token and their weights.

  Softmax over all experts, then top-k (Qwen3-MoE, arXiv:2505.09388); with
  `norm_topk_prob` the k weights are divided by their sum, which equals softmax
  over the k largest logits (Mixtral, arXiv:2401.04088).
  """

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    self.num_chosen = config.num_experts_per_tok
    self.normalize = config.norm_topk_prob
    shape = (config.hidden_size, config.num_experts)
    scale = config.hidden_size**-0.5
    self.kernel = nnx.Param(
        scale * jax.random.normal(rngs.params(), shape)
    )

  def __call__(
      self, x: jax.Array, routing: Routing = Routing()
  ) -> tuple[jax.Array, jax.Array, Routed]:
    """[M, D] -> choices [M, k] int32, weights [M, k], and what was asked."""
    logits = x @ self.kernel[...].astype(x.dtype)  # [M, E]
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, choices = jax.lax.top_k(probs, self.num_chosen)
    routed = Routed()
    if routing.replay is not None:
      own, choices = choices, routing.replay.astype(jnp.int32)
      weights = jnp.take_along_axis(probs, choices, axis=-1)
      shared = jnp.any(own[:, :, None] == choices[:, None, :], axis=1)
      routed = routed._replace(changed=1.0 - jnp.mean(shared, axis=-1))
    if routing.record:
      kept = choices.astype(choice_dtype(probs.shape[-1]))
      routed = routed._replace(choices=kept)
    if routing.counted is not None:
      routed = routed._replace(balance=balance_loss(
          probs=probs, choices=choices, counted=routing.counted
      ))
    if self.normalize:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return choices, weights.astype(x.dtype), routed


class ExpertLinear(nnx.Module):
  """Kernels of all experts, [E, inputs, outputs]."""

  def __init__(
      self, num_experts: int, inputs: int, outputs: int, *, rngs: nnx.Rngs
  ):
    shape = (num_experts, inputs, outputs)
    scale = inputs**-0.5
    self.kernel = nnx.Param(
        scale * jax.random.normal(rngs.params(), shape)
    )


class Kernels(NamedTuple):
  """Of some experts that stand next to each other, or of a part of them."""

  gate: jax.Array  # [E, D, F]
  up: jax.Array
  down: jax.Array  # [E, F, D]


# spread(mix) of a mix(kernels, x, choices, weights, first), see `_mix`: a
# mix(kernels, x, choices, weights) on all devices of a mesh.
SpreadFn = Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]


class Experts(nnx.Module):
  """E gated MLPs; each token's result is the weighted sum over its choices."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    count, size = config.num_experts, config.hidden_size
    inner = config.moe_intermediate_size
    self.gate = ExpertLinear(count, size, inner, rngs=rngs)
    self.up = ExpertLinear(count, size, inner, rngs=rngs)
    self.down = ExpertLinear(count, inner, size, rngs=rngs)
    self.activation = layers.ACTIVATIONS[config.hidden_act]

  def __call__(
      self,
      x: jax.Array,
      choices: jax.Array,
      weights: jax.Array,
      spread: SpreadFn | None = None,
  ) -> jax.Array:
    """[..., D], [..., k] int32, [..., k] -> [..., D].

    Args:
      x: of the tokens.
      choices: of each.
      weights: of its choices.
      spread: puts [B, T, ...] and kernels on the devices of a mesh, see
        `sharding.by_experts`; without it the compiler does, and sorts all
        tokens together.
    """
    kernels = Kernels(*(
        part.kernel[...].astype(x.dtype)
        for part in (self.gate, self.up, self.down)
    ))
    mix = functools.partial(_mix, activation=self.activation)
    if spread is not None:
      mix = spread(mix)
    return mix(kernels, x, choices, weights)


def _mix(kernels, x, choices, weights, first=None, *, activation):
  """Sums of tokens over those of their experts that are here.

  Args:
    kernels: of experts `first`, `first` + 1, ...
    x: [..., D].
    choices: [..., k] int32, among all experts.
    weights: [..., k].
    first: [] int32; None if all experts are here.
    activation: of the gate.
  """
  shape, num_chosen = x.shape, choices.shape[-1]
  count = len(kernels.gate)
  x, flat = x.reshape(-1, shape[-1]), choices.reshape(-1)  # [M, D], [M * k]
  if first is not None:  # Others come last, behind all groups.
    flat = flat - first
    flat = jnp.where((flat >= 0) & (flat < count), flat, count)
  order = jnp.argsort(flat)  # Stable: ties stay in the order of tokens.
  sizes = jnp.bincount(flat, length=count).astype(jnp.int32)
  rows = jnp.take(x, order // num_chosen, axis=0)
  # What a product makes of rows behind its groups is not defined.
  here = lambda rows: rows if first is None else jnp.where(
      (jnp.arange(len(rows)) < jnp.sum(sizes))[:, None], rows, 0
  )
  rows = here(rows)
  product = lambda rows, kernel: here(jax.lax.ragged_dot(rows, kernel, sizes))
  inner = activation(product(rows, kernels.gate)) * product(rows, kernels.up)
  out = product(inner, kernels.down)  # [M * k, D], sorted by expert.
  out = jnp.take(out, jnp.argsort(order), axis=0)
  out = out.reshape(-1, num_chosen, shape[-1])  # [M, k, D]
  out = jnp.einsum('mkd,mk->md', out, weights.reshape(-1, num_chosen))
  return out.reshape(shape)


class MixtureOfExperts(nnx.Module):
  """A router and its experts, in the place of an MLP. [B, T, D] -> the same."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    self.router = Router(config, rngs=rngs)
    self.experts = Experts(config, rngs=rngs)

  def __call__(
      self,
      x: jax.Array,
      routing: Routing = Routing(),
      spread: SpreadFn | None = None,
  ) -> tuple[jax.Array, Routed]:
    lead = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])  # [M, D]
    replay, record, counted = routing
    choices, weights, routed = self.router(flat, Routing(
        None if replay is None else replay.reshape(flat.shape[0], -1),
        record,
        None if counted is None else counted.reshape(-1),
    ))
    split = lambda x: x.reshape(*lead, *x.shape[1:])
    routed = routed._replace(
        choices=jax.tree.map(split, routed.choices),
        changed=jax.tree.map(split, routed.changed),
    )
    return self.experts(x, split(choices), split(weights), spread), routed


class ExpertBlock(layers.PreNormBlock):
  """`PreNormBlock` whose mlp has experts; also returns what was `Routed`."""

  def __call__(
      self,
      x: jax.Array,
      *,
      rotation,
      attend,
      tape: products.Tape = products.no_tape,
      routing: Routing = Routing(),
      spread: SpreadFn | None = None,
  ) -> tuple[jax.Array, PyTree, Routed]:
    change, kept = self.attention(
        self.norm_attention(x), rotation=rotation, attend=attend, tape=tape
    )
    x = x + change
    change, routed = self.mlp(self.norm_mlp(x), routing, spread)
    return x + change, kept, routed
