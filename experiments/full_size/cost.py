"""What the paper's runs are and would cost: the tables of the READMEs here.

    python experiments/full_size/cost.py [--write]

prints the tables, or writes them into the READMEs between their marks. It is
arithmetic on configs, published sizes and published rates, for want of a
measurement: nobody has run these. Two ends of a range are given wherever
something is assumed; their products are ranges, not confidence intervals.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
import sys
from typing import NamedTuple

from absl import app
from absl import flags
import ml_collections

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parents[1]))  # configs/

from configs.paper import sanity  # noqa: E402
from configs.paper import scaling  # noqa: E402
from dppo_jax import chips  # noqa: E402
from dppo_jax import decoding  # noqa: E402
from dppo_jax.models import load  # noqa: E402
from dppo_jax.models.causal_lm import CausalLM  # noqa: E402

_WRITE = flags.DEFINE_bool('write', False, 'Write instead of printing.')

PLANS = HERE.parents[1] / 'benchmarks' / 'results' / 'plans'
# Whose step is another's: only weights and the number of steps differ.
SAME_STEP = {'moe_thinking': 'moe_base'}
FOLDERS = (*scaling.COLUMNS, 'sanity')
BEGIN, END = '<!-- From here on: cost.py -->', '<!-- Until here: cost.py -->'


class Range(NamedTuple):
  """The cheap end and the dear end of something."""

  low: float
  high: float

  def __str__(self):
    return f'{number(self.low)} to {number(self.high)}'


class Chip(NamedTuple):
  """Published rates: bfloat16 operations and bytes of HBM per second."""

  name: str
  flops: float
  bandwidth: float
  source: str


_V5P = chips.CHIPS['v5p']
CHIPS = (
    Chip('TPU v5p', _V5P.flops, _V5P.memory_bandwidth, _V5P.source),
    Chip(
        'H100 SXM', 989e12, 3.35e12,
        'https://www.nvidia.com/en-us/data-center/h100/ (without sparsity)',
    ),
)
# Topologies of v5p by number of chips; an accelerator type counts two cores
# each. https://cloud.google.com/tpu/docs/v5p
TOPOLOGIES = {8: '2x2x2', 64: '4x4x4', 256: '4x8x8'}
GPUS_OF_A_NODE = 8

# Assumed, ours.
MEAN_LENGTH = Range(0.25, 1.0)  # Of a completion, as a share of its limit.
LEARNER = Range(0.4, 0.2)  # Share of the published operations per second.
SAMPLER = Range(0.7, 0.3)  # Share of the published bandwidth.


@dataclasses.dataclass(frozen=True)
class Work:
  """Of one step, over all devices unless said otherwise."""

  sequences: int
  row: int  # Slots of a row of the learner: prompt and completion.
  parameters: int
  met: int  # Parameters that a token is multiplied by.
  passes: int  # Operations for each of them and each slot.
  attention: float  # Operations of one slot in one forward pass.
  decode_steps: Range
  eval_steps: float  # Decode steps of evaluation, spread over all steps.
  decode_bytes: float  # Read by one device in one decode step.
  cache_bytes: float  # Of them, keys and values.

  @property
  def learned_slots(self) -> int:
    return self.sequences * self.row

  @property
  def learner_flops(self) -> float:
    # Four forward passes' worth, over 10/16 of the pairs: causal in four
    # stretches (models/attention.py).
    per_slot = self.passes * self.met + 4 * 10 / 16 * self.attention
    return self.learned_slots * per_slot


def get_config(folder: str) -> ml_collections.ConfigDict:
  """The config of a folder's run."""
  if folder == 'sanity':
    return sanity.get_config()
  return scaling.get_config(folder)


def config_flag(folder: str) -> str:
  """How its command line names it."""
  name = 'sanity.py' if folder == 'sanity' else f'scaling.py:{folder}'
  return f'--config=configs/paper/{name}'


def num_devices(config: ml_collections.ConfigDict) -> int:
  return math.prod(config.mesh.values())


