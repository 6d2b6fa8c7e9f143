"""Sizes that a program may go on with as there is less and less to do.

What is computed for a fixed number of rows or slots, and needs fewer of them
now and then, is compiled for several numbers. They halve, as every size costs a
compilation, with a few in between where that pays.
"""


def sizes(size: int, num_halvings: int, num_steps: int = 1) -> list[int]:
  """From `size` down to `size / 2**num_halvings`, in equal steps to each half.

  Args:
    size: a multiple of `divisor(num_halvings, num_steps)`.
    num_halvings: 0 for `size` alone.
    num_steps: to a half; 2 for three quarters in between.

  Raises:
    ValueError: a size would not be a whole number.
  """
  if size % divisor(num_halvings, num_steps):
    raise ValueError(
        f'{size} cannot be halved {num_halvings} times in {num_steps} equal '
        f'steps each; use a multiple of {divisor(num_halvings, num_steps)}.'
    )
  halves = [size >> i for i in range(num_halvings + 1)]
  return [
      half - half * step // (2 * num_steps)
      for half in halves[:-1] for step in range(num_steps)
  ] + halves[-1:]


def divisor(num_halvings: int, num_steps: int = 1) -> int:
  """Of what can be halved so often, in so many equal steps to each half."""
  return 2**num_halvings * num_steps if num_halvings else 1
