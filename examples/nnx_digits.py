"""Train a convolutional net with batch norm in Flax nnx, and compare merge rules.

    python examples/nnx_digits.py              # two CPU cores: about one minute

The 1,797 handwritten digits of scikit-learn, 64 per update: at once, or in 16
micro-batches of 4. Gradients add up exactly. What does not is batch norm: each
micro-batch is normalised by its own statistics, and moves the running averages that the
net is evaluated with. `model_state_merge` says what becomes of those:

    carry        moved by one micro-batch after the other: 16 times per update
    mean         moved once, to the mean of the micro-batches' statistics, which lacks
                 the spread between them
    batch_norm   moved once, to the statistics of the whole batch

Training does not use them, and is the same under the three rules; evaluation does.
Beside each run goes a shadow: the same parameters, and running averages that have only
seen whole batches. The script prints how far each rule is from it, and fails if
`batch_norm` is not within rounding at the first layer. (The second sees what the first
has normalised, which is not the same in micro-batches.)
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import jaxga
import jaxga.nnx
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

ROWS, ACCUM_STEPS = 64, 16  # 16 micro-batches of 4 images
HELD_OUT = 360  # images, the last
RUNS = {  # micro-batches per update, and the rule
    "whole batch": (1, "carry"),
    "carry": (ACCUM_STEPS, "carry"),
    "mean": (ACCUM_STEPS, "mean"),
    "batch_norm": (ACCUM_STEPS, {nnx.BatchStat: "batch_norm"}),
}
COLORS = "0.6", "tab:orange", "tab:red", "tab:blue"
WIDTHS = 1.5, 5, 3, 1  # of lines that lie on each other
BOUND = 1e-5  # of batch_norm at the first layer: rounding

digits = load_digits()
images = (digits.images[..., None] / 16).astype(np.float32)
labels = digits.target.astype(np.int32)
training = {"images": images[:-HELD_OUT], "labels": labels[:-HELD_OUT]}
held_out = {"images": images[-HELD_OUT:], "labels": labels[-HELD_OUT:]}


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.norm_again = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, images):
        x = nnx.relu(self.norm(self.first(images)))
        x = nnx.relu(self.norm_again(self.second(x)))
        return self.out(self.dropout(x.reshape(len(x), -1)))


def loss_fn(model, batch, metrics):
    logits = model(batch["images"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    metrics.update(logits=logits, labels=batch["labels"], values=losses)
    return jaxga.WeightedSum.of(losses)


def make_metrics():
    return nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average())


@nnx.jit
def evaluate(model, metrics):
    """A copy in evaluation mode: its running averages take the place of statistics."""
    loss_fn(nnx.view(model, deterministic=True, use_running_average=True), *metrics)


@nnx.jit
def follow(shadow, model, batch):
    """Moves the shadow's running averages by the whole batch, with the parameters."""
    nnx.update(shadow, nnx.state(model, nnx.Param))
    shadow(batch["images"])


def apart(model, shadow):
    """The distance of the running averages, over their size, at each layer."""
    distances = []
    for name in ("norm", "norm_again"):
        ours, whole = (
            jnp.concatenate([getattr(net, name).mean[...], getattr(net, name).var[...]])
            for net in (model, shadow)
        )
        distances.append(jnp.linalg.norm(ours - whole) / jnp.linalg.norm(whole))
    return distances


def batches(epochs):
    """The same shuffled batches for every run; a rest of less than 64 is left out."""
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(training["labels"]))
        for first in range(0, len(order) - ROWS + 1, ROWS):
            chosen = order[first : first + ROWS]
            yield {name: values[chosen] for name, values in training.items()}


def train(name, accum_steps, rule, epochs):
    model, shadow = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3, eps=1e-6))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = jaxga.nnx.make_train_step(
        loss_fn, accum_steps=accum_steps, model_state_merge=rule
    )
    metrics, losses, distances = make_metrics(), [], []
    for batch in tqdm(list(batches(epochs)), desc=name, unit=" updates"):
        follow(shadow, model, batch)
        losses.append(step(model, optimizer, batch, metrics)["loss"])
        distances.append(apart(model, shadow))
    assert metrics.accuracy.count[...] == len(losses) * ROWS  # of all micro-batches
    results = make_metrics()
    evaluate(model, (held_out, results))
    distances = np.array(jax.device_get(distances))
    return np.array(jax.device_get(losses)), distances, results.compute()


def draw(path, curves):
    plt.switch_backend("Agg")  # no window
    figure, (upper, lower) = plt.subplots(
        2, sharex=True, figsize=(8, 7), layout="constrained"
    )
    for color, width, name in zip(COLORS, WIDTHS, curves, strict=True):
        losses, distances, results = curves[name]
        updates = np.arange(1, len(losses) + 1)
        label = f"{name}; held-out accuracy {results['accuracy']:.3f}"
        upper.semilogy(updates, losses, color=color, linewidth=width, label=label)
        # What is equal to the last bit has no logarithm: drawn at 1e-8.
        first, second = np.maximum(distances, 1e-8).T
        lower.semilogy(updates, first, color=color, label=name)
        lower.semilogy(updates, second, color=color, linestyle=":", linewidth=1)
    upper.set(
        title="Digits in micro-batches of 4: running averages of batch norm",
        ylabel="training loss (nats per image)",
    )
    lower.set(
        xlabel="optimizer updates",
        ylabel="distance of the running averages\nfrom those of whole batches",
        ylim=(5e-9, 30),
    )
    for panel in (upper, lower):
        panel.grid(alpha=0.3)
    upper.legend()
    lower.legend(ncols=4, title="solid: first layer; dotted: second", fontsize="small")
    figure.savefig(path, dpi=90)


def parse_flags(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--picture", type=pathlib.Path, default="nnx_digits.png")
    flags = parser.parse_args(argv)
    if flags.epochs < 1:
        parser.error(f"--epochs {flags.epochs}: must be at least 1")
    return flags


def report(curves):
    print("               averages, 1st and 2nd layer   held-out loss   accuracy")
    for name, (_, distances, results) in curves.items():
        first, second = distances[-1]
        scores = f"{results['loss']:.4f} {results['accuracy']:>10.3f}"
        print(f"{name:<12} {first:>16.1e} {second:>12.1e} {scores:>26}")


def check(curves):
    worst = {name: distances[:, 0].max() for name, (_, distances, _) in curves.items()}
    assert worst["batch_norm"] < BOUND < worst["mean"] / 100, worst
    assert worst["whole batch"] < BOUND < worst["carry"] / 100, worst
    assert all(results["accuracy"] > 0.9 for _, _, results in curves.values())


def main(argv=None):
    flags = parse_flags(argv)
    curves = {name: train(name, *run, flags.epochs) for name, run in RUNS.items()}
    report(curves)
    draw(flags.picture, curves)
    print(f"picture: {flags.picture}")
    check(curves)
    return curves


if __name__ == "__main__":
    main()
