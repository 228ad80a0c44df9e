"""AdamW on fp32 master weights, whatever dtype the model computes in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Optimizer:
    """Master weights, their gradients and moments, of one model.

    In fp32 the masters are the model's own parameters. In bf16 they are fp32 copies: each micro-batch's gradient is
    added to the master's as soon as it is made, and an update writes the rounded masters back into the model.
    Matrices are decayed, the embedding included; one-dimensional tensors are not.
    """

    def __init__(self, model: nn.Module, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = parameter.detach().float()
                parameter.register_post_accumulate_grad_hook(_adder(self.masters[name]))
        matrices = [m for m in self.masters.values() if m.dim() > 1]
        vectors = [m for m in self.masters.values() if m.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their common norm is at most ``max_norm``; the norm before, as a scalar."""
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """One AdamW step at rate ``lr``; gradients are gone afterwards."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._write_back()

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """Moments and step counts by parameter name, for the checkpoint."""
        return {
            f"{name}.{key}": value
            for name, master in self.masters.items()
            for key, value in self._adamw.state[master].items()
        }

    @torch.no_grad()
    def load(self, masters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's weights and moments; an empty ``state`` begins with fresh moments."""
        for name, master in self.masters.items():
            master.copy_(masters[name])
            if state:
                keys = ("step", "exp_avg", "exp_avg_sq")
                self._adamw.state[master] = {key: state[f"{name}.{key}"].to(master.device) for key in keys}
        self._write_back()

    def _write_back(self) -> None:
        pairs = [(p, self.masters[name]) for name, p in self.parameters.items() if p is not self.masters[name]]
        if pairs:
            torch._foreach_copy_([p.data for p, _ in pairs], [m for _, m in pairs])


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
