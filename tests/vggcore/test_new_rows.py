"""Rows for classes that come later point at their pictures, as far as the old rows do, and take nothing from old classes."""

import torch

from vggcore.new_rows import mean_rows


def features(centre: torch.Tensor, *, pictures: int = 50, spread: float = 0.1) -> torch.Tensor:
    """What a last layer sees of a class: around `centre`, never negative."""
    draws = torch.Generator().manual_seed(5)
    return (centre + spread * torch.randn(pictures, len(centre), generator=draws)).clamp_min(0)


def test_a_new_class_is_told_from_the_old_ones_before_any_training():
    common = torch.full((8,), 3.0)       # what all pictures share, as after a ReLU
    cat, dog, fox = (features(common + 2.0 * torch.eye(8)[place]) for place in range(3))
    weight = torch.stack([2.0 * (cat.mean(0) - dog.mean(0)), 2.0 * (dog.mean(0) - cat.mean(0))])
    bias = -weight @ torch.cat([cat, dog]).mean(0)

    old = torch.cat([cat, dog])
    own = float(torch.cat([cat @ weight[0] + bias[0], dog @ weight[1] + bias[1]]).mean())
    rows, biases = mean_rows(weight, bias, centre=old.mean(0), own=own, means=fox.mean(0)[None])

    weight, bias = torch.cat([weight.double(), rows]), torch.cat([bias.double(), biases])
    for label, pictures in enumerate((cat, dog, fox)):
        assert ((pictures.double() @ weight.T + bias).argmax(1) == label).all()


def test_a_new_row_is_as_long_as_the_old_ones_and_its_logit_half_way_to_what_old_classes_have_in_their_own():
    weight, bias = torch.tensor([[3.0, 1.0], [1.0, 1.0], [-1.0, 1.0]]), torch.tensor([0.0, 2.0, 4.0])
    mean = torch.tensor([[1.0, 5.0]])     # old logits there: 8, 8, 8

    rows, biases = mean_rows(weight, bias, centre=torch.tensor([1.0, 1.0]), own=12.0, means=mean)
    lower, bound = mean_rows(weight, bias, centre=torch.tensor([1.0, 1.0]), own=3.0, means=mean)

    middle = weight.double().mean(0)
    assert torch.allclose((rows - middle).norm(dim=1), (weight.double() - middle).norm(dim=1).mean())
    assert float(rows @ mean[0].double() + biases) == 10.0
    assert float(lower @ mean[0].double() + bound) == 8.0


def test_a_class_that_looks_like_all_others_gets_a_finite_row():
    rows, biases = mean_rows(torch.ones(2, 3), torch.zeros(2), centre=torch.ones(3), own=3.0, means=torch.ones(1, 3))

    assert rows.isfinite().all() and biases.isfinite().all()
