"""Train a byte-level GPT on Python's standard library, three times from one start.

    python examples/byte_lm.py                 # two CPU cores: some minutes
    python examples/byte_lm.py --devices 8     # without GPUs: 8 simulated devices
    python examples/byte_lm.py --size medium --batch 256 --steps 1000    # for a GPU

(1) the full batch at once, in plain JAX; (2) jaxga, the same batch in 8 micro-batches;
(3) the mean of the micro-batches' means, the mistake that most trainers shipped. (1)
and (2) are the same run, to rounding, and (3) is another one: the figures printed at
the end and the picture say by how much, and the script fails if it is not so.
"""

import argparse
import pathlib
import re
import sysconfig
import textwrap
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import jaxga.linen
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from tqdm import tqdm

ACCUM_STEPS = 8  # micro-batches per update
END = 0  # before and after every document; no source file holds a NUL byte
SIZES = {  # layers, width, heads, context in bytes, peak learning rate
    "tiny": (2, 32, 2, 64, 1e-2),
    "small": (2, 96, 4, 128, 4e-3),
    "medium": (6, 384, 6, 512, 1e-3),
    "large": (12, 768, 12, 1024, 6e-4),
}
# (2) against (1). Rounding grows in every training run, and faster in some than in
# others: the loss is held to its bound for as long as a default run takes.
GRADIENT_BOUND = 5e-6  # norm of the difference over the norm, at step 0
LOSS_BOUND, BOUND_HOLDS = 1e-4, 360  # nats per token; updates

# A GPU would round the factors of a float32 product to TF32's 10 bits, and (1) and (2)
# differently. This is for the comparison: leave it out of a run of your own.
jax.config.update("jax_default_matmul_precision", "highest")


# ---- Flags ---------------------------------------------------------------------------


