"""How large should the batch be? Ask the gradient, and let the batch grow with it.

    python examples/batch_size.py              # two CPU cores: about two minutes

The model and the data of `byte_lm.py`. `jaxga.NoiseScale` compares the gradients of an
update's micro-batches: the gradient noise scale is the batch, in tokens, whose noise is
as large as the gradient (McCandlish et al., arXiv 1812.06162). Three runs over the same
number of tokens, from one start, at one learning rate:

- small: 2 micro-batches per update, the fewest that can be compared;
- large: 16 micro-batches per update;
- adaptive: 2 at first, then as many as the noise scale asks for. That number is an
  argument of the step, `num_microbatches`: one compiled step serves all three runs, and
  the script fails if it is traced again.

What the noise scale says: far below it, twice the batch takes half of the updates; far
above it, as many as before, and the further tokens are wasted; at it, twice as many of
both as either extreme could do with. It does not say which learning rate goes with a
batch: here all runs have one, and the large batch would bear a higher one. It measures
plain gradients, before clipping and Adam. It is a noisy estimate: trust its order of
magnitude. And it takes micro-batches for fair samples of the data. Here they are; in a
loader that puts documents of like length into one micro-batch, as that of `byte_lm.py`
does, the difference between lengths would count as noise.
"""

import argparse
import math
import pathlib
from functools import partial
from typing import NamedTuple

import jax
import jaxga
import matplotlib.pyplot as plt
import numpy as np
import optax
from byte_lm import GPT, SIZES, evaluate, load_documents, make_batch, weighted_loss
from tqdm import tqdm

ROWS = 8  # documents per micro-batch
FEWEST, MOST = 2, 16  # micro-batches per update
DECAY = 0.95  # of the noise scale's averages, per update
WARM_UP = 20  # updates
HELD_OUT, POINTS = 256, 24  # documents; measurements in each run
COLORS = "tab:orange", "tab:gray", "tab:blue"  # of the three runs


