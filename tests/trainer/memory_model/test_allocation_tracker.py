"""Storages that come and go, by kind and phase."""

import torch

from trainer.memory_model.allocation_tracker import AllocationTracker

KIB = 1024


def kib(count: int) -> torch.Tensor:
    return torch.zeros(count * KIB // 4)


def test_the_highest_moment_of_each_phase_is_kept() -> None:
    tracker = AllocationTracker()
    with tracker:
        with tracker.during("forward", "activations"):
            kept = kib(4)
            gone = kib(8)
            del gone
        with tracker.during("backward", "backward pass"):
            other = kib(2)
    assert tracker.peaks["forward"].total_bytes == 12 * KIB
    assert tracker.peaks["backward"].kinds_bytes == {"activations": 4 * KIB, "backward pass": 2 * KIB}
    del kept, other
    assert tracker.total == 0 and not tracker.entries


def test_views_and_what_is_changed_in_place_count_once() -> None:
    tracker = AllocationTracker()
    with tracker, tracker.during("forward", "activations"):
        whole = kib(4)
        part = whole[:8].view(2, 4).add_(1)
    assert tracker.total == 4 * KIB
    del whole
    assert tracker.total == 4 * KIB  # the view holds it
    del part
    assert tracker.total == 0


def test_a_share_counts_for_what_one_rank_holds() -> None:
    tracker = AllocationTracker({"weights": 0.25})
    with tracker, tracker.during("forward", "activations"):
        weight = kib(8)
        tracker.assign(weight, "weights")
        made = weight * 1
    assert tracker.total == 2 * KIB + 8 * KIB
    assert tracker.peaks["forward"].kinds_bytes["weights"] == 2 * KIB
    del made


def test_sizes_are_rounded_as_the_allocator_does() -> None:
    tracker = AllocationTracker(grain_bytes=512)
    with tracker, tracker.during("forward", "activations"):
        small = torch.zeros(3)
    assert tracker.total == 512
    del small
    assert tracker.total == 0
