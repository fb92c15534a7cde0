"""Federated averages of products: against dense sums, for clients of any rank and any blocks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from expert_models import experts_model, tokens
from models import ARCHITECTURES, FORMS
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor

from wasi_peft import WasiConfig, create_wasi_optimizer
from wasi_peft.training.federated import (
    Contribution,
    averaged,
    check_contribution,
    check_state,
    cut_state,
    load_state,
    rank_of,
    state_bytes,
    train_last_blocks,
    trained_state,
    usable,
)

VIT = ARCHITECTURES["vit"]
PREFIX = "base_model.model.layer.wasi_form.wasi_added_"
BLOCK = "base_model.model.vit.layers.1.attention.q_proj.wasi_form.wasi_added_"
LEFT, RIGHT = f"{PREFIX}L", f"{PREFIX}R"


def random_pair(rank: int, seed: int, out: int = 9, inner: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        LEFT: torch.randn(out, rank, generator=generator),
        RIGHT: torch.randn(rank, inner, generator=generator),
    }


def product(state: Any) -> Tensor:
    return state[LEFT].double() @ state[RIGHT].double()


def best(weight: Tensor, rank: int) -> Tensor:
    U, energies, Vh = torch.linalg.svd(weight)
    return U[:, :rank] * energies[:rank] @ Vh[:rank]


def test_products_are_averaged_and_cut_to_the_rank_of_the_server() -> None:
    """The slow reference forms every product."""
    server = random_pair(3, 0)
    sent = [random_pair(3, 1), random_pair(3, 2)]
    result = averaged(server, [Contribution(server, sent[0], 30), Contribution(server, sent[1], 10)])
    expected = best(0.75 * product(sent[0]) + 0.25 * product(sent[1]), 3)
    assert result[LEFT].shape == server[LEFT].shape
    torch.testing.assert_close(product(result), expected, rtol=1e-5, atol=1e-5)


def test_of_a_client_of_a_smaller_rank_the_change_counts() -> None:
    """What it never saw of the server's product stays; whether the server cut its state or the client itself."""
    server = random_pair(4, 0)
    given = cut_state(server, 2)
    torch.testing.assert_close(product(given), best(product(server), 2), rtol=1e-5, atol=1e-5)
    small, whole = random_pair(2, 1), random_pair(4, 2)
    change = 0.5 * (product(small) - product(given)) + 0.5 * (product(whole) - product(server))
    for received in (given, server):
        result = averaged(server, [Contribution(received, small, 5), Contribution(server, whole, 5)])
        torch.testing.assert_close(product(result), best(product(server) + change, 4), rtol=1e-5, atol=1e-5)


def test_what_all_share_is_averaged_without_a_loss() -> None:
    """Clients that train L alone send it alone."""
    server = random_pair(3, 0)
    sent = [{LEFT: random_pair(3, seed)[LEFT]} for seed in (1, 2, 3)]
    result = averaged(server, [Contribution(server, one, 1) for one in sent])
    assert torch.equal(result[RIGHT], server[RIGHT])
    torch.testing.assert_close(result[LEFT], torch.stack([one[LEFT] for one in sent]).mean(0))


def test_what_nobody_trained_stays_and_other_weights_are_of_those_who_did() -> None:
    server = {**random_pair(2, 0), "head": torch.zeros(3), "norm": torch.ones(2), "count": torch.tensor(1)}
    heads = [{"head": torch.full((3,), 1.0)}, {"head": torch.full((3,), 4.0), "count": torch.tensor(7)}]
    result = averaged(server, [Contribution(server, heads[0], 2), Contribution(server, heads[1], 1)])
    assert torch.equal(result[LEFT], server[LEFT]) and torch.equal(result["norm"], server["norm"])
    assert result["head"].tolist() == [2.0, 2.0, 2.0] and int(result["count"]) == 7


