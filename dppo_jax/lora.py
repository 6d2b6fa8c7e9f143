"""LoRA: a low-rank change to chosen projections (arXiv:2106.09685).

    kernel + alpha / rank * a @ b

Two transforms of parameter trees that no model knows about. `attach` puts the
unmerged sum in the place of each kernel: a product with it costs what the rank
costs, and a gradient reaches the adapters only, so only they have optimizer
state. `merge` adds the change to the kernel, for sampling and for export.

Kernels are [L, in, out], stacked over L layers, or [L, E, in, out] with E
experts; then a is [L, in, r] and b [L, r, out], or the same with E. Adapters
are a tree like the parameters, with {'a', 'b'} in the place of the kernels that
have one, and nothing else. Folders are in PEFT's format
(github.com/huggingface/peft: docs/source/developer_guides/checkpoint.md and
src/peft/tuners/lora/config.py).
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dppo_jax import registry
from dppo_jax.models import layers
from dppo_jax.models import weights
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import PyTree

# Projections by the name they have in our tree; PEFT calls them q_proj, ...
TARGETS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')

_CONFIG = 'adapter_config.json'
_WEIGHTS = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=['kernel', 'a', 'b'],
    meta_fields=['scale'],
)
@dataclasses.dataclass(frozen=True)
class LowRankSum:
  """kernel + scale * a @ b, which is never computed.

  Stands where a model has a kernel: it can be sliced by layer (as a pytree),
  cast, and multiplied from the left, which is all that a projection does.
  """

  kernel: Any  # [..., in, out]
  a: Any  # [..., in, r]
  b: Any  # [..., r, out]
  scale: float

  def __getitem__(self, index: Any) -> 'LowRankSum':
    """What reading a parameter does: `kernel[...]`."""
    if index is not Ellipsis:
      raise TypeError('Only the whole of a LowRankSum can be read.')
    return self

  def astype(self, dtype: Any) -> 'LowRankSum':
    return jax.tree.map(lambda x: x.astype(dtype), self)

  def __rmatmul__(self, x: jax.Array) -> jax.Array:
    low = layers.times(layers.times(x, self.a), self.b)
    return layers.times(x, self.kernel) + self.scale * low


def init(
    params: PyTree,
    key: jax.Array,
    *,
    rank: int,
    targets: Sequence[str] = TARGETS,
) -> PyTree:
  """Adapters that change nothing yet: a is random, b is zero.

  Args:
    params: stacked parameter tree, or the shapes of one.
    key: typed PRNG key, consumed.
    rank: r.
    targets: which projections, of `TARGETS`.

  Returns:
    adapters, float32. a is uniform up to 1 / sqrt(in), as PEFT draws it.
  """
  if rank < 1:
    raise ValueError(f'rank={rank} must be at least 1.')
  chosen = _chosen(params, targets)
  adapters = {}
  keys = jax.random.split(key, len(chosen))
  for (path, kernel), key_a in zip(chosen.items(), keys, strict=True):
    *stacked, inputs, outputs = kernel.shape
    if rank > min(inputs, outputs):
      raise ValueError(
          f'rank={rank} is larger than {path!r} has of inputs ({inputs}) or '
          f'outputs ({outputs}); use at most {min(inputs, outputs)}.'
      )
    limit = inputs**-0.5
    adapters[f'{path}/a'] = jax.random.uniform(
        key_a, (*stacked, inputs, rank), minval=-limit, maxval=limit
    )
    adapters[f'{path}/b'] = jnp.zeros((*stacked, rank, outputs))
  return weights.unflatten(adapters)


def attach(params: PyTree, adapters: PyTree, *, alpha: float) -> PyTree:
  """The tree for learning: a `LowRankSum` where there is an adapter.

  Args:
    params: stacked parameter tree; nothing flows back into it.
    adapters: from `init`.
    alpha: scale of the change, for any rank.

  Returns:
    a tree that models take for one of parameters. Kernels of experts are merged
    in it, because a grouped product needs the whole of them.
  """

  def put(kernel, a, b, scale):
    if kernel.ndim > 3:
      return _sum(kernel, a, b, scale)
    return LowRankSum(kernel, a, b, scale)

  return _replace(params, adapters, alpha, put)


def merge(params: PyTree, adapters: PyTree, *, alpha: float) -> PyTree:
  """The tree for sampling and export: kernel + alpha / r * a @ b.

  Args:
    params: stacked parameter tree; nothing flows back into it.
    adapters: from `init`.
    alpha: scale of the change, for any rank.

  Returns:
    a tree like `params`, in its dtypes. The sum is taken in float32.
  """
  return _replace(params, adapters, alpha, _sum)


def _replace(
    params: PyTree,
    adapters: PyTree,
    alpha: float,
    put: Callable[..., Any],
) -> PyTree:
  """The tree with `put(kernel, a, b, scale)` where there is an adapter."""
  flat = weights.flatten(jax.lax.stop_gradient(params))
  for path, pair in _pairs(adapters).items():
    if path not in flat:
      raise ValueError(
          f'{path!r} has an adapter but is no parameter. Do the adapters '
          'belong to this model?'
      )
    scale = alpha / pair['a'].shape[-1]
    flat[path] = put(flat[path], pair['a'], pair['b'], scale)
  return weights.unflatten(flat)


def _sum(kernel, a, b, scale):
  change = jnp.matmul(a, b, preferred_element_type=jnp.float32)
  return (kernel + scale * change).astype(kernel.dtype)


def _pairs(adapters: PyTree) -> dict[str, dict[str, Any]]:
  """{path of a kernel: {'a': ..., 'b': ...}}."""
  pairs: dict[str, dict[str, Any]] = {}
  for path, x in weights.flatten(adapters).items():
    kernel, which = path.rsplit('/', 1)
    pairs.setdefault(kernel, {})[which] = x
  return pairs


def save_pretrained(
    model: CausalLM,
    adapters: PyTree,
    folder: str | os.PathLike,
    *,
    alpha: float,
    base: str = '',
) -> None:
  """Writes a folder that PEFT loads.

  Args:
    model: the architecture, which knows Hugging Face's names.
    adapters: from `init`.
    folder: made if it does not exist.
    alpha: as in `merge`.
    base: folder or hub name of the model that was adapted, for PEFT.
  """
  tensors, pairs = {}, _pairs(adapters)
  for parameter in _adapted(model, pairs):
    pair = jax.device_get(pairs[parameter.path])
    for name, part in parameter.names():
      for which, theirs in (('a', 'lora_A'), ('b', 'lora_B')):
        # PEFT has A as [r, in] and B as [out, r].
        tensors[_peft_name(name, theirs)] = np.ascontiguousarray(
            pair[which][part].T
        )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  ranks = {pair['a'].shape[-1] for pair in pairs.values()}
  if len(ranks) != 1:
    raise ValueError(f'Adapters of one folder have one rank, not {ranks}.')
  modules = {_module(name) for name in tensors}
  contents = {
      'peft_type': 'LORA',
      'task_type': 'CAUSAL_LM',
      'base_model_name_or_path': base,
      'r': ranks.pop(),
      'lora_alpha': alpha,
      'lora_dropout': 0.0,
      'bias': 'none',
      'fan_in_fan_out': False,
      'inference_mode': True,
      'target_modules': sorted(modules),
  }
  (folder / _CONFIG).write_text(json.dumps(contents, indent=2))
  safetensors.numpy.save_file(
      tensors, folder / _WEIGHTS, metadata={'format': 'pt'}
  )


def load_pretrained(
    model: CausalLM, folder: str | os.PathLike
) -> tuple[PyTree, float]:
  """Reads such a folder, ours or PEFT's: adapters and their alpha."""
  folder = pathlib.Path(folder)
  for file in (_CONFIG, _WEIGHTS):
    if not (folder / file).is_file():
      raise FileNotFoundError(
          f'{folder} has no {file}; it is no folder of adapters.'
      )
  contents = weights.read_json(folder / _CONFIG)
  _refuse(contents, folder / _CONFIG)
  stored = weights.stored_in_file(folder / _WEIGHTS)
  adapters: dict[str, Any] = {}
  used: set[str] = set()
  for parameter in weights.parameters(model):
    pair = _read_pair(parameter, stored, rank=contents['r'])
    if pair is not None:
      adapters[f'{parameter.path}/a'], adapters[f'{parameter.path}/b'] = pair[0]
      used |= pair[1]
  left = sorted(set(stored) - used)
  if left or not adapters:
    raise ValueError(
        f'{folder / _WEIGHTS}: {left[0] if left else "no tensor"!r} does not '
        f'belong to this {model.config.model_type}. Load the model that was '
        'adapted.'
    )
  return weights.unflatten(adapters), float(contents['lora_alpha'])


