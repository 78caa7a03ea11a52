import os

# Before anything imports TensorFlow, which KerasHub does.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The tests compile much and run little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Several test processes on few cores: waiting threads would spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
