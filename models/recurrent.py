"""LSTM, GRU and RNN whose gates' gradients can be seen.

A fused kernel never shows the gradients of its gates (before their non-linearities), which is all that per-example gradients
need. With d_t that of what the inputs contribute and e_t that of what the states contribute,

    weight_ih: sum_t d_t (x) x_t    bias_ih: sum_t d_t    weight_hh: sum_t e_t (x) h_(t-1)    bias_hh: sum_t e_t

and e = d but for a GRU's new gate, where e = r * d (r is the reset gate). The recurrence is written out here, forward and
backward: everything that does not depend on the step before is computed for all steps at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from urna.protocol.errors import ModelError

Sink = Callable[[torch.Tensor, torch.Tensor], None]  # gets e (T, n, gates) and the states before each step (T, n, h)
State = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Direction:
    """One layer of a twin, read one way.

    Args:
        weight_ih: (gates, d).
        bias_ih: (gates,).
        weight_hh: (gates, h).
        bias_hh: (gates,).
    """

    weight_ih: nn.Parameter
    bias_ih: nn.Parameter | None
    weight_hh: nn.Parameter
    bias_hh: nn.Parameter | None


@dataclass(frozen=True)
class Watch:
    """What an engine does with a twin's gates.

    Args:
        before: Gets what one direction's inputs (T, n, d) contribute to the gates, (T, n, gates), and gives back the same,
            where its gradient will be seen.
        after: Makes what gets e and the states.
    """

    before: Callable[[Direction, torch.Tensor, torch.Tensor], torch.Tensor]
    after: Callable[[Direction], Sink]


class RecurrentTwin(nn.RNNBase):
    """Same parameters, arguments and results as the module that it stands in for; sequences are padded tensors."""

    watch: Watch | None = None  # set by an engine while it looks on

    def forward(self, input: torch.Tensor, hx: State | None = None) -> tuple[torch.Tensor, State]:  # noqa: A002  # torch's name for it
        """(n, T, d), or (T, n, d) without ``batch_first`` -> outputs and last states, as torch's own.

        Raises:
            ModelError: the input is a packed sequence, or has no batch axis.
        """
        if not isinstance(input, torch.Tensor) or input.dim() != 3:
            raise ModelError("expected a padded batch (n, T, d) for a recurrent layer, found another: pad the sequences")
        with torch.autocast(input.device.type, enabled=False):  # sums over many steps are for float32
            return self._forward(input.float(), hx)

    def _forward(self, inputs: torch.Tensor, hx: State | None) -> tuple[torch.Tensor, State]:
        layer = inputs.transpose(0, 1) if self.batch_first else inputs  # (T, n, d)
        lasts: list[tuple[torch.Tensor, torch.Tensor]] = []
        ways = 2 if self.bidirectional else 1
        for number in range(self.num_layers):
            outputs = []
            for way in range(ways):
                first = self._first_states(layer, hx, number * ways + way)
                out, last = self._run(layer.flip(0) if way else layer, self._direction(number, way), *first)
                outputs.append(out.flip(0) if way else out)
                lasts.append(last)
            layer = torch.cat(outputs, dim=2)
            if self.dropout and number < self.num_layers - 1:
                layer = functional.dropout(layer, self.dropout, self.training)
        states = torch.stack([last[0] for last in lasts])
        state: State = (states, torch.stack([last[1] for last in lasts])) if self.mode == "LSTM" else states
        return layer.transpose(0, 1) if self.batch_first else layer, state

    def _direction(self, number: int, way: int) -> Direction:
        suffix = f"_l{number}" + ("_reverse" if way else "")
        biases = [self.get_parameter(f"bias_{kind}{suffix}") if self.bias else None for kind in ("ih", "hh")]
        weights = [self.get_parameter(f"weight_{kind}{suffix}") for kind in ("ih", "hh")]
        return Direction(weights[0], biases[0], weights[1], biases[1])

    def _first_states(self, layer: torch.Tensor, hx: State | None, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        if hx is None:
            zeros = layer.new_zeros(layer.shape[1], self.hidden_size)
            return zeros, zeros
        return (hx[0][at], hx[1][at]) if isinstance(hx, tuple) else (hx[at], hx[at])

    def _run(
        self, layer: torch.Tensor, one: Direction, state: torch.Tensor, cell: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        gates = functional.linear(layer, one.weight_ih, one.bias_ih)  # (T, n, gates)
        sink: Sink | None = None
        if self.watch is not None:
            gates, sink = self.watch.before(one, layer, gates), self.watch.after(one)
        loop: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _Recurrence.apply
        out, last_cell = loop(_KINDS[self.mode], sink, gates, one.weight_hh, one.bias_hh, state, cell)
        return out, (out[-1], last_cell)


@dataclass(frozen=True)
class _Given:
    """What a loop starts from: gates (T, n, g h) of the inputs, weight (g h, h), bias (g h,), state and cell (n, h)."""

    gates: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    state: torch.Tensor
    cell: torch.Tensor

    def with_bias(self) -> torch.Tensor:
        """A copy of the gates, to be written over."""
        return self.gates.clone() if self.bias is None else self.gates + self.bias

    def states(self) -> torch.Tensor:
        """Room for the states before and after each step, (T + 1, n, h)."""
        before = self.gates.new_empty(len(self.gates) + 1, *self.state.shape)
        before[0] = self.state
        return before


@dataclass(frozen=True)
class _Kind:
    """One kind of recurrence.

    Args:
        run: Gives the states (T + 1, n, h), the last cell, and what `back` needs beside them.
        back: Of the states, the weight, that, and the gradients of outputs and last cell: d, e, and the gradients of the first
            state and cell.
    """

    run: Callable[[_Given], tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]]
    back: Callable[
        [torch.Tensor, torch.Tensor, Sequence[torch.Tensor], torch.Tensor, torch.Tensor],
        tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ]


class _Recurrence(torch.autograd.Function):
    """The loop over steps: (kind, sink, gates, weight_hh, bias_hh, state, cell) -> (out (T, n, h), last cell (n, h))."""

    @staticmethod
    def forward(ctx: Any, kind: _Kind, sink: Sink | None, *given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        start = _Given(*given)
        before, cell, rest = kind.run(start)
        ctx.save_for_backward(before, start.weight, *rest)
        ctx.kind, ctx.sink = kind, sink
        return before[1:].clone(), cell.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_cell: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        before, weight, *rest = ctx.saved_tensors
        d, e, state, cell = ctx.kind.back(before, weight, rest, grad_out, grad_cell)
        if ctx.sink is not None:
            ctx.sink(e, before[:-1])
        _, _, _, asks_weight, asks_bias, _, _ = ctx.needs_input_grad
        flat = e.flatten(0, 1)  # (T n, gates)
        grad_weight = flat.T @ before[:-1].flatten(0, 1) if asks_weight else None
        return None, None, d, grad_weight, flat.sum(0) if asks_bias else None, state, cell


def _parts(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """(T, n, count h) -> (T, n, count, h), the same memory."""
    return tensor.view(*tensor.shape[:2], count, -1)


def _run_lstm(given: _Given) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    active, before, size = given.with_bias(), given.states(), given.state.shape[1]  # input, forget, new, output
    cells = torch.empty_like(before)
    bent = torch.empty_like(before[1:])  # tanh of the cells
    cells[0] = given.cell
    turned = given.weight.T.contiguous()
    for t in range(len(active)):
        now = active[t].addmm_(before[t], turned)
        now[:, : 2 * size].sigmoid_()
        now[:, 2 * size : 3 * size].tanh_()
        now[:, 3 * size :].sigmoid_()
        torch.mul(now[:, size : 2 * size], cells[t], out=cells[t + 1])
        cells[t + 1].addcmul_(now[:, :size], now[:, 2 * size : 3 * size])
        torch.tanh(cells[t + 1], out=bent[t])
        torch.mul(now[:, 3 * size :], bent[t], out=before[t + 1])
    return before, cells[-1], (active, cells, bent)


def _back_lstm(
    before: torch.Tensor, weight: torch.Tensor, rest: Sequence[torch.Tensor], grad_out: torch.Tensor, grad_cell: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    active, cells, bent = rest
    i, f, g, o = _parts(active, 4).unbind(2)  # (T, n, h) each
    slopes = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)], dim=2)  # (T, n, 3, h), of the cell
    output_slope, cell_slope = bent * o * (1 - o), o * (1 - bent * bent)  # of the state
    e = torch.empty_like(active)
    cell_part, output_part = _parts(e, 4)[:, :, :3], e[:, :, -o.shape[2] :]
    state, cell = torch.zeros_like(before[0]), grad_cell.clone()
    for t in range(len(active) - 1, -1, -1):
        state += grad_out[t]
        cell.addcmul_(state, cell_slope[t])
        torch.mul(cell[:, None], slopes[t], out=cell_part[t])
        torch.mul(state, output_slope[t], out=output_part[t])
        cell.mul_(f[t])
        torch.mm(e[t], weight, out=state)
    return e, e, state, cell


def _run_gru(given: _Given) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    active, before, size = given.gates.clone(), given.states(), given.state.shape[1]  # reset, update, new
    hidden = torch.empty_like(before[1:])  # what the states contribute to the new gate
    turned = given.weight.T.contiguous()
    offset = given.gates.new_zeros(3 * size) if given.bias is None else given.bias
    for t in range(len(active)):
        now, product = active[t], torch.addmm(offset, before[t], turned)
        now[:, : 2 * size].add_(product[:, : 2 * size]).sigmoid_()
        hidden[t] = product[:, 2 * size :]
        new = now[:, 2 * size :].addcmul_(now[:, :size], hidden[t]).tanh_()
        torch.lerp(new, before[t], now[:, size : 2 * size], out=before[t + 1])
    return before, given.cell, (active, hidden)


def _back_gru(
    before: torch.Tensor, weight: torch.Tensor, rest: Sequence[torch.Tensor], grad_out: torch.Tensor, grad_cell: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    active, hidden = rest
    r, z, n = _parts(active, 3).unbind(2)  # (T, n, h) each
    new = (1 - z) * (1 - n * n)
    slopes = torch.stack([new * hidden * r * (1 - r), (before[:-1] - n) * z * (1 - z), new * r], dim=2)  # of the state
    e, states = torch.empty_like(active), torch.empty_like(grad_out)
    parts, state = _parts(e, 3), torch.zeros_like(before[0])
    for t in range(len(active) - 1, -1, -1):
        torch.add(state, grad_out[t], out=states[t])
        torch.mul(states[t][:, None], slopes[t], out=parts[t])
        torch.addmm(states[t] * z[t], e[t], weight, out=state)
    d = torch.cat([e[:, :, : 2 * n.shape[2]], states * new], dim=2)
    return d, e, state, grad_cell


def _run_plain(
    given: _Given, bend: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """h_t = bend(gates_t + weight_hh h_(t-1))."""
    before = torch.cat([given.state[None], given.with_bias()])
    turned = given.weight.T.contiguous()
    for t in range(len(given.gates)):
        bend(before[t + 1].addmm_(before[t], turned))
    return before, given.cell, ()


def _back_plain(
    before: torch.Tensor,
    weight: torch.Tensor,
    rest: Sequence[torch.Tensor],
    grad_out: torch.Tensor,
    grad_cell: torch.Tensor,
    slope: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert not rest
    slopes, state = slope(before[1:]), torch.zeros_like(before[0])
    e = torch.empty_like(slopes)
    for t in range(len(slopes) - 1, -1, -1):
        torch.mul(state + grad_out[t], slopes[t], out=e[t])
        torch.mm(e[t], weight, out=state)
    return e, e, state, grad_cell


_KINDS = {
    "LSTM": _Kind(_run_lstm, _back_lstm),
    "GRU": _Kind(_run_gru, _back_gru),
    "RNN_TANH": _Kind(
        partial(_run_plain, bend=torch.Tensor.tanh_), partial(_back_plain, slope=lambda state: 1 - state * state)
    ),
    "RNN_RELU": _Kind(
        partial(_run_plain, bend=torch.Tensor.relu_), partial(_back_plain, slope=lambda state: (state > 0).to(state.dtype))
    ),
}


def recurrent_twin(module: nn.RNNBase) -> RecurrentTwin:
    """Make the twin of an nn.LSTM, nn.GRU or nn.RNN; it holds the very same parameters, under the same names.

    Raises:
        ModelError: the module projects its states (``proj_size``), which no twin exists for.
    """
    if module.proj_size:
        raise ModelError(f"expected a recurrent layer without proj_size, found {module.proj_size}: choose another model")
    settings = (module.mode, module.input_size, module.hidden_size, module.num_layers, module.bias, module.batch_first)
    twin = RecurrentTwin(*settings, module.dropout, module.bidirectional, device="meta")
    for name, parameter in module.named_parameters():
        twin.register_parameter(name, parameter)
    return twin.train(module.training)
