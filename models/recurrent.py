"""LSTM, GRU and RNN whose gates' gradients can be seen.

A fused kernel never shows the gradients of its gates (before their non-linearities), which is all that per-example gradients
need. With d_t that of what the inputs contribute and e_t that of what the states contribute,

    weight_ih: sum_t d_t (x) x_t    bias_ih: sum_t d_t    weight_hh: sum_t e_t (x) h_(t-1)    bias_hh: sum_t e_t

and e = d but for a GRU's new gate, where e = r * d (r is the reset gate). The recurrence is written out here, forward and
backward: everything that does not depend on the step before is computed for all steps at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
        loop: Callable[..., tuple[torch.Tensor, torch.Tensor]] = _RECURRENCES[self.mode].apply
        out, last_cell = loop(gates, one.weight_hh, one.bias_hh, state, cell, sink)
        return out, (out[-1], last_cell)


class _Recurrence(torch.autograd.Function):
    """The loop over steps: (gates, weight_hh, bias_hh, state, cell, sink) -> (out (T, n, h), last cell (n, h))."""

    @staticmethod
    def _finish(ctx: Any, e: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Show e to who watches; the gradients of weight_hh and bias_hh where they are asked for."""
        if ctx.sink is not None:
            ctx.sink(e, before)
        flat = e.flatten(0, 1)  # (T n, gates)
        weight = flat.T @ before.flatten(0, 1) if ctx.needs_input_grad[1] else None
        return weight, flat.sum(0) if ctx.needs_input_grad[2] else None


