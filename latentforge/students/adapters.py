"""Low-rank adapters (LoRA) of a causal LM, through peft: they are trained, and every other tensor stays as it is.

Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentforge.errors import RefusedError

_NAME = "default"


@dataclass(frozen=True)
class Lora:
    """Adapters of ``rank`` on each module whose name ends with one of ``targets``: y = Wx + alpha / rank · B·A·x, with
    ``dropout`` of x while training. B is zero at first, so that a student starts as the model that it adapts."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


def adapt(model: Any, lora: Lora, *, seed: int) -> None:
    """Put adapters into ``model``, in place, and freeze all else; their start depends on ``seed`` alone.

    RefusedError where a target is not in the model, or is its embedding or head, which the loss reads as they are.
    """
    peft = library()
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets), bias="none"
    )
    direct = {id(one) for one in (model.get_input_embeddings(), model.get_output_embeddings())}
    hit = {name.rpartition(".")[2]: id(one) for name, one in model.named_modules()}
    missing = [name for name in lora.targets if name not in hit]
    if missing:
        linear = sorted({n.rpartition(".")[2] for n, one in model.named_modules() if isinstance(one, nn.Linear)})
        raise RefusedError(
            f"distill.lora.target_modules: the student has no {', '.join(missing)}",
            next=f"name some of {', '.join(linear)}",
        )
    if wrong := [name for name in lora.targets if hit[name] in direct]:
        raise RefusedError(
            f"distill.lora.target_modules: {', '.join(wrong)} is read by the loss itself, past an adapter",
            next="leave it out",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
        except ValueError as error:
            raise RefusedError(f"peft cannot adapt this student: {error}") from None
    model.requires_grad_(False)
    for _, parameter in adapters(model):
        parameter.requires_grad_(True)


def library() -> Any:
    """peft; RefusedError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise RefusedError(
            f"distill.lora needs peft, which cannot be imported: {error}", next="pip install 'latentforge[train]'"
        ) from None
    return peft


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapters' tensors by name; none where the model has no adapters."""
    return ((name, p) for name, p in model.named_parameters() if ".lora_" in name)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The tensors beside adapters, by the names that they have without them; none where there are no adapters."""
    if next(adapters(model), None) is None:
        return {}
    return {_plain(name): p for name, p in model.named_parameters() if ".lora_" not in name}


def adapted(model: nn.Module) -> Lora | None:
    """The adapters as the modules themselves hold them; None where there are none."""
    layers = {name.rpartition(".")[2]: one for name, one in model.named_modules() if hasattr(one, "lora_A")}
    if not layers:
        return None
    one: Any = next(iter(layers.values()))
    dropout = float(getattr(one.lora_dropout[_NAME], "p", 0.0))
    return Lora(int(one.r[_NAME]), float(one.lora_alpha[_NAME]), dropout, tuple(layers))


class Trained(nn.Module):
    """What of a model is trained, under the model's own names: it has moments, and is kept in checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._of = (model,)  # not a module of its own

    def named_parameters(self, *arguments: Any, **settings: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the model that want a gradient."""
        return (one for one in self._of[0].named_parameters(*arguments, **settings) if one[1].requires_grad)


def trained_part(model: nn.Module) -> nn.Module:
    """What of a model is kept in checkpoints: its trained tensors where it is adapted, else all of it."""
    return model if adapted(model) is None else Trained(model)


def merged(start: Any, lora: Lora, weights: Mapping[str, Tensor]) -> Any:
    """A copy of ``start`` (fp32, without adapters) with the adapters' ``weights`` (fp32 masters) added to its own."""
    model = copy.deepcopy(start)
    adapt(model, lora, seed=0)
    with torch.no_grad():
        for name, parameter in adapters(model):
            parameter.copy_(weights[name])
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    del model.peft_config
    return model


def strayed(product: nn.Module, start: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """The tensors of a merged ``product`` that have no adapter in ``weights``, and are not those of ``start`` in the
    product's own type."""
    whole, added = dict(start.named_parameters()), {f"{name.partition('.lora_')[0]}.weight" for name in weights}
    each = ((name, value) for name, value in product.named_parameters() if name not in added)
    return [name for name, value in each if not torch.equal(value, whole[name].to(value))]


def save_adapter(lora: Lora, weights: Mapping[str, Tensor], folder: Path, *, base: str) -> None:
    """The adapters alone as peft keeps them: ``adapter_config.json`` and ``adapter_model.safetensors``, fp32; ``base``
    says what they belong to."""
    from safetensors.torch import save_file

    peft = library()
    folder.mkdir(parents=True)
    peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": value for name, value in weights.items()}
    save_file({n: v.detach().cpu().contiguous() for n, v in tensors.items()}, folder / "adapter_model.safetensors")


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")
