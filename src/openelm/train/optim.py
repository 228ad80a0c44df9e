"""AdamW on fp32 master weights, whatever dtype the model computes in and however it is sharded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from openelm.train.parallel import own_rows

# Where AdamW's kernel itself divides the gradients and leaves a step out on request.
_FUSED_GUARD = ("cpu", "cuda")


class Optimizer:
    """Master weights, their gradients and moments, of one model that was built in fp32.

    Masters are plain tensors: of a sharded model, the rows that this rank holds. Computing in fp32, or sharded, they
    share the model's memory. Computing in bf16 alone, the model's parameters become copies: each micro-batch's gradient
    is added to the master's as soon as it is made, and an update writes the rounded masters back; frozen ones are kept
    in bf16 only. Matrices are decayed, the embedding included; one-dimensional tensors are not. ``ema_decay`` above 0
    keeps an exponential average too.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        ema_decay: float = 0.0,
    ) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}  # of the whole tensors
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor):
                self.masters[name] = own_rows(parameter.detach())
            elif dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach()
                parameter.data = parameter.data.to(dtype)
                parameter.register_post_accumulate_grad_hook(_adder(self.masters[name]))
        if dtype != torch.float32:
            for parameter in model.parameters():
                if not parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.to(dtype)  # nothing is ever added to it
        self._device = next(iter(self.masters.values())).device
        matrices = [m for name, m in self.masters.items() if len(self.shapes[name]) > 1]
        vectors = [m for name, m in self.masters.items() if len(self.shapes[name]) <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
        self._ema_decay = ema_decay
        self.ema = {name: m.detach().clone() for name, m in self.masters.items()} if ema_decay else {}

    def squares(self) -> Tensor:
        """The sum of the squares of all gradients that this rank holds: a scalar on the device."""
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor) and parameter.grad is not None:
                self.masters[name].grad = own_rows(parameter.grad)
                parameter.grad = None
        norms = torch._foreach_norm([m.grad for m in self.masters.values() if m.grad is not None])
        return torch.stack(norms).to(_exact(self._device)).square().sum()

    @torch.no_grad()
    def update(self, lr: float, divisor: Tensor | None = None, skip: Tensor | None = None) -> None:
        """One AdamW step at rate ``lr`` on the gradients over ``divisor``, or none where ``skip`` is 1.

        Both are scalars on the device, which the host does not wait for. Gradients are gone afterwards.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr
        if self._device.type in _FUSED_GUARD:
            self._adamw.grad_scale = None if divisor is None else divisor.float()  # type: ignore[attr-defined]
            self._adamw.found_inf = None if skip is None else skip.float()  # type: ignore[attr-defined]
            self._adamw.step()
        elif skip is None or not skip.item():
            if divisor is not None:
                torch._foreach_div_([m.grad for m in self.masters.values() if m.grad is not None], divisor.float())
            self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._write_back()
        if self.ema:
            torch._foreach_lerp_(list(self.ema.values()), list(self.masters.values()), 1 - self._ema_decay)

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Moments and step counts (and the average's weights, as ema.NAME) by parameter name, for the checkpoint."""
        moments = {
            f"{name}.{key}": value
            for name, master in self.masters.items()
            for key, value in self._adamw.state[master].items()
        }
        return {**moments, **{f"ema.{name}": tensor for name, tensor in self.ema.items()}}

    @torch.no_grad()
    def load_weights(self, read: Callable[[str], Tensor]) -> None:
        """Put ``read(name)``, this rank's rows of a weight, in the place of each master."""
        for name, master in self.masters.items():
            master.copy_(read(name))
        self._write_back()
        self.ema = {name: m.detach().clone() for name, m in self.masters.items()} if self.ema else {}

    @torch.no_grad()
    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Put ``read(name)`` in the place of all that ``state`` gave."""
        for name, master in self.masters.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            found = {key: read(f"{name}.{key}") for key in keys}
            self._adamw.state[master] = {
                # The step count stays where the kernel expects it.
                key: value.to(master.device) if key != "step" or master.is_cuda else value
                for key, value in found.items()
            }
        for name, tensor in self.ema.items():
            tensor.copy_(read(f"ema.{name}"))

    def _write_back(self) -> None:
        pairs = [(p, self.masters[name]) for name, p in self.parameters.items() if p.dtype != torch.float32]
        if pairs:
            torch._foreach_copy_([p.data for p, _ in pairs], [m for _, m in pairs])


def _exact(device: torch.device) -> torch.dtype:
    """The dtype to add up figures of a whole model in: fp64, which Apple's GPU lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def _adder(master: Tensor) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return add