def _gates(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """(T, n, count h) -> (T, n, count, h), the same memory."""
    return tensor.view(*tensor.shape[:2], count, -1)


class _LSTM(_Recurrence):
    @staticmethod
    def forward(
        ctx: Any,
        gates: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        cell: torch.Tensor,
        sink: Sink | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        steps, n, size = len(gates), len(state), state.shape[1]
        active = gates.clone() if bias is None else gates + bias  # (T, n, 4h): input, forget, new, output
        before, cells = gates.new_empty(steps + 1, n, size), gates.new_empty(steps + 1, n, size)
        bent = gates.new_empty(steps, n, size)  # tanh of the cells
        before[0], cells[0] = state, cell
        turned = weight.T.contiguous()
        for t in range(steps):
            now = active[t].addmm_(before[t], turned)
            now[:, : 2 * size].sigmoid_()
            now[:, 2 * size : 3 * size].tanh_()
            now[:, 3 * size :].sigmoid_()
            torch.mul(now[:, size : 2 * size], cells[t], out=cells[t + 1])
            cells[t + 1].addcmul_(now[:, :size], now[:, 2 * size : 3 * size])
            torch.tanh(cells[t + 1], out=bent[t])
            torch.mul(now[:, 3 * size :], bent[t], out=before[t + 1])
        ctx.save_for_backward(active, before, cells, bent, weight)
        ctx.sink = sink
        return before[1:].clone(), cells[steps].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_cell: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        active, before, cells, bent, weight = ctx.saved_tensors
        i, f, g, o = _gates(active, 4).unbind(2)  # (T, n, h) each
        slopes = torch.stack([g * i * (1 - i), cells[:-1] * f * (1 - f), i * (1 - g * g)], dim=2)  # (T, n, 3, h), of the cell
        output_slope, cell_slope = bent * o * (1 - o), o * (1 - bent * bent)  # of the state
        e = torch.empty_like(active)
        cell_part, output_part = _gates(e, 4)[:, :, :3], e[:, :, -o.shape[2] :]
        state, cell = torch.zeros_like(grad_out[0]), grad_cell.clone()
        for t in range(len(active) - 1, -1, -1):
            state += grad_out[t]
            cell.addcmul_(state, cell_slope[t])
            torch.mul(cell[:, None], slopes[t], out=cell_part[t])
            torch.mul(state, output_slope[t], out=output_part[t])
            cell.mul_(f[t])
            torch.mm(e[t], weight, out=state)
        return e, *_Recurrence._finish(ctx, e, before[:-1]), state, cell, None


class _GRU(_Recurrence):
    @staticmethod
    def forward(
        ctx: Any,
        gates: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        cell: torch.Tensor,
        sink: Sink | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        steps, n, size = len(gates), len(state), state.shape[1]
        active = gates.clone()  # (T, n, 3h): reset, update, new
        hidden = gates.new_empty(steps, n, size)  # what the states contribute to the new gate
        before = gates.new_empty(steps + 1, n, size)
        before[0] = state
        turned, offset = weight.T.contiguous(), gates.new_zeros(3 * size) if bias is None else bias
        for t in range(steps):
            now, product = active[t], torch.addmm(offset, before[t], turned)
            now[:, : 2 * size].add_(product[:, : 2 * size]).sigmoid_()
            hidden[t] = product[:, 2 * size :]
            new = now[:, 2 * size :].addcmul_(now[:, :size], hidden[t]).tanh_()
            torch.lerp(new, before[t], now[:, size : 2 * size], out=before[t + 1])
        ctx.save_for_backward(active, before, hidden, weight)
        ctx.sink = sink
        return before[1:].clone(), cell.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_cell: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        active, before, hidden, weight = ctx.saved_tensors
        r, z, n = _gates(active, 3).unbind(2)  # (T, n, h) each
        new = (1 - z) * (1 - n * n)
        slopes = torch.stack([new * hidden * r * (1 - r), (before[:-1] - n) * z * (1 - z), new * r], dim=2)  # of the state
        e = torch.empty_like(active)
        parts = _gates(e, 3)
        state = torch.zeros_like(grad_out[0])
        states = torch.empty_like(grad_out)
        for t in range(len(active) - 1, -1, -1):
            torch.add(state, grad_out[t], out=states[t])
            torch.mul(states[t][:, None], slopes[t], out=parts[t])
            torch.addmm(states[t] * z[t], e[t], weight, out=state)
        d = torch.cat([e[:, :, : 2 * n.shape[2]], states * new], dim=2)
        return d, *_Recurrence._finish(ctx, e, before[:-1]), state, grad_cell, None


class _Elman(_Recurrence):
    """h_t = bend(gates_t + weight_hh h_(t-1)): what the two plain recurrences share."""

    @staticmethod
    def _loop(
        ctx: Any,
        gates: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        cell: torch.Tensor,
        sink: Sink | None,
        bend: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = torch.cat([state[None], gates if bias is None else gates + bias])  # (T + 1, n, h)
        turned = weight.T.contiguous()
        for t in range(len(gates)):
            bend(before[t + 1].addmm_(before[t], turned))
        ctx.save_for_backward(before, weight)
        ctx.sink = sink
        return before[1:].clone(), cell.clone()

    @staticmethod
    def _back(
        ctx: Any, grad_out: torch.Tensor, grad_cell: torch.Tensor, slope: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor | None, ...]:
        before, weight = ctx.saved_tensors
        slopes = slope(before[1:])
        e, state = torch.empty_like(slopes), torch.zeros_like(grad_out[0])
        for t in range(len(slopes) - 1, -1, -1):
            torch.mul(state + grad_out[t], slopes[t], out=e[t])
            torch.mm(e[t], weight, out=state)
        return e, *_Recurrence._finish(ctx, e, before[:-1]), state, grad_cell, None


class _Tanh(_Elman):
    @staticmethod
    def forward(
        ctx: Any,
        gates: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        cell: torch.Tensor,
        sink: Sink | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _Elman._loop(ctx, gates, weight, bias, state, cell, sink, torch.Tensor.tanh_)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_cell: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Elman._back(ctx, grad_out, grad_cell, lambda state: 1 - state * state)


class _ReLU(_Elman):
    @staticmethod
    def forward(
        ctx: Any,
        gates: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        state: torch.Tensor,
        cell: torch.Tensor,
        sink: Sink | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _Elman._loop(ctx, gates, weight, bias, state, cell, sink, torch.Tensor.relu_)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor, grad_cell: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _Elman._back(ctx, grad_out, grad_cell, lambda state: (state > 0).to(state.dtype))


_RECURRENCES: dict[str, type[_Recurrence]] = {"LSTM": _LSTM, "GRU": _GRU, "RNN_TANH": _Tanh, "RNN_RELU": _ReLU}


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
