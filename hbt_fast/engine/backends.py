"""Who owns the optimizer: plain torch (one process or data-parallel) or DeepSpeed ZeRO 0-3, behind one small interface.

    engine(tokens, cu_seqlens)    forward of the module
    engine.accumulate()           context around all the backward calls of one step; one gradient reduction in it
    engine.backward(loss, last)   may be called many times per step; gradients add up locally, `last` marks the last
    engine.forget()               drop the gradients that there are
    engine.spoil()                make them NaN, in `accumulate`: this rank cannot, and no rank shall, make the update
    engine.step()                 average over ranks, clip, update, forget the gradients; returns the gradient norm;
                                  a norm that is NaN or infinite, which all ranks agree on, is a step without update
    engine.updates                how many updates were made
    engine.finite()               whether this rank's part of the weights has no NaN or infinity
    engine.state()                what a checkpoint needs, whole tensors on the CPU (collective: call it on all ranks)
    engine.restore(state, n)      the optimizer's part of it, after n updates

Parameters are float32 in both (reduced precision is autocast, inside the encoder), so that a whole-tensor checkpoint
loads at any ZeRO stage and any world size.

Several backward calls per step are where DeepSpeed goes silently wrong: under ZeRO-1 and ZeRO-2 every engine.backward
reduces what it has and the parts are not added up right (relative update error 1.5, measured). Two recipes are right:
under ZeRO-1 to 3 `coalesce_grad_reduction`, one reduction for all calls; under ZeRO-0 the accumulation boundary set
by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hbt_fast.base.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")


class SettingError(UserError):
    """Settings that do not go together; the message names them and says what to write."""


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of those that are trained."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element is NaN or infinite (or their squares are too large to be added up: beyond 1e18).

    Args:
        tensors: float32, of any shapes, on one device.
    """
    if not tensors:
        return True
    if tensors[0].is_cuda:
        total = torch.nn.utils.get_total_norm(tensors)
    else:  # a product with itself reads a tensor once, at the speed of memory; norms and isfinite are far slower
        total = torch.stack([flat.dot(flat) for flat in (tensor.detach().reshape(-1) for tensor in tensors)]).sum()
    return bool(torch.isfinite(total))


def _fill_with_nan(module: nn.Module) -> None:
    for _, p in trained_parameters(module):
        p.grad = torch.full_like(p, torch.nan)


