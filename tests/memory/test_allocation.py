"""The tracker against programs counted by hand, and against what torch's profiler sees of real tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hbat_lightning.functional import effective_number, proportional_weights
from hbat_lightning.memory.allocation import AllocationTracker, Category, Moment, valueless

F32 = 4


def planned_peak(program: Callable[[], object], granularity: int = 1) -> int:
    """The tracker's peak of a program that makes its own tensors."""
    moments: list[Moment] = []
    tracker = AllocationTracker(granularity)
    with valueless(), tracker, tracker.moment("program", moments):
        program()
    return moments[0].peak.total


def profiled_peak(program: Callable[[], object]) -> int:
    """The allocator's peak of the same program with real tensors."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        program()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_what_is_released_makes_room() -> None:
    def program() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(800)
        del second, third

    assert planned_peak(program) == 1500 * F32


def test_views_and_steps_in_place_cost_nothing() -> None:
    def program() -> None:
        held = torch.empty(40, 25)
        held.view(-1).mul_(2).add_(held.T.flatten()[0])

    assert planned_peak(program) <= 1000 * F32 + 1000 * F32  # flatten() of a transposed matrix copies it
    assert planned_peak(lambda: torch.empty(40, 25).view(-1).mul_(2)) == 1000 * F32


def test_a_linear_layer_counted_by_hand() -> None:
    def program() -> None:
        layer = nn.Linear(64, 32, bias=False)
        inputs = torch.empty(8, 64)
        layer(inputs).sum().backward()

    # Weight and input; then the output, whose sum alone remains; at the end the weight's gradient and that of the sum.
    resting, output = (64 * 32 + 8 * 64) * F32, 8 * 32 * F32
    assert planned_peak(program) == resting + 64 * 32 * F32 + F32 + F32
    assert output < 64 * 32 * F32


def _attention() -> None:
    model = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    for _ in range(2):  # the second pass adds to gradients that are there
        model(torch.ones(4, 50, 64)).square().mean().backward()


def _residuals() -> None:
    layers = nn.ModuleList(nn.Linear(256, 256) for _ in range(6))
    hidden = torch.ones(32, 256)
    for layer in layers:
        hidden = hidden + torch.nn.functional.silu(layer(hidden)) * layer(hidden)
    torch.logsumexp(hidden, -1).sum().backward()


def _optimizer() -> None:
    model = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.ones(10, 300)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("program", [_attention, _residuals, _optimizer])
def test_programs_need_what_the_profiler_sees(program: Callable[[], None]) -> None:
    program()  # what is made at a first use, and kept, belongs to neither
    assert planned_peak(program) == pytest.approx(profiled_peak(program), rel=0.03)


def _two_uses() -> None:
    start = torch.ones(10_000, requires_grad=True)
    middle = start * 2
    ((middle * 3).sum() + (middle * 5).sum()).backward()


def _log_sums() -> None:
    torch.logsumexp(torch.ones(100, 1000), -1)


@pytest.mark.parametrize(("program", "tensors"), [(_two_uses, 4 * 10_000), (_log_sums, 2 * 100_000)])
def test_sums_in_place_and_work_inside_kernels(program: Callable[[], None], tensors: int) -> None:
    # Twice the same number with two gradients, whose sum takes the place of one of them, beside start and middle; and
    # with the exponentials beside the values.
    assert planned_peak(program) == pytest.approx(tensors * F32, rel=0.01)
    assert planned_peak(program) == pytest.approx(profiled_peak(program), rel=0.01)


def test_blocks_are_rounded_up() -> None:
    assert planned_peak(lambda: torch.empty(1), granularity=512) == 512
    assert planned_peak(lambda: torch.empty(129), granularity=512) == 1024


def test_categories_add_up_and_can_be_assigned() -> None:
    moments: list[Moment] = []
    tracker = AllocationTracker(vocabulary=77)
    with valueless(), tracker:
        with tracker.category(Category.OPTIMIZER):
            state = torch.empty(10)
        with tracker.moment("program", moments):
            logits, hidden = torch.empty(5, 77), torch.empty(3)
            tracker.assign([hidden], Category.GRADIENTS)
            more = torch.empty(1)
    assert moments[0].peak.parts == {
        Category.OPTIMIZER: 40,
        Category.LOGITS: 5 * 77 * F32,
        Category.GRADIENTS: 12,
        Category.ACTIVATIONS: 4,
    }
    assert moments[0].peak.total == sum(moments[0].peak.parts.values())
    del state, logits, more


def test_stretches_begin_where_the_last_ended() -> None:
    moments: list[Moment] = []
    tracker = AllocationTracker()
    with valueless(), tracker, tracker.moment("program", moments):
        torch.empty(100)
        tracker.cut()
        kept = torch.empty(10)
    assert [stretch.total for stretch in moments[0].stretches] == [400, 40]
    assert moments[0].peak.total == 400
    del kept


def test_values_that_are_asked_for_are_positive_and_finite() -> None:
    with valueless(), AllocationTracker():
        values = torch.empty(6)
        assert bool(torch.isfinite(values).all())
        assert values.sum().item() == 1.0
        assert effective_number(values) > 0  # asks whether the sum is 0 or less
        assert proportional_weights(values).shape == (6,)


def test_only_copies_are_equal() -> None:
    with valueless(), AllocationTracker():
        made = torch.empty(6)
        assert torch.equal(made.clone(), made)
        assert torch.equal(made.to(torch.bfloat16).float(), made)
        assert not torch.equal(made * 2, made)


def test_real_tensors_are_computed_for_real() -> None:
    mask = torch.tensor([True, False, True])
    with valueless(), AllocationTracker():
        assert mask.nonzero().flatten().tolist() == [0, 2]
        chosen: Tensor = torch.empty(4, 3)[:, mask]
        assert chosen.shape == (4, 2)
