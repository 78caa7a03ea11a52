"""`doctor`: what is installed, on which devices, and does it train right."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from keras_iris.cli.output import Result, shown

_BACKENDS = ("jax", "tensorflow", "torch")
_DRIVER = Path("/proc/driver/nvidia/version")


@shown
def doctor() -> Result:
    """Look at backend, devices and versions, and train a tiny model a step."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "KERAS_BACKEND": os.environ.get("KERAS_BACKEND"),
    }
    problems = _check_versions(facts)
    try:
        import keras

        from keras_iris import backend
    except (ImportError, ValueError) as error:
        problems.append(
            f"Keras can't start: {error}. Install a backend, such as "
            '`pip install "keras_iris[jax]"`, and set KERAS_BACKEND to it.'
        )
    else:
        from keras_iris.cli.self_test import self_test

        facts["backend"] = keras.backend.backend()
        facts["devices"] = backend.device_names()
        facts["self_test"] = found = self_test()
        problems += found.pop("problems")
        is_gpu = any("cpu" not in name.lower() for name in facts["devices"])
        if _DRIVER.exists() and not is_gpu:
            problems.append(
                f"This machine has an NVIDIA GPU that {facts['backend']} "
                "doesn't see. Install its build for CUDA."
            )
        if facts["KERAS_BACKEND"] is None:
            facts["hint"] = "KERAS_BACKEND isn't set: Keras has chosen."
    lines = [f"{name:18} {value}" for name, value in _flat(facts)]
    lines += [f"PROBLEM  {text}" for text in problems] or ["All is well."]
    return Result(
        facts | {"problems": problems}, "\n".join(lines), int(bool(problems))
    )


def _check_versions(facts: dict[str, Any]) -> list[str]:
    """Adds the versions of the package's requirements; says what is wrong."""
    from packaging.requirements import Requirement

    problems = []
    for text in metadata.requires("keras_iris") or ():
        requirement = Requirement(text)
        name, marker = requirement.name, requirement.marker
        is_extra = marker is not None and not marker.evaluate({"extra": ""})
        if is_extra and name not in _BACKENDS:
            continue
        try:
            version = facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if not is_extra:
                problems.append(f"{name} isn't installed.")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{name} {version} isn't what this package was tested with: "
                f'pip install "{name}{requirement.specifier}"'
            )
    return problems


def _flat(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    tests = facts.get("self_test", {}).items()
    parts = [(n, v) for n, v in facts.items() if n != "self_test" and v]
    return parts + [(f"self-test {name}", value) for name, value in tests]
