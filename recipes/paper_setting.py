"""The setting of IRIS' paper, which `zephyr_7b.py` and `qwen2_5_3b.py` share.

5 iterations of 2 epochs on 50,000 prompts of UltraChat, batches of 64,
RMSProp at 5e-7 with a linear schedule (10% warm-up), conversations of at most
2,048 tokens, 256 new tokens at temperature 1, the adaptive order. Chosen here:
float32 weights that compute in bfloat16, the last answer of a conversation as
the response, half of the 2,048 tokens for each of prompt and response, and 1%
of the conversations held out. `--help` lists what can be changed.
"""

import subprocess
from functools import partial
from pathlib import Path

import keras
from paper_dry_run import dry_run
from paper_options import (
    GENERATION_BATCH_SIZE,
    LOSSES,
    length_limits,
    read_options,
    split,
)

import keras_iris
from keras_iris.distribution import ShardedParallel

WARM_UP = 0.1  # of all steps


@keras.saving.register_keras_serializable(package="keras_iris")
class LinearWarmUp(keras.optimizers.schedules.LearningRateSchedule):
    """Rises linearly to a rate, then falls linearly to 0.

    Args:
        rate: The highest learning rate.
        warm_up_steps: Steps of the rise.
        num_steps: Steps of both.
    """

    def __init__(self, rate, warm_up_steps, num_steps):
        self.rate = rate
        self.warm_up_steps = warm_up_steps
        self.num_steps = num_steps

    def __call__(self, step):
        """The learning rate of a step, from 0."""
        step = keras.ops.cast(step, "float32")
        rising = (step + 1) / self.warm_up_steps
        num_falling = max(1, self.num_steps - self.warm_up_steps)
        falling = (self.num_steps - step) / num_falling
        return self.rate * keras.ops.minimum(rising, falling)

    def get_config(self):
        """The arguments."""
        return {
            "rate": self.rate,
            "warm_up_steps": self.warm_up_steps,
            "num_steps": self.num_steps,
        }


def run_command(command, folder):
    """Runs a command with a folder as its last argument."""
    subprocess.run([*command, str(folder)], check=True)


def make_engine(options, causal_lm, tokenizer):
    """What generates."""
    if options.engine == "server":
        devices = {"CUDA_VISIBLE_DEVICES": options.server_devices}
        return keras_iris.generation.ServerEngine(
            options.server_url,
            command=options.server_command,
            environment=devices if options.server_devices else None,
            end_token_ids=tokenizer.end_token_ids,
            max_new_tokens=options.max_new_tokens,
            concurrency=options.concurrency,
            on_update=options.update_command
            and partial(run_command, options.update_command),
        )
    return keras_iris.generation.KerasEngine(
        causal_lm,
        end_token_ids=tokenizer.end_token_ids,
        max_new_tokens=options.max_new_tokens,
        batch_size=GENERATION_BATCH_SIZE,
    )


def make_evaluate(held_out, options):
    """NLL of held-out responses in nats a token."""
    targets = [example.response_ids for example in held_out]
    num_tokens = sum(len(target) for target in targets)

    def evaluate(model):
        log_probs = keras_iris.models.score_pairs(
            model, held_out, targets, batch_size=options.micro_batch_size
        )
        return {"nll_per_token": -log_probs[:, 0].sum() / num_tokens}

    return evaluate


def train(options, template_name):
    """Runs self-play, exports the model and writes the report."""
    run_dir = Path(options.run_dir).expanduser()
    keras.utils.set_random_seed(0)
    if options.shard:
        keras.distribution.set_distribution(ShardedParallel(options.shard))
    causal_lm = keras_iris.load(
        options.preset,
        # All that is trained is float32: adapters in either case.
        dtype="bfloat16" if options.lora_rank else "mixed_bfloat16",
        lora_rank=options.lora_rank,
        quantize=options.quantize,
        remat=True,
        default_template=keras_iris.data.ChatTemplate.named(template_name),
    )
    tokenizer = causal_lm.tokenizer
    template = causal_lm.chat_template
    template.check()
    examples = keras_iris.data.tokenize(
        keras_iris.data.load_dataset(
            options.data,
            split=options.split,
            num_prompts=options.max_prompts,
        ),
        tokenizer,
        cache_dir=run_dir / "tokens",
        template=template,
        **length_limits(options),
    )
    examples, held_out = split(examples, options)
    num_batches = len(examples) // options.batch_size
    num_steps = num_batches * options.epochs * options.iterations
    warm_up_steps = max(1, int(WARM_UP * num_steps))

    model = keras_iris.SelfPlayModel(causal_lm)
    model.compile(
        optimizer=keras.optimizers.RMSprop(
            LinearWarmUp(options.learning_rate, warm_up_steps, num_steps)
        ),
        loss=LOSSES[options.objective](),
        micro_batch_size=options.micro_batch_size,
    )
    is_iris = options.objective == "iris"
    self_play = keras_iris.SelfPlay(
        model,
        examples,
        run_dir,
        iterations=options.iterations,
        epochs=options.epochs,
        batch_size=options.batch_size,
        max_response_length=options.max_new_tokens,
        tokenizer=tokenizer,
        engine=make_engine(options, causal_lm, tokenizer),
        evaluate=make_evaluate(held_out, options),
        callbacks=[keras_iris.callbacks.AlphaScheduler()] if is_iris else [],
        title=f"{options.objective} on {Path(options.preset).name}",
    )
    self_play.run()
    print("Model:", keras_iris.export(causal_lm, run_dir / "model"))
    print("Report:", keras_iris.evaluation.report(run_dir))
    print(keras_iris.evaluation.scores_table(run_dir))


def main(description, *, preset, template_name, arguments=None):
    """Runs a recipe.

    Args:
        description: The recipe's docstring.
        preset: The recipe's model.
        template_name: The chat template where the checkpoint has none.
        arguments: Those of the command line.
    """
    options = read_options(description, preset, arguments)
    (dry_run if options.dry_run else train)(options, template_name)