def parse_flags(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--steps", type=int, default=360, help="optimizer updates")
    parser.add_argument("--batch", type=int, default=64, help="documents per update")
    parser.add_argument("--devices", type=int, default=1, help="simulated on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and order")
    parser.add_argument("--picture", type=pathlib.Path, default="byte_lm.png")
    flags = parser.parse_args(argv)
    for name, least in (("steps", 1), ("batch", 1), ("devices", 1), ("seed", 0)):
        if getattr(flags, name) < least:
            parser.error(f"--{name} {getattr(flags, name)}: must be at least {least}")
    if not flags.picture.parent.is_dir():
        parser.error(f"--picture {flags.picture}: there is no such folder")
    # Before anything asks for a device. It does nothing where there are GPUs.
    jax.config.update("jax_num_cpu_devices", flags.devices)
    # Simulated devices share the threads of few cores: with several computations under
    # way, each can hold threads that the others' all-reduce is waiting for.
    jax.config.update("jax_cpu_enable_async_dispatch", flags.devices == 1)
    if flags.devices > jax.device_count():
        parser.error(
            f"--devices {flags.devices}: this machine has {jax.device_count()} "
            f"({jax.devices()[0].device_kind})"
        )
    try:
        sizes = jaxga.BatchSizes(
            global_batch_size=flags.batch,
            accum_steps=ACCUM_STEPS,
            num_devices=flags.devices,
        )
    except ValueError as error:
        parser.error(f"--batch {flags.batch} --devices {flags.devices}: {error}")
    return flags, sizes


# ---- Data ----------------------------------------------------------------------------


def load_documents(context):
    """Documents of a few bytes to the whole context, from short and long sources.

    Every 8th file is cut into its lines, the others at blank lines. Every 31st file is
    held out.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    # What is not the library, and what is tables.
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    skipped |= {"encodings", "pydoc_data"}
    paths = [p.relative_to(root) for p in sorted(root.rglob("*.py"))]
    training, held_out = [], []
    for number, path in enumerate(p for p in paths if skipped.isdisjoint(p.parts)):
        cut = rb"[\r\n]+" if number % 8 == 0 else rb"\r?\n(?:[ \t]*\r?\n)+"
        pieces = re.split(cut, (root / path).read_bytes())
        documents = held_out if number % 31 == 0 else training
        documents += [piece[: context - 1] for piece in pieces if piece.strip()]
    if not held_out:
        raise SystemExit(f"no source files of the standard library under {root}")
    return training, held_out


def make_batch(documents, context):
    """Documents as rows of one length; the mask is false on their padding."""
    tokens = np.full((len(documents), context + 1), END, np.int32)
    for row, document in zip(tokens, documents, strict=True):
        row[1 : len(document) + 1] = np.frombuffer(document, np.uint8)
    lengths = np.array([len(document) + 1 for document in documents])  # with one END
    mask = np.arange(context) < lengths[:, None]
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


def training_batches(documents, flags, context):
    """The same shuffled batches for every run, bucketed by length.

    Loaders put documents of like length together, to save padding. Micro-batches then
    hold very different numbers of tokens: here the shortest documents are micro-batch
    0, the longest are the last. Micro-batch i is rows i, i + 8, i + 16, ...
    """
    rng, queue = np.random.default_rng(flags.seed), []
    rows = np.arange(flags.batch).reshape(ACCUM_STEPS, -1).T.reshape(-1)
    for _ in range(flags.steps):
        while len(queue) < flags.batch:
            queue += rng.permutation(len(documents)).tolist()
        chosen, queue = queue[: flags.batch], queue[flags.batch :]
        by_length = sorted((documents[i] for i in chosen), key=len)
        yield make_batch([by_length[row] for row in rows], context)


# ---- Model, loss, optimizer ----------------------------------------------------------


class GPT(nn.Module):
    layers: int
    width: int
    heads: int
    context: int

    @nn.compact
    def __call__(self, tokens):
        normal = nn.initializers.normal
        norm = partial(nn.LayerNorm, use_bias=False)
        dense = partial(nn.Dense, use_bias=False)
        positions = self.param("positions", normal(0.3), (self.context, self.width))
        x = nn.Embed(256, self.width, embedding_init=normal(1.0))(tokens) + positions
        # Padding comes last, and attention looks back only: no mask but this one.
        causal = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False)
            x += attention(norm()(x), mask=causal)
            x += dense(self.width)(nn.gelu(dense(4 * self.width)(norm()(x))))
        return dense(256, kernel_init=normal(0.02))(norm()(x))


def token_losses(model, params, batch):
    logits = model.apply({"params": params}, batch["inputs"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


def weighted_loss(model, params, batch):
    """What jaxga takes, here and in the evaluation: a sum, and how many tokens."""
    losses = token_losses(model, params, batch)
    return jaxga.WeightedSum.of(losses, where=batch["mask"])


def mean_loss(model, params, batch):
    """What the plain runs take: the mean over the tokens of the rows at hand."""
    losses = jnp.where(batch["mask"], token_losses(model, params, batch), 0)
    return losses.sum() / batch["mask"].sum()


def make_optimizer(steps, peak):
    """Clipping, warm-up, cosine: all count updates, however a batch is cut."""
    warm_up = max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, steps + 1)
    # Two things keep runs that differ by rounding alone together. An eps above the
    # usual 1e-8: Adam divides a gradient by its own size, and would make a real step
    # of the rounding of one that is almost zero. And a moderate peak: at 6e-3 the small
    # model became chaotic, and (2) drifted from (1) by 1e-2 instead of 1e-6.
    adamw = optax.adamw(schedule, b2=0.95, eps=1e-6, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


# ---- Three training steps ------------------------------------------------------------


def full_batch_step(model, state, batch):
    """(1) The truth: plain JAX, all rows at once, on one device."""
    loss_and_grad = jax.value_and_grad(mean_loss, argnums=1)
    loss, grads = loss_and_grad(model, state.params, batch)
    return state.apply_gradients(grads=grads), {"loss": loss}


def make_jaxga_step(model, parallel):
    """(2) jaxga: sums and weights are merged, and divided once per update."""
    return jaxga.linen.make_train_step(
        partial(weighted_loss, model), accum_steps=ACCUM_STEPS, parallel=parallel
    )


def mean_of_means_step(model, state, batch):
    """(3) THE MISTAKE: each micro-batch is divided by its own tokens, then averaged.

    A token of a short document so counts many times as much as one of a long document.
    """
    microbatches = jax.tree.map(
        lambda x: x.reshape(-1, ACCUM_STEPS, *x.shape[1:]).swapaxes(0, 1), batch
    )

    def add(grads, microbatch):
        loss_and_grad = jax.value_and_grad(mean_loss, argnums=1)
        loss, new = loss_and_grad(model, state.params, microbatch)
        return jax.tree.map(lambda x, y: x + y / ACCUM_STEPS, grads, new), loss

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    grads, losses = jax.lax.scan(add, zeros, microbatches)
    tokens = microbatches["mask"].sum((1, 2))
    real = (losses * tokens).sum() / tokens.sum()  # for the picture: counted right
    metrics = {"loss": losses.mean(), "real": real}
    return state.apply_gradients(grads=grads), metrics


# ---- Training, evaluation, samples ---------------------------------------------------


def train(name, step, state, batches):
    """One run. Its bar counts tokens: tokens per second, and the time left for them."""
    tokens, history = [int(batch["mask"].sum()) for batch in batches], []
    unit = {"total": sum(tokens), "unit": " tokens", "unit_scale": True}
    with tqdm(desc=name, mininterval=0.5, **unit) as bar:
        for batch, count in zip(batches, tokens, strict=True):
            state, metrics = step(state, batch)
            history.append(metrics)
            # One update late: waiting for the newest loss would leave a GPU idle.
            loss = float(history[max(0, len(history) - 2)]["loss"])
            bar.set_postfix_str(f"update {len(history)}, loss {loss:.3f}", False)
            bar.update(count)
        jax.block_until_ready(state)
    curves = jax.tree.map(lambda *values: np.array(values), *jax.device_get(history))
    return state, curves


def evaluate(loss_fn, params, documents, place, rows, context):
    """Loss per token of all documents: sums merge over batches, one division."""
    sums = []
    for first in range(0, len(documents), rows):
        batch = make_batch(documents[first : first + rows], context)
        batch, real = jaxga.pad_batch(batch, rows, accum_steps=1)  # the last is short
        batch["mask"] &= real[:, None]
        sums.append(loss_fn(params, place(batch)))
    return float(reduce(jaxga.merge, sums).mean())


@partial(jax.jit, static_argnums=(0, 3))
def extend(model, params, tokens, first, key):
    """Samples the tokens from position `first` on."""

    def sample(position, tokens):
        logits = model.apply({"params": params}, tokens)[:, position - 1]
        drawn = jax.random.categorical(jax.random.fold_in(key, position), logits / 0.5)
        return tokens.at[:, position].set(drawn)

    return jax.lax.fori_loop(first, tokens.shape[1], sample, tokens)


def print_samples(model, params, key, prompt=b"def "):
    tokens = np.full((4, model.context), END, np.int32)
    tokens[:, 1 : len(prompt) + 1] = list(prompt)
    print(f"\nsamples, which begin with {prompt.decode()!r}:\n")
    for row in np.asarray(extend(model, params, tokens, len(prompt) + 1, key)):
        text = bytes(row[1:].tolist()).split(bytes([END]))[0]
        text = re.sub(rb"[^\n -~]", b"?", text).decode()
        print(textwrap.indent(text, "    | "), end="\n\n")


# ---- The comparison ------------------------------------------------------------------


def report(names, grads, curves, held_out):
    """Prints how far each run is from (1), and checks it. Returns what it prints."""
    grads, truth = jax.device_get(grads), curves[0]["loss"]
    unit = optax.tree.norm(grads[0])
    gradient = [
        float(optax.tree.norm(optax.tree.sub(g, grads[0])) / unit) for g in grads
    ]
    distances = [abs(curve["loss"] - truth) for curve in curves]
    largest = [float(distance.max()) for distance in distances]
    print("difference to (1)   gradient at step 0   loss, largest   held-out loss")
    for row in zip(names, gradient, largest, held_out, strict=True):
        print("{:<19} {:>18.1e} {:>15.1e} {:>15.4f}".format(*row))
    checked = [float(distance[:BOUND_HOLDS].max()) for distance in distances]
    assert gradient[1] < GRADIENT_BOUND < gradient[2] / 100, gradient
    assert checked[1] < LOSS_BOUND < checked[2] / 100, checked
    columns = {"gradient": gradient, "loss": largest, "held_out": held_out}
    return {
        name: {column: values[i] for column, values in columns.items()}
        for i, name in enumerate(names)
    }


def draw(path, names, curves, held_out):
    plt.switch_backend("Agg")  # no window
    truth, ours, mistake = (curve["loss"] for curve in curves)
    updates = np.arange(1, len(truth) + 1)
    figure, (upper, lower) = plt.subplots(
        2, sharex=True, figsize=(8, 7), height_ratios=(3, 2), layout="constrained"
    )
    labels = [f"{n}; held-out {x:.3f}" for n, x in zip(names, held_out, strict=True)]
    upper.plot(updates, truth, color="0.75", linewidth=5, label=labels[0])
    upper.plot(updates, ours, color="tab:blue", linewidth=1.2, label=labels[1])
    upper.plot(updates, mistake, color="tab:red", linewidth=1.2, label=labels[2])
    upper.set(
        yscale="log",
        yticks=(ticks := (2, 2.5, 3, 4, 5)),
        yticklabels=map(str, ticks),
        title="One batch, three ways to its gradient: a byte-level GPT from one start",
        ylabel="training loss (nats per token)",
    )
    upper.minorticks_off()
    for loss, color, label in (
        (mistake, "tab:red", "(3), the loss that it reports"),
        (curves[2]["real"], "tab:orange", "(3), the real loss of its parameters"),
        (ours, "tab:blue", "(2)"),
    ):
        # Losses that are equal to the last bit have no logarithm: drawn at 1e-7.
        distance = np.maximum(abs(loss - truth), 1e-7)
        lower.semilogy(updates, distance, color=color, linewidth=1.2, label=label)
    lower.set(
        xlabel="optimizer updates",
        ylabel="distance from (1)\n(nats per token)",
        ylim=(5e-8, 50),
    )
    for panel in (upper, lower):
        panel.grid(alpha=0.3)
    upper.legend(loc="upper right")
    lower.legend(loc="upper center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=90, format="png")


def main(argv=None):
    flags, sizes = parse_flags(argv)
    layers, width, heads, context, peak = SIZES[flags.size]
    training, held_out = load_documents(context)
    batches = list(training_batches(training, flags, context))
    tokens = batches[0]["mask"].reshape(-1, ACCUM_STEPS, context).sum((0, 2))
    print(f"{len(training)} documents to train on, {len(held_out)} held out")
    print(sizes)
    print("tokens in the micro-batches of the first update:", *tokens)

    model, key = GPT(layers, width, heads, context), jax.random.key(flags.seed)
    devices = jax.devices()[: flags.devices]
    mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    parallel = jaxga.DataParallel(mesh)
    # A step, and where its state and its batches go: (1) and (3) stay on one device.
    one_device = jax.device_put, jax.device_put
    all_devices = parallel.shard_state, parallel.shard_batch
    runs = {
        "(1) full batch": (jax.jit(partial(full_batch_step, model)), *one_device),
        "(2) jaxga": (make_jaxga_step(model, parallel), *all_devices),
        "(3) mean of means": (jax.jit(partial(mean_of_means_step, model)), *one_device),
    }
    loss_fn = jax.jit(partial(weighted_loss, model))
    tx = make_optimizer(flags.steps, peak)

    init = jax.jit(model.init)

    def start(tx):  # made anew for every run: jaxga's step reuses the state's memory
        params = init(key, batches[0]["inputs"])["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    grads, curves, states, evaluations = [], [], [], []
    for name, (step, place_state, place_batch) in runs.items():
        # An optimizer whose whole state is the gradient that the step hands to it.
        probe, _ = step(place_state(start(optax.trace(decay=0.0))), batches[0])
        grads.append(probe.opt_state.trace)
        state, curve = train(name, step, place_state(start(tx)), batches)
        states.append(state)
        curves.append(curve)
        settings = held_out, place_batch, flags.batch, context
        evaluations.append(evaluate(loss_fn, state.params, *settings))

    print_samples(model, states[1].params, key)
    draw(flags.picture, list(runs), curves, evaluations)
    print(f"picture: {flags.picture}")
    return report(list(runs), grads, curves, evaluations)


if __name__ == "__main__":
    main()
