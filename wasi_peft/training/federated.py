"""Federated averaging of adapters whose clients have budgets of their own: a rank, and blocks that train.

What clients learn is a product `L R`. Averages of L and of R do not multiply to the average of the products, and
factors of several ranks have none. Here products are added up, exactly, and put at the server's rank K by their
singular values:

    L R  <-  best rank-K approximation of  L R + sum_c w_c (L_c R_c - S_c)

S_c is what client c started from: `L R` itself, or the best approximation of it at the client's rank. So what a client
of a small rank never saw stays. Each w_c is a share of the samples of those clients that have trained the layer.

States are plain: what `get_peft_model_state_dict` gives, and parts of it. :mod:`flower` sends them about.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ..linalg.sums import Pair, compressed_sum, stacked_sum
from ..models.structure import Structure
from ..tuner.config import check_positive_integer
from ..tuner.layer import wasi_layers

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]

ADDITION = ".wasi_form.wasi_added_"
FACTORS = (ADDITION, ".wasi_form.wasi_")  # what comes before L and R


class Contribution(NamedTuple):
    """What one client has sent.

    Attributes:
        received: The state that it was given.
        sent: What it has trained of it (:func:`trained_state`).
        weight: How much it counts, for instance its number of samples.
    """

    received: State
    sent: State
    weight: float


def cut_state(state: State, rank: int) -> dict[str, Tensor]:
    """The state with the best approximations of all products at a smaller rank; what has that rank stays as it is.

    Args:
        state: Of an adapter of additions to frozen weights.
        rank: At least 1.

    Raises:
        ValueError: If the rank is none, or factors replace the weights: those cannot be cut without harm.
    """
    check_positive_integer("rank", rank)
    cut = dict(state)
    for left, right in _pairs(state):
        if rank < state[left].shape[1]:
            if ADDITION not in left:
                raise ValueError(
                    f"{left}: a rank of a client's own is for additions to weights; these factors replace the weight."
                )
            cut[left], cut[right] = _cut(state[left], state[right], rank)
    return cut


def train_last_blocks(model: nn.Module, count: int) -> None:
    """Have an adapter train in the last blocks only, and in what comes after them: backward ends there.

    Args:
        model: With an adapter that is active.
        count: How many blocks, at least 1.

    Raises:
        ValueError: If the model has fewer. Nothing has changed then.
    """
    blocks = list(Structure(model).blocks)
    check_positive_integer("count", count)
    if count > len(blocks):
        raise ValueError(f"count must be at most {len(blocks)}, the blocks of the model, got {count}.")
    first = f"{blocks[-count]}."
    for name, parameter in model.named_parameters():
        if name.startswith(first):
            return
        parameter.requires_grad_(False)


def load_state(model: nn.Module, state: State, adapter_name: str = "default") -> None:
    """Load a whole state, whatever its ranks are; the parameters stay the same objects.

    Where nothing has been learnt yet, the next batch gives R its coordinates, as the first one does in a new adapter.

    Args:
        model: The PEFT model.
        state: From the server.
        adapter_name: The adapter.

    Raises:
        ValueError: If the state is not one of this adapter; nothing has changed then.
    """
    set_peft_model_state_dict(model, dict(state), adapter_name=adapter_name)
    for _, layer in wasi_layers(model):
        layer.meet_again(adapter_name)


def trained_state(model: nn.Module, received: State, adapter_name: str = "default") -> dict[str, Tensor]:
    """What a client sends: what trains of its adapter, copies on the CPU.

    R of a layer that trains is left out where it is the server's, as it is with `update="frozen_basis"`.

    Args:
        model: The PEFT model, after its steps.
        received: The state that the server gave.
        adapter_name: The adapter.
    """
    trains = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    frozen = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter_name)
    rights = dict(_pairs(state))
    lefts = {right: left for left, right in rights.items()}
    sent = {}
    for key, value in state.items():
        partner = state[lefts[key]] if key in lefts else state[rights[key]] if key in rights else value
        if partner.data_ptr() not in trains and value.data_ptr() not in trains and value.data_ptr() in frozen:
            continue
        unchanged = value.shape == received[key].shape and torch.equal(value.cpu(), received[key].cpu())
        if key in lefts and value.data_ptr() not in trains and unchanged:
            continue
        sent[key] = value.detach().to("cpu", copy=True)
    return sent


def state_bytes(state: State) -> int:
    """Bytes of a state on its way."""
    return sum(value.nbytes for value in state.values())


def rank_of(state: State) -> int | None:
    """The largest rank in a state; None without factors."""
    ranks = [value.shape[1] for key, value in state.items() if _is_left(key)]
    return max(ranks, default=None)


def check_contribution(state: State, contribution: Contribution) -> None:
    """Refuse what a client has sent, if it cannot be averaged.

    Args:
        state: Of the server.
        contribution: Of the client.

    Raises:
        ValueError: If the weight is none, or a tensor is not one of the state, has another shape (the rank of a pair
            excepted), or holds NaN or Inf; or there is none.
    """
    received, sent, weight = contribution
    if not (weight > 0 and weight < float("inf")):
        raise ValueError(f"the weight of a client must be positive and finite, got {weight!r}.")
    if not sent:
        raise ValueError("a client must send what it has trained, got nothing.")
    for key, value in sent.items():
        if key not in state:
            raise ValueError(f"{key}: not a tensor of the server's adapter.")
        if value.is_floating_point() != state[key].is_floating_point():
            raise ValueError(f"{key}: must be of a dtype like {state[key].dtype}, got {value.dtype}.")
        wanted = list(state[key].shape)
        partner = _partner(key)
        if partner in state:
            axis = 1 if _is_left(key) else 0
            rank = value.shape[axis] if value.dim() == 2 else 0
            beside = sent.get(partner, received[partner])
            own = beside.shape[1 - axis] if beside.dim() == 2 else 0
            if rank != own or rank > received[key].shape[axis]:
                raise ValueError(
                    f"{key}: L and R must have one rank, at most {received[key].shape[axis]}, got {list(value.shape)} "
                    f"beside {own}."
                )
            wanted[axis] = rank
        if list(value.shape) != wanted:
            raise ValueError(f"{key}: must have shape {wanted}, got {list(value.shape)}.")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"{key}: holds NaN or Inf.")


def check_state(state: State) -> None:
    """Refuse an adapter that has no federated average.

    Raises:
        ValueError: If a layer has other factors than L and R in floating point.
    """
    for _ in _pairs(state):
        pass


def usable(
    state: State, answers: Mapping[str, Contribution | BaseException | str | None], turn: int
) -> dict[str, Contribution]:
    """What can be averaged of the answers of a round. A warning names each client that is left out, and says why.

    Args:
        state: Of the server.
        answers: Of each client that was asked, by its name: what it has sent, or what it has raised, or another reason
            why it has sent nothing, or None.
        turn: The round, for the warnings.

    Raises:
        RuntimeError: If nothing can be averaged. Then the server's state is still what was trained before.

    Example:
        >>> key = "layer.wasi_form.wasi_added_"
        >>> server = {f"{key}L": torch.zeros(3, 1), f"{key}R": torch.ones(1, 2)}
        >>> sent = Contribution(server, {f"{key}L": torch.ones(3, 1)}, weight=10)
        >>> list(usable(server, {"Oslo": sent, "Rome": MemoryError("no memory left"), "Kyiv": None}, turn=1))
        ['Oslo']
    """
    contributions, reasons = dict[str, Contribution](), dict[str, str]()
    for name, answer in answers.items():
        if isinstance(answer, Contribution):
            try:
                check_contribution(state, answer)
                contributions[name] = answer
            except ValueError as error:
                reasons[name] = str(error)
        elif answer is None:
            reasons[name] = "it has not answered."
        else:
            reasons[name] = answer if isinstance(answer, str) else f"{type(answer).__name__}: {answer}"
    for name, reason in reasons.items():
        logger.warning("round %d: %s is left out: %s", turn, name, reason)
    if not contributions:
        raise RuntimeError(
            f"round {turn}: none of {len(answers)} clients has sent anything that can be averaged; the server's state "
            "is that of before."
        )
    return contributions


@torch.no_grad()
def averaged(state: State, contributions: Sequence[Contribution]) -> dict[str, Tensor]:
    """The server's state after a round; what nobody has trained stays as it is.

    Args:
        state: Of before the round; not changed.
        contributions: Of the clients, each of which passes :func:`check_contribution`.

    Raises:
        ValueError: If there is none, or one does not pass, or the factors of the state are others than L and R.

    Example:
        >>> key = "layer.wasi_form.wasi_added_"
        >>> server = {f"{key}L": torch.zeros(3, 1), f"{key}R": torch.ones(1, 2)}
        >>> clients = [Contribution(server, {f"{key}L": torch.full((3, 1), x)}, 1) for x in (1.0, 3.0)]
        >>> averaged(server, clients)[f"{key}L"].T.tolist()
        [[2.0, 2.0, 2.0]]
    """
    if not contributions:
        raise ValueError("an average needs at least one contribution, got none.")
    for contribution in contributions:
        check_contribution(state, contribution)
    result = dict(state)
    pairs = dict(_pairs(state))
    for left, right in pairs.items():
        trained = [one for one in contributions if left in one.sent or right in one.sent]
        if trained:
            result[left], result[right] = _averaged_pair(state, left, right, trained)
    for key in state.keys() - pairs.keys() - set(pairs.values()):
        trained = [one for one in contributions if key in one.sent]
        if trained and state[key].is_floating_point():
            total = sum(one.weight for one in trained)
            mean = torch.stack([one.sent[key].double() * (one.weight / total) for one in trained]).sum(0)
            result[key] = mean.to(state[key])
        elif trained:  # how many batches a norm has seen
            result[key] = trained[0].sent[key].to(state[key])
    return result


def _averaged_pair(state: State, left: str, right: str, trained: Sequence[Contribution]) -> Pair:
    """The new L and R of a layer."""
    own = state[left], state[right]
    total = sum(one.weight for one in trained)
    pairs, weights, stays = list[Pair](), list[float](), 1.0  # what is left of the server's own product
    for one in trained:
        share = one.weight / total
        given = one.received[left], one.received[right]
        L, R = one.sent.get(left, given[0]), one.sent.get(right, given[1])
        rank, start = L.shape[1], given
        if rank < given[0].shape[1]:
            start = _cut(*given, rank)
        if start[0].shape == own[0].shape:  # it was given the server's own
            stays -= share
        else:
            pairs.append(start)
            weights.append(-share)
        pairs.append((L, R))
        weights.append(share)
    if abs(stays) > 1e-9:
        pairs.append(own)
        weights.append(stays)
    L, R = stacked_sum(pairs, weights)
    rank = own[0].shape[1]
    if len(R) > rank:
        L, R = compressed_sum(L, R, rank)
    return L.to(own[0]), R.to(own[1])


def _cut(L: Tensor, R: Tensor, rank: int) -> Pair:
    left, right = compressed_sum(L, R, rank)
    return left.to(L), right.to(R)


def _is_left(key: str) -> bool:
    return any(key.endswith(f"{factor}L") for factor in FACTORS)


def _partner(key: str) -> str:
    """The other factor's key, of a factor's."""
    if not any(key.endswith((f"{factor}L", f"{factor}R")) for factor in FACTORS):
        return ""
    return key[:-1] + ("R" if key.endswith("L") else "L")


def _pairs(state: State) -> Iterator[tuple[str, str]]:
    """Keys of L and R of all layers that have both.

    Raises:
        ValueError: If a layer has other factors.
    """
    for key in state:
        if any(factor in key for factor in FACTORS) and not _partner(key):
            raise ValueError(f"{key}: federated averages are of L and R in floating point, got another factor.")
        if _is_left(key) and _partner(key) in state:
            yield key, _partner(key)
