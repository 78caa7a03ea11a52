"""Self-play objectives: sums of tilted risks of per-example losses."""

from keras_iris.losses.iris import IRIS
from keras_iris.losses.risk import Risk, tilted_risk, tilted_weights
from keras_iris.losses.self_play_loss import SelfPlayLoss
from keras_iris.losses.sft import SFT
from keras_iris.losses.space import SPACE
from keras_iris.losses.spif import SPIF
from keras_iris.losses.spin import SPIN
from keras_iris.losses.tspin import TSPIN

__all__ = [
    "IRIS",
    "SFT",
    "SPACE",
    "SPIF",
    "SPIN",
    "TSPIN",
    "Risk",
    "SelfPlayLoss",
    "tilted_risk",
    "tilted_weights",
]
