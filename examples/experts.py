"""Train a small mixture of experts: one loss, three terms, three denominators.

    python examples/experts.py                 # two CPU cores: about a minute

A byte-level language model on the source files of Python, whose MLPs are those of a
Switch Transformer (arXiv 2101.03961): each token goes to one of 8 experts. Its loss has

- the cross entropy: a mean over *tokens*;
- a second head, which says after 8 bytes how long the document will be: a mean over
  *sequences*;
- the load balance of Switch Transformer, experts * sum(share of the tokens * mean
  probability): a mean over *groups* of tokens that are routed together. There a group
  is what one core sees; here it is a micro-batch, so its weight is 1 per micro-batch.

(DeepSeek-V3, arXiv 2412.19437, balances each sequence: the weight is then the number
of sequences. A weight of routed tokens, per expert, would depend on the forward pass,
which then runs once more to find it: jaxga warns.)

The gradient of every way to accumulate is compared with that of all rows at once, in
plain JAX, in float64: the script fails if jaxga's is not that. Then three runs from one
start show what two common mistakes do. With all terms over tokens, the language model
trains as well as it did, but the other terms hardly count any more: one expert takes
almost half of the tokens. The mean of the micro-batches' means is right for sequences
and groups, of which each micro-batch has as many, and wrong for tokens.
"""

import argparse
import dataclasses
import pathlib
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import matplotlib.pyplot as plt
import numpy as np
import optax
from byte_lm import load_documents, make_batch, make_optimizer
from tqdm import tqdm

LAYERS, WIDTH, HEADS, EXPERTS = 2, 48, 2, 8  # of the model
CONTEXT, SEEN = 64, 8  # bytes; of those, the ones that the length is guessed from
ROWS, ACCUM_STEPS = 64, 8  # documents per update, in micro-batches of 8
LENGTH, BALANCE = 0.1, 1e-2  # how far a term counts; 1e-2 is Switch Transformer's
PEAK = 8e-3  # learning rate
BOUND = 1e-12  # of float64: norm of the difference over the norm
TERMS = ("cross_entropy", "length", "load_balance")
COLORS = "tab:blue", "tab:orange", "tab:red"  # of the three runs


# ---- Data ----------------------------------------------------------------------------


def read_documents():
    return [
        [document for document in part if len(document) >= SEEN]
        for part in load_documents(CONTEXT)
    ]


def bucketed(rng, documents):
    """Documents of like length in one micro-batch, as loaders do to save padding.

    Micro-batch i is rows i, i + 8, i + 16, ...: 0 has the shortest documents.
    """
    rows = np.arange(ROWS).reshape(ACCUM_STEPS, -1).T.reshape(-1)
    chosen = rng.choice(len(documents), ROWS, replace=False)
    by_length = sorted((documents[i] for i in chosen), key=len)
    return make_batch([by_length[row] for row in rows], CONTEXT)


# ---- Model ---------------------------------------------------------------------------


class Experts(nn.Module):
    """Each token goes to its most probable expert; the gate passes the gradient."""

    @nn.compact
    def __call__(self, x):
        normal, width = nn.initializers.lecun_normal, x.shape[-1]
        per_expert = partial(self.param, init_fn=normal(batch_axis=0))
        up = per_expert("up", shape=(EXPERTS, width, 2 * width))
        down = per_expert("down", shape=(EXPERTS, 2 * width, width))
        router = nn.softmax(nn.Dense(EXPERTS, use_bias=False, name="router")(x))
        chosen = nn.one_hot(router.argmax(-1), EXPERTS, dtype=x.dtype)
        # Every expert computes every token here, and all but one are thrown away.
        hidden = nn.gelu(jnp.einsum("rtw,ewh->rteh", x, up)) * chosen[..., None]
        y = jnp.einsum("rteh,ehw->rtw", hidden, down)
        return y * (router * chosen).sum(-1, keepdims=True), (router, chosen)


