"""What reading a model's weights holds in the host's memory.

    python benchmarks/load_memory.py --name=load_memory

Writes a Qwen3 of random bfloat16 weights (about 380 MB in files of 64 MB), then
reads it in a new process for each case and looks at the largest resident set
during the reading, over what was resident just before. On a CPU the parameters
themselves are in that memory, so 1.0 is what cannot be avoided, and on an
accelerator it would be 0; what is above is one parameter at a time, stacked
over layers (`largest`), in the files' type and in its own.

  whole    onto one device,
  sharded  straight onto 8 devices of an fsdp axis (fake ones, of one host).
"""

# ruff: noqa: E402
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

# Neither configs/ nor benchmarks/ is installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import app
from absl import flags

_NAME = flags.DEFINE_string('name', None, 'Keeps the result under it.')
_LAYERS = flags.DEFINE_integer('layers', 10, 'Of the model.', lower_bound=1)
_FOLDER = flags.DEFINE_string('folder', None, 'Only reads it: one case.')
_DTYPE = flags.DEFINE_string('dtype', 'bfloat16', 'Of that case.')
_SHARDED = flags.DEFINE_bool('sharded', False, 'Of that case.')
_DEVICES = 8
_FILE_BYTES = 64 * 10**6


def write(folder: pathlib.Path, num_layers: int) -> None:
  """Random weights of a small Qwen3, in several files."""
  import jax
  import ml_dtypes
  import numpy as np

  from dppo_jax.models import layers
  from dppo_jax.models import load
  from dppo_jax.models import qwen3
  from dppo_jax.models.causal_lm import CausalLM

  model = CausalLM(family=qwen3, config=layers.ModelConfig(
      model_type='qwen3',
      vocab_size=32768,
      hidden_size=1024,
      intermediate_size=3072,
      num_hidden_layers=num_layers,
      num_attention_heads=16,
      num_key_value_heads=8,
      head_dim=128,
      rope_theta=1e6,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
      max_position_embeddings=4096,
  ))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda x: rng.standard_normal(x.shape, np.float32).astype(
          ml_dtypes.bfloat16
      ),
      jax.eval_shape(model.init, jax.random.key(0)),
  )
  load.save_pretrained(
      model, folder, params=params, max_shard_bytes=_FILE_BYTES
  )


def read(folder: str, *, dtype: str, sharded: bool) -> dict:
  """One case, in this process, which must not have done anything before."""
  import jax

  from benchmarks import machine
  from dppo_jax import sharding
  from dppo_jax.models import load

  size = jax.device_count() if sharded else 1
  mesh = sharding.make_mesh(
      data=jax.device_count() // size, fsdp=size, tensor=1, expert=1
  )
  load.read_config(pathlib.Path(folder))  # Imports what reading needs.
  before = machine.resident_bytes()
  start = time.perf_counter()
  params = load.from_pretrained(
      folder,
      dtype=dtype,
      shardings=(lambda x: sharding.of_params(x, mesh)) if sharded else None,
  ).params
  jax.block_until_ready(params)
  seconds = time.perf_counter() - start
  peak = machine.peak_host_bytes() - before
  sizes = [x.nbytes for x in jax.tree.leaves(params)]
  return {
      'case': 'sharded' if sharded else 'whole',
      'dtype': dtype,
      'devices': jax.device_count(),
      'parameters_bytes': sum(sizes),
      'largest_bytes': max(sizes),
      'peak_bytes': peak,
      'peak_ratio': round(peak / sum(sizes), 3),
      'seconds': round(seconds, 2),
  }


def in_new_process(folder: str, *, dtype: str, sharded: bool) -> dict:
  """`read`, where nothing was in memory before."""
  count = _DEVICES if sharded else 1
  done = subprocess.run(
      [sys.executable, __file__, f'--folder={folder}', f'--dtype={dtype}',
       f'--sharded={sharded}'],
      env=os.environ | {
          'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': f'--xla_force_host_platform_device_count={count}',
      },
      capture_output=True,
      text=True,
      check=False,
  )
  if done.returncode:
    raise RuntimeError(done.stderr[-3000:])
  return json.loads(done.stdout.splitlines()[-1])


def main(argv):
  """All cases, or the one that --folder asks for."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected argument {argv[1]!r}.')
  if _FOLDER.value:
    case = read(_FOLDER.value, dtype=_DTYPE.value, sharded=_SHARDED.value)
    print(json.dumps(case))
    return
  from benchmarks import machine

  with tempfile.TemporaryDirectory() as folder:
    write(pathlib.Path(folder), _LAYERS.value)
    files = list(pathlib.Path(folder).glob('*.safetensors'))
    rows = [
        in_new_process(folder, dtype=dtype, sharded=sharded)
        for sharded in (False, True)
        for dtype in ('bfloat16', 'float32')
    ]
    result = {
        'benchmark': 'load_memory',
        'sizes': {
            'layers': _LAYERS.value,
            'files': len(files),
            'file_bytes': sum(path.stat().st_size for path in files),
        },
        'rows': rows,
    }
  machine.report(result | {'machine': machine.describe()}, _NAME.value)


if __name__ == '__main__':
  app.run(main)
