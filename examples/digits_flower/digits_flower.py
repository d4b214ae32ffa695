"""The digits network in Flower: clients train on images of their own, the server averages.

Each client has the network of examples/digits.py and a file of images, and runs through these once
a round. The server takes a Nesterov step towards the clients' weighted mean, which is DiLoCo's,
and goes on from its checkpoint where there is one.

Run ``python examples/digits_flower/loopback.py`` after ``pip install 'optcore[flower,sklearn]'``.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
from digits import MLP
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

import optcore
from optcore.flower import ServerSGD

BATCH = 32

client = ClientApp()
server = ServerApp()


def network() -> MLP:
    """Return the network as everybody begins."""
    return MLP([64, 128, 10], np.random.default_rng(0))


def train(
    model: MLP, x: np.ndarray, labels: np.ndarray, *, lr: float, seed: tuple[int, int]
) -> float:
    """Run once through images, in an order that the seed gives; return the mean loss."""
    optimizer = optcore.SGD(model.params, lr=lr, grads=model.grads)
    losses = []
    order = np.random.default_rng(seed).permutation(len(x))
    for rows in np.split(order, range(BATCH, len(x), BATCH)):
        losses.append(model.backward(x[rows], labels[rows]))
        optimizer.step()
    return float(np.mean(losses))


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Train from the server's parameters, and send back what became of them."""
    config, node = message.content["config"], context.node_config
    model, part = network(), int(node["partition-id"])
    for p, sent in zip(model.params, message.content["arrays"].to_numpy_ndarrays(), strict=True):
        p[...] = sent
    with np.load(str(node["images"])) as images:
        x, labels = images["x"], images["labels"]
    loss = train(model, x, labels, lr=config["lr"], seed=(config["server-round"], part))
    return Message(RecordDict({
        "arrays": ArrayRecord(model.params),
        "metrics": MetricRecord({"num-examples": len(x), "loss": loss, "part": part}),
    }), reply_to=message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Hold all rounds that are left."""
    config = context.run_config
    clients, checkpoint = int(config["clients"]), Path(str(config["checkpoint"]))
    strategy = ServerSGD(
        float(config["lr"]), momentum=float(config["momentum"]), nesterov=True,
        ordered_by="part", checkpoint=checkpoint,
        min_train_nodes=clients, min_available_nodes=clients, fraction_evaluate=0.0,
    )
    arrays = ArrayRecord(network().params)
    if checkpoint.exists():
        arrays = strategy.restore(checkpoint, arrays)
    strategy.start(
        grid, arrays, num_rounds=int(config["rounds"]) - strategy.rounds,
        train_config=ConfigRecord({"lr": float(config["client-lr"])}),
    )
