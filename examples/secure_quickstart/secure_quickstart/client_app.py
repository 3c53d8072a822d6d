"""The sites' side: Flower's quickstart with one more import and one more argument."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from secure_quickstart.task import Net, load_data
from secure_quickstart.task import test as test_fn
from secure_quickstart.task import train as train_fn
from urna.client import secure_sum_mod

app = ClientApp(mods=[secure_sum_mod])


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model on local data."""
    torch.manual_seed(0)
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    trainloader, _ = load_data(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
    epochs = int(context.run_config["local-epochs"])
    loss = train_fn(model, trainloader, epochs, float(msg.content["config"]["lr"]))
    metrics = {"train_loss": loss, "num-examples": len(trainloader.dataset)}
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the received model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, testloader = load_data(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
    loss, accuracy = test_fn(model, testloader)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(testloader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
