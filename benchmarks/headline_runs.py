"""The runs of headline_g2p.py, one at a time; a file remembers them."""

import functools
import json
import time

import headline_data
import headline_model
import headline_training
import jax
from headline_plan import CONTROL, GRID, METHODS

START, ALL = "start", "SFT on 100%"


class Runs:
    """Runs that are made when they are asked for, and kept.

    Args:
        file: Where results are appended, a line of JSON each; what is there
            already isn't run again.
        settings: As `headline_plan.SETTINGS`.
    """

    def __init__(self, file, settings):
        self.file = file
        self.settings = settings
        words = headline_data.load_words()
        rows, self.num_symbols = headline_data.encode(words)
        self.replications = headline_data.split(
            rows, settings["words"], settings["seeds"]
        )
        lines = file.read_text().splitlines() if file.exists() else []
        self._found = {}
        for line in lines:
            result = json.loads(line)
            self._found[_key(result["job"])] = result
        self._start = functools.cache(self._make_start)

    def setting(self, name):
        """The settings of a row of `GRID`."""
        return self.settings | GRID[name][0]

    def get(self, setting, method, rate, seed):
        """The result of a run.

        Args:
            setting: A name of `GRID`.
            method: A name of its methods, `START` or `ALL`.
            rate: The learning rate; None for these two.
            seed: Whose words, first weights, order of words and samples.

        Returns:
            Scores of "validation" and "test" words, and "iterations": what is
            known of each.
        """
        job = {
            "setting": setting,
            "method": method,
            "rate": rate,
            "seed": seed,
            **self.setting(setting),
        }
        # Other runs.
        for name in ("seeds", "tuning_seeds", "rates"):
            del job[name]
        key = _key(job)
        if key not in self._found:
            begin = time.perf_counter()
            params, iterations = self._run(setting, method, rate, seed)
            words, keys = self.replications[seed], _keys(seed)
            result = {"job": job, "iterations": iterations} | {
                part: headline_model.evaluate(
                    params, getattr(words, part), keys["evaluation"]
                )
                for part in ("validation", "test")
            }
            self._keep(key, result, time.perf_counter() - begin)
        return self._found[key]

    def _keep(self, key, result, seconds):
        self._found[key] = result
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(result) + "\n")
        job, scores = result["job"], result["validation"]
        rate = "" if job["rate"] is None else f" at {job['rate']:g}"
        print(
            f"{job['setting']}: {job['method']}{rate}, seed {job['seed']}: "
            f"NLL {scores['nll']:.4f}, greedy phoneme errors "
            f"{scores['per greedy']:.4f} ({seconds:.1f} s)",
            flush=True,
        )

    def _run(self, setting, method, rate, seed):
        settings = self.setting(setting)
        pool = self.replications[seed].pool
        if method == ALL:
            return self._fine_tune(seed, pool, settings["all_epochs"]), []
        names = ("annotated", "sft_epochs", "noise")
        start = self._start(seed, *(settings[name] for name in names))
        if method == START:
            return start, []
        return headline_training.self_play(
            start,
            pool[: settings["annotated"]],
            _keys(seed)["self_play"],
            GRID[setting][1][method],
            settings | {"rate": rate},
        )

    def _make_start(self, seed, num_words, epochs, noise):
        """The first policy."""
        rows = self.replications[seed].pool[:num_words]
        rows = headline_data.corrupt(rows, noise, seed)
        return self._fine_tune(seed, rows, epochs)

    def _fine_tune(self, seed, rows, epochs):
        keys = _keys(seed)
        params = headline_model.init(
            keys["init"], self.num_symbols, self.settings["model"]
        )
        return headline_training.fine_tune(
            params,
            rows,
            keys["sft"],
            METHODS[CONTROL],
            {
                "epochs": epochs,
                "rate": self.settings["sft_rate"],
                "batch_size": self.settings["batch_size"],
            },
        )


def _key(job):
    return json.dumps(job, sort_keys=True)


def _keys(seed):
    names = ("init", "sft", "self_play", "evaluation")
    keys = jax.random.split(jax.random.key(seed), len(names))
    return dict(zip(names, keys, strict=True))
