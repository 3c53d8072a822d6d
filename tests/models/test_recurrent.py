"""A twin is the layer that it stands in for: outputs, states, gradients, names; and what it cannot be."""

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from urna.models.recurrent import State, recurrent_twin
from urna.protocol.errors import ModelError

KINDS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": partial(nn.LSTM, 5, 7),
    "gru": partial(nn.GRU, 5, 7),
    "tanh": partial(nn.RNN, 5, 7),
    "relu": partial(nn.RNN, 5, 7, nonlinearity="relu"),
}


def both_states(state: State) -> list[torch.Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("layers", "bidirectional", "batch_first", "bias"),
    [*itertools.product((1, 2), (False, True), (True,), (True,)), (2, True, False, False)],
    ids=lambda value: str(value).lower(),
)
def test_a_twin_computes_what_its_layer_computes(
    kind: str, layers: int, bidirectional: bool, batch_first: bool, bias: bool
) -> None:
    torch.manual_seed(3)
    layer = KINDS[kind](num_layers=layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias)
    twin = recurrent_twin(layer)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in layer.named_parameters()]
    x = torch.randn(3, 6, 5) if batch_first else torch.randn(6, 3, 5)
    start = torch.randn(layers * (2 if bidirectional else 1), 3, 7, requires_grad=True)
    results = []
    for module in (layer, twin):
        inputs = x.clone().requires_grad_()
        hx: State = (start, 0.5 * start) if kind == "lstm" else start
        output, state = module(inputs, hx)
        loss = output.square().sum() + sum(one.pow(3).sum() for one in both_states(state))
        gradients = torch.autograd.grad(loss, [inputs, start, *module.parameters()])
        results.append([output, *both_states(state), *gradients])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_zero_where_none_are_given(kind: str) -> None:
    layer = KINDS[kind](batch_first=True)
    x = torch.randn(2, 4, 5)
    assert torch.allclose(recurrent_twin(layer)(x)[0], layer(x)[0], atol=1e-6)


def test_a_twin_holds_the_very_parameters() -> None:
    layer = nn.LSTM(5, 7)
    twin = recurrent_twin(layer)
    assert all(one is other for one, other in zip(twin.parameters(), layer.parameters(), strict=True))


def test_projected_states_and_packed_sequences_are_refused() -> None:
    with pytest.raises(ModelError, match="without proj_size, found 3"):
        recurrent_twin(nn.LSTM(5, 7, proj_size=3))
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])
    with pytest.raises(ModelError, match="padded batch"):
        recurrent_twin(nn.LSTM(5, 7))(packed)
    with pytest.raises(ModelError, match="padded batch"):
        recurrent_twin(nn.LSTM(5, 7))(torch.randn(4, 5))
