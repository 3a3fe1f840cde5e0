"""What features cost in multiply-adds. Pure."""

from vggcore.nets import layer_table
from vggcore.schedule import Stage


def feature_macs(stage: Stage) -> int:
    """Multiply-adds of the features that a logistic stage takes of one square picture, at all its scales."""
    assert stage.features is not None and stage.features.scales is not None
    total = 0
    for scale in stage.features.scales:
        rows = layer_table(stage.net, classes=2, **stage.net_settings | {"crop": scale})
        total += sum(row.macs for row in rows if row.kind.startswith("conv"))
    return total * (2 if stage.features.flip else 1)
