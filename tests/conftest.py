import gc
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What gives the same on every backend: `make test` runs it on one.
ONCE = (
    "data/",
    "evaluation/",
    "generation/test_batch_plan.py",
    "generation/test_check_log_probs.py",
    "generation/test_server",
    "hub/test_added_tokens.py",
    "hub/test_bad_input.py",
    "hub/test_convert_tokenizer.py",
    "hub/test_leftovers.py",
    "reliability/",
    "self_play/test_engine_checks.py",
    "self_play/test_errors.py",
    "self_play/test_folder.py",
    "self_play/test_loggers.py",
    "self_play/test_run_log.py",
    "self_play/test_settings.py",
    "test_architecture.py",
    "test_benchmarks.py",
    "test_cli.py",
    "test_dependencies.py",
    "test_docs.py",
    "test_headline.py",
    "test_lm_eval.py",
    "test_public_api.py",
    "test_recipes.py",
    "test_run_estimate.py",
)

# What a run does in which order, with which options, and how it is taken up
# again. PyTorch runs all of it; where every run is traced again, for seconds,
# these are slow tests, but for one of each kind.
SLOW_TO_TRACE = {
    "jax": (
        "self_play/test_control.py",
        "self_play/test_fit_options.py",
        "self_play/test_termination.py",
    ),
    "tensorflow": (
        "models/test_lora.py",
        "self_play/test_control.py",
        "self_play/test_fit_options.py",
        "self_play/test_loop.py",
        "self_play/test_resume.py",
        "self_play/test_termination.py",
        "self_play/test_tspin.py",
    ),
}
BUT_FOR = {
    "jax": (
        "test_a_run_that_is_cut_off_ends_the_same[accumulation]",
        "test_a_run_that_is_cut_off_ends_the_same[steps per execution]",
        "test_sft_from_the_same_start_in_the_same_steps",
        "test_sigterm[2-3]",
    ),
    "tensorflow": (
        "test_kill_9_in_the_middle_of_fit",
        "test_trains_the_adapters_alone[float32]",
    ),
}

# What is imported for the tests is a million objects, none of them garbage.
gc.disable()
# Before anything imports TensorFlow, which KerasHub does.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# The tests compile much and run little, and much of it twice.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
# Without a largest size: processes that make room take each other's files.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# On GPUs JAX multiplies float32 with 10 bits after the point, unless told so.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Several test processes on few cores: waiting threads would spin.
for variable in (
    "OMP_NUM_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
):
    os.environ.setdefault(variable, "1")


# Few and long tests: a process that began them last would end alone.
FIRST = ("test_notebooks.py", "test_backends.py", "test_distribution.py")


def pytest_ignore_collect(collection_path, config):
    """Doesn't import those of `ONCE` where none of them is to run."""
    name = str(collection_path.relative_to(ROOT / "tests"))
    is_left_out = "not once" in config.option.markexpr
    return True if is_left_out and name.startswith(ONCE) else None


def pytest_collection_modifyitems(items):
    """Marks the tests of `ONCE`, and begins with those of `FIRST`."""
    gc.freeze()
    gc.enable()
    items.sort(key=lambda item: item.path.name not in FIRST)
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    for item in items:
        name = str(item.path.relative_to(ROOT / "tests"))
        if name.startswith(ONCE):
            item.add_marker(pytest.mark.once)
        is_slow = name in SLOW_TO_TRACE.get(backend, ())
        if is_slow and item.name not in BUT_FOR[backend]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes checkpoints, each once: `checkpoint("qwen2", **options)`."""
    from tiny_checkpoints import save_checkpoint  # imports transformers

    folders = {}

    def make(architecture, **options):
        key = repr((architecture, sorted(options.items())))
        if key not in folders:
            folder = tmp_path_factory.mktemp(architecture)
            folders[key] = save_checkpoint(folder, architecture, **options)
        return folders[key]

    return make


@pytest.fixture(scope="session")
def smollm2():
    """The folder and the GGUF file of the real SmolLM2-135M-Instruct."""
    from make_smollm2 import make_smollm2  # imports transformers

    return make_smollm2()
