"""Dense evaluation: the score map is the net on every crop of the grid, and its soft-max the picture's posteriors."""

import pytest
import torch
from torch.nn import functional

from vggcore.dense import dense_logits, dense_posteriors
from vggcore.initialise import initialise_net
from vggcore.nets import build_net


def small_net(head="paper", net="C", crop=64):
    module = build_net(net, classes=5, head=head, width=1 / 8, crop=crop)
    initialise_net(module, "he", width=1 / 8, seed=1, name="dense")
    return module.eval()


def pictures(height, width, n=2):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("head", ["paper", "compact"])
def test_at_the_crops_size_the_score_map_is_one_place_with_forwards_logits(head):
    net, images = small_net(head), pictures(64, 64)

    with torch.inference_mode():
        scores, logits = dense_logits(net, images), net(images)

    assert scores.shape == (2, 5, 1, 1)
    torch.testing.assert_close(scores[:, :, 0, 0], logits)


def test_the_score_map_is_that_of_the_fc_layers_turned_into_convs():
    net, images = small_net(), pictures(150, 211)
    first, second, third = (net.classifier[index] for index in (0, 3, 6))

    with torch.inference_mode():
        scores = dense_logits(net, images)

        hidden = functional.conv2d(net.features(images), first.weight.unflatten(1, (-1, 2, 2)), first.bias).relu()
        hidden = functional.conv2d(hidden, second.weight[:, :, None, None], second.bias).relu()
        by_convs = functional.conv2d(hidden, third.weight[:, :, None, None], third.bias)
    assert scores.shape == (2, 5, 3, 5)     # feature map 4x6, windows of 2x2
    torch.testing.assert_close(scores, by_convs)


@pytest.mark.parametrize("head", ["paper", "compact"])
def test_each_place_of_the_score_map_is_the_head_on_its_window_of_the_feature_map(head):
    net, images = small_net(head), pictures(96, 160)

    with torch.inference_mode():
        scores, features = dense_logits(net, images), net.features(images)

        assert scores.shape == (2, 5, 2, 4)
        for y in range(2):
            for x in range(4):
                window = features[:, :, y : y + 2, x : x + 2]
                window = window if head == "paper" else window.mean(dim=(2, 3))
                torch.testing.assert_close(scores[:, :, y, x], net.classifier(window.flatten(1)))


def test_the_posteriors_are_the_soft_max_of_the_averaged_score_map():
    net, images = small_net(), pictures(96, 130)

    with torch.inference_mode():
        posteriors = dense_posteriors(net, images)

        averaged = dense_logits(net, images).mean(dim=(2, 3))
    torch.testing.assert_close(posteriors, averaged.exp() / averaged.exp().sum(dim=1, keepdim=True))
    assert posteriors.dtype == torch.float32


def test_channels_last_pictures_give_the_same_score_map():
    net, images = small_net(), pictures(96, 130)

    with torch.inference_mode():
        plain = dense_logits(net, images)
        last = dense_logits(net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last))

    torch.testing.assert_close(last, plain)


def test_dense_evaluation_refuses_train_mode_and_pictures_below_the_crop():
    net = small_net()

    with pytest.raises(AssertionError, match=r"\(64, 63\) pixels are smaller than the net's crop"):
        dense_logits(net, pictures(64, 63))
    with pytest.raises(AssertionError, match=r"call net\.eval"):
        dense_logits(net.train(), pictures(64, 64))
