"""Training on several devices and in several processes.

On JAX a `keras.distribution.Distribution` cuts batches and weights over the
devices of all processes. On PyTorch every process of `torchrun` has the whole
model and a share of each batch. On TensorFlow the model is made under a
`tf.distribute.MirroredStrategy`. In each case the loss is that of the whole
batch.
"""

from keras_iris.distribution.launch import initialize, process_index
from keras_iris.distribution.make import make_distribution, read_mesh
from keras_iris.distribution.report import ShardingReport, sharding_report

__all__ = [
    "ShardingReport",
    "initialize",
    "make_distribution",
    "process_index",
    "read_mesh",
    "sharding_report",
]