@pytest.mark.parametrize(
    ("sent", "weight", "sentence"),
    [
        ({}, 1.0, "must send what it has trained"),
        (random_pair(2, 1), float("nan"), "must be positive and finite, got nan"),
        (random_pair(2, 1), 0, "must be positive and finite, got 0"),
        ({"other": torch.zeros(1)}, 1.0, "other: not a tensor of the server's adapter"),
        ({LEFT: torch.full((9, 2), torch.nan)}, 1.0, "holds NaN or Inf"),
        ({LEFT: torch.zeros(9, 1)}, 1.0, r"one rank, at most 2, got \[9, 1\] beside 2"),
        (random_pair(3, 1), 1.0, "one rank, at most 2, got"),
        (random_pair(2, 1, out=8), 1.0, r"must have shape \[9, 2\], got \[8, 2\]"),
        ({LEFT: torch.zeros(9)}, 1.0, r"must have shape|one rank"),
        ({RIGHT: torch.zeros(2, 7), LEFT: torch.zeros(9)}, 1.0, "one rank, at most 2"),
        ({LEFT: torch.zeros(9, 2, dtype=torch.int8)}, 1.0, "must be of a dtype like torch.float32, got torch.int8"),
    ],
)
def test_what_cannot_be_averaged_is_refused(sent: dict[str, Tensor], weight: float, sentence: str) -> None:
    server = random_pair(2, 0)
    with pytest.raises(ValueError, match=sentence):
        check_contribution(server, Contribution(server, sent, weight))


def test_other_factors_than_two_are_refused() -> None:
    server = {**random_pair(2, 0), "base_model.model.layer.wasi_form.wasi_M": torch.eye(2)}
    with pytest.raises(ValueError, match="are of L and R in floating point"):
        averaged(server, [Contribution(server, random_pair(2, 1), 1)])
    with pytest.raises(ValueError, match=r"layer\.wasi_form\.wasi_M: federated averages are of L and R"):
        check_state(server)
    replacing = {key.replace("added_", ""): value for key, value in random_pair(2, 0).items()}
    with pytest.raises(ValueError, match="factors replace the weight"):
        cut_state(replacing, 1)
    assert cut_state(replacing, 2) == replacing
    with pytest.raises(ValueError, match="rank must be"):
        cut_state(replacing, 0)


def test_a_round_goes_on_without_clients_that_fail(caplog: pytest.LogCaptureFixture) -> None:
    """The line names each of them and says why; the others' average is as if those had not been asked."""
    server = random_pair(2, 0)
    good = {name: Contribution(server, random_pair(2, seed), seed) for name, seed in (("Oslo", 1), ("Lima", 2))}
    bad = {
        "Rome": MemoryError("no memory left"),
        "Kyiv": None,
        "Bonn": "its battery is empty.",
        "Doha": Contribution(server, {LEFT: torch.full((9, 2), torch.inf)}, 1),
        "Baku": Contribution(server, random_pair(2, 1, out=8), 1),
    }
    used = usable(server, {**bad, **good}, turn=3)
    assert used == good
    lines = [record.getMessage() for record in caplog.records]
    reasons = [
        "MemoryError: no memory left",
        "it has not answered",
        "its battery is empty",
        "holds NaN",
        "shape [9, 2]",
    ]
    assert len(lines) == len(bad)
    for line, name, reason in zip(lines, bad, reasons, strict=True):
        assert line.startswith(f"round 3: {name} is left out: ") and reason in line
    before = {key: value.clone() for key, value in server.items()}
    averaged(server, list(used.values()))
    with pytest.raises(RuntimeError, match="round 4: none of 5 clients has sent anything that can be averaged"):
        usable(server, bad, turn=4)
    assert all(torch.equal(server[key], before[key]) for key in before)


# ---------------------------------------------------------------- models


def adapted(form: str = "addition int8", rank: int = 4) -> Any:
    options = {"residual_product": "restored", "activation_threshold": None}
    return get_peft_model(VIT.model(), WasiConfig(**FORMS[form], weight_rank=rank, **options)).train()


