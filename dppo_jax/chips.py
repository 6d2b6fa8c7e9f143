"""Published rates of the chips for which a step can be planned.

They are ceilings: what a program reaches is less, and measured elsewhere.
"""

from typing import Any, NamedTuple


class Chip(NamedTuple):
  """Rates of one chip, which is one device here.

  Attributes:
    name: as in the name of a topology.
    flops: bfloat16 operations per second.
    memory: bytes of HBM.
    memory_bandwidth: bytes per second.
    link_bandwidth: bytes per second that leave the chip over all links.
    torus_axes: of the interconnect; each has two of the links.
    source: of the numbers.
    options: for the compiler to make one device of a chip.
  """

  name: str
  flops: float
  memory: int
  memory_bandwidth: float
  link_bandwidth: float
  torus_axes: int
  source: str
  options: dict[str, Any] = {}


_CLOUD = 'https://cloud.google.com/tpu/docs/'
# Where "bidirectional" bandwidth is published, half of it leaves the chip.
CHIPS = {chip.name: chip for chip in (
    Chip(
        'v4', 275e12, 32 * 2**30, 1.2e12, 6 * 50e9, 3,
        _CLOUD + 'v4; links: arXiv:2304.01433 Table 4',
        {'chip_config_name': 'megacore'},
    ),
    Chip(
        'v5e', 197e12, 16 * 10**9, 819e9, 400e9 / 2, 2, _CLOUD + 'v5e'
    ),
    Chip(
        'v5p', 459e12, 95 * 2**30, 2765e9, 1200e9 / 2, 3, _CLOUD + 'v5p'
    ),
    Chip(
        'v6e', 918e12, 32 * 10**9, 1638e9, 800e9 / 2, 2, _CLOUD + 'v6e'
    ),
)}
