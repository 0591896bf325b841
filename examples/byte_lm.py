"""Train a byte-level GPT on the Python standard library, three times from one start.

    python examples/byte_lm.py                       # CPU, two cores: three minutes
    python examples/byte_lm.py --devices 8           # on CPU, 8 simulated devices
    python examples/byte_lm.py --size medium --steps 1000 --batch 256     # a GPU

(1) the full batch at once, in plain JAX; (2) jaxga, the same batch in 8 micro-batches;
(3) the mean of the micro-batches' means, the mistake that most trainers shipped. (1) and
(2) are the same run, to rounding; (3) is another one. The picture and the figures printed
at the end show it, and the script fails if it is not so.
"""

import argparse
import functools
import pathlib
import re
import sysconfig
import textwrap
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga.linen
import matplotlib
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from tqdm import tqdm

import jaxga

ACCUM_STEPS = 8  # micro-batches per update
END = 0  # begins and ends every document; no source file holds a NUL byte
SIZES = {  # layers, width, heads, context in bytes, peak learning rate
    "tiny": (2, 32, 2, 64, 1e-2),
    "small": (3, 96, 4, 256, 4e-3),
    "medium": (6, 384, 6, 512, 1e-3),
    "large": (12, 768, 12, 1024, 6e-4),
}
GRADIENT_BOUND = 5e-6  # (2) against (1): norm of the difference over the norm
LOSS_BOUND = 1e-3  # (2) against (1): nats per token, at any update of the run

# A GPU would round the factors of a float32 product to 10 bits (TF32), and (1) and (2)
# would differ by that rounding. It is for the comparison: leave it out in your own run.
jax.config.update("jax_default_matmul_precision", "highest")


# ---- The command line -----------------------------------------------------------------


