"""The examples that study a loss of three terms, and the size of the batch.

They run inside the test, and return the figures that they print.
"""

import importlib
import math
import pathlib
import re
import types
from functools import partial

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.anywhere

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture
def study(monkeypatch):
    """Imports an example, under JAX's own settings, as its users run it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    precision = jax.config.jax_default_matmul_precision  # byte_lm sets it
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield importlib.import_module
    jax.config.update("jax_default_matmul_precision", precision)


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


# ---- Three terms, three denominators -------------------------------------------------


@pytest.mark.long
def test_experts(study, tmp_path, capsys):
    experts, picture = study("experts"), tmp_path / "experts.png"
    flags = ["--steps", "3", "--layers", "1", "--picture", str(picture)]
    errors, held_out = experts.main(flags)
    right = {name: parts for name, parts in errors.items() if "jaxga" in name}
    assert len(right) == 3 and len(errors) == 5
    for parts in right.values():
        assert 0 < max(parts.values()) < 1e-12
    over_tokens, means = errors["all over tokens"], errors["mean of means"]
    # Divided by tokens, of which a document has tens and a micro-batch hundreds.
    assert over_tokens["length head"] > 0.9 and over_tokens["all"] > 0.1
    # Every micro-batch has as many documents: their mean of means is right.
    assert means["all"] > 1e-3 and means["length head"] < 1e-12
    assert list(held_out) == ["jaxga", "all over tokens", "mean of means"]
    for scores in held_out.values():
        assert 2 < scores["nats"] < math.log(256)
        assert 1 < scores["factor"] < 5
        assert 1 / experts.EXPERTS < scores["busiest"] <= 1
    assert "jaxga, streamed, weights known" in capsys.readouterr().out
    assert is_png(picture)


def test_experts_divides_each_term_by_its_own_weight(study):
    experts = study("experts")
    batch = experts.bucketed(np.random.default_rng(0), experts.read_documents()[1])
    model = experts.MixtureOfExperts(layers=1)
    params = jax.jit(model.init)(jax.random.key(0), batch["inputs"])["params"]
    steps = experts.ACCUM_STEPS
    split = jax.tree.map(lambda x: x.reshape(-1, steps, *x.shape[1:]), batch)
    per_microbatch = jax.vmap(partial(experts.loss_fn, model, params), in_axes=1)
    terms = jax.tree.map(lambda x: x.sum(0), jax.jit(per_microbatch)(split).loss)
    weights = {name: int(term.weight) for name, term in terms.items()}
    known = experts.known_weights(batch)
    assert weights == {name: int(weight) for name, weight in known.items()}
    mean = sum(term.total / weights[name] for name, term in terms.items())
    truth = jax.jit(partial(experts.objective, model))(params, batch)
    assert float(mean) == pytest.approx(float(truth), rel=1e-5)
    perfect = experts.BALANCE * weights["load_balance"]  # 1 for a layer in balance
    assert 0.9 * perfect < terms["load_balance"].total < 3 * perfect


@pytest.mark.parametrize("wrong", ("right", "all over tokens"))
def test_experts_sees_a_wrong_gradient(study, wrong):
    experts = study("experts")
    parts = dict.fromkeys(("all", "length head", "routers"), 1e-15)
    errors = {"jaxga": dict(parts), "all over tokens": {**parts, "all": 0.5}}
    scores = {"nats": 2.0, "factor": 1.5, "busiest": 0.2}
    experts.report(errors, {"jaxga": scores})
    if wrong == "right":
        errors["jaxga"]["routers"] = 1e-11
    else:
        errors["all over tokens"]["all"] = 1e-9
    with pytest.raises(AssertionError, match="routers"):
        experts.report(errors, {"jaxga": scores})


# ---- The size of the batch -----------------------------------------------------------


@pytest.mark.long
def test_batch_size(study, tmp_path, capsys, monkeypatch):
    batch_size, picture = study("batch_size"), tmp_path / "batch_size.png"
    for name, value in (("HELD_OUT", 32), ("POINTS", 3), ("ROWS", 2)):
        monkeypatch.setattr(batch_size, name, value)
    flags = ["--size", "tiny", "--microbatches", "240", "--picture", str(picture)]
    runs, measured = batch_size.main(flags)
    for name, updates in (("small", 120), ("large", 15)):
        assert len(runs[name].tokens) == updates
    counts = runs["adaptive"].microbatches
    assert counts[0] == batch_size.FEWEST and counts.sum() == 240
    assert len(np.unique(counts)) > 2
    tokens = [run.tokens.sum() for run in runs.values()]
    assert tokens[0] == tokens[1] == tokens[2]  # the same documents
    for name, run in runs.items():
        assert (run.traces == runs["small"].traces[0]).all()
        assert np.isfinite(run.noise_scale).mean() > 0.9
        assert (run.noise_scale > 0).all()
        assert measured[name].loss[-1] < 5  # of ln 256 = 5.5
        assert measured[name].update[-1] == len(run.tokens)
    grown = np.median(runs["small"].noise_scale[-20:])
    assert grown > 3 * np.median(runs["small"].noise_scale[:20])
    assert "0 in the " in capsys.readouterr().out
    assert is_png(picture)


@pytest.mark.parametrize(
    ("noise_scale", "now", "then"),
    (
        (1000.0, 6, 10),
        (1000.0, 3, 6),  # at most doubled
        (150.0, 6, 2),  # the fewest
        (1e6, 16, 16),  # the most
        (0.0, 4, 2),
        (math.inf, 5, 5),
    ),
)
def test_follow(study, noise_scale, now, then):
    assert study("batch_size").follow(noise_scale, 100.0, now) == then


def test_next_batch_fills_the_first_microbatches(study):
    batch_size = study("batch_size")
    documents = [bytes([65 + i]) * (i + 1) for i in range(24)]
    rows = batch_size.next_batch(iter(documents), 32, num_microbatches=3)["mask"]
    lengths = rows.sum(-1).reshape(batch_size.ROWS, batch_size.MOST)
    filled = lengths[:, :3].T.reshape(-1)  # with END
    np.testing.assert_array_equal(filled, np.arange(24) + 2)


def test_batch_size_sees_a_recompilation(study):
    batch_size = study("batch_size")
    points = types.SimpleNamespace(loss=[3.0])

    def run(traces):
        full = np.full(4, 100.0)
        return batch_size.Updates(full, full, np.array([2, 3, 4, 5]), np.array(traces))

    batch_size.report({"small": run([1, 1, 1, 1])}, {"small": points})
    with pytest.raises(AssertionError):
        batch_size.report({"small": run([1, 1, 2, 2])}, {"small": points})


# ---- Flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    (
        ("experts", ("--steps", "0"), "--steps 0: must be at least 1"),
        ("experts", ("--layers", "-1"), "--layers -1: must be at least 1"),
        ("experts", ("--picture", "no/x.png"), "--picture .*: there is no such folder"),
        (
            "batch_size",
            ("--microbatches", "3"),
            "--microbatches 3: must be at least 16",
        ),
        ("batch_size", ("--size", "huge"), "--size: invalid choice: 'huge'"),
        ("batch_size", ("--picture", "no/x.png"), "--picture .*: there is no such"),
    ),
)
def test_wrong_flags(study, capsys, name, flags, message):
    with pytest.raises(SystemExit):
        study(name).main(list(flags))
    assert re.search(f"error: .*{message}", capsys.readouterr().err)
