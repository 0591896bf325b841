"""The audit finds planted faults, names where they are, and says how large."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxga
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxga import audit
from jaxga._audit.problem import Problem
from jaxga._audit.study import Study
from jaxga._audit.trainer_study import study_trainer
from problems import make_mesh

pytestmark = pytest.mark.anywhere

ROWS, LENGTH, WIDTH, PARTS, DEVICES = 12, 3, 4, 3, 2


@functools.cache
def make_batch():
    rng = np.random.default_rng(0)
    mask = np.arange(LENGTH) < rng.integers(0, LENGTH + 1, size=(ROWS, 1))
    mask[0] = True
    mask[1::PARTS] = np.arange(LENGTH) < 1  # of uneven micro-batches, a light one
    return {
        "x": rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32),
        "y": rng.normal(size=(ROWS, LENGTH)).astype(np.float32),
        "mask": mask,
    }


@functools.cache
def make_params():
    rng = np.random.default_rng(1)
    shapes = {"w": (WIDTH, 6), "v": (6,)}
    return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def hidden(params, batch):
    return jnp.tanh(batch["x"] @ params["w"])


def counted(params, batch, of=hidden):
    losses = (of(params, batch) @ params["v"] - batch["y"]) ** 2
    return jaxga.WeightedSum.of(losses, where=batch["mask"])


def find(loss_fn, *, params=None, batch=None, kind=None, accum_steps=PARTS, **options):
    """The only cause that the audit finds."""
    report = audit(
        loss_fn,
        make_params() if params is None else params,
        make_batch() if batch is None else batch,
        **dict(accum_steps=accum_steps, num_devices=1) | options,
    )
    assert not report.passed and "FAILED" in str(report)
    (cause,) = report.causes
    assert cause.text in str(report)
    assert kind in (None, cause.kind), report
    return cause


# Faults of a loss function.


class Normalised(nn.Module):
    norm: str = "batch"

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(6)(x)
        if self.norm == "batch":
            h = nn.BatchNorm(use_running_average=False, name="norm")(h)
        else:
            h = nn.Dropout(0.5, deterministic=False, name="drop")(h)
        return nn.Dense(1)(h)[..., 0]


@functools.cache
def normalised(norm):
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return Normalised(norm).init(keys, make_batch()["x"])["params"]


def batch_norm(params, batch):
    model = Normalised()
    stats = {"norm": {"mean": jnp.zeros(6), "var": jnp.ones(6)}}
    variables = {"params": params, "batch_stats": stats}
    out, _ = model.apply(variables, batch["x"], mutable=["batch_stats"])
    return jaxga.WeightedSum.of((out - batch["y"]) ** 2, where=batch["mask"])


def test_batch_norm_is_named():
    cause = find(batch_norm, params=normalised("batch"), kind="coupling")
    assert cause.where == "Normalised/norm"
    assert "furthest params['" in cause.text and cause.size > 0.01
    assert "nn.BatchNorm" in cause.text  # the line of this file


def test_a_mean_of_weight_one():
    def loss_fn(params, batch):
        return jaxga.WeightedSum.from_mean(counted(params, batch).mean(), 1)

    cause = find(loss_fn, kind="weight")
    assert cause.size == PARTS and cause.where == "the loss"
    assert "it is 1 over the full batch" in cause.text and "params['" in cause.text


@pytest.mark.long
def test_a_mean_of_weight_one_is_found_where_the_gradient_happens_to_agree():
    def loss_fn(params, batch):
        mean = ((hidden(params, batch) @ params["v"] - batch["y"]) ** 2).mean()
        return jaxga.WeightedSum.from_mean(mean, 1)

    cause = find(loss_fn, kind="weight")
    assert cause.size == PARTS and "right here because" in cause.text


@pytest.mark.long
def test_a_mean_where_a_sum_belongs():
    def loss_fn(params, batch):
        loss = counted(params, batch)
        return jaxga.WeightedSum(loss.mean(), loss.weight)

    cause = find(loss_fn, kind="mean")
    assert abs(cause.size / PARTS - 1) < 0.3 and cause.where == "the loss"
    assert "params['" in cause.text


@pytest.mark.long
def test_negatives_within_the_batch():
    def loss_fn(params, batch):
        z = hidden(params, batch)[:, 0]
        logits = z @ z.T
        return jaxga.WeightedSum.of(-jax.nn.log_softmax(logits).diagonal())

    cause = find(loss_fn, kind="coupling")
    assert cause.where.startswith("test_audit_faults.py:")
    assert "dot_general" in cause.text and "logits = z @ z.T" in cause.text


@pytest.mark.long
def test_balance_of_experts_is_named_by_its_term():
    def loss_fn(params, batch):
        share = jax.nn.softmax(hidden(params, batch)).mean((0, 1))
        balance = 10 * jaxga.WeightedSum((share**2).sum(), 1)
        return {"fit": counted(params, batch), "balance": balance}

    report = audit(
        loss_fn, make_params(), make_batch(), accum_steps=PARTS, num_devices=1
    )
    coupling, weight = report.causes
    assert (coupling.kind, weight.kind) == ("coupling", "weight")
    assert "the term 'balance' depends on it" in coupling.text
    assert weight.where == "the term 'balance'"


@pytest.mark.long
def test_coupling_inside_a_scan_names_the_layer():
    def of(params, batch):
        def layer(h, i):
            mean = h.mean((0, 1), keepdims=True)
            return jnp.where(i == 2, h - jnp.tanh(mean) * h, h), None

        return lax.scan(layer, hidden(params, batch), jnp.arange(4))[0]

    cause = find(lambda p, b: counted(p, b, of), kind="coupling")
    assert "in iteration 0 of its scan" in cause.text  # the tanh is computed in all
    assert "jnp.tanh(mean)" in cause.text


def dropped(params, batch, key):
    variables = {"params": params}
    out = Normalised("drop").apply(variables, batch["x"], rngs={"dropout": key})
    return jaxga.WeightedSum.of((out - batch["y"]) ** 2, where=batch["mask"])


@pytest.mark.long
def test_dropout_by_microbatch_key():
    params = normalised("drop")
    cause = find(dropped, params=params, key=jax.random.key(2), kind="randomness")
    assert cause.where == "Normalised/drop" and "per_example_keys=True" in cause.text
    assert "params['Dense_" in cause.text and cause.size > 0.1


def noisy(params, batch, noise):
    return counted(params, batch | {"x": batch["x"] + noise})


@pytest.mark.long
def test_one_rows_key_for_all_of_them():
    def loss_fn(params, batch, key):
        return noisy(params, batch, jax.random.normal(key[0], (1, 1, WIDTH)))

    cause = find(loss_fn, key=jax.random.key(0), per_example_keys=True)
    assert (
        cause.kind == "randomness" and "keys that are not its rows' own" in cause.text
    )


@pytest.mark.long
def test_neighbours_swap_their_keys():
    def loss_fn(params, batch, key):
        draw = jax.vmap(lambda k: jax.random.normal(k, (1, WIDTH)))
        return noisy(params, batch, draw(jnp.roll(key, 1)))

    options = dict(key=jax.random.key(0), per_example_keys=True)
    assert find(loss_fn, **options).kind == "randomness"


@pytest.mark.long
def test_draws_of_a_constant_key():
    def loss_fn(params, batch):
        shape = batch["x"].shape
        return noisy(params, batch, jax.random.normal(jax.random.key(0), shape))

    assert "one key per row" in find(loss_fn, kind="randomness").text


@pytest.mark.long
def test_what_belongs_to_a_place_in_the_batch():
    def loss_fn(params, batch):
        place = jnp.arange(len(batch["x"]), dtype=jnp.float32)[:, None, None]
        return noisy(params, batch, 0.1 * place)

    assert "another order" in find(loss_fn, kind="position").text


@pytest.mark.long
def test_a_state_that_changes_what_later_microbatches_compute():
    def loss_fn(params, batch, model_state):
        loss = counted(params, batch | {"x": batch["x"] * model_state["scale"]})
        return jaxga.LossOutput(loss, model_state={"scale": model_state["scale"] * 0.9})

    state = {"scale": jnp.float32(1)}
    cause = find(loss_fn, model_state=state, kind="model_state")
    assert "'carry'" in cause.text and "model_state_merge='mean' agrees" in cause.text
    assert cause.where.startswith("params['")
    report = audit(
        loss_fn,
        make_params(),
        make_batch(),
        model_state=state,
        model_state_merge="mean",
        accum_steps=PARTS,
        num_devices=1,
    )
    assert report.passed, report


@pytest.mark.long
def test_a_state_that_is_not_what_the_full_batch_leaves():
    def loss_fn(params, batch, model_state):
        mean = 0.9 * model_state["mean"] + 0.1 * batch["x"].mean((0, 1))
        return jaxga.LossOutput(counted(params, batch), model_state={"mean": mean})

    state = {"mean": jnp.zeros(WIDTH)}
    cause = find(loss_fn, model_state=state, kind="model_state")
    assert cause.where == "model_state['mean']" and cause.size > 0.1
    assert "The gradient agrees" in cause.text and "'mean' agrees" in cause.text


def test_an_accumulator_of_bfloat16():
    cause = find(counted, accum_dtype=jnp.bfloat16, kind="precision")
    assert "accum_dtype=bfloat16" in cause.text and 1e-4 < cause.size < 2e-2
    assert cause.where.startswith("params['")


def test_what_jaxga_refuses_is_the_finding():
    cause = find(lambda p, b: counted(p, b).mean(), kind="refused")
    assert "A loss function returns a sum" in cause.text

    def summed_already(params, batch):
        loss = counted(params, batch)
        if jax.sharding.get_abstract_mesh().manual_axes:
            loss = lax.psum(loss, "data")
        return loss

    cause = find(summed_already, num_devices=DEVICES, kind="refused")
    assert "is the same on all devices" in cause.text


def test_coupling_that_only_devices_see():
    """Strided micro-batches keep the pairs together, devices do not."""

    def loss_fn(params, batch):
        out = hidden(params, batch)[:, 0] @ params["v"]
        first, second = jnp.split(out, 2)
        return jaxga.WeightedSum.of((first - second) ** 2)

    batch = jax.tree.map(lambda x: x[:8], make_batch())
    options = dict(batch=batch, accum_steps=2, num_devices=(1, DEVICES))
    cause = find(loss_fn, kind="coupling", **options)
    assert "2 micro-batches on each of 2 devices" in cause.text


@pytest.mark.long
def test_batch_norm_over_devices_without_microbatches():
    options = dict(params=normalised("batch"), accum_steps=1, num_devices=DEVICES)
    assert find(batch_norm, kind="coupling", **options).where == "Normalised/norm"


def test_one_microbatch_on_one_device_proves_nothing():
    cause = find(counted, accum_steps=1, kind="nothing")
    assert cause.where == "accum_steps" and "Give accum_steps=2" in cause.text
    batch = jax.tree.map(lambda x: x[:1], make_batch())
    cause = find(counted, batch=batch, accum_steps=1, kind="nothing")
    assert "Give a batch of more rows" in cause.text


@pytest.mark.long
def test_a_mean_that_is_given_with_another_weight():
    def loss_fn(params, batch):
        return jaxga.WeightedSum.from_mean(
            counted(params, batch).mean(), len(batch["y"])
        )

    cause = find(loss_fn, kind="denominator")
    assert cause.where == "the loss" and "another number than it" in cause.text


# Faults of a trainer. One gradient function serves all: of a micro-batch's summed loss.


@jax.jit
def sums(params, batch):
    """Gradient and weight of a part."""
    grads = jax.grad(lambda p: counted(p, batch).total)(params)
    return grads, batch["mask"].sum()


def parts(batch, layout="strided"):
    if layout == "strided":
        return [jax.tree.map(lambda x, i=i: x[i::PARTS], batch) for i in range(PARTS)]
    rows = ROWS // PARTS
    return [
        jax.tree.map(lambda x, i=i: x[i * rows : (i + 1) * rows], batch)
        for i in range(PARTS)
    ]


def combine(found, factors):
    def add(*leaves):
        pairs = zip(factors, leaves, strict=True)
        return sum(np.float32(factor) * np.asarray(leaf) for factor, leaf in pairs)

    return jax.tree.map(add, *[grads for grads, _ in found])


def trainer(factors, layout="strided"):
    """Adds the micro-batches' gradients with factors made from their weights."""

    def grad_fn(params, batch):
        found = [sums(params, part) for part in parts(batch, layout)]
        weights = np.array([weight for _, weight in found], np.float64)
        return combine(found, factors(weights))

    return grad_fn


