"""The digits network in Flower: clients train on images of their own, the server averages.

Each client has the network of examples/digits.py and a part of the images, and runs through
them once a round. The server takes a Nesterov step towards the clients' weighted mean, which is
DiLoCo's, and goes on from its checkpoint where there is one.

Run ``python examples/digits_flower/loopback.py`` after ``pip install 'optcore[demo,flower]'``.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
from digits import MLP, digits
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


def train(model: MLP, part: int, n_parts: int, round_number: int, lr: float) -> tuple[int, float]:
    """Run once through a client's images; return how many these are, and the mean loss."""
    x, labels, *_ = digits(seed=0)
    begin, end = (len(x) * k**2 // n_parts**2 for k in (part, part + 1))    # not all alike
    optimizer = optcore.SGD(model.params, lr=lr, grads=model.grads)
    losses = []
    order = begin + np.random.default_rng([round_number, part]).permutation(end - begin)
    for rows in np.split(order, range(BATCH, len(order), BATCH)):
        losses.append(model.backward(x[rows], labels[rows]))
        optimizer.step()
    return end - begin, float(np.mean(losses))


@client.train()
def answer(message: Message, context: Context) -> Message:
    """Train from the server's parameters, and send back what became of them."""
    model = network()
    for p, sent in zip(model.params, message.content["arrays"].to_numpy_ndarrays(), strict=True):
        p[...] = sent
    config, node = message.content["config"], context.node_config
    part, n_parts = int(node["partition-id"]), int(node["num-partitions"])
    n, loss = train(model, part, n_parts, config["server-round"], config["lr"])
    return Message(RecordDict({
        "arrays": ArrayRecord(model.params),
        "metrics": MetricRecord({"num-examples": n, "loss": loss, "part": part}),
    }), reply_to=message)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Hold all rounds that are left."""
    config = context.run_config
    clients, checkpoint = int(config["clients"]), Path(str(config["checkpoint"]))
    strategy = ServerSGD(
        config["lr"], momentum=config["momentum"], nesterov=True,
        ordered_by="part", checkpoint=checkpoint,
        min_train_nodes=clients, min_available_nodes=clients, fraction_evaluate=0.0,
    )
    arrays = ArrayRecord(network().params)
    if checkpoint.exists():
        arrays = strategy.restore(checkpoint, arrays)
    strategy.start(
        grid, arrays, num_rounds=int(config["rounds"]) - strategy.rounds,
        train_config=ConfigRecord({"lr": config["client-lr"]}),
    )
