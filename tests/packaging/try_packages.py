"""Installs the wheel and the sdist where nothing else is, and runs them.

    make test-packages                # all of ENVIRONMENTS
    make test-packages ARGS="torch"   # only these

Each environment is made anew in `build/packages/NAME`. From an empty folder
beside it `keras-iris doctor` and `keras-iris quickstart --small` run; where an
environment says so, the tests of the sdist run against the installed package.
What a command prints is in `NAME.log`. Needs the network; torch is the version
of constraints.txt.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).with_name("uv")
PROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = (ROOT / "constraints.txt").read_text().split()
TORCH = next(line for line in CONSTRAINTS if line.startswith("torch=="))
# Each requirement has its part in one.
TESTS = (
    "tests/backend/test_jax_products.py",
    "tests/backend/test_train_step.py",
    "tests/data",
    "tests/evaluation/test_report.py",
    "tests/generation/test_keras_engine.py",
    "tests/generation/test_server_engine.py",
    "tests/hub/test_adapter.py",
    "tests/hub/test_convert_tokenizer.py",
    "tests/hub/test_load.py",
    "tests/losses",
    "tests/models/test_log_probs.py",
    "tests/models/test_self_play_model.py",
    "tests/self_play/test_loop.py",
)
ADDED_TO_WHEEL = {
    "keras_iris/recipes/quickstart.py",
    "METADATA",
    "RECORD",
    "WHEEL",
    "entry_points.txt",
    "licenses/LICENSE",
    "licenses/keras_iris/data/cmudict.LICENSE",
}


@dataclass(frozen=True)
class Environment:
    """How the package is installed, and what is run.

    Attributes:
        backend: The value of `KERAS_BACKEND`, and the extra.
        python: The version of Python.
        package: `"wheel"` or `"sdist"`.
        lowest: The package's own requirements come at their lower bounds,
            instead of the newest versions that they allow.
        tensorflow: How TensorFlow, which KerasHub requires, is kept away:
            `"exclude"` never installs it (uv), `"uninstall"` takes it out again
            (pip), as docs/howto/install.md says; `"keep"` doesn't.
        tests: Whether `TESTS` run as well.
    """

    backend: str
    python: str = "3.11"
    package: str = "wheel"
    lowest: bool = False
    tensorflow: str = "keep"
    tests: bool = False


ENVIRONMENTS = {
    "jax": Environment("jax", tensorflow="exclude", tests=True),
    "jax-lowest": Environment("jax", lowest=True, tests=True),
    "jax-sdist": Environment("jax", package="sdist", tensorflow="uninstall"),
    "jax-3.12": Environment("jax", python="3.12", tensorflow="exclude"),
    "jax-3.13": Environment("jax", python="3.13", tensorflow="exclude"),
    "torch": Environment("torch", tensorflow="exclude"),
    "torch-lowest": Environment("torch", lowest=True, tensorflow="exclude"),
    "tensorflow": Environment("tensorflow"),
    "tensorflow-lowest": Environment("tensorflow", lowest=True),
    "tensorflow-3.13": Environment("tensorflow", python="3.13"),
}


class Trial:
    """One environment in its folder, and the log of its commands."""

    def __init__(self, name: str, folder: Path, packages: dict[str, Path]):
        self.environment = ENVIRONMENTS[name]
        self.package = packages[self.environment.package]
        self.venv = folder / name
        self.log = folder / f"{name}.log"
        self.bin = self.venv / "bin"
        self.empty = folder / f"{name}.empty"
        for old in (self.venv, self.empty):
            shutil.rmtree(old, ignore_errors=True)
        self.empty.mkdir(parents=True)
        self.log.write_text("")

    def run(self, *command: str | Path, cwd: Path | None = None) -> None:
        """Runs a command whose failure ends the trial."""
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        variables = {
            # uv doesn't read what pip is told of where packages are.
            "UV_FIND_LINKS": os.environ.get("PIP_FIND_LINKS", ""),
            **kept,
            "KERAS_BACKEND": self.environment.backend,
            "VIRTUAL_ENV": str(self.venv),
        }
        with self.log.open("a") as log:
            print("$", *command, file=log, flush=True)
            subprocess.run(
                [*map(str, command)],
                cwd=cwd or self.empty,
                env=variables,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
            )

    def install(self) -> None:
        """Makes the environment, with pip or with uv."""
        environment = self.environment
        extras = [environment.backend, *["test"] * environment.tests]
        package = f"{self.package}[{','.join(extras)}]"
        if environment.tensorflow == "uninstall":
            self.run(UV, "venv", "--seed", "-p", environment.python, self.venv)
            pip = (self.bin / "python", "-m", "pip")
            self.run(*pip, "install", "-q", package)
            self.run(*pip, "uninstall", "-y", "tensorflow", "tensorflow-text")
            return
        self.run(UV, "venv", "-p", environment.python, self.venv)
        install = (UV, "pip", "install", "-q")
        if environment.tests or environment.backend == "torch":
            # Alone: what torch requires doesn't come at its newest version.
            self.run(*install, "--no-deps", TORCH)
        options: list[str | Path] = []
        if environment.tensorflow == "exclude":
            excluded = self.empty.with_suffix(".excluded")
            excluded.write_text("tensorflow-text\n")
            options = ["--excludes", excluded]
        if environment.lowest:
            # Of a package that is itself installed uv asks the newest.
            lowest = ["--resolution", "lowest-direct", "-r", PROJECT]
            wanted = [word for name in extras for word in ("--extra", name)]
            self.run(*install, *options, *lowest, *wanted)
            self.check_bounds(extras)
            options = ["--no-deps"]
        self.run(*install, *options, package)

    def check_bounds(self, extras: list[str]) -> None:
        """Checks that what is installed is what the bounds say.

        Raises:
            ValueError: If a lower bound isn't what is tried: another package
                requires a newer version.
        """
        project = tomllib.loads(PROJECT.read_text())["project"]
        texts = list(project["dependencies"])
        for extra in extras:
            texts += project["optional-dependencies"][extra]
        (site_packages,) = self.venv.glob("lib/*/site-packages")
        for requirement in map(Requirement, texts):
            if requirement.name == project["name"]:
                continue
            (found,) = metadata.distributions(
                name=requirement.name, path=[str(site_packages)]
            )
            (bound,) = (
                specifier.version
                for specifier in requirement.specifier
                if specifier.operator == ">="
            )
            if found.version not in SpecifierSet(f"=={bound}.*"):
                raise ValueError(
                    f"{requirement} comes as {found.version} with the others' "
                    "lower bounds: raise its bound to that."
                )

    def try_out(self) -> None:
        """Runs what a user runs."""
        self.run(UV, "pip", "list")
        if self.environment.tensorflow != "keep":
            code = "import importlib.util as u; assert not u.find_spec('{}')"
            self.run(self.bin / "python", "-c", code.format("tensorflow"))
        self.run(self.bin / "keras-iris", "doctor", "--json")
        self.run(self.bin / "keras-iris", "quickstart", "--small")
        run_dir = self.empty / f"runs/quickstart_{self.environment.backend}"
        report = run_dir.with_name(run_dir.name + "_small") / "report.html"
        if not report.exists():
            raise FileNotFoundError(f"No report: {report}")

    def run_tests(self, sources: Path) -> None:
        """Runs tests of the sdist, whose own copy of the package is gone."""
        # What other packages mean to change is no error with other versions.
        warnings = ("-W", "default::DeprecationWarning")
        self.run(self.bin / "pytest", "-q", *warnings, *TESTS, cwd=sources)


def build(folder: Path) -> tuple[dict[str, Path], Path]:
    """The sdist, the wheel made from it, and the sdist without the package."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([UV, "build", "-q", "-o", folder, ROOT], check=True)
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    sources = folder / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(sources / "keras_iris")
    return {"sdist": sdist, "wheel": wheel}, sources


