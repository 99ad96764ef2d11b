"""The compiled loops against torch, bit by bit where bits matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.worker.weights.families import any_bits
from worker.weights import kernels
from worker.weights.tensors import BF16, F16, F32, Buffer, rounded, widened


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A bfloat16 tensor as the kernels take it."""
    return tensor.view(torch.int16).numpy().view(np.uint16)


def floats(count: int, seed: int) -> torch.Tensor:
    """Any float32 numbers, and none that is NaN."""
    found = any_bits((count,), torch.float32, seed)
    return torch.where(found.isnan(), 0.0, found)


# --- widening and rounding --------------------------------------------------------------------------------------------


def test_every_bfloat16_is_widened_as_it_is_and_rounded_to_itself():
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = widened(every)
    assert np.array_equal(wide.view(np.uint32), every.astype(np.uint32) << 16)
    numbers = ~np.isnan(wide)
    assert np.array_equal(rounded(wide, BF16)[numbers], every[numbers])


def test_nan_stays_nan_whatever_its_bits():
    """Of all ones, adding to which gives zero."""
    odd = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(widened(rounded(odd, BF16))).all()
    assert np.isnan(widened(rounded(odd, F16))).all()


@pytest.mark.parametrize(("dtype", "as_torch"), [(BF16, torch.bfloat16), (F16, torch.float16)])
def test_rounding_is_torchs(dtype, as_torch):
    """Ties, subnormals and what becomes infinity among them."""
    values = floats(1 << 16, 0)
    near = values.numpy().view(np.uint32) & 0xFFFF0000
    ties = torch.from_numpy((near | 0x8000).view(np.float32))
    for each in (values, torch.where(ties.isnan(), 0.0, ties)):
        expected = each.to(as_torch).view(torch.int16).numpy()
        assert np.array_equal(rounded(each.numpy(), dtype).view(np.int16), expected)


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.7, 1e39, 1e-50])
def test_a_decrement_is_the_formula_and_never_a_negative_zero(factor):
    base, tuned = (any_bits((5000,), torch.bfloat16, seed) for seed in (1, 2))
    base[:100] = tuned[:100]
    found = np.empty(5000, np.float32)
    kernels.difference(bits(tuned), bits(base), factor, found)
    expected = ((base.float() - tuned.float()) * torch.tensor(factor, dtype=torch.float32) + 0.0).numpy()
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.isnan(found), ~numbers)
    assert np.array_equal(found[numbers].view(np.uint32), expected[numbers].view(np.uint32))
    assert not (found.view(np.uint32) == 0x80000000).any()


@pytest.mark.parametrize("out", [BF16, F32])
def test_a_sum_is_rounded_once_and_the_largest_is_told(out):
    kept, change = floats(5000, 3), floats(5000, 4)
    made = np.empty(5000, out)
    largest = kernels.add(kept.numpy(), change.numpy(), made)
    total = kept - change
    assert np.uint32(largest) == (total.numpy().view(np.uint32) & 0x7FFFFFFF).max()
    numbers = ~total.isnan().numpy()
    expected = bits(total.bfloat16()) if out == BF16 else total.numpy()
    assert np.array_equal(
        made.view(np.uint8).reshape(5000, -1)[numbers], expected.view(np.uint8).reshape(5000, -1)[numbers]
    )


# --- products ---------------------------------------------------------------------------------------------------------


def product(left: np.ndarray, right: np.ndarray, first: int, last: int) -> np.ndarray:
    made = np.full((last - first, right.shape[1]), np.nan, np.float32)
    kernels.product(*kernels.pack(left, right), 2.0, 1.0, first, made)
    return made


