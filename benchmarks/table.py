"""Writes the tables of benchmarks/README.md from benchmarks/results/.

    python benchmarks/table.py

Run it after a benchmark has written its result there. There is a table of the
newest result of each machine and name, results/MACHINE/NAME-DATE.json.
"""

import json
import pathlib

_HERE = pathlib.Path(__file__).parent
_START, _END = '<!-- results -->\n', '<!-- end of results -->'


def machine_line(result: dict) -> str:
  """Where and when a result was measured."""
  m = result['machine']
  return (
      f'{m["date"]}, commit {m["commit"]}, {m["cpus"]} x {m["cpu"]}, '
      f'{m["devices"]} x {m["device"]}, Python {m["python"]}, '
      f'jax {m["versions"]["jax"]}, load average {m["load_average"]}.'
  )


def sizes_of(result: dict) -> str:
  """'prompts 64, group 8'."""
  return ', '.join(f'{k} {v}' for k, v in result['sizes'].items())


def range_of(spread: dict, unit: str = '') -> str:
  """'1.58 s (1.54 to 2.20)'."""
  low, high = spread['min'], spread['max']
  return f'{spread["median"]:.3g}{unit} ({low:.3g} to {high:.3g})'


def step_table(result: dict) -> str:
  """One column of numbers for a step."""
  check, memory = result['check'], result['memory']
  split, cold = result['split'], result['cold_start_s']
  tokens = result['tokens_per_s']
  device = memory['peak_device_bytes']
  parts = [x for x in cold if x != 'total']
  spelled = ', '.join(f'{x.replace("_", " ")} {cold[x]:.1f}' for x in parts)
  rows = {
      'step': range_of(result['step_s'], ' s'),
      '— learn': range_of(split['learn_s'], ' s'),
      '— sample': range_of(split['sample_s'], ' s'),
      '— score': range_of(split['score_s'], ' s'),
      'tokens of a step': f'{result["tokens_per_step"]:.0f}',
      'tokens/s, whole step': tokens['whole_step'],
      'tokens/s, sampling': tokens['sampled'],
      'tokens/s, learning': tokens['learned'],
      'compilation of the step': f'{result["compile_s"]:.1f} s',
      'cold start to the first update': f'{cold["total"]:.1f} s ({spelled})',
      'peak host memory': _megabytes(memory['peak_host_bytes']),
      'peak device memory': _megabytes(device) if device else 'not counted',
      'temporary memory of the step': _megabytes(
          memory['step_temporary_bytes']
      ),
  }
  for name, value in check.items():
    if '/' in name:
      rows[f'check: {name}'] = range_of(value)
  lines = [f'| {name} | {value} |' for name, value in rows.items()]
  title = f'### A step of `{result["algorithm"]}`, model `{result["model"]}`'
  sizes = sizes_of(result)
  about = f'{sizes}. {machine_line(result)}'
  head = f'{title}\n\n{about}\n\n| | median |\n|---|---|'
  return '\n'.join([head, *lines])


def divergences_table(result: dict) -> str:
  """One row for each divergence and loss."""
  lines = []
  for row in result['rows']:
    names = f'| `{row["divergence"]}` | `{row["loss"]}` |'
    if 'skipped' in row:
      lines.append(f'{names} skipped: {row["skipped"]} | | | | |')
      continue
    lines.append(
        f'{names} {range_of(row["learn_ratio"])} '
        f'| {range_of(row["sample_ratio"])} '
        f'| {row["step_ratio"]:.3f} '
        f'| {row.get("temporary_ratio", float("nan")):.2f} '
        f'| {row["record_bytes_per_token"]:.0f} |'
    )
  sizes = sizes_of(result)
  if result.get('clock') == 'cpu':
    sizes += ', in CPU seconds'
  head = (
      '### Divergences and losses, relative to `ratio_gap`\n\n'
      f'{sizes}. {machine_line(result)}\n\n'
      '| divergence | loss | learn | sample | both | temporary memory '
      '| record, bytes a token |\n|---|---|---|---|---|---|---|'
  )
  return '\n'.join([head, *lines])