right = trainer(lambda w: [1 / w.sum()] * PARTS)


def only(place):
    return lambda w: [(i == place) / w.sum() for i in range(PARTS)]


FAULTS = {
    "mean_of_means": (lambda w: 1 / w / PARTS, "means", "mean of the micro-batches'"),
    "sum_of_means": (lambda w: 1 / w, "means", "times 3"),
    "divided_by_parts_too": (
        lambda w: [1 / w.sum() / PARTS] * PARTS,
        "factor",
        "divided by 3 micro-batches once too often",
    ),
    "added_and_not_averaged": (
        lambda w: [PARTS / w.sum()] * PARTS,
        "factor",
        "3 micro-batches' means were added",
    ),
    "count_before_the_shift": (
        lambda w: [1 / (w.sum() + ROWS)] * PARTS,
        "factor",
        "one more for each of the 12 rows",
    ),
    "count_before_the_mask": (
        lambda w: [1 / (ROWS * LENGTH)] * PARTS,
        "factor",
        "all 36 entries of batch['mask']",
    ),
    "never_divided": (lambda w: [1] * PARTS, "factor", "not divided at all"),
    "short_cycle": (lambda w: [0.6 / w.sum()] * PARTS, "factor", "3/5 of it"),
    "sign": (lambda w: [-1 / w.sum()] * PARTS, "factor", "the opposite"),
    "last_one_overwrites": (only(PARTS - 1), "missing", "last part alone"),
    "first_one_only": (only(0), "missing", "first part alone"),
    "last_one_left_out": (
        lambda w: [1 / w.sum()] * (PARTS - 1) + [0],
        "missing",
        "without the last part",
    ),
    "first_one_twice": (
        lambda w: [2 / w.sum()] + [1 / w.sum()] * (PARTS - 1),
        "missing",
        "part 1 counted twice",
    ),
}


