"""Gradients and steps of the factors equal torch's, through PEFT's own modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import rslora_jax as rl
from rslora_jax.peft import save
from tests.hugging import assert_close
from tests.interop.tiny import QUIET, TOKENS, adapted, base, read_by_peft, torch_llama

pytestmark = QUIET
SCALINGS = ["rslora", "lora"]
# torch decays by lr * weight_decay before it steps, Optax adds the decay to the step: the same
# number. Optax's epsilon is beside the root, as torch's is; it is large here, so that it counts
# and what rounding leaves of the smallest gradients does not.
OPTIMIZERS = {
    "sgd": (optax.sgd(0.05, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    "adamw": (
        optax.adamw(0.01, b1=0.8, b2=0.95, eps=3e-3, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), eps=3e-3, weight_decay=0.1),
    ),
}


def loss_here(params, apply):
    """The mean loss of the next token."""
    logits = apply(params, TOKENS)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(TOKENS[:, 1:]))
    return losses.mean()


def loss_there(model):
    logits = model(torch.from_numpy(TOKENS)).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), torch.from_numpy(TOKENS[:, 1:]).reshape(-1)
    )


@functools.cache
def value_and_grad(scaling):
    """The loss and the gradients of the factors, compiled."""
    _, apply, _ = base()
    attached = rl.attach(apply, adapted(scaling)[1])
    return jax.jit(rl.value_and_grad(lambda params: loss_here(params, attached)))


def model_of(scaling, folder):
    """PEFT's model of the same adapters, whose factors train."""
    save(folder / "out", *adapted(scaling))
    return read_by_peft(torch_llama(), folder / "out", is_trainable=True).eval()


def factors_there(model, of=lambda parameter: parameter):
    """PEFT's factors, or their gradients, by the names that they have in a file."""
    return {
        name.replace(".default", ""): of(parameter).detach().numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def factors_here(lora):
    """The factors, or their gradients, by the same names: one matrix a layer, transposed."""
    found = {}
    for block, parts in lora["params"]["layers"].items():
        for part, leaf in parts.items():
            a, b = (np.asarray(leaf["kernel"][name]) for name in "ab")
            for layer in range(len(a)):
                name = f"base_model.model.model.layers.{layer}.{block}.{part}"
                found[f"{name}.lora_A.weight"] = a[layer].T
                found[f"{name}.lora_B.weight"] = b[layer].T
    return found


def assert_all_close(found, wanted, tolerance):
    """Each within the tolerance of its own largest number; none of them is zero."""
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert np.abs(array).max() > 0
        assert_close(found[name], array, tolerance)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_gradients_of_a_and_b_are_those_of_torch(scaling, tmp_path):
    model = model_of(scaling, tmp_path)
    there = loss_there(model)
    there.backward()
    here, grads = value_and_grad(scaling)(rl.LoraParams(base()[2], adapted(scaling)[0]))
    np.testing.assert_allclose(float(here), there.item(), rtol=1e-5)
    wanted = factors_there(model, of=lambda parameter: parameter.grad)
    assert len(wanted) == 42  # two factors of seven matrices in three layers
    assert_all_close(factors_here(grads), wanted, 1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_steps_of_sgd_and_adamw_lead_to_the_factors_of_torch(scaling, name, tmp_path):
    here, there = OPTIMIZERS[name]
    model = model_of(scaling, tmp_path)
    optimizer = there([p for p in model.parameters() if p.requires_grad])
    lora, state = adapted(scaling)[0], here.init(adapted(scaling)[0])
    before = factors_here(lora)
    for tolerance in (1e-5, 1e-4):  # after one step, and after the next, whose gradients differ
        optimizer.zero_grad()
        loss_there(model).backward()
        optimizer.step()
        _, grads = value_and_grad(scaling)(rl.LoraParams(base()[2], lora))
        updates, state = here.update(grads, state, lora)
        lora = optax.apply_updates(lora, updates)
        assert_all_close(factors_here(lora), factors_there(model), tolerance)
    # What is compared moved by far more than it may be wrong by.
    moved = [np.abs(a - before[n]).max() / np.abs(a).max() for n, a in factors_here(lora).items()]
    assert np.median(moved) > 0.01


def test_a_step_of_adamw_at_its_usual_epsilon_is_that_of_torch_where_gradients_are_resolved(
    tmp_path,
):
    model = model_of("rslora", tmp_path)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loss_there(model).backward()
    optimizer.step()
    lora = adapted("rslora")[0]
    here = optax.adamw(0.01, weight_decay=0.01)  # torch's own default of the decay
    _, grads = value_and_grad("rslora")(rl.LoraParams(base()[2], lora))
    lora = optax.apply_updates(lora, here.update(grads, here.init(lora), lora)[0])
    found, wanted, sizes = factors_here(lora), factors_there(model), factors_here(grads)
    for name, array in wanted.items():
        # The first step is the gradient's sign, which rounding decides for the smallest.
        resolved = np.abs(sizes[name]) > 1e-3 * np.abs(sizes[name]).max()
        assert resolved.mean() > 0.95
        assert_close(np.where(resolved, found[name], array), array)