def _chosen(params: PyTree, targets: Sequence[str]) -> dict[str, Any]:
  """Path -> kernel of the projections, in the order of the tree."""
  for target in targets:
    if target not in TARGETS:
      raise ValueError(registry.unknown('target', target, TARGETS))
  endings = tuple(f'/{target}/kernel' for target in targets)
  chosen = {
      path: x
      for path, x in weights.flatten(params).items()
      if path.startswith('layers/') and path.endswith(endings)
  }
  if not chosen:
    raise ValueError(
        f'No parameter is one of config.lora.targets={list(targets)}; there '
        f'may be {", ".join(TARGETS)}.'
    )
  return chosen


def _adapted(
    model: CausalLM, pairs: dict[str, Any]
) -> list[weights.Parameter]:
  """The parameters that have an adapter, with their names."""
  found = [p for p in weights.parameters(model) if p.path in pairs]
  unknown = sorted(set(pairs) - {parameter.path for parameter in found})
  if unknown:
    raise ValueError(
        f'{unknown[0]!r} has an adapter but is no parameter of this '
        f'{model.config.model_type}.'
    )
  return found


def _peft_name(name: str, which: str) -> str:
  """'a.q_proj.weight' -> 'base_model.model.a.q_proj.lora_A.weight'."""
  return f'{_PREFIX}{name.removesuffix(".weight")}.{which}.weight'


