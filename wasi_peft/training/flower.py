"""A Flower strategy that averages products of factors, and a grid that runs clients in this process.

Needs the package flwr, so nothing else imports this module.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from .federated import Contribution, State, averaged, check_state, cut_state, rank_of, state_bytes, usable


class ProductAverage(FedAvg):
    """FedAvg of what WASI adapters have learnt, whatever ranks and blocks each client trains (:mod:`federated`).

    The server sends the whole state of an adapter; a client of a smaller rank cuts it (:func:`federated.cut_state`),
    and from its second round on the server does, so that less is sent. Clients answer with
    :func:`federated.trained_state`.

    Clients that do not answer, fail, or send what cannot be averaged are left out of the round, each with a line that
    names it (:func:`federated.usable`). How long the server waits for them is the `timeout` of `start`.

    Args:
        **options: As for `FedAvg`.

    Attributes:
        state: The adapter's state after the last round that succeeded.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state: State = {}
        self._ranks: dict[int, int] = {}  # of nodes that have a smaller one than the server
        self._asked: dict[int, dict[str, Tensor]] = {}  # what each node of the round was given

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages of a round, to each node the state at its rank.

        Raises:
            ValueError: If adapters of this kind have no federated average.
        """
        state = dict(arrays.to_torch_state_dict())
        check_state(state)
        self.state, self._asked = state, {}
        by_rank: dict[int | None, dict[str, Tensor]] = {None: state}
        messages = list(super().configure_train(server_round, arrays, config, grid))
        for message in messages:
            node = message.metadata.dst_node_id
            rank = self._ranks.get(node)
            if rank not in by_rank:
                assert rank is not None
                by_rank[rank] = cut_state(state, rank)
            self._asked[node] = by_rank[rank]
            if rank is not None:
                record: dict[str, ArrayRecord | MetricRecord | ConfigRecord]
                record = {self.arrayrecord_key: ArrayRecord(by_rank[rank]), self.configrecord_key: config}
                message.content = RecordDict(record)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The average of what has come.

        Raises:
            RuntimeError: If no client has sent anything that can be averaged. `state` is as it was.
        """
        answers: dict[str, Contribution | BaseException | str | None] = dict.fromkeys(map(_name, self._asked))
        contents = dict[str, RecordDict]()
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                answers[_name(node)] = self._answer(node, reply)
                if not reply.has_error():
                    contents[_name(node)] = reply.content
            except Exception as error:  # whatever a client sends, the round goes on
                answers[_name(node)] = error
        used = usable(self.state, answers, server_round)
        before = self.state
        self.state = averaged(before, list(used.values()))
        for node in self._asked:
            rank = rank_of(used[_name(node)].sent) if _name(node) in used else None
            if rank is not None and rank < (rank_of(before) or 0):
                self._ranks[node] = rank
        metrics = self.train_metrics_aggr_fn([contents[name] for name in used], self.weighted_by_key)
        metrics["received-bytes"] = sum(state_bytes(one.sent) for one in used.values())
        metrics["sent-bytes"] = sum(state_bytes(state) for state in self._asked.values())
        return ArrayRecord(dict(self.state)), metrics

    def _answer(self, node: int, reply: Message) -> Contribution | str:
        """What a node has sent, or why it has not."""
        if reply.has_error():
            lines = str(reply.error.reason).strip().splitlines()
            return lines[-1].removesuffix("'>") if lines else "it has failed."
        if node not in self._asked:
            return "it was not asked."
        arrays, metrics = list(reply.content.array_records.values()), list(reply.content.metric_records.values())
        if len(arrays) != 1 or len(metrics) != 1 or self.weighted_by_key not in metrics[0]:
            return f"its message must hold one record of arrays and one of metrics with {self.weighted_by_key!r}."
        weight = metrics[0][self.weighted_by_key]
        if isinstance(weight, list):
            return f"{self.weighted_by_key} must be a number, got {weight}."
        return Contribution(self._asked[node], dict(arrays[0].to_torch_state_dict()), float(weight))


def _name(node: int) -> str:
    return f"node {node}"


class LocalGrid(Grid):
    """Nodes that are simulated in this process, one after the other; each keeps its context from round to round.

    For trying out an app without a network and without Ray. What a client raises becomes an error reply. This process
    becomes Flower's task 0, which messages have to come from.

    Args:
        app: What every node runs; it tells them apart by `context.node_config["partition-id"]`.
        nodes: How many there are.
    """

    def __init__(self, app: ClientApp, nodes: int) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0
        self._app = app
        self._contexts = {
            node: Context(0, node, {"partition-id": node - 1, "num-partitions": nodes}, RecordDict(), {})
            for node in range(1, nodes + 1)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """There is one run."""

    @property
    def run(self) -> Any:
        """There is one run, which has no description."""
        return None

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """From 1 on."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the nodes; their replies wait."""
        names = []
        for message in messages:
            name = str(len(self._replies))
            message.metadata.__dict__["_message_id"] = name
            try:
                reply = self._app(message, self._contexts[message.metadata.dst_node_id])
            except Exception as error:
                reply = Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
            self._replies[name] = reply
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to messages."""
        return [self._replies[name] for name in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the nodes, and hand out what they reply."""
        return self.pull_messages(self.push_messages(messages))
