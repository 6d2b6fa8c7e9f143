"""Sizes halve, in as many equal steps as are asked for."""

from hypothesis import given
from hypothesis import strategies as st
import pytest

from dppo_jax import halvings


@pytest.mark.parametrize('arguments, expected', [
    ((12, 0), [12]),
    ((12, 2), [12, 6, 3]),
    ((8, 1, 2), [8, 6, 4]),
    ((64, 2, 2), [64, 48, 32, 24, 16]),
    ((24, 2, 3), [24, 20, 16, 12, 10, 8, 6]),
    ((7, 0, 3), [7]),
])
def test_sizes_halve_in_equal_steps(arguments, expected):
  assert halvings.sizes(*arguments) == expected


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
def test_every_multiple_of_the_divisor_can_be_halved(
    multiple, num_halvings, num_steps
):
  size = multiple * halvings.divisor(num_halvings, num_steps)
  sizes = halvings.sizes(size, num_halvings, num_steps)
  assert len(sizes) == num_halvings * num_steps + 1
  assert sizes[::num_steps] == [
      size / 2**i for i in range(num_halvings + 1)
  ]
  assert sizes == sorted(set(sizes), reverse=True)


def test_a_size_that_cannot_be_halved_is_refused_with_one_that_can():
  with pytest.raises(
      ValueError,
      match='20 cannot be halved 3 times in 2 equal .* use a multiple of 16',
  ):
    halvings.sizes(20, 3, 2)
