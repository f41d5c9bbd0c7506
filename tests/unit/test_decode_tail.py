"""The arithmetic of the simulated step, by hand."""

from __future__ import annotations

import pytest

from benchmarks.decode_tail import (
    CARD,
    GAIN,
    LENGTHS,
    SCHEDULES,
    Device,
    Step,
    alternate,
    decode,
    fill_slots,
    fit,
    gain,
    make_step,
    needed_rate,
    overlap,
    train_finished,
)


def test_a_row_starts_when_another_leaves_its_slot():
    step, device = Step(((2, 4), (1, 1)), slots=2, prompt=10), Device(step=1, row=0.5, token=0.1)
    # Always two rows, 2 s a decoding step: 2 steps until the first ends, then one each for (1, 1).
    assert decode(step, device) == [8, 8]
    assert step.training_seconds(device) == pytest.approx([1.6, 1.2])
    assert alternate(step, device) == pytest.approx(10.8)
    assert overlap(step, device, 0.5) == pytest.approx(10.8)
    assert overlap(step, device, 0.8) == pytest.approx(8 + 2.8 / 4)
    assert overlap(step, device, 1) == 8


def test_finished_groups_are_trained_beside_the_rest():
    step, device = Step(((1, 1), (3, 3)), slots=4, prompt=0), Device(step=1, row=0, token=2)
    assert decode(step, device) == [1, 3]
    assert alternate(step, device) == 3 + 4 + 12
    # In the last two decoding seconds 2 of the first group's 4 seconds are done, then 2 + 12.
    assert train_finished(step, device, 1) == 17
    assert train_finished(step, device, 0.8) == pytest.approx(1 + 2 / 0.8 + 14)
    # A group that is trained long before the next one ends leaves the device to decoding.
    assert train_finished(step, Device(1, 0, 0.5), 1) == 3 + 3
    assert fill_slots(step, device) == 8 / 4 + 16
    assert gain(step, device, "train_finished", 1) == pytest.approx(19 / 17)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_phases_that_take_turns_gain_nothing(lengths):
    step = make_step(*lengths, slots=32)
    assert sum(map(len, step.groups)) == 64
    for schedule in SCHEDULES:
        assert gain(step, CARD, schedule, 0.5) == pytest.approx(1)
        rate = needed_rate(step, CARD, schedule)
        if rate is None:
            assert gain(step, CARD, schedule, 1) < GAIN
        else:
            assert (
                gain(step, CARD, schedule, rate) >= GAIN > gain(step, CARD, schedule, rate - 0.01)
            )
    assert fill_slots(step, CARD) < alternate(step, CARD)


def test_the_fit_finds_both_costs():
    assert fit([(1, 3.0), (2, 5.0), (4, 9.0)]) == pytest.approx((1, 2))
