"""Fast trainable projection against AdamP (GT-RIPL/FTP, util/FTP.py).

The file needs only torch and is imported unchanged, without its package.
"""

from pathlib import Path

from benchmarks import parities
from benchmarks.parities import spd
from rft.train.anchored import FastTrainableProjection

REPOSITORY = "GT-RIPL/FTP"
VARIABLE = "RFT_PEER_FTP"


def measure(checkout: Path) -> dict[str, float]:
    """Train the same random weights with both on the same random gradients."""
    their_class = parities.load(checkout / "util" / "FTP.py").AdamP
    found = {}
    for k, decay in ((1.0, 0.0), (0.2, 0.0), (1.0, 0.1)):
        anchors = spd.weights(0)
        ours, theirs = spd.copied(anchors), spd.copied(anchors)
        our_optimizer = FastTrainableProjection(ours, anchors, k, weight_decay=decay, **spd.OPTIONS)
        names = [str(number) for number in range(len(theirs))]
        group = {"params": theirs, "pre": anchors, "name": names}
        their_optimizer = their_class([group], k=k, weight_decay=decay, **spd.OPTIONS)
        spd.steps(ours, theirs, our_optimizer, their_optimizer)
        name = f"{spd.STEPS} steps, k {k:g}, weight decay {decay:g}"
        found[f"{name}: theta - theta_0"] = spd.changed(ours, theirs, anchors)
    return found