def parse_flags():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--steps", type=int, default=150, help="optimizer updates")
    parser.add_argument("--batch", type=int, default=64, help="documents per update")
    parser.add_argument("--devices", type=int, default=1, help="simulated on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and order")
    parser.add_argument("--picture", type=pathlib.Path, default="byte_lm.png")
    flags = parser.parse_args()
    for name, least in (("steps", 1), ("batch", 1), ("devices", 1), ("seed", 0)):
        if getattr(flags, name) < least:
            parser.error(f"--{name} {getattr(flags, name)}: must be at least {least}")
    if not flags.picture.parent.is_dir():
        parser.error(f"--picture {flags.picture}: there is no such folder")
    # Before anything asks for a device. It is ignored where there are GPUs or TPUs.
    jax.config.update("jax_num_cpu_devices", flags.devices)
    if flags.devices > jax.device_count():
        parser.error(
            f"--devices {flags.devices}: this machine has {jax.device_count()} devices "
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


# ---- The data -------------------------------------------------------------------------


def load_documents(context):
    """The library's source, cut at blank lines; every 40th file is held out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    # Not the library itself, or tables instead of text.
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    skipped |= {"encodings", "pydoc_data"}
    training, held_out = [], []
    for number, path in enumerate(sorted(root.rglob("*.py"))):
        if skipped.isdisjoint(path.relative_to(root).parts):
            pieces = re.split(rb"\n(?:[ \t]*\n)+", path.read_bytes())
            documents = held_out if number % 40 == 0 else training
            documents.extend(piece[: context - 1] for piece in pieces if piece)
    if not held_out:
        raise SystemExit(f"no source files of the standard library under {root}")
    return training, held_out


def make_batch(documents, context):
    """Documents as padded rows. Their lengths, and so their weights, are very uneven."""
    tokens = np.full((len(documents), context + 1), END, np.int32)
    for row, document in zip(tokens, documents, strict=True):
        row[1 : len(document) + 1] = np.frombuffer(document, np.uint8)
    lengths = np.array([len(document) + 1 for document in documents])
    mask = np.arange(context) < lengths[:, None]
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask}


def training_batches(documents, flags, context):
    """The same shuffled batches for every run, bucketed by length.

    Loaders put documents of like length together to save padding. A micro-batch then
    holds many tokens or few: here the shortest documents are micro-batch 0, the longest
    are the last. Micro-batch i is rows i, i + 8, i + 16, ... on any number of devices.
    """
    rng, queue = np.random.default_rng(flags.seed), []
    for _ in range(flags.steps):
        if len(queue) < flags.batch:
            queue += rng.permutation(len(documents)).tolist()
        chosen, queue = queue[: flags.batch], queue[flags.batch :]
        by_length = sorted((documents[i] for i in chosen), key=len)
        rows = np.arange(flags.batch).reshape(ACCUM_STEPS, -1).T.reshape(-1)
        yield make_batch([by_length[row] for row in rows], context)


# ---- The model and its loss -----------------------------------------------------------


class GPT(nn.Module):
    layers: int
    width: int
    heads: int
    context: int

    @nn.compact
    def __call__(self, tokens):
        small = nn.initializers.normal(0.02)
        embed = nn.Embed(256, self.width, embedding_init=small)
        positions = self.param("positions", small, (self.context, self.width))
        x = embed(tokens) + positions[None, : tokens.shape[1]]
        # Padding comes last, and attention looks back only: it needs no mask of its own.
        causal = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(self.heads, use_bias=False)
            x += attention(nn.LayerNorm(use_bias=False)(x), mask=causal)
            hidden = nn.Dense(4 * self.width, use_bias=False)
            out = nn.Dense(self.width, use_bias=False)
            x += out(nn.gelu(hidden(nn.LayerNorm(use_bias=False)(x))))
        return embed.attend(nn.LayerNorm(use_bias=False)(x))


def token_losses(model, params, batch):
    logits = model.apply({"params": params}, batch["inputs"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])


def mean_loss(model, params, batch):
    """What the plain runs differentiate: a mean over the tokens of these rows."""
    losses, mask = token_losses(model, params, batch), batch["mask"]
    return jnp.where(mask, losses, 0).sum() / mask.sum()


def weighted_loss(model, params, batch):
    """What jaxga takes, in training and in evaluation: a sum, and its tokens."""
    return jaxga.WeightedSum.of(
        token_losses(model, params, batch), where=batch["mask"]
    )


def make_optimizer(steps, peak):
    """Everything here counts updates: one per batch, however it is cut."""
    warm_up = max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warm_up, steps + 1)
    # Adam divides a gradient by its own size. With the usual eps of 1e-8 that makes the
    # rounding of gradients that are almost zero (bytes that hardly occur) as large as a
    # real step, and two runs that differ by rounding alone drift apart.
    adam = optax.adamw(schedule, b2=0.95, eps=1e-6, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


# ---- Three training steps -------------------------------------------------------------


def full_batch_step(model, state, batch):
    """(1) The truth: plain JAX, all rows at once, on one device."""
    loss_and_grad = jax.value_and_grad(mean_loss, argnums=1)
    loss, grads = loss_and_grad(model, state.params, batch)
    return state.apply_gradients(grads=grads), {"loss": loss}


def make_jaxga_step(model, parallel):
    """(2) jaxga: sums and weights are merged, and divided once per update."""
    loss_fn = functools.partial(weighted_loss, model)
    return jaxga.linen.make_train_step(
        loss_fn, accum_steps=ACCUM_STEPS, parallel=parallel
    )


def mean_of_means_step(model, state, batch):
    """(3) THE MISTAKE: each micro-batch is divided by its own tokens, then averaged.

    A token of a short document counts many times as much as one of a long document.
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
    exact = (losses * tokens).sum() / tokens.sum()  # the same rows, counted right
    metrics = {"loss": losses.mean(), "exact": exact}
    return state.apply_gradients(grads=grads), metrics


# ---- Training, evaluation, samples ----------------------------------------------------


def train(name, step, state, batches, total_tokens):
    """One run. The bar counts tokens: its rate and the time left are exact."""
    history = []
    bar = tqdm(desc=name, total=total_tokens, unit=" tokens", unit_scale=True)
    with bar:
        for batch in batches:
            state, metrics = step(state, batch)
            history.append(metrics)
            # One update late: nobody waits for the loss while a device could compute.
            shown = history[max(0, len(history) - 2)]
            bar.set_postfix(update=len(history), loss=f"{shown['loss']:.3f}")
            bar.update(int(batch["mask"].sum()))
        jax.block_until_ready(state)
    names = history[0].keys()
    return state, {n: np.array([float(m[n]) for m in history]) for n in names}


def evaluate(loss_fn, params, documents, rows, context):
    """Loss per token of all documents: sums merge over batches, one division."""
    sums = []
    for first in range(0, len(documents), rows):
        batch = make_batch(documents[first : first + rows], context)
        batch, real = jaxga.pad_batch(batch, rows, accum_steps=1)
        batch["mask"] &= real[:, None]
        sums.append(loss_fn(params, batch))
    return float(functools.reduce(jaxga.merge, sums).mean())


@functools.partial(jax.jit, static_argnums=(0, 4))
def sample(model, params, tokens, key, first):
    """Fills rows of tokens from position `first` on."""

    def extend(position, tokens):
        logits = model.apply({"params": params}, tokens)[:, position - 1]
        key_here = jax.random.fold_in(key, position)
        return tokens.at[:, position].set(jax.random.categorical(key_here, logits / 0.7))

    return jax.lax.fori_loop(first, tokens.shape[1], extend, tokens)


def print_samples(model, params, key, prompt=b"\0def "):
    tokens = np.zeros((3, model.context), np.int32)
    tokens[:, : len(prompt)] = list(prompt)
    for row in np.asarray(sample(model, params, tokens, key, len(prompt))):
        text = bytes(row[1:].astype(np.uint8)).split(b"\0")[0]
        print(textwrap.indent(text.decode(errors="replace"), "  | "), end="\n\n")


# ---- The comparison -------------------------------------------------------------------


def tree_difference(tree, truth):
    difference = optax.tree.sub(jax.device_get(tree), jax.device_get(truth))
    return float(optax.tree.norm(difference) / optax.tree.norm(truth))


def draw(path, losses, exact, labels, title):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    truth, ours, mistake = losses
    updates = np.arange(1, len(truth) + 1)
    figure, (upper, lower) = plt.subplots(
        2, sharex=True, figsize=(8, 6.5), height_ratios=(3, 2), layout="constrained"
    )
    upper.plot(updates, truth, color="0.75", linewidth=6, label=labels[0])
    upper.plot(updates, ours, color="tab:blue", linewidth=1.5, label=labels[1])
    upper.plot(updates, mistake, color="tab:red", linewidth=1.5, label=labels[2])
    upper.set(title=title, ylabel="training loss (nats per token)")
    lower.semilogy(updates, abs(mistake - truth), "tab:red", label="(3), as it reports")
    lower.semilogy(
        updates, abs(exact - truth), "tab:red", alpha=0.5, label="(3), real loss"
    )
    lower.semilogy(updates, abs(ours - truth), "tab:blue", label="(2)")
    lower.set(xlabel="optimizer updates", ylabel="difference to (1)\n(nats per token)")
    for panel in (upper, lower):
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=100, format="png")