@functools.cache
def work(folder: str) -> Work:
  """What a step has to do."""
  config = get_config(folder)
  family, sizes = load.read_sizes(config.model.name)
  total, met = CausalLM(config=sizes, family=family).num_parameters()
  met -= sizes.vocab_size * sizes.hidden_size  # Looked up, not multiplied.
  limit = config.max_completion_length
  sequences = config.num_prompts * config.group_size
  slots = config.sampling.num_slots or sequences
  if config.sampling.num_slots:  # Refilled as completions end.
    steps = Range(*(sequences * x * limit / slots for x in MEAN_LENGTH))
    room = limit
  else:  # Until the longest has ended, in stages with more room each.
    steps = Range(limit, limit)
    room = statistics.mean(
        decoding.stage_lengths(limit, decoding.default_stages(limit))
    )
  shards = config.mesh.data * config.mesh.fsdp
  # Keys and values of all that a slot has room for, bfloat16.
  cache = (
      slots / shards * (config.max_prompt_length + room)
      * sizes.num_hidden_layers * 2 * sizes.num_key_value_heads
      * sizes.head_dim * 2 / config.mesh.tensor
  )
  row = config.max_prompt_length + limit - 1
  return Work(
      sequences=sequences,
      row=row,
      parameters=total,
      met=met,
      # Forward twice (remat='full'), backward to the inputs, and to the
      # weights if they are trained: 2 operations each.
      passes=6 if config.lora.rank else 8,
      attention=4.0 * sizes.num_hidden_layers * sizes.num_attention_heads
      * sizes.head_dim * row,
      decode_steps=steps,
      eval_steps=limit / config.eval.every,
      decode_bytes=2 * total / config.mesh.tensor + cache,
      cache_bytes=cache,
  )


def seconds(folder: str, chip: Chip) -> tuple[Range, Range]:
  """Of a step: (learning, sampling with its share of evaluation)."""
  todo, count = work(folder), num_devices(get_config(folder))
  learn = (
      todo.learner_flops / (count * chip.flops * share) for share in LEARNER
  )
  sample = (
      (steps + todo.eval_steps) * todo.decode_bytes / (chip.bandwidth * share)
      for steps, share in zip(todo.decode_steps, SAMPLER, strict=True)
  )
  return Range(*learn), Range(*sample)


def chip_hours(folder: str, chip: Chip) -> Range:
  """Of the whole run."""
  config = get_config(folder)
  chip_steps = config.total_steps * num_devices(config)
  return Range(*(
      chip_steps * (learn + sample) / 3600
      for learn, sample in zip(*seconds(folder, chip), strict=True)
  ))


def number(x: float, decimals: int = 2) -> str:
  """Three significant digits, with separators or a power of ten."""
  if x >= 1e6:
    digits, _, exponent = f'{x:.{decimals}e}'.partition('e')
    return f'{digits}e{int(exponent)}'
  if x >= 100:
    return f'{float(f"{x:.3g}"):,.0f}'
  return f'{x:.3g}'


def table(*rows: tuple[str, ...]) -> str:
  """A Markdown table; the first row is its head."""
  head, *body = rows
  lines = [head, ('---',) * len(head), *body]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _facts(folder: str) -> str:
  config = get_config(folder)
  mesh = ', '.join(f'{k}={v}' for k, v in config.mesh.items() if v > 1)
  updates = config.learner.num_epochs * config.learner.num_minibatches
  task = config.task
  data = task.train.name if 'train' in task else task.train_path
  rows = [
      ('', ''),
      ('model', f'`{config.model.name}`'),
      ('data', f'`{data}`'),
      ('algorithm', f'`{config.algorithm}`, threshold '
       f'{config.divergence.threshold:g}, ratio cap {config.loss.ratio_cap:g}'),
      ('a step', f'{config.num_prompts} prompts x {config.group_size}, '
       f'{updates} updates, learning rate {config.optimizer.learning_rate:g}'),
      ('lengths', f'{config.max_prompt_length:,} tokens of prompt, '
       f'{config.max_completion_length:,} of completion'),
      ('steps', f'{config.total_steps:,}, evaluation every '
       f'{config.eval.every}'),
      ('mesh', f'{mesh}: {num_devices(config)} devices'),
  ]
  if config.lora.rank:
    rows.append(('LoRA', f'rank {config.lora.rank}, alpha '
                 f'{config.lora.alpha:g}, {", ".join(config.lora.targets)}'))
  if config.model.router_replay:
    rows.append(('routing', 'replayed (R3): `config.model.router_replay=True`'))
  return table(*rows)


def _commands(folder: str) -> str:
  count = num_devices(get_config(folder))
  flag, workdir = config_flag(folder), f'--workdir=/runs/{folder}'
  name = folder.replace('_', '-')
  return f"""```
python -m dppo_jax.plan {flag} --topology=v5p:{TOPOLOGIES[count]}

TPU={name} ZONE=us-east5-a TYPE=v5p-{2 * count} \\
  SOURCE=https://HOST/OWNER/dppo_jax SHARE=10.0.0.2:/runs \\
  experiments/launch/tpu_vm.sh {flag} {workdir}

sbatch --nodes={count // GPUS_OF_A_NODE} experiments/launch/slurm.sbatch \\
  {flag} {workdir}
```"""


