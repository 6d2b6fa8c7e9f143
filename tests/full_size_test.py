"""The folders of the paper's runs say what their configs say, and add up."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / 'experiments' / 'full_size'

spec = importlib.util.spec_from_file_location('cost', FOLDER / 'cost.py')
cost = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cost)

each_folder = pytest.mark.parametrize('folder', cost.FOLDERS)


def test_every_readme_holds_what_the_script_prints():
  for path, content in cost.readmes().items():
    assert cost.marked(path.read_text()) == content, (
        f'{path}: run python experiments/full_size/cost.py --write'
    )


def test_every_folder_is_a_run_and_every_run_has_a_folder():
  folders = {x.parent.name for x in FOLDER.glob('*/README.md')}
  assert folders == set(cost.FOLDERS)


def test_links_point_to_files():
  for path in FOLDER.rglob('README.md'):
    for target in re.findall(r'\]\(([^)#\s]+)', path.read_text()):
      if '://' not in target:
        assert (path.parent / target).exists(), f'{path}: {target}'


@each_folder
def test_the_commands_ask_for_the_devices_of_the_mesh(folder):
  config = cost.get_config(folder)
  count = cost.num_devices(config)
  text = (FOLDER / folder / 'README.md').read_text()
  block = text.partition('```\n')[2].partition('```')[0]
  words = shlex.split(block)
  [topology] = [x for x in words if x.startswith('--topology=v5p:')]
  chips = 1
  for size in topology.partition(':')[2].split('x'):
    chips *= int(size)
  assert chips == count
  assert f'TYPE=v5p-{2 * count}' in words  # Two cores a chip.
  assert f'--nodes={count // 8}' in words
  assert words.count(cost.config_flag(folder)) == 3


@pytest.mark.parametrize('folder, other', cost.SAME_STEP.items())
def test_who_has_the_plan_of_another_has_its_step(folder, other):
  mine, theirs = (cost.get_config(x).to_dict() for x in (folder, other))
  for config in (mine, theirs):
    del config['total_steps'], config['model']['name']
  assert mine == theirs
  sizes = [
      cost.load.read_sizes(cost.get_config(x).model.name)[1]
      for x in (folder, other)
  ]
  # A limit, and no part of what is computed.
  mine, theirs = (
      dataclasses.replace(x, max_position_embeddings=0) for x in sizes
  )
  assert mine == theirs


def test_the_arithmetic_of_the_dense_run():
  # Qwen3-8B: 8.19e9 parameters, of them 151,936 x 4,096 = 0.62e9 embedding;
  # 36 layers of 32 heads of 128, 8 of them for keys and values.
  todo = cost.work('dense_base')
  assert todo.sequences == 128 * 8
  assert todo.row == 1024 + 8000 - 1
  assert todo.met == pytest.approx(7.57e9, rel=1e-3)
  assert todo.attention == 4 * 36 * 32 * 128 * 9023
  slot = 8 * 7.57e9 + 2.5 * 5.32e9
  assert todo.learner_flops == pytest.approx(1024 * 9023 * slot, rel=1e-3)
  # 1,024 completions of 2,000 to 8,000 tokens in 256 slots.
  assert todo.decode_steps == (8000, 32000)
  # 16 slots on 4 devices: 16 / 4 * 9,024 tokens * 36 * 2 * 8 * 128 * 2 bytes.
  assert todo.cache_bytes == 4 * 9024 * 147456
  assert todo.decode_bytes - todo.cache_bytes == pytest.approx(8.19e9 / 2, 1e-3)
  # v5p, cheap end: 6.8e17 / (64 * 459e12 * 0.4) = 58 s of learning.
  learn, _ = cost.seconds('dense_base', cost.CHIPS[0])
  assert learn.low == pytest.approx(58, rel=0.01)
  assert learn.high == pytest.approx(2 * learn.low)


def test_a_step_of_the_sanity_run_reads_five_eighths_of_the_room():
  # Four stages of 6,976 tokens: 1,744, 3,488, 5,232 and 6,976 places.
  todo = cost.work('sanity')
  assert todo.decode_steps == (6976, 6976)
  # 64 slots on a device, 28 layers, keys and values of 2 heads of 128.
  assert todo.cache_bytes == 64 * (1024 + 4360) * 28 * 2 * 2 * 128 * 2


@each_folder
def test_the_dear_end_is_dearer(folder):
  for chip in cost.CHIPS:
    hours = cost.chip_hours(folder, chip)
    assert 0 < hours.low < hours.high


def test_lora_saves_the_gradients_of_the_weights():
  assert cost.work('moe_base_lora').passes == 6
  assert cost.work('moe_base').passes == 8