class MixtureOfExperts(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, tokens):
        normal = nn.initializers.normal
        norm = partial(nn.LayerNorm, use_bias=False)
        positions = self.param("positions", normal(0.3), (CONTEXT, WIDTH))
        x = nn.Embed(256, WIDTH, embedding_init=normal(1.0))(tokens) + positions
        causal, routes = nn.make_causal_mask(tokens), []
        for _ in range(self.layers):
            attention = nn.MultiHeadDotProductAttention(HEADS, use_bias=False)
            x += attention(norm()(x), mask=causal)
            y, route = Experts()(norm()(x))
            x += y
            routes.append(route)
        x = norm()(x)
        logits = nn.Dense(256, use_bias=False, kernel_init=normal(0.02))(x)
        typical = nn.initializers.constant(5.0)  # 2 ** 5 bytes
        guess = nn.Dense(1, name="length", bias_init=typical)(x[:, SEEN])
        return logits, guess[:, 0], routes


# ---- The objective: three terms, three denominators ----------------------------------


def undivided(model, params, batch):
    """Per token: the loss. Per sequence: the error of log2(length). The routes."""
    logits, guess, routes = model.apply({"params": params}, batch["inputs"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    length = jnp.log2(batch["mask"].sum(-1).astype(guess.dtype))
    return losses, (guess - length) ** 2, routes


def balance(routes, mask):
    """Of Switch Transformer, for one group of tokens: 1 for each layer in balance."""
    tokens = mask.sum()

    def mean(values):
        return jnp.where(mask[..., None], values, 0).sum((0, 1)) / tokens

    return sum(
        EXPERTS * (mean(chosen) * mean(router)).sum() for router, chosen in routes
    )


def load(routes, mask):
    """Of each expert, in each layer, its share of the tokens."""
    counts = [(chosen * mask[..., None]).sum((0, 1)) for _, chosen in routes]
    return jaxga.WeightedSum(jnp.stack(counts), mask.sum())


def loss_fn(model, params, batch):
    """What jaxga takes: a sum for each term, and what it is to be divided by."""
    losses, errors, routes = undivided(model, params, batch)
    per_token = jaxga.WeightedSum.of(losses, where=batch["mask"])
    per_sequence = jaxga.WeightedSum.of(errors)
    per_microbatch = jaxga.WeightedSum(balance(routes, batch["mask"]), 1)
    loss = {
        "cross_entropy": per_token,
        "length": LENGTH * per_sequence,
        "load_balance": BALANCE * per_microbatch,
    }
    metrics = {
        "nats": per_token,
        "error": per_sequence,
        "load": load(routes, batch["mask"]),
    }
    return jaxga.LossOutput(loss, metrics=metrics)


def all_over_tokens_loss(model, params, batch):
    """A MISTAKE: one denominator, so sequences and groups are divided by tokens."""
    output = loss_fn(model, params, batch)
    total = sum(term.total for term in output.loss.values())
    loss = jaxga.WeightedSum(total, output.loss["cross_entropy"].weight)
    return dataclasses.replace(output, loss=loss)


def mean_of_means_loss(model, params, batch):
    """A MISTAKE: the micro-batch's own mean, averaged over the micro-batches."""
    output = loss_fn(model, params, batch)
    mean = sum(term.mean() for term in output.loss.values())
    return dataclasses.replace(output, loss=jaxga.WeightedSum(mean, 1))


def objective(model, params, batch):
    """The truth, in plain JAX: all rows in one forward pass, each term by its own."""
    losses, errors, routes = undivided(model, params, batch)
    mask = batch["mask"]
    groups = jax.tree.map(
        lambda x: x.reshape(-1, ACCUM_STEPS, *x.shape[1:]), (routes, mask)
    )
    balances = jax.vmap(balance, in_axes=1)(*groups)
    cross_entropy = jnp.where(mask, losses, 0).sum() / mask.sum()
    return cross_entropy + LENGTH * errors.mean() + BALANCE * balances.mean()


# ---- The gradient, in every way ------------------------------------------------------


def in_one_call(loss, params, batch):
    """A first pass counts the weights: it needs no forward pass, so it costs nothing.

    A loader that knows them passes `term_weights=` here too, and there is no such pass.
    """
    cycle = jax.jit(jaxga.value_and_grad(loss, accum_steps=ACCUM_STEPS))
    return cycle(params, batch)[1]


def streamed(loss, params, batch):
    """One micro-batch per call, totals unknown: one accumulator for each term."""
    tx = jaxga.accumulate(optax.sgd(1.0), ACCUM_STEPS, terms=TERMS)
    sums = jaxga.value_and_grad_sums(loss, accum_steps=1, separate_terms=True)

    @jax.jit
    def call(params, state, rows):
        _, terms = sums(params, rows)
        grads = {name: term.total for name, term in terms.items()}
        weights = {name: term.weight for name, term in terms.items()}
        return tx.step(params, state, grads, weights)

    return streamed_gradient(call, tx, params, batch)


def known_weights(batch):
    """What a loader can count before the first micro-batch."""
    tokens = batch["mask"].sum()
    return dict(zip(TERMS, (tokens, ROWS, ACCUM_STEPS), strict=True))


def streamed_with_known_weights(loss, params, batch):
    """One micro-batch per call, totals from the loader: one accumulator in all.

    Each call divides its terms by the weights of the whole cycle. The sum of the calls
    is the mean gradient then: all calls together have weight 1.
    """
    tx = jaxga.accumulate(optax.sgd(1.0), ACCUM_STEPS)
    sums = jaxga.value_and_grad_sums(loss, accum_steps=1)
    weights = known_weights(batch)

    @jax.jit
    def call(params, state, rows):
        _, grads = sums(params, rows, term_weights=weights)
        return tx.step(params, state, grads.total, 1 / ACCUM_STEPS)

    return streamed_gradient(call, tx, params, batch)


def streamed_gradient(call, tx, params, batch):
    """How far SGD at rate 1 moves the parameters in one cycle."""
    moved, state = params, tx.init(params)
    for index in range(ACCUM_STEPS):
        rows = jax.tree.map(lambda x, index=index: x[index::ACCUM_STEPS], batch)
        moved, state = call(moved, state, rows)
    return optax.tree.sub(params, moved)


WAYS = {  # name: how, of which loss
    "jaxga, one call": (in_one_call, loss_fn),
    "jaxga, streamed": (streamed, loss_fn),
    "jaxga, streamed, weights known": (streamed_with_known_weights, loss_fn),
    "all over tokens": (in_one_call, all_over_tokens_loss),
    "mean of means": (in_one_call, mean_of_means_loss),
}


def parts_of(grads):
    layers = [layer for name, layer in grads.items() if name.startswith("Experts")]
    routers = [layer["router"] for layer in layers]
    return {"all": grads, "length head": grads["length"], "routers": routers}


def gradient_errors(model, params, batch):
    """Of each way: norm of the difference to the truth, over its norm, in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        truth = parts_of(jax.jit(jax.grad(partial(objective, model)))(params, batch))
        errors = {}
        for name, (way, loss) in WAYS.items():
            found = parts_of(way(partial(loss, model), params, batch))
            errors[name] = {
                part: float(
                    optax.tree.norm(optax.tree.sub(found[part], truth[part]))
                    / optax.tree.norm(truth[part])
                )
                for part in truth
            }
    return errors


# ---- Training ------------------------------------------------------------------------


RUNS = {
    "jaxga": loss_fn,
    "all over tokens": all_over_tokens_loss,
    "mean of means": mean_of_means_loss,
}


def train(name, loss, model, tx, params, batches):
    step = jaxga.make_train_step(partial(loss, model), tx, accum_steps=ACCUM_STEPS)
    # A copy: the step reuses the memory of its state, and all runs start from these.
    state = jaxga.TrainState.create(jax.tree.map(jnp.copy, params), tx)
    history = []
    for batch in tqdm(batches, desc=name, unit=" updates"):
        state, metrics = step(state, batch)
        history.append(figures(metrics))
    return state.params, jax.tree.map(lambda *x: np.array(x), *jax.device_get(history))


def evaluate(evaluated, params, batches):
    """Sums merge over batches, one division."""
    sums = reduce(jaxga.merge, [evaluated(params, batch).metrics for batch in batches])
    return figures({name: part.mean() for name, part in sums.items()})


def figures(metrics):
    """In the units of the table and of the picture."""
    return {
        "nats": metrics["nats"],
        "factor": 2 ** jnp.sqrt(metrics["error"]),  # of log2(length)
        "busiest": metrics["load"].max(),
    }


# ---- The comparison ------------------------------------------------------------------


def report(errors, held_out):
    print(f"{'':<32} difference to the gradient of all rows")
    print(f"{'':<32} {'all':>8} {'length head':>12} {'routers':>8}")
    for name, parts in errors.items():
        print("{:<32} {:>8.1e} {:>12.1e} {:>8.1e}".format(name, *parts.values()))
    print(f"\n{'':<32} held-out documents")
    print(f"{'after training':<32} nats per byte   length, off by   busiest expert")
    for name, scores in held_out.items():
        row = "{:<32} {:>13.3f} {:>12.2f} times {:>11.0%}"
        print(row.format(name, scores["nats"], scores["factor"], scores["busiest"]))
    right = [max(parts.values()) for name, parts in errors.items() if "jaxga" in name]
    wrong = [parts["all"] for name, parts in errors.items() if "jaxga" not in name]
    assert max(right) < BOUND < min(wrong) / 1e6, errors


def moving_mean(values, width):
    return np.convolve(values, np.ones(width) / width, "valid")


def draw(path, curves):
    plt.switch_backend("Agg")  # no window
    figure, panels = plt.subplots(3, sharex=True, figsize=(8, 8), layout="constrained")
    labels = {
        "nats": "cross entropy\n(nats per byte)",
        "factor": "length of the document,\noff by a factor of",
        "busiest": "share of the tokens at\nthe busiest expert",
    }
    for (key, label), panel in zip(labels.items(), panels, strict=True):
        for (name, curve), color in zip(curves.items(), COLORS, strict=True):
            width = min(10, len(curve[key]))
            values = moving_mean(curve[key], width)
            updates = np.arange(width, len(curve[key]) + 1)
            panel.plot(updates, values, color=color, linewidth=1.5, label=name)
        panel.set(ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].set_title("Three terms, three denominators: a mixture of 8 experts")
    panels[2].axhline(1 / EXPERTS, color="black", linewidth=0.8, linestyle="--")
    panels[2].text(
        *(0.01, 1 / EXPERTS - 0.02, "in balance"),
        transform=panels[2].get_yaxis_transform(),
        verticalalignment="top",
        fontsize="small",
    )
    panels[2].set(xlabel="optimizer updates", ylim=(0, 1))
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    figure.savefig(path, dpi=80, format="png")


def parse_flags(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=150, help="optimizer updates")
    parser.add_argument("--layers", type=int, default=2, help="of the model")
    parser.add_argument("--picture", type=pathlib.Path, default="experts.png")
    flags = parser.parse_args(argv)
    for name in ("steps", "layers"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} {getattr(flags, name)}: must be at least 1")
    if not flags.picture.parent.is_dir():
        parser.error(f"--picture {flags.picture}: there is no such folder")
    return flags


def main(argv=None):
    flags = parse_flags(argv)
    training, test = read_documents()
    rng = np.random.default_rng(0)
    batches = [bucketed(rng, training) for _ in range(flags.steps)]
    test_batches = [bucketed(rng, test) for _ in range(8)]
    tokens = batches[0]["mask"].reshape(-1, ACCUM_STEPS, CONTEXT).sum((0, 2))
    print("tokens in the micro-batches of the first update:", *tokens)

    model = MixtureOfExperts(flags.layers)
    params = jax.jit(model.init)(jax.random.key(0), batches[0]["inputs"])["params"]
    errors = gradient_errors(model, params, batches[0])

    tx = make_optimizer(flags.steps, PEAK)
    evaluated = jax.jit(partial(loss_fn, model))
    curves, held_out = {}, {}
    for name, loss in RUNS.items():
        trained, curves[name] = train(name, loss, model, tx, params, batches)
        held_out[name] = jax.device_get(evaluate(evaluated, trained, test_batches))
    draw(flags.picture, curves)
    print(f"picture: {flags.picture}")
    report(errors, held_out)
    return errors, held_out


if __name__ == "__main__":
    main()