def check_contents(packages: dict[str, Path]) -> None:
    """Compares both packages with the files that git knows.

    Raises:
        ValueError: If one lacks a file or has another.
    """
    listing = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    listed = subprocess.check_output(listing, cwd=ROOT, text=True).splitlines()
    files = {name for name in listed if (ROOT / name).is_file()}
    package = {name for name in files if name.startswith("keras_iris/")}
    with tarfile.open(packages["sdist"]) as archive:
        sdist = {m.name.partition("/")[2] for m in archive if m.isfile()}
    with zipfile.ZipFile(packages["wheel"]) as archive:
        wheel = {n.rpartition(".dist-info/")[2] for n in archive.namelist()}
    for kind, found, expected in (
        ("sdist", sdist, files | {"PKG-INFO"}),
        ("wheel", wheel, package | ADDED_TO_WHEEL),
    ):
        if found != expected:
            raise ValueError(
                f"The {kind} lacks {sorted(expected - found)} and has "
                f"{sorted(found - expected)}, which it shouldn't."
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries environments; the exit status is 1 where one fails."""
    parser = argparse.ArgumentParser(description="Try the packages.")
    parser.add_argument("names", nargs="*", metavar="|".join(ENVIRONMENTS))
    parser.add_argument("--folder", type=Path, default=ROOT / "build/packages")
    options = parser.parse_args(arguments)
    unknown = {*options.names} - {*ENVIRONMENTS}
    if unknown:
        parser.error(f"unknown: {unknown}. Known: {', '.join(ENVIRONMENTS)}")
    folder = options.folder.resolve()
    packages, sources = build(folder / "dist")
    check_contents(packages)
    num_failed = 0
    for name in options.names or ENVIRONMENTS:
        start = time.perf_counter()
        trial = Trial(name, folder, packages)
        try:
            trial.install()
            trial.try_out()
            if trial.environment.tests:
                trial.run_tests(sources)
            result = "passed"
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            num_failed += 1
            result = f"FAILED: {error} See {trial.log}"
        seconds = time.perf_counter() - start
        print(f"{name:18} {seconds:4.0f} s  {result}", flush=True)
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
