"""Conv groups that stay fixed: which layers they are, and what training costs without them. Pure but for `freeze`."""

from collections.abc import Sequence

from vggcore.nets import LayerRow, Vgg, conv_names
from vggcore.schedule import Stage

BACKWARD = 2     # multiplications of a backward pass in those of the forward: gradients of the inputs and of the weights


def frozen_parameters(stage: Stage) -> tuple[str, ...]:
    """The names of the weights and biases that stay fixed, in the net's order."""
    modules = conv_names(stage.net, stage.freeze).values()
    return tuple(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))


def freeze(net: Vgg, stage: Stage) -> None:
    """Takes the stage's frozen groups out of training: no gradient, and so no backward pass and no stored activations.

    Pictures need no gradient either: autograd records nothing below the first group that is trained.
    """
    fixed = frozen_parameters(stage)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in fixed)


def frozen_layers(stage: Stage, table: Sequence[LayerRow]) -> int:
    """How many layers at the bottom of a net's table are frozen, ReLUs and poolings among them."""
    if not stage.freeze:
        return 0
    end = [place for place, row in enumerate(table) if row.kind == "maxpool"][stage.freeze - 1] + 1
    while table[end].kind.startswith("pool-"):       # a linear head's pooling of the last frozen group has no gradient either
        end += 1
    return end


def usual_macs(stage: Stage, table: Sequence[LayerRow]) -> int:
    """Multiply-adds of one picture's forward and backward pass as they are usually counted: three times the forward's.

    Frozen layers have no backward pass.
    """
    trained = table[frozen_layers(stage, table) :]
    return sum(row.macs for row in table) + BACKWARD * sum(row.macs for row in trained)


def training_macs(stage: Stage, table: Sequence[LayerRow]) -> int:
    """The multiply-adds that are done: the first layer that is trained has no gradient of its input."""
    return usual_macs(stage, table) - next(row.macs for row in table[frozen_layers(stage, table) :] if row.macs)