def main():
    flags, sizes = parse_flags()
    layers, width, heads, context, peak = SIZES[flags.size]
    model = GPT(layers, width, heads, context)
    training, held_out = load_documents(context)
    batches = list(training_batches(training, flags, context))
    tokens = [int(batch["mask"].sum()) for batch in batches]
    print(sizes)

    mesh = jax.make_mesh(
        (flags.devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[: flags.devices]
    )
    parallel = jaxga.DataParallel(mesh)
    steps = {
        "(1) full batch": jax.jit(functools.partial(full_batch_step, model)),
        "(2) jaxga": make_jaxga_step(model, parallel),
        "(3) mean of means": jax.jit(functools.partial(mean_of_means_step, model)),
    }
    loss_fn = jax.jit(functools.partial(weighted_loss, model))
    tx = make_optimizer(flags.steps, peak)
    key = jax.random.key(flags.seed)

    def start(name, tx):
        params = jax.jit(model.init)(key, batches[0]["inputs"])["params"]
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
        return parallel.shard_state(state) if "jaxga" in name else state

    grads, curves, finals = [], [], []
    for name, step in steps.items():
        t0 = time.process_time(), time.time()
        keep = optax.trace(decay=0.0)  # its state is the gradient that it was handed
        grads.append(step(start(name, keep), batches[0])[0].opt_state.trace)
        t1 = time.process_time(), time.time()
        state, curve = train(name, step, start(name, tx), batches, sum(tokens))
        t2 = time.process_time(), time.time()
        finals.append(evaluate(loss_fn, state.params, held_out, flags.batch, context))
        t3 = time.process_time(), time.time()
        print([[round(b - a, 1) for a, b in zip(x, y)] for x, y in ((t0, t1), (t1, t2), (t2, t3))])
        curves.append(curve)
        if "jaxga" in name:
            print_samples(model, jax.device_get(state.params), key)
            t4 = time.process_time(), time.time()
            print(t4[0] - t3[0], t4[1] - t3[1])
    print(finals)
    losses = [c["loss"] for c in curves]
    print([tree_difference(g, grads[0]) for g in grads])
    print([abs(l - losses[0]).max() for l in losses])
    np.set_printoptions(precision=2, linewidth=150)
    print(losses[0][::10]); print(abs(losses[1] - losses[0])[::5]); print((losses[2] - losses[0])[::5]); print((curves[2]["exact"] - losses[0])[::5])
    draw(flags.picture, losses, curves[2]["exact"], list(steps), "t")


if __name__ == "__main__":
    main()