def rollout_table(result: dict) -> str:
  """One row for each number of slots and of halvings."""
  lines = [
      # Older results were never halved.
      f'| {row["slots"]} | {row.get("halvings", 0)} '
      f'| {range_of(row["seconds"], " s")} '
      f'| {range_of(row["speedup"])} | {row["model_calls"]} '
      f'| {_megabytes(row["temporary_bytes"])} |'
      for row in result['rows']
  ]
  sizes = sizes_of(result)
  head = (
      '### Slots that are filled again, against all completions at once\n\n'
      f'{sizes}: {result["tokens"]} tokens, {result["mean_length"]} a '
      f'completion, at most {result["longest"]}. {machine_line(result)}\n\n'
      '| slots | halved | time | times as fast | calls of the model '
      '| temporary memory |\n|---|---|---|---|---|---|'
  )
  return '\n'.join([head, *lines])


def learner_table(result: dict) -> str:
  """One row for each layout of the learner's rows."""
  name = lambda row: row['row_length'] or (
      # Older results have no such rows.
      'shared prompts' if row.get('share_prompts') else 'as sampled'
  )
  lines = [
      f'| {name(row)} '
      f'| {row["microbatches_run"]} of {row["num_microbatches"]} '
      f'| {row["sampled_share"]:.2f} | {range_of(row["seconds"], " s")} '
      f'| {range_of(row["speedup"])} | {_megabytes(row["temporary_bytes"])} |'
      for row in result['rows']
  ]
  sizes = sizes_of(result)
  head = (
      '### Rows of the learner, against the fastest as sampled\n\n'
      f'{sizes}: {result["tokens"]} tokens, {result["mean_length"]} a '
      f'completion. {machine_line(result)}\n\n'
      '| row length | micro-batches run | slots that predict a sampled token '
      '| time of an update | times as fast | temporary memory |\n'
      '|---|---|---|---|---|---|'
  )
  return '\n'.join([head, *lines])


def attention_table(result: dict) -> str:
  """One row for each way to attend, and length of rows."""
  lines = [
      f'| {row["row_length"]} | {row["cut"]} '
      f'| {range_of(row["seconds"], " s")} '
      f'| {range_of(row["speedup"])} | {_megabytes(row["temporary_bytes"])} |'
      for row in result['rows']
  ]
  sizes = sizes_of(result)
  head = (
      '### Attention of packed rows, against that of whole rows\n\n'
      f'{sizes}. {machine_line(result)}\n\n'
      '| row length | slots of a stretch: stretches before it: farthest slots '
      '| time, forwards and backwards | times as fast | temporary memory |\n'
      '|---|---|---|---|---|'
  )
  return '\n'.join([head, *lines])


def floor_table(result: dict) -> str:
  """Decoding and learning over what the machine could do."""
  billions = lambda x: f'{x["median"] / 1e9:.0f}'

  def line(row):
    # Since 2026-11-28.
    lasting = 'over_sustained' in row
    sustained = (
        f'{range_of(row["over_sustained"])}, '
        f'at {billions(row["sustained_flops"])} GFLOP/s' if lasting else ''
    )
    return (
        f'| {row["work"]} | {range_of(row["seconds"], " s")} '
        f'| {range_of(row["floor_seconds"], " s")} '
        f'| {range_of(row["over_floor"])} | {sustained} '
        f'| {billions(row["flops"])} GFLOP/s, '
        f'{billions(row["bandwidth"])} GB/s |'
    )

  lines = [line(row) for row in result['rows']]
  sizes = sizes_of(result)
  head = (
      '### A decode step and an update, over their floor\n\n'
      f'{sizes}, float32. {machine_line(result)}\n\n'
      '| | time | floor | times the floor | times that of sustained rates '
      '| measured beside it |\n'
      '|---|---|---|---|---|---|'
  )
  return '\n'.join([head, *lines])


