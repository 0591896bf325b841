"""Streams with a position; as a script, one process of a run over several."""

import json
import sys

import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import optax
from jax.sharding import AxisType

PROCESSES = 2


class Source:
    """Micro-batches with a position; one of them fails the first time it is read."""

    def __init__(self, microbatches, fail_at=None):
        self.microbatches = microbatches
        self.fail_at = fail_at
        self.position = {"next": 0}

    def __iter__(self):
        return self

    def __next__(self):
        i = self.position["next"]
        if i == self.fail_at:
            self.fail_at = None
            raise OSError(f"cannot read {i}")
        if i >= len(self.microbatches):
            raise StopIteration
        self.position["next"] += 1
        return self.microbatches[i]

    def get_state(self):
        return self.position  # not a copy: it goes on changing

    def set_state(self, state):
        self.position = state


def numbers(length, rows=2):
    """Micro-batches of rows 10, 11, ...; 20, 21, ...; and so on."""
    return [{"x": np.arange(rows) + 10 * (i + 1)} for i in range(length)]


def run_process(port, process):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    first = jaxga.cycles(Source(microbatches(process, 5)), 3)  # starts no backend
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
    parallel = jaxga.DataParallel(mesh)

    def events(accum_steps=3, stream=None, attempts=4, **kwargs):
        source = Source(**kwargs)
        stream = stream or jaxga.cycles(source, accum_steps, parallel=parallel)
        return list(watch(stream, attempts))

    def short(drop_last):
        source = Source(microbatches(process, 5 - process))
        stream = jaxga.cycles(source, 3, parallel=parallel, drop_last=drop_last)
        return list(watch(stream, 5 - drop_last))

    own = microbatches(process, 5)
    on_devices = [jax.tree.map(jnp.asarray, batch) for batch in own[:3]]
    plan = (lambda updates: 1 + process, 3)
    found = {
        "equal": list(watch(first, 4)),
        "steps": train(parallel, own),
        "on devices": events(2, microbatches=on_devices),
        "surplus": short(drop_last=False),
        "drop_last": short(drop_last=True),
        "empty": events(microbatches=own[: 2 - 2 * process]),
        "failure": events(microbatches=own, fail_at=4 if process else None),
        "shapes": events(microbatches=numbers(5, rows=4 + 2 * process), attempts=1),
        "plans": events(plan, microbatches=own, attempts=1),
    }
    print(json.dumps(found), flush=True)


def microbatches(process, length):
    """Rows whose mean over both processes is 15 + 20 * i in micro-batch i."""
    first = 10 + 10 * process
    return [{"x": np.full(4, first + 20 * i, np.float32)} for i in range(length)]


def train(parallel, own):
    """The gradient of each cycle: the mean of its rows."""

    def loss_fn(params, batch):
        return jaxga.WeightedSum.of(params * batch["x"])

    tx, found = optax.sgd(-1.0), []
    step = jaxga.make_train_step(loss_fn, tx, accum_steps=3, parallel=parallel)
    for batch, count in jaxga.cycles(own, 3, parallel=parallel):
        state = jaxga.TrainState.create(jnp.zeros(()), tx)
        state = parallel.shard_state(state)
        state, _ = step(state, batch, num_microbatches=count)
        found.append(float(state.params))
    return found


def watch(stream, attempts):
    """What each attempt to get a cycle gave: its number, with the position after it."""
    for _ in range(attempts):
        try:
            _, count = next(stream)
            yield [int(count), stream.get_state()["source"]["next"]]
        except StopIteration:
            yield "end"
        except Exception as error:
            yield f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    run_process(int(sys.argv[1]), int(sys.argv[2]))