def trained(model: Any, seed: int = 1) -> Any:
    optimizer = create_wasi_optimizer(model, torch.optim.AdamW, lr=1e-2)
    for step in range(2):
        model(**VIT.batch(4, seed + step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def whole_state(model: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("form", ["addition int8", "addition int4", "addition exact", "frozen_basis int8"])
def test_a_round_of_clients_with_budgets(form: str) -> None:
    """One client has a smaller rank, one trains the last block; the server's state loads everywhere."""
    server = trained(adapted(form))
    state = whole_state(server)
    contributions = []
    for rank, blocks in ((4, 2), (2, 2), (4, 1)):
        client = adapted(form)
        given = cut_state(state, rank)
        load_state(client, given)
        if blocks < 2:
            train_last_blocks(client, blocks)
        sent = trained_state(trained(client, seed=5), given)
        assert rank_of(sent) == rank
        lefts = [key for key in sent if key.endswith("_L")]
        assert len(lefts) == 6 * blocks
        assert any(key.endswith("_R") for key in sent) == (form != "frozen_basis int8")
        assert not any(".layers.0." in key or "embeddings" in key for key in sent) or blocks == 2
        assert any("layernorm.weight" in key for key in sent)  # after the last block
        contributions.append(Contribution(given, sent, 4))
    assert state_bytes(contributions[2].sent) < 0.6 * state_bytes(contributions[0].sent)
    result = averaged(state, contributions)
    load_state(server, result)
    after = whole_state(server)
    assert after.keys() == state.keys() and rank_of(after) == 4
    assert all(torch.equal(after[key], result[key].to(after[key])) for key in after)
    changed = [key for key in after if not torch.equal(after[key], state[key])]
    assert any(key.endswith("_L") for key in changed)


def test_a_model_that_clients_share_is_to_each_as_a_new_one() -> None:
    """Also in what the first batch makes of R."""
    state, shared = whole_state(adapted()), adapted()
    for seed in (1, 7):
        for model in (shared, alone := adapted()):
            load_state(model, state)
            trained(model, seed)
        assert all(torch.equal(value, whole_state(alone)[key]) for key, value in whole_state(shared).items())
        assert not torch.equal(whole_state(alone)[f"{BLOCK}L"], state[f"{BLOCK}L"])
    later = whole_state(shared)
    load_state(shared, later)
    shared(**VIT.batch(4, 3))
    assert all(torch.equal(value, later[key]) for key, value in whole_state(shared).items())


def test_experts_of_a_model_that_clients_share_meet_their_rows_again() -> None:
    def new() -> Any:
        config = WasiConfig(weight_rank=3, residual="int8", target_modules=["gate_up_proj", "down_proj"])
        return get_peft_model(experts_model("mixtral", torch.float32), config).train()

    state, shared, ids = whole_state(new()), new(), tokens()
    for batch in (ids, ids.flip(1)):
        for model in (shared, alone := new()):
            load_state(model, state)
            model(input_ids=batch)
        met = whole_state(alone)
        assert any(not torch.equal(met[key], state[key]) for key in met if key.endswith("_R"))
        assert all(torch.equal(value, met[key]) for key, value in whole_state(shared).items())


def test_one_client_alone_gives_what_it_has_trained() -> None:
    """So federated training of one is training."""
    model = adapted()
    state = whole_state(model)
    sent = trained_state(trained(model), state)
    result = averaged(state, [Contribution(state, sent, 3)])
    for key, value in whole_state(model).items():
        torch.testing.assert_close(result[key], value, rtol=1e-6, atol=1e-7, msg=key)


def test_blocks_below_the_trained_ones_do_not_train() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="count must be at most 2, the blocks of the model, got 3"):
        train_last_blocks(model, 3)
    assert any(parameter.requires_grad for name, parameter in model.named_parameters() if ".layers.0." in name)
    train_last_blocks(model, 1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained(model)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved and not any(".layers.0." in name or "embeddings" in name for name in moved)


# ---------------------------------------------------------------- Flower


def client_app(broken: dict[int, str]) -> Any:
    """An app whose clients have budgets of their own; some break in ways of their own, by partition."""
    app = importlib.import_module("flwr.clientapp").ClientApp()
    messages = importlib.import_module("flwr.app")

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        number = int(context.node_config["partition-id"])
        given = message.content["arrays"].to_torch_state_dict()
        fault = broken.get(number)
        later = message.content["config"]["server-round"] > 1
        if fault == "raises" or (fault == "raises later" and later):
            raise MemoryError("no memory left")
        model = adapted()
        load_state(model, cut_state(given, (4, 4, 2, 2)[number]))
        if number == 3:
            train_last_blocks(model, 1)
        sent = trained_state(trained(model), given)
        if fault == "nan":
            next(iter(sent.values())).fill_(torch.nan)
        if fault == "shape":
            sent = {key: value[..., :-1] for key, value in sent.items()}
        if fault == "empty":
            return messages.Message(messages.RecordDict({}), reply_to=message)
        if fault == "weight":
            records = {
                "arrays": messages.ArrayRecord(sent),
                "metrics": messages.MetricRecord({"num-examples": [4, 4]}),
            }
            return messages.Message(messages.RecordDict(records), reply_to=message)
        metrics = {"num-examples": 4 + number, "loss": float(number)}
        records = {"arrays": messages.ArrayRecord(sent), "metrics": messages.MetricRecord(metrics)}
        return messages.Message(messages.RecordDict(records), reply_to=message)

    return app


def flower_run(broken: dict[int, str], rounds: int = 2) -> tuple[Any, Any, dict[str, Tensor]]:
    pytest.importorskip("flwr")
    flower = importlib.import_module("wasi_peft.training.flower")
    messages = importlib.import_module("flwr.app")
    state = whole_state(adapted())
    strategy = flower.ProductAverage(fraction_evaluate=0.0, min_available_nodes=4)
    grid = flower.LocalGrid(client_app(broken), 4)
    return strategy, lambda: strategy.start(grid, messages.ArrayRecord(state), rounds), state


def test_flower_trains_clients_of_several_budgets() -> None:
    strategy, start, state = flower_run({})
    result = start()
    final = result.arrays.to_torch_state_dict()
    assert final.keys() == state.keys() and rank_of(final) == 4
    assert all(torch.equal(final[key], strategy.state[key]) for key in final)
    first, second = (result.train_metrics_clientapp[number] for number in (1, 2))
    assert second["sent-bytes"] < first["sent-bytes"] == 4 * state_bytes(state)  # the server knows small ranks now
    assert first["received-bytes"] < 4 * state_bytes(state)
    assert first["loss"] == pytest.approx((0 * 4 + 1 * 5 + 2 * 6 + 3 * 7) / 22)
    model = adapted()
    load_state(model, final)
    assert float(model(**VIT.batch(4, 1)).loss) < float(adapted()(**VIT.batch(4, 1)).loss)


def test_flower_leaves_out_clients_that_fail(caplog: pytest.LogCaptureFixture) -> None:
    _, start, _ = flower_run({1: "raises", 3: "nan"}, rounds=1)
    result = start()
    lines = sorted(record.getMessage() for record in caplog.records if record.name.startswith("wasi_peft"))
    assert len(lines) == 2
    assert "round 1: node 2 is left out: MemoryError: no memory left" in lines[0]
    assert "round 1: node 4 is left out: " in lines[1] and "holds NaN or Inf" in lines[1]
    assert all(bool(value.isfinite().all()) for value in result.arrays.to_torch_state_dict().values())
    assert result.train_metrics_clientapp[1]["loss"] == pytest.approx((0 * 4 + 2 * 6) / 10)


def test_flower_refuses_answers_of_other_shapes_and_kinds(caplog: pytest.LogCaptureFixture) -> None:
    _, start, _ = flower_run({0: "shape", 1: "empty", 2: "weight"}, rounds=1)
    result = start()
    lines = sorted(record.getMessage() for record in caplog.records if record.name.startswith("wasi_peft"))
    assert len(lines) == 3
    assert lines[0].startswith("round 1: node 1 is left out: ") and "must have" in lines[0]
    assert "node 2 is left out: its message must hold one record of arrays and one of metrics" in lines[1]
    assert "node 3 is left out: num-examples must be a number, got [4, 4]" in lines[2]
    assert result.train_metrics_clientapp[1]["loss"] == 3


def test_flower_refuses_adapters_without_an_average_before_anything_trains() -> None:
    strategy, _, state = flower_run({})
    flower = importlib.import_module("wasi_peft.training.flower")
    messages = importlib.import_module("flwr.app")
    record = messages.ArrayRecord({**state, "base_model.model.layer.wasi_form.wasi_M": torch.eye(2)})
    with pytest.raises(ValueError, match="wasi_M: federated averages are of L and R"):
        strategy.start(flower.LocalGrid(client_app(dict.fromkeys(range(4), "raises")), 4), record, 1)


def test_flower_names_clients_that_do_not_answer(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    _, start, _ = flower_run({}, rounds=1)
    flower = importlib.import_module("wasi_peft.training.flower")
    pull = flower.LocalGrid.pull_messages
    monkeypatch.setattr(flower.LocalGrid, "pull_messages", lambda self, names: pull(self, list(names)[1:]))
    start()
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("wasi_peft")]
    assert len(lines) == 1 and "is left out: it has not answered" in lines[0]


def test_flower_keeps_what_was_trained_when_all_fail() -> None:
    strategy, start, state = flower_run(dict.fromkeys(range(4), "raises later"))
    with pytest.raises(RuntimeError, match="round 2: none of 4 clients has sent anything"):
        start()
    assert strategy.state.keys() == state.keys()
    assert any(not torch.equal(strategy.state[key], state[key]) for key in state)