def _plan(folder: str) -> str:
  """What the first command printed when it was last kept."""
  if folder in SAME_STEP:
    other = SAME_STEP[folder]
    return (
        f'The plan is that of [{other}](../{other}/README.md): but for weights '
        'and the number of steps, the configs are the same.'
    )
  path = PLANS / f'{folder}.txt'
  if not path.exists():
    return 'The plan was not made yet.'
  _, when, said = path.read_text().split('\n', 2)
  head = (
      f'The plan says ({when}, `python benchmarks/plans.py {folder}`; seconds '
      'are lower bounds, see [docs/plans.md](../../../docs/plans.md)):'
  )
  return f'{head}\n\n```\n{said.strip()}\n```'


def _cost(folder: str) -> str:
  todo, config = work(folder), get_config(folder)
  count = num_devices(config)
  weights = todo.decode_bytes - todo.cache_bytes
  slots = config.sampling.num_slots
  lengths = '' if not slots else (
      f'{todo.sequences:,} completions x '
      f'{MEAN_LENGTH.low:g} to {MEAN_LENGTH.high:g} of '
      f'{config.max_completion_length:,} tokens / {slots:,} slots'
  )
  rows = [
      ('of a step', 'arithmetic', ''),
      ('slots of the learner', f'{todo.sequences:,} x {todo.row:,}',
       number(todo.learned_slots)),
      ('operations of a slot',
       f'{todo.passes} x {number(todo.met)} parameters + '
       f'2.5 x {number(todo.attention)} of attention',
       number(todo.learner_flops / todo.learned_slots)),
      ('operations of the learner', 'their product',
       number(todo.learner_flops)),
      ('decode steps', lengths or 'until the longest completion has ended',
       str(todo.decode_steps) if slots else number(todo.decode_steps.low)),
      ('... of evaluation', f'{config.max_completion_length:,} / '
       f'{config.eval.every}', number(todo.eval_steps)),
      ('bytes that a device reads for each',
       f'weights 2 x {number(todo.parameters)} / {config.mesh.tensor} + '
       f'cache {number(todo.cache_bytes)}',
       number(weights + todo.cache_bytes)),
  ]
  for chip in CHIPS:
    learn, sample = seconds(folder, chip)
    rows += [
        (f'{chip.name}: learning, s',
         f'at {LEARNER.low:.0%} to {LEARNER.high:.0%} of {count} x '
         f'{number(chip.flops)}/s', str(learn)),
        (f'{chip.name}: sampling, s',
         f'at {SAMPLER.low:.0%} to {SAMPLER.high:.0%} of '
         f'{number(chip.bandwidth, 3)} bytes/s', str(sample)),
        (f'**{chip.name}: chip-hours of the run**',
         f'{config.total_steps:,} steps x {count} chips x s / 3,600',
         f'**{chip_hours(folder, chip)}**'),
    ]
  return table(*rows)


def section(folder: str) -> str:
  """What stands in a folder's README between the marks."""
  return f"""{_facts(folder)}

{_commands(folder)}

{_plan(folder)}

An estimate, nobody has run it; what is assumed is in [the index](../README.md).

{_cost(folder)}"""


def index() -> str:
  """What stands in the README of all folders between the marks."""
  rows = [('', 'devices', 'steps', 'operations of the learner, a step',
           *(f'chip-hours, {chip.name}' for chip in CHIPS))]
  for folder in FOLDERS:
    config = get_config(folder)
    rows.append((
        f'[{folder}]({folder}/README.md)', str(num_devices(config)),
        f'{config.total_steps:,}', number(work(folder).learner_flops),
        *(str(chip_hours(folder, chip)) for chip in CHIPS),
    ))
  rates = [('', 'bfloat16 operations/s', 'bytes of HBM/s', 'source')]
  for chip in CHIPS:
    rates.append((chip.name, number(chip.flops), number(chip.bandwidth, 3),
                  chip.source))
  return f'{table(*rows)}\n\n{table(*rates)}'


def readmes() -> dict[pathlib.Path, str]:
  """Each README and what belongs between its marks."""
  return {HERE / 'README.md': index()} | {
      HERE / folder / 'README.md': section(folder) for folder in FOLDERS
  }


def marked(text: str) -> str:
  """What stands between the marks of a README."""
  return text.partition(BEGIN)[2].partition(END)[0].strip()


def main(_):
  for path, content in readmes().items():
    if not _WRITE.value:
      print(f'{path.relative_to(HERE)}\n\n{content}\n')
      continue
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f'{before}{BEGIN}\n\n{content}\n\n{END}{after}')


if __name__ == '__main__':
  app.run(main)