def test_a_right_trainer_passes():
    report = audit(
        counted, make_params(), make_batch(), grad_fn=right, accum_steps=PARTS
    )
    assert report.passed, report
    assert [entry.name for entry in report.entries] == ["grad_fn", "another batch"]


@functools.cache
def study():
    """What audit makes of the loss, once for all trainers."""
    options = dict(model_state=None, key=None, per_example_keys=False, is_wide=True)
    problem = Problem(counted, make_params(), make_batch(), (), **options)
    made = Study(problem, 1e-5)
    assert not made.nothing_to_compare()
    return made


@pytest.mark.parametrize("layout", ("strided", "contiguous"))
@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_a_trainer(name, layout):
    factors, kind, words = FAULTS[name]
    grad_fn = trainer(factors, layout)
    entries, (cause,) = study_trainer(study(), grad_fn, [PARTS], [1])
    assert not entries[0].passed and cause.kind == kind
    assert words in cause.text, cause
    assert "Furthest out: params['" in cause.text
    if kind == "missing" and "only" not in name:
        assert ("rows i, i + 3" in cause.text) == (layout == "strided")


def test_mean_of_means_of_a_trainer_as_users_call_it():
    factors, kind, words = FAULTS["mean_of_means"]
    cause = find(counted, grad_fn=trainer(factors), kind=kind)
    assert words in cause.text and 0.5 < cause.size < 2, cause


