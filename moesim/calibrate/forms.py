"""The same expert layer in other forms than the eager loop: grouped GEMM, padded batches, weights of 8 and 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesim.errors import InputError

if TYPE_CHECKING:
    import torch

INT4_GROUPS = (128, 64, 32)


def matrices_of(blobs: torch.Tensor, hidden: int, width: int) -> tuple[Any, Any, Any]:
    """Return gate and up [groups, hidden, width] and down [groups, width, hidden] of blobs as `expert_ffn` lays them out."""
    size, groups = hidden * width, blobs.shape[0]
    gate, up = (blobs[:, place * size : (place + 1) * size].view(groups, width, hidden) for place in range(2))
    down = blobs[:, 2 * size : 3 * size].view(groups, hidden, width)
    return gate.transpose(1, 2), up.transpose(1, 2), down.transpose(1, 2)


def grouped_ffn(rows: torch.Tensor, blobs: torch.Tensor, ends: torch.Tensor, hidden: int, width: int) -> torch.Tensor:
    """SwiGLU of rows sorted by group, each matrix product one grouped GEMM.

    Args:
        rows: [tokens, hidden]. blobs: [groups, 3 * hidden * width]. ends: int32[group], where each group's rows end.
    """
    import torch
    from torch.nn import functional

    product = getattr(functional, "grouped_mm", None) or torch._grouped_mm
    gate, up, down = matrices_of(blobs, hidden, width)
    return product(functional.silu(product(rows, gate, offs=ends)) * product(rows, up, offs=ends), down, offs=ends)


def batched_ffn(rows: torch.Tensor, blobs: torch.Tensor, hidden: int, width: int) -> torch.Tensor:
    """SwiGLU of groups that are padded to one length: rows [groups, longest, hidden], each matrix product one bmm."""
    import torch
    from torch.nn import functional

    gate, up, down = matrices_of(blobs, hidden, width)
    return torch.bmm(functional.silu(torch.bmm(rows, gate)) * torch.bmm(rows, up), down)


class Int8Expert:
    """An expert with weights of 8 bits and one scale per output: [out, in] int8 and [out]."""

    weight_bytes = 1.0

    def __init__(self, matrices: list[Any], scales: list[Any]) -> None:
        self.matrices, self.scales = matrices, scales

    @classmethod
    def random(cls, hidden: int, width: int, dtype: Any, device: str, generator: Any) -> Int8Expert:
        """Return an expert of random weights."""
        import torch

        shapes = ((width, hidden), (width, hidden), (hidden, width))
        matrices = [torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device) for shape in shapes]
        scales = [torch.full((shape[0],), shape[1] ** -0.5 / 127).to(device, dtype) for shape in shapes]
        return cls(matrices, scales)

    def clone(self) -> Int8Expert:
        """Return a copy in memory of its own."""
        return Int8Expert([one.clone() for one in self.matrices], [one.clone() for one in self.scales])

    def product(self, rows: torch.Tensor, place: int) -> torch.Tensor:
        """Return rows times matrix `place` (gate, up, down)."""
        import torch

        return torch._weight_int8pack_mm(rows, self.matrices[place], self.scales[place])


class Int4Expert:
    """An expert with weights of 4 bits, packed as torch packs them here, with a scale and a zero per group of inputs."""

    def __init__(self, matrices: list[Any], scales: list[Any], group: int, device: str) -> None:
        self.matrices, self.scales, self.group, self.device = matrices, scales, group, device

    @classmethod
    def random(cls, hidden: int, width: int, dtype: Any, device: str, generator: Any) -> Int4Expert:
        """Return an expert of random weights.

        Raises:
            InputError: widths that no group size divides.
        """
        import torch

        group = int4_group(hidden, width)
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        whole = [torch.randint(0, 16, shape, dtype=torch.int32, generator=generator) for shape in shapes]
        scales = [torch.full((ins // group, outs, 2), ins**-0.5 / 8).to(device, dtype) for outs, ins in shapes]
        return cls([pack_int4(one, device) for one in whole], scales, group, device)

    def clone(self) -> Int4Expert:
        """Return a copy in memory of its own."""
        return Int4Expert([one.clone() for one in self.matrices], [one.clone() for one in self.scales], self.group, self.device)

    def product(self, rows: torch.Tensor, place: int) -> torch.Tensor:
        """Return rows times matrix `place` (gate, up, down)."""
        import torch

        multiply = torch._weight_int4pack_mm_for_cpu if self.device == "cpu" else torch._weight_int4pack_mm
        return multiply(rows, self.matrices[place], self.group, self.scales[place])


def int4_group(hidden: int, width: int) -> int:
    """Return the largest group of inputs that divides both widths; raises InputError if none does."""
    for group in INT4_GROUPS:
        if hidden % group == 0 and width % group == 0:
            return group
    raise InputError(f"no group of {', '.join(map(str, INT4_GROUPS))} inputs divides both {hidden} and {width}")


def int4_weight_bytes(group: int) -> float:
    """Return the bytes per weight, the two-byte scale and zero of each group included."""
    return 0.5 + 4 / group


def pack_int4(whole: torch.Tensor, device: str) -> Any:
    """Pack int32[out, in] of values 0 ... 15 for the device's product."""
    import torch

    if device == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(whole, 1)
    pairs = (whole[:, ::2] << 4 | whole[:, 1::2]).to(torch.uint8).to(device)
    return torch._convert_weight_to_int4pack(pairs, 8)


def quantised_ffn(rows: torch.Tensor, expert: Int8Expert | Int4Expert) -> torch.Tensor:
    """SwiGLU of one expert with packed weights: rows [n, hidden] to [n, hidden]."""
    from torch.nn import functional

    return expert.product(functional.silu(expert.product(rows, 0)) * expert.product(rows, 1), 2)
