"""The Flower app of the benchmark: federated averaging of tensors that nobody trains."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from measuring import Settings, random_tensors, stamp

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Send back what came."""
    stamp(Settings.read(), f"site_{context.node_config['site']}")
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """All rounds."""
    settings = Settings.read()
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=settings.sites, min_available_nodes=settings.sites)
    arrays = ArrayRecord({name: Array(tensor) for name, tensor in random_tensors(settings.shapes, 0).items()})
    strategy.start(grid, arrays, num_rounds=settings.receipts)