def _module(name: str) -> str:
  """The last name of the module, 'q_proj': PEFT's target_modules."""
  return name.split('.')[-3]


def _refuse(contents: dict[str, Any], path: pathlib.Path) -> None:
  """Raises ValueError for what would be silently wrong."""
  for name in ('r', 'lora_alpha'):
    if not isinstance(contents.get(name), (int, float)):
      raise ValueError(f'{path} has no number {name}.')
  wanted = {
      'peft_type': 'LORA', 'bias': 'none', 'use_rslora': False,
      'use_dora': False, 'fan_in_fan_out': False, 'rank_pattern': {},
      'alpha_pattern': {}, 'modules_to_save': None,
  }
  for name, value in wanted.items():
    actual = contents.get(name, value)
    # None, false and {} are all "not used".
    if (actual or None) != (value or None):
      raise ValueError(
          f'{path}: {name}={actual!r} is not supported, only {value!r}.'
      )


def _read_pair(
    parameter: weights.Parameter,
    stored: dict[str, weights.StoredTensor],
    *,
    rank: int,
) -> tuple[tuple[jax.Array, jax.Array], set[str]] | None:
  """(a, b) of a parameter, if it has them, and the names of their tensors."""
  if not parameter.transposed:
    return None
  *_, inputs, outputs = parameter.shape
  stacked = parameter.shape[: parameter.num_stacked]
  pair = (
      np.empty((*stacked, inputs, rank), np.float32),
      np.empty((*stacked, rank, outputs), np.float32),
  )
  places = {
      _peft_name(name, which): out[part]
      for name, part in parameter.names()
      for which, out in zip(('lora_A', 'lora_B'), pair)
  }
  present = set(places) & set(stored)
  if not present:
    return None
  for name, place in places.items():
    if name not in stored:
      raise ValueError(
          f'{stored[min(present)].file}: {name!r} is missing; adapters of some '
          'layers only are not supported.'
      )
    tensor = stored[name]
    if tensor.shape != place.T.shape:
      raise ValueError(
          f'{tensor.file}: tensor {name!r} has shape {tensor.shape}, r={rank} '
          f'and the model say {place.T.shape}.'
      )
    place[...] = tensor.read(tuple(slice(0, n) for n in tensor.shape)).T
  return (jnp.asarray(pair[0]), jnp.asarray(pair[1])), present