def accelerator_table(result: dict) -> str:
  """A step on an accelerator: seconds, tokens, and shares of its rates."""
  rates, shares = result['rates'], result['shares']
  rows = {
      'sampling': range_of(result['seconds']['sample'], ' s'),
      'an update': range_of(result['seconds']['learn'], ' s'),
      **{
          f'tokens/s, {name}': f'{value:.0f}'
          for name, value in result['tokens_per_s'].items()
      },
      **{
          name.replace('_', ' '): f'{value / 1e12:.3g} T/s'
          for name, value in rates.items()
      },
      **{
          name.replace('_', ' '): f'{100 * value:.1f} %'
          for name, value in shares.items()
      },
  }
  lines = [f'| {name} | {value} |' for name, value in rows.items()]
  sizes = sizes_of(result)
  head = (
      '### A step on an accelerator\n\n'
      f'{sizes}. {machine_line(result)}\n\n| | |\n|---|---|'
  )
  return '\n'.join([head, *lines])


def load_memory_table(result: dict) -> str:
  """One row for each way to read a model."""
  sizes = result['sizes']
  lines = [
      f'| {row["case"]}, {row["devices"]} device(s) | {row["dtype"]} '
      f'| {_megabytes(row["parameters_bytes"])} '
      f'| {_megabytes(row["largest_bytes"])} '
      f'| {_megabytes(row["peak_bytes"])} | {row["peak_ratio"]:.2f} '
      f'| {row["seconds"]:.1f} s |'
      for row in result['rows']
  ]
  head = (
      '### Host memory of reading a model\n\n'
      f'bfloat16, {_megabytes(sizes["file_bytes"])} in {sizes["files"]} files. '
      f'{machine_line(result)}\n\n'
      '| onto | as | parameters | largest | peak | peak / parameters | time |\n'
      '|---|---|---|---|---|---|---|'
  )
  return '\n'.join([head, *lines])


def peers_table(result: dict) -> str:
  """One row for each size and kind of lengths."""
  lines = []
  for row in result['rows']:
    seconds, faster = row['step_s'], row['times_as_fast']
    settings = ', '.join(
        f'{name} {value}'
        for name, value in row['settings']['dppo_jax'].items()
    )
    lines.append(
        f'| {row["size"]}, {row["lengths"]} '
        f'| {range_of(seconds["dppo_jax"], " s")} '
        f'| {range_of(seconds["trl"], " s")} | {range_of(faster["trl"])} '
        f'| {range_of(seconds["tunix"], " s")} | {range_of(faster["tunix"])} '
        f'| {settings} | {row["settings"]["trl"]["microbatch"]} '
        f'| {row["settings"]["tunix"]["microbatch"]} |'
    )
  sizes = sizes_of(result)
  trl, tunix = result['versions']['trl'], result['versions']['tunix']
  head = (
      '### A whole step, against TRL and Tunix\n\n'
      f'{sizes}. trl {trl["trl"]} (torch {trl["torch"]}, transformers '
      f'{trl["transformers"]}), google-tunix {tunix["google-tunix"]} (jax '
      f'{tunix["jax"]}). {machine_line(result)}\n\n'
      '| model, lengths | dppo_jax | TRL | times as fast | Tunix '
      '| times as fast | our settings | TRL micro-batch | Tunix micro-batch |\n'
      '|---|---|---|---|---|---|---|---|---|'
  )
  return '\n'.join([head, *lines])