@pytest.mark.long
def test_rows_that_were_dropped_are_listed():
    def grad_fn(params, batch):
        grads, weight = sums(params, jax.tree.map(lambda x: x[:5], batch))
        return combine([(grads, weight)], [1 / weight])

    cause = find(counted, grad_fn=grad_fn, kind="missing")
    missing = [row for row in range(5, ROWS) if make_batch()["mask"][row].any()]
    assert f"(rows {', '.join(map(str, missing))})" in cause.text, cause


def two_terms(params, batch):
    size = jaxga.WeightedSum.of((hidden(params, batch) ** 2).sum((1, 2)))
    return {"fit": counted(params, batch), "size": size}


@pytest.mark.long
def test_a_term_on_the_wrong_denominator():
    def grad_fn(params, batch):
        def loss(params):
            terms = two_terms(params, batch)
            return (terms["fit"].total + terms["size"].total) / terms["fit"].weight

        return jax.grad(loss)(params)

    cause = find(two_terms, grad_fn=jax.jit(grad_fn), kind="denominator")
    assert cause.where == "the term 'size'"
    assert "divided by the weight of the term 'fit'" in cause.text
    assert abs(cause.size / (ROWS / make_batch()["mask"].sum()) - 1) < 1e-3

    def without(params, batch):
        return jax.grad(lambda p: two_terms(p, batch)["fit"].mean())(params)

    cause = find(two_terms, grad_fn=jax.jit(without), kind="denominator")
    assert "'size' is missing" in cause.text


def test_summed_in_bfloat16():
    def grad_fn(params, batch):
        found = [sums(params, part) for part in parts(batch)]
        total = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.bfloat16), params)
        for grads, _ in found:
            total = jax.tree.map(lambda t, g: (t + g).astype(t.dtype), total, grads)
        weight = np.float32(sum(weight for _, weight in found))
        return jax.tree.map(lambda t: t.astype(jnp.float32) / weight, total)

    cause = find(counted, grad_fn=grad_fn, kind="precision")
    assert "bfloat16" in cause.text and 1e-4 < cause.size < 2e-2


