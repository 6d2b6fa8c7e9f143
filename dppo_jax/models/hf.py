"""What families share of Hugging Face's configs and names.

The transformers library is imported late and without its advertisements. A
family reads its config by naming what it needs here and refusing what it has
not built, so that nothing in a `config.json` is silently ignored.
"""

import dataclasses
import os
import types
from typing import Any

from dppo_jax.models import layers
from dppo_jax.models import rope

# Path in our tree below `layers` -> name in a Hugging Face layer. Every {} is
# a stacked axis: the layer, and below `experts` the expert.
ATTENTION = {
    f'attention/{part}/kernel': f'self_attn.{part}_proj.weight'
    for part in 'qkvo'
}
QKV_BIAS = {
    f'attention/{part}/bias': f'self_attn.{part}_proj.bias' for part in 'qkv'
}
QK_NORM = {
    f'attention/{part}_norm/scale': f'self_attn.{part}_norm.weight'
    for part in 'qk'
}
GATED_MLP = {
    f'mlp/{part}/kernel': f'mlp.{part}_proj.weight'
    for part in ('gate', 'up', 'down')
}
PRE_NORMS = {
    'norm_attention/scale': 'input_layernorm.weight',
    'norm_mlp/scale': 'post_attention_layernorm.weight',
}

# Fields that have the same name here and there, in every family.
_SIZES = (
    'vocab_size',
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
    'num_key_value_heads',
    'rms_norm_eps',
    'max_position_embeddings',
)


def transformers() -> types.ModuleType:
  """Only files and text need it, and it is slow to import.

  Without torch it would announce at every import that models cannot be used;
  ours need none of them.
  """
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  import transformers as module

  return module


def sizes(hf_config: Any) -> dict[str, Any]:
  """The fields of `ModelConfig` that every family has, but for the rope."""
  # No field of any family, but transformers heeds it in all of them.
  refuse_unless(hf_config, is_causal=True)
  head_dim = getattr(hf_config, 'head_dim', None)
  if head_dim is None:
    head_dim = hf_config.hidden_size // hf_config.num_attention_heads
  return {name: getattr(hf_config, name) for name in _SIZES} | {
      'model_type': hf_config.model_type,
      'head_dim': head_dim,
      'tie_word_embeddings': bool(hf_config.tie_word_embeddings),
  }


def make_config(name: str, config: layers.ModelConfig, **more) -> Any:
  """A transformers config of class `name` with `sizes` and what is added."""
  shared = {name: getattr(config, name) for name in _SIZES} | {
      'head_dim': config.head_dim,
      'tie_word_embeddings': config.tie_word_embeddings,
  }
  return getattr(transformers(), name)(**shared, **more)


def refuse_unless(hf_config: Any, **built) -> None:
  """Raises ValueError if a setting, where it exists, is not the one built."""
  for name, value in built.items():
    actual = getattr(hf_config, name, value)
    # None and false are both "not used".
    if (actual or None) != (value or None):
      raise ValueError(
          f'{name}={actual!r} is not supported for {hf_config.model_type}, '
          f'only {value!r}.'
      )


def activation(hf_config: Any, name: str = 'hidden_act') -> dict[str, str]:
  """The field `hidden_act`."""
  actual = getattr(hf_config, name)
  if actual not in layers.ACTIVATIONS:
    raise ValueError(
        f'{name}={actual!r} is not supported for {hf_config.model_type}, only '
        f'{", ".join(sorted(layers.ACTIVATIONS))}.'
    )
  return {'hidden_act': actual}


def rope_fields(parameters: dict[str, Any]) -> dict[str, Any]:
  """The fields `rope_theta` and `rope_scaling`."""
  kind = parameters.get('rope_type', 'default')
  if kind != 'default' and kind not in rope.SCALINGS:
    raise ValueError(
        f'rope_type={kind!r} is not supported, only default, '
        f'{", ".join(sorted(rope.SCALINGS))}.'
    )
  if parameters.get('partial_rotary_factor', 1.0) != 1:
    raise ValueError(
        f'partial_rotary_factor={parameters["partial_rotary_factor"]} is not '
        'supported, only 1.0.'
    )
  scaling = None
  if kind != 'default':
    make = rope.SCALINGS[kind]
    for name in ('mscale', 'mscale_all_dim'):
      if parameters.get(name) is not None:
        raise ValueError(f'{name}={parameters[name]} of rope is not supported.')
    fields = {field.name: field.default for field in dataclasses.fields(make)}
    given = {
        name: parameters[name]
        for name in fields
        # transformers takes null for what is not given, and here for false.
        if parameters.get(name) is not None
        or (name == 'truncate' and name in parameters)
    }
    missing = [
        name for name, default in fields.items()
        if name not in given and default is dataclasses.MISSING
    ]
    if missing:
      raise ValueError(f'rope_type={kind!r} needs {", ".join(missing)}.')
    scaling = make(**given)
  theta = parameters.get('rope_theta')
  # Those of kinds of layers may have a theta beside them, transformers' own.
  of_kinds = any(isinstance(x, dict) for x in parameters.values())
  if theta is None or of_kinds:
    found = ', '.join(map(str, parameters))
    raise ValueError(
        f'rope_parameters with {found} is not supported, only with rope_theta.'
    )
  return {'rope_theta': float(theta), 'rope_scaling': scaling}


def rope_parameters(
    theta: float, scaling: rope.Scaling | None = None
) -> dict[str, Any]:
  """What `rope_fields` reads."""
  if scaling is None:
    return {'rope_type': 'default', 'rope_theta': theta}
  kinds = {make: kind for kind, make in rope.SCALINGS.items()}
  return {
      'rope_type': kinds[type(scaling)],
      'rope_theta': theta,
      **dataclasses.asdict(scaling),
  }


def one_window(hf_config: Any) -> dict[str, Any]:
  """The fields of a sliding window that all layers have, or none has."""
  window = hf_config.sliding_window
  kind = layers.FULL if window is None else layers.SLIDING
  return {
      'sliding_window': window,
      'layer_types': (kind,) * hf_config.num_hidden_layers,
  }


def listed_windows(hf_config: Any) -> dict[str, Any]:
  """The fields of a sliding window that some layers have."""
  unknown = set(hf_config.layer_types) - {layers.FULL, layers.SLIDING}
  if unknown:
    raise ValueError(
        f'layer_types holds {sorted(unknown)[0]!r}, which is not supported for '
        f'{hf_config.model_type}, only {layers.FULL!r} and {layers.SLIDING!r}.'
    )
  return {
      'sliding_window': hf_config.sliding_window,
      'layer_types': tuple(hf_config.layer_types),
  }