def parse_flags(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--microbatches", type=int, default=1600, help="in each run")
    parser.add_argument("--picture", type=pathlib.Path, default="batch_size.png")
    flags = parser.parse_args(argv)
    if flags.microbatches < MOST:
        parser.error(f"--microbatches {flags.microbatches}: must be at least {MOST}")
    if not flags.picture.parent.is_dir():
        parser.error(f"--picture {flags.picture}: there is no such folder")
    return flags


# ---- Data ----------------------------------------------------------------------------


def shuffled(documents):
    """Documents in random order, for ever: each micro-batch is a fair sample."""
    rng = np.random.default_rng(0)
    while True:
        yield from (documents[i] for i in rng.permutation(len(documents)))


def next_batch(stream, context, num_microbatches):
    """A batch with room for `MOST` micro-batches, of which the first are filled."""
    documents = [next(stream) for _ in range(num_microbatches * ROWS)]
    batch = make_batch(documents, context)
    return jaxga.pad_batch(batch, MOST * ROWS, accum_steps=MOST)[0]


# ---- Training ------------------------------------------------------------------------


def make_optimizer(peak):
    """A constant rate after the warm-up: a schedule of updates would differ by run."""
    rate = optax.linear_schedule(0.0, peak, WARM_UP)
    adamw = optax.adamw(rate, b2=0.95, eps=1e-6, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def follow(noise_scale, tokens, now):
    """Micro-batches for the next update: a batch as large as the noise scale.

    `tokens` is what one of them holds, `now` how many the last update had: it is at
    most doubled. While the noise hides the gradient, the estimate is infinite.
    """
    if not math.isfinite(noise_scale):
        return now
    return int(np.clip(noise_scale / tokens, FEWEST, min(2 * now, MOST)))


POLICIES = {  # the micro-batches of the first update, and how many the next one has
    "small": (FEWEST, lambda noise_scale, tokens, now: FEWEST),
    "large": (MOST, lambda noise_scale, tokens, now: MOST),
    "adaptive": (FEWEST, follow),
}


class Updates(NamedTuple):
    """A run, update by update."""

    tokens: np.ndarray  # in the batch
    noise_scale: np.ndarray  # in tokens
    microbatches: np.ndarray
    traces: np.ndarray  # of the loss so far, over all runs


class Measured(NamedTuple):
    """A run, measured on the held-out documents after some of its updates."""

    update: np.ndarray
    tokens: np.ndarray  # since the start
    loss: np.ndarray  # nats per token


def train(name, step, state, draw_batch, budget, measure, traces):
    """One run over `budget` micro-batches."""
    count, choose = POLICIES[name]
    used, tokens, updates, measured = 0, 0, [], []
    with tqdm(desc=name, total=budget, unit=" micro-batches") as bar:
        while used < budget:
            count = min(count, budget - used)
            batch = draw_batch(num_microbatches=count)
            state, metrics = step(state, batch, num_microbatches=np.int32(count))
            weight, noise = int(metrics["weight"]), float(metrics["noise_scale"])
            updates.append((weight, noise, count, len(traces)))
            used, tokens = used + count, tokens + weight
            if used * POINTS // budget > len(measured):
                measured.append((len(updates), tokens, measure(state.params)))
            bar.update(count)
            count = choose(noise, weight / count, count)
    return Updates(*np.array(updates).T), Measured(*np.array(measured).T)


# ---- The comparison ------------------------------------------------------------------


def first_and_last(noise_scale):
    """Medians of the first tenth and of the last tenth of a run."""
    tenth = -(-len(noise_scale) // 10)
    return np.median(noise_scale[:tenth]), np.median(noise_scale[-tenth:])


def report(runs, measured):
    print("          updates   tokens in each   noise scale, first to last   held out")
    for name, run in runs.items():
        first, last = (f"{noise:.0f}" for noise in first_and_last(run.noise_scale))
        each = f"{run.tokens.min():.0f} to {run.tokens.max():.0f}"
        row = "{:<9} {:>7} {:>16} {:>20} to {:<8} {:>6.3f}"
        loss = measured[name].loss[-1]
        print(row.format(name, len(run.tokens), each, first, last, loss))
    counts = np.unique(np.concatenate([run.microbatches for run in runs.values()]))
    traces = np.concatenate([run.traces for run in runs.values()])
    print("micro-batches in an update:", *counts.astype(int))
    print(
        f"traces of the loss: {traces[0]:.0f} for the first update, "
        f"{traces[-1] - traces[0]:.0f} in the {len(traces) - 1} after it"
    )
    assert traces[0] == traces[-1] and len(counts) > 2, (traces, counts)


def draw(path, runs, measured):
    plt.switch_backend("Agg")  # no window
    figure, panels = plt.subplots(3, figsize=(8, 10), layout="constrained")
    upper, middle, lower = panels
    for (name, run), color in zip(runs.items(), COLORS, strict=True):
        updates, style = np.arange(1, len(run.tokens) + 1), {"color": color}
        noise = np.where(np.isfinite(run.noise_scale), run.noise_scale, np.nan)
        upper.plot(updates, noise, label=name, **style)
        width = min(10, len(run.tokens))
        batch = np.convolve(run.tokens, np.ones(width) / width, "valid")
        upper.plot(updates[width - 1 :], batch, linewidth=0.8, **style)
        points = measured[name]
        middle.plot(points.tokens, points.loss, **style)
        lower.plot(points.update, points.loss, **style)
    upper.set(
        title="Gradient noise scale (thick), and the batch (thin, mean of 10)",
        xlabel="optimizer updates",
        ylabel="tokens",
        xscale="log",
        yscale="log",
    )
    middle.set(xlabel="tokens seen")
    lower.set(xlabel="optimizer updates", xscale="log")
    least = min(points.loss.min() for points in measured.values())
    for panel in (middle, lower):
        panel.set(
            ylabel="held-out loss\n(nats per token)", ylim=(least - 0.05, least + 1)
        )
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=80, format="png")


def make_run(flags):
    """What the three runs share: called with a policy's name, it trains."""
    layers, width, heads, context, peak = SIZES[flags.size]
    model, tx, traces = GPT(layers, width, heads, context), make_optimizer(peak), []
    training, held_out = load_documents(context)
    chosen = np.random.default_rng(0).choice(len(held_out), HELD_OUT, replace=False)
    held_out = [held_out[i] for i in chosen]

    def loss_fn(params, batch):
        traces.append(None)  # runs when jax traces the function, not when it computes
        return weighted_loss(model, params, batch)

    step = jaxga.make_train_step(loss_fn, tx, accum_steps=MOST)
    init, tokens = jax.jit(model.init), np.zeros((1, context), np.int32)
    evaluated = jax.jit(partial(weighted_loss, model))

    def measure(params):
        return evaluate(evaluated, params, held_out, jax.device_put, HELD_OUT, context)

    def run(name):
        noise_scale = jaxga.NoiseScale(per="microbatch", decay=DECAY)
        params = init(jax.random.key(0), tokens)["params"]
        state = jaxga.TrainState.create(params, tx, noise_scale=noise_scale)
        draw_batch = partial(next_batch, shuffled(training), context)
        settings = draw_batch, flags.microbatches, measure, traces
        return train(name, step, state, *settings)

    return run


def main(argv=None):
    flags = parse_flags(argv)
    run, runs, measured = make_run(flags), {}, {}
    for name in POLICIES:
        runs[name], measured[name] = run(name)
    draw(flags.picture, runs, measured)
    print(f"picture: {flags.picture}")
    report(runs, measured)
    return runs, measured


if __name__ == "__main__":
    main()