@pytest.mark.long
def test_a_penalty_that_the_loss_does_not_have():
    def grad_fn(params, batch):
        return jax.tree.map(lambda g, p: g + 1e-3 * p, right(params, batch), params)

    assert abs(find(counted, grad_fn=grad_fn, kind="penalty").size / 1e-3 - 1) < 0.01


def over_devices(function, check_vma):
    mapped = jax.shard_map(
        function,
        mesh=make_mesh(DEVICES),
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    return jax.jit(mapped)


def device_sums(params, batch):
    grads = jax.grad(lambda p: counted(p, batch).total)(params)
    return grads, batch["mask"].sum()


def test_psum_twice():
    def grad_fn(params, batch):
        # JAX has summed the gradients of what all devices share.
        grads, weight = lax.psum(device_sums(params, batch), "data")
        return jax.tree.map(lambda g: g / weight, grads)

    options = dict(num_devices=DEVICES, accum_steps=1)
    cause = find(counted, grad_fn=over_devices(grad_fn, True), kind="factor", **options)
    assert abs(cause.size - DEVICES) < 1e-4
    assert "summed over 2 devices once too often" in cause.text


def test_devices_that_are_not_synchronised():
    def grad_fn(params, batch):
        grads, weight = device_sums(params, batch)
        return jax.tree.map(lambda g: g / weight, grads)

    cause = find(counted, grad_fn=over_devices(grad_fn, False), kind="devices")
    assert cause.where == "params['v']" and cause.size > 0.1
    assert "on device 1 differs" in cause.text


@pytest.mark.long
def test_copies_that_differ_along_a_leading_axis():
    def copies(params, batch):
        grads = right(params, batch)
        return jax.tree.map(lambda g: np.stack([g, g]), grads)

    def spoilt(params, batch):
        grads = copies(params, batch)
        grads["w"][1] *= 1.5
        return grads

    report = audit(counted, make_params(), make_batch(), grad_fn=copies, num_devices=1)
    assert report.passed, report
    cause = find(counted, grad_fn=spoilt, kind="devices")
    assert cause.where == "params['w']" and abs(cause.size - 0.5) < 1e-3


@pytest.mark.long
def test_a_trainer_that_cannot_be_judged_or_proves_nothing():
    stale = right(make_params(), make_batch())
    calls = iter(range(1, 100))

    def random(params, batch):
        n = next(calls)
        return jax.tree.map(lambda g: g * n, right(params, batch))

    def nan(params, batch):
        return right(params, batch) | {"v": np.full(6, np.nan, np.float32)}

    def stale_on_another(params, batch):
        same = batch is make_batch()
        return right(params, batch) if same else jax.tree.map(lambda g: 2 * g, stale)

    def zero(params, batch):
        return jax.tree.map(np.zeros_like, params)

    found = {
        "unchanged": find(counted, grad_fn=lambda p, b: stale),
        "randomness": find(counted, grad_fn=random),
        "nan": find(counted, grad_fn=nan),
        "unknown": find(counted, grad_fn=stale_on_another),
    }
    assert {name: cause.kind for name, cause in found.items()} == {n: n for n in found}
    assert find(counted, grad_fn=zero).kind == "unchanged"
    assert (
        "another one" in found["unknown"].text and found["nan"].where == "params['v']"
    )


@pytest.mark.long
def test_a_fault_that_no_one_knows_is_said_to_be_one():
    def grad_fn(params, batch):
        grads = right(params, batch)
        return grads | {"w": np.tanh(grads["w"])}

    cause = find(counted, grad_fn=grad_fn, kind="unknown")
    assert "params['w']" in cause.text


@pytest.mark.long
def test_a_right_sum_of_a_loss_that_is_none():
    """A trainer that adds up rightly what is no sum: the loss function's own cause."""

    def normalised_of(params, batch):
        h = hidden(params, batch)
        return h / h.std((0, 1), keepdims=True)

    @jax.jit
    def one(params, batch):
        return jax.grad(lambda p: counted(p, batch, normalised_of).total)(params)

    def grad_fn(params, batch):
        found = [(one(params, part), None) for part in parts(batch)]
        return combine(found, [1 / batch["mask"].sum()] * PARTS)

    def loss_fn(params, batch):
        return counted(params, batch, normalised_of)

    assert "h.std(" in find(loss_fn, grad_fn=grad_fn, kind="coupling").text
