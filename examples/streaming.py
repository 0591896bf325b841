"""Feed an optimizer micro-batch by micro-batch, until each update has enough tokens.

    python examples/streaming.py               # two CPU cores: half a minute

The model of `byte_lm.py`, and documents as they come: 8 at a time, of any length. An
update is due when 4,096 tokens are in, however many micro-batches that takes, and at
the end of the epoch, with what is left. `jaxga.accumulate` does it around any optax
optimizer, one call per micro-batch. Beside it the same cycles run inside one jitted
call each, by `jaxga.make_train_step`: the two runs are the same, to rounding, and the
script fails if they are not.
"""

import argparse
import pathlib
from functools import partial

import jax
import jaxga
import matplotlib.pyplot as plt
import numpy as np
import optax
from byte_lm import GPT, SIZES, load_documents, make_batch, make_optimizer
from byte_lm import weighted_loss as loss_of_model
from tqdm import tqdm

ROWS = 8  # documents per micro-batch
TOKENS = 4096  # per update, at least
BOUND = 1e-4  # nats per token: rounding, over a whole run

parser = argparse.ArgumentParser(
    description=__doc__.splitlines()[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--size", choices=SIZES, default="tiny", help="of the model")
parser.add_argument("--microbatches", type=int, default=2000, help="in the epoch")
parser.add_argument("--picture", type=pathlib.Path, default="streaming.png")
flags = parser.parse_args()
if flags.microbatches < 1:
    parser.error(f"--microbatches {flags.microbatches}: must be at least 1")

layers, width, heads, context, peak = SIZES[flags.size]
model = GPT(layers, width, heads, context)
loss_fn = partial(loss_of_model, model)

documents, _ = load_documents(context)
documents = documents[: flags.microbatches * ROWS]  # as they come: file after file
microbatches = [
    make_batch(documents[first : first + ROWS], context)
    for first in range(0, len(documents), ROWS)
]
tokens = [int(batch["mask"].sum()) for batch in microbatches]
# Clipping, warm-up, cosine: in updates.
tx = make_optimizer(steps=sum(tokens) // TOKENS + 1, peak=peak / 3)


def start():  # made anew for each run: a step reuses the memory of its state
    return model.init(jax.random.key(0), microbatches[0]["inputs"])["params"]


# ---- One micro-batch per call --------------------------------------------------------

accumulate = jaxga.accumulate(tx, until_weight=TOKENS)
sums = jaxga.value_and_grad_sums(loss_fn, accum_steps=1)


@partial(jax.jit, donate_argnums=(0, 1))  # taken and returned in one order: no copies
def add(params, opt_state, batch):
    output, grads = sums(params, batch)
    params, opt_state = accumulate.step(params, opt_state, grads.total, grads.weight)
    return params, opt_state, output.loss


params = start()
opt_state = accumulate.init(params)
streamed, cycles, seen = [], [], []
for batch in tqdm(microbatches, desc="streamed", unit=" micro-batches"):
    params, opt_state, loss = add(params, opt_state, batch)
    seen.append(loss)
    if jaxga.has_updated(opt_state):
        streamed.append(seen)
        cycles.append(len(seen))
        seen = []
if seen:  # the end of the epoch: what is in makes a short cycle, just as exact
    params, opt_state = accumulate.flush(params, opt_state)
    streamed.append(seen)
    cycles.append(len(seen))


def mean(parts):
    """Sums merge, means do not: the loss of a cycle from those of its micro-batches."""
    total = parts[0]
    for part in parts[1:]:
        total = jaxga.merge(total, part)
    return float(total.mean())


streamed = np.array([mean(parts) for parts in streamed])

# ---- The same cycles, each in one call -----------------------------------------------

room = max(cycles)  # micro-batches; a shorter cycle computes only its own
step = jaxga.make_train_step(loss_fn, tx, accum_steps=room)
state = jaxga.TrainState.create(start(), tx)
in_step, cycle_tokens, first = [], [], 0
for count in tqdm(cycles, desc="in step", unit=" updates"):
    group = microbatches[first : first + count]
    cycle_tokens.append(sum(tokens[first : first + count]))
    first += count
    group = group + group[:1] * (room - count)  # to fill the batch: not computed
    # Micro-batch i is rows i, i + room, i + 2 * room, ... of the batch.
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves, axis=1), *group)
    rows = jax.tree.map(lambda leaf: leaf.reshape(-1, context), stacked)
    state, metrics = step(state, rows, num_microbatches=np.int32(count))
    in_step.append(metrics["loss"])
in_step = np.array(jax.device_get(in_step))

# ---- The comparison ------------------------------------------------------------------

updates = np.arange(1, len(cycles) + 1)
difference = np.abs(streamed - in_step)
moved = optax.tree.norm(optax.tree.sub(state.params, start()))
apart = optax.tree.norm(optax.tree.sub(params, state.params)) / moved
print(f"{len(microbatches)} micro-batches of {ROWS} documents, {sum(tokens)} tokens")
print(f"{len(cycles)} updates of {min(cycles)} to {room} micro-batches")
print(f"tokens per update: {min(cycle_tokens)} to {max(cycle_tokens)}")
print(f"largest difference of the loss: {difference.max():.1e}")
print(f"difference of the parameters, over the way they went: {apart:.1e}")

plt.switch_backend("Agg")  # no window
figure, (upper, lower) = plt.subplots(
    2, sharex=True, figsize=(8, 6), layout="constrained"
)
upper.bar(updates, cycle_tokens, width=1, color="tab:blue", alpha=0.6)
upper.axhline(TOKENS, color="black", linewidth=0.8)
upper.set(
    title="Cycles that end when enough tokens are in; the last is flushed",
    ylabel="tokens per update",
)
upper.yaxis.label.set_color("tab:blue")
counts = upper.twinx()
counts.plot(updates, cycles, color="tab:orange", linewidth=1)
counts.set(ylim=(0, 2 * room))
counts.set_ylabel("micro-batches per update", color="tab:orange")
lower.plot(updates, in_step, color="0.75", linewidth=5, label="in one jitted call")
lower.plot(
    updates, streamed, color="tab:red", linewidth=1, label="one call per micro-batch"
)
lower.set(xlabel="optimizer updates", ylabel="loss (nats per token)")
lower.legend(title=f"largest difference: {difference.max():.0e}")
figure.savefig(flags.picture, dpi=90)
print(f"picture: {flags.picture}")

assert int(opt_state.update) == len(cycles) == int(state.update)
assert difference.max() < BOUND and apart < BOUND, (difference.max(), apart)