def turns_table(result: dict) -> str:
  """One column of ratios."""
  changes = ' '.join(filter(None, [result['base_env'], result['base_options']]))
  other = f'commit {result["base"]}' + (f' with `{changes}`' if changes else '')
  memory, sizes = result['memory_ratio'], result['memory']
  rows = {
      kind: f'{x["ratio"]:.3f} (pairs: median {x["median_of_pairs"]:.3f}, '
      f'standard error {x["error"]:.3f})'
      for kind, x in (
          ('seconds', result['step_s']), ('CPU seconds', result['cpu_s'])
      )
  } | {
      f'memory: {kind}': f'{memory[kind]:.4f} '
      f'({_megabytes(sizes["this"][kind])}, {_megabytes(sizes["base"][kind])})'
      for kind in ('total', 'temporary')
  }
  lines = [f'| {name} | {value} |' for name, value in rows.items()]
  same = 'the same lengths' if result['same_lengths'] else 'other lengths'
  head = (
      f'### A whole step, against {other}\n\n'
      f'`{result["options"]}`; {sizes_of(result)}, {same} drawn. '
      f'{machine_line(result)}\n\n'
      '| | ratio to the other |\n|---|---|'
  )
  return '\n'.join([head, *lines])


def headline(result: dict) -> str:
  """The figure of a result that should not become worse unseen."""
  rows = [x for x in result.get('rows', ()) if 'skipped' not in x]
  match result['benchmark']:
    case 'step':
      return f'{range_of(result["step_s"], " s")} a step'
    case 'turns':
      return f'{result["step_s"]["ratio"]:.3f} of the seconds of the other'
    case 'divergences':
      # `topk_tv`, unless that was left out: they are in order.
      return f'`{rows[-1]["divergence"]}` {rows[-1]["step_ratio"]:.3f} in both'
    case 'rollout' | 'learner' | 'attention':
      best = max(rows, key=lambda x: x['speedup']['median'])
      faster, seconds = best['speedup'], range_of(best['seconds'], ' s')
      return f'{range_of(faster)} times as fast, {seconds}'
    case 'floor':
      found = (f'{x["work"]} {range_of(x["over_floor"])}' for x in rows)
      return f'{", ".join(found)} times the floor'
    case 'accelerator':
      return f'{result["tokens_per_s"]["both"]:.0f} tokens/s'
    case 'load_memory':
      return f'{max(x["peak_ratio"] for x in rows):.2f} of the parameters'
    case 'peers':
      found = [range_of(x['step_s']['dppo_jax'], ' s') for x in rows]
      return f'{", ".join(found)} a step of dppo_jax'


def _megabytes(count: int) -> str:
  return f'{count / 1e6:.0f} MB'


TABLES = {
    'step': step_table,
    'turns': turns_table,
    'divergences': divergences_table,
    'rollout': rollout_table,
    'learner': learner_table,
    'attention': attention_table,
    'floor': floor_table,
    'accelerator': accelerator_table,
    'load_memory': load_memory_table,
    'peers': peers_table,
}


def table_of(result: dict, older: dict | None) -> str:
  """A table, with what its headline figure was before, if that is known."""
  table = TABLES[result['benchmark']](result)
  if older is None:
    return table
  title, _, rest = table.partition('\n\n')
  date, commit = (older['machine'][x] for x in ('date', 'commit'))
  before = (
      f'Before, {date}, commit {commit}: {headline(older)}. '
      f'Now: {headline(result)}.'
  )
  return f'{title}\n\n{before}\n\n{rest}'


def tables_of(folder: pathlib.Path) -> str:
  """Of the newest result of each machine and name."""
  kept = {}
  for path in sorted(folder.glob('*/*.json')):
    name = path.stem[: -len('-2026-11-23')]
    found = kept.setdefault((path.parent, name), [])
    found.append(json.loads(path.read_text()))
  pairs = [([None] + x)[-2:] for x in kept.values()]
  pairs.sort(key=lambda x: list(TABLES).index(x[1]['benchmark']))
  return '\n\n'.join(table_of(result, older) for older, result in pairs)


def main():
  """Replaces what stands between the two marks."""
  text = tables_of(_HERE / 'results')
  readme = _HERE / 'README.md'
  before, _, rest = readme.read_text().partition(_START)
  after = rest.partition(_END)[2]
  readme.write_text(f'{before}{_START}\n{text}\n\n{_END}{after}')


if __name__ == '__main__':
  main()
