"""PyTorch: one of two processes (`process`, `port`) with `DistributedDataParallel` over gloo, against one device."""

import sys

import common
import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import hkr_keras as hkr

PROCESS, PORT = map(int, sys.argv[1:3])
torch.set_num_threads(1)


def value_and_gradient(name, parts=None):
    """Loss and gradient by the predictions of this process, or of all."""
    loss, default, labels, predictions, weights = common.CASES[name]
    rows = default[PROCESS] if parts is None else parts
    predictions = torch.tensor(predictions[rows], requires_grad=True)
    value = loss()(labels[rows], predictions, None if weights is None else weights[rows])
    value.backward()
    return float(value), predictions.grad.numpy()


def gathered(value):
    found = [None, None]
    distributed.all_gather_object(found, value)
    return found


def step_of_keras(model):
    """The optimizer of Keras: it applies the constraints."""
    optimizer = hkr.optimizers.StiefelMuon(0.02)

    def step():
        with torch.no_grad():
            optimizer.apply([variable.value.grad for variable in model.trainable_variables], model.trainable_variables)

    return step


def step_of_torch(model):
    """An optimizer of PyTorch, and the projection after it."""
    optimizer = torch.optim.SGD([variable.value for variable in model.trainable_variables], lr=0.1, momentum=0.9)

    def step():
        optimizer.step()
        hkr.constraints.project(model)

    return step


def train(make_step, parallel, centering=False):
    """Two epochs of two steps."""
    model = common.make_model(centering=centering)
    network = DistributedDataParallel(model) if parallel else model
    step, loss, losses = make_step(model), hkr.losses.HKR(alpha=5, margin=0.5), []
    for start in [0, common.BATCH] * 2:
        rows = np.arange(start, start + common.BATCH)
        rows = np.split(rows, 2)[PROCESS] if parallel else rows
        model.zero_grad()
        value = loss(common.Y[rows], network(torch.tensor(common.X[rows]), training=True))
        value.backward()
        step()
        losses.append(float(value))
    hkr.constraints.project(model, polish=True)
    return model, losses


alone = {name: value_and_gradient(name, slice(None)) for name in common.CASES}
references = {make.__name__: train(make, parallel=False) for make in (step_of_keras, step_of_torch)}
references["centred"] = train(step_of_torch, parallel=False, centering=True)

distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=PROCESS, world_size=2)
values = {}
for name in common.CASES:
    parts = gathered(value_and_gradient(name))
    value = np.mean([value for value, _ in parts])
    gradient = np.concatenate([gradient for _, gradient in parts]) / 2
    values[name] = common.difference([value, gradient], list(alone[name]))

training = {}
for name, make in {"step_of_keras": step_of_keras, "step_of_torch": step_of_torch, "centred": step_of_torch}.items():
    model, losses = train(make, parallel=True, centering=name == "centred")
    reference, reference_losses = references[name]
    copies = gathered(common.weights(model))
    training[name] = {
        "losses": common.difference(np.mean(gathered(losses), axis=0).tolist(), reference_losses),
        "weights": common.difference(copies[0], common.weights(reference)),
        "apart": common.difference(*copies),
        "spectrum": common.spectrum(model),
    }

# Evaluation is the business of one process, which must not wait for the other.
evaluated = None
if PROCESS == 0:
    common.compiled(model, "sgd")
    evaluated = model.evaluate(common.X, common.Y, batch_size=common.BATCH, verbose=0)
    hkr.certify(model, common.X[:5], verbose=0)
    scores = torch.tensor(common.LOGITS[:, 0])
    hkr.losses.KR()(common.LABELS // 2, scores)
distributed.barrier()
distributed.destroy_process_group()
common.report(values=values, training=training, evaluated=evaluated)