def factors(rows: int, rank: int, columns: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return tuple(generator.standard_normal(shape, np.float32) for shape in ((rows, rank), (rank, columns)))


sides = st.integers(1, 70)


@given(rows=sides, rank=sides, columns=sides, seed=st.integers(0, 99))
def test_a_product_is_summed_rank_after_rank_with_one_rounding_each(rows, rank, columns, seed):
    """float64 holds each product of two float32 numbers, and its sum with a third but for a rounding of its own, which
    moves the float32 result in one case of 2^29: such a one is not among the drawn."""
    left, right = factors(rows, rank, columns, seed)
    expected = np.zeros((rows, columns), np.float32)
    for place in range(rank):
        term = left[:, place, None].astype(np.float64) * right[place]
        expected = (term + expected).astype(np.float32)
    assert np.array_equal(product(left, right, 0, rows), expected * 2 + np.float32(0))


@given(rows=sides, rank=sides, columns=sides, seed=st.integers(0, 99), data=st.data())
def test_which_rows_are_made_at_once_changes_no_bit(rows, rank, columns, seed, data):
    left, right = factors(rows, rank, columns, seed)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert np.array_equal(product(left, right, first, last), product(left, right, 0, rows)[first:last])


@given(rank=sides, seed=st.integers(0, 99))
def test_it_is_torchs_within_rounding(rank, seed):
    left, right = factors(64, rank, 96, seed)
    exact = left.astype(np.float64) @ right.astype(np.float64)
    reach = np.abs(left.astype(np.float64)) @ np.abs(right.astype(np.float64)) * rank * 2.0**-24
    assert (np.abs(product(left, right, 0, 64) / 2 - exact) <= reach).all()


# --- sums -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e37])
def test_sums_neither_vanish_nor_overflow(scale):
    generator = np.random.default_rng(0)
    kept, down, base, stored = (scale * generator.standard_normal(3001) for _ in range(4))
    given32 = [each.astype(np.float32) for each in (kept, down, base, stored)]
    kept, down, base, stored = (each.astype(np.float64) for each in given32)
    expected = [np.sum(down**2), np.sum((stored - kept + down) ** 2), np.sum(kept**2)]
    with_base = [*expected, -np.sum(down * (kept - base)), np.sum((kept - base) ** 2)]
    assert kernels.figures(*given32) == pytest.approx(with_base, rel=1e-10)
    assert kernels.figures(given32[0], given32[1], None, given32[3]) == pytest.approx([*expected, 0, 0], rel=1e-10)
    assert kernels.squares(given32[1]) == pytest.approx(expected[0], rel=1e-10)
    gaps = [np.sum(np.abs(kept - base)), np.sum(np.abs(kept)), np.sum(np.abs(base))]
    assert kernels.distance(given32[0], given32[2]) == pytest.approx(gaps, rel=1e-10)


@pytest.mark.parametrize("by_row", [True, False])
def test_squares_come_piece_by_piece_to_the_same_bits(by_row):
    values = np.random.default_rng(0).standard_normal((37, 11), np.float32)
    whole, pieces = (np.zeros(37 if by_row else 11) for _ in range(2))
    kernels.add_squares(values, by_row, whole)
    for first in range(0, 37, 5):
        last = min(first + 5, 37)
        kernels.add_squares(values[first:last], by_row, pieces[first:last] if by_row else pieces)
    assert np.array_equal(whole, pieces)
    assert whole == pytest.approx(np.square(values.astype(np.float64)).sum(1 if by_row else 0))


# --- what they refuse ------------------------------------------------------------------------------------------------


def test_arrays_that_the_loops_would_run_beyond_are_refused():
    three, four = np.ones(3, np.float32), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="3, 4"):
        kernels.scaled(three, 1.0, four)
    with pytest.raises(TypeError, match="contiguous"):
        kernels.scaled(np.ones(6, np.float32)[::2], 1.0, three)
    with pytest.raises(TypeError, match="writable"):
        kernels.scaled(three, 1.0, np.frombuffer(bytes(12), np.float32))
    with pytest.raises(TypeError, match="float64"):
        kernels.scaled(np.ones(3), 1.0, three)
    with pytest.raises(TypeError, match="uint16"):
        kernels.scaled(three, 1.0, np.ones(3, np.uint16))
    with pytest.raises(ValueError, match="rows"):
        kernels.product(*kernels.pack(np.ones((5, 2)), np.ones((2, 3))), 1.0, 1.0, 1, np.ones((5, 3), np.float32))
    with pytest.raises(ValueError, match="sums"):
        kernels.add_squares(np.ones((2, 3), np.float32), True, np.zeros(3))


def test_views_of_a_buffer_are_few():
    buffer = Buffer()
    assert all(len(buffer.floats(count)) == count for count in range(1, 1000))
    assert buffer.floats(7) is buffer.floats(7)
