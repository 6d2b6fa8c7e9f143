"""LoRA: a low-rank change to chosen projections (arXiv:2106.09685).

    kernel + alpha / rank * a @ b

A transform of parameter trees that no model knows about: `init` makes adapters
for the kernels that path rules choose, `merge` adds them to the frozen tree,
and the merged tree is a tree like any other. A gradient with respect to the
adapters goes through `merge`, so only they are trained and only they have
optimizer state:

    loss(lora.merge(frozen, adapters, alpha=16.0))

Kernels are [L, in, out], stacked over L layers, or [L, E, in, out] with E
experts; then a is [L, in, r] and b [L, r, out], or the same with E. Folders are
in PEFT's format (github.com/huggingface/peft: docs/source/developer_guides/
checkpoint.md and src/peft/tuners/lora/config.py).
"""

from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dppo_jax import registry
from dppo_jax.models import weights
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import PyTree

# Projections by the name they have in our tree; PEFT calls them q_proj, ...
TARGETS = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')

_CONFIG = 'adapter_config.json'
_WEIGHTS = 'adapter_model.safetensors'
_PREFIX = 'base_model.model.'


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
    {path of a kernel: {'a': [L, in, r], 'b': [L, r, out]}}, float32. a is
    uniform up to 1 / sqrt(in), as PEFT draws it.
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
    adapters[path] = {
        'a': jax.random.uniform(
            key_a, (*stacked, inputs, rank), minval=-limit, maxval=limit
        ),
        'b': jnp.zeros((*stacked, rank, outputs)),
    }
  return adapters


def merge(params: PyTree, adapters: PyTree, *, alpha: float) -> PyTree:
  """The full tree: kernel + alpha / r * a @ b where there is an adapter.

  Args:
    params: stacked parameter tree; nothing flows back into it.
    adapters: from `init`.
    alpha: scale of the change, for any rank.

  Returns:
    a tree like `params`, in its dtypes. The sum is taken in float32.
  """
  flat = weights.flatten(jax.lax.stop_gradient(params))
  unknown = sorted(set(adapters) - set(flat))
  if unknown:
    raise ValueError(
        f'{unknown[0]!r} has an adapter but is no parameter. Do the adapters '
        'belong to this model?'
    )
  for path, adapter in adapters.items():
    kernel, (a, b) = flat[path], (adapter['a'], adapter['b'])
    change = jnp.matmul(a, b, preferred_element_type=jnp.float32)
    scale = alpha / a.shape[-1]
    flat[path] = (kernel + scale * change).astype(kernel.dtype)
  return weights.unflatten(flat)


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
  tensors = {}
  for parameter in _adapted(model, adapters):
    pair = jax.device_get(adapters[parameter.path])
    for name, part in parameter.names():
      for which, theirs in (('a', 'lora_A'), ('b', 'lora_B')):
        # PEFT has A as [r, in] and B as [out, r].
        tensors[_peft_name(name, theirs)] = np.ascontiguousarray(
            pair[which][part].T
        )
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  ranks = {pair['a'].shape[-1] for pair in adapters.values()}
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
  adapters, used = {}, set()
  for parameter in weights.parameters(model):
    pair = _read_pair(parameter, stored, rank=contents['r'])
    if pair is not None:
      adapters[parameter.path], names = pair
      used |= names
  left = sorted(set(stored) - used)
  if left or not adapters:
    raise ValueError(
        f'{folder / _WEIGHTS}: {left[0] if left else "no tensor"!r} does not '
        f'belong to this {model.config.model_type}. Load the model that was '
        'adapted.'
    )
  return adapters, float(contents['lora_alpha'])


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
    raise ValueError(f'No parameter is one of targets={list(targets)}.')
  return chosen


def _adapted(model: CausalLM, adapters: PyTree) -> list[weights.Parameter]:
  """The parameters that have an adapter, with their names."""
  found = [p for p in weights.parameters(model) if p.path in adapters]
  unknown = sorted(set(adapters) - {parameter.path for parameter in found})
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
) -> tuple[PyTree, set[str]] | None:
  """The adapter of a parameter, if any, and the names of its tensors."""
  if not parameter.transposed:
    return None
  *_, inputs, outputs = parameter.shape
  shapes = {'lora_A': (rank, inputs), 'lora_B': (outputs, rank)}
  names = {
      (_peft_name(name, which), part): shape
      for name, part in parameter.names()
      for which, shape in shapes.items()
  }
  present = [name for name, _ in names if name in stored]
  if not present:
    return None
  stacked = parameter.shape[: parameter.num_stacked]
  pair = {
      'a': np.empty((*stacked, inputs, rank), np.float32),
      'b': np.empty((*stacked, rank, outputs), np.float32),
  }
  for (name, part), shape in names.items():
    if name not in stored:
      raise ValueError(
          f'{stored[present[0]].file}: {name!r} is missing; adapters of some '
          'layers only are not supported.'
      )
    tensor = stored[name]
    if tensor.shape != shape:
      raise ValueError(
          f'{tensor.file}: tensor {name!r} has shape {tensor.shape}, r={rank} '
          f'and the model say {shape}.'
      )
    values = tensor.read(tuple(slice(0, n) for n in shape))
    pair['a' if '.lora_A.' in name else 'b'][part] = values.T
  return jax.tree.map(jnp.asarray, pair), set(present)