def adamw(module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (biases and layer norms are one-dimensional), in one pass."""
    trained = [p for _, p in trained_parameters(module)]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, fused=True)


class TorchEngine:
    """Plain torch: gradients of all ranks are averaged in one flat all-reduce."""

    zero_stage = 0

    def __init__(self, module: nn.Module, optimizer: torch.optim.AdamW, clip: float) -> None:
        self.module, self.optimizer, self.clip, self.updates = module, optimizer, clip, 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)

    def accumulate(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def spoil(self) -> None:
        _fill_with_nan(self.module)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> float:
        trained = [p for _, p in trained_parameters(self.module)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
            dist.all_reduce(flat)
            for p, grad in zip(
                trained, (flat / dist.get_world_size()).split([p.numel() for p in trained]), strict=True
            ):
                p.grad = grad.view_as(p)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.clip or float("inf")))
        if math.isfinite(norm):
            self.optimizer.step()
            self.updates += 1
        self.forget()
        return norm

    def finite(self) -> bool:
        return all_finite([p for _, p in trained_parameters(self.module)])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(trained parameters by name, moments by "name.exp_avg" and "name.exp_avg_sq")."""
        parameters, moments = {}, {}
        for name, p in trained_parameters(self.module):
            parameters[name] = p.detach().cpu().clone()
            for key in MOMENTS:
                if key in self.optimizer.state[p]:
                    moments[f"{name}.{key}"] = self.optimizer.state[p][key].detach().cpu().clone()
        return parameters, moments

    def restore(self, moments: dict[str, Tensor], updates: int) -> None:
        """Set the optimizer to where it was after so many updates (the parameters were loaded before).

        A parameter without moments in the checkpoint never had a gradient, and has none here.
        """
        self.updates = updates
        for name, p in trained_parameters(self.module):
            state = {key: moments[f"{name}.{key}"].to(p.device) for key in MOMENTS if f"{name}.{key}" in moments}
            if state:
                self.optimizer.state[p] = {"step": torch.tensor(float(updates), device=p.device), **state}


class DeepSpeedEngine:
    """DeepSpeed ZeRO 0-3 around the same optimizer.

    Args:
        module: float32 parameters.
        optimizer: from `adamw`.
        clip: largest gradient norm, 0 for no clipping (always written: DeepSpeed's own default is 1.0).
        zero_stage: 0, 1, 2 or 3.
        extra: a user's DeepSpeed configuration; settings that this program must fix are refused by name.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.AdamW, clip: float, zero_stage: int, extra: dict[str, Any]
    ) -> None:
        import deepspeed

        self.engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(clip, zero_stage, extra)
        )
        self.inner, self.module, self.zero_stage, self.updates = optimizer, module, zero_stage, 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.engine(*inputs)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        with self.engine.coalesce_grad_reduction() if self.zero_stage else nullcontext():
            yield

    def backward(self, loss: Tensor, last: bool) -> None:
        if not self.zero_stage:
            self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def forget(self) -> None:
        self.engine.zero_grad()
        self.inner.zero_grad(set_to_none=True)

    def spoil(self) -> None:
        _fill_with_nan(self.module)
        if not self.zero_stage:  # the other ranks reduce at their last backward
            self.engine.set_gradient_accumulation_boundary(True)
            self.engine.allreduce_gradients()

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> float:
        if not self.zero_stage:  # the gradients are averaged and whole here, and DeepSpeed would use them unseen
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not math.isfinite(norm):
                self.engine.zero_grad()
                return norm
        self.engine.step()
        if self.zero_stage:  # the norm is of all ranks; where it is not finite, ZeRO forgets the gradients
            norm = float(self.engine.get_global_grad_norm())
            if not self.engine.was_step_applied():
                return float("nan")
        self.updates += 1
        return norm

    def finite(self) -> bool:
        if self.zero_stage < 3:
            return all_finite(self._partitions())
        own = []
        for _, p in trained_parameters(self.module):  # not all of a partition: DeepSpeed leaves its end uninitialised
            size = p.ds_tensor.ds_numel
            begin = size * dist.get_rank(p.ds_process_group)
            own.append(p.ds_tensor[: max(0, min(size, p.ds_numel - begin))])
        return all_finite(own)

    def _partitions(self) -> list[Tensor]:
        """The float32 weights that this rank updates."""
        if not self.zero_stage:
            return [p for _, p in trained_parameters(self.module)]
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(trained parameters by name, moments by "name.exp_avg" and "name.exp_avg_sq"), whole on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self.zero_stage:
            return TorchEngine(self.module, self.inner, 0).state()
        if self.updates:
            self._link_moments()
        parameters, moments = {}, {}
        for name, p in trained_parameters(self.module):
            parameters[name] = safe_get_full_fp32_param(p).cpu().clone()
            if self.updates:
                for key in MOMENTS:
                    moments[f"{name}.{key}"] = safe_get_full_optimizer_state(p, key).cpu().clone()
        return parameters, moments

    def restore(self, moments: dict[str, Tensor], updates: int) -> None:
        """Set the optimizer to where it was after so many updates (the parameters were loaded before)."""
        from deepspeed.utils import safe_set_full_optimizer_state

        self.updates = updates
        if not self.zero_stage:
            TorchEngine(self.module, self.inner, 0).restore(moments, updates)
            return
        # The moments live in flat partitions that torch makes at the first update; make them now, then fill them.
        zero = self.engine.optimizer
        for partition in self._partitions():
            zeros = {key: torch.zeros_like(partition) for key in MOMENTS}
            step = torch.tensor(float(updates), device=partition.device)
            zero.optimizer.state[partition] = {"step": step, **zeros}
        self._link_moments()
        for name, p in trained_parameters(self.module):
            for key in (key for key in MOMENTS if f"{name}.{key}" in moments):  # others stay zero
                safe_set_full_optimizer_state(p, moments[f"{name}.{key}"].to(zero.device), key)

    def _link_moments(self) -> None:
        """Tell ZeRO-1 and 2 where each parameter's moments lie in the flat partitions.

        DeepSpeed (0.19.8) does so once, after the first parameter group's first update, when the moments of the other
        groups do not exist yet; theirs would be reported missing.
        """
        if self.zero_stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def deepspeed_config(clip: float, zero_stage: int, extra: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed configuration: the user's with ours on top.

    Raises:
        SettingError: the user's sets something else where gradient caching or this program's own settings decide.
    """
    ours = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's idea of batches is not used: micro-batches are ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    fixed = {"optimizer", "scheduler", "fp16", "bf16", "train_batch_size", "torch_autocast", *ours}
    where = {
        "optimizer": "train.learning_rate and train.weight_decay",
        "scheduler": "train.schedule and train.warmup",
        "gradient_clipping": "train.clip",
        "fp16": "train.precision",
        "bf16": "train.precision",
        "torch_autocast": "train.precision",
        "train_batch_size": "batch.size",
    }
    for name in sorted(fixed & extra.keys()):
        if extra[name] not in ("auto", ours.get(name)):
            instead = f"; set {where[name]} instead" if name in where else ""
            raise SettingError(f"train.deepspeed: {name!r} is decided by hbt_fast{instead}. Remove it from that file")
    zero = dict(extra.get("zero_optimization", {}))
    if zero.setdefault("stage", zero_stage) != zero_stage:
        raise SettingError(
            f"train.deepspeed says zero_optimization.stage {zero['stage']}, train.zero_stage says {zero_stage}; "
            "write the same number in both"
        )
    zero.setdefault("overlap_comm", False)
    return {**{k: v for k, v in extra.items() if k not in fixed}, **ours, "zero_optimization": zero}
